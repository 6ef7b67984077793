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
import io
import itertools
import json
import multiprocessing
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from dualhead.config import RunConfig, StudyConfig
from dualhead.norms import guilt_outweighs_until, steps_until
from dualhead.running.checkpoint import RunError, read_config, write_json
from dualhead.running.trainer import train
from dualhead.storage import write_bytes

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

RELAPSE_SHARE = 0.5
"""A relapse is the first time that more than this share of what is taken is the harmful resource."""


class Span(NamedTuple):
    """A phase of a run: turns begin .. end - 1 (the last one to the end of the run)."""

    name: str
    begin: int
    end: int
    punishes: bool


class Run(NamedTuple):
    """One finished run.

    Fields:
        turns: [U], at the end of each update's rollout.
        columns: metric name -> [U]; NaN where a row lacks it.
    """

    condition: str
    seed: int
    config: RunConfig
    turns: NDArray[np.int64]
    columns: dict[str, NDArray[np.float64]]

    def share(self, harmful: str, prefix: str = "commons") -> NDArray[np.float64]:
        """[U] share of the harmful resource among all that were taken; NaN where nothing was (or nobody was there)."""
        taken = np.stack([self._column(f"{prefix}/taken/{kind}") for kind in self.config.commons.resources])
        ours = self._column(f"{prefix}/taken/{harmful}")
        with np.errstate(invalid="ignore", divide="ignore"):
            return ours / taken.sum(0)

    def _column(self, name: str) -> NDArray[np.float64]:
        return self.columns.get(name, np.full(len(self.turns), np.nan))


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
            return (resources.files("dualhead") / "studies" / f"{name}.toml").read_text()
        return Path(name).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(
            f"no study {name!r}: expected a TOML file, or one of {', '.join(study_names())}; "
            f"`dualhead study norms --copy my.toml` writes one to change"
        ) from error


def copy_study(name: str, path: str) -> None:
    """Writes a study's file to a new place.

    Raises:
        RunError: no such study, or something is there already, or it cannot be written.
    """
    text = study_text(name)
    try:
        with open(path, "x") as file:
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
        jobs: runs side by side, of one thread each; None: as many as there are cores.

    Returns:
        The directory.

    Raises:
        RunError: the study is not possible, its directory holds other runs, or a run failed.
    """
    study = read_study(name)
    folder = Path(out) if out is not None else Path("runs") / f"study-{Path(name).stem}"
    wanted = {
        (condition, seed): study.run(condition, seed, str(folder / condition / f"seed{seed}"))
        for condition in study.conditions
        for seed in study.seeds
    }
    waiting = [key for key, config in wanted.items() if not _is_finished(config)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "study.json", study.model_dump())
    except OSError as error:
        raise RunError(f"cannot write the study's directory {folder}: {error.strerror or error}") from error
    num_done = len(wanted) - len(waiting)
    if num_done:
        print(f"{num_done} of {len(wanted)} runs are finished already", flush=True)
    failed = []
    for (condition, seed), problem in _in_parallel({key: wanted[key] for key in waiting}, jobs or os.cpu_count() or 1):
        num_done += 1
        failed += [f"{condition} seed {seed}: {problem}"] if problem else []
        print(f"{num_done}/{len(wanted)}  {condition} seed {seed}  {problem or 'done'}", flush=True)
    if failed:
        raise RunError(
            f"{len(failed)} of {len(wanted)} runs failed, the first is {failed[0]}; the same command repeats only those"
        )
    runs = [read_run(condition, seed, config) for (condition, seed), config in wanted.items()]
    write_results(folder / "results.csv", runs)
    rows = summarise(study, runs)
    _write_csv(folder / "summary.csv", rows)
    print_summary(study, rows)
    from dualhead.running.study_figures import draw_figures  # matplotlib is an extra

    for path in draw_figures(study, runs, folder):
        print(f"figure: {path}")
    return folder


def _is_finished(config: RunConfig) -> bool:
    """Whether a run is there and complete; one of other settings is refused, an unfinished one begins again."""
    assert config.run_dir is not None
    folder = Path(config.run_dir)
    if not (folder / "config.json").exists():
        return False
    if read_config(folder) != config:
        raise RunError(
            f"{folder} holds a run of other settings: the study was changed since; choose another --out, or remove it"
        )
    try:
        return not json.loads((folder / "summary.json").read_text())["stopped_early"]
    except (OSError, ValueError, KeyError):
        return False


def _in_parallel(wanted: dict[tuple[str, int], RunConfig], jobs: int) -> Iterator[tuple[tuple[str, int], str | None]]:
    """Runs each in a process of one thread; what is done as it is done, with the error it ended with."""
    if not wanted:
        return
    context = multiprocessing.get_context("spawn")
    with _one_thread(), ProcessPoolExecutor(min(jobs, len(wanted)), mp_context=context) as pool:
        futures = {pool.submit(_train_quietly, config): key for key, config in wanted.items()}
        try:
            for future in as_completed(futures):
                try:
                    yield futures[future], future.result()
                except Exception as error:  # a worker that died, or what nobody foresaw
                    yield futures[future], f"{type(error).__name__}: {error}"
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@contextmanager
def _one_thread() -> Iterator[None]:
    """Child processes begin with one thread for the libraries that read it from the environment."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


def _train_quietly(config: RunConfig) -> str | None:
    """In a worker: trains with one thread; the error as text, None where all went well."""
    try:
        summary = train(config.model_copy(update={"num_threads": 1}), show_progress=False)
    except (RunError, ValueError) as error:
        return str(error)
    return "stopped" if summary["stopped_early"] else None


def read_run(condition: str, seed: int, config: RunConfig) -> Run:
    """What a finished run logged."""
    assert config.run_dir is not None
    with (Path(config.run_dir) / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    steps = np.array([int(row["steps"]) for row in rows])
    names = [name for name in rows[0] if name != "steps"]
    columns = {name: np.array([float(row[name]) if row[name] else np.nan for row in rows]) for name in names}
    return Run(condition, seed, config, steps // config.num_streams, columns)


def spans(config: RunConfig) -> list[Span]:
    """The phases of a run in turns; phases that repeat are one."""
    total = config.total_steps // config.num_streams
    phases = config.commons.phases
    if config.commons.repeat_phases:
        return [Span("all phases", 0, total, punishes=True)]
    found, begin = [], 0
    for number, phase in enumerate(phases, start=1):
        end = total if phase.num_turns is None else min(begin + phase.num_turns, total)
        level = "" if phase.level is None or phase.mode == "off" else f" at level {phase.level}"
        what = {"off": "no punishment", "fixed": f"punishment{level}", "voted": f"votes{level}"}[phase.mode]
        if end > begin:
            found.append(Span(f"{number}. {what}", begin, end, punishes=phase.mode != "off"))
        begin = end
    return found


def write_results(path: Path, runs: list[Run]) -> None:
    """All updates of all runs as one tidy table."""
    names = list(dict.fromkeys(name for run in runs for name in run.columns))
    rows = []
    for run in runs:
        phases = spans(run.config)
        for i, turn in enumerate(run.turns.tolist()):
            phase = next((span.name for span in phases if span.begin < turn <= span.end), "")
            row: dict[str, Any] = {"condition": run.condition, "seed": run.seed}
            row |= {"steps": turn * run.config.num_streams, "turn": turn, "phase": phase}
            values = {name: run.columns[name][i] for name in names if name in run.columns}
            rows.append(row | {name: value for name, value in values.items() if not np.isnan(value)})
    _write_csv(path, rows, columns=["condition", "seed", "steps", "turn", "phase", *names])


def measures(study: StudyConfig, run: Run) -> dict[str, float]:
    """The numbers of one run that the summary is made of; what does not apply is left out.

    Shares and rewards are means over the second half of a phase, when most of the learning that it causes is done.
    Turns until relapse count from the end of punishment to the end of the first rollout with a share above one half;
    infinite where there was none.
    """
    found: dict[str, float] = {}
    share = run.share(study.harmful)
    for span in spans(run.config):
        late = (run.turns > (span.begin + span.end) / 2) & (run.turns <= span.end)
        if not late.any():
            continue
        found[f"share of {study.harmful}, late in {span.name}"] = _mean(share[late])
        for group in ("newcomers", "incumbents"):
            of_group = run.share(study.harmful, group)[late]
            if not np.isnan(of_group).all() and run.config.turnover.first_turn is not None:
                found[f"share of {study.harmful} among {group}, late in {span.name}"] = _mean(of_group)
        found[f"reward per turn, late in {span.name}"] = _mean(run.columns["rollout/task_reward"][late])
    return found | _relapse(study, run, share)


def _relapse(study: StudyConfig, run: Run, share: NDArray[np.float64]) -> dict[str, float]:
    """How long compliance outlived punishment, beside the closed form."""
    phases = spans(run.config)
    stop = next((b.begin for a, b in itertools.pairwise(phases) if a.punishes and not b.punishes), None)
    if stop is None:
        return {}
    groups = {"": share}
    if run.config.turnover.first_turn is not None:
        groups |= {f" among {group}": run.share(study.harmful, group) for group in ("newcomers", "incumbents")}
    found = {}
    for group, of_group in groups.items():
        relapsed = run.turns[(run.turns > stop) & (of_group > RELAPSE_SHARE)]
        found[f"turns from the end of punishment to relapse{group}"] = (
            float(relapsed[0] - stop) if len(relapsed) else np.inf
        )
    strength = run.columns.get(f"norms/strength/{study.harmful}")
    if strength is not None and (run.turns <= stop).any():
        at_stop = float(strength[run.turns <= stop][-1])
        found[f"strength of the norm against {study.harmful} at the end of punishment"] = at_stop
        found["turns that guilt outweighs the gain, by the closed form"] = closed_form(study, run.config, at_stop)
    return found


def closed_form(study: StudyConfig, config: RunConfig, strength: float) -> float:
    """Turns without punishment for which guilt outweighs what taking the harmful resource gains over the best other."""
    values = config.commons.values
    gap = values[study.harmful] - max(values[kind] for kind in config.commons.resources if kind != study.harmful)
    outweighs = guilt_outweighs_until(
        max(gap, 0.0),
        internalization_threshold=config.norms.internalization_threshold,
        intrinsic_scale=config.norms.intrinsic_scale,
    )
    return steps_until(strength, outweighs, decay_rate=config.norms.decay_rate)


def summarise(study: StudyConfig, runs: list[Run]) -> list[dict[str, Any]]:
    """A row per condition and measure: mean and 95% t-interval over seeds, smallest and largest."""
    rows = []
    for condition in study.conditions:
        of_condition = [measures(study, run) for run in runs if run.condition == condition]
        for name in dict.fromkeys(name for found in of_condition for name in found):
            values = np.array([found.get(name, np.nan) for found in of_condition])
            low, high = interval(values)
            rows.append(
                {
                    "condition": condition,
                    "measure": name,
                    "mean": _mean(values),
                    "ci95_low": low,
                    "ci95_high": high,
                    "min": float(np.nanmin(values)),
                    "max": float(np.nanmax(values)),
                    "seeds": len(values),
                }
            )
    return rows


def interval(values: NDArray[np.float64]) -> tuple[float, float]:
    """95% interval of a mean by Student's t; NaN for one value, or where one is not finite."""
    if len(values) < 2 or not np.isfinite(values).all():
        return np.nan, np.nan
    error = stats.sem(values)
    if error == 0.0:
        return float(values[0]), float(values[0])
    low, high = stats.t.interval(0.95, len(values) - 1, loc=values.mean(), scale=error)
    return float(low), float(high)


def print_summary(study: StudyConfig, rows: list[dict[str, Any]]) -> None:
    """The summary as a table: measures down, conditions across."""
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"{study.title} (mean over {len(study.seeds)} seeds, 95% interval)".lstrip(), title_justify="left"
    )
    table.add_column("")
    for condition in study.conditions:
        table.add_column(condition, justify="right")
    by_cell = {(row["measure"], row["condition"]): row for row in rows}
    for name in dict.fromkeys(row["measure"] for row in rows):
        table.add_row(name, *(_cell(by_cell.get((name, condition))) for condition in study.conditions))
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "–"
    if np.isinf(row["max"]):
        return "never" if np.isinf(row["min"]) else f"{row['min']:.0f} to never"
    digits = 0 if abs(row["mean"]) >= 20 else 2
    mean = f"{row['mean']:.{digits}f}"
    if np.isnan(row["ci95_low"]):
        return mean
    return f"{mean} [{row['ci95_low']:.{digits}f}, {row['ci95_high']:.{digits}f}]"


def _mean(values: NDArray[np.float64]) -> float:
    """Mean of what is there; NaN where nothing is."""
    return float(np.nanmean(values)) if not np.isnan(values).all() else float("nan")


def _write_csv(path: Path, rows: list[dict[str, Any]], *, columns: list[str] | None = None) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns or list(rows[0]), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    try:
        write_bytes(path, text.getvalue().encode())
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}") from error
