"""Runs side by side, each in a process of its own, so that what kills one leaves the others alone."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Generator, Hashable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from dualhead.running.checkpoint import RunError
from dualhead.running.config import RunConfig
from dualhead.running.results import last_steps
from dualhead.storage import CheckpointError
from dualhead.worlds.streams import UnavailableEnvironment

OUTPUT = "output.txt"
"""What a run said, in its directory."""
_LONGEST_ANSWER = 10_000
"""Characters; the whole of it is in OUTPUT."""

_PRELOADED = [
    "dualhead.running.trainer",
    # Loaded when first used, which takes longer than a small run.
    "torch._dynamo",
    "tensorboard.compat.proto.event_pb2",
    "tensorboard.summary.writer.record_writer",
]

Key = TypeVar("Key", bound=Hashable)


class _Worker(NamedTuple):
    process: Any
    answer: Connection
    begun: float


def run_in_processes(
    configs: Mapping[Key, RunConfig], *, jobs: int, label: Callable[[Key], str] = str
) -> Generator[tuple[Key, str | None, float], None, None]:
    """Trains, or goes on with, runs of which at most `jobs` are under way at a time.

    On Ctrl-C, and where this process ends in another way, the runs at hand end with a checkpoint; a second Ctrl-C ends
    them at once.

    Args:
        configs: of the runs, with their `run_dir`.
        jobs: number of processes.
        label: what a run is called on the terminal.

    Yields:
        As each ends: its key, what went wrong (None: nothing), and the seconds that it took.
    """
    waiting = list(configs.items())
    running: dict[Key, _Worker] = {}
    with _progress(configs, label) as progress:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    key, config = waiting.pop(0)
                    running[key] = _start(config)
                sentinels = [worker.process.sentinel for worker in running.values()]
                multiprocessing.connection.wait(sentinels, timeout=1.0)
                progress.show(list(running))
                for key in [key for key, worker in running.items() if not worker.process.is_alive()]:
                    worker = running.pop(key)
                    yield key, _outcome(worker, configs[key]), time.perf_counter() - worker.begun
        finally:
            _stop([worker.process for worker in running.values()])


def _start(config: RunConfig) -> _Worker:
    # Forked from a process that has imported what runs need and done nothing else: a run begins at once.
    context = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
    if sys.platform == "linux":
        context.set_forkserver_preload(_PRELOADED)
    receiver, sender = context.Pipe(duplex=False)
    process: Any = context.Process(target=_work, args=(config, sender))  # type: ignore[attr-defined]
    with _one_thread():
        process.start()
    sender.close()
    return _Worker(process, receiver, time.perf_counter())


@contextmanager
def _one_thread() -> Iterator[None]:
    """Child processes begin with one thread for the libraries that read it from the environment."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


def _outcome(worker: _Worker, config: RunConfig) -> str | None:
    """What went wrong, if anything."""
    worker.process.join()
    try:
        return worker.answer.recv()
    except EOFError:
        code = worker.process.exitcode
        how = f"killed by signal {-code}" if code < 0 else f"exit status {code}"
        return f"its process died without reporting an error ({how}); its output is in {config.run_dir}/{OUTPUT}"
    finally:
        worker.answer.close()


def _stop(processes: list[Any]) -> None:
    """Asks processes to end and waits until they have; a KeyboardInterrupt meanwhile kills them."""
    try:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()
    except KeyboardInterrupt:
        for process in processes:
            process.kill()
            process.join()
        raise


def _work(config: RunConfig, answer: Connection) -> None:
    """In the process of a run: trains, and answers with what went wrong, or None."""
    if hasattr(os, "setsid"):
        os.setsid()  # Ctrl-C at the terminal reaches the parent alone, which tells its children to stop
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        problem = _train(config)
    except (RunError, CheckpointError, UnavailableEnvironment, ValueError) as error:
        traceback.print_exc()
        problem = str(error)
    except Exception as error:
        traceback.print_exc()
        problem = f"{type(error).__name__}: {error}"
    # Nobody reads before the process has ended, and a pipe takes no more than 64 kB meanwhile.
    answer.send(problem and problem[:_LONGEST_ANSWER])


def _end_with_parent() -> None:
    """A parent that was killed cannot tell its children: they end, with a checkpoint, when it is gone."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def _train(config: RunConfig) -> str | None:
    from dualhead.running.trainer import resume, train

    assert config.run_dir is not None
    folder = Path(config.run_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / OUTPUT).open("a") as file:
            for stream in (sys.stdout, sys.stderr):
                os.dup2(file.fileno(), stream.fileno())
    except OSError as error:
        raise RunError(f"cannot write the run directory {folder}: {error.strerror or error}") from error
    if (folder / "config.json").exists():
        # Who wrote the study's file has named its parts.
        done = resume(folder, encoder=config.encoder, memory=config.memory, show_progress=False)
    else:
        done = train(config, show_progress=False)
    return f"stopped after {done.summary['steps']} steps" if done.summary["stopped_early"] else None


class _Bars:
    """On a terminal: a bar for each run under way, and one for all."""

    def __init__(self, progress: Progress, configs: Mapping[Any, RunConfig], label: Callable[[Any], str]) -> None:
        self._progress, self._configs, self._label = progress, configs, label
        total = sum(config.total_steps for config in configs.values())
        self._steps: dict[Any, int] = {}
        self._all = progress.add_task("all runs", total=total)
        self._bars: dict[Any, Any] = {}

    def show(self, running: list[Any]) -> None:
        """Reads how far each run is."""
        if self._progress.disable:
            return
        for key in running:
            config = self._configs[key]
            if key not in self._bars:
                self._bars[key] = self._progress.add_task(self._label(key), total=config.total_steps)
            assert config.run_dir is not None
            self._steps[key] = min(last_steps(Path(config.run_dir) / "metrics.csv"), config.total_steps)
            self._progress.update(self._bars[key], completed=self._steps[key])
        for key in self._bars.keys() - set(running):
            self._progress.remove_task(self._bars.pop(key))
        self._progress.update(self._all, completed=sum(self._steps.values()))


@contextmanager
def _progress(configs: Mapping[Any, RunConfig], label: Callable[[Any], str]) -> Iterator[_Bars]:
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f}%"), TimeElapsedColumn())
    with Progress(*columns, transient=True, disable=not sys.stdout.isatty() or not configs) as progress:
        yield _Bars(progress, configs, label)
