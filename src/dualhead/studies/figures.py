"""The figures of a study (matplotlib)."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dualhead.running.checkpoint import RunError
from dualhead.running.results import FloatArray, Run, interval
from dualhead.studies.commons_measures import (
    RELAPSE_SHARE,
    Span,
    fading,
    phases_repeat,
    rules,
    second_half,
    share,
    spans,
)
from dualhead.studies.config import StudyConfig
from dualhead.studies.measures import Measured, curves_among, mean_of_known

try:
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import EngFormatter
except ModuleNotFoundError as error:
    raise RunError(
        f"the tables are written; the figures need the package {error.name}: pip install -e '.[plot]' in the checkout, "
        f"then repeat the command (finished runs are not repeated)"
    ) from error

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#999999")
"""Okabe and Ito's palette, which colour-blind people can tell apart."""
STYLES: dict[str, Any] = {"newcomers": ":", "incumbents": "--"}
GREY, DARK_GREY = "#888888", "#444444"
NUM_MEANS = 100
"""A line of more than twice as many updates is drawn through means over stretches of it."""


class Panel(NamedTuple):
    """What one pair of axes shows, as a line per condition.

    Fields:
        title: in words, with its unit.
        values: of a run and "", or of its `newcomers` or `incumbents`, [U].
        has_groups: whether newcomers and incumbents have lines of their own as well.
        limits: of the vertical axis.
    """

    title: str
    values: Callable[[Run, str], FloatArray]
    has_groups: bool = False
    limits: tuple[float, float] | None = None


def draw_figures(study: StudyConfig, measured: list[Measured], names: Sequence[str], folder: Path) -> list[Path]:
    """Draws two figures, and returns their paths.

    `curves.png` has learning over environment steps (of the first of the measures `names` that changes during a run),
    `final.png` each seed's number (of the first measure). A study of the commons has `overview.png`, its question, and
    `details.png`, what explains the answer.

    Raises:
        RunError: a figure cannot be written.
    """
    runs = [run for run, _ in measured]
    if study.is_of_the_commons:
        figures = {"overview": overview(study, runs), "details": details(study, runs)}
    else:
        figures = {"curves": curves(study, runs, curves_among(names, runs)[0])}
        if names:
            figures["final"] = final(study, measured, names[0])
    paths = {folder / f"{name}.png": figure for name, figure in figures.items()}
    for path, figure in paths.items():
        try:
            figure.savefig(path, dpi=150)
        except OSError as error:
            raise RunError(f"cannot write {path}: {error.strerror or error}") from error
    return list(paths)


def curves(study: StudyConfig, runs: list[Run], name: str) -> Figure:
    """A pair of axes per environment, a line per condition for the mean over seeds, and a band for their range."""

    def draw(env: str, axes: Any) -> None:
        _draw(axes, study, [run for run in runs if run.config.env == env], Panel(name, lambda run, _: run.column(name)))
        axes.set_xlim(left=0)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 500k, 1M
        axes.set_xlabel("environment steps", fontsize=8)

    figure = _figure_of_environments(study, draw)
    return _finish(figure, study, runs, name)


def final(study: StudyConfig, measured: list[Measured], name: str) -> Figure:
    """A pair of axes per environment, for each condition a dot per seed beside the mean and its 95% interval."""

    def draw(env: str, axes: Any) -> None:
        of_env = [run for run in measured if run.run.config.env == env and name in run.values]
        _dots(axes, study, [(run.condition, values[name]) for run, values in of_env])
        axes.set_xticks([])

    figure = _figure_of_environments(study, draw)
    return _finish(figure, study, [], name, seeds="{} seeds, beside them mean and 95% interval")


def _figure_of_environments(study: StudyConfig, draw: Callable[[str, Any], None]) -> Figure:
    many = len(study.worlds)
    across = many if many <= 3 else math.ceil(math.sqrt(many))
    size = (7.0, 4.2) if many == 1 else (3.3 * across, 0.9 + 2.3 * math.ceil(many / across))
    figure, grid = _grid(many, across, size)
    for env, axes in zip(study.worlds, grid):
        # A title may be as wide as its axes: some 42 characters of this size.
        axes.set_title("\n".join(textwrap.wrap(env, 80 if many == 1 else 42)), fontsize=8, loc="left")
        axes.tick_params(labelsize=8)
        draw(env, axes)
        if not axes.has_data():
            axes.text(0.5, 0.5, "no values", transform=axes.transAxes, ha="center", va="center", color=GREY)
    return figure


def overview(study: StudyConfig, runs: list[Run]) -> Figure:
    """The share of the harmful resource over time, or the reward if the phases repeat.

    If there is one phase, or the phases repeat, the late means of single seeds say more than curves: they are drawn
    beside them.
    """
    repeat = phases_repeat(runs)
    panel = _panels(study)[-1 if repeat else 0]
    beside = repeat or len(spans(runs[0].config)) == 1
    figure = Figure(figsize=(10, 4.8) if beside else (9, 5), layout="constrained")
    grid = figure.subplots(1, 2 if beside else 1, squeeze=False, sharey=True, width_ratios=[3, 2] if beside else None)
    axes = grid[0, 0]
    _draw(axes, study, runs, panel)
    common = _common_spans(runs)
    for span in common if len(common) > 1 else []:
        has_level = span.level is not None and rules(runs[0].config).num_levels > 1
        name = f"{span.name} at level {span.level}" if has_level else span.name
        if (span.end - span.begin) / axes.get_xlim()[1] > 0.012 * len(name):  # there is room
            place = (span.begin + span.end) / 2
            axes.text(place, 1.01, name, ha="center", color=DARK_GREY, transform=axes.get_xaxis_transform())
    marks = []
    if not repeat:
        axes.axhline(RELAPSE_SHARE, color=GREY, linewidth=0.6, zorder=0)
        marks = _mark_closed_form(axes, study, runs)
    axes.set(xlabel="turn", ylabel=panel.title)
    if beside:
        late = [(run.condition, mean_of_known(panel.values(run, "")[second_half(run)])) for run in runs]
        _dots(grid[0, 1], study, late)
        names = list(study.conditions)
        grid[0, 1].set_xticks(range(len(names)), names, rotation=30 if sum(map(len, names)) > 40 else 0)
        grid[0, 1].set_title("second half of each run: seeds, mean, 95% interval", fontsize=10)
    subject = "what is earned" if repeat else f"how often {study.harmful} is taken"
    return _finish(figure, study, runs, subject, marks=marks)


def details(study: StudyConfig, runs: list[Run]) -> Figure:
    """What explains the overview: level, votes, norm strength, guilt, reward. What is constant is left out."""
    votes_count = any(phase.mode == "voted" for run in runs for phase in rules(run.config).phases)
    panels = []
    for panel in _panels(study):
        values = np.concatenate([rolling_mean(panel.values(run, ""), _window(study, runs)) for run in runs])
        values = values[~np.isnan(values)]
        if len(values) and np.ptp(values) > 1e-9 and (votes_count or not panel.title.startswith("votes")):
            panels.append(panel)
    panels = panels or _panels(study)[:1]
    figure, grid = _grid(len(panels), 2, (11, 1 + 2.6 * math.ceil(len(panels) / 2)))
    for axes, panel in zip(grid, panels):
        _draw(axes, study, runs, panel)
        axes.set_title(panel.title, fontsize=10, loc="left")
        axes.set_xlabel("turn")
    return _finish(figure, study, runs)


def _panels(study: StudyConfig) -> list[Panel]:
    def column(name: str) -> Callable[[Run, str], FloatArray]:
        return lambda run, _: run.column(name)

    harmful = study.harmful
    shares = Panel(
        f"share of {harmful} among what is taken",
        lambda run, group: share(run, harmful, group or "commons"),
        has_groups=True,
        limits=(-0.03, 1.03),
    )
    strengths = Panel(
        f"strength of the norm against {harmful}",
        lambda run, group: run.column(f"{group or 'norms'}/strength/{harmful}"),
        has_groups=True,
    )
    votes = Panel(
        "votes up less votes down, per agent and turn",
        lambda run, _: run.column("commons/votes/up") - run.column("commons/votes/down"),
    )
    level = Panel("punishment level p", column("commons/level"), limits=(-0.03, 1.03))
    guilt = Panel("guilt per agent and turn", column("rollout/guilt"))
    reward = Panel("task reward per agent and turn", column("rollout/task_reward"))
    return [shares, level, votes, strengths, guilt, reward]


def _draw(axes: Any, study: StudyConfig, runs: list[Run], panel: Panel) -> None:
    """Phases and, for each condition, a line for the mean over seeds and a band for their range."""
    commons = study.is_of_the_commons
    for span in _common_spans(runs) if commons else []:
        if span.punishes:
            axes.axvspan(span.begin, span.end, color=GREY, alpha=0.13, linewidth=0)
    for condition, colour in _colours(study).items():
        of_condition = [run for run in runs if run.condition == condition]
        x = of_condition[0].turns if commons else of_condition[0].steps
        groups = STYLES if panel.has_groups and any(_newcomers(run).any() for run in of_condition) else {}
        for group, style in {"": "-", **groups}.items():
            lines = [panel.values(run, group) for run in of_condition]
            if group:
                lines = [np.where(_newcomers(run), line, np.nan) for run, line in zip(of_condition, lines)]
            lines = [rolling_mean(line, _window(study, of_condition)) for line in lines]
            _band(axes, x, lines, color=colour, linestyle=style)
    if commons:
        axes.set_xlim(0, max(run.turns[-1] for run in runs))
    if panel.limits is not None:
        axes.set_ylim(panel.limits)


def _window(study: StudyConfig, runs: list[Run]) -> int:
    """Updates over which lines are smoothed: whole rounds of phases that repeat, and few enough points to be seen."""
    run = runs[0]
    window = max(1, len(run.steps) // (2 * NUM_MEANS))
    if study.is_of_the_commons and phases_repeat(runs):
        period = sum(phase.num_turns or 0 for phase in rules(run.config).phases)
        whole = math.lcm(period, run.config.ppo.rollout_length) // run.config.ppo.rollout_length
        window = math.ceil(window / whole) * whole
    return min(window, max(1, len(run.steps) // 4))


def _mark_closed_form(axes: Any, study: StudyConfig, runs: list[Run]) -> list[Line2D]:
    """For each condition marks the turn after which guilt no longer outweighs the gain; entries for the legend."""
    found = False
    for condition, colour in _colours(study).items():
        of_condition = [run for run in runs if run.condition == condition]
        norms = [norm for norm in (fading(study, run) for run in of_condition) if norm is not None and norm.lasts > 0]
        turns = [norm.turn + norm.lasts for norm in norms]
        if len(turns) == len(of_condition) and max(turns) <= axes.get_xlim()[1]:
            turn = float(np.mean(turns))
            axes.axvline(turn, ymax=0.97, color=colour, linewidth=0.8)
            axes.plot(turn, 0.97, "v", color=colour, markersize=8, transform=axes.get_xaxis_transform())
            found = True
    label = "until here guilt outweighs the gain (closed form)"
    return [Line2D([], [], color=DARK_GREY, marker="v", linewidth=0.8, label=label)] if found else []


def _common_spans(runs: list[Run]) -> list[Span]:
    """The phases that all runs have in common; none where they differ or repeat."""
    found = spans(runs[0].config)
    same = all(spans(run.config) == found for run in runs)
    return found if same and not phases_repeat(runs) else []


def _newcomers(run: Run) -> Any:
    """[U] whether there were newcomers."""
    return ~np.isnan(run.column(f"newcomers/taken/{rules(run.config).resources[0]}"))


def _colours(study: StudyConfig) -> dict[str, str]:
    return {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(study.conditions)}


def _grid(many: int, across: int, size: tuple[float, float]) -> tuple[Figure, list[Any]]:
    """A figure with `many` pairs of axes, row by row."""
    figure = Figure(figsize=size, layout="constrained")
    grid = list(figure.subplots(math.ceil(many / across), across, squeeze=False).flat)
    for axes in grid[many:]:
        axes.remove()
    return figure, grid[:many]


def _finish(
    figure: Figure,
    study: StudyConfig,
    runs: list[Run],
    subject: str = "",
    *,
    seeds: str = "mean and range of {} seeds",
    marks: Sequence[Line2D] = (),
) -> Figure:
    """Adds the title, and below all axes a legend in as many columns as its entries have room for."""
    figure.suptitle(": ".join(filter(None, (study.title, subject))), fontsize=12)
    entries = [Line2D([], [], color=colour, label=name) for name, colour in _colours(study).items()]
    title = seeds.format(len(study.seeds)) if len(study.seeds) > 1 else "one seed"
    if study.is_of_the_commons:
        if any(_newcomers(run).any() for run in runs):
            entries += [Line2D([], [], color=DARK_GREY, linestyle=STYLES[of], label=f"{of} only") for of in STYLES]
        window = _window(study, runs)
        if window > 1:
            title += f", rolling means over {window * runs[0].config.ppo.rollout_length} turns"
        common = _common_spans(runs)
        if len(common) > 1 and any(span.punishes for span in common):
            title += "; grey: with punishment"
    entries += marks
    # A letter takes about a ninth of an inch, and a line with its gaps as much as eight letters.
    fits = sum(len(str(entry.get_label())) + 8 for entry in entries) < 9 * figure.get_figwidth()
    place: Any = {"loc": "outside lower center", "ncols": len(entries) if fits else 3}
    figure.legend(handles=entries, title=title, fontsize=9, title_fontsize=9, frameon=False, **place)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _band(axes: Any, x: Any, lines: list[FloatArray], *, color: str, **style: Any) -> None:
    """Mean of lines, one per seed, and their range as a band, as far as all of them have a value."""
    length = min(map(len, lines))
    values = np.stack([line[:length] for line in lines])
    known = np.flatnonzero(~np.isnan(values).any(axis=0))
    if len(known):
        x, values = x[known], values[:, known]
        axes.plot(x, values.mean(0), color=color, **style)
        axes.fill_between(x, values.min(0), values.max(0), color=color, alpha=0.15, linewidth=0)


def _dots(axes: Any, study: StudyConfig, values_of: list[tuple[str, float]]) -> None:
    """For each condition a dot per run of that condition and value, beside the mean and its 95% interval."""
    for place, (condition, colour) in enumerate(_colours(study).items()):
        values = np.array([value for of_condition, value in values_of if of_condition == condition])
        if len(values):
            axes.scatter(np.full(len(values), place - 0.12), values, s=18, color=colour, alpha=0.5, linewidths=0)
            low, high = interval(values)
            if not np.isnan(low):
                axes.plot([place + 0.12] * 2, [low, high], color=colour, linewidth=2)
            axes.plot(place + 0.12, values.mean(), "o", color=colour, markersize=7)
    axes.set_xlim(-0.6, len(study.conditions) - 0.4)


def rolling_mean(values: FloatArray, window: int) -> FloatArray:
    """[U] mean of each value and the `window - 1` before it; NaN where there are not that many or one is missing."""
    if window <= 1:
        return values
    means = np.full(len(values), np.nan)
    if len(values) >= window:
        means[window - 1 :] = np.lib.stride_tricks.sliding_window_view(values, window).mean(1)
    return means
