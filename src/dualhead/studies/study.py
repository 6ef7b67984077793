"""Studies: trains conditions x environments x seeds from one file, and writes tables with intervals and figures.

docs/studies.md lists the files that a study leaves in its directory.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import shlex
import sys
import warnings
from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path

from dualhead.running.checkpoint import RunError, read_json, safe_name, write_json
from dualhead.running.config import RunConfig
from dualhead.running.results import Run, read_run
from dualhead.studies import tables
from dualhead.studies.commons_measures import measure_commons
from dualhead.studies.config import StudyConfig
from dualhead.studies.files import study_text
from dualhead.studies.measures import chosen_measures, measure, summarise, unknown_measures
from dualhead.studies.processes import folder_of, is_finished, run_missing

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PACKAGES = ("dualhead", "torch", "numpy", "gymnasium", "popgym", "minigrid")
"""Whose versions a study writes down, where they are installed."""


def read_study(name: str) -> StudyConfig:
    """A study by path or name.

    Raises:
        RunError: it cannot be read, or asks for what is not possible.
    """
    text = study_text(name)
    try:
        return StudyConfig(**tomllib.loads(text))
    except (tomllib.TOMLDecodeError, ValueError, TypeError) as error:
        raise RunError(f"{name}: {error}") from error


def run_study(name: str, *, out: str | None = None, jobs: int | None = None, modules: Sequence[str] = ()) -> Path:
    """Runs what is not finished yet, writes tables and figures, and prints the summary.

    Args:
        name: path or name of the study.
        out: its directory; None: runs/study-NAME.
        jobs: number of runs at a time; None: as many as the cores allow.
        modules: imported in the process of each run first.

    Returns:
        The directory.

    Raises:
        RunError: the study is not possible, its directory holds other runs, or some runs failed (the others finish).
        KeyboardInterrupt: Ctrl-C; the runs under way have saved checkpoints, and the same command resumes them.
    """
    study = read_study(name)
    if jobs is not None and jobs < 1:
        raise RunError(f"jobs: expected at least 1, got {jobs}")
    folder = Path(out) if out is not None else Path("runs") / f"study-{Path(name).stem}"
    try:
        planned = plan(study, folder)
    except ValueError as error:
        raise RunError(str(error)) from error
    is_complete = all(map(is_finished, planned.values()))
    if importlib.util.find_spec("matplotlib") is None:
        warnings.warn("there will be tables only: figures need pip install -e '.[plot]' in the checkout", stacklevel=2)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot write the study's directory {folder}: {error.strerror or error}") from error
    write_json(folder / "study.json", study.model_dump())
    if not is_complete:
        _write_versions(folder / "versions.json", shlex.join(["dualhead", "study", name]))
    with closing(run_missing(planned, jobs=jobs, modules=modules)) as done:
        first = next(done, None)
        # A warning only: another run may have the measure that this one lacks. A misspelt name shows early.
        for line in unknown_measures(study.measures, [_read(planned[first])]) if first else ():
            warnings.warn(f"measures: {line}", stacklevel=2)
        for _ in done:
            pass
    for path in _write_outcome(study, planned, folder):
        print(f"figure: {path}")
    return folder


def plan(study: StudyConfig, folder: Path) -> dict[str, RunConfig]:
    """Settings of all runs of a study in a folder, by their names on the terminal.

    If the study lists `environments`, each of them has its own folder there.

    Raises:
        RunError: two environments would share a folder.
    """
    planned = {}
    places = {env: folder / safe_name(env) if study.environments else folder for env in study.worlds}
    if len(set(places.values())) < len(places):
        raise RunError(f"environments: two of {', '.join(places)} would have the same folder; rename one")
    for env, place in places.items():
        for condition in study.conditions:
            for seed in study.seeds:
                label = f"{condition} seed {seed}"
                config = study.run(condition, seed, str(place / condition / f"seed{seed}"), env=env)
                planned[f"{env} {label}" if study.environments else label] = config
    return planned


def _write_versions(path: Path, command: str) -> None:
    """Adds the installed versions, unless the last call had the same ones."""
    found = {"command": command, "python": platform.python_version()}
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    before = (read_json(path) or {}).get("runs_were_made_with", [])
    if found not in before[-1:]:
        write_json(path, {"runs_were_made_with": [*before, found]})


def _write_outcome(study: StudyConfig, planned: dict[str, RunConfig], folder: Path) -> list[Path]:
    """Writes and prints the tables, draws the figures, and returns the paths of these."""
    runs = [_read(config) for config in planned.values()]
    commons = study.is_of_the_commons
    names = () if commons else chosen_measures(study, runs)
    measured = [measure_commons(study, run) if commons else measure(run, names) for run in runs]
    rows = summarise(measured)
    # The commons is the only environment of its studies, so their tables do not name it.
    without = ("environment",) if commons else ()
    tables.write_csv(folder / "results.csv", tables.results(study, runs, names), without=without)
    tables.write_csv(folder / "runs.csv", tables.every_seed(measured))
    tables.write_csv(folder / "summary.csv", rows, without=without)
    if commons:
        tables.print_commons_table(study, rows)
    else:
        tables.print_tables(study, measured, rows, names)
    # Figures need matplotlib, which is an extra: the tables come first.
    from dualhead.studies.figures import draw_figures

    return draw_figures(study, measured, names, folder)


def _read(config: RunConfig) -> Run:
    path = folder_of(config)
    try:
        return read_run(path, condition=path.parent.name)
    except RunError as error:
        raise RunError(f"{error}; remove this run, and the same command repeats it") from error
