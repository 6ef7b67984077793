"""Where a run's numbers go: TensorBoard, CSV, and a progress display or plain lines."""

from __future__ import annotations

import csv
import math
import os
import sys
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TextIO

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from dualhead.types import as_numpy
from dualhead.worlds.streams import StreamStep

EPISODE_WINDOW = 100


class EpisodeTracker:
    """Task return and length of running episodes, and of the last 100 that ended.

    Args:
        num_streams: B.
    """

    def __init__(self, num_streams: int) -> None:
        self.running_returns = np.zeros(num_streams)
        self.running_lengths = np.zeros(num_streams, dtype=np.int64)
        self.returns: deque[float] = deque(maxlen=EPISODE_WINDOW)
        self.lengths: deque[int] = deque(maxlen=EPISODE_WINDOW)
        self.num_episodes = 0

    def step(self, step: StreamStep) -> None:
        """Takes in the [B] rewards of a step and which episodes ended with it."""
        rewards, ended = as_numpy(step.rewards), as_numpy(step.terminated) | as_numpy(step.truncated)
        self.running_returns += rewards
        self.running_lengths += 1
        for stream in np.flatnonzero(ended):
            self.returns.append(float(self.running_returns[stream]))
            self.lengths.append(int(self.running_lengths[stream]))
            self.num_episodes += 1
        self.running_returns[ended] = 0.0
        self.running_lengths[ended] = 0

    def metrics(self) -> dict[str, float]:
        """Means over the window (NaN before the first episode ends), and the count of all episodes."""
        return {
            "episode/mean_return": float(np.mean(self.returns)) if self.returns else math.nan,
            "episode/mean_length": float(np.mean(self.lengths)) if self.lengths else math.nan,
            "episode/count": self.num_episodes,
        }


class Writer(Protocol):
    """Takes a run's metrics, once per update."""

    def write(self, num_steps: int, metrics: Mapping[str, float]) -> None:
        """Metrics after `num_steps` environment steps."""

    def close(self) -> None:
        """Flushes what is not written yet."""


class TensorBoardWriter:
    """TensorBoard event files in the run directory; non-finite numbers are left out."""

    def __init__(self, run_dir: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run_dir / "tensorboard"))

    def write(self, num_steps: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            if math.isfinite(value):
                self._writer.add_scalar(name, value, num_steps)

    def close(self) -> None:
        self._writer.close()


class CSVWriter:
    """`metrics.csv`: a row per update, a column per metric; a metric that appears later adds a column."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / "metrics.csv"
        self._columns: list[str] = []
        self._file: TextIO | None = None

    def write(self, num_steps: int, metrics: Mapping[str, float]) -> None:
        row: dict[str, Any] = {"steps": num_steps, **metrics}
        if not row.keys() <= set(self._columns):
            self._widen(row)
        assert self._file is not None
        csv.DictWriter(self._file, self._columns, restval="").writerow(row)
        self._file.flush()

    def _widen(self, row: Mapping[str, Any]) -> None:
        self.close()
        before = []
        if self._columns:
            with self.path.open(newline="") as file:
                before = list(csv.DictReader(file))
        self._columns += [name for name in row if name not in self._columns]
        self._file = self.path.open("w", newline="")
        writer = csv.DictWriter(self._file, self._columns, restval="")
        writer.writeheader()
        writer.writerows(before)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class ProgressDisplay:
    """A live line on a terminal, one plain line per update elsewhere.

    Args:
        total_steps: of the run.
        stream: where to write; standard error by default.
    """

    def __init__(self, total_steps: int, *, stream: TextIO | None = None) -> None:
        self.total_steps = total_steps
        self.stream = stream or sys.stderr
        self.started = time.perf_counter()
        self._progress: Progress | None = None
        if self.stream.isatty() and os.environ.get("TERM") != "dumb":
            self._progress = Progress(
                TextColumn("{task.completed:>10,} / {task.total:,} steps"),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("{task.fields[speed]:,.0f} steps/s  return {task.fields[score]:.3g}  left"),
                TimeRemainingColumn(),
                console=Console(file=self.stream),
            )
            self._progress.start()
            self._task = self._progress.add_task("", total=total_steps, speed=0.0, score=math.nan)

    def write(self, num_steps: int, metrics: Mapping[str, float]) -> None:
        speed, score = metrics["time/steps_per_s"], metrics["episode/mean_return"]
        if self._progress is not None:
            self._progress.update(self._task, completed=min(num_steps, self.total_steps), speed=speed, score=score)
            return
        left = max(0, self.total_steps - num_steps) / max(speed, 1e-9)
        print(
            f"steps {num_steps:>9,} / {self.total_steps:,}  {speed:>8,.0f} steps/s  return {score:>8.3f}  "
            f"left {left:>5.0f} s",
            file=self.stream,
            flush=True,
        )

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
