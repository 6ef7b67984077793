"""Several runs at a time, each in its own process, so that a run that is killed does not affect the others."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from dualhead.running.checkpoint import RunError
from dualhead.running.config import RunConfig
from dualhead.running.results import last_steps
from dualhead.storage import CheckpointError
from dualhead.worlds.streams import UnavailableEnvironment

OUTPUT = "output.txt"
"""File in the run directory with what the run printed."""
_LONGEST_ANSWER = 10_000
"""Characters; the whole of it is in OUTPUT."""

_PRELOADED = [
    "dualhead.running.trainer",
    # Loaded when first used, which takes longer than a small run.
    "torch._dynamo",
    "tensorboard.compat.proto.event_pb2",
    "tensorboard.summary.writer.record_writer",
]


class _Worker(NamedTuple):
    process: Any
    answer: Connection
    begun: float


def run_in_processes(
    configs: Mapping[str, RunConfig], *, jobs: int
) -> Generator[tuple[str, str | None, float], None, None]:
    """Trains runs, or resumes them, at most `jobs` at a time.

    When this process ends, by Ctrl-C or otherwise, the runs under way save a checkpoint and end. A second Ctrl-C kills
    them.

    Args:
        configs: settings of each run, with its `run_dir`, by what it is called on the terminal.
        jobs: number of processes.

    Yields:
        When a run ends: its name, what went wrong (None: nothing), and the seconds that it took.
    """
    waiting = list(configs.items())
    running: dict[str, _Worker] = {}
    with _progress(configs) as show:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    key, config = waiting.pop(0)
                    running[key] = _start(config)
                sentinels = [worker.process.sentinel for worker in running.values()]
                multiprocessing.connection.wait(sentinels, timeout=1.0)
                show(list(running))
                for key in [key for key, worker in running.items() if not worker.process.is_alive()]:
                    worker = running.pop(key)
                    yield key, _outcome(worker, configs[key]), time.perf_counter() - worker.begun
        finally:
            _stop([worker.process for worker in running.values()])


def _start(config: RunConfig) -> _Worker:
    # The fork server has imported what runs need and done nothing else, so a run starts immediately.
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
    """Limits libraries in child processes to one thread; they read it from the environment."""
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
    """Runs in the child process: trains, and sends back what went wrong, or None."""
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
    # The parent reads only after this process has ended, and a pipe holds 64 kB.
    answer.send(problem and problem[:_LONGEST_ANSWER])


def _end_with_parent() -> None:
    """Ends this process, with a checkpoint, when its parent is gone: a killed parent cannot tell its children."""
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


@contextmanager
def _progress(configs: Mapping[str, RunConfig]) -> Iterator[Callable[[list[str]], None]]:
    """On a terminal: a bar for each run under way, and one for all. Call what it yields with the runs under way."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f}%"), TimeElapsedColumn())
    with Progress(*columns, transient=True, disable=not sys.stdout.isatty() or not configs) as progress:
        together = progress.add_task("all runs", total=sum(config.total_steps for config in configs.values()))
        bars: dict[str, Any] = {}
        steps: dict[str, int] = {}

        def show(running: list[str]) -> None:
            if progress.disable:
                return
            for name in running:
                run_dir, total = configs[name].run_dir, configs[name].total_steps
                assert run_dir is not None
                steps[name] = min(last_steps(Path(run_dir) / "metrics.csv"), total)
                if name not in bars:
                    bars[name] = progress.add_task(name, total=total)
                progress.update(bars[name], completed=steps[name])
            for name in bars.keys() - set(running):
                progress.remove_task(bars.pop(name))
            progress.update(together, completed=sum(steps.values()))

        yield show
