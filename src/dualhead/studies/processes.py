"""Several runs at a time, each in its own process, so that a run that is killed does not affect the others."""

from __future__ import annotations

import io
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from dualhead.errors import CheckpointError, RunError, UnavailableEnvironment
from dualhead.running.config import RunConfig
from dualhead.running.parts import import_module
from dualhead.running.results import last_steps

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
    bar: TaskID


def run_all(
    tasks: Mapping[str, RunConfig], *, jobs: int, modules: Sequence[str] = ()
) -> Generator[tuple[str, str | None, float], None, None]:
    """Trains runs, or resumes them, at most `jobs` at a time; a terminal shows a bar for each and one for all.

    When this process ends, by Ctrl-C or otherwise, the runs under way save a checkpoint and end. A second Ctrl-C kills
    them.

    Args:
        tasks: settings of each run, with its `run_dir`, by its name on the terminal.
        jobs: number of processes. They get the signals that ask for a checkpoint (`save_on`) from this one.
        modules: imported in each process first, such as those that register environments.

    Yields:
        When a run ends: its name, what went wrong (None: nothing), and the seconds that it took.
    """
    waiting, running = dict(tasks), dict[str, _Worker]()
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f}%"), TimeElapsedColumn())
    disabled = not sys.stdout.isatty() or not tasks
    with _passed_on(tasks, running), Progress(*columns, transient=True, disable=disabled) as progress:
        steps = dict.fromkeys(tasks, 0)
        together = progress.add_task("all runs", total=sum(config.total_steps for config in tasks.values()))
        try:
            while waiting or running:
                for name in list(waiting)[: jobs - len(running)]:
                    bar = progress.add_task(name, total=tasks[name].total_steps)
                    running[name] = _Worker(*_start(waiting.pop(name), modules), time.perf_counter(), bar)
                multiprocessing.connection.wait([worker.process.sentinel for worker in running.values()], timeout=1.0)
                for name, worker in list(running.items()):
                    if not progress.disable:
                        steps[name] = min(last_steps(folder_of(tasks[name]) / "metrics.csv"), tasks[name].total_steps)
                        progress.update(worker.bar, completed=steps[name])
                        progress.update(together, completed=sum(steps.values()))
                    if not worker.process.is_alive():
                        progress.remove_task(running.pop(name).bar)
                        yield name, _outcome(worker, tasks[name]), time.perf_counter() - worker.begun
        finally:
            _stop([worker.process for worker in running.values()])


@contextmanager
def _passed_on(tasks: Mapping[str, RunConfig], running: Mapping[str, _Worker]) -> Iterator[None]:
    """Sends the signals of `save_on` to the runs, which are in groups of their own."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield
        return

    def send(number: int, frame: FrameType | None) -> None:
        for name, worker in list(running.items()):
            if tasks[name].save_on == signal.Signals(number).name and worker.process.is_alive():
                os.kill(worker.process.pid, number)

    names = sorted({config.save_on for config in tasks.values() if config.save_on})
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        if numbers and sys.platform == "linux":
            _context()
            multiprocessing.forkserver.ensure_running()  # it and its children ignore them until they set handlers
        for number in numbers:
            signal.signal(number, send)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def folder_of(config: RunConfig) -> Path:
    """The run directory of a study's run."""
    assert config.run_dir is not None
    return Path(config.run_dir)


def _context() -> Any:
    # The fork server has imported what runs need and done nothing else, so a run starts immediately.
    context = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
    if sys.platform == "linux":
        context.set_forkserver_preload(_PRELOADED)
    return context


def _start(config: RunConfig, modules: Sequence[str]) -> tuple[Any, Connection]:
    context = _context()
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(config, modules, sender))
    process.start()
    sender.close()
    return process, receiver


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
    """Asks processes to end and waits for them; a KeyboardInterrupt meanwhile kills them."""
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


def _work(config: RunConfig, modules: Sequence[str], answer: Connection) -> None:
    """Runs in the child process: trains, and sends back what went wrong, or None."""
    if hasattr(os, "setsid"):
        os.setsid()  # Ctrl-C at the terminal reaches the parent alone, which tells its children to stop
    os.environ["OMP_NUM_THREADS"] = "1"  # for libraries that are loaded later, and processes of environments
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        for module in modules:
            import_module(module, what="--import")
        problem = _train(config)
    except Exception as error:
        with suppress(OSError):  # a full disk must not keep the message from the parent
            traceback.print_exc()
        expected = isinstance(error, (RunError, CheckpointError, UnavailableEnvironment, ValueError))
        problem = str(error) if expected else f"{type(error).__name__}: {error}"
    # The parent reads only after this process has ended, and a pipe holds 64 kB.
    answer.send(problem and problem[:_LONGEST_ANSWER])


def _end_with_parent() -> None:
    """Ends this process, with a checkpoint, after its parent: a killed parent cannot tell its children to stop."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def _train(config: RunConfig) -> str | None:
    from dualhead.running.trainer import resume, train
    from dualhead.running.trust import trust

    folder = folder_of(config)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / OUTPUT).open("a") as file:
            for stream in (sys.stdout, sys.stderr):
                assert isinstance(stream, io.TextIOWrapper)
                os.dup2(file.fileno(), stream.fileno())
                stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise RunError(f"cannot write the run directory {folder}: {error.strerror or error}") from error
    if (folder / "config.json").exists():
        trust(folder)  # the user wrote the study's file, which has the same settings
        done = resume(folder, encoder=config.encoder, memory=config.memory, show_progress=False)
    else:
        done = train(config, show_progress=False)
    return f"stopped after {done.summary['steps']} steps" if done.summary["stopped_early"] else None
