"""One HTML page about a run, or about several runs side by side. It needs no network."""

from __future__ import annotations

import base64
import datetime
import math
import os
import secrets
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np

from dualhead.config import Config, flat
from dualhead.running.checkpoint import RunError
from dualhead.running.config import EVALUATION_SEED, RunConfig, preset_settings
from dualhead.running.report_figures import DASHES, NUM_COLORS, NUM_MEANS, Figure, curves, draw, number
from dualhead.running.results import Run, read_run
from dualhead.storage import CheckpointError
from dualhead.worlds.streams import UnavailableEnvironment

REPLAY_STEPS = 500
MAX_REPLAY_BYTES = 10_000_000
MAX_REPLAYS = 4
MAX_NAMED_SETTINGS = 3
"""Groups that differ in more than these are named by some of them only."""
_NOT_A_CONDITION = ("seed", "run_dir")


class Replay(NamedTuple):
    """Fields:
    run: whose it is.
    image: a data URI, or "".
    problem: why there is no image, or "".
    """

    run: str
    image: str
    problem: str


def write_report(
    runs: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str] | None = None,
    *,
    replay: bool = True,
    encoder: Any = None,
    memory: Any = None,
) -> Path:
    """Writes the page of one run, or of several side by side.

    Runs that differ in nothing but seed and directory form a group: mean, range and single seeds.

    Args:
        runs: run directories, at least one; the same one twice counts once.
        out: the page; by default `report.html` in the run's directory, or here for several runs.
        replay: show an episode if the environment renders: `replay.gif` of the run if it exists, else an episode of
            the newest checkpoint.
        encoder, memory: the parts of its own that the policy was trained with; only the replay needs them.

    Returns:
        Where the page is.

    Raises:
        RunError: a run is missing or has no numbers yet, the page cannot be written, or plotly is missing.
    """
    _require_plotly()
    paths = list(dict.fromkeys(Path(run) for run in runs))
    if not paths:
        raise RunError("expected at least one run directory, got none")
    groups = group_runs([read_run(path) for path in paths])
    shown = list(groups.values())[: MAX_REPLAYS if replay else 0]
    page = render(groups, replays=[_replay(members[0].path, encoder=encoder, memory=memory) for members in shown])
    path = Path(out) if out is not None else (paths[0] if len(paths) == 1 else Path()) / "report.html"
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise RunError(f"cannot write the report {path}: {error.strerror or error}; name a file with --out") from error
    return path


def group_runs(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Groups of runs that differ only in seed and directory, named by the settings in which the groups differ."""
    by_settings: dict[frozenset[tuple[str, str]], list[Run]] = {}
    for run in runs:
        condition = ((name, value) for name, value in _settings(run).items() if name not in _NOT_A_CONDITION)
        by_settings.setdefault(frozenset((n, _text(v)) for n, v in condition if v is not None), []).append(run)
    groups = list(by_settings.values())
    if len(groups) == 1:
        return {runs[0].config.memory_name: groups[0]}
    settings = [_settings(members[0]) for members in groups]
    differing = differing_settings(settings)
    folders = [{run.path.absolute().parent.name for run in members} for members in groups]
    if len(differing) > MAX_NAMED_SETTINGS and len(set().union(*folders)) == len(groups) == sum(map(len, folders)):
        # Each group has a folder of its own, as in a study: its name is shorter than a list of many settings.
        return {folder: members for (folder,), members in zip(folders, groups)}
    shown = 1  # as many as tell the groups apart
    while len({tuple(_text(one.get(name)) for name in differing[:shown]) for one in settings}) < len(groups):
        shown += 1
    shown = len(differing) if len(differing) <= MAX_NAMED_SETTINGS else shown
    more = f" and {len(differing) - shown} more" if len(differing) > shown else ""
    return {
        ", ".join(_named(name, one.get(name)) for name in differing[:shown]) + more: members
        for one, members in zip(settings, groups)
    }


def _named(name: str, value: Any) -> str:
    return _text(value) if name == "env" else f"{name.removeprefix('ppo.').removeprefix('network.')}={_text(value)}"


def differing_settings(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of settings that are not the same everywhere, without seed and directory."""
    names = dict.fromkeys(name for one in settings for name in one if name not in _NOT_A_CONDITION)
    return [name for name in names if len({_text(one.get(name)) for one in settings}) > 1]


def render(groups: Mapping[str, Sequence[Run]], *, replays: Sequence[Replay]) -> str:
    """The page."""
    import jinja2
    import plotly.graph_objects as go
    from plotly.io.json import to_json_plotly
    from plotly.offline import get_plotlyjs

    sections, empty = draw({name: [curves(run) for run in members] for name, members in groups.items()})
    figures = [figure for members in sections.values() for figure in members]
    facts = [_facts(name, members, style) for style, (name, members) in enumerate(groups.items())]
    runs = [_facts(str(run.path), [run], style) for style, members in enumerate(groups.values()) for run in members]
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["number"] = number
    template = environment.from_string(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))
    return template.render(
        title=_title(groups),
        groups=facts,
        runs=runs,
        sections=sections,
        empty=empty,
        settings=_settings_rows(groups),
        seeds_differ=any(len(members) > 1 for members in groups.values()),
        replays=replays,
        num_means=NUM_MEANS,
        num_colors=NUM_COLORS,
        dashes=DASHES,
        made=f"{datetime.datetime.now():%Y-%m-%d %H:%M}",
        nonce=secrets.token_urlsafe(16),
        # Both are text of scripts. to_json_plotly escapes <, > and /, so that no text can end the element.
        figures=to_json_plotly([_plotly(figure, go) for figure in figures]),
        plotly=get_plotlyjs(),
    )


def _plotly(figure: Figure, go: Any) -> dict[str, Any]:
    """Traces checked by plotly, with their numbers packed."""
    traces: Any = go.Figure(figure.traces).to_dict()["data"]
    return {"traces": traces, "unit": figure.unit, "title": figure.title}


def _title(groups: Mapping[str, Sequence[Run]]) -> str:
    runs = [run for members in groups.values() for run in members]
    environments = ", ".join(dict.fromkeys(run.config.env for run in runs))
    if len(runs) == 1:
        return f"{runs[0].config.memory_name} on {environments}"
    if len(groups) == 1:
        return f"{runs[0].config.memory_name} on {environments}, {len(runs)} seeds"
    if len(groups) <= 3 and "," not in environments:
        return f"{' against '.join(groups)} on {environments}"
    return f"{len(groups)} settings on {environments}"


def _settings(run: Run) -> dict[str, Any]:
    """Settings by dotted name."""
    return flat(run.config.model_dump())


def _num_steps(run: Run) -> int:
    """Environment steps so far."""
    newest = max(int(table.steps[-1]) for table in (run.metrics, run.evaluations) if len(table.steps))
    return max(newest, run.summary.get("steps", 0))


def _seconds(run: Run) -> float:
    """Spent training, as far as the metrics say so."""
    parts = [run.column(name) for name in ("time/rollout_s", "time/update_s")]
    known = [part for part in parts if not np.isnan(part).all()]
    return float(sum(np.nansum(part) for part in known)) if known else run.summary.get("seconds", math.nan)


def _speed(runs: Sequence[Run]) -> str:
    """Environment steps per second."""
    speeds = [_num_steps(run) / _seconds(run) for run in runs if _seconds(run) > 0]
    return f"{np.mean(speeds):,.0f}" if speeds else "–"


def _facts(name: str, members: Sequence[Run], style: int) -> dict[str, Any]:
    """What the page says of a run, or of a group of them."""
    outcomes = [outcome for run in members if (outcome := _outcome(run)) is not None]
    final, about = outcomes[0] if outcomes else (math.nan, "no episode has ended yet")
    if len(outcomes) > 1:
        means = [mean for mean, _ in outcomes]
        final, about = float(np.mean(means)), f"mean; seeds reach from {number(min(means))} to {number(max(means))}"
    states = [_status(run) for run in members]
    counts = Counter(state for state, _ in states)
    return {
        "name": name,
        "style": style,
        "seeds": ", ".join(str(run.config.seed) for run in members),
        "final": number(final),
        "about": about,
        "steps": " to ".join(dict.fromkeys(f"{f(map(_num_steps, members)):,}" for f in (min, max))),
        "total": f"{members[0].config.total_steps:,}",
        "time": _duration(float(np.mean(list(map(_seconds, members))))),
        "speed": _speed(members),
        "state": states[0][0],
        "state_about": states[0][1],
        "states": ", ".join(f"{count} {state}" for state, count in counts.items()),
    }


def _outcome(run: Run) -> tuple[float, str] | None:
    """A run's final return, with its interval and source: the final evaluation, else the newest, else training."""
    evaluation = run.summary.get("evaluation")
    if isinstance(evaluation, dict) and "mean_return" in evaluation:
        about = f"evaluation over {evaluation['episodes']} episodes"
        spread = _interval(evaluation) or f"± {number(evaluation['std_return'])} (deviation)"
        return evaluation["mean_return"], f"{spread}, {about}"
    for table, name, source in (
        (run.evaluations, "mean_return", "evaluation"),
        (run.metrics, "episode/mean_return", "training"),
    ):
        known = np.flatnonzero(np.isfinite(table.columns.get(name, [])))
        if len(known):
            last = {column: float(values[known[-1]]) for column, values in table.columns.items()}
            where = f"in {source} after {table.steps[known[-1]]:,} steps"
            return last[name], ", ".join(filter(None, (_interval(last), where)))
    return None


def _interval(of: Mapping[str, float]) -> str:
    """The 95% interval of an evaluation in words, or "" where it has none: a single episode gives none."""
    low, high = of.get("ci95_low", math.nan), of.get("ci95_high", math.nan)
    return f"95% interval {number(low)} to {number(high)}" if math.isfinite(low) and math.isfinite(high) else ""


def _status(run: Run) -> tuple[str, str]:
    if not run.summary:
        written = datetime.datetime.fromtimestamp((run.path / "metrics.csv").stat().st_mtime)
        return "not finished", f"running or killed; newest numbers of {written:%Y-%m-%d %H:%M}"
    return ("stopped", "before its end, with a checkpoint") if run.summary.get("stopped_early") else ("finished", "")


def _settings_rows(groups: Mapping[str, Sequence[Run]]) -> list[dict[str, Any]]:
    """Settings that are not the default in some group, or that differ between groups."""
    first = [members[0] for members in groups.values()]
    default = flat(RunConfig(env=first[0].config.env).model_dump())
    tuned = [flat(preset_settings(run.config.preset, run.config.env)) for run in first]
    settings = [_settings(run) for run in first]
    differing = differing_settings(settings)
    descriptions = _descriptions(RunConfig)
    rows = []
    for name in dict.fromkeys(name for one in settings for name in one):
        values = [one.get(name) for one in settings]
        if name in _NOT_A_CONDITION or (name == "env" and name not in differing):
            continue
        if name in differing or any(_text(value) != _text(default.get(name)) for value in values):
            rows.append(
                {
                    "name": name,
                    "description": descriptions.get(name, ""),
                    "default": "" if name == "env" else _text(default.get(name)),
                    "differs": name in differing,
                    "values": [
                        {"text": _text(value), "tuned": name in known and _text(known[name]) == _text(value)}
                        for value, known in zip(values, tuned)
                    ],
                }
            )
    return rows


def _descriptions(model: type[Config], prefix: str = "") -> dict[str, str]:
    """Descriptions of settings by dotted name."""
    result: dict[str, str] = {}
    for name, field in model.model_fields.items():
        nested = [part for part in (field.annotation, *get_args(field.annotation)) if isinstance(part, type)]
        nested = [part for part in nested if issubclass(part, Config)]
        if nested:
            result |= _descriptions(nested[0], f"{prefix}{name}.")
        else:
            result[f"{prefix}{name}"] = field.description or ""
    return result


def _replay(run_dir: Path, **parts: Any) -> Replay:
    try:
        return Replay(str(run_dir), _replay_image(run_dir, **parts), "")
    except ImportError as error:
        return Replay(str(run_dir), "", f"recording needs {error.name or error}")
    except (RunError, CheckpointError, UnavailableEnvironment) as error:
        return Replay(str(run_dir), "", str(error))


def _replay_image(run_dir: Path, **parts: Any) -> str:
    """The run's `replay.gif`, or an episode played for this page, as a data URI."""
    with tempfile.TemporaryDirectory() as folder:
        path = run_dir / "replay.gif"
        if not path.exists():
            path = Path(folder) / "replay.gif"
            _record(run_dir, path, **parts)
        try:
            contents = path.read_bytes()
        except OSError as error:
            raise RunError(f"cannot read {path}: {error.strerror or error}") from error
    if contents[:4] != b"GIF8":
        raise RunError(f"{path.name} is no GIF")
    if len(contents) > MAX_REPLAY_BYTES:
        raise RunError(f"{path.name} has {len(contents) / 1e6:.0f} MB, more than fits well into a page")
    return "data:image/gif;base64," + base64.b64encode(contents).decode()


def _record(run_dir: Path, path: Path, **parts: Any) -> None:
    from dualhead.running.video import record_video

    record_video(run_dir, path, max_steps=REPLAY_STEPS, seed=EVALUATION_SEED, **parts)


def _require_plotly() -> None:
    try:
        import jinja2  # noqa: F401
        import plotly  # noqa: F401
    except ImportError as error:
        raise RunError(f"reports need {error.name}: pip install -e '.[report]' in the checkout") from error


def _text(value: Any) -> str:
    """A setting as it is written on the command line."""
    if isinstance(value, (tuple, list)):
        return " ".join(map(_text, value))
    return "none" if value is None else str(value)


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "–"
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"
