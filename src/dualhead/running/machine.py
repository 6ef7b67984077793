"""What a run asks of the machine it runs on: threads, and an allocator that keeps what it has."""

from __future__ import annotations

import ctypes
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
        self._before = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float]:
        """Seconds by the clock, that this process and its children worked, and that all our cores did."""
        own = busy = 0.0
        with suppress(psutil.Error, OSError):  # a system that does not tell, or a child that ended meanwhile
            by_core = psutil.cpu_times(percpu=True)
            busy = sum(_working(by_core[core]) for core in _cores() if core < len(by_core))
            here = psutil.Process()
            for process in (here, *here.children(recursive=True)):
                own += sum(process.cpu_times()[:2])
        return time.perf_counter(), own, busy

    @property
    def seconds(self) -> float:
        """How long it has been looked at."""
        return time.perf_counter() - self._before[0]

    def others(self) -> float:
        """Cores that others kept busy on average."""
        elapsed, own, busy = (now - before for now, before in zip(self._now(), self._before))
        return max(0.0, (busy - own) / elapsed)

    def warn(self) -> None:
        """Says so where others leave too few cores for our threads."""
        threads, cores, others = torch.get_num_threads(), num_cores(), self.others()
        if threads > 1 and others + threads > 1.25 * cores:
            warnings.warn(
                f"this run uses {threads} threads, and other programs keep {others:.1f} of the {cores} cores busy: "
                f"trainings that fight for cores slow each other many times over; wait, or give each --num-threads 1",
                stacklevel=2,
            )


def _working(times: Any) -> float:
    # What Linux counts besides is idle, counted in these already, or another machine's on the same processor.
    return float(sum(getattr(times, name, 0.0) for name in ("user", "nice", "system", "irq", "softirq", "interrupt")))


def _cores() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
