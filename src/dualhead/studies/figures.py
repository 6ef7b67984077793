"""The figures of a study in any world, and what all figures of studies are drawn with (matplotlib)."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dualhead.running.checkpoint import RunError
from dualhead.running.results import FloatArray, interval
from dualhead.studies.config import StudyConfig
from dualhead.studies.measures import Measured, curves_among

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
NUM_MEANS = 100
"""A line of more than twice as many updates is drawn through means over stretches of it."""


def draw_figures(study: StudyConfig, measured: list[Measured], names: Sequence[str], folder: Path) -> list[Path]:
    """Draws `curves.png`, learning over environment steps, and `final.png`, each seed's number; their paths.

    Args:
        study: its title and conditions.
        measured: the runs.
        names: the study's measures; the first that has a curve and the first of all are drawn.
        folder: where to.

    Raises:
        RunError: a figure cannot be written.
    """
    curve = curves_among(names, [run for run, _ in measured])[0]
    figures = {"curves": _curves(study, measured, curve)}
    if names:
        figures["final"] = _final(study, measured, names[0])
    return save(figures, folder)


def save(figures: Mapping[str, Figure], folder: Path) -> list[Path]:
    """Writes figures by name as PNG files; their paths.

    Raises:
        RunError: one cannot be written.
    """
    paths = []
    for name, figure in figures.items():
        path = folder / f"{name}.png"
        try:
            figure.savefig(path, dpi=150)
        except OSError as error:
            raise RunError(f"cannot write {path}: {error.strerror or error}") from error
        paths.append(path)
    return paths


def _curves(study: StudyConfig, measured: list[Measured], name: str) -> Figure:
    """A pair of axes per environment, a line per condition for the mean over seeds, and a band for their range."""
    figure, panels = _panels(study)
    for env, axes in panels.items():
        for colour, condition in zip(colours(study), study.conditions):
            runs = [run for run, _ in measured if run.config.env == env and run.condition == condition]
            window = max(1, len(runs[0].steps) // (2 * NUM_MEANS))
            band(axes, runs[0].steps, [rolling_mean(run.column(name), window) for run in runs], color=colour)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 500k, 1M
        axes.set_xlabel("environment steps", fontsize=8)
        _say_if_empty(axes, has_content=bool(axes.lines))
    _finish(figure, study, name, "line: mean, band: lowest to highest")
    return figure


def _final(study: StudyConfig, measured: list[Measured], name: str) -> Figure:
    """A pair of axes per environment, for each condition a dot per seed beside the mean and its 95% interval."""
    figure, panels = _panels(study)
    for env, axes in panels.items():
        of_env = [(run, values[name]) for run, values in measured if run.config.env == env and name in values]
        for number, (colour, condition) in enumerate(zip(colours(study), study.conditions)):
            dots(axes, number, np.array([v for run, v in of_env if run.condition == condition]), color=colour)
        axes.set_xlim(-0.6, len(study.conditions) - 0.4)
        axes.set_xticks([])
        _say_if_empty(axes, has_content=bool(of_env))
    _finish(figure, study, name, "dots: seeds, beside them mean and 95% interval")
    return figure


def _panels(study: StudyConfig) -> tuple[Figure, dict[str, Any]]:
    """A figure with a pair of axes for each environment of the study."""
    many = len(study.worlds)
    across = many if many <= 3 else math.ceil(math.sqrt(many))
    down = math.ceil(many / across)
    size = (7.0, 4.2) if many == 1 else (3.3 * across, 0.9 + 2.3 * down)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(down, across, squeeze=False)
    panels = dict(zip(study.worlds, grid.flat))
    for env, axes in panels.items():
        # A title may be as wide as its axes: some 42 characters of this size.
        axes.set_title("\n".join(textwrap.wrap(env, 80 if many == 1 else 42)), fontsize=8, loc="left")
        axes.tick_params(labelsize=8)
    for axes in grid.flat[many:]:
        axes.remove()
    return figure, panels


def _finish(figure: Figure, study: StudyConfig, name: str, note: str) -> None:
    """Title, and a legend of conditions below."""
    many = len(study.seeds)
    seeds = f"{many} seeds ({note})" if many > 1 else "one seed"
    figure.suptitle(f"{study.title}: {name}".removeprefix(": "), fontsize=12)
    entries = [Line2D([], [], color=colour, label=label) for colour, label in zip(colours(study), study.conditions)]
    legend(figure, entries, title=seeds)


def legend(figure: Figure, entries: list[Any], *, title: str) -> None:
    """A legend below all axes, in as many columns as its entries have room for."""
    # A letter takes about a ninth of an inch, and a line with its gaps as much as eight letters.
    fits = sum(len(entry.get_label()) + 8 for entry in entries) < 9 * figure.get_figwidth()
    figure.legend(
        handles=entries,
        title=title,
        title_fontsize=9,
        loc="outside lower center",
        ncols=len(entries) if fits else 3,
        frameon=False,
        fontsize=9,
    )
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)


def _say_if_empty(axes: Any, *, has_content: bool) -> None:
    if not has_content:
        axes.text(0.5, 0.5, "no values", transform=axes.transAxes, ha="center", va="center", color="#888888")


def band(axes: Any, x: NDArray[Any], lines: list[FloatArray], **style: Any) -> None:
    """Mean of lines, and their range as a band, where all of them have a value.

    Args:
        axes: to draw on.
        x: [U] of the longest line.
        lines: one per seed; the mean goes as far as the shortest.
        style: of the mean, with its `color`.
    """
    length = min(map(len, lines))
    values = np.stack([line[:length] for line in lines])
    known = np.flatnonzero(~np.isnan(values).any(axis=0))
    if not len(known):
        return
    x, values = x[known], values[:, known]
    axes.plot(x, values.mean(0), **style)
    axes.fill_between(x, values.min(0), values.max(0), color=style["color"], alpha=0.15, linewidth=0)


def dots(axes: Any, place: float, values: FloatArray, *, color: str) -> None:
    """A dot per seed beside the mean and its 95% interval."""
    if not len(values):
        return
    axes.scatter(np.full(len(values), place - 0.12), values, s=18, color=color, alpha=0.5, linewidths=0)
    low, high = interval(values)
    if not np.isnan(low):
        axes.plot([place + 0.12] * 2, [low, high], color=color, linewidth=2)
    axes.plot(place + 0.12, values.mean(), "o", color=color, markersize=7)


def rolling_mean(values: FloatArray, window: int) -> FloatArray:
    """[U] mean of each value and the `window - 1` before it; NaN where there are not that many or one is missing."""
    if window <= 1:
        return values
    means = np.full(len(values), np.nan)
    if len(values) >= window:
        means[window - 1 :] = np.lib.stride_tricks.sliding_window_view(values, window).mean(1)
    return means


def colours(study: StudyConfig) -> list[str]:
    """One for each condition."""
    return [COLOURS[i % len(COLOURS)] for i in range(len(study.conditions))]
