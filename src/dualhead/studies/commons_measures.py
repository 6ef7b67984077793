"""Measures of a study of the commons alone: shares, rewards and relapses by phase."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dualhead.norms import guilt_outweighs_until, steps_until
from dualhead.running.config import RunConfig
from dualhead.running.results import FloatArray, Run
from dualhead.studies.config import StudyConfig
from dualhead.studies.measures import mean_of_known
from dualhead.studies.tables import print_table, say, seeds_in_words, with_interval
from dualhead.worlds.commons.config import CommonsConfig

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


def rules(config: RunConfig) -> CommonsConfig:
    """The commons' own settings in those of a run."""
    assert isinstance(config.world, CommonsConfig)
    return config.world


def share(run: Run, harmful: str, prefix: str = "commons") -> FloatArray:
    """[U] share of the harmful resource among all that were taken; NaN where nothing was (or nobody was there)."""
    taken = np.stack([run.column(f"{prefix}/taken/{kind}") for kind in rules(run.config).resources])
    ours = run.column(f"{prefix}/taken/{harmful}")
    with np.errstate(invalid="ignore", divide="ignore"):
        return ours / taken.sum(0)


def spans(config: RunConfig) -> list[Span]:
    """The phases of a run in turns; phases that repeat are one."""
    total = math.ceil(config.total_steps / config.num_streams)
    phases = rules(config).phases
    if rules(config).repeat_phases:
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
        of_groups = {group: share(run, study.harmful, group)[late] for group in GROUPS}
        found[f"{study.harmful} share{in_phase}"] = mean_of_known(share(run, study.harmful)[late])
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
    groups = {"": share(run, study.harmful)} | {f", {group}": share(run, study.harmful, group) for group in GROUPS}
    if np.isnan(groups[", newcomers"][after]).all():
        groups = {"": groups[""]}
    for group, shares in groups.items():
        if np.isnan(shares[after]).all():
            continue
        relapsed = run.turns[after & (shares > RELAPSE_SHARE)]
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
    return any(rules(run.config).repeat_phases for run in runs)


def closed_form(study: StudyConfig, config: RunConfig, strength: float) -> float:
    """Turns without punishment for which guilt outweighs what taking the harmful resource gains over the best other."""
    values = rules(config).values
    others = [values[kind] for kind in rules(config).resources if kind != study.harmful]
    gap = values[study.harmful] - max(others, default=0.0)
    outweighs = guilt_outweighs_until(
        max(gap, 0.0),
        internalization_threshold=config.norms.internalization_threshold,
        intrinsic_scale=config.norms.intrinsic_scale,
    )
    return 0.0 if math.isinf(outweighs) else steps_until(strength, outweighs, decay_rate=config.norms.decay_rate)


def results(study: StudyConfig, runs: list[Run]) -> tuple[list[dict[str, Any]], list[str]]:
    """Every update of every run, as rows of a tidy table; and the table's columns."""
    rows: list[dict[str, Any]] = []
    names: dict[str, None] = {}
    for run in runs:
        shares = {
            f"{prefix}/share/{study.harmful}": share(run, study.harmful, prefix) for prefix in ("commons", *GROUPS)
        }
        columns = {
            name: column for name, column in (shares | run.metrics.columns).items() if not np.isnan(column).all()
        }
        names |= dict.fromkeys(columns)
        phases = spans(run.config)
        for i, turn in enumerate(run.turns.tolist()):
            # Of a rollout in which the phase changes: the one that it ends in.
            phase = next((span.name for span in phases if span.begin < turn <= span.end), "")
            row: dict[str, Any] = {"condition": run.condition, "seed": run.config.seed}
            row |= {"steps": turn * run.config.num_streams, "turn": turn, "phase": phase}
            rows.append(row | {name: column[i] for name, column in columns.items() if not np.isnan(column[i])})
    return rows, ["condition", "seed", "steps", "turn", "phase", *names]


def print_summary(study: StudyConfig, rows: list[dict[str, Any]]) -> None:
    """The summary as a table: measures down, conditions across."""
    text = (
        f"Shares (of all that is taken) and rewards (per agent and turn): second half of a phase; "
        f"{seeds_in_words(study)}."
    )
    if any(row["measure"].startswith("turns to relapse") for row in rows):
        text += (
            f" Relapse: turns without punishment until more than half of what is taken is {study.harmful}."
            f" Closed form: turns for which guilt outweighs what {study.harmful} gains; then relapse must be learned."
        )
    counts = Counter(row["condition"] for row in rows)  # the fullest condition has the order of all
    names = dict.fromkeys(row["measure"] for row in sorted(rows, key=lambda row: -counts[row["condition"]]))
    cells = {(row["measure"], row["condition"]): _cell(row) for row in rows}
    print_table(names, study.conditions, cells, title=study.title)
    say(text)


def _cell(row: dict[str, Any]) -> str:
    """A mean and half of its interval; turns are whole, and what no seed saw is `never`."""
    if np.isinf(row["max"]):
        return "never" if np.isinf(row["min"]) else f"{row['min']:.0f} to never"
    return with_interval(row, digits=0 if row["measure"].startswith("turns") else 2)
