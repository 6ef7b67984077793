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


class CoreUse:
    """What runs beside this process, from its making on.

    Two trainings that want all cores each wait for one another's threads at every operation: both become many times
    slower, not half as fast. The number of threads is never lowered unasked, because another number adds up in
    another order and the run would no longer repeat to the bit; but it is said.
    """

    def __init__(self) -> None:
        self._begun, self._before = time.perf_counter(), _seconds_of_others()

    @property
    def seconds(self) -> float:
        """How long it has been looked at."""
        return time.perf_counter() - self._begun

    def others(self) -> float:
        """Cores of ours that others kept busy on average; 0 where the system does not tell."""
        return max(0.0, (_seconds_of_others() - self._before) / self.seconds)

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
