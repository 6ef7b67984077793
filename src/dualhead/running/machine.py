"""What a run asks of the machine it runs on: threads, and an allocator that keeps what it has."""

from __future__ import annotations

import ctypes
import math
import os
import sys
import time
import warnings
from contextlib import suppress
from typing import Any

import psutil
import torch

SECONDS_OF_LOOKING = 2.0
"""After this many seconds a run checks once whether other programs compete for its cores."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> None:
    """Lets glibc keep freed blocks for the next update instead of giving them back to the kernel.

    An update frees and takes the same large blocks again and again; fetched from the kernel each time, they must be
    zeroed page by page, which makes a large recurrent call up to 2.8 times slower (docs/performance.md). Does nothing
    where the C library is another one.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
    except (OSError, AttributeError):
        return


def num_cores() -> int:
    """Cores that this process may use."""
    return len(_cores())


class Stopwatch:
    """What the seconds of a run go into.

    Args:
        seconds: that it took before, in the parts that it goes on from.
        num_steps: environment steps done.
    """

    def __init__(self, seconds: float, num_steps: int) -> None:
        self._lap_begun = self._update_begun = time.perf_counter()
        self._begun, self._num_steps = self._lap_begun - seconds, num_steps

    @property
    def seconds(self) -> float:
        """Of training, over all parts of the run."""
        return time.perf_counter() - self._begun

    def begin_update(self) -> None:
        """The rollout is over."""
        self._update_begun = time.perf_counter()

    def end_update(self, num_steps: int) -> dict[str, float]:
        """The update is over, and the next rollout begins; metrics `time/*` of both."""
        now = time.perf_counter()
        metrics = {
            "time/steps_per_s": (num_steps - self._num_steps) / (now - self._lap_begun),
            "time/rollout_s": self._update_begun - self._lap_begun,
            "time/update_s": now - self._update_begun,
        }
        self._lap_begun, self._num_steps = now, num_steps
        return metrics


class CoreUse:
    """What runs beside this process, from its making on.

    Two trainings that want all cores each wait for one another's threads at every operation: both become many times
    slower, not half as fast. The number of threads is never lowered unasked, because another number adds up in
    another order and the run would no longer repeat to the bit; but it is said.
    """

    def __init__(self) -> None:
        self._begun, self._before, self._has_looked = time.perf_counter(), _seconds_of_others(), False

    @property
    def seconds(self) -> float:
        """How long it has been looked at."""
        return time.perf_counter() - self._begun

    def others(self) -> float:
        """Cores of ours that others kept busy on average; 0 where the system does not tell."""
        return max(0.0, (_seconds_of_others() - self._before) / self.seconds)

    def warn_once(self) -> None:
        """After a while looks once whether others leave too few cores for our threads, and says so."""
        if not self._has_looked and self.seconds > SECONDS_OF_LOOKING:
            self._has_looked = True
            self.warn()

    def warn(self) -> None:
        """Says so where others leave too few cores for our threads."""
        threads, cores, others = torch.get_num_threads(), num_cores(), self.others()
        if threads > 1 and others + threads > 1.25 * cores:
            warnings.warn(
                f"this run uses {threads} threads, and other programs keep {others:.1f} of the {cores} cores busy: "
                f"trainings that fight for cores slow each other many times over; wait, or give each --num-threads 1",
                stacklevel=2,
            )


def _seconds_of_others() -> float:
    """What all our cores have worked, but for this process and its children; NaN where the system does not tell."""
    try:
        by_core = psutil.cpu_times(percpu=True)
        busy = sum(_working(by_core[core]) for core in _cores() if core < len(by_core))
        here = psutil.Process()
        own = sum(here.cpu_times()[:4])  # of children that have ended as well
        for child in here.children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                own += sum(child.cpu_times()[:2])
        return busy - own
    except (psutil.Error, OSError):
        return math.nan


def _working(times: Any) -> float:
    # What Linux counts besides is idle, counted in these already, or another machine's on the same processor.
    return float(sum(getattr(times, name, 0.0) for name in ("user", "nice", "system", "irq", "softirq", "interrupt")))


def _cores() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
