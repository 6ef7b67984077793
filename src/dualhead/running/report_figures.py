"""Figures of a report: which metrics share a figure, in which words, and as which lines."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dualhead.running.results import FloatArray, Run

NUM_STRETCHES = 100
"""Lines and bands of more than twice as many points are drawn from this many equal stretches."""
NUM_COLORS = 6
DASHES = ("solid", "dash", "dot")
INTERVALS = {"evaluations/mean_return": ("evaluations/ci95_low", "evaluations/ci95_high")}
"""Metrics that hold the low and high end of another metric's interval."""


class Curve(NamedTuple):
    """One metric of one run."""

    steps: NDArray[Any]  # [P] environment steps, rising
    values: FloatArray  # [P], NaN where there is no finite number


class Panel(NamedTuple):
    """A figure that is drawn when a run has its metrics."""

    metrics: str  # a name, or a pattern in which `*` stands for the name of a line
    title: str
    unit: str = ""  # of the vertical axis
    note: str = ""  # how it is measured


class Figure(NamedTuple):
    """What the page needs for one figure."""

    title: str
    unit: str
    note: str  # of the panel, and how many numbers are missing
    names: list[str]  # of the metrics
    lines: list[tuple[str, int, str]]  # label, number of colour and dash, and `change` of each
    band: str  # what the shaded band is, or ""
    traces: list[dict[str, Any]]  # for plotly.js; `meta` holds the number of the colour


_DRIFT = "between stored and refreshed state, at the first and last step of segments"
SECTIONS: dict[str, tuple[Panel, ...]] = {
    "Learning": (
        Panel("episode/mean_return", "Return in training", "task reward per episode", "mean of the last 100 episodes"),
        Panel("evaluations/mean_return", "Return in evaluation", "task reward per episode", "mean over the episodes"),
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
        Panel("state_drift/value_*", "Value drift of stored states", "deviations of the values", f"RMS {_DRIFT}"),
        Panel("state_drift/kl_*", "Policy drift of stored states", "nats", f"KL {_DRIFT}"),
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
        Panel("time/steps_per_s", "Speed", "environment steps per second", "acting, learning and environments"),
        Panel("time/*_s", "Time per update", "seconds", "gathering the rollout, and learning from it"),
    ),
    "Optimisation": (
        Panel("loss/total", "Total loss", "loss", "policy, entropy bonus and value together"),
        Panel("update/learning_rate", "Learning rate", "step size of Adam", "after its schedule"),
        Panel("update/entropy_coef/*", "Entropy weight", "weight", "after its schedule"),
        Panel("update/optimizer_steps", "Optimiser steps", "per update", "fewer where target_kl ended an update"),
        Panel("update/skipped_steps", "Skipped steps", "per update", "for a loss or gradient that was not finite"),
        Panel("policy/first_ratio_error", "First ratio error", "distance from 1", "only rounding is expected"),
    ),
}
"""Figures by section, in the order of the page. A metric belongs to the first panel that fits."""


def curves(run: Run) -> dict[str, Curve]:
    """Curves of a run by metric; those of its evaluations under `evaluations/`. Numbers that are not finite are NaN."""
    # metrics.csv repeats an evaluation where it fell together with an update.
    columns = {name: (run.metrics.steps, v) for name, v in run.metrics.columns.items() if name[:11] != "evaluation/"}
    for name in ("mean_return", "mean_length", "ci95_low", "ci95_high"):
        if name in run.evaluations.columns:
            columns[f"evaluations/{name}"] = run.evaluations.steps, run.evaluations.columns[name]
    return {name: Curve(steps, np.where(np.isfinite(v), v, np.nan)) for name, (steps, v) in columns.items()}


def draw(groups: Mapping[str, Sequence[Mapping[str, Curve]]]) -> tuple[dict[str, list[Figure]], list[str]]:
    """Figures of all metrics that any run has; metrics without a panel come last, by their prefix.

    One group: metrics of a panel share a figure. Several groups: a figure per metric, with a line per group.

    Args:
        groups: metrics by name of each run, by name of the group.

    Returns:
        Figures by section, and the names of metrics without a finite number.
    """
    names = list(dict.fromkeys(name for runs in groups.values() for run in runs for name in run))
    known = {
        group: [{name: curve for name, curve in run.items() if np.isfinite(curve.values).any()} for run in runs]
        for group, runs in groups.items()
    }
    empty = [name for name in names if not any(name in run for runs in known.values() for run in runs)]
    ends = [end for interval in INTERVALS.values() for end in interval]
    labels: dict[tuple[str, Panel], dict[str, str]] = {
        (section, panel): {} for section, panels in SECTIONS.items() for panel in panels
    }
    for name in names:
        if name not in empty and name not in ends:
            section, panel, label = _panel_of(name)
            labels.setdefault((section, panel), {})[name] = label
    sections: dict[str, list[Figure]] = {}
    for (section, panel), of_panel in labels.items():
        if of_panel:
            sections.setdefault(section, []).extend(_figures(panel, of_panel, known))
    return sections, empty


def _panel_of(name: str) -> tuple[str, Panel, str]:
    """Section, panel and label of a metric. Unknown ones: `a/b/x` and `a/b/y` share a panel, `a/b` has its own."""
    for section, panels in SECTIONS.items():
        for panel in panels:
            if found := re.fullmatch(re.escape(panel.metrics).replace(r"\*", "(.+)"), name):
                return section, panel, "".join(found.groups())
    family, _, label = name.rpartition("/") if name.count("/") >= 2 else (name, "", "")
    section, _, rest = family.partition("/")
    return _words(section), Panel(family, _words(rest.rpartition("/")[2] or section)), label


def _figures(panel: Panel, labels: Mapping[str, str], groups: Mapping[str, list[dict[str, Curve]]]) -> list[Figure]:
    if len(groups) == 1:
        (runs,) = groups.values()
        return [_figure(panel, [(label, style, name, runs) for style, (name, label) in enumerate(labels.items())])]
    figures = []
    for name, label in labels.items():
        title = f"{panel.title} ({_words(label).lower()})" if label else panel.title
        lines = [(group, style, name, runs) for style, (group, runs) in enumerate(groups.items())]
        figures.append(_figure(panel._replace(title=title), lines))
    return figures


def _figure(panel: Panel, lines: Sequence[tuple[str, int, str, list[dict[str, Curve]]]]) -> Figure:
    """Lines: label, style, metric and the runs of each; several runs that have the metric are seeds."""
    bands, pale, thick, legend, about, num_missing = [], [], [], [], "", 0
    for label, style, name, runs in lines:
        runs = [run for run in runs if name in run]
        if not runs:
            continue
        seeds = [run[name] for run in runs]
        mean, low, high = mean_and_range(seeds)
        interval = [runs[0][end] for end in INTERVALS.get(name, ()) if end in runs[0]]
        words = "lowest to highest seed" if len(seeds) > 1 else "lowest to highest"
        if len(seeds) == 1 and len(interval) == 2:
            (low, high), words = interval, "95% interval over episodes"
        area = band(low, high)
        if area is not None:
            about = words
            bands.append(_trace(area, label, style, fill="toself", hoverinfo="skip"))
        if len(seeds) > 1:
            means = [by_stretch(seed, np.mean) for seed in seeds]
            pale += [_trace(seed, label, style, width=1, opacity=0.4, hoverinfo="skip") for seed in means]
        thick.append(_trace(by_stretch(mean, np.mean), label, style, width=2, hovertemplate="%{y:.4g}"))
        legend.append((label, style, change(mean.values)))
        num_missing += sum(int(np.isnan(v[np.isfinite(v).argmax() :]).sum()) for _, v in seeds)
    missing = f"{num_missing} number{'s' * (num_missing > 1)} missing or not finite" if num_missing else ""
    return Figure(
        title=panel.title,
        unit=panel.unit,
        note="; ".join(filter(None, (panel.note, missing))),
        names=list(dict.fromkeys(name for _, _, name, _ in lines)),
        lines=legend,
        band=about,
        traces=[*bands, *pale, *thick],
    )


def change(values: FloatArray) -> str:
    """Means over the first and the last tenth of the numbers there are; one number where these read the same."""
    finite = values[np.isfinite(values)]
    if not len(finite):
        return "–"
    tenth = max(1, len(finite) // 10)
    first, last = number(finite[:tenth].mean()), number(finite[-tenth:].mean())
    return last if first == last else f"{first} → {last}"


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


def by_stretch(curve: Curve, function: Callable[[FloatArray], Any]) -> Curve:
    """A number for each of `NUM_STRETCHES` of a long curve: `function` of its finite values, or NaN without any."""
    if len(curve.values) <= 2 * NUM_STRETCHES:
        return curve
    steps, values = (np.array_split(array, NUM_STRETCHES) for array in curve)
    finite = [stretch[np.isfinite(stretch)] for stretch in values]
    means = np.array([stretch.mean() for stretch in steps])
    return Curve(means, np.array([function(stretch) if len(stretch) else np.nan for stretch in finite]))


def band(low: Curve, high: Curve) -> Curve | None:
    """The area between two curves as closed polygons with gaps between them; None where there is none.

    Of long curves it reaches from the lowest to the highest number of each stretch, so every peak stays.
    """
    steps, lowest = by_stretch(low, np.min)
    highest = by_stretch(high, np.max).values
    along, around = [], []
    for part in np.ma.clump_unmasked(np.ma.masked_invalid(lowest + highest)):
        along += [steps[part], steps[part][::-1], steps[part][:1]]
        around += [highest[part], lowest[part][::-1], [np.nan]]
    if not any(len(part) > 1 for part in along) or not (highest > lowest).any():
        return None
    return Curve(np.concatenate(along), np.concatenate(around))


def _trace(curve: Curve, label: str, style: int, *, width: int = 0, **look: Any) -> dict[str, Any]:
    finite = np.isfinite(curve.values)
    neighbours = np.append(finite[1:], False) | np.insert(finite[:-1], 0, False)
    return {
        "type": "scatter",
        "mode": "lines+markers" if (finite & ~neighbours).any() else "lines",
        "name": html.escape(label),
        "x": np.round(curve.steps).astype(np.int64),
        "y": curve.values.astype(np.float32),
        "line": {"width": width, "dash": DASHES[style // NUM_COLORS % len(DASHES)]},
        "marker": {"size": 3 + 2 * (width > 1)},
        "meta": {"color": style % NUM_COLORS},
        **look,
    }


def _words(name: str) -> str:
    """A metric's name as words."""
    words = name.replace("_", " ").replace("/", " ").strip()
    return words[:1].upper() + words[1:]
