"""The tables of a study: CSV files, and what the terminal shows."""

from __future__ import annotations

import csv
import io
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dualhead.running.checkpoint import RunError
from dualhead.running.results import Run
from dualhead.storage import write_bytes
from dualhead.studies.config import StudyConfig
from dualhead.studies.measures import LAST_PART, Measured, numbers

Row = dict[str, Any]

SUMMARY = ("environment", "condition", "measure", "mean", "ci95_low", "ci95_high", "min", "max", "seeds")
"""Columns of summary.csv."""
ROWS_OF_RUN = 200
"""Most rows of one run in results.csv, so that the file can be kept under version control."""


def write_csv(path: Path, rows: list[Row], columns: Sequence[str]) -> None:
    """Writes chosen columns of rows; a cell that a row lacks stays empty.

    Raises:
        RunError: the file cannot be written.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    try:
        write_bytes(path, text.getvalue().encode())
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}") from error


def results(runs: list[Run], names: list[str]) -> tuple[list[Row], list[str]]:
    """Curves of every run as rows of a tidy table, at most `ROWS_OF_RUN` of a run; and the table's columns."""
    rows = []
    for run in runs:
        stride = math.ceil(len(run.steps) / ROWS_OF_RUN)
        for i in range(len(run.steps) - 1, -1, -stride)[::-1]:  # the last update is always among them
            row = _key(run) | {"steps": int(run.steps[i])}
            rows.append(row | {name: run.column(name)[i] for name in names if not np.isnan(run.column(name)[i])})
    return rows, ["environment", "condition", "seed", "steps", *names]


def every_seed(measured: list[Measured]) -> tuple[list[Row], list[str]]:
    """A row per run with its measures; and the table's columns."""
    rows = [
        _key(run) | {"steps": int(run.steps[-1]), "seconds": numbers(run).get("seconds", math.nan)} | values
        for run, values in measured
    ]
    fixed = ["environment", "condition", "seed", "steps", "seconds"]
    return rows, list(dict.fromkeys(fixed + [name for run in measured for name in run.values]))


def _key(run: Run) -> Row:
    return {"environment": run.config.env, "condition": run.condition, "seed": run.config.seed}


def print_tables(study: StudyConfig, measured: list[Measured], rows: list[Row], names: Sequence[str]) -> None:
    """A table per measure, with environments down, then every seed's value of the first measure.

    Args:
        study: its title and conditions.
        measured: the runs.
        rows: of summary.csv.
        names: the measures.
    """
    if study.title:
        say(study.title)
    for name in names:
        of_measure = [row for row in rows if row["measure"] == name]
        digits = _digits((row["environment"], row["mean"]) for row in of_measure)
        cells = {
            (row["environment"], row["condition"]): with_interval(row, digits[row["environment"]]) for row in of_measure
        }
        print_table(study.worlds, study.conditions, cells, title=name)
    if names:
        _print_every_seed(measured, names[0])
    say(
        f"{seeds_in_words(study).capitalize()}. evaluation/...: the evaluation at the end of the run; time/...: "
        f"median over the run's updates; other columns of metrics.csv: mean over the last {LAST_PART:.0%} of the "
        f"run's updates."
    )


def print_table(
    down: Iterable[str], across: Iterable[str], cells: Mapping[tuple[str, str], str], *, title: str
) -> None:
    """One table.

    Args:
        down: names of its rows.
        across: names of its columns.
        cells: by row and column; a missing one is a dash.
        title: over the table.
    """
    across = list(across)
    table = _table(title)
    table.add_column("", overflow="fold")
    for column in across:
        table.add_column(Text(column), justify="right", overflow="fold")
    for row in down:
        table.add_row(Text(row), *(Text(cells.get((row, column), "–")) for column in across))
    say(table)


def _print_every_seed(measured: list[Measured], name: str) -> None:
    digits = _digits((run.config.env, values[name]) for run, values in measured if name in values)
    lines: dict[tuple[str, str], list[str]] = {}
    for run, values in measured:
        text = f"{values[name]:.{digits[run.config.env]}f}" if name in values else "–"
        lines.setdefault((run.config.env, run.condition), []).append(text)
    table = _table(f"{name}, every seed")
    for column in ("environment", "condition", "seeds in the order of the file"):
        table.add_column(column, overflow="fold")
    before = ""
    for (environment, condition), texts in lines.items():
        table.add_row(Text(environment if environment != before else ""), Text(condition), Text(" ".join(texts)))
        before = environment
    say(table)


def say(what: Table | str) -> None:
    """Prints on the terminal in its width; elsewhere in a fixed one, so that logs do not depend on the machine."""
    width = None if sys.stdout.isatty() else 120
    Console(width=width).print(Text(what) if isinstance(what, str) else what)


def with_interval(row: Row, digits: int) -> str:
    """`mean ± half of the interval`, or the mean alone where there is no interval."""
    half = row["ci95_high"] - row["mean"]
    mean = f"{row['mean']:.{digits}f}"
    return mean if np.isnan(half) else f"{mean} ± {half:.{digits}f}"


def seeds_in_words(study: StudyConfig) -> str:
    """What a mean of the tables is over."""
    many = len(study.seeds)
    return f"mean of {many} seeds ± half of its 95% interval" if many > 1 else "one seed"


def _digits(values: Iterable[tuple[str, float]]) -> dict[str, int]:
    """For each environment the decimals that show about four figures of its largest value."""
    largest: dict[str, float] = {}
    for env, value in values:
        largest[env] = max(largest.get(env, 0.0), abs(value) if math.isfinite(value) else 0.0)
    return {env: 0 if size >= 1000 else 1 if size >= 100 else 2 if size >= 10 else 3 for env, size in largest.items()}


def _table(title: str) -> Table:
    return Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
