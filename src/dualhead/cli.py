"""The command line: train, resume, eval, study, report, export, envs."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import json
import math
import os
import re
import select
import sys
import warnings
from collections.abc import Callable
from typing import Annotated, Any, TextIO

import tyro

from dualhead.config import (
    EVAL_EPISODES,
    SPEC,
    RunConfig,
    flat,
    merged,
    preset_settings,
    settings_error,
    tuned_settings,
)
from dualhead.running.checkpoint import RunError
from dualhead.running.evaluation import EVALUATION_SEED, evaluate_run
from dualhead.running.export import export
from dualhead.running.report import write_report
from dualhead.running.trainer import resume, train
from dualhead.running.video import record_video
from dualhead.storage import CheckpointError
from dualhead.studies.study import copy_study, run_study, study_names
from dualhead.worlds.streams import UnavailableEnvironment, environment_ids


@dataclasses.dataclass(frozen=True)
class Resume:
    """Go on with a run that was stopped, exactly where its newest checkpoint left it."""

    run: tyro.conf.Positional[str]
    """The run directory."""
    total_steps: int | None = None
    """Train to another end than was asked for at first; a learning rate that falls over the run falls to it."""


@dataclasses.dataclass(frozen=True)
class Eval:
    """Play the newest checkpoint of a run."""

    run: tyro.conf.Positional[str]
    """The run directory, or one of its checkpoint files."""
    episodes: int = EVAL_EPISODES
    """Episodes to play."""
    seed: int = EVALUATION_SEED
    """Seed of the environments and of sampled actions."""
    sample: bool = False
    """Sample actions instead of taking the likeliest."""
    json: bool = False
    """Print mean_return, its 95% interval, std_return, mean_length and the single returns and lengths as JSON."""
    video: str | None = None
    """Also film one episode: a file that ends in .mp4 or .gif."""


@dataclasses.dataclass(frozen=True)
class Export:
    """Write the policy of a run as an ONNX file, and a JSON file that says how to use it."""

    run: tyro.conf.Positional[str]
    """The run directory, or one of its checkpoint files."""
    out: str = "policy.onnx"
    """Where to; the JSON file takes the same name."""


@dataclasses.dataclass(frozen=True)
class Study:
    """Run a study: conditions x environments x seeds, tables with intervals, figures.

    Finished runs are not repeated."""

    study: Annotated[
        tyro.conf.Positional[str],
        tyro.conf.arg(help=f"A TOML file, or one that comes with dualhead: {', '.join(study_names())}."),
    ]
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


Command = RunConfig | Resume | Study | Eval | Export | Report | Envs


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; errors that a user can mend come as one message and exit status 1 or 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        try:
            return _main(arguments)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if _has_reader(sys.stdout):
            raise  # it was another pipe
        _drop_output()  # `dualhead envs | head` has seen enough
        return 141
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        print(f"error: cannot write the output: {error.strerror}", file=sys.stderr)
        _drop_output()
        return 1


def _drop_output() -> None:
    """What is still in the buffer must not fail once more at the exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _has_reader(stream: TextIO) -> bool:
    """Whether somebody is at the other end of a pipe; True where the system cannot tell."""
    if not hasattr(select, "poll"):  # Windows
        return True
    poll = select.poll()
    poll.register(stream, 0)
    return not any(event & select.POLLERR for _, event in poll.poll(0))


def _main(arguments: list[str]) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.showwarning = _warn
        try:
            command = _parse(arguments)
            return _RUN[type(command)](command)
        except (RunError, CheckpointError, UnavailableEnvironment) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130


def _warn(message: Warning | str, *_: Any, **__: Any) -> None:
    plain = re.sub(r"\x1b\[\d*m", "", str(message))  # Gymnasium colours its own
    print(f"warning: {plain.removeprefix('WARN: ')}", file=sys.stderr)


def _parse(arguments: list[str]) -> Command:
    preset = _preset_defaults(arguments)
    command = (
        Annotated[RunConfig, tyro.conf.subcommand("train", default=preset)]
        | Annotated[Resume, tyro.conf.subcommand("resume")]
        | Annotated[Study, tyro.conf.subcommand("study")]
        | Annotated[Eval, tyro.conf.subcommand("eval")]
        | Annotated[Export, tyro.conf.subcommand("export")]
        | Annotated[Report, tyro.conf.subcommand("report")]
        | Annotated[Envs, tyro.conf.subcommand("envs")]
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


def _preset_defaults(arguments: list[str]) -> Any:
    """RunConfig with the settings of the preset that the arguments ask for, or no default."""
    if not arguments or arguments[0] != "train":
        return tyro.MISSING
    words = [
        word
        for before, word in itertools.pairwise(arguments)
        if word[:1] != "-" and before.replace("_", "-") != "--run-dir"
    ]
    env = next((word for word in words if tuned_settings(word)), "")
    asked = _given("--preset", arguments)
    preset = asked[-1] if asked else "tuned" if env else "default"
    settings = preset_settings(preset, env)
    if not settings:
        return tyro.MISSING  # the parser says what is wrong with the preset, if anything is
    if _given("--policies", arguments)[-1:] == ["independent"]:
        # The tuned minibatch is of all agents together, more than a rollout of one.
        settings = merged(settings, {"ppo": {"batch_size": SPEC["ppo"]["batch_size"]}})
    config = RunConfig(env=env, **settings | {"preset": preset})
    return config if env else RunConfig.model_construct(**dict(config) | {"env": tyro.MISSING})


def _given(option: str, arguments: list[str]) -> list[str]:
    """Values of an option, as `--option value` or `--option=value`, in the order given."""
    return [
        word.removeprefix(f"{option}=")
        for before, word in itertools.pairwise(arguments)
        if before == option or word.startswith(f"{option}=")
    ]


def _train(config: RunConfig) -> int:
    print(_say_settings(config))
    return _tell(train(config))


def _say_settings(config: RunConfig) -> str:
    """Which settings come from where."""
    chosen, default = (flat(dict(of.model_dump())) for of in (config, RunConfig(env="")))
    preset = flat(preset_settings(config.preset, config.env))
    where = {
        "default": "defaults for any environment (docs/settings.md)",
        "tuned": f"tuned for {config.env}",
        "spec": "the specification's class (docs/spec.md)",
    }
    used = [name for name, value in preset.items() if chosen[name] == value and default[name] != value]
    given = [
        name
        for name, value in chosen.items()
        if value != preset.get(name, default[name]) and name not in ("env", "preset", "run_dir")
    ]

    def listed(names: list[str]) -> str:
        return " ".join(f"{name.rpartition('.')[2]}={chosen[name]}" for name in names)

    said = f"settings: {where[config.preset]}" + (f": {listed(used)}" if used else "")
    return said + (f"; given: {listed(given)}" if given else "")


def _resume(command: Resume) -> int:
    return _tell(resume(command.run, total_steps=command.total_steps))


def _tell(summary: dict[str, Any]) -> int:
    if summary["stopped_early"]:
        print(f"stopped after {summary['steps']:,} steps; checkpoint: {summary['checkpoint']}")
        print(f"go on with: dualhead resume {summary['run_dir']}")
        return 130
    print(f"{summary['steps']:,} steps in {summary['seconds']:.0f} s, {summary['steps_per_s']:,.0f} steps/s")
    if "evaluation" in summary:
        print(_describe(summary["evaluation"]))
    print(f"results: {summary['run_dir']}")
    return 0


def _eval(command: Eval) -> int:
    if command.seed < 0:
        raise RunError(f"seed: expected at least 0, got {command.seed}")
    deterministic = not command.sample
    # The video first: what is wrong with it shows at once.
    video = command.video and record_video(command.run, command.video, seed=command.seed, deterministic=deterministic)
    played = evaluate_run(command.run, episodes=command.episodes, seed=command.seed, deterministic=deterministic)
    result = played.summary()
    if command.json:
        numbers = {name: value if math.isfinite(value) else None for name, value in result.items()}
        print(json.dumps(numbers | played._asdict() | ({"video": str(video)} if video else {})))
        return 0
    print("returns " + " ".join(f"{value:.6g}" for value in played.returns))
    print(_describe(result))
    if video:
        print(f"video: {video}")
    return 0


def _export(command: Export) -> int:
    written = export(command.run, command.out)
    run, verified = written["run"], written["verified"]
    print(f"{command.out}: {written['memory']} policy of {run['env']} after {run['steps']:,} steps")
    if verified:
        print(
            f"checked: ONNX Runtime {verified['onnxruntime']} and the policy differ by at most "
            f"{verified['largest_difference']:.1g}"
        )
    else:
        print("not checked: ONNX Runtime is not installed (pip install onnxruntime)")
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
    interval = f"95% interval {result['ci95_low']:.2f} to {result['ci95_high']:.2f}, " if result["episodes"] > 1 else ""
    return (
        f"return {result['mean_return']:.2f} ± {result['std_return']:.2f} over {result['episodes']} episodes "
        f"({interval}mean length {result['mean_length']:.0f})"
    )


_RUN: dict[type, Callable[[Any], int]] = {
    RunConfig: _train,
    Resume: _resume,
    Study: _study,
    Eval: _eval,
    Export: _export,
    Report: _report,
    Envs: _envs,
}

if __name__ == "__main__":
    sys.exit(main())
