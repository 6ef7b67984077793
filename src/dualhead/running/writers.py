"""Where a run's metrics go: CSV, TensorBoard, W&B, MLflow, and the terminal."""

from __future__ import annotations

import csv
import functools
import importlib.util
import io
import json
import math
import os
import re
import secrets
import socket
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Protocol, TextIO, runtime_checkable

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from dualhead.config import flat
from dualhead.errors import RunError
from dualhead.running.checkpoint import write_json, writing
from dualhead.running.config import RunConfig
from dualhead.running.results import read_rows
from dualhead.storage import write_bytes


@runtime_checkable
class Writer(Protocol):
    """Gets a run's metrics once per update. Any object with these two methods is a writer."""

    def write(self, num_steps: int, metrics: Mapping[str, float]) -> None:
        """Writes the metrics after `num_steps` environment steps. A number may be NaN."""

    def close(self) -> None:
        """Writes what is not written yet. Called once, also when the run fails."""


def expect_writers(writers: Iterable[object]) -> list[Writer]:
    """The same objects as a list; TypeError if one is no writer, such as a class in place of its instance."""
    checked: list[Writer] = []
    if isinstance(writers, Writer):
        raise TypeError(f"writers: expected a list of writers, got {writers!r} alone")
    for writer in writers:
        if isinstance(writer, type) or not isinstance(writer, Writer):
            raise TypeError(f"expected a writer, with methods write(num_steps, metrics) and close(), got {writer!r}")
        checked.append(writer)
    return checked


def make_writers(
    config: RunConfig, run_dir: Path, *, resume_at: int | None = None, show_progress: bool = True
) -> list[Writer]:
    """Opens the writers of a run; RunError if one cannot be opened.

    `resume_at`: environment steps of the checkpoint that the run resumes from; what was written after it is dropped.
    """
    services: list[Any] = [functools.partial(ServiceWriter, name, config=config) for name in config.log_to]
    writers: list[Writer] = []
    with ExitStack() as opened:  # where one cannot be opened the others are closed
        for make in (CSVWriter, TensorBoardWriter, *services):
            writers.append(make(run_dir, resume_at=resume_at))
            opened.callback(writers[-1].close)
        opened.pop_all()
    return [*writers, ProgressDisplay(config.total_steps)] if show_progress else writers


def require_packages(config: RunConfig) -> None:
    """Checks, without an import, that the packages of a run's writers are installed; if not, RunError says how."""
    for name in config.log_to:
        if importlib.util.find_spec(name) is None:
            raise RunError(
                f"log_to={name!r} needs a package that is not installed: pip install -e '.[{name}]' in the checkout"
            )


class CSVWriter:
    """A row per update, a column per metric; a metric that appears later adds a column.

    A row is written whole or not at all, even when the disk is full.

    Args:
        run_dir, name: of the file.
        resume_at: keep the rows of the existing file up to this many environment steps. None: start a new file.

    Attributes:
        last_steps: environment steps of the last row; None if there is no row.

    Raises:
        RunError: the existing file holds no metrics, or the file cannot be written.
    """

    def __init__(self, run_dir: Path, *, name: str = "metrics.csv", resume_at: int | None = None) -> None:
        self.path = run_dir / name
        self.last_steps: int | None = None
        self._columns: list[str] = []
        self._file: io.FileIO | None = None
        if resume_at is None:
            return
        columns, rows, num_damaged = read_rows(self.path)
        if num_damaged:
            warnings.warn(f"{self.path}: {num_damaged} damaged rows are left out", stacklevel=4)
        if columns:
            kept = [row for row in rows if int(row[0]) <= resume_at]
            self.last_steps = int(kept[-1][0]) if kept else None
            with writing(self.path):
                self._replace(columns, kept)

    def write(self, num_steps: int, metrics: Mapping[str, float]) -> None:
        row: dict[str, Any] = {"steps": num_steps, **metrics}
        added = [name for name in row if name not in self._columns]
        with writing(self.path):
            if added:
                rows = read_rows(self.path)[1] if self._columns else []
                self._replace([*self._columns, *added], [old + [""] * len(added) for old in rows])
            assert self._file is not None
            append_whole(self._file, _lines([[row.get(name, "") for name in self._columns]]))
        self.last_steps = num_steps

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _replace(self, columns: list[str], rows: list[list[str]]) -> None:
        write_bytes(self.path, _lines([columns, *rows]))
        self.close()
        self._columns, self._file = columns, io.FileIO(self.path, "a")


def _lines(rows: Iterable[Iterable[Any]]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    return text.getvalue().encode()


class TensorBoardWriter:
    """TensorBoard event files in the run directory; non-finite numbers are left out.

    One record per update, written whole and at once: `torch.utils.tensorboard` writes every number separately from a
    thread, where nobody catches the error of a full disk. With `resume_at`, TensorBoard drops what an earlier part of
    the run logged after that many environment steps.

    Raises:
        RunError: the file cannot be written.
    """

    def __init__(self, run_dir: Path, *, resume_at: int | None = None) -> None:
        # TensorBoard reads files in the order of their names.
        name = f"events.out.tfevents.{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}"
        self.path = run_dir / "tensorboard" / name
        with writing(self.path):
            self.path.parent.mkdir(exist_ok=True)
            self._file = io.FileIO(self.path, "a")
        with ExitStack() as opened:
            opened.callback(self.close)
            self._add(file_version="brain.Event:2")
            if resume_at is not None:
                self._add(step=resume_at + 1, session_log=SessionLog(status=SessionLog.START))
            opened.pop_all()

    def write(self, num_steps: int, metrics: Mapping[str, float]) -> None:
        values = [Summary.Value(tag=name, simple_value=value) for name, value in finite(metrics).items()]
        self._add(step=num_steps, summary=Summary(value=values))

    def close(self) -> None:
        self._file.close()

    def _add(self, **event: Any) -> None:
        record = io.BytesIO()
        RecordWriter(record).write(Event(wall_time=time.time(), **event).SerializeToString())
        with writing(self.path):
            append_whole(self._file, record.getvalue())


class ServiceWriter:
    """A run at Weights & Biases (`name="wandb"`) or MLflow (`name="mlflow"`).

    The service's own environment variables say where to log. `wandb.json` or `mlflow.json` in the run directory keeps
    the run's id, so that a resumed run continues it; what was logged after the checkpoint is logged again. If the
    service fails later, the run warns once and goes on; metrics.csv has the metrics.

    Raises:
        RunError: the service refuses, or its file cannot be read or written.
    """

    def __init__(self, name: str, run_dir: Path, *, config: RunConfig, resume_at: int | None = None) -> None:
        path, known = run_dir / f"{name}.json", {}
        title = f"{config.env} {config.memory_name}-seed{config.seed}"
        self._service, begin, hint = _SERVICES[name]
        try:
            if resume_at is not None and path.exists():
                known = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise RunError(f"cannot read {path}: {error}; repair it, or remove it to log a new run") from error
        try:
            known, self._log, self._end = begin(run_dir, config, title, known)
        except Exception as error:
            raise RunError(f"cannot begin a run of {self._service}: {error} ({hint})") from error
        self._has_warned = False
        write_json(path, known)

    def write(self, num_steps: int, metrics: Mapping[str, float]) -> None:
        try:
            self._log(num_steps, finite(metrics))
        except Exception as error:
            if not self._has_warned:
                warnings.warn(f"{self._service} refused metrics: {error}", stacklevel=2)
            self._has_warned = True

    def close(self) -> None:
        try:
            self._end(sys.exc_info()[0] is not None)  # a failed run closes its writers while the error is raised
        except Exception as error:
            warnings.warn(f"{self._service} could not end its run: {error}", stacklevel=2)


_Known = dict[str, str]
_Service = tuple[_Known, Callable[[int, dict[str, float]], None], Callable[[bool], None]]
"""The contents of the service's file, what logs metrics after a number of steps, and what ends a run, failed or not."""


def _wandb(run_dir: Path, config: RunConfig, title: str, known: _Known) -> _Service:
    import wandb

    run_id = known.get("id") or secrets.token_hex(4)
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "dualhead"),
        id=run_id,
        name=title,
        dir=str(run_dir),
        config=config.model_dump(),
        resume="allow",
        settings={"console": "off"},  # standard output and error stay as they are
    )
    run.define_metric("steps")
    run.define_metric("*", step_metric="steps")

    return (
        {"id": run_id},
        lambda num_steps, metrics: run.log({"steps": num_steps, **metrics}),
        lambda is_failed: run.finish(exit_code=int(is_failed)),
    )


def _mlflow(run_dir: Path, config: RunConfig, title: str, known: _Known) -> _Service:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param

    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(run_dir / 'mlflow.db').resolve()}"
    client = MlflowClient(tracking_uri=uri)
    if known.get("tracking_uri") == uri:
        run_id = known["run_id"]
        client.update_run(run_id, status="RUNNING")
    else:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "dualhead")
        experiment = client.get_experiment_by_name(name)
        experiment_id = experiment.experiment_id if experiment else client.create_experiment(name)
        run_id = client.create_run(experiment_id, run_name=title).info.run_id
        params = [Param(name, str(value)) for name, value in flat(config.model_dump()).items()]
        for begin in range(0, len(params), 100):  # MLflow takes no more in one call
            client.log_batch(run_id, params=params[begin : begin + 100])

    def log(num_steps: int, metrics: dict[str, float]) -> None:
        now = int(time.time() * 1000)
        legal = {re.sub(r"[^\w./ -]", "_", name): value for name, value in metrics.items()}
        client.log_batch(run_id, metrics=[Metric(name, value, now, num_steps) for name, value in legal.items()])

    return (
        {"run_id": run_id, "tracking_uri": uri},
        log,
        lambda is_failed: client.set_terminated(run_id, status="FAILED" if is_failed else "FINISHED"),
    )


_SERVICES = {
    "wandb": ("W&B", _wandb, "WANDB_MODE=offline logs to the run directory, without an account"),
    "mlflow": ("MLflow", _mlflow, "MLFLOW_TRACKING_URI names the server; unset, the run directory is used"),
}


def append_whole(file: io.FileIO, contents: bytes) -> None:
    """Writes all of it at the end of a file that was opened for appending, or nothing."""
    size, left = os.fstat(file.fileno()).st_size, memoryview(contents)
    try:
        while left:  # a disk that is nearly full accepts a part before it refuses the rest
            left = left[file.write(left) :]
    except BaseException:
        file.truncate(size)
        raise


def finite(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics that are finite numbers."""
    return {name: float(value) for name, value in metrics.items() if math.isfinite(value)}


class ProgressDisplay:
    """A live progress line on a terminal; elsewhere a plain line per update."""

    def __init__(self, total_steps: int, *, stream: TextIO | None = None) -> None:
        self.total_steps, self.stream = total_steps, stream or sys.stderr
        self._progress: Progress | None = None
        if self.stream.isatty() and os.environ.get("TERM") != "dumb":
            self._progress = Progress(
                TextColumn("{task.completed:>10,} / {task.total:,} steps"),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("{task.fields[speed]:,.0f} steps/s  return {task.fields[score]:.3g}  left"),
                TimeRemainingColumn(),
                console=Console(file=self.stream),
                refresh_per_second=2,  # each costs the training half a millisecond
            )
            self._progress.start()
            self._task = self._progress.add_task("", total=total_steps, speed=0.0, score=math.nan)

    def write(self, num_steps: int, metrics: Mapping[str, float]) -> None:
        speed, score = metrics["time/steps_per_s"], metrics["episode/mean_return"]
        if self._progress is not None:
            self._progress.update(self._task, completed=min(num_steps, self.total_steps), speed=speed, score=score)
            return
        left = max(0, self.total_steps - num_steps) / max(speed, 1e-9)
        shown = "-" if math.isnan(score) else f"{score:.3f}"  # no episode has ended yet
        line = f"steps {num_steps:>9,} / {self.total_steps:,}  {speed:>8,.0f} steps/s  return {shown:>8}  left"
        with suppress(OSError):  # the reader is gone or the disk is full: the run goes on
            print(line, f"{left:>5.0f} s", file=self.stream, flush=True)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
