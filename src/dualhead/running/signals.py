"""Ctrl-C and SIGTERM end a run after the step at hand."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM in a list instead of dying of them; the second one acts as usual."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # only that one may set handlers
        yield received
        return

    def remember(number: int, frame: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)
        with suppress(RuntimeError, OSError):  # it may come while something else is printed, or when nobody reads on
            print("stopping after this step; once more to stop at once", file=sys.stderr)

    before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
