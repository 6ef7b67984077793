"""The numbers of a study: what finished runs left behind, one number per run and measure, means with intervals."""

from __future__ import annotations

import csv
import difflib
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from dualhead.config import RunConfig, StudyConfig
from dualhead.running.checkpoint import RunError, read_json

DEFAULT_MEASURES = ("evaluation/mean_return", "episode/mean_return", "steps_per_s")
"""Measures of a study that lists none; those that no run has are left out."""
LAST_PART = 0.1
"""Share of a run's updates, at its end, over which a column of metrics.csv is averaged."""

FloatArray = NDArray[np.float64]


class Run(NamedTuple):
    """One finished run.

    Fields:
        condition: of the study.
        config: environment, seed and all other settings.
        steps: [U] environment steps at the end of each update.
        columns: metric name -> [U], from metrics.csv; NaN where a row lacks it.
        numbers: from summary.json; those of the final evaluation begin with `evaluation/`.
    """

    condition: str
    config: RunConfig
    steps: NDArray[np.int64]
    columns: dict[str, FloatArray]
    numbers: dict[str, float]

    @property
    def turns(self) -> NDArray[np.int64]:
        """[U] steps of each stream at the end of each update."""
        return self.steps // self.config.num_streams

    @property
    def curves(self) -> set[str]:
        """Columns that can be a measure. An evaluation during training cannot: the final one has its name."""
        return {name for name in self.columns if not name.startswith("evaluation/")}

    def column(self, name: str) -> FloatArray:
        """[U] of one metric; NaN where it was not logged."""
        return self.columns.get(name, np.full(len(self.steps), np.nan))


class Measured(NamedTuple):
    """A run and its measures; a measure that the run lacks is left out."""

    run: Run
    values: dict[str, float]


def read_run(condition: str, config: RunConfig) -> Run:
    """What a finished run logged.

    Raises:
        RunError: its `metrics.csv` cannot be read.
    """
    assert config.run_dir is not None
    path = Path(config.run_dir) / "metrics.csv"
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        steps = np.array([int(row["steps"]) for row in rows])
        names = [name for name in rows[0] if name != "steps"]
        columns = {name: np.array([float(row[name] or "nan") for row in rows]) for name in names}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise RunError(f"cannot read {path}: {error}; remove its run, and the same command repeats it") from error
    summary = read_json(path.with_name("summary.json")) or {}
    evaluation = {f"evaluation/{name}": value for name, value in summary.pop("evaluation", {}).items()}
    summary.pop("seed", None)  # what is given is no outcome
    numbers = {name: float(value) for name, value in (summary | evaluation).items() if type(value) in (int, float)}
    return Run(condition, config, steps, columns, numbers)


def measure(run: Run, name: str) -> float:
    """One run's number for a measure.

    A number of summary.json is taken as it is: `evaluation/mean_return` is that of the final evaluation, `steps_per_s`
    that of the whole run. A column of metrics.csv becomes its mean over the last tenth of the run's updates, a
    `time/...` column its median over all updates.

    Returns:
        NaN where the run has no such measure.
    """
    if name in run.numbers:
        return run.numbers[name]
    if name not in run.curves:
        return math.nan
    column = run.columns[name]
    if name.startswith("time/"):
        return float(np.median(column[~np.isnan(column)])) if not np.isnan(column).all() else math.nan
    return mean_of_known(column[-math.ceil(LAST_PART * len(column)) :])


def unknown_measures(names: Iterable[str], runs: list[Run]) -> list[str]:
    """A line for each measure that no run has, with the nearest ones that there are."""
    known = {name: None for run in runs for name in sorted(run.curves | run.numbers.keys())}
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


def curves_among(measures: Iterable[str], runs: list[Run]) -> list[str]:
    """Those measures that change during a run; the return in training where there is none among them."""
    columns = {name for run in runs for name in run.curves}
    return [name for name in measures if name in columns] or ["episode/mean_return"]


def measure_all(run: Run, names: Iterable[str]) -> Measured:
    """A run with its measures."""
    found = {name: measure(run, name) for name in names}
    return Measured(run, {name: value for name, value in found.items() if not math.isnan(value)})


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


def interval(values: FloatArray) -> tuple[float, float]:
    """95% interval of a mean by Student's t; NaN for one value, or where one is not finite.

    mean ± t_{0.975, n − 1} s / √n,  s² = Σ (value − mean)² / (n − 1)
    """
    if len(values) < 2 or not np.isfinite(values).all():
        return np.nan, np.nan
    mean = float(values.mean())
    half = float(stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values)))
    return mean - half, mean + half


def mean_of_known(values: FloatArray) -> float:
    """Mean of what is there; NaN where nothing is."""
    return float(np.nanmean(values)) if not np.isnan(values).all() else float("nan")
