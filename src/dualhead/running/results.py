"""What a run has left in its directory, read again; and the interval of a mean."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dualhead.errors import RunError
from dualhead.running.checkpoint import read_config, read_json
from dualhead.running.config import RunConfig

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
    summary = read_json(path / "summary.json") or {}
    newest = max(int(table.steps[-1]) for table in (metrics, evaluations) if len(table.steps))
    return Run(path, config, metrics, evaluations, summary if summary.get("steps", 0) >= newest else {}, condition)


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
        text = path.read_text(encoding="utf-8", errors="replace").replace("\0", "")
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
        if len(row) != len(columns) or not row[0].isdecimal():
            num_damaged += 1
            continue
        while kept and int(kept[-1][0]) >= int(row[0]):
            kept.pop()
        kept.append(row)
    return columns, kept, num_damaged


def last_steps(path: Path) -> int:
    """Environment steps of the last row of a file of metrics; 0 if there is none."""
    try:
        contents = path.read_bytes()
    except OSError:
        return 0
    steps = contents.rstrip().rpartition(b"\n")[2].partition(b",")[0]
    return int(steps) if steps.isdigit() else 0


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
