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
import math
import sys
from collections import Counter
from contextlib import closing
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from dualhead.config import RunConfig, StudyConfig
from dualhead.norms import guilt_outweighs_until, steps_until
from dualhead.running.checkpoint import RunError, read_config, read_json, write_json
from dualhead.running.processes import num_cores, run_in_processes
from dualhead.storage import write_bytes

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

RELAPSE_SHARE = 0.5
"""A relapse is the first time that more than this share of what is taken is the harmful resource."""
GROUPS = ("newcomers", "incumbents")
Key = tuple[str, int]
"""Condition and seed of a run."""


class Span(NamedTuple):
    """A phase of a run: its turns are those after `begin` until `end`; `level` is the one that it begins with."""

    name: str
    level: int | None
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
        taken = np.stack([self.column(f"{prefix}/taken/{kind}") for kind in self.config.commons.resources])
        ours = self.column(f"{prefix}/taken/{harmful}")
        with np.errstate(invalid="ignore", divide="ignore"):
            return ours / taken.sum(0)

    def column(self, name: str) -> NDArray[np.float64]:
        """[U] of one metric; NaN where it was not logged."""
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
    folder = _folder(config)
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


def _folder(config: RunConfig) -> Path:
    assert config.run_dir is not None
    return Path(config.run_dir)


def read_run(condition: str, seed: int, config: RunConfig) -> Run:
    """What a finished run logged.

    Raises:
        RunError: its `metrics.csv` cannot be read.
    """
    path = _folder(config) / "metrics.csv"
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        steps = np.array([int(row["steps"]) for row in rows])
        names = [name for name in rows[0] if name != "steps"]
        columns = {name: np.array([float(row[name] or "nan") for row in rows]) for name in names}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise RunError(f"cannot read {path}: {error}; remove its run, and the same command repeats it") from error
    return Run(condition, seed, config, steps // config.num_streams, columns)


def spans(config: RunConfig) -> list[Span]:
    """The phases of a run in turns; phases that repeat are one."""
    total = math.ceil(config.total_steps / config.num_streams)
    phases = config.commons.phases
    if config.commons.repeat_phases:
        return [Span("all phases", None, 0, total, punishes=True)]
    found, begin = [], 0
    modes = [phase.mode for phase in phases]
    for i, phase in enumerate(phases):
        end = total if i == len(phases) - 1 or phase.num_turns is None else min(begin + phase.num_turns, total)
        name = {"off": "no punishment", "fixed": "punishment", "voted": "votes"}[phase.mode]
        if modes.count(phase.mode) > 1:
            name += f" ({modes[: i + 1].count(phase.mode)})"
        if end > begin:
            found.append(Span(name, None if phase.mode == "off" else phase.level, begin, end, phase.mode != "off"))
        begin = end
    return found


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


def measures(study: StudyConfig, run: Run) -> dict[str, float]:
    """The numbers of one run that the summary is made of; what does not apply is left out.

    Shares of the harmful resource and rewards are means over the second half of a phase, when most of the learning
    that it causes is done.
    """
    found: dict[str, float] = {}
    phases = spans(run.config)
    for span in phases:
        late = second_half(run, span)
        in_phase = f", {span.name}" if len(phases) > 1 else ""
        of_groups = {group: run.share(study.harmful, group)[late] for group in GROUPS}
        found[f"{study.harmful} share{in_phase}"] = mean_of_known(run.share(study.harmful)[late])
        if not np.isnan(of_groups["newcomers"]).all():
            found |= {
                f"{study.harmful} share of {group}{in_phase}": mean_of_known(of_groups[group]) for group in GROUPS
            }
        found[f"reward{in_phase}"] = mean_of_known(run.column("rollout/task_reward")[late])
    found |= _relapse(study, run)
    return {name: value for name, value in found.items() if not np.isnan(value)}


def second_half(run: Run, span: Span | None = None) -> NDArray[np.bool_]:
    """[U] updates that end in the second half of a phase, or of the run."""
    begin, end = (0, int(run.turns[-1])) if span is None else (span.begin, span.end)
    return (run.turns > (begin + end) / 2) & (run.turns <= end)


def end_of_punishment(config: RunConfig) -> int | None:
    """Turns before the first phase without punishment that follows one with it; None where there is none."""
    return next((b.begin for a, b in itertools.pairwise(spans(config)) if a.punishes and not b.punishes), None)


def _relapse(study: StudyConfig, run: Run) -> dict[str, float]:
    """How long compliance outlived punishment, beside the closed form.

    Counted from the end of punishment to the end of the first rollout without any in which most of what was taken is
    harmful; infinite where there was none until the end of the run.
    """
    stop = end_of_punishment(run.config)
    after = run.turns - run.config.ppo.rollout_length >= (np.inf if stop is None else stop)
    if stop is None or not after.any():
        return {}
    found = {}
    groups = {"": run.share(study.harmful)} | {f", {group}": run.share(study.harmful, group) for group in GROUPS}
    if np.isnan(groups[", newcomers"][after]).all():
        groups = {"": groups[""]}
    for group, share in groups.items():
        if np.isnan(share[after]).all():
            continue
        relapsed = run.turns[after & (share > RELAPSE_SHARE)]
        found[f"turns to relapse{group}"] = float(relapsed[0] - stop) if len(relapsed) else np.inf
    strength = strength_at(study, run, stop)
    if strength is not None:
        found["turns by the closed form"] = closed_form(study, run.config, strength)
        found["norm strength at the end of punishment"] = strength
    return found


def strength_at(study: StudyConfig, run: Run, turn: int) -> float | None:
    """Mean strength of the norm against the harmful resource at the last update until a turn, if it was logged."""
    strengths = run.column(f"norms/strength/{study.harmful}")[run.turns <= turn]
    return float(strengths[-1]) if len(strengths) and not np.isnan(strengths[-1]) else None


def closed_form_turn(study: StudyConfig, run: Run) -> float | None:
    """Turn until which guilt outweighs the gain after punishment has ended; None where it never does."""
    stop = end_of_punishment(run.config)
    strength = None if stop is None else strength_at(study, run, stop)
    if stop is None or strength is None:
        return None
    lasts = closed_form(study, run.config, strength)
    return stop + lasts if lasts > 0.0 else None


def phases_repeat(runs: list[Run]) -> bool:
    """Whether they do in any run."""
    return any(run.config.commons.repeat_phases for run in runs)


def closed_form(study: StudyConfig, config: RunConfig, strength: float) -> float:
    """Turns without punishment for which guilt outweighs what taking the harmful resource gains over the best other."""
    values = config.commons.values
    others = [values[kind] for kind in config.commons.resources if kind != study.harmful]
    gap = values[study.harmful] - max(others, default=0.0)
    outweighs = guilt_outweighs_until(
        max(gap, 0.0),
        internalization_threshold=config.norms.internalization_threshold,
        intrinsic_scale=config.norms.intrinsic_scale,
    )
    return 0.0 if math.isinf(outweighs) else steps_until(strength, outweighs, decay_rate=config.norms.decay_rate)


def summarise(study: StudyConfig, runs: list[Run]) -> list[dict[str, Any]]:
    """A row per condition and measure: mean and 95% t-interval over the seeds that have it, smallest and largest."""
    rows = []
    for condition in study.conditions:
        of_condition = [measures(study, run) for run in runs if run.condition == condition]
        for name in dict.fromkeys(name for found in of_condition for name in found):
            values = np.array([found[name] for found in of_condition if name in found])
            low, high = interval(values)
            row = {
                "condition": condition,
                "measure": name,
                "mean": mean_of_known(values),
                "ci95_low": low,
                "ci95_high": high,
            }
            rows.append(row | {"min": float(values.min()), "max": float(values.max()), "seeds": len(values)})
    return rows


def interval(values: NDArray[np.float64]) -> tuple[float, float]:
    """95% interval of a mean by Student's t; NaN for one value, or where one is not finite."""
    if len(values) < 2 or not np.isfinite(values).all():
        return np.nan, np.nan
    mean = float(values.mean())
    half = float(stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values)))
    return mean - half, mean + half


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


def mean_of_known(values: NDArray[np.float64]) -> float:
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
