"""The command line: one function for each command; tyro makes its options from the signature and from the settings."""

import errno
import importlib.metadata
import io
import json
import math
import os
import re
import select
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import MappingProxyType, NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, TypedDict, Union, get_args, get_origin

import tyro
from tyro.conf import OmitArgPrefixes, Positional, UseAppendAction, arg
from tyro.constructors import PrimitiveConstructorSpec

from dualhead.config import SEED_LIMIT, Config, NetworkConfig, flat, merged
from dualhead.errors import CheckpointError, RunError, SettingsError, UnavailableEnvironment
from dualhead.running.config import (
    EVAL_EPISODES,
    EVALUATION_SEED,
    RunConfig,
    default_settings,
    planned,
    preset_settings,
    tuned_settings,
    usual_preset,
)
from dualhead.running.config_file import combined, config_from, read_settings
from dualhead.running.parts import find_part, import_module
from dualhead.studies.files import copy_study, study_names
from dualhead.worlds.registry import WORLDS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# Modules that load torch are imported by the commands that need them: `--help` is quick.

Modules = Annotated[
    tuple[str, ...],
    arg(
        name="import",
        metavar="MODULE",
        help="Import a module of your own first, for example one that registers environments or worlds. Repeatable.",
    ),
    UseAppendAction,
]
ConfigFile = Annotated[
    str | None,
    arg(
        name="config",
        metavar="FILE",
        help="Settings below those that are given here: the config.json of another run, YAML or TOML.",
    ),
]
Trust = Annotated[bool, arg(help="Import what the run's files name. They can then do anything that you can.")]
Run = Positional[Annotated[str, arg(metavar="RUN", help="The run directory.")]]
RunOrCheckpoint = Positional[Annotated[str, arg(metavar="RUN", help="The run directory, or a checkpoint file of it.")]]


@dataclass(frozen=True)
class OwnParts:
    """What a run's files name and never import by themselves."""

    encoder: Annotated[str | None, arg(metavar="MODULE:NAME", help="The run's own encoder, where it has one.")] = None
    memory: Annotated[str | None, arg(metavar="MODULE:NAME", help="The run's own memory, where it has one.")] = None
    modules: Modules = ()
    trust: Trust = False

    def found(self, *runs: str) -> dict[str, Any]:
        """The parts, imported, and with `--trust` also what the runs name."""
        named = {part: getattr(self, part) for part in ("encoder", "memory")}
        if self.trust:
            from dualhead.running.checkpoint import read_config
            from dualhead.running.playing import run_directory
            from dualhead.running.trust import trust

            for folder in map(run_directory, runs):
                trust(folder)
                config = read_config(folder)
                named = {part: name or getattr(config, part) for part, name in named.items()}
        return {part: find_part(name, what=f"--{part}") for part, name in named.items()}


Own = Annotated[OwnParts, arg(name="")]


class _Asked(NamedTuple):
    """What a command line of `train` says."""

    env: str | None
    settings: dict[str, Any]
    config: str | None
    seeds: tuple[int, ...] | None
    trust: bool
    modules: tuple[str, ...]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; errors that a user can mend give one message and exit status 1 or 2."""
    _mend_standard_streams()
    try:
        try:
            return _main(sys.argv[1:] if arguments is None else list(arguments))
        finally:
            sys.stdout.flush()
    except OSError as error:
        is_unread = error.errno == errno.EPIPE and not _has_reader()
        if not is_unread and error.errno != errno.ENOSPC:
            raise
        # What is left in the buffer must not fail again at the exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if is_unread:
            return 141  # `dualhead envs | head` has seen enough
        print(f"error: cannot write the output: {error.strerror}", file=sys.stderr)
        return 1


def _mend_standard_streams() -> None:
    """Opens those that were closed at the start, and lets any encoding print any character, as an escape at worst.

    A file that is opened later would take the place of a closed stream, and what libraries print would end in it.
    """
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            stream = open(os.devnull, "r" if name == "stdin" else "w")  # noqa: SIM115  # open until the process ends
            os.set_inheritable(stream.fileno(), True)  # the processes of a study need them too
            setattr(sys, name, stream)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _has_reader() -> bool:
    """Whether something reads standard output: another pipe broke then. True where the system cannot tell."""
    if not hasattr(select, "poll"):  # Windows
        return True
    poll = select.poll()
    poll.register(sys.stdout, 0)
    return not any(event & select.POLLERR for _, event in poll.poll(0))


def _main(arguments: list[str]) -> int:
    version = f"dualhead {importlib.metadata.version('dualhead')}"
    if arguments == ["--version"]:
        print(version)
        return 0
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.showwarning = _warn
        try:
            # Worlds bring options: they must be registered before the other options are read.
            tyro.cli(_import, args=arguments, add_help=False, return_unknown_args=True)
            is_training, file = arguments[:1] == ["train"], dict[str, Any]()
            if is_training:
                file, _ = tyro.cli(_file, args=arguments[1:], add_help=False, return_unknown_args=True)
            named = [world.settings for name, world in WORLDS.items() if name in (*arguments, file.get("env"))]
            if is_training:
                words = [word for word in arguments[1:] if word not in ("-h", "--help")]
                found = _read_train(words, named, file=file)
                if len(words) < len(arguments) - 1:
                    _show_help_of_train(found, named, file=file)
                if found is not None:
                    return _train(found)
            return tyro.extras.subcommand_cli_from_dict(
                {
                    "train": _reader(named, file=file),  # says what is wrong
                    "resume": resume,
                    "eval": evaluate,
                    "study": study,
                    "report": report,
                    "export": export,
                    "envs": envs,
                },
                args=arguments,
                prog="dualhead",
                description=f"Recurrent PPO: train agents that remember. This is {version}.",
            )
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        except (RunError, SettingsError, CheckpointError, UnavailableEnvironment) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1


def _import(modules: Modules = ()) -> None:
    for module in modules:
        import_module(module, what="--import")


def _file(config: ConfigFile = None) -> dict[str, Any]:
    """The settings in the file of `train --config`."""
    return {} if config is None else read_settings(config)


def _warn(message: Warning | str, *_: Any, **__: Any) -> None:
    plain = re.sub(r"\x1b\[\d*m", "", str(message))  # Gymnasium colours its own
    with suppress(OSError):  # the disk is full: the run goes on
        print(f"warning: {plain.removeprefix('WARN: ')}", file=sys.stderr)


_OF_AGENTS = ["world", "policies", "enforce_norms", "norms", "turnover"]
"""Only for worlds of several agents, or worlds that give events."""


def _spec(metavar: str, read: Callable[[str], Any], write: Callable[[Any], str]) -> PrimitiveConstructorSpec[Any]:
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda words: read(words[0]),
        is_instance=lambda _: True,
        str_from_instance=lambda value: [write(value)],
    )


_INT = _spec("INT", lambda word: float(word) if "e" in word.lower() else int(word), str)  # 1e6 is a whole number too
_JSON = _spec("JSON", json.loads, json.dumps)


def _arguments(words: Sequence[str]) -> dict[str, Any]:
    """Arguments of an environment from `KEY=VALUE`: TOML values, and what is none is text."""
    given = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not name.isidentifier() or not equals:
            raise ValueError(f"expected KEY=VALUE, such as size=9, got {word!r}")
        try:
            (value,) = tomllib.loads(f"value = {text}").values()
            given[name] = json.loads(json.dumps(value, allow_nan=False))
        except (ValueError, TypeError):  # a date, or no TOML
            given[name] = text
    return given


_ARGUMENTS = PrimitiveConstructorSpec[Any](
    nargs="*",
    metavar="[KEY=VALUE ...]",
    instance_from_str=_arguments,
    is_instance=lambda _: True,
    str_from_instance=lambda given: [f"{name}={json.dumps(value)}" for name, value in given.items()],
)


def _is_plain(kind: Any, *, lists: tuple[type, ...] = (tuple, list)) -> bool:
    """Whether tyro reads it from words: scalars, choices, lists of these. Anything else is given as JSON."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _is_plain(parts[0], lists=lists)
    if origin in (Union, UnionType) or origin in lists:
        return all(_is_plain(part, lists=() if origin in lists else lists) for part in parts)
    return origin is Literal or kind in (int, float, str, bool, NoneType, ...)


def _options(*classes: type[Config], hidden: Iterable[str] = (), worlds: Sequence[type[Config]] = ()) -> Any:
    """A TypedDict of the settings that may be given, none of them required.

    Args:
        classes: of the settings.
        hidden: fields without an option.
        worlds: classes that the field `world` may have.
    """
    kinds: dict[str, Any] = {}
    for name, field in [field for settings in classes for field in settings.model_fields.items()]:
        kind: Any = field.annotation
        if name in hidden:
            continue
        if isinstance(kind, type) and issubclass(kind, Config):
            kind = _options(*(worlds if name == "world" else [kind]))
            if name in ("network", "ppo"):
                kind = OmitArgPrefixes[kind]  # type: ignore[misc]  # `--hidden-size`, not `--network.hidden-size`
        elif field is NetworkConfig.model_fields["memory"]:
            kind = str  # one of ours, or MODULE:NAME
        elif field is RunConfig.model_fields["env_args"]:
            kind = Annotated[object, _ARGUMENTS]
        elif not _is_plain(kind):
            kind = Annotated[object, _JSON]
        elif kind is int:
            kind = Annotated[kind, _INT]
        kinds[name] = Annotated[kind, arg(help=field.description)]
    return TypedDict("Settings", kinds, total=False)  # type: ignore[operator]


def _read_train(words: Sequence[str], named: Sequence[type[Config]], *, file: dict[str, Any]) -> _Asked | None:
    """What was given; None for wrong usage."""
    # Behind a list ENV is taken for an element of it, `--head-sizes 6 6 ENV --seed 1`: try each word as ENV.
    places = [place for place, word in enumerate(words) if re.match(r"[^\W\d]", word)]
    for order in [words, *([words[place], *words[:place], *words[place + 1 :]] for place in reversed(places))]:
        with suppress(SystemExit):
            return tyro.cli(_reader(named, file=file), args=order, console_outputs=False)
    return None


def _show_help_of_train(found: _Asked | None, named: Sequence[type[Config]], *, file: dict[str, Any]) -> None:
    """Shows the settings of the environment that was found, if one was; and exits."""
    given = _over(found) if found else {}
    if found and found.config:
        given = combined(found.config, given)
    env = given.get("env", "")
    preset, independent = given.get("preset", usual_preset(env)), given.get("policies") == "independent"
    defaults = merged(default_settings(env), preset_settings(preset, env, independent=independent))
    if found and found.config:
        defaults = planned(**given).model_dump()
    hidden = [] if env in WORLDS else _OF_AGENTS if env and ":" not in env else ["world"]
    shown = _reader(named, hidden=hidden, defaults=defaults | {"preset": preset}, file=file)
    tyro.cli(shown, args=["--help"], prog="dualhead train")


def _reader(
    worlds: Sequence[type[Config]],
    *,
    hidden: Iterable[str] = (),
    defaults: dict[str, Any] | None = None,
    file: Mapping[str, Any] = MappingProxyType({}),
) -> Callable[..., _Asked]:
    """`train` as a function for tyro, which returns what was given. A file may name the environment."""
    hidden = ("env", "env_from", "learning_rate_from", "memory", "wrappers", *hidden)
    settings_of_a_run = _options(RunConfig, hidden=hidden, worlds=worlds)
    about_env, about_wrappers = (RunConfig.model_fields[name].description for name in ("env", "wrappers"))
    shown = {name: value for name, value in (defaults or {}).items() if name not in hidden} or tyro.MISSING

    def train(
        env: Positional[Annotated[str | None, arg(metavar="ENV", help=about_env)]] = None if file else tyro.MISSING,
        settings: Annotated[settings_of_a_run, arg(name="")] = shown,  # type: ignore[valid-type]
        seeds: Annotated[
            tuple[int, ...] | None,
            arg(help="Train once with each, side by side, one thread each, as many at a time as there are cores."),
        ] = None,
        config: ConfigFile = None,
        trust: Trust = False,
        modules: Modules = (),
        wrappers: Annotated[tuple[str, ...], arg(metavar="MODULE:NAME", help=about_wrappers), UseAppendAction] = (),
    ) -> _Asked:
        """Train an agent. `dualhead train ENV --help` shows the settings of an environment."""
        given = settings | ({"wrappers": wrappers} if wrappers else {})
        return _Asked(env, given, config, seeds, trust, modules)

    return train


def _over(asked: _Asked) -> dict[str, Any]:
    """The settings that were given, over those of a file or of a preset; nested as RunConfig is."""
    settings = {name: value for name, value in asked.settings.items() if value != {}}
    settings |= {} if asked.env is None else {"env": asked.env}
    # One option for both: a core of ours by its name, or one of the user's own as MODULE:NAME.
    if memory := settings.get("network", {}).get("memory"):
        settings["memory"] = memory if ":" in memory else None
        if ":" in memory:
            del settings["network"]["memory"]
    return settings


def _train(asked: _Asked) -> int:
    settings = _over(asked)
    if asked.seeds == ():
        raise SettingsError([("seeds", "expected numbers, such as --seeds 0 1 2, got none")])
    if asked.seeds and "seed" in settings:
        raise SettingsError([("seed", "expected --seeds alone, got --seed as well")])
    if asked.config is None:
        from dualhead.running.environment import world_of

        config = planned(**settings | world_of(settings["env"], settings))
    else:
        if asked.trust:
            from dualhead.running.trust import trust

            trust(asked.config)
        config = config_from(asked.config, settings)
    print(_describe_settings(config))
    if asked.seeds:
        from dualhead.studies.seeds import train_seeds

        train_seeds(config, asked.seeds, modules=asked.modules)
        return 0
    from dualhead.running.trainer import train

    return _describe_run(train(config).summary)


def _describe_settings(config: RunConfig) -> str:
    """Which settings come from where."""
    chosen, default = flat(config.model_dump()), flat(default_settings(config.env))
    preset = flat(preset_settings(config.preset, config.env, independent=config.policies == "independent"))
    where = {
        "default": "defaults for any environment (docs/settings.md)",
        "tuned": f"tuned for {config.env}",
        "spec": "the specification's class (docs/spec.md)",
    }
    used = [name for name, value in preset.items() if chosen[name] == value and default[name] != value]
    given = [
        name
        for name, value in chosen.items()
        if value != preset.get(name, default.get(name)) and name not in ("env", "preset", "run_dir")
    ]
    parts = [f"settings: {where[config.preset]}", *(["; given"] if given else [])]
    for names, at in ((used, 0), (given, -1)):
        if names:
            parts[at] += ": " + " ".join(f"{name.rpartition('.')[2]}={chosen[name]}" for name in names)
    return "".join(parts)


def resume(run: Run, own: Own, total_steps: int | None = None) -> int:
    """Resume a run that was stopped, exactly where its newest checkpoint left it.

    Args:
        total_steps: New end of the run. A learning rate that falls over the run falls to the new end.
    """
    from dualhead.running.trainer import resume

    return _describe_run(resume(run, total_steps=total_steps, **own.found(run)).summary)


def _describe_run(summary: dict[str, Any]) -> int:
    if summary["stopped_early"]:
        print(f"stopped after {summary['steps']:,} steps; checkpoint: {summary['checkpoint']}")
        print(f"go on with: dualhead resume {summary['run_dir']}")
        return 130
    print(f"{summary['steps']:,} steps in {summary['seconds']:.0f} s, {summary['steps_per_s']:,.0f} steps/s")
    if "evaluation" in summary:
        print(_describe_returns(summary["evaluation"]))
    print(f"results: {summary['run_dir']}")
    return 0


def evaluate(
    run: RunOrCheckpoint,
    own: Own,
    episodes: int = EVAL_EPISODES,
    seed: int = EVALUATION_SEED,
    sample: bool = False,
    json_: Annotated[bool, arg(name="json")] = False,
    video: str | None = None,
    render: bool = False,
) -> int:
    """Play the newest checkpoint of a run.

    Args:
        episodes: How many to play.
        seed: Of the environments and of sampled actions.
        sample: Sample actions instead of taking the likeliest.
        json_: Print mean, 95% interval, deviation, mean length, and every return and length as JSON; also by agent and
            for the team.
        video: Also film one episode into this file, .mp4 or .gif.
        render: Show the episodes in a window, one after the other; needs a screen.
    """
    if not 0 <= seed < SEED_LIMIT:
        raise RunError(f"seed: expected at least 0 and less than 2**64, got {seed}")
    from dualhead.running.evaluation import evaluate, scores
    from dualhead.running.video import record_video

    how = {"seed": seed, "deterministic": not sample, **own.found(run)}
    # The video first: what is wrong with it shows at once.
    filmed = video and str(record_video(run, video, **how))
    played = evaluate(run, episodes=episodes, render=render, **how)
    result = played.summary()
    by_agent = {name: scores(returns) | {"returns": returns} for name, returns in played.agents.items()}
    team = scores(played.team) | {"returns": played.team}
    if json_:
        numbers = result | {"returns": played.returns, "lengths": played.lengths}
        numbers |= {"agents": by_agent, "team": team} if by_agent else {}
        print(json.dumps(_without_nan(numbers | ({"video": filmed} if filmed else {}))))
        return 0
    print("returns " + " ".join(f"{value:.6g}" for value in played.returns))
    print(_describe_returns(result))
    if by_agent:
        print(_table_of_agents([*by_agent.items(), ("team", team)]))
    if filmed:
        print(f"video: {filmed}")
    return 0


def _without_nan(value: Any) -> Any:
    """For JSON, which has no NaN: None in its place."""
    if isinstance(value, dict):
        return {name: _without_nan(part) for name, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _table_of_agents(rows: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """A line for each agent, and for the team."""
    cells = [("agent", "return", "95% interval", "deviation", "episodes")]
    for name, of in rows:
        ends = f"{of['ci95_low']:.2f} to {of['ci95_high']:.2f}" if len(of["returns"]) > 1 else "-"
        cells.append((name, f"{of['mean_return']:.2f}", ends, f"{of['std_return']:.2f}", str(len(of["returns"]))))
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join(
        f"{name:<{widths[0]}}" + "".join(f"  {cell:>{width}}" for cell, width in zip(numbers, widths[1:]))
        for name, *numbers in cells
    )


def _describe_returns(result: dict[str, float]) -> str:
    interval = f"95% interval {result['ci95_low']:.2f} to {result['ci95_high']:.2f}, " if result["episodes"] > 1 else ""
    return (
        f"return {result['mean_return']:.2f} over {result['episodes']} episodes "
        f"({interval}deviation {result['std_return']:.2f}, mean length {result['mean_length']:.0f})"
    )


def study(
    study: Positional[
        Annotated[str, arg(help=f"A TOML file, or one that comes with dualhead: {', '.join(study_names())}.")]
    ],
    out: str | None = None,
    jobs: int | None = None,
    copy: str | None = None,
    modules: Modules = (),
) -> int:
    """Run a study: conditions x environments x seeds, tables with intervals, figures. Skips finished runs.

    Args:
        out: Its directory; by default runs/study-NAME.
        jobs: Runs side by side, one thread each; by default as many as there are cores.
        copy: Write the study's file here, and run nothing.
    """
    if copy is not None:
        copy_study(study, copy)
        print(f"{copy}: change it and run `dualhead study {copy}`")
        return 0
    from dualhead.studies.study import run_study

    print(f"results: {run_study(study, out=out, jobs=jobs, modules=modules)}")
    return 0


def export(run: RunOrCheckpoint, own: Own, out: str = "policy.onnx") -> int:
    """Write the policy of a run as an ONNX file, and a JSON file that says how to use it.

    Args:
        out: The ONNX file; the JSON file takes the same name.
    """
    from dualhead.running.export import export

    written = export(run, out, **own.found(run))
    trained, verified = written["run"], written["verified"]
    print(f"{out}: {written['memory']} policy of {trained['env']} after {trained['steps']:,} steps")
    if verified:
        print(
            f"checked: ONNX Runtime {verified['onnxruntime']} and the policy differ by at most "
            f"{verified['largest_difference']:.1g}"
        )
    else:
        print("not checked: ONNX Runtime is not installed (pip install -e '.[onnx]' in the checkout)")
    return 0


def report(runs: Positional[tuple[str, ...]], own: Own, out: str | None = None, replay: bool = True) -> int:
    """Write runs as one HTML page with curves, settings and a replay; it needs no network.

    Args:
        runs: Run directories; those that differ only in the seed are shown as one line with a band.
        out: By default RUN/report.html, or report.html here for several runs.
        replay: Show an episode, where the environment renders.
    """
    from dualhead.running.report import write_report

    print(write_report(runs, out, replay=replay, **own.found(*runs)))
    return 0


def envs(containing: Positional[str] = "", modules: Modules = ()) -> int:
    """List what can be trained here, by suite, and which suites are missing.

    Args:
        containing: Only ids that contain this, or suites whose name does.
    """
    from dualhead.worlds.suites import listed

    for suite in listed(WORLDS):
        ids = suite.ids if containing in suite.name else [name for name in suite.ids if containing in name]
        if suite.missing and (ids or containing in suite.name):
            print(f"{suite.name}: {suite.missing}")
        elif ids:
            print(f"{suite.name}: {len(ids)}")
            for name in ids:
                print(f"  {name}  (tuned settings)" if tuned_settings(name) else f"  {name}")
    return 0
