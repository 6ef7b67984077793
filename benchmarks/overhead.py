"""The cost of logging and checkpoints as a share of training.

    python benchmarks/overhead.py
    python benchmarks/overhead.py --workload vector grid --updates 9 --json

Our trainer's whole loop, with its default log files and the progress line of a terminal. After each update the loop's
clock is stopped and a checkpoint (agent, environments, file) is saved. A run saves one only every `checkpoint_every`
steps, and that share of its time is counted. Every figure is a median over the updates: log and checkpoint are measured
next to the update that they are compared with. The thread of the progress line (half a millisecond, twice a second)
counts as training.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from workloads import Workload, add_options, chosen_workloads, run_config

from dualhead.running.checkpoint import checkpoints, new_run_dir
from dualhead.running.config import RunConfig
from dualhead.running.evaluator import Evaluator
from dualhead.running.machine import keep_freed_memory
from dualhead.running.session import Session
from dualhead.running.trainer import run_loop
from dualhead.running.writers import ProgressDisplay, Writer, make_writers

KEYS = ("workload", "update_s", "logging_ms", "checkpoint_ms", "checkpoint_mb", "logging", "checkpoint", "overhead")


class Terminal(io.StringIO):
    """A terminal that discards its output."""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        return len(text)


class Meter:
    """A writer that times the run's writers, and a checkpoint after each update.

    Attributes:
        update_s: seconds of each rollout and update, without what is measured here.
        logging_s, checkpoint_s: seconds of each.
    """

    def __init__(self, writers: list[Writer], session: Session, run_dir: Path) -> None:
        self.update_s: list[float] = []
        self.logging_s: list[float] = []
        self.checkpoint_s: list[float] = []
        self._writers, self._session, self._run_dir = writers, session, run_dir
        self._began = time.perf_counter()

    def write(self, num_steps: int, metrics: Mapping[str, float]) -> None:
        now = time.perf_counter()
        self.update_s.append(now - self._began)
        for writer in self._writers:
            writer.write(num_steps, metrics)
        logged = time.perf_counter()
        self.logging_s.append(logged - now)
        self._session.save(self._run_dir, seconds=0.0)
        self._began = time.perf_counter()
        self.checkpoint_s.append(self._began - logged)

    def close(self) -> None:
        pass


def measure(workload: Workload, *, num_updates: int, warm_up: int) -> dict[str, object]:
    """One workload's figures under `KEYS`; shares are of the time that the loop takes without log and checkpoint."""
    with tempfile.TemporaryDirectory(prefix="dualhead-benchmark-") as folder:
        total_steps = (warm_up + num_updates) * workload.num_steps
        config = run_config(workload, f"{folder}/run", total_steps=total_steps, state_refresh="once")
        session = Session(config)
        run_dir = new_run_dir(config)
        writers = [*make_writers(config, run_dir, show_progress=False), ProgressDisplay(total_steps, stream=Terminal())]
        try:
            session.begin()
            assert session.streams.resumable is None  # this check belongs to the start of a run
            meter = Meter(writers, session, run_dir)
            with Evaluator(session, run_dir, resume_at=None) as evaluator:
                run_loop(session, [meter], evaluator, run_dir)
            size = checkpoints(run_dir)[0].stat().st_size
        finally:
            for writer in writers:
                writer.close()
            session.close()
    checkpoint_every = RunConfig.model_fields["checkpoint_every"].default
    saved = 1 / -(-checkpoint_every // workload.num_steps)  # checkpoints per update
    update_s, logging_s, checkpoint_s = (
        part[warm_up:] for part in (meter.update_s, meter.logging_s, meter.checkpoint_s)
    )
    logging = statistics.median(log / update for log, update in zip(logging_s, update_s))
    checkpoint = statistics.median(saved * save / update for save, update in zip(checkpoint_s, update_s))
    figures = (
        *(workload.name, round(statistics.median(update_s), 4)),
        *(round(1000 * statistics.median(part), 2) for part in (logging_s, checkpoint_s)),
        *(round(size / 1e6, 1), round(logging, 5), round(checkpoint, 5), round(logging + checkpoint, 5)),
    )
    return dict(zip(KEYS, figures))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, updates=7)
    args = parser.parse_args()
    workloads = chosen_workloads(parser, args)

    keep_freed_memory()
    torch.set_num_threads(args.threads)
    table = sys.stderr if args.json else sys.stdout
    print(
        f"torch {torch.__version__}, {args.threads} of {os.cpu_count()} threads, medians of {args.updates} updates "
        f"after {args.warm_up}; a checkpoint every {RunConfig.model_fields['checkpoint_every'].default:,} steps\n"
        f"workload  update s  logging ms  checkpoint ms     MB  logging %  checkpoint %  together %",
        file=table,
    )
    results = []
    for workload in workloads:
        row = measure(workload, num_updates=args.updates, warm_up=args.warm_up)
        results.append(row)
        print(
            f"{row['workload']:<8}  {row['update_s']:8.3f}  {row['logging_ms']:10.2f}  {row['checkpoint_ms']:13.1f}  "
            f"{row['checkpoint_mb']:5.1f}  {row['logging']:9.2%}  {row['checkpoint']:12.2%}  {row['overhead']:10.2%}",
            file=table,
            flush=True,
        )
    if args.json:
        print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
