"""Many small runs that get signals: is a checkpoint lost, does a run hang, does a process stay, do the bits change?

    python benchmarks/signals.py --kills 100 --others 60 --out benchmarks/results/signals.csv

Each run is a process group of its own. It is resumed to the end, and its weights are compared with those of a run that
nobody disturbed. A run whose worker was killed begins new episodes, so its weights are not compared.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import itertools
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from dualhead.cli import main
from dualhead.running.checkpoint import checkpoints, read_json, read_newest
from dualhead.studies.processes import _PRELOADED

SECONDS_TO_END = 15.0
"""After the last signal; a run that is still there hangs."""
SETTINGS = "--num-envs 2 --total-steps 1280 --rollout-length 32 --sequence-length 32 --batch-size 64 --num-epochs 1"
SETTINGS += " --hidden-size 4 --encoder-sizes 4 --checkpoint-every 128 --eval-episodes 2 --num-threads 1"
STOPS = ("SIGINT", "SIGTERM", "SIGHUP")
OTHERS = [
    *[(mode, name, how) for mode in ("sync", "async") for name in STOPS for how in ("single", "group", "twice")],
    *[(mode, "SIGUSR1", "group") for mode in ("sync", "async")],
    ("async", "SIGTERM", "worker stopped"),
    ("async", "SIGKILL", "worker"),
]
"""Vectorization, signal, and who gets it."""


def main_of_run(arguments: list[str], log: str) -> None:
    os.setsid()
    with Path(log).open("a") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    sys.exit(main(arguments))


def start(run: Path, *arguments: str) -> Any:
    process = multiprocessing.get_context("fork").Process(target=main_of_run, args=(list(arguments), f"{run}.log"))
    process.start()
    return process


def begin(run: Path, mode: str) -> Any:
    options = ["--vectorization", mode, "--save-on", "SIGUSR1", "--run-dir", str(run)]
    return start(run, "train", "CartPole-v1", *SETTINGS.split(), *options)


def group_of(leader: int) -> list[psutil.Process]:
    """Processes of a run that have not ended."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.Error, OSError):
            pass
    return found


def kill_group(leader: int) -> None:
    for process in group_of(leader):
        process.kill()


def send(process: Any, name: str, how: str) -> None:
    number = getattr(signal, name)
    if how.startswith("worker"):
        worker = random.choice(psutil.Process(process.pid).children())
        worker.send_signal(signal.SIGSTOP if how == "worker stopped" else number)
    for _ in range({"twice": 2, "worker": 0, "worker stopped": 2}.get(how, 1)):
        (os.kill if how == "single" else os.killpg)(process.pid, number)
        time.sleep(random.uniform(0.0, 0.1) if how == "twice" else 0.3 if how == "worker stopped" else 0.0)


def newest_steps(run: Path) -> int:
    paths = checkpoints(run)
    return int(paths[0].stem.removeprefix("step-")) if paths else 0


def weights(run: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in read_newest(run)[1].items() if name.startswith("policy/")}


def disturb(run: Path, mode: str, name: str, how: str, *, seconds: float) -> dict[str, Any]:
    """One run that gets a signal after about a random part of `seconds`, and what became of it."""
    process = begin(run, mode)
    is_kill = name == "SIGKILL" and how != "worker"
    begun = Path(f"{run}.log") if is_kill else run / "metrics.csv"
    while not begun.exists() and process.is_alive():
        time.sleep(0.01)
    at = random.uniform(0.0, seconds * (0.9 if is_kill else 0.4))
    time.sleep(at)
    before = newest_steps(run)
    was_there = process.is_alive()
    if was_there:
        send(process, name, how)
    signalled = time.perf_counter()
    process.join(SECONDS_TO_END)
    hangs = process.is_alive()
    took = time.perf_counter() - signalled
    time.sleep(0.2)
    if orphans := [] if hangs else group_of(process.pid):
        time.sleep(2.0)
        orphans = group_of(process.pid)
    kill_group(process.pid)
    process.join()
    after, summary = newest_steps(run), read_json(run / "summary.json") or {}
    log = Path(f"{run}.log").read_text()
    if is_kill or how in ("twice", "worker stopped"):
        lost = after < before
    else:  # the run saved the step that it was in
        lost = not after or after < before or (how != "worker" and after != summary.get("steps"))
    says = not is_kill and name != "SIGUSR1" and process.exitcode != 0
    named = f"dualhead resume {run}" in log and str(checkpoints(run)[0]) in log if says else ""
    return {
        "vectorization": mode,
        "signal": name,
        "to": how,
        "after_s": f"{at:.2f}",
        "was_running": int(was_there),  # when the signal was sent
        "exit": process.exitcode,
        "ended_in_s": f"{took:.2f}",
        "checkpoint_before": before,
        "checkpoint_after": after,
        "lost": int(lost),
        "hangs": int(hangs),
        "orphans": len(orphans),
        "names_checkpoint": int(named) if says else "",
        "traceback": int("Traceback" in log),
    }


def finish(run: Path, mode: str) -> int:
    """Resumes a run to its end; exit status."""
    summary = read_json(run / "summary.json") or {}
    if summary and not summary["stopped_early"]:
        return 0
    process = start(run, "resume", str(run)) if (run / "config.json").exists() else begin(run, mode)
    process.join(60)
    kill_group(process.pid)
    process.join()
    return process.exitcode


def benchmark(kills: int, others: int, out: Path) -> None:
    random.seed(0)
    torch.set_num_threads(1)
    for module in (*_PRELOADED, "scipy.special"):  # once, before the runs fork
        importlib.import_module(module)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, out.open("w", newline="") as file:
        undisturbed, seconds = {}, {}
        for mode in ("sync", "async"):
            run, began = Path(folder) / mode, time.perf_counter()
            process = begin(run, mode)
            process.join()
            assert process.exitcode == 0, Path(f"{run}.log").read_text()
            seconds[mode], undisturbed[mode] = time.perf_counter() - began, weights(run)
        of_kills = itertools.cycle((mode, "SIGKILL", how) for mode in ("sync", "async") for how in ("single", "group"))
        plan = [*itertools.islice(of_kills, kills), *itertools.islice(itertools.cycle(OTHERS), others)]
        writer: Any = None
        for number, (mode, name, how) in enumerate(plan):
            for attempt in itertools.count():  # until the signal comes before the end
                run = Path(folder) / f"run-{number}-{attempt}"
                row = disturb(run, mode, name, how, seconds=seconds[mode])
                if row["was_running"] and (name == "SIGUSR1" or row["exit"] != 0):
                    break
            row["resumed_exit"] = finish(run, mode)
            is_exact = name != "SIGKILL" or how != "worker"
            ours, theirs = weights(run), undisturbed[mode]
            equal = ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)
            row["same_bits"] = int(equal) if is_exact else ""
            if writer is None:
                writer = csv.DictWriter(file, list(row))
                writer.writeheader()
            writer.writerow(row)
            file.flush()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--others", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/signals.csv"))
    given = parser.parse_args()
    benchmark(given.kills, given.others, given.out)
