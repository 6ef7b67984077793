"""What a run has left in its directory, read again; and the interval of a mean."""

from __future__ import annotations

import csv
import io
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from dualhead.config import COUNT_LIMIT, NonNegativeInt, problems
from dualhead.errors import RunError
from dualhead.running.checkpoint import read_config, read_json
from dualhead.running.config import RunConfig
from dualhead.storage import read_bytes

_MAX_METRICS = 2**31
"""Bytes."""
FloatArray = NDArray[np.float64]


class Table(NamedTuple):
    """Numbers of a `metrics.csv` or `evaluations.csv`."""

    steps: NDArray[np.int64]  # [U] environment steps of each row, rising
    columns: dict[str, FloatArray]  # [U] each; NaN where a cell is empty or no number


class Run(NamedTuple):
    """A run that is finished, stopped, or still going."""

    path: Path
    config: RunConfig
    metrics: Table  # a row per update
    evaluations: Table  # a row per evaluation
    summary: dict[str, Any]  # empty if `summary.json` is missing, or older than the newest row
    condition: str = ""  # of the study that the run belongs to

    @property
    def steps(self) -> NDArray[np.int64]:
        """[U] environment steps at the end of each update."""
        return self.metrics.steps

    @property
    def turns(self) -> NDArray[np.int64]:
        """[U] steps of each stream at the end of each update."""
        return self.steps // self.config.num_streams

    def column(self, name: str) -> FloatArray:
        """[U] of one metric; NaN where it was not logged."""
        return self.metrics.columns.get(name, np.full(len(self.steps), np.nan))


def read_run(path: Path, *, condition: str = "") -> Run:
    """Reads a run directory; RunError if no run is there, or it has no row of metrics yet."""
    config = read_config(path)
    metrics, evaluations = read_table(path / "metrics.csv"), read_table(path / "evaluations.csv")
    if not len(metrics.steps):
        raise RunError(f"{path} has no numbers yet: metrics.csv gets a row after the first update")
    summary = read_summary(path)
    newest = max(int(table.steps[-1]) for table in (metrics, evaluations) if len(table.steps))
    return Run(path, config, metrics, evaluations, summary if summary.get("steps", 0) >= newest else {}, condition)


class _Evaluation(BaseModel):
    model_config = ConfigDict(extra="allow")

    mean_return: float
    std_return: float = math.nan
    ci95_low: float = math.nan
    ci95_high: float = math.nan
    episodes: NonNegativeInt = 0


class _Summary(BaseModel):
    """What is read of a `summary.json`."""

    model_config = ConfigDict(strict=True)

    steps: NonNegativeInt = 0
    stopped_early: bool = True
    seconds: float = math.nan
    evaluation: _Evaluation | None = None


def read_summary(run_dir: Path) -> dict[str, Any]:
    """The contents of a run's summary; nothing if there is none, or none that a run wrote."""
    path = run_dir / "summary.json"
    contents = read_json(path) or {}
    try:
        return contents | _Summary.model_validate(contents).model_dump(exclude_unset=True)
    except ValidationError as error:
        name, message = problems(error)[0]
        warnings.warn(f"{path} is not used, it is no summary of a run: {name}: {message:.200}", stacklevel=2)
        return {}


def read_table(path: Path) -> Table:
    """The numbers of a file of metrics; no rows if the file is missing."""
    columns, rows, _ = read_rows(path)
    cells = list(zip(*rows)) or [()] * len(columns)
    return Table(
        np.array([int(steps) for steps in cells[0]] if columns else [], dtype=np.int64),
        {name: np.array([_number(cell) for cell in of_name]) for name, of_name in list(zip(columns, cells))[1:]},
    )


def _number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return math.nan


def read_rows(path: Path) -> tuple[list[str], list[list[str]], int]:
    """The columns and rows of a file of metrics as text, and the number of damaged rows that are left out.

    A last line without its end is left out: its process was killed while it wrote, or is writing it now. Where steps do
    not rise, a resumed run wrote the same steps again: the later rows count. No file: no columns.

    Raises:
        RunError: the file cannot be read, or holds something else.
    """
    try:
        contents = read_bytes(path, at_most=_MAX_METRICS)
        text = contents.decode(errors="replace").replace("\0", "").replace("\r\n", "\n")
        lines = list(csv.reader(io.StringIO(text[: text.rfind("\n") + 1], newline="")))
    except FileNotFoundError:
        lines = []
    except (OSError, csv.Error) as error:
        raise RunError(f"cannot read {path}: {error}; repair it or move it away") from error
    if not lines:
        return [], [], 0
    columns, *rows = lines
    if columns[:1] != ["steps"]:
        raise RunError(f"{path} is no file of metrics: expected 'steps' as its first column, got {columns[:1]}")
    kept: list[list[str]] = []
    num_damaged = 0
    for row in rows:
        if len(row) != len(columns) or not _is_count(row[0]):
            num_damaged += 1
            continue
        while kept and int(kept[-1][0]) >= int(row[0]):
            kept.pop()
        kept.append(row)
    return columns, kept, num_damaged


def last_steps(path: Path) -> int:
    """Environment steps of the last row of a file of metrics; 0 if there is none."""
    try:
        contents = read_bytes(path, at_most=_MAX_METRICS)
    except OSError:
        return 0
    steps = contents.rstrip().rpartition(b"\n")[2].partition(b",")[0].decode(errors="replace")
    return int(steps) if _is_count(steps) else 0


def _is_count(text: str) -> bool:
    return text.isdecimal() and len(text) < 20 and int(text) < COUNT_LIMIT


def interval(values: Sequence[float] | FloatArray) -> tuple[float, float]:
    """95% interval of a mean by Student's t; NaN for one value, or if one is not finite.

    mean ± t_{0.975, n − 1} s / √n,  s² = Σ (value − mean)² / (n − 1)
    """
    from scipy.special import stdtrit  # its import takes a quarter of a second

    if len(values) < 2 or not np.isfinite(values).all():
        return math.nan, math.nan
    mean = float(np.mean(values))
    margin = float(stdtrit(len(values) - 1, 0.975) * np.std(values, ddof=1)) / math.sqrt(len(values))
    return mean - margin, mean + margin
