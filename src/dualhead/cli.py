"""The command line: one function for each command, and options made from the settings classes."""

from __future__ import annotations

import argparse
import difflib
import errno
import importlib.metadata
import inspect
import json
import math
import os
import re
import select
import sys
import types
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TextIO, Union, get_args, get_origin

from dualhead.errors import CheckpointError, RunError, SettingsError, UnavailableEnvironment

if TYPE_CHECKING:  # what a command needs it imports itself: `--help` is quick
    from dualhead.config import Config
    from dualhead.running.config import RunConfig

_BY_THEMSELVES = ("network", "ppo")
"""Settings within settings whose options have no prefix: `--hidden-size`, not `--network.hidden-size`."""
_OF_AGENTS = ("policies", "enforce_norms", "norms", "turnover")
"""Only for worlds of several agents, or worlds that give events."""


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
    name = arguments[0] if arguments else ""
    if name not in _COMMANDS:
        _without_command(arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.showwarning = _warn
        run = _COMMANDS[name]
        try:
            return run(_Parser(prog=f"dualhead {name}", description=inspect.getdoc(run)), arguments[1:])
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        except (RunError, CheckpointError, UnavailableEnvironment) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1


def _without_command(arguments: list[str]) -> NoReturn:
    parser = _Parser(prog="dualhead", description="Recurrent PPO: train agents that remember, and all that follows.")
    parser.add_argument("--version", action="version", version=f"dualhead {importlib.metadata.version('dualhead')}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, title="commands, each with a --help of its own")
    for name, run in _COMMANDS.items():
        commands.add_parser(name, help=(inspect.getdoc(run) or "").partition("\n")[0])
    parser.parse_args(arguments)
    raise AssertionError("an unknown command was parsed")


def _warn(message: Warning | str, *_: Any, **__: Any) -> None:
    plain = re.sub(r"\x1b\[\d*m", "", str(message))  # Gymnasium colours its own
    print(f"warning: {plain.removeprefix('WARN: ')}", file=sys.stderr)


class _Parser(argparse.ArgumentParser):
    """Options may be written with `-` or `_`, and only in full."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings, allow_abbrev=False, argument_default=argparse.SUPPRESS)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = [re.sub(r"^--[^=]*", lambda option: option[0].replace("_", "-"), word) for word in args or []]
        return super().parse_known_args(words, namespace)

    def refuse(self, word: str) -> NoReturn:
        """Ends with a usage error about an option that does not exist."""
        option = word.partition("=")[0]
        near = difflib.get_close_matches(option, self._option_string_actions, n=3)
        self.error(f"unknown option {option}" + (f": did you mean {' or '.join(near)}?" if near else ""))


def _train(parser: _Parser, arguments: list[str]) -> int:
    """Train an agent."""
    config = parse_train(arguments, description=parser.description)
    print(_say_settings(config))
    from dualhead.running.trainer import train

    return _tell(train(config).summary)


def parse_train(arguments: list[str], *, description: str | None = None) -> RunConfig:
    """Settings of the run that `dualhead train ARGUMENTS` asks for.

    Raises:
        RunError: they are not possible.
        SystemExit: the arguments are no such command, or ask for help.
    """
    from dualhead.running.config import planned
    from dualhead.worlds.registry import worlds

    _import_modules(arguments)
    known, words = worlds(), [word for word in arguments if word not in ("-h", "--help")]
    env, _ = _Options(known.values()).read(words)
    # Once more, now that it is known whose world's options are meant.
    options = _Options([known[env]] if env in known else [], description=description)
    if len(words) < len(arguments):
        options.print_help(env, known)
    env, settings = options.read(words, are_all=True)
    if env is None:
        options.parser.error("expected an environment: dualhead train ENV ...; `dualhead envs` lists them")
    # One option for both: a core of ours by its name, or one of the user's own as MODULE:NAME.
    if ":" in settings.get("network", {}).get("memory", ""):
        settings["memory"] = settings["network"].pop("memory")
    try:
        return planned(env, **settings)
    except SettingsError as error:
        raise RunError(str(error)) from None


class _Options:
    """Options of `train`, one for each setting: they hold what was given and nothing else.

    Args:
        worlds: classes of worlds' own settings.
        description: of the command.
    """

    def __init__(self, worlds: Iterable[type[Config]], *, description: str | None = None) -> None:
        from dualhead.running.config import RunConfig

        env = RunConfig.model_fields["env"].description
        self.parser = _Parser(prog="dualhead train", description=description)
        self.parser.usage = f"dualhead train ENV [options]\n\nENV: {env}"
        self._types: dict[str, Any] = {}
        self._actions: dict[str, argparse.Action] = {}
        _add_import(self.parser)
        self._add(self.parser.add_argument_group("the run"), RunConfig, "")
        for name, field in RunConfig.model_fields.items():
            if name != "world" and _is_nested(field.annotation):
                self._add(self.parser.add_argument_group(name, field.description), field.annotation, f"{name}.")
        for world in worlds:
            about = (world.__doc__ or "").partition("\n")[0]
            self._add(self.parser.add_argument_group("world", about), world, "world.")

    def _add(self, group: Any, settings: Any, below: str) -> None:
        for name, field in settings.model_fields.items():
            place, kind = f"{below}{name}", field.annotation
            if place in ("env", "env_from", "learning_rate_from", "memory", *self._types) or _is_nested(kind):
                continue
            self._types[place] = kind
            option = "--" + (name if below[:-1] in _BY_THEMSELVES else place).replace("_", "-")
            described: dict[str, Any] = {"dest": place, "help": _help(field)}
            if kind is bool:
                described["action"] = argparse.BooleanOptionalAction
            else:
                described |= {"metavar": _metavar(kind)} | ({"nargs": "*"} if _is_list(kind) else {})
            self._actions[place] = group.add_argument(option, **described)

    def read(self, arguments: list[str], *, are_all: bool = False) -> tuple[str | None, dict[str, Any]]:
        """The environment, and the settings that were given, nested as RunConfig is.

        Args:
            arguments: of the command.
            are_all: there is no other option than these.
        """
        given, rest = self.parser.parse_known_args(arguments)
        unknown = [word for word in rest if word.startswith("-")]
        if unknown and are_all:
            self.parser.refuse(unknown[0])
        settings: dict[str, Any] = {}
        for place, value in vars(given).items():
            if place not in self._types:
                continue
            # `--head-sizes 6 6 ENV`: what is no number is the environment.
            if not rest and isinstance(value, list) and value and not _fits(self._types[place], value[-1]):
                rest = [value.pop()]
            *outer, name = place.split(".")
            inner = settings
            for part in outer:
                inner = inner.setdefault(part, {})
            inner[name] = _value(self._types[place], value)
        if len(rest) > 1 and are_all:
            self.parser.error(f"expected one environment, got {' '.join(rest)}")
        return (rest[0] if rest else None), settings

    def print_help(self, env: str | None, worlds: Mapping[str, type[Config]]) -> NoReturn:
        """Without what this environment has no use for; and exits."""
        if env is not None and env not in worlds:
            for place, action in self._actions.items():
                if place.partition(".")[0] in _OF_AGENTS:
                    action.help = argparse.SUPPRESS
            for group in self.parser._action_groups:
                if group.title in _OF_AGENTS:
                    group.title = group.description = None
        if env is None:
            names = ", ".join(f"`dualhead train {name} --help`" for name in worlds)
            self.parser.epilog = f"Worlds with settings of their own: {names}"
        self.parser.print_help()
        self.parser.exit()


def _is_nested(kind: Any) -> bool:
    return inspect.isclass(kind) and hasattr(kind, "model_fields")


def _members(kind: Any) -> list[Any]:
    """The types that a value may have."""
    if hasattr(kind, "__metadata__"):  # Annotated
        return _members(get_args(kind)[0])
    if get_origin(kind) in (Union, types.UnionType):
        return [member for part in get_args(kind) for member in _members(part)]
    return [kind]


def _elements(kind: Any) -> list[Any]:
    """The types of a list's elements; empty where a value is none, or one of tables."""
    for member in _members(kind):
        if get_origin(member) is tuple:
            elements = _members(get_args(member)[0])
            return [] if any(map(_is_nested, elements)) else elements
    return []


def _is_list(kind: Any) -> bool:
    return bool(_elements(kind))


def _fits(kind: Any, word: str) -> bool:
    """Whether a word can be an element of a list."""
    elements = _elements(kind)
    literals = [choice for element in elements if get_origin(element) is Literal for choice in get_args(element)]
    return str in elements or word in literals or (not literals and not isinstance(_word(elements, word), str))


def _value(kind: Any, given: Any) -> Any:
    """What an option's words mean; whether that is possible the settings say."""
    if isinstance(given, list):
        values = [_word(_elements(kind), word) for word in given]
        is_one = len(values) == 1 and any(get_origin(member) is not tuple for member in _members(kind))
        return values[0] if is_one else values
    return _word(_members(kind), given) if isinstance(given, str) else given


def _word(members: list[Any], word: str) -> Any:
    if word == "None" and types.NoneType in members:
        return None
    if str in members:
        return word
    try:
        return json.loads(word)
    except ValueError:
        return word


def _metavar(kind: Any) -> str:
    names = []
    for member in _members(kind):
        if get_origin(member) is Literal:
            names.append("{" + ",".join(map(str, get_args(member))) + "}")
        elif get_origin(member) is tuple and _is_list(member):
            names.append(_metavar(get_args(member)[0]))  # argparse shows that there may be several
        elif member in (int, float, str):
            names.append({int: "INT", float: "FLOAT", str: "TEXT"}[member])
        else:
            names.append("None" if member is types.NoneType else "JSON")
    return "|".join(dict.fromkeys(names))


def _help(field: Any) -> str:
    default = field.get_default(call_default_factory=True)
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else "" if default is None else str(default)
    said = f" (default: {shown})" if shown and len(shown) < 80 else ""
    return f"{field.description}{said}".replace("%", "%%")


def _add_import(parser: _Parser) -> None:
    parser.add_argument(
        "--import",
        dest="modules",
        metavar="MODULE",
        action="append",
        help="import a module of your own, which registers environments or worlds, say; may be given several times",
    )


def _import_modules(arguments: list[str]) -> None:
    """Imports what `--import` names, before anything else is read: worlds bring options."""
    parser = _Parser(add_help=False)
    _add_import(parser)
    modules = vars(parser.parse_known_args(arguments)[0]).get("modules", [])
    if modules:
        from dualhead.running.parts import import_module

        for module in modules:
            import_module(module, what="--import")


def _add_own_parts(parser: _Parser) -> None:
    """What a run's directory names and never imports by itself."""
    _add_import(parser)
    for part in ("encoder", "memory"):
        parser.add_argument(f"--{part}", metavar="MODULE:NAME", help=f"the run's own {part}, where it has one")


def _own_parts(given: Any) -> dict[str, Any]:
    from dualhead.running.parts import find_part

    return {part: find_part(getattr(given, part, None), what=f"--{part}") for part in ("encoder", "memory")}


def _say_settings(config: RunConfig) -> str:
    """Which settings come from where."""
    from dualhead.config import flat
    from dualhead.running.config import RunConfig, preset_settings

    independent = config.policies == "independent"
    chosen, default = (flat(dict(of.model_dump())) for of in (config, RunConfig(env=config.env)))
    preset = flat(preset_settings(config.preset, config.env, independent=independent))
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

    def listed(names: list[str]) -> str:
        return " ".join(f"{name.rpartition('.')[2]}={chosen[name]}" for name in names)

    said = f"settings: {where[config.preset]}" + (f": {listed(used)}" if used else "")
    return said + (f"; given: {listed(given)}" if given else "")


def _resume(parser: _Parser, arguments: list[str]) -> int:
    """Go on with a run that was stopped, exactly where its newest checkpoint left it."""
    parser.add_argument("run", help="the run directory")
    parser.add_argument(
        "--total-steps",
        type=int,
        metavar="INT",
        default=None,
        help="train to another end than was asked for at first; a learning rate that falls over the run falls to it",
    )
    _add_own_parts(parser)
    given = parser.parse_args(arguments)
    _import_modules(arguments)
    from dualhead.running.trainer import resume

    return _tell(resume(given.run, total_steps=given.total_steps, **_own_parts(given)).summary)


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


def _eval(parser: _Parser, arguments: list[str]) -> int:
    """Play the newest checkpoint of a run."""
    from dualhead.running.config import EVAL_EPISODES, EVALUATION_SEED

    parser.add_argument("run", help="the run directory, or one of its checkpoint files")
    parser.add_argument(
        "--episodes", type=int, metavar="INT", default=EVAL_EPISODES, help=f"to play (default: {EVAL_EPISODES})"
    )
    parser.add_argument(
        "--seed",
        type=int,
        metavar="INT",
        default=EVALUATION_SEED,
        help=f"of the environments and of sampled actions (default: {EVALUATION_SEED})",
    )
    for option, default, text in (
        ("--sample", False, "sample actions instead of taking the likeliest"),
        (
            "--json",
            False,
            "print mean, 95%% interval, deviation, mean length, single returns and lengths as JSON",
        ),
    ):
        parser.add_argument(option, action=argparse.BooleanOptionalAction, default=default, help=text)
    parser.add_argument("--video", default=None, metavar="FILE", help="also film one episode: .mp4 or .gif")
    _add_own_parts(parser)
    given = parser.parse_args(arguments)
    _import_modules(arguments)
    if given.seed < 0:
        raise RunError(f"seed: expected at least 0, got {given.seed}")
    from dualhead.running.evaluation import evaluate
    from dualhead.running.video import record_video

    how = {"seed": given.seed, "deterministic": not given.sample, **_own_parts(given)}
    # The video first: what is wrong with it shows at once.
    video = given.video and record_video(given.run, given.video, **how)
    played = evaluate(given.run, episodes=given.episodes, **how)
    result = played.summary()
    if given.json:
        numbers = {name: value if math.isfinite(value) else None for name, value in result.items()}
        print(json.dumps(numbers | played._asdict() | ({"video": str(video)} if video else {})))
        return 0
    print("returns " + " ".join(f"{value:.6g}" for value in played.returns))
    print(_describe(result))
    if video:
        print(f"video: {video}")
    return 0


def _describe(result: dict[str, float]) -> str:
    interval = f"95% interval {result['ci95_low']:.2f} to {result['ci95_high']:.2f}, " if result["episodes"] > 1 else ""
    return (
        f"return {result['mean_return']:.2f} ± {result['std_return']:.2f} over {result['episodes']} episodes "
        f"({interval}mean length {result['mean_length']:.0f})"
    )


def _study(parser: _Parser, arguments: list[str]) -> int:
    """Run a study: conditions x environments x seeds, tables with intervals, figures.

    Finished runs are not repeated."""
    from dualhead.studies.files import copy_study, study_names

    parser.add_argument("study", help=f"a TOML file, or one that comes with dualhead: {', '.join(study_names())}")
    parser.add_argument("--out", default=None, metavar="FOLDER", help="its directory; default runs/study-NAME")
    parser.add_argument(
        "--jobs",
        type=int,
        metavar="INT",
        default=None,
        help="runs side by side, one thread each; default: as many as there are cores",
    )
    parser.add_argument("--copy", default=None, metavar="FILE", help="write the study's file there, and run nothing")
    given = parser.parse_args(arguments)
    if given.copy is not None:
        copy_study(given.study, given.copy)
        print(f"{given.copy}: change it and run `dualhead study {given.copy}`")
        return 0
    from dualhead.studies.study import run_study

    print(f"results: {run_study(given.study, out=given.out, jobs=given.jobs)}")
    return 0


def _export(parser: _Parser, arguments: list[str]) -> int:
    """Write the policy of a run as an ONNX file, and a JSON file that says how to use it."""
    parser.add_argument("run", help="the run directory, or one of its checkpoint files")
    parser.add_argument(
        "--out", default="policy.onnx", metavar="FILE", help="the JSON file takes the same name (default: policy.onnx)"
    )
    _add_own_parts(parser)
    given = parser.parse_args(arguments)
    _import_modules(arguments)
    from dualhead.running.export import export

    written = export(given.run, given.out, **_own_parts(given))
    run, verified = written["run"], written["verified"]
    print(f"{given.out}: {written['memory']} policy of {run['env']} after {run['steps']:,} steps")
    if verified:
        print(
            f"checked: ONNX Runtime {verified['onnxruntime']} and the policy differ by at most "
            f"{verified['largest_difference']:.1g}"
        )
    else:
        print("not checked: ONNX Runtime is not installed (pip install -e '.[onnx]' in the checkout)")
    return 0


def _report(parser: _Parser, arguments: list[str]) -> int:
    """Write runs as one HTML page with curves, settings and a replay; it needs no network."""
    parser.add_argument(
        "runs", nargs="+", help="run directories; those that differ only in the seed are shown as one line with a band"
    )
    parser.add_argument(
        "--out", default=None, metavar="FILE", help="default RUN/report.html, or report.html here for several runs"
    )
    parser.add_argument(
        "--replay",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="show an episode, where the environment renders",
    )
    _add_own_parts(parser)
    given = parser.parse_args(arguments)
    _import_modules(arguments)
    from dualhead.running.report import write_report

    print(write_report(given.runs, given.out, replay=given.replay, **_own_parts(given)))
    return 0


def _envs(parser: _Parser, arguments: list[str]) -> int:
    """List what can be trained here."""
    parser.add_argument("containing", nargs="?", default="", help="only ids that contain this")
    _add_import(parser)
    given = parser.parse_args(arguments)
    _import_modules(arguments)
    from dualhead.running.config import tuned_settings
    from dualhead.worlds.registry import environment_ids

    for name in environment_ids():
        if given.containing in name:
            print(f"{name}  (tuned settings)" if tuned_settings(name) else name)
    return 0


_COMMANDS: dict[str, Callable[[_Parser, list[str]], int]] = {
    "train": _train,
    "resume": _resume,
    "eval": _eval,
    "study": _study,
    "report": _report,
    "export": _export,
    "envs": _envs,
}
