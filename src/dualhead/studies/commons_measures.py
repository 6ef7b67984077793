"""Measures of a study of the commons: shares, rewards and relapses by phase."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dualhead.norms import guilt_outweighs_until, steps_until
from dualhead.running.config import RunConfig
from dualhead.running.results import FloatArray, Run
from dualhead.studies.config import StudyConfig
from dualhead.studies.measures import Measured, mean_of_known
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


class Fading(NamedTuple):
    """A norm at the end of punishment.

    Fields:
        turn: punishment ends after this turn.
        strength: of the norm against the harmful resource then; a mean over streams.
        lasts: turns without punishment for which guilt outweighs the gain, by the closed form.
    """

    turn: int
    strength: float
    lasts: float


def rules(config: RunConfig) -> CommonsConfig:
    """The commons' own settings in those of a run."""
    assert isinstance(config.world, CommonsConfig)
    return config.world


def share(run: Run, harmful: str, prefix: str = "commons") -> FloatArray:
    """[U] share of the harmful resource among all that were taken; NaN where nothing was taken."""
    taken = np.stack([run.column(f"{prefix}/taken/{kind}") for kind in rules(run.config).resources])
    with np.errstate(invalid="ignore", divide="ignore"):
        return run.column(f"{prefix}/taken/{harmful}") / taken.sum(0)


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


def measure_commons(study: StudyConfig, run: Run) -> Measured:
    """A run with the numbers that the summary of a study of the commons is made of.

    Shares of the harmful resource and rewards are means over the second half of a phase, after most of the learning
    that the phase causes.
    """
    found: dict[str, float] = {}
    phases = spans(run.config)
    for span in phases:
        late = second_half(run, span)
        in_phase = f", {span.name}" if len(phases) > 1 else ""
        of_groups = {group: mean_of_known(share(run, study.harmful, group)[late]) for group in GROUPS}
        found[f"{study.harmful} share{in_phase}"] = mean_of_known(share(run, study.harmful)[late])
        if not math.isnan(of_groups["newcomers"]):
            found |= {f"{study.harmful} share of {group}{in_phase}": mean for group, mean in of_groups.items()}
        found[f"reward{in_phase}"] = mean_of_known(run.column("rollout/task_reward")[late])
    found |= _relapse(study, run)
    return Measured(run, {name: value for name, value in found.items() if not math.isnan(value)})


def second_half(run: Run, span: Span | None = None) -> NDArray[np.bool_]:
    """[U] updates that end in the second half of a phase, or of the run."""
    begin, end = (0, int(run.turns[-1])) if span is None else (span.begin, span.end)
    return (run.turns > (begin + end) / 2) & (run.turns <= end)


def _end_of_punishment(config: RunConfig) -> int | None:
    """Turns before the first phase without punishment that follows one with it; None where there is none."""
    return next((b.begin for a, b in itertools.pairwise(spans(config)) if a.punishes and not b.punishes), None)


def _relapse(study: StudyConfig, run: Run) -> dict[str, float]:
    """How long compliance outlived punishment, beside the closed form.

    Counted from the end of punishment to the end of the first unpunished rollout in which most of what was taken is
    harmful; infinite if the run has no such rollout.
    """
    stop = _end_of_punishment(run.config)
    after = run.turns - run.config.ppo.rollout_length >= (math.inf if stop is None else stop)
    if stop is None or not after.any():
        return {}
    found = {}
    of_groups = {f", {group}": share(run, study.harmful, group) for group in GROUPS}
    if np.isnan(of_groups[", newcomers"][after]).all():
        of_groups = {}
    for group, shares in {"": share(run, study.harmful), **of_groups}.items():
        if not np.isnan(shares[after]).all():
            relapsed = run.turns[after & (shares > RELAPSE_SHARE)]
            found[f"turns to relapse{group}"] = float(relapsed[0] - stop) if len(relapsed) else math.inf
    norm = fading(study, run)
    if norm is not None:
        found |= {"turns by the closed form": norm.lasts, "norm strength at the end of punishment": norm.strength}
    return found


def fading(study: StudyConfig, run: Run) -> Fading | None:
    """The norm at the last update before punishment ends; None if it never ends, or strengths were not logged."""
    stop = _end_of_punishment(run.config)
    strengths = run.column(f"norms/strength/{study.harmful}")[run.turns <= (stop or 0)]
    if stop is None or not len(strengths) or np.isnan(strengths[-1]):
        return None
    strength = float(strengths[-1])
    return Fading(stop, strength, closed_form(study, run.config, strength))


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
