"""The command line: train, eval, envs, report."""

from __future__ import annotations

import dataclasses
import json
import sys
import warnings
from collections.abc import Callable
from typing import Annotated, Any

import tyro

from dualhead.config import RunConfig, settings_error, tuned_settings
from dualhead.running.checkpoint import RunError
from dualhead.running.evaluation import EVALUATION_SEED, evaluate_run
from dualhead.running.report import write_report
from dualhead.running.study import copy_study, run_study
from dualhead.running.trainer import train
from dualhead.storage import CheckpointError
from dualhead.worlds.streams import UnavailableEnvironment, environment_ids


@dataclasses.dataclass(frozen=True)
class Eval:
    """Play the newest checkpoint of a run."""

    run: tyro.conf.Positional[str]
    """The run directory."""
    episodes: int = 20
    """Episodes to play."""
    seed: int = EVALUATION_SEED
    """Seed of the environments and of sampled actions."""
    sample: bool = False
    """Sample actions instead of taking the likeliest."""
    json: bool = False
    """Print mean_return, std_return, mean_length and episodes as JSON."""


@dataclasses.dataclass(frozen=True)
class Study:
    """Run a study: conditions x seeds, a table with intervals, figures. Finished runs are not repeated."""

    study: tyro.conf.Positional[str]
    """A TOML file, or one that comes with dualhead: norms, norms_small, level_flip, hidden_level."""
    out: str | None = None
    """Its directory; default runs/study-NAME."""
    jobs: int | None = None
    """Runs side by side, one thread each; default: as many as there are cores."""
    copy: str | None = None
    """Write the study's file there, to be changed, and run nothing."""


@dataclasses.dataclass(frozen=True)
class Envs:
    """List what can be trained here."""

    containing: tyro.conf.Positional[str] = ""
    """Only ids that contain this."""


@dataclasses.dataclass(frozen=True)
class Report:
    """Write runs as one HTML page with curves, settings and a replay; it needs no network."""

    runs: tyro.conf.Positional[tuple[str, ...]]
    """Run directories. Those that differ only in the seed are shown as one line with a band."""
    out: str | None = None
    """The page; default RUN/report.html, or report.html here for several runs."""
    replay: bool = True
    """Show an episode, where the environment renders."""


Command = RunConfig | Study | Eval | Report | Envs


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; errors that a user can mend come as one message and exit status 1 or 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
        try:
            command = _parse(arguments)
            return _RUN[type(command)](command)
        except (RunError, CheckpointError, UnavailableEnvironment) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130


def _parse(arguments: list[str]) -> Command:
    tuned = _tuned_defaults(arguments)
    command = (
        Annotated[RunConfig, tyro.conf.subcommand("train", default=tuned)]
        | Annotated[Study, tyro.conf.subcommand("study")]
        | Annotated[Eval, tyro.conf.subcommand("eval")]
        | Annotated[Envs, tyro.conf.subcommand("envs")]
        | Annotated[Report, tyro.conf.subcommand("report")]
    )
    before = settings_error.set(RunError)
    try:
        parsed: Any = tyro.cli(
            command,
            prog="dualhead",
            description=__doc__,
            args=arguments,
        )
        return parsed
    finally:
        settings_error.reset(before)


def _tuned_defaults(arguments: list[str]) -> Any:
    """RunConfig with the tuned settings of the environment that the arguments name, or no default."""
    if not arguments or arguments[0] != "train":
        return tyro.MISSING
    words = [word for word in arguments[1:] if not word.startswith("-")]
    env = next((word for word in words if tuned_settings(word)), None)
    return tyro.MISSING if env is None else RunConfig(env=env, **tuned_settings(env))


def _train(config: RunConfig) -> int:
    tuned = _flat(tuned_settings(config.env))
    chosen = _flat(config.model_dump())
    used = {name: value for name, value in tuned.items() if chosen[name] == value}
    if used:
        print(f"tuned for {config.env}: " + " ".join(f"{name}={value}" for name, value in used.items()))
    summary = train(config)
    if summary["stopped_early"]:
        print(f"stopped after {summary['steps']:,} steps; checkpoint: {summary['checkpoint']}")
        return 130
    print(f"{summary['steps']:,} steps in {summary['seconds']:.0f} s, {summary['steps_per_s']:,.0f} steps/s")
    if "evaluation" in summary:
        print(_describe(summary["evaluation"]))
    print(f"results: {summary['run_dir']}")
    return 0


def _eval(command: Eval) -> int:
    result = evaluate_run(
        command.run, episodes=command.episodes, seed=command.seed, deterministic=not command.sample
    ).summary()
    print(json.dumps(result) if command.json else _describe(result))
    return 0


def _study(command: Study) -> int:
    if command.copy is not None:
        copy_study(command.study, command.copy)
        print(f"{command.copy}: change it and run `dualhead study {command.copy}`")
        return 0
    print(f"results: {run_study(command.study, out=command.out, jobs=command.jobs)}")
    return 0


def _envs(command: Envs) -> int:
    for name in environment_ids():
        if command.containing in name:
            print(f"{name}  (tuned settings)" if tuned_settings(name) else name)
    return 0


def _report(command: Report) -> int:
    print(write_report(command.runs, command.out, replay=command.replay))
    return 0


def _describe(result: dict[str, float]) -> str:
    return (
        f"return {result['mean_return']:.2f} ± {result['std_return']:.2f} over {result['episodes']} episodes "
        f"(mean length {result['mean_length']:.0f})"
    )


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value) if isinstance(value, dict) else {name: value}
    return flat


_RUN: dict[type, Callable[[Any], int]] = {
    RunConfig: _train,
    Study: _study,
    Eval: _eval,
    Report: _report,
    Envs: _envs,
}

if __name__ == "__main__":
    sys.exit(main())
