"""Figures of a report: which metrics are drawn together, in which words, and as which lines."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dualhead.running.results import FloatArray, Run

MAX_POINTS = 1000
NUM_MEANS = 100
"""Means over stretches that a line of more than twice as many points is drawn through."""
NUM_COLORS = 6
DASHES = ("solid", "dash", "dot")


class Curve(NamedTuple):
    """One metric of one run.

    Fields:
        steps: [P] environment steps, rising.
        values: [P], NaN where there is none.
    """

    steps: NDArray[Any]
    values: FloatArray


class Line(NamedTuple):
    """One entry of a legend.

    Fields:
        label: what it is.
        style: number of its colour and dash.
        curves: one per run; several are seeds of one group.
        interval: low and high end around a single curve.
    """

    label: str
    style: int
    curves: list[Curve]
    interval: tuple[Curve, Curve] | None = None


class Panel(NamedTuple):
    """A figure to be drawn where its metrics are there.

    Fields:
        metrics: name, or pattern with one `*` that stands for what the lines are called.
        words: what is shown, as a title begins with it.
        unit: of the vertical axis.
        note: how it is measured.
        interval: metrics that hold the low and high end of an interval.
    """

    metrics: str
    words: str
    unit: str
    note: str
    interval: tuple[str, str] | None = None


class Figure(NamedTuple):
    """What the page needs for one figure.

    Fields:
        title: a statement of what is seen.
        unit, note: of the panel; `note` also says how many numbers are missing.
        names: of the metrics.
        lines: label and style of each legend entry; none where there is one line.
        band: what the shaded band is, or "".
        traces: for plotly.js; `meta` holds the number of the colour and whether it is a "band".
    """

    title: str
    unit: str
    note: str
    names: list[str]
    lines: list[tuple[str, int]]
    band: str
    traces: list[dict[str, Any]]


SECTIONS: dict[str, tuple[Panel, ...]] = {
    "Learning": (
        Panel("episode/mean_return", "Return in training", "task reward per episode", "mean of the last 100 episodes"),
        Panel(
            "evaluations/mean_return",
            "Return in evaluation",
            "task reward per episode",
            "mean over the episodes of an evaluation",
            ("evaluations/ci95_low", "evaluations/ci95_high"),
        ),
        Panel("episode/mean_length", "Episode length in training", "steps", "mean of the last 100 episodes"),
        Panel("evaluations/mean_length", "Episode length in evaluation", "steps", "mean over the episodes"),
        Panel("rollout/task_reward", "Reward per step", "task reward", "mean over a rollout, before scaling and guilt"),
        Panel("episode/count", "Episodes finished", "episodes", "since the start"),
    ),
    "Policy": (
        Panel("entropy/*", "Entropy", "nats", "of each head, mean over an update"),
        Panel("policy/approx_kl", "KL divergence", "nats", "between acting and learning policy, mean over minibatches"),
        Panel("policy/clip_fraction", "Clip fraction", "share of ratios", "probability ratios outside the clip range"),
        Panel("policy/grad_norm", "Gradient norm", "L2 norm", "over all weights, before clipping"),
        Panel("loss/policy", "Policy loss", "normalised advantage", "clipped surrogate, mean over minibatches"),
    ),
    "Value": (
        Panel("policy/explained_variance", "Explained variance", "share", "of the returns by the values; 1 is perfect"),
        Panel("loss/value", "Value loss", "squared error", "in units of the (scaled) return"),
        Panel("rollout/value", "Predicted value", "(scaled) return", "mean over a rollout"),
    ),
    "Memory": (
        Panel(
            "state_drift/value_*",
            "Value drift of stored states",
            "deviations of the values",
            "root mean square between stored and refreshed state, at the first and last step of segments",
        ),
        Panel(
            "state_drift/kl_*",
            "Policy drift of stored states",
            "nats",
            "KL between stored and refreshed state, at the first and last step of segments",
        ),
    ),
    "Norms": (
        Panel("norms/strength/*", "Norm strength", "punishments, undecayed", "mean over streams"),
        Panel("norms/guilt/*", "Guilt by resource", "task reward per step", "mean over streams and steps"),
        Panel("rollout/guilt", "Guilt", "task reward per step", "mean over a rollout"),
    ),
    "Commons": (
        Panel("commons/taken/*", "Resources taken", "per agent and turn", "by kind"),
        Panel("newcomers/taken/*", "Resources taken by newcomers", "per agent and turn", "by kind"),
        Panel("incumbents/taken/*", "Resources taken by incumbents", "per agent and turn", "by kind"),
        Panel("commons/punished/*", "Punishments", "per agent and turn", "by the kind they were for"),
        Panel("commons/level", "Punishment level", "p", "mean over worlds, after the votes"),
        Panel("commons/votes/*", "Votes", "per agent and turn", "cast in season, whether they counted or not"),
        Panel("commons/harm/*", "Harm", "task reward per agent and turn", "dealt to all others, and paid for"),
        Panel("newcomers/strength/*", "Norm strength of newcomers", "punishments, undecayed", "mean over streams"),
        Panel("incumbents/strength/*", "Norm strength of incumbents", "punishments, undecayed", "mean over streams"),
        Panel("lineage/*", "Who is in each place", "number of the individual", "founders have the lowest numbers"),
    ),
    "Speed": (
        Panel(
            "time/steps_per_s", "Speed", "environment steps per second", "acting, learning and environments together"
        ),
        Panel("time/*_s", "Time per update", "seconds", "gathering the rollout, and learning from it"),
    ),
    "Optimisation": (
        Panel("loss/total", "Total loss", "loss", "policy, entropy bonus and value together"),
        Panel("update/learning_rate", "Learning rate", "step size of Adam", "after its schedule"),
        Panel("update/entropy_coef/*", "Entropy weight", "weight", "after its schedule"),
        Panel("update/optimizer_steps", "Optimiser steps", "per update", "fewer where target_kl ended an update"),
        Panel("update/skipped_steps", "Skipped steps", "per update", "for a loss or gradient that was not finite"),
        Panel("policy/first_ratio_error", "First ratio error", "distance from 1", "rounding only, if all is well"),
    ),
}
"""Figures by section, in the order of the page. A metric belongs to the first panel that fits."""


def curves(run: Run) -> dict[str, Curve]:
    """Curves of a run by metric; those of its evaluations under `evaluations/`. Numbers that are not finite are NaN."""
    # metrics.csv repeats an evaluation where it fell together with an update.
    columns = [(name, run.metrics.steps, v) for name, v in run.metrics.columns.items() if name[:11] != "evaluation/"]
    for name in ("mean_return", "mean_length", "ci95_low", "ci95_high"):
        if name in run.evaluations.columns:
            columns.append((f"evaluations/{name}", run.evaluations.steps, run.evaluations.columns[name]))
    return {name: Curve(steps, np.where(np.isfinite(v), v, np.nan)) for name, steps, v in columns}


def draw(groups: Mapping[str, Sequence[Mapping[str, Curve]]]) -> tuple[dict[str, list[Figure]], list[str]]:
    """Figures of all metrics that any run has; metrics without a panel come last, by their prefix.

    One group: metrics of a panel share a figure. Several groups: a figure per metric, with a line per group.

    Args:
        groups: metrics by name of each run, by name of the group.

    Returns:
        Figures by section, and the names of metrics without a finite number.
    """
    names = list(dict.fromkeys(name for runs in groups.values() for run in runs for name in run))
    empty = [name for name in names if not any(_has_numbers(run, name) for runs in groups.values() for run in runs)]
    left = [name for name in names if name not in empty]
    ends = {end for panels in SECTIONS.values() for panel in panels for end in panel.interval or ()}
    left = [name for name in left if name not in ends]
    sections: dict[str, list[Figure]] = {}
    for section, panels in SECTIONS.items():
        for panel in panels:
            fitting = {name: label for name in left if (label := _label(panel.metrics, name)) is not None}
            left = [name for name in left if name not in fitting]
            if fitting:
                sections.setdefault(section, []).extend(_figures(panel, fitting, groups))
    for name, fitting in _families(left).items():
        section, *rest = name.split("/")
        words = _words(rest[-1] if rest else section)
        sections.setdefault(_words(section), []).extend(_figures(Panel(name, words, "", ""), fitting, groups))
    return sections, empty


def _label(pattern: str, name: str) -> str | None:
    """What `*` stands for in a name that fits the pattern ("" for a pattern without one), or None."""
    before, star, after = pattern.partition("*")
    if not star:
        return "" if name == pattern else None
    fits = name.startswith(before) and name.endswith(after) and len(name) > len(before) + len(after)
    return name[len(before) : len(name) - len(after)] if fits else None


def _families(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Unknown metrics: `a/b/x` and `a/b/y` share a figure, `a/b` has its own. Labels by name, by family."""
    families: dict[str, dict[str, str]] = {}
    for name in names:
        family, _, label = name.rpartition("/") if name.count("/") >= 2 else (name, "", "")
        families.setdefault(family, {})[name] = label
    return families


def _figures(
    panel: Panel, names: Mapping[str, str], groups: Mapping[str, Sequence[Mapping[str, Curve]]]
) -> list[Figure]:
    if len(groups) == 1:
        (runs,) = groups.values()
        lines = [_line(panel, name, label, i, runs) for i, (name, label) in enumerate(names.items())]
        return [_figure(panel, list(names), panel.words, lines)]
    figures = []
    for name, label in names.items():
        lines = [
            _line(panel, name, group, i, runs)
            for i, (group, runs) in enumerate(groups.items())
            if any(_has_numbers(run, name) for run in runs)
        ]
        figures.append(
            _figure(panel, [name], f"{panel.words} ({_words(label).lower()})" if label else panel.words, lines)
        )
    return figures


def _line(panel: Panel, name: str, label: str, style: int, runs: Sequence[Mapping[str, Curve]]) -> Line:
    curves = [run[name] for run in runs if _has_numbers(run, name)]
    interval = None
    if len(curves) == 1 and panel.interval is not None:
        (run,) = (run for run in runs if _has_numbers(run, name))
        low, high = panel.interval
        interval = (run[low], run[high]) if low in run and high in run else None
    return Line(label, style, curves, interval)


def _figure(panel: Panel, names: list[str], words: str, lines: list[Line]) -> Figure:
    traces: list[dict[str, Any]] = []
    band = ""
    middles = {line.label: mean_and_range(line.curves)[0] for line in lines}
    for line in lines:
        low, high = line.interval or mean_and_range(line.curves)[1:]
        known = np.isfinite(low.values) & np.isfinite(high.values)
        # A band needs two neighbours: one evaluation, or evaluations of one episode each, have none.
        if (line.interval is not None or len(line.curves) > 1) and (known[1:] & known[:-1]).any():
            band = "lowest to highest seed" if line.interval is None else "95% interval over episodes"
            traces.append(_band_trace(low, high, line.style))
    for line in lines:
        if len(line.curves) > 1 or len(line.curves[0].values) > 2 * NUM_MEANS:
            max_points = max(2 * NUM_MEANS, MAX_POINTS // len(line.curves))
            traces += [_trace(thin(curve, max_points), line, pale=True) for curve in line.curves]
    traces += [_trace(stretch_means(middles[line.label]), line, pale=False) for line in lines]
    missing = sum(_num_gaps(curve.values) for line in lines for curve in line.curves)
    gaps = f"{missing} number{'s' * (missing > 1)} missing or not finite" if missing else ""
    return Figure(
        title=f"{words} {statement({label: middle.values for label, middle in middles.items()})}".strip(),
        unit=panel.unit,
        note="; ".join(part for part in (panel.note, gaps) if part),
        names=names,
        lines=[(line.label, line.style) for line in lines] if len(lines) > 1 or lines[0].label else [],
        band=band,
        traces=traces,
    )


def statement(lines: Mapping[str, FloatArray]) -> str:
    """What the lines of a figure do, in words; numbers are means of the first and last tenth of a line.

    A line rises or falls where these differ by more than a quarter of its range.
    """
    ends = {label: _first_and_last(values) for label, values in lines.items() if np.isfinite(values).any()}
    if not ends:
        return ""
    last = {label: number(end) for label, (_, end) in ends.items()}
    if len(ends) == 1:
        ((label, (first, end)),) = ends.items()
        whose = f" ({label})" if label else ""
        reach = np.nanmax(lines[label]) - np.nanmin(lines[label])
        if reach == 0:
            return f"stayed at {last[label]}{whose}"
        if abs(end - first) <= 0.25 * reach or number(first) == last[label]:
            return f"ended at {last[label]}{whose}"
        return f"{'rose' if end > first else 'fell'} from {number(first)} to {last[label]}{whose}"
    if len(set(last.values())) == 1:
        return f"ended at {next(iter(last.values()))} everywhere"
    if len(ends) <= 3:
        return "ended at " + ", ".join(f"{text} ({label})" for label, text in last.items())
    lowest, highest = (f(ends, key=lambda label: ends[label][1]) for f in (min, max))
    return f"ended between {last[lowest]} ({lowest}) and {last[highest]} ({highest})"


def number(value: float) -> str:
    """Three digits, or whole thousands."""
    if not np.isfinite(value):
        return "–"
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return text.replace("-", "−", 1) if text.startswith("-") else text


def mean_and_range(curves: Sequence[Curve]) -> tuple[Curve, Curve, Curve]:
    """Mean, lowest and highest of several runs, at the steps that all of them have; NaN where any has no number."""
    steps = curves[0].steps
    for curve in curves[1:]:
        steps = np.intersect1d(steps, curve.steps)
    stacked = np.stack([curve.values[np.isin(curve.steps, steps)] for curve in curves])
    return Curve(steps, stacked.mean(0)), Curve(steps, stacked.min(0)), Curve(steps, stacked.max(0))


def thin(curve: Curve, max_points: int = MAX_POINTS) -> Curve:
    """At most `max_points` of a curve: its ends, and the lowest and highest of each of equal stretches.

    Nothing is smoothed: every peak stays, a stretch without numbers stays a gap.
    """
    num_points = len(curve.values)
    if num_points <= max_points:
        return curve
    kept = {0, num_points - 1}
    for stretch in np.array_split(np.arange(num_points), max(1, (max_points - 2) // 2)):
        values = curve.values[stretch]
        if np.isnan(values).all():
            kept.add(int(stretch[0]))
        else:
            kept |= {int(stretch[np.nanargmin(values)]), int(stretch[np.nanargmax(values)])}
    chosen = np.array(sorted(kept))
    return Curve(curve.steps[chosen], curve.values[chosen])


def stretch_means(curve: Curve, num_stretches: int = NUM_MEANS) -> Curve:
    """Means over equal stretches of a curve that has more than two points for each; NaN where there is no number."""
    if len(curve.values) <= 2 * num_stretches:
        return curve
    return Curve(_by_stretch(curve.steps, num_stretches, np.mean), _by_stretch(curve.values, num_stretches, np.mean))


def outline(low: Curve, high: Curve, max_points: int = MAX_POINTS) -> Curve:
    """A band as closed polygons with gaps between them; of a long one, the reach of each of equal stretches."""
    steps, lowest, highest = low.steps, low.values, high.values
    if len(steps) > (half := max_points // 2):
        steps = _by_stretch(steps, half, np.mean)
        lowest, highest = _by_stretch(lowest, half, np.min), _by_stretch(highest, half, np.max)
    present = np.flatnonzero(np.isfinite(lowest) & np.isfinite(highest))
    gap = np.array([np.nan])
    along, around = [], []
    for part in np.split(present, np.flatnonzero(np.diff(present) > 1) + 1):
        along += [steps[part], steps[part[::-1]], gap]
        around += [highest[part], lowest[part[::-1]], gap]
    return Curve(np.concatenate(along[:-1]), np.concatenate(around[:-1]))


def _by_stretch(values: NDArray[Any], num_stretches: int, function: Callable[[FloatArray], Any]) -> FloatArray:
    """A number for each of equal stretches, from the finite values in it; NaN where there is none."""
    stretches = [stretch[np.isfinite(stretch)] for stretch in np.array_split(values, num_stretches)]
    return np.array([function(stretch) if len(stretch) else np.nan for stretch in stretches])


def _trace(curve: Curve, line: Line, *, pale: bool) -> dict[str, Any]:
    finite = np.isfinite(curve.values)
    neighbours = np.append(finite[1:], False) | np.insert(finite[:-1], 0, False)
    alone = bool((finite & ~neighbours).any())
    return {
        "type": "scatter",
        "mode": "lines+markers" if alone else "lines",
        "name": html.escape(line.label),
        "x": _compact(curve.steps),
        "y": curve.values.astype(np.float32),
        "line": {"width": 1 if pale else 2, "dash": DASHES[line.style // NUM_COLORS % len(DASHES)]},
        "marker": {"size": 3 if pale else 5},
        "opacity": 0.4 if pale else 1.0,
        "meta": {"color": line.style % NUM_COLORS, "band": False},
        **({"hoverinfo": "skip"} if pale else {"hovertemplate": "%{y:.4g}"}),
    }


def _band_trace(low: Curve, high: Curve, style: int) -> dict[str, Any]:
    curve = outline(low, high)
    return {
        "type": "scatter",
        "mode": "lines",
        "x": _compact(curve.steps),
        "y": curve.values.astype(np.float32),
        "fill": "toself",
        "line": {"width": 0},
        "hoverinfo": "skip",
        "meta": {"color": style % NUM_COLORS, "band": True},
    }


def _compact(steps: FloatArray) -> NDArray[Any]:
    """Steps in four bytes each where they fit."""
    if np.isfinite(steps).all() and (len(steps) == 0 or steps.max() < 2**31):
        return np.round(steps).astype(np.int32)
    return steps


def _has_numbers(run: Mapping[str, Curve], name: str) -> bool:
    return name in run and bool(np.isfinite(run[name].values).any())


def _num_gaps(values: FloatArray) -> int:
    """Missing numbers after the first one there is."""
    finite = np.isfinite(values)
    return int((~finite[finite.argmax() :]).sum())


def _first_and_last(values: FloatArray) -> tuple[float, float]:
    finite = values[np.isfinite(values)]
    tenth = max(1, len(finite) // 10)
    return float(finite[:tenth].mean()), float(finite[-tenth:].mean())


def _words(name: str) -> str:
    """A metric's name as words."""
    words = name.replace("_", " ").replace("/", " ").strip()
    return words[:1].upper() + words[1:]
