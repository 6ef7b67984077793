"""The numbers of a study: one per finished run and measure, and their means with intervals."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from dualhead.running.checkpoint import RunError
from dualhead.running.results import FloatArray, Run, interval
from dualhead.studies.config import StudyConfig

DEFAULT_MEASURES = ("evaluation/mean_return", "episode/mean_return", "steps_per_s")
"""Measures of a study that lists none; those that no run has are left out."""
LAST_PART = 0.1
"""Share of a run's updates, at its end, over which a column of metrics.csv is averaged."""


class Measured(NamedTuple):
    """A run and its measures by name. A measure that the run does not have is left out."""

    run: Run
    values: dict[str, float]


def curves(run: Run) -> set[str]:
    """Columns that can be a measure. Evaluations during training cannot: the final evaluation has their names."""
    return {name for name in run.metrics.columns if not name.startswith("evaluation/")}


def measures_of(run: Run) -> dict[str, float]:
    """All that a run can be measured by, as docs/studies.md defines it; NaN where a column is empty.

    A number of summary.json is taken as it is; those of the final evaluation are `evaluation/...`. A column of
    metrics.csv becomes its mean over the last tenth of the run's updates, a `time/...` column its median over all.
    """
    evaluation = {f"evaluation/{name}": value for name, value in run.summary.get("evaluation", {}).items()}
    found = {name: float(value) for name, value in (run.summary | evaluation).items() if type(value) in (int, float)}
    found.pop("seed", None)  # a setting
    for name in curves(run) - found.keys():
        column = run.column(name)
        last = column[-math.ceil(LAST_PART * len(column)) :]
        over, values = (np.median, column) if name.startswith("time/") else (np.mean, last)
        values = values[~np.isnan(values)]
        found[name] = float(over(values)) if len(values) else math.nan
    return found


def measure(run: Run, names: Iterable[str]) -> Measured:
    """A run with the measures of these names."""
    found = measures_of(run)
    return Measured(run, {name: found[name] for name in names if not math.isnan(found.get(name, math.nan))})


def unknown_measures(names: Iterable[str], runs: list[Run]) -> list[str]:
    """A line for each measure that no run has, with the nearest names that runs have."""
    known = {name: None for run in runs for name in sorted(measures_of(run))}
    return [
        f"{name!r} is no measure of these runs; the nearest: "
        + ", ".join(difflib.get_close_matches(name, known, n=3, cutoff=0.0))
        for name in names
        if name not in known
    ]


def chosen_measures(study: StudyConfig, runs: list[Run]) -> tuple[str, ...]:
    """Names of a study's measures, in order.

    Raises:
        RunError: the study lists one that no run has.
    """
    problems = unknown_measures(study.measures, runs)
    if problems:
        raise RunError(
            "measures: " + "\n  ".join(problems) + "\ncorrect `measures` in the study's file and repeat the command; "
            "finished runs are not repeated"
        )
    return study.measures or tuple(name for name in DEFAULT_MEASURES if not unknown_measures([name], runs))


def curves_among(names: Iterable[str], runs: list[Run]) -> list[str]:
    """Those measures that change during a run; if there is none, the return in training."""
    columns = {name for run in runs for name in curves(run)}
    return [name for name in names if name in columns] or ["episode/mean_return"]


def summarise(measured: list[Measured]) -> list[dict[str, Any]]:
    """A row per environment, condition and measure: mean and 95% t-interval over the seeds that have it, and range."""
    groups: dict[tuple[str, str], list[dict[str, float]]] = {}
    for run, values in measured:
        groups.setdefault((run.config.env, run.condition), []).append(values)
    rows = []
    for (environment, condition), of_seeds in groups.items():
        for name in dict.fromkeys(name for values in of_seeds for name in values):
            known = np.array([values[name] for values in of_seeds if name in values])
            low, high = interval(known)
            row = {"environment": environment, "condition": condition, "measure": name, "mean": float(known.mean())}
            row |= {"ci95_low": low, "ci95_high": high, "min": float(known.min()), "max": float(known.max())}
            rows.append(row | {"seeds": len(known)})
    return rows


def mean_of_known(values: FloatArray) -> float:
    """Mean of the values that are not NaN; NaN if there are none."""
    return float(np.nanmean(values)) if not np.isnan(values).all() else math.nan
