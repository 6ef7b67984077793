"""Figures of a study, drawn with matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dualhead.config import StudyConfig
from dualhead.running.checkpoint import RunError
from dualhead.running.study import RELAPSE_SHARE, Run, Span, spans

try:
    from matplotlib.figure import Figure
except ModuleNotFoundError as error:
    raise RunError(
        f"tables are written; the figures need the package {error.name}: pip install 'dualhead[plot]', then repeat the "
        f"command (finished runs are not repeated)"
    ) from error

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#999999")
"""Okabe and Ito's palette, which colour-blind people can tell apart."""


def draw_figures(study: StudyConfig, runs: list[Run], folder: Path) -> list[Path]:
    """Draws `overview.png` and `details.png`; their paths."""
    paths = []
    for name, draw in (("overview", _overview), ("details", _details)):
        path = folder / f"{name}.png"
        try:
            draw(study, runs).savefig(path, dpi=150)
        except OSError as error:
            raise RunError(f"cannot write {path}: {error.strerror or error}") from error
        paths.append(path)
    return paths


def _overview(study: StudyConfig, runs: list[Run]) -> Figure:
    """The one question: the share of the harmful resource over time."""
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    _shade(axes, runs, label=True)
    for colour, (condition, of_condition) in zip(_colours(study), _by_condition(study, runs)):
        _line(axes, of_condition, [run.share(study.harmful) for run in of_condition], label=condition, color=colour)
        if of_condition[0].config.turnover.first_turn is not None:
            for group, style in (("newcomers", ":"), ("incumbents", "--")):
                shares = [run.share(study.harmful, group) for run in of_condition]
                _line(axes, of_condition, shares, label=f"{condition}: {group}", color=colour, linestyle=style)
    axes.axhline(RELAPSE_SHARE, color="grey", linewidth=0.5)
    axes.set(xlabel="turn", ylabel=f"share of {study.harmful} among what is taken", ylim=(-0.03, 1.12))
    axes.set_title(f"{study.title}: how often {study.harmful} is taken".lstrip(": "))
    _finish(figure, axes, study)
    return figure


def _details(study: StudyConfig, runs: list[Run]) -> Figure:
    """What lies behind it: level, votes, norm strength, guilt, reward."""
    harmful = study.harmful
    panels = {
        f"share of {harmful} taken": None,
        "punishment level p": "commons/level",
        "votes up less votes down, per agent": None,
        f"strength of the norm against {harmful}": f"norms/strength/{harmful}",
        "guilt per agent and turn": "rollout/guilt",
        "task reward per agent and turn": "rollout/task_reward",
    }
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    grid = figure.subplots(3, 2, sharex=True)
    for axes, (title, column) in zip(grid.flat, panels.items()):
        _shade(axes, runs, label=False)
        for colour, (condition, of_condition) in zip(_colours(study), _by_condition(study, runs)):
            if column is not None:
                lines = [run.columns.get(column, np.full(len(run.turns), np.nan)) for run in of_condition]
            elif title.startswith("share"):
                lines = [run.share(harmful) for run in of_condition]
            else:
                lines = [run.columns["commons/votes/up"] - run.columns["commons/votes/down"] for run in of_condition]
            if not all(np.isnan(line).all() for line in lines):
                _line(axes, of_condition, lines, label=condition, color=colour)
        axes.set_title(title, fontsize=10, loc="left")
    for axes in grid[-1]:
        axes.set_xlabel("turn")
    _finish(figure, grid[0, 0], study)
    return figure


def _line(axes: Any, runs: list[Run], lines: list[NDArray[np.float64]], **style: Any) -> None:
    """Mean over seeds and their range; a single seed as a line."""
    length = min(map(len, lines))
    values = np.stack([line[:length] for line in lines])
    turns = runs[0].turns[:length]
    known = ~np.isnan(values).any(0)
    if not known.any():
        return
    mean = np.where(known, values.mean(0), np.nan)
    axes.plot(turns, mean, **style)
    axes.fill_between(turns, values.min(0), values.max(0), where=known, color=style["color"], alpha=0.15, linewidth=0)


def _shade(axes: Any, runs: list[Run], *, label: bool) -> None:
    """Phases with punishment are grey."""
    for span in spans(runs[0].config):
        if span.punishes:
            axes.axvspan(span.begin, span.end, color="#888888", alpha=0.12, linewidth=0)
        if label:
            _name(axes, span)


def _name(axes: Any, span: Span) -> None:
    axes.text((span.begin + span.end) / 2, 1.06, span.name, ha="center", va="center", fontsize=9, color="#444444")


def _finish(figure: Figure, axes: Any, study: StudyConfig) -> None:
    handles, labels = axes.get_legend_handles_labels()
    many = len(study.seeds)
    note = f"mean and range of {many} seeds, shaded: punishment" if many > 1 else "one seed, shaded: punishment"
    figure.legend(
        handles,
        labels,
        title=note,
        title_fontsize=9,
        loc="outside lower center",
        ncols=min(4, len(labels)),
        frameon=False,
        fontsize=9,
    )
    for each in figure.axes:
        each.spines[["top", "right"]].set_visible(False)


def _colours(study: StudyConfig) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(len(study.conditions))]


def _by_condition(study: StudyConfig, runs: list[Run]) -> list[tuple[str, list[Run]]]:
    return [(name, [run for run in runs if run.condition == name]) for name in study.conditions]
