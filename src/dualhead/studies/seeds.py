"""One run with several seeds, side by side: `dualhead train ENV --seeds 0 1 2 3`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from dualhead.errors import RunError, SettingsError
from dualhead.running.checkpoint import read_config, usual_run_dirs
from dualhead.running.config import RunConfig
from dualhead.running.results import interval, read_summary
from dualhead.studies.processes import differences, folder_of, run_missing
from dualhead.studies.tables import print_table, say


def train_seeds(config: RunConfig, seeds: Sequence[int], *, modules: Sequence[str] = ()) -> None:
    """Trains with each seed, in processes of one thread each unless `num_threads` says more, and prints a table.

    Each run lies where `dualhead train --seed` would put it. A run of these settings that is there is resumed, or left
    as it is where it is finished.

    Args:
        config: of all runs, but for the seed; without `run_dir`.
        seeds: different ones.
        modules: imported in each process first.

    Raises:
        SettingsError: the seeds are not possible, or do not go with a `run_dir`.
        RunError: some runs failed, after the others have finished and the table is printed.
        KeyboardInterrupt: Ctrl-C; the runs under way have saved checkpoints, and the same command resumes them.
    """
    if len(set(seeds)) < len(seeds):
        raise SettingsError([("seeds", f"expected different ones, got {' '.join(map(str, seeds))}")])
    if config.run_dir is not None:
        why = f"expected none with several seeds, whose runs lie in different directories, got {config.run_dir!r}"
        raise SettingsError([("run_dir", why)])
    given = config.model_dump() | {"num_threads": config.num_threads or 1}
    planned = {f"seed {seed}": _placed(RunConfig(**given | {"seed": seed})) for seed in seeds}
    for name, run in planned.items():
        print(f"{name}: {run.run_dir}", flush=True)
    try:
        for _ in run_missing(planned, modules=modules):
            pass
    except RunError:
        _print_outcome(planned)
        raise
    _print_outcome(planned)


def _placed(config: RunConfig) -> RunConfig:
    """The settings with the first usual directory that is free, or holds a run of the same settings."""
    for path in usual_run_dirs(config):
        if not (path / "config.json").exists() or not differences(config, read_config(path)):
            break
    return config.model_copy(update={"run_dir": str(path)})


def _print_outcome(planned: dict[str, RunConfig]) -> None:
    """The return of each finished run, and the mean over them."""
    returns = {name: _final_return(folder_of(config)) for name, config in planned.items()}
    known = [score for score in returns.values() if score is not None]
    lines = [[name, "–" if score is None else f"{score:.6g}"] for name, score in returns.items()]
    is_evaluated = all(config.eval_episodes for config in planned.values())
    what = "return of the final evaluation" if is_evaluated else "return of the last episodes of training"
    print_table("", ["", what], lines)
    if known:
        low, high = interval(known)
        bounds = "" if math.isnan(low) else f", 95% interval {low:.6g} to {high:.6g} (Student's t)"
        say(f"mean of {len(known)} seeds: {sum(known) / len(known):.6g}{bounds}")


def _final_return(folder: Path) -> float | None:
    """Mean return of a finished run; None for one that is not."""
    summary = read_summary(folder)
    if summary.get("stopped_early") is not False:
        return None
    return summary.get("evaluation", {}).get("mean_return", summary.get("metrics", {}).get("episode/mean_return"))
