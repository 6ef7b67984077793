"""Whole-loop speed of the recurrent cells, taking turns in one process.

    python benchmarks/cells.py --workload vector popgym --turns 9

A turn is one rollout and one update of every cell and sequence length, in random order. Prints environment steps per
second (median), and the ratio to `lstm` at the first sequence length (median over turns).
"""

from __future__ import annotations

import argparse
import random
import statistics
import time

import torch
from workloads import WORKLOADS, run_config

from dualhead.running.machine import keep_freed_memory
from dualhead.running.session import Session

CELLS = ("lstm", "gru", "mingru", "lru", "none")


def turn(session: Session) -> float:
    """Seconds of a rollout and an update."""
    began = time.perf_counter()
    while not session.learner.rollout_is_ready:
        session.record(session.streams.step(session.learner.act(session.observations)))
    session.learn()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=CELLS)
    parser.add_argument("--sequence-length", nargs="+", type=int, default=[16, 128], help="default 16 and 128")
    parser.add_argument("--turns", type=int, default=9, help="measured turns, after 2 for warm-up; default 9")
    parser.add_argument("--threads", type=int, default=2, help="of torch; default 2")
    args = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(args.threads)
    for name in args.workload:
        workload = WORKLOADS[name]
        sessions = {}
        for cell in args.cells:
            for length in args.sequence_length:
                settings = {"total_steps": 1000 * workload.num_steps, "memory": cell, "sequence_length": length}
                sessions[cell, length] = Session(run_config(workload, "", **settings))
                sessions[cell, length].begin()
        seconds: dict[tuple[str, int], list[float]] = {key: [] for key in sessions}
        for number in range(args.turns + 2):
            for key in random.sample(list(sessions), len(sessions)):
                taken = turn(sessions[key])
                if number >= 2:
                    seconds[key].append(taken)
        first = seconds[args.cells[0], args.sequence_length[0]]
        for (cell, length), taken in seconds.items():
            speed = workload.num_steps / statistics.median(taken)
            ratio = statistics.median(theirs / ours for theirs, ours in zip(first, taken))
            print(
                f"{name:>7} {cell:>6} {length:>4}: {speed:8,.0f} steps/s, {ratio:.2f} of {args.cells[0]}'s", flush=True
            )


if __name__ == "__main__":
    main()
