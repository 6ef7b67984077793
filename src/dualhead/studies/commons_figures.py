"""The figures of a study of the commons."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dualhead.running.results import FloatArray, Run
from dualhead.studies.commons_measures import (
    GROUPS,
    RELAPSE_SHARE,
    Span,
    closed_form_turn,
    phases_repeat,
    rules,
    second_half,
    share,
    spans,
)
from dualhead.studies.config import StudyConfig
from dualhead.studies.figures import NUM_MEANS, Figure, Line2D, band, colours, dots, legend, rolling_mean, save
from dualhead.studies.measures import mean_of_known

STYLES: dict[str, Any] = {"newcomers": ":", "incumbents": "--"}


class _Panel(NamedTuple):
    """What one pair of axes shows of a run.

    Fields:
        title: in words, with its unit.
        group: also a line for newcomers and incumbents, of metrics with this prefix in place of `commons` or `norms`.
    """

    title: str
    values: Any
    groups: Any = None
    limits: tuple[float, float] | None = None


def draw_figures(study: StudyConfig, runs: list[Run], folder: Path) -> list[Path]:
    """Draws `overview.png`, the study's question, and `details.png`, what lies behind it; their paths."""
    return save({"overview": _overview(study, runs), "details": _details(study, runs)}, folder)


def _overview(study: StudyConfig, runs: list[Run]) -> Figure:
    """The share of the harmful resource over time, or the reward if the phases repeat.

    If there is one phase, or the phases repeat, the late means of single seeds say more than curves: they are drawn
    beside them.
    """
    taken, reward = _panels(study)[0], _panels(study)[-1]
    panel = reward if phases_repeat(runs) else taken
    beside = phases_repeat(runs) or len(spans(runs[0].config)) == 1
    figure = Figure(figsize=(10, 4.8) if beside else (9, 5), layout="constrained")
    grid = figure.subplots(1, 2 if beside else 1, squeeze=False, sharey=True, width_ratios=[3, 2] if beside else None)
    axes = grid[0, 0]
    _draw(axes, study, runs, panel)
    _name_phases(axes, runs)
    entries = _entries(study, runs)
    if panel is taken:
        axes.axhline(RELAPSE_SHARE, color="#888888", linewidth=0.6, zorder=0)
        entries += _mark_closed_form(axes, study, runs)
    axes.set(xlabel="turn", ylabel=panel.title)
    if beside:
        _dots(grid[0, 1], study, runs, panel)
    subject = f"how often {study.harmful} is taken" if panel is taken else "what is earned"
    figure.suptitle(f"{study.title}: {subject}".removeprefix(": "), fontsize=13)
    _finish(figure, study, runs, entries, smoothed=_window(runs) > 1)
    return figure


def _details(study: StudyConfig, runs: list[Run]) -> Figure:
    """The details: level, votes, norm strength, guilt, reward. What is constant is left out."""
    panels = [panel for panel in _panels(study) if _has_content(panel, runs)]
    if all(phase.mode != "voted" for run in runs for phase in rules(run.config).phases):
        panels = [panel for panel in panels if not panel.title.startswith("votes")]  # they do nothing
    panels = panels or _panels(study)[:1]
    rows = math.ceil(len(panels) / 2)
    figure = Figure(figsize=(11, 1 + 2.6 * rows), layout="constrained")
    grid = figure.subplots(rows, 2, squeeze=False)
    for axes, panel in zip(grid.flat, panels):
        _draw(axes, study, runs, panel)
        axes.set_title(panel.title, fontsize=10, loc="left")
        axes.set_xlabel("turn")
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    if study.title:
        figure.suptitle(study.title, fontsize=13)
    _finish(figure, study, runs, _entries(study, runs), smoothed=_window(runs) > 1)
    return figure


def _panels(study: StudyConfig) -> list[_Panel]:
    harmful = study.harmful

    def strength(run: Run, group: str) -> FloatArray:
        return run.column(f"{group}/strength/{harmful}")

    return [
        _Panel(
            f"share of {harmful} among what is taken",
            lambda run: share(run, harmful),
            lambda run, group: share(run, harmful, group),
            (-0.03, 1.03),
        ),
        _Panel("punishment level p", lambda run: run.column("commons/level"), None, (-0.03, 1.03)),
        _Panel(
            "votes up less votes down, per agent and turn",
            lambda run: run.column("commons/votes/up") - run.column("commons/votes/down"),
        ),
        _Panel(
            f"strength of the norm against {harmful}", lambda run: run.column(f"norms/strength/{harmful}"), strength
        ),
        _Panel("guilt per agent and turn", lambda run: run.column("rollout/guilt")),
        _Panel("task reward per agent and turn", lambda run: run.column("rollout/task_reward")),
    ]


def _has_content(panel: _Panel, runs: list[Run]) -> bool:
    """Whether it shows more than one number. A level that never changes, for example, is no content."""
    values = np.concatenate([rolling_mean(panel.values(run), _window(runs)) for run in runs])
    values = values[~np.isnan(values)]
    return len(values) > 0 and bool(np.ptp(values) > 1e-9)


def _draw(axes: Any, study: StudyConfig, runs: list[Run], panel: _Panel) -> None:
    """Phases and, for each condition, a line for the mean over seeds and a band for their range."""
    for span in _common_spans(runs):
        if span.punishes:
            axes.axvspan(span.begin, span.end, color="#888888", alpha=0.13, linewidth=0)
    for colour, of_condition in zip(colours(study), _by_condition(study, runs)):
        _line(axes, of_condition, [panel.values(run) for run in of_condition], color=colour)
        if panel.groups is not None and _has_newcomers(of_condition):
            for group in GROUPS:
                lines = [np.where(_newcomers_are_there(run), panel.groups(run, group), np.nan) for run in of_condition]
                _line(axes, of_condition, lines, color=colour, linestyle=STYLES[group])
    if panel.limits is not None:
        axes.set_ylim(panel.limits)
    axes.set_xlim(0, max(run.turns[-1] for run in runs))


def _line(axes: Any, runs: list[Run], lines: list[FloatArray], **style: Any) -> None:
    band(axes, runs[0].turns, [rolling_mean(line, _window(runs)) for line in lines], **style)


def _window(runs: list[Run]) -> int:
    """Updates over which lines are smoothed: whole rounds of phases that repeat, and few enough points to be seen."""
    config = runs[0].config
    window = max(1, len(runs[0].turns) // (2 * NUM_MEANS))
    if phases_repeat(runs):
        period = sum(phase.num_turns or 0 for phase in rules(config).phases)
        whole = math.lcm(period, config.ppo.rollout_length) // config.ppo.rollout_length
        window = math.ceil(window / whole) * whole
    return min(window, max(1, len(runs[0].turns) // 4))


def _dots(axes: Any, study: StudyConfig, runs: list[Run], panel: _Panel) -> None:
    """A dot per seed, of the second half of the run, beside the mean and its 95% interval."""
    for number, (colour, of_condition) in enumerate(zip(colours(study), _by_condition(study, runs))):
        values = np.array([mean_of_known(panel.values(run)[second_half(run)]) for run in of_condition])
        dots(axes, number, values, color=colour)
    names = list(study.conditions)
    axes.set_xticks(range(len(names)), names, rotation=30 if sum(map(len, names)) > 40 else 0)
    axes.set_xlim(-0.6, len(names) - 0.4)
    axes.set_title("second half of each run: seeds, mean, 95% interval", fontsize=10)


def _name_phases(axes: Any, runs: list[Run]) -> None:
    """Names of the phases above the axes, if there is room."""
    total = max(run.turns[-1] for run in runs)
    common = _common_spans(runs)
    for span in common:
        level = span.level if rules(runs[0].config).num_levels > 1 else None
        name = span.name if level is None else f"{span.name} at level {level}"
        room = (span.end - span.begin) / total
        if len(common) > 1 and room > 0.012 * len(name):
            axes.annotate(
                name,
                ((span.begin + span.end) / 2, 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(0, 5),
                textcoords="offset points",
                ha="center",
                color="#444444",
            )


def _mark_closed_form(axes: Any, study: StudyConfig, runs: list[Run]) -> list[Any]:
    """For each condition marks the turn after which guilt no longer outweighs the gain, by the closed form."""
    found = False
    for colour, of_condition in zip(colours(study), _by_condition(study, runs)):
        turns = [turn for turn in (closed_form_turn(study, run) for run in of_condition) if turn is not None]
        if len(turns) == len(of_condition) and max(turns) <= axes.get_xlim()[1]:
            turn = float(np.mean(turns))
            axes.axvline(turn, ymax=0.97, color=colour, linewidth=0.8)
            axes.plot(turn, 0.97, "v", color=colour, markersize=8, transform=axes.get_xaxis_transform())
            found = True
    label = "until here guilt outweighs the gain (closed form)"
    return [Line2D([], [], color="#444444", marker="v", linewidth=0.8, label=label)] if found else []


def _entries(study: StudyConfig, runs: list[Run]) -> list[Any]:
    """Legend: a colour per condition, a style per group."""
    entries = [Line2D([], [], color=colour, label=name) for colour, name in zip(colours(study), study.conditions)]
    if _has_newcomers(runs):
        entries += [Line2D([], [], color="#444444", linestyle=STYLES[group], label=f"{group} only") for group in GROUPS]
    return entries


def _finish(figure: Figure, study: StudyConfig, runs: list[Run], entries: list[Any], *, smoothed: bool) -> None:
    seeds = len(study.seeds)
    note = f"mean and range of {seeds} seeds" if seeds > 1 else "one seed"
    if smoothed:
        config = runs[0].config
        note += f", rolling means over {_window(runs) * config.ppo.rollout_length} turns"
    if len(_common_spans(runs)) > 1 and any(span.punishes for span in _common_spans(runs)):
        note += "; grey: with punishment"
    legend(figure, entries, title=note)


def _common_spans(runs: list[Run]) -> list[Span]:
    """The phases that all runs have in common; none where they differ or repeat."""
    found = spans(runs[0].config)
    same = all(spans(run.config) == found for run in runs)
    return found if same and not phases_repeat(runs) else []


def _has_newcomers(runs: list[Run]) -> bool:
    return any(_newcomers_are_there(run).any() for run in runs)


def _newcomers_are_there(run: Run) -> NDArray[np.bool_]:
    """[U]"""
    kind = rules(run.config).resources[0]
    return ~np.isnan(run.column(f"newcomers/taken/{kind}"))


def _by_condition(study: StudyConfig, runs: list[Run]) -> list[list[Run]]:
    return [[run for run in runs if run.condition == name] for name in study.conditions]
