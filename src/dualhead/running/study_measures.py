"""The numbers of a study: shares, rewards and relapses of single runs, and their means and intervals over seeds."""

from __future__ import annotations

import csv
import itertools
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from dualhead.config import RunConfig, StudyConfig
from dualhead.norms import guilt_outweighs_until, steps_until
from dualhead.running.checkpoint import RunError

RELAPSE_SHARE = 0.5
"""A relapse is the first time that more than this share of what is taken is the harmful resource."""


GROUPS = ("newcomers", "incumbents")


class Span(NamedTuple):
    """A phase of a run: its turns are those after `begin` until `end`; `level` is the one that it begins with."""

    name: str
    level: int | None
    begin: int
    end: int
    punishes: bool


class Run(NamedTuple):
    """One finished run.

    Fields:
        turns: [U], at the end of each update's rollout.
        columns: metric name -> [U]; NaN where a row lacks it.
    """

    condition: str
    seed: int
    config: RunConfig
    turns: NDArray[np.int64]
    columns: dict[str, NDArray[np.float64]]

    def share(self, harmful: str, prefix: str = "commons") -> NDArray[np.float64]:
        """[U] share of the harmful resource among all that were taken; NaN where nothing was (or nobody was there)."""
        taken = np.stack([self.column(f"{prefix}/taken/{kind}") for kind in self.config.commons.resources])
        ours = self.column(f"{prefix}/taken/{harmful}")
        with np.errstate(invalid="ignore", divide="ignore"):
            return ours / taken.sum(0)

    def column(self, name: str) -> NDArray[np.float64]:
        """[U] of one metric; NaN where it was not logged."""
        return self.columns.get(name, np.full(len(self.turns), np.nan))


def read_run(condition: str, seed: int, config: RunConfig) -> Run:
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
    return Run(condition, seed, config, steps // config.num_streams, columns)


def spans(config: RunConfig) -> list[Span]:
    """The phases of a run in turns; phases that repeat are one."""
    total = math.ceil(config.total_steps / config.num_streams)
    phases = config.commons.phases
    if config.commons.repeat_phases:
        return [Span("all phases", None, 0, total, punishes=True)]
    found, begin = [], 0
    modes = [phase.mode for phase in phases]
    for i, phase in enumerate(phases):
        end = total if i == len(phases) - 1 or phase.num_turns is None else min(begin + phase.num_turns, total)
        name = {"off": "no punishment", "fixed": "punishment", "voted": "votes"}[phase.mode]
        if modes.count(phase.mode) > 1:
            name += f" ({modes[: i + 1].count(phase.mode)})"
        if end > begin:
            found.append(Span(name, None if phase.mode == "off" else phase.level, begin, end, phase.mode != "off"))
        begin = end
    return found


def measures(study: StudyConfig, run: Run) -> dict[str, float]:
    """The numbers of one run that the summary is made of; what does not apply is left out.

    Shares of the harmful resource and rewards are means over the second half of a phase, when most of the learning
    that it causes is done.
    """
    found: dict[str, float] = {}
    phases = spans(run.config)
    for span in phases:
        late = second_half(run, span)
        in_phase = f", {span.name}" if len(phases) > 1 else ""
        of_groups = {group: run.share(study.harmful, group)[late] for group in GROUPS}
        found[f"{study.harmful} share{in_phase}"] = mean_of_known(run.share(study.harmful)[late])
        if not np.isnan(of_groups["newcomers"]).all():
            found |= {
                f"{study.harmful} share of {group}{in_phase}": mean_of_known(of_groups[group]) for group in GROUPS
            }
        found[f"reward{in_phase}"] = mean_of_known(run.column("rollout/task_reward")[late])
    found |= _relapse(study, run)
    return {name: value for name, value in found.items() if not np.isnan(value)}


def second_half(run: Run, span: Span | None = None) -> NDArray[np.bool_]:
    """[U] updates that end in the second half of a phase, or of the run."""
    begin, end = (0, int(run.turns[-1])) if span is None else (span.begin, span.end)
    return (run.turns > (begin + end) / 2) & (run.turns <= end)


def end_of_punishment(config: RunConfig) -> int | None:
    """Turns before the first phase without punishment that follows one with it; None where there is none."""
    return next((b.begin for a, b in itertools.pairwise(spans(config)) if a.punishes and not b.punishes), None)


def _relapse(study: StudyConfig, run: Run) -> dict[str, float]:
    """How long compliance outlived punishment, beside the closed form.

    Counted from the end of punishment to the end of the first rollout without any in which most of what was taken is
    harmful; infinite where there was none until the end of the run.
    """
    stop = end_of_punishment(run.config)
    after = run.turns - run.config.ppo.rollout_length >= (np.inf if stop is None else stop)
    if stop is None or not after.any():
        return {}
    found = {}
    groups = {"": run.share(study.harmful)} | {f", {group}": run.share(study.harmful, group) for group in GROUPS}
    if np.isnan(groups[", newcomers"][after]).all():
        groups = {"": groups[""]}
    for group, share in groups.items():
        if np.isnan(share[after]).all():
            continue
        relapsed = run.turns[after & (share > RELAPSE_SHARE)]
        found[f"turns to relapse{group}"] = float(relapsed[0] - stop) if len(relapsed) else np.inf
    strength = strength_at(study, run, stop)
    if strength is not None:
        found["turns by the closed form"] = closed_form(study, run.config, strength)
        found["norm strength at the end of punishment"] = strength
    return found


def strength_at(study: StudyConfig, run: Run, turn: int) -> float | None:
    """Mean strength of the norm against the harmful resource at the last update until a turn, if it was logged."""
    strengths = run.column(f"norms/strength/{study.harmful}")[run.turns <= turn]
    return float(strengths[-1]) if len(strengths) and not np.isnan(strengths[-1]) else None


def closed_form_turn(study: StudyConfig, run: Run) -> float | None:
    """Turn until which guilt outweighs the gain after punishment has ended; None where it never does."""
    stop = end_of_punishment(run.config)
    strength = None if stop is None else strength_at(study, run, stop)
    if stop is None or strength is None:
        return None
    lasts = closed_form(study, run.config, strength)
    return stop + lasts if lasts > 0.0 else None


def phases_repeat(runs: list[Run]) -> bool:
    """Whether they do in any run."""
    return any(run.config.commons.repeat_phases for run in runs)


def closed_form(study: StudyConfig, config: RunConfig, strength: float) -> float:
    """Turns without punishment for which guilt outweighs what taking the harmful resource gains over the best other."""
    values = config.commons.values
    others = [values[kind] for kind in config.commons.resources if kind != study.harmful]
    gap = values[study.harmful] - max(others, default=0.0)
    outweighs = guilt_outweighs_until(
        max(gap, 0.0),
        internalization_threshold=config.norms.internalization_threshold,
        intrinsic_scale=config.norms.intrinsic_scale,
    )
    return 0.0 if math.isinf(outweighs) else steps_until(strength, outweighs, decay_rate=config.norms.decay_rate)


def summarise(study: StudyConfig, runs: list[Run]) -> list[dict[str, Any]]:
    """A row per condition and measure: mean and 95% t-interval over the seeds that have it, smallest and largest."""
    rows = []
    for condition in study.conditions:
        of_condition = [measures(study, run) for run in runs if run.condition == condition]
        for name in dict.fromkeys(name for found in of_condition for name in found):
            values = np.array([found[name] for found in of_condition if name in found])
            low, high = interval(values)
            row = {
                "condition": condition,
                "measure": name,
                "mean": mean_of_known(values),
                "ci95_low": low,
                "ci95_high": high,
            }
            rows.append(row | {"min": float(values.min()), "max": float(values.max()), "seeds": len(values)})
    return rows


def interval(values: NDArray[np.float64]) -> tuple[float, float]:
    """95% interval of a mean by Student's t; NaN for one value, or where one is not finite."""
    if len(values) < 2 or not np.isfinite(values).all():
        return np.nan, np.nan
    mean = float(values.mean())
    half = float(stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values)))
    return mean - half, mean + half


def mean_of_known(values: NDArray[np.float64]) -> float:
    """Mean of what is there; NaN where nothing is."""
    return float(np.nanmean(values)) if not np.isnan(values).all() else float("nan")
