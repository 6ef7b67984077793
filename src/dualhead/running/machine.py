"""What a run asks of the machine it runs on: threads, and an allocator that keeps what it has."""

from __future__ import annotations

import ctypes
import os
import sys
import warnings

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


def use_threads(num_threads: int | None) -> None:
    """Sets torch's threads where asked to, and warns where they will have to fight for the cores.

    Two trainings that want all cores each wait for one another's threads at every operation: both become many times
    slower, not half as fast. The number is never lowered unasked, because another number of threads adds up in
    another order and the run would no longer repeat to the bit.
    """
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    wanted, cores = torch.get_num_threads(), os.cpu_count() or 1
    busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if wanted > 1 and busy + wanted > 1.25 * cores:
        warnings.warn(
            f"this run uses {wanted} threads and about {busy:.1f} of {cores} cores are busy already: runs that fight "
            f"for cores slow each other many times over; wait, or give each --num-threads 1",
            stacklevel=2,
        )
