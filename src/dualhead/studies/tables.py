"""The tables of a study: CSV files, and what the terminal shows."""

from __future__ import annotations

import csv
import io
import math
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dualhead.running.checkpoint import RunError
from dualhead.running.results import Run
from dualhead.storage import write_bytes
from dualhead.studies.commons_measures import GROUPS, share, spans
from dualhead.studies.config import StudyConfig
from dualhead.studies.measures import LAST_PART, Measured, curves_among

Row = dict[str, Any]

ROWS_OF_RUN = 200
"""Most rows of one run in results.csv, so that the file can be kept under version control."""


def write_csv(path: Path, rows: list[Row], *, without: tuple[str, ...] = ()) -> None:
    """Writes rows with every column that one of them has, but for those left out; a missing cell stays empty.

    Raises:
        RunError: the file cannot be written.
    """
    text = io.StringIO()
    columns = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in without]
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    try:
        write_bytes(path, text.getvalue().encode())
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}") from error


def results(study: StudyConfig, runs: list[Run], names: Sequence[str]) -> list[Row]:
    """Rows over time: those measures that change during a run, at most `ROWS_OF_RUN` rows of a run.

    A study of the commons has every update, with its turn, its phase, shares of the harmful resource, and all metrics.
    """
    rows = []
    names = curves_among(names, runs)
    for run in runs:
        columns = {name: run.column(name) for name in names}
        stride = math.ceil(len(run.steps) / ROWS_OF_RUN)
        if study.is_of_the_commons:
            shares = {f"{of}/share/{study.harmful}": share(run, study.harmful, of) for of in ("commons", *GROUPS)}
            columns = {name: of for name, of in (shares | run.metrics.columns).items() if not np.isnan(of).all()}
            stride = 1
        # Counted from the end, so that the last update is always among them.
        for i in range(len(run.steps) - 1, -1, -stride)[::-1]:
            row = _key(run, i)
            if study.is_of_the_commons:
                turn = int(run.turns[i])
                # A rollout in which the phase changes belongs to the phase that it ends in.
                phase = next((span.name for span in spans(run.config) if span.begin < turn <= span.end), "")
                row |= {"turn": turn, "phase": phase}
            rows.append(row | {name: None if np.isnan(of[i]) else float(of[i]) for name, of in columns.items()})
    return rows


def every_seed(measured: list[Measured]) -> list[Row]:
    """A row per run with its measures."""
    return [
        _key(run, -1) | {name: value for name, value in run.summary.items() if name in ("steps", "seconds")} | values
        for run, values in measured
    ]


def _key(run: Run, update: int) -> Row:
    key = {"environment": run.config.env, "condition": run.condition, "seed": run.config.seed}
    return key | {"steps": int(run.steps[update])}


def print_tables(study: StudyConfig, measured: list[Measured], rows: list[Row], names: Sequence[str]) -> None:
    """A table per measure, environments down, from the rows of summary.csv; then every seed of the first measure."""
    if study.title:
        say(study.title)
    for name in names:
        lines = []
        for env in study.worlds:
            of_env = {row["condition"]: row for row in rows if row["measure"] == name and row["environment"] == env}
            digits = _digits(row["mean"] for row in of_env.values())
            cells = {condition: _with_interval(row, digits) for condition, row in of_env.items()}
            lines.append([env, *(cells.get(condition, "–") for condition in study.conditions)])
        print_table(name, ["", *study.conditions], lines)
    if names:
        _print_every_seed(study, measured, names[0])
    say(
        f"{_seeds_in_words(study).capitalize()}. evaluation/...: the evaluation at the end of the run; time/...: "
        f"median over the run's updates; other columns of metrics.csv: mean over the last {LAST_PART:.0%} of the "
        f"run's updates."
    )


def _print_every_seed(study: StudyConfig, measured: list[Measured], name: str) -> None:
    lines = []
    for env in study.worlds:
        of_env = [(run.condition, values.get(name)) for run, values in measured if run.config.env == env]
        digits = _digits(value for _, value in of_env if value is not None)
        for i, condition in enumerate(study.conditions):
            values = [value for of_condition, value in of_env if of_condition == condition]
            texts = ["–" if value is None else f"{value:.{digits}f}" for value in values]
            lines.append(["" if i else env, condition, " ".join(texts)])
    header = ["environment", "condition", "seeds in the order of the file"]
    print_table(f"{name}, every seed", header, lines, justify="left")


def print_commons_table(study: StudyConfig, rows: list[Row]) -> None:
    """The summary of a study of the commons: measures down, conditions across."""
    text = (
        f"Shares (of all that is taken) and rewards (per agent and turn): second half of a phase; "
        f"{_seeds_in_words(study)}."
    )
    if any(row["measure"].startswith("turns to relapse") for row in rows):
        text += (
            f" Relapse: turns without punishment until more than half of what is taken is {study.harmful}."
            f" Closed form: turns for which guilt outweighs what {study.harmful} gains; then relapse must be learned."
        )
    counts = Counter(row["condition"] for row in rows)  # the condition with most measures gives the order
    names = dict.fromkeys(row["measure"] for row in sorted(rows, key=lambda row: -counts[row["condition"]]))
    cells = {(row["measure"], row["condition"]): _commons_cell(row) for row in rows}
    lines = [[name, *(cells.get((name, condition), "–") for condition in study.conditions)] for name in names]
    print_table(study.title, ["", *study.conditions], lines)
    say(text)


def _commons_cell(row: Row) -> str:
    """A mean and half of its interval; turns are whole numbers, or `never` where no seed relapsed."""
    if np.isinf(row["max"]):
        return "never" if np.isinf(row["min"]) else f"{row['min']:.0f} to never"
    return _with_interval(row, digits=0 if row["measure"].startswith("turns") else 2)


def print_table(
    title: str, header: list[str], lines: list[list[str]], *, justify: Literal["left", "right"] = "right"
) -> None:
    """Prints a table in the terminal's width, its first column to the left."""
    table = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(header):
        table.add_column(Text(column), justify=justify if i else "left", overflow="fold")
    for line in lines:
        table.add_row(*map(Text, line))
    say(table)


def say(what: Table | str) -> None:
    """Prints in the terminal's width; into files in a fixed width, so that logs do not depend on the machine."""
    width = None if sys.stdout.isatty() else 120
    Console(width=width).print(Text(what) if isinstance(what, str) else what)


def _with_interval(row: Row, digits: int) -> str:
    """`mean ± half of the interval`, or the mean alone where there is no interval."""
    half = row["ci95_high"] - row["mean"]
    mean = f"{row['mean']:.{digits}f}"
    return mean if np.isnan(half) else f"{mean} ± {half:.{digits}f}"


def _seeds_in_words(study: StudyConfig) -> str:
    many = len(study.seeds)
    return f"mean of {many} seeds ± half of its 95% interval" if many > 1 else "one seed"


def _digits(values: Iterable[float]) -> int:
    """Decimals that show about four figures of the largest value."""
    largest = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
    return sum(largest < limit for limit in (10, 100, 1000))
