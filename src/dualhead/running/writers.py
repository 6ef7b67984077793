"""Where a run's metrics go: CSV, TensorBoard, W&B, MLflow, and the terminal."""

from __future__ import annotations

import csv
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
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, TextIO, runtime_checkable

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from dualhead.config import flat
from dualhead.running.checkpoint import RunError, write_json
from dualhead.running.config import RunConfig
from dualhead.running.results import read_rows
from dualhead.storage import write_bytes


@runtime_checkable
class Writer(Protocol):
    """Takes a run's metrics, once per update. Any object with these two methods is one."""

    def write(self, num_steps: int, metrics: Mapping[str, float]) -> None:
        """Takes the metrics after `num_steps` environment steps. A number may be NaN."""

    def close(self) -> None:
        """Writes what is not written yet. Called once, also where the run fails."""


def expect_writers(writers: Iterable[object]) -> list[Writer]:
    """The same objects, as a list, if they are writers.

    Raises:
        TypeError: one is not; a class instead of its instance, say.
    """
    given = list(writers)
    for writer in given:
        if isinstance(writer, type) or not isinstance(writer, Writer):
            raise TypeError(
                f"expected a writer, with the methods write(num_steps, metrics) and close(), got {writer!r}"
            )
    return given  # type: ignore[return-value]


def make_writers(
    config: RunConfig, run_dir: Path, *, resume_at: int | None = None, show_progress: bool = True
) -> list[Writer]:
    """Opens the writers of a run.

    Args:
        config: of the run.
        run_dir: of the run.
        resume_at: environment steps of the checkpoint that the run resumes from; what was written after it is dropped.
        show_progress: add the display on the terminal.

    Raises:
        RunError: a package is missing, or something cannot be opened or written.
    """
    require_packages(config)
    writers: list[Writer] = []
    try:
        writers.append(CSVWriter(run_dir, resume_at=resume_at))
        writers.append(TensorBoardWriter(run_dir, resume_at=resume_at))
        for name in config.log_to:
            writer = WandbWriter if name == "wandb" else MLflowWriter
            writers.append(writer(run_dir, config=config, resume_at=resume_at))
    except BaseException:
        for opened in writers:
            opened.close()
        raise
    return [*writers, ProgressDisplay(config.total_steps)] if show_progress else writers


def require_packages(config: RunConfig) -> None:
    """Checks that the packages which the writers of a run need are installed, without importing them.

    Raises:
        RunError: one is missing; the message says how to install it.
    """
    for name in config.log_to:
        if importlib.util.find_spec(name) is None:
            raise RunError(
                f"log_to={name!r} needs a package that is not installed: pip install -e '.[{name}]' in the checkout"
            )


class CSVWriter:
    """A row per update, a column per metric; a metric that appears later adds a column.

    A row is written whole or not at all, even when the disk is full.

    Args:
        run_dir: where the file lies.
        name: of the file.
        resume_at: keep the rows of the existing file up to this many environment steps; later rows, and a row that
            was cut off when its process was killed, are dropped. None: the first row starts a new file.

    Attributes:
        last_steps: environment steps of the last row; None if there is no row.

    Raises:
        RunError: the existing file is no file of metrics, or it cannot be written.
    """

    def __init__(self, run_dir: Path, *, name: str = "metrics.csv", resume_at: int | None = None) -> None:
        self.path = run_dir / name
        self.last_steps: int | None = None
        self._columns: list[str] = []
        self._file: io.FileIO | None = None
        if resume_at is not None and self.path.exists():
            try:
                self._take_up(resume_at)
            except OSError as error:
                raise self._failed(error) from error

    def write(self, num_steps: int, metrics: Mapping[str, float]) -> None:
        """Raises:
        RunError: it cannot be written; the rows before are there.
        """
        row: dict[str, Any] = {"steps": num_steps, **metrics}
        added = [name for name in row if name not in self._columns]
        try:
            if added:
                rows = read_rows(self.path)[1] if self._columns else []
                self._replace([*self._columns, *added], [old + [""] * len(added) for old in rows])
            assert self._file is not None
            append_whole(self._file, _lines([[row.get(name, "") for name in self._columns]]))
        except OSError as error:
            raise self._failed(error) from error
        self.last_steps = num_steps

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _replace(self, columns: list[str], rows: list[list[str]]) -> None:
        write_bytes(self.path, _lines([columns, *rows]))
        self.close()
        self._columns, self._file = columns, io.FileIO(self.path, "a")

    def _take_up(self, resume_at: int) -> None:
        columns, rows, num_damaged = read_rows(self.path)
        if num_damaged:
            warnings.warn(f"{self.path}: {num_damaged} damaged rows are left out", stacklevel=4)
        kept = [row for row in rows if int(row[0]) <= resume_at]
        if columns:
            self._replace(columns, kept)
        self.last_steps = int(kept[-1][0]) if kept else None

    def _failed(self, error: OSError) -> RunError:
        return RunError(f"cannot write {self.path}: {error.strerror or error}; the rows before this one are there")


def _lines(rows: Iterable[Iterable[Any]]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    return text.getvalue().encode()


class TensorBoardWriter:
    """TensorBoard event files in the run directory; non-finite numbers are left out.

    One record per update, written immediately and whole. (`torch.utils.tensorboard` writes every number separately
    from a thread, in which nobody catches the error of a full disk.)

    Args:
        run_dir: of the run.
        resume_at: TensorBoard drops what an earlier part of this run logged after this many environment steps.

    Raises:
        RunError: they cannot be written.
    """

    def __init__(self, run_dir: Path, *, resume_at: int | None = None) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        folder = run_dir / "tensorboard"
        # TensorBoard reads files in the order of their names.
        self.path = folder / f"events.out.tfevents.{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}"
        try:
            folder.mkdir(exist_ok=True)
            self._file = io.FileIO(self.path, "a")
        except OSError as error:
            raise self._failed(error) from error
        try:
            self._add(Event(wall_time=time.time(), file_version="brain.Event:2"))
            if resume_at is not None:
                start = SessionLog(status=SessionLog.START)
                self._add(Event(wall_time=time.time(), step=resume_at + 1, session_log=start))
        except RunError:
            self.close()
            raise

    def write(self, num_steps: int, metrics: Mapping[str, float]) -> None:
        """Raises:
        RunError: it cannot be written; what was logged before is there.
        """
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in finite(metrics).items()]
        self._add(Event(wall_time=time.time(), step=num_steps, summary=Summary(value=values)))

    def close(self) -> None:
        self._file.close()

    def _add(self, event: Any) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        try:
            append_whole(self._file, record.getvalue())
        except OSError as error:
            raise self._failed(error) from error

    def _failed(self, error: OSError) -> RunError:
        return RunError(f"cannot write {self.path}: {error.strerror or error}")


class WandbWriter:
    """A run of Weights & Biases: `steps` is the horizontal axis, the settings are its config.

    `wandb.json` keeps its id, so that a resumed run continues the same W&B run; what was logged after the checkpoint
    is logged again. Project, entity and mode (`WANDB_MODE=offline`) are taken from W&B's own environment variables.

    Args:
        run_dir: of the run.
        config: of the run.
        resume_at: not None to continue the existing run.

    Raises:
        RunError: W&B refuses; not logged in, most likely.
    """

    def __init__(self, run_dir: Path, *, config: RunConfig, resume_at: int | None = None) -> None:
        remembered = _remembered(run_dir / "wandb.json") if resume_at is not None else {}
        run_id = remembered.get("id") or secrets.token_hex(4)
        try:
            import wandb

            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "dualhead"),
                id=run_id,
                name=_title(config),
                dir=str(run_dir),
                config=config.model_dump(),
                resume="allow",
                settings={"console": "off"},  # standard output and error stay as they are
            )
            self._run.define_metric("steps")
            self._run.define_metric("*", step_metric="steps")
        except Exception as error:
            raise RunError(
                f"cannot begin a W&B run: {error} (WANDB_MODE=offline logs to the run directory, without an account)"
            ) from error
        write_json(run_dir / "wandb.json", {"id": run_id})
        self._warned = False

    def write(self, num_steps: int, metrics: Mapping[str, float]) -> None:
        """Warns once if W&B refuses metrics. The run continues, and metrics.csv has them."""
        try:
            self._run.log({"steps": num_steps, **finite(metrics)})
        except Exception as error:
            if not self._warned:
                warnings.warn(f"W&B took no metrics: {error}", stacklevel=2)
            self._warned = True

    def close(self) -> None:
        self._run.finish(exit_code=int(_is_failing()))


class MLflowWriter:
    """A run of MLflow; the settings are its parameters.

    It is stored in `mlflow.db` in the run directory, or at `MLFLOW_TRACKING_URI` if that is set, in the experiment
    `dualhead` unless `MLFLOW_EXPERIMENT_NAME` names another. `mlflow.json` keeps its id, so that a resumed run
    continues the same MLflow run; what was logged after the checkpoint is logged again.

    Args:
        run_dir: of the run.
        config: of the run.
        resume_at: not None to go on with the run that is there.

    Raises:
        RunError: MLflow refuses.
    """

    _MOST_PARAMS = 100  # in one call

    def __init__(self, run_dir: Path, *, config: RunConfig, resume_at: int | None = None) -> None:
        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(run_dir / 'mlflow.db').resolve()}"
        remembered = _remembered(run_dir / "mlflow.json") if resume_at is not None else {}
        try:
            from mlflow import MlflowClient
            from mlflow.entities import Param

            self._client = MlflowClient(tracking_uri=uri)
            if remembered.get("tracking_uri") == uri:
                self._run_id = remembered["run_id"]
                self._client.update_run(self._run_id, status="RUNNING")
            else:
                name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "dualhead")
                experiment = self._client.get_experiment_by_name(name)
                experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(name)
                self._run_id = self._client.create_run(experiment_id, run_name=_title(config)).info.run_id
                params = [Param(name, str(value)) for name, value in flat(config.model_dump()).items()]
                for begin in range(0, len(params), self._MOST_PARAMS):
                    self._client.log_batch(self._run_id, params=params[begin : begin + self._MOST_PARAMS])
        except Exception as error:
            raise RunError(f"cannot begin an MLflow run at {uri}: {error}") from error
        write_json(run_dir / "mlflow.json", {"run_id": self._run_id, "tracking_uri": uri})
        self._warned = False

    def write(self, num_steps: int, metrics: Mapping[str, float]) -> None:
        """Warns once if MLflow refuses metrics. The run continues, and metrics.csv has them."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        try:
            self._client.log_batch(
                self._run_id,
                metrics=[
                    Metric(re.sub(r"[^\w./ -]", "_", name), value, now, num_steps)
                    for name, value in finite(metrics).items()
                ],
            )
        except Exception as error:
            if not self._warned:
                warnings.warn(f"MLflow took no metrics: {error}", stacklevel=2)
            self._warned = True

    def close(self) -> None:
        try:
            self._client.set_terminated(self._run_id, status="FAILED" if _is_failing() else "FINISHED")
        except Exception as error:
            warnings.warn(f"MLflow was not told of the end: {error}", stacklevel=2)


def append_whole(file: io.FileIO, contents: bytes) -> None:
    """Writes all of it at the end of a file that was opened for appending, or nothing.

    Raises:
        OSError: it cannot be written.
    """
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


def _remembered(path: Path) -> dict[str, str]:
    try:
        known = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise RunError(
            f"cannot read {path}: {error}; without it a new run would be logged: mend or remove it"
        ) from error
    return known if isinstance(known, dict) else {}


def _title(config: RunConfig) -> str:
    return f"{config.env} {config.memory_name}-seed{config.seed}"


def _is_failing() -> bool:
    """Whether a writer is closed because of an error: writers are closed in a `finally`."""
    return sys.exc_info()[0] is not None


class ProgressDisplay:
    """A live progress line on a terminal; elsewhere a plain line per update.

    Args:
        total_steps: of the run.
        stream: where to write; standard error by default.
    """

    def __init__(self, total_steps: int, *, stream: TextIO | None = None) -> None:
        self.total_steps = total_steps
        self.stream = stream or sys.stderr
        self.started = time.perf_counter()
        self._progress: Progress | None = None
        if self.stream.isatty() and os.environ.get("TERM") != "dumb":
            self._progress = Progress(
                TextColumn("{task.completed:>10,} / {task.total:,} steps"),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("{task.fields[speed]:,.0f} steps/s  return {task.fields[score]:.3g}  left"),
                TimeRemainingColumn(),
                console=Console(file=self.stream),
                refresh_per_second=2,  # each takes half a millisecond from the training
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
        with suppress(OSError):  # the reader is gone or the disk is full: the run must not end for that
            print(
                f"steps {num_steps:>9,} / {self.total_steps:,}  {speed:>8,.0f} steps/s  return {shown:>8}  "
                f"left {left:>5.0f} s",
                file=self.stream,
                flush=True,
            )

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
