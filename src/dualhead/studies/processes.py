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
from contextlib import closing, contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from dualhead.errors import CheckpointError, RunError, UnavailableEnvironment
from dualhead.running.checkpoint import read_config
from dualhead.running.config import RunConfig
from dualhead.running.machine import num_cores
from dualhead.running.parts import import_module
from dualhead.running.results import last_steps, read_summary

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


def run_missing(
    planned: Mapping[str, RunConfig], *, jobs: int | None = None, modules: Sequence[str] = ()
) -> Generator[str, None, None]:
    """Runs what is not finished yet, as `run_all`, and prints a line as each run ends.

    Args:
        planned: settings of all runs, with their `run_dir`, by their names on the terminal.
        jobs: None: as many runs at a time as the cores allow.
        modules: as for `run_all`.

    Yields:
        The name of each run that has ended well.

    Raises:
        RunError: a directory holds another run; or at the end, some runs failed.
    """
    missing = {name: config for name, config in planned.items() if not is_finished(config)}
    num_done, failed = len(planned) - len(missing), []
    if num_done:
        print(f"{num_done} of {len(planned)} runs are finished already", flush=True)
    if jobs is None:
        jobs = max(1, num_cores() // max(config.num_threads or 1 for config in planned.values()))
    try:
        with closing(run_all(missing, jobs=jobs, modules=modules)) as outcomes:
            for name, problem, seconds in outcomes:
                num_done += 1
                ended = f"done in {seconds:.0f} s" if problem is None else f"failed after {seconds:.0f} s: {problem}"
                print(f"[{num_done}/{len(planned)}] {name} {ended}", flush=True)
                if problem is None:
                    yield name
                else:
                    failed.append(f"{name}: {problem}")
    except KeyboardInterrupt:
        finished = sum(map(is_finished, planned.values()))
        print(f"{finished} of {len(planned)} runs are finished; the same command resumes the rest", file=sys.stderr)
        raise
    if failed:
        message = f"{len(failed)} of {len(planned)} runs failed; the same command repeats them"
        raise RunError("\n  ".join([message, *failed]))


def is_finished(config: RunConfig) -> bool:
    """Whether a run is there and complete; RunError if a run with other settings is there."""
    folder = folder_of(config)
    if not os.path.exists(folder / "config.json"):  # unlike the method, False for names that are too long
        return False
    if names := differences(config, read_config(folder)):
        raise RunError(
            f"{folder} holds a run of other settings ({', '.join(names)}): the study was changed since; choose another "
            f"--out, or remove it"
        )
    return read_summary(folder).get("stopped_early") is False


def differences(config: RunConfig, found: RunConfig) -> list[str]:
    """Settings in which two runs differ, wherever they lie: a study may be moved."""
    ours, theirs = (of.model_dump(exclude={"run_dir"}) for of in (config, found))
    return [name for name in ours if ours[name] != theirs[name]]


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
