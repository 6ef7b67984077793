"""A study: conditions x seeds from one file; runs in parallel, a table with intervals, figures.

STUDY/                    --out, default runs/study-NAME
  study.json              what was asked for
  CONDITION/seedN/        a run like any other
  results.csv             every update of every run: condition, seed, steps, turn, phase, metrics
  summary.csv             a row per condition and measure: mean, 95% interval, seeds
  overview.png, details.png
"""

from __future__ import annotations

import csv
import importlib.util
import io
import sys
import warnings
from collections import Counter
from contextlib import closing
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from dualhead.config import RunConfig, StudyConfig
from dualhead.running.checkpoint import RunError, read_config, read_json, write_json
from dualhead.running.machine import num_cores
from dualhead.running.processes import run_in_processes
from dualhead.running.study_measures import GROUPS, Run, read_run, spans, summarise
from dualhead.storage import write_bytes

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Key = tuple[str, int]
"""Condition and seed of a run."""


def study_names() -> list[str]:
    """Studies that come with the package."""
    folder = resources.files("dualhead") / "studies"
    return sorted(file.name.removesuffix(".toml") for file in folder.iterdir() if file.name.endswith(".toml"))


def study_text(name: str) -> str:
    """The file of a study: a path, or the name of one that comes with the package.

    Raises:
        RunError: there is none.
    """
    try:
        if name in study_names():
            return (resources.files("dualhead") / "studies" / f"{name}.toml").read_text(encoding="utf-8")
        return Path(name).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise RunError(
            f"no study {name!r}: expected a TOML file, or one of {', '.join(study_names())}; "
            f"`dualhead study norms --copy my.toml` writes one to change"
        ) from error
    except OSError as error:
        raise RunError(f"cannot read the study {name}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise RunError(f"{name} is no TOML file: {error}") from error


def copy_study(name: str, path: str) -> None:
    """Writes a study's file to a new place.

    Raises:
        RunError: no such study, or something is there already, or it cannot be written.
    """
    text = study_text(name)
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise RunError(f"{path} is there already: choose another name") from error
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}") from error


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


def run_study(name: str, *, out: str | None = None, jobs: int | None = None) -> Path:
    """Runs what is not finished yet, then writes tables and figures and prints the summary.

    Args:
        name: path or name of the study.
        out: its directory; None: runs/study-NAME.
        jobs: runs side by side; None: as many as there are cores for.

    Returns:
        The directory.

    Raises:
        RunError: the study is not possible, its directory holds other runs, or some runs failed (the others finish).
        KeyboardInterrupt: Ctrl-C; the runs at hand have saved checkpoints, and the same command goes on with them.
    """
    study = read_study(name)
    if jobs is not None and jobs < 1:
        raise RunError(f"jobs: expected at least 1, got {jobs}")
    folder = Path(out) if out is not None else Path("runs") / f"study-{Path(name).stem}"
    wanted = {
        (condition, seed): study.run(condition, seed, str(folder / condition / f"seed{seed}"))
        for condition in study.conditions
        for seed in study.seeds
    }
    missing = {key: config for key, config in wanted.items() if not _is_finished(config)}
    if importlib.util.find_spec("matplotlib") is None:
        warnings.warn("there will be tables only: figures need pip install 'dualhead[plot]'", stacklevel=2)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot write the study's directory {folder}: {error.strerror or error}") from error
    write_json(folder / "study.json", study.model_dump())
    _run_missing(wanted, missing, jobs)
    runs = [read_run(condition, seed, config) for (condition, seed), config in wanted.items()]
    write_results(folder / "results.csv", study, runs)
    rows = summarise(study, runs)
    _write_csv(folder / "summary.csv", rows)
    print_summary(study, rows)
    from dualhead.running.study_figures import draw_figures  # matplotlib is an extra

    for path in draw_figures(study, runs, folder):
        print(f"figure: {path}")
    return folder


def _run_missing(wanted: dict[Key, RunConfig], missing: dict[Key, RunConfig], jobs: int | None) -> None:
    """Runs what is missing, with a line as each run ends.

    Raises:
        RunError: some failed; the message names them.
    """
    num_done = len(wanted) - len(missing)
    if num_done:
        print(f"{num_done} of {len(wanted)} runs are finished already", flush=True)
    failed = []
    threads = max(config.num_threads or 1 for config in wanted.values())
    try:
        jobs = jobs or max(1, num_cores() // threads)
        with closing(run_in_processes(missing, jobs=jobs, label=_label)) as outcomes:
            for key, problem, seconds in outcomes:
                num_done += 1
                if problem is not None:
                    failed.append(f"{_label(key)}: {problem}")
                ended = f"done in {seconds:.0f} s" if problem is None else f"failed after {seconds:.0f} s: {problem}"
                print(f"[{num_done}/{len(wanted)}] {_label(key)} {ended}", flush=True)
    except KeyboardInterrupt:
        whole = sum(_is_finished(config) for config in wanted.values())
        print(f"{whole} of {len(wanted)} runs are finished; the same command goes on", file=sys.stderr)
        raise
    if failed:
        lines = "\n  ".join(failed)
        raise RunError(
            f"{len(failed)} of {len(wanted)} runs are missing; the same command goes on with them\n  {lines}"
        )


def _label(key: Key) -> str:
    return f"{key[0]} seed {key[1]}"


def _is_finished(config: RunConfig) -> bool:
    """Whether a run is there and complete.

    Raises:
        RunError: one of other settings is there.
    """
    assert config.run_dir is not None
    folder = Path(config.run_dir)
    if not (folder / "config.json").exists():
        return False
    there = read_config(folder).model_dump(exclude={"run_dir"})  # a study may be moved
    settings = config.model_dump(exclude={"run_dir"})
    if there != settings:
        names = ", ".join(name for name in settings if there[name] != settings[name])
        raise RunError(
            f"{folder} holds a run of other settings ({names}): the study was changed since; choose another --out, or "
            f"remove it"
        )
    summary = read_json(folder / "summary.json")
    return summary is not None and summary.get("stopped_early") is False


def write_results(path: Path, study: StudyConfig, runs: list[Run]) -> None:
    """All updates of all runs as one tidy table."""
    rows: list[dict[str, Any]] = []
    names: dict[str, None] = {}
    for run in runs:
        shares = {
            f"{prefix}/share/{study.harmful}": run.share(study.harmful, prefix) for prefix in ("commons", *GROUPS)
        }
        columns = {name: column for name, column in (shares | run.columns).items() if not np.isnan(column).all()}
        names |= dict.fromkeys(columns)
        phases = spans(run.config)
        for i, turn in enumerate(run.turns.tolist()):
            # Of a rollout in which the phase changes: the one that it ends in.
            phase = next((span.name for span in phases if span.begin < turn <= span.end), "")
            row: dict[str, Any] = {"condition": run.condition, "seed": run.seed}
            row |= {"steps": turn * run.config.num_streams, "turn": turn, "phase": phase}
            rows.append(row | {name: column[i] for name, column in columns.items() if not np.isnan(column[i])})
    _write_csv(path, rows, columns=["condition", "seed", "steps", "turn", "phase", *names])


def print_summary(study: StudyConfig, rows: list[dict[str, Any]]) -> None:
    """The summary as a table: measures down, conditions across."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    many = len(study.seeds)
    seeds = f"mean of {many} seeds ± half of its 95% interval" if many > 1 else "one seed"
    caption = f"Shares (of all that is taken) and rewards (per agent and turn): second half of a phase; {seeds}."
    if any(row["measure"].startswith("turns to relapse") for row in rows):
        caption += (
            f" Relapse: turns without punishment until more than half of what is taken is {study.harmful}."
            f" Closed form: turns for which guilt outweighs what {study.harmful} gains; then relapse must be learned."
        )
    table = Table(title=study.title or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", overflow="fold")
    for condition in study.conditions:
        table.add_column(Text(condition), justify="right", overflow="fold")
    by_cell = {(row["measure"], row["condition"]): row for row in rows}
    num_measures = Counter(row["condition"] for row in rows)  # the fullest condition has the order of all
    for name in dict.fromkeys(row["measure"] for row in sorted(rows, key=lambda row: -num_measures[row["condition"]])):
        cells = [_cell(by_cell.get((name, condition))) for condition in study.conditions]
        table.add_row(Text(name), *(Text(cell) for cell in cells))
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    console.print(Text(caption))


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "–"
    if np.isinf(row["max"]):
        return "never" if np.isinf(row["min"]) else f"{row['min']:.0f} to never"
    half = row["ci95_high"] - row["mean"]
    digits = 0 if row["measure"].startswith("turns") else 2
    mean = f"{row['mean']:.{digits}f}"
    return mean if np.isnan(half) else f"{mean} ± {half:.{digits}f}"


def _write_csv(path: Path, rows: list[dict[str, Any]], *, columns: list[str] | None = None) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns or list(rows[0]), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    try:
        write_bytes(path, text.getvalue().encode())
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}") from error
