"""Compares the speed of versions of this project. They alternate, so that a machine that slows down slows all of them.

    git worktree add ../before HEAD~3
    python benchmarks/versions.py ../before . --workload vector --turns 25

Each version trains in a process of its own, by its own copy of this script. A turn is one rollout and one update of
every version, in random order. A version's ratio is the median over turns of its time divided by the first version's.
The last line says whether all versions have bit-identical weights: the runs have the same seed, so a change for speed
alone must not change them.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path


def work(root: Path, workload: str, threads: int) -> None:
    """Does a turn for every line on stdin and prints its seconds; at the end, prints the digest of its weights."""
    sys.path[:0] = [str(root / "src"), str(root / "benchmarks")]
    import torch
    from workloads import WORKLOADS, run_config

    import dualhead
    from dualhead.running.machine import keep_freed_memory
    from dualhead.running.session import Session

    assert Path(dualhead.__file__).is_relative_to(root), f"{dualhead.__file__} is not in {root}"
    keep_freed_memory()
    torch.set_num_threads(threads)
    chosen = WORKLOADS[workload]
    session = Session(run_config(chosen, "", total_steps=1000 * chosen.num_steps))
    session.begin()
    for _ in sys.stdin:
        began = time.perf_counter()
        while not session.learner.rollout_is_ready:
            session.record(session.streams.step(session.learner.act(session.observations)))
        rollout_ended = time.perf_counter()
        session.learn()
        print(rollout_ended - began, time.perf_counter() - rollout_ended, flush=True)
    digest = hashlib.sha256()
    for parameter in session.learner.policy.parameters():
        digest.update(parameter.detach().numpy().tobytes())
    print(digest.hexdigest())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="+", type=Path, help="checkouts, the one to compare with first")
    parser.add_argument("--workload", default="vector", help="vector, grid or popgym; default vector")
    parser.add_argument("--turns", type=int, default=15, help="measured turns, after 3 for warm-up; default 15")
    parser.add_argument("--threads", type=int, default=2, help="of torch; default 2")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    roots = [version.resolve() for version in args.versions]
    if args.work:
        work(roots[0], args.workload, args.threads)
        return
    missing = [str(root) for root in roots if not (root / "src" / "dualhead").is_dir()]
    if missing or args.turns < 1:
        parser.error(
            f"expected --turns of at least 1 and checkouts of dualhead, got {args.turns} and {missing or roots}"
        )
    options = ["--work", "--workload", args.workload, "--threads", str(args.threads)]
    workers = [
        subprocess.Popen(
            [sys.executable, str(root / "benchmarks" / "versions.py"), str(root), *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for root in roots
    ]
    seconds: list[list[tuple[float, ...]]] = [[] for _ in workers]
    for turn in range(args.turns + 3):
        for number in random.sample(range(len(workers)), len(workers)):
            stdin, stdout = workers[number].stdin, workers[number].stdout
            assert stdin is not None
            assert stdout is not None
            print("turn", file=stdin, flush=True)
            answer = stdout.readline()
            if not answer:
                sys.exit(f"{args.versions[number]} ended early; its error is printed above")
            if turn >= 3:
                seconds[number].append(tuple(map(float, answer.split())))
    digests = [worker.communicate()[0].strip() for worker in workers]
    first = [sum(parts) for parts in seconds[0]]
    for version, parts in zip(args.versions, seconds):
        rollout, update = (statistics.median(part) for part in zip(*parts))
        ratio = statistics.median(sum(mine) / theirs for mine, theirs in zip(parts, first))
        print(f"{version}: rollout {rollout:.3f} s, update {update:.3f} s, {ratio:.3f} of the first version's time")
    print("bit-identical weights" if len(set(digests)) == 1 else "weights differ")


if __name__ == "__main__":
    main()
