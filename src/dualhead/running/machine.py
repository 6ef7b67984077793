"""What a run asks of its process and its machine: memory, cores, requests to stop, and random states."""

from __future__ import annotations

import ctypes
import math
import os
import random
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any

import numpy as np
import psutil
import torch

from dualhead.errors import RunError

_SECONDS_BEFORE_LOOKING = 2.0
"""After this many seconds a run checks once whether other programs compete for its cores."""
_WORK = ("user", "nice", "system", "irq", "softirq", "interrupt")
"""CPU times that are work; the others are idle, counted in these already, or of other virtual machines."""


def keep_freed_memory() -> None:
    """Lets glibc keep freed blocks for the next update instead of returning them to the kernel.

    An update allocates the same large blocks again and again. The kernel zeroes each page that it hands out, which
    makes a large recurrent call up to 2.8 times slower (docs/performance.md). Does nothing with another C library.
    """
    if sys.platform.startswith("linux"):
        with suppress(OSError, AttributeError):
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
            libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


def num_cores() -> int:
    """Cores that this process may use."""
    return len(_cores())


class Stopwatch:
    """Seconds of rollouts, of updates, and of the whole training; a resumed run passes those and the steps before."""

    def __init__(self, seconds: float, num_steps: int) -> None:
        self._lap_began = self._update_began = time.perf_counter()
        self._began, self._num_steps = self._lap_began - seconds, num_steps

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._began

    def begin_update(self) -> None:
        self._update_began = time.perf_counter()

    def end_update(self, num_steps: int) -> dict[str, float]:
        """Metrics `time/*` of the rollout and the update that are over; the next rollout begins."""
        now = time.perf_counter()
        metrics = {
            "time/steps_per_s": (num_steps - self._num_steps) / (now - self._lap_began),
            "time/rollout_s": self._update_began - self._lap_began,
            "time/update_s": now - self._update_began,
        }
        self._lap_began, self._num_steps = now, num_steps
        return metrics


class CoreUse:
    """What other programs use of our cores, from the construction on.

    Two trainings that use all cores wait for each other's threads at every operation: both become many times slower.
    A run only warns. Fewer threads would add up in another order, so that the run would not repeat to the bit.
    """

    def __init__(self) -> None:
        self._began, self._before, self._has_looked = time.perf_counter(), _seconds_of_others(), False

    def others(self) -> float:
        """Cores of ours that other programs kept busy on average; 0 where the system does not tell."""
        return max(0.0, (_seconds_of_others() - self._before) / (time.perf_counter() - self._began))

    def warn_once(self) -> None:
        """After the first seconds of a run checks once, as `warn`."""
        if not self._has_looked and time.perf_counter() - self._began > _SECONDS_BEFORE_LOOKING:
            self._has_looked = True
            self.warn()

    def warn(self) -> None:
        """Warns where other programs leave too few cores for our threads."""
        threads, cores, others = torch.get_num_threads(), num_cores(), self.others()
        if threads > 1 and others + threads > 1.25 * cores:
            warnings.warn(
                f"this run uses {threads} threads, and other programs keep {others:.1f} of the {cores} cores busy: "
                f"trainings that compete for cores slow each other many times over; wait, or give each --num-threads 1",
                stacklevel=2,
            )


def _seconds_of_others() -> float:
    """CPU seconds of other programs than this process and its children, on our cores; NaN where they are unknown."""
    try:
        by_core = psutil.cpu_times(percpu=True)
        busy = sum(getattr(by_core[core], name, 0.0) for core in _cores() if core < len(by_core) for name in _WORK)
        here = psutil.Process()
        own = sum(here.cpu_times()[:4])  # includes children that have ended
        for child in here.children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                own += sum(child.cpu_times()[:2])
        return float(busy - own)
    except (psutil.Error, OSError):
        return math.nan


def _cores() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


@dataclass
class Requests:
    """What signals have asked a run for."""

    stop: bool = False
    save: bool = False


@contextmanager
def requests_by_signal(*, save_on: str | None = None) -> Iterator[Requests]:
    """SIGINT, SIGTERM and SIGHUP ask a run to stop, and the second of them raises KeyboardInterrupt.

    Args:
        save_on: name of the signal that asks for a checkpoint.

    Raises:
        RunError: this system has no such signal.
    """
    requests = Requests()
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield requests
        return

    def stop(number: int, frame: FrameType | None) -> None:
        if requests.stop:
            raise KeyboardInterrupt
        requests.stop = True
        with suppress(RuntimeError, OSError):  # it may arrive during another print, or after the reader has gone
            print("stopping after this step; once more to stop at once", file=sys.stderr)

    def save(number: int, frame: FrameType | None) -> None:
        requests.save = True

    handlers: dict[int, Any] = {signal.SIGINT: stop, signal.SIGTERM: stop}
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as under nohup
        handlers[signal.SIGHUP] = stop
    if save_on is not None:
        if not hasattr(signal, save_on):
            raise RunError(f"save_on: this system has no signal {save_on}: expected None")
        handlers[getattr(signal, save_on)] = save
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def seed_everything(seed: int) -> None:
    """Seeds the global generators of Python, NumPy and torch, which environments may use and our code never does."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.manual_seed(seed)


@contextmanager
def preserved_randomness() -> Iterator[None]:
    """Restores the global random states at the end."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        torch.set_rng_state(before[2])
