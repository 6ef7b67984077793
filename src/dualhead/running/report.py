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
from typing import Any

import numpy as np

from dualhead.config import Config, flat
from dualhead.running.checkpoint import RunError
from dualhead.running.config import EVALUATION_SEED, default_settings, preset_settings
from dualhead.running.report_figures import DASHES, NUM_COLORS, NUM_STRETCHES, curves, draw, number
from dualhead.running.results import Run, read_run
from dualhead.storage import CheckpointError, read_bytes, write_bytes
from dualhead.worlds.streams import UnavailableEnvironment

REPLAY_STEPS = 500
MAX_REPLAY_BYTES = 10_000_000
MAX_GIF_BYTES = 1_000_000_000
MAX_REPLAYS = 4
MAX_NAMED_SETTINGS = 3
"""Groups that differ in more settings than this are named by their folders."""


def write_report(
    runs: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str] | None = None,
    *,
    replay: bool = True,
    encoder: Any = None,
    memory: Any = None,
) -> Path:
    """Writes the page of one run, or of several side by side.

    Runs that differ only in seed and directory form a group: the page shows their mean, range and single seeds.

    Args:
        runs: run directories, at least one; the same one twice counts once.
        out: the page; by default `report.html` in the run's directory, or here for several runs.
        replay: show an episode if the environment renders: `replay.gif` of the run if it exists, else an episode of
            the newest checkpoint.
        encoder, memory: the parts of its own that the policy was trained with; only the replay needs them.

    Returns:
        The file.

    Raises:
        RunError: a run is missing or has no numbers yet, the page cannot be written, or a package is missing.
    """
    try:
        import jinja2  # noqa: F401
        import plotly  # noqa: F401
    except ImportError as error:
        raise RunError(f"reports need {error.name}: pip install -e '.[report]' in the checkout") from error
    paths = list(dict.fromkeys(map(Path, runs)))
    if not paths:
        raise RunError("expected at least one run directory, got none")
    groups = group_runs([read_run(path) for path in paths])
    shown = [members[0].path for members in groups.values()][: MAX_REPLAYS if replay else 0]
    page = render(groups, [_replay(path, encoder=encoder, memory=memory) for path in shown])
    path = Path(out) if out is not None else (paths[0] if len(paths) == 1 else Path()) / "report.html"
    try:
        write_bytes(path, page.encode())
    except OSError as error:
        raise RunError(f"cannot write the report {path}: {error.strerror or error}; name a file with --out") from error
    return path


def group_runs(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Groups of runs that differ only in seed and directory, named by the settings in which the groups differ."""
    by_settings: dict[frozenset[tuple[str, str]], list[Run]] = {}
    for run in runs:
        by_settings.setdefault(frozenset(_settings(run.config.model_dump()).items()), []).append(run)
    groups = list(by_settings.values())
    if len(groups) == 1:
        return {runs[0].config.memory_name: groups[0]}
    settings = [_settings(members[0].config.model_dump()) for members in groups]
    differing = _differing(settings)
    names = [members[0].path.absolute().parent.name for members in groups]  # as in a study: a folder per condition
    if len(differing) <= MAX_NAMED_SETTINGS:
        names = [", ".join(_named(name, one.get(name, "none")) for name in differing) for one in settings]
    elif len(set(names)) < len(names):
        names = [str(members[0].path) for members in groups]
    return dict(zip(names, groups))


def _named(name: str, value: str) -> str:
    return value if name == "env" else f"{name.removeprefix('ppo.').removeprefix('network.')}={value}"


def _settings(of_run: Mapping[str, Any]) -> dict[str, str]:
    """Settings by dotted name, as on the command line; without those that tell seeds of a group apart."""
    settings = flat(of_run)
    return {name: _text(value) for name, value in settings.items() if name not in ("seed", "run_dir")}


def _text(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return " ".join(map(_text, value))
    return "none" if value is None else str(value)


def _differing(settings: Sequence[Mapping[str, str]]) -> list[str]:
    """Names of settings that are not the same everywhere."""
    names = dict.fromkeys(name for one in settings for name in one)
    return [name for name in names if len({one.get(name, "none") for one in settings}) > 1]


def render(groups: Mapping[str, Sequence[Run]], replays: Sequence[Mapping[str, str]]) -> str:
    """The page."""
    import jinja2
    import plotly.graph_objects as go
    from plotly.io.json import to_json_plotly
    from plotly.offline import get_plotlyjs

    sections, empty = draw({name: [curves(run) for run in members] for name, members in groups.items()})
    figures = [figure for of_section in sections.values() for figure in of_section]
    # plotly checks the traces and packs their numbers.
    drawn = [{"traces": go.Figure(figure.traces).to_dict()["data"], "unit": figure.unit} for figure in figures]
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))
    return template.render(
        title=_title(groups),
        groups=[_facts(name, members, style) for style, (name, members) in enumerate(groups.items())],
        runs=[_facts(str(r.path), [r], style) for style, members in enumerate(groups.values()) for r in members],
        sections=sections,
        empty=empty,
        settings=_settings_table(groups),
        replays=replays,
        num_stretches=NUM_STRETCHES,
        num_colors=NUM_COLORS,
        dashes=DASHES,
        made=f"{datetime.datetime.now():%Y-%m-%d %H:%M}",
        nonce=secrets.token_urlsafe(16),
        # Both are text of scripts. to_json_plotly escapes <, > and /, so that no text can end the element.
        figures=to_json_plotly(drawn),
        plotly=get_plotlyjs(),
    )


def _title(groups: Mapping[str, Sequence[Run]]) -> str:
    runs = [run for members in groups.values() for run in members]
    what = " against ".join(groups) if len(groups) <= 3 else f"{len(groups)} settings"
    seeds = f", {len(runs)} seeds" if len(runs) > len(groups) == 1 else ""
    return f"{what} on {', '.join(dict.fromkeys(run.config.env for run in runs))}{seeds}"


def _facts(name: str, members: Sequence[Run], style: int) -> dict[str, Any]:
    """What the page says about a run, or about a group of runs."""
    outcomes = [outcome for run in members if (outcome := _outcome(run)) is not None]
    final, about = outcomes[0] if outcomes else (math.nan, "no episode has ended yet")
    if len(outcomes) > 1:
        means = [mean for mean, _ in outcomes]
        final, about = float(np.mean(means)), f"mean; seeds reach from {number(min(means))} to {number(max(means))}"
    steps, seconds = [_num_steps(run) for run in members], [_seconds(run) for run in members]
    states = [_status(run) for run in members]
    mean_seconds = float(np.mean(seconds))
    return {
        "name": name,
        "style": style,
        "seeds": ", ".join(str(run.config.seed) for run in members),
        "final": number(final),
        "about": about,
        "steps": " to ".join(dict.fromkeys(f"{count:,}" for count in (min(steps), max(steps)))),
        "total": f"{members[0].config.total_steps:,}",
        "time": str(datetime.timedelta(seconds=round(mean_seconds))) if math.isfinite(mean_seconds) else "–",
        "speed": number(float(np.mean(np.divide(steps, seconds)))),
        "state": states[0][0],
        "state_about": states[0][1],
        "states": ", ".join(f"{count} {state}" for state, count in Counter(state for state, _ in states).items()),
    }


def _num_steps(run: Run) -> int:
    """Environment steps so far."""
    newest = [int(table.steps[-1]) for table in (run.metrics, run.evaluations) if len(table.steps)]
    return max(*newest, run.summary.get("steps", 0))


def _seconds(run: Run) -> float:
    """Spent training; NaN where the run does not say."""
    known = np.nansum([run.column(name) for name in ("time/rollout_s", "time/update_s")])
    return float(known) or run.summary.get("seconds", math.nan)


def _outcome(run: Run) -> tuple[float, str] | None:
    """A run's final return, with its interval and source: the final evaluation, else the newest, else training."""
    evaluation = run.summary.get("evaluation")
    if isinstance(evaluation, dict) and "mean_return" in evaluation:
        spread = _interval(evaluation) or f"± {number(evaluation.get('std_return', math.nan))} (deviation)"
        return evaluation["mean_return"], f"{spread}, evaluation over {evaluation.get('episodes', 'unknown')} episodes"
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


def _settings_table(groups: Mapping[str, Sequence[Run]]) -> dict[str, Any]:
    """Settings that are not the default in some group, or that differ between groups."""
    configs = [members[0].config for members in groups.values()]
    default = _settings(default_settings(configs[0].env))
    settings = [_settings(config.model_dump()) for config in configs]
    differing = _differing(settings)
    names = _differing([default, *settings])
    return {
        "names": [name for name in names if name != "env" or name in differing],
        "default": default | {"env": ""},
        "groups": settings,
        "tuned": [
            {name: _text(value) for name, value in flat(preset_settings(config.preset, config.env)).items()}
            for config in configs
        ],
        "differing": differing,
        "descriptions": {name: text for config in configs for name, text in _descriptions(config).items()},
    }


def _descriptions(config: Config, prefix: str = "") -> dict[str, str]:
    """Descriptions of settings by dotted name."""
    result: dict[str, str] = {}
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        nested = isinstance(value, Config)
        result |= _descriptions(value, f"{prefix}{name}.") if nested else {prefix + name: field.description or ""}
    return result


def _replay(run_dir: Path, **parts: Any) -> dict[str, str]:
    """The run's `replay.gif`, or an episode played for this page, as a data URI; or why there is none."""
    image = problem = ""
    try:
        path = run_dir / "replay.gif"
        contents = read_bytes(path, at_most=MAX_GIF_BYTES) if path.exists() else _record(run_dir, **parts)
        if contents[:4] != b"GIF8":
            problem = "replay.gif is no GIF"
        elif len(contents) > MAX_REPLAY_BYTES:
            problem = f"replay.gif has {len(contents) / 1e6:.0f} MB, more than fits well into a page"
        else:
            image = "data:image/gif;base64," + base64.b64encode(contents).decode()
    except ImportError as error:
        problem = f"recording needs {error.name or error}"
    except OSError as error:
        problem = f"cannot read replay.gif: {error.strerror or error}"
    except (RunError, CheckpointError, UnavailableEnvironment) as error:
        problem = str(error)
    return {"run": str(run_dir), "image": image, "problem": problem}


def _record(run_dir: Path, **parts: Any) -> bytes:
    from dualhead.running.video import record_video

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "replay.gif"
        record_video(run_dir, path, max_steps=REPLAY_STEPS, seed=EVALUATION_SEED, **parts)
        return path.read_bytes()
