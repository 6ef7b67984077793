"""What the files of a run name, and what of it is made without asking their reader; docs/security.md says why."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping
from types import FunctionType
from typing import Any

import gymnasium as gym
from gymnasium.wrappers import RecordVideo

from dualhead.errors import RunError
from dualhead.running.config import RunConfig, pettingzoo_module
from dualhead.running.parts import Call, module_name, named_modules

_trusted: set[str] = set()


def trust(run: str | os.PathLike[str]) -> None:
    """Lets this process import and call what the files of a run, or a file of settings, name. They can then do anything
    that you can."""
    _trusted.add(os.path.realpath(run))


def is_trusted(run: str | os.PathLike[str]) -> bool:
    return os.path.realpath(run) in _trusted


def expect_trusted(config: RunConfig, run: str | os.PathLike[str]) -> None:
    """Raises RunError where a run's environment or a wrapper of it would be of the choice of whoever wrote its files.

    Unless the run is trusted, a module that it names must be imported already; what it names there must be a class of
    environments or wrappers, an id that Gymnasium knows, or a function of a module that the user named in this process;
    and text among the arguments must be no path and no code.
    """
    if is_trusted(run):
        return
    given: dict[str, Any] = {"env_args": config.env_args}
    if config.env_from == "id" and ":" in config.env:
        name, kinds = config.env, [gym.Env]
        if (module := pettingzoo_module(name)) is not None:
            name = f"{module}:{'parallel_env' if hasattr(sys.modules.get(module), 'parallel_env') else 'env'}"
        if (pettingzoo := sys.modules.get("pettingzoo")) is not None:
            kinds += [pettingzoo.ParallelEnv, pettingzoo.AECEnv]
        _expect_named(name, tuple(kinds), of=f"the environment {config.env!r}", run=run)
    for text in config.wrappers:
        call = Call.read(text)
        _expect_named(call.name, (gym.Wrapper,), of=f"the wrapper {call.name!r}", run=run)
        given[f"the arguments of the wrapper {call.name!r}"] = [*call.args, call.kwargs]
    for of, value in given.items():
        if strange := next((text for text in _texts(value) if not re.fullmatch(r"[\w -]*", text)), None):
            raise RunError(
                f"{of} of {run} hold {strange!r}, which may name a file or a module: expected numbers, or text of "
                f"letters, digits, blanks, '_' and '-'. {_how_to_trust()}"
            )


def _expect_named(text: str, kinds: tuple[type, ...], *, of: str, run: str | os.PathLike[str]) -> None:
    module, _, name = text.partition(":")
    module = module_name(module)
    imported = sys.modules.get(module)
    if imported is None:
        raise RunError(
            f"{of} of {run} needs the module {module!r}, which the run's files name and which is not imported by "
            f"itself. {_how_to_trust(module)}"
        )
    found = vars(imported).get(name)
    is_id = gym.Env in kinds and ":" not in name and (name in gym.registry or not name.isidentifier())
    is_class = isinstance(found, type) and issubclass(found, kinds) and not issubclass(found, RecordVideo)
    # A function that the module only imported may do anything with the arguments that the run's files hold. Most
    # `parallel_env` are closures of PettingZoo around functions of the module.
    is_own = isinstance(found, FunctionType) and _package(found.__module__) in (_package(module), "pettingzoo")
    if not (is_id or is_class or (is_own and module in named_modules)):
        raise RunError(
            f"{of} of {run} is the choice of the run's files: expected a class derived from {kinds[0].__name__} that "
            f"writes no files, or a function of a module that you name, got {found!r}. {_how_to_trust(module)}"
        )


def _package(module: str) -> str:
    return module.partition(".")[0]


def _how_to_trust(module: str | None = None) -> str:
    options = "" if module is None else f"--import {module}, or "
    in_python = "" if module is None else "import it first, or "
    return f"If you trust it: {options}--trust; in Python, {in_python}call dualhead.trust(run)"


def _texts(value: Any) -> Iterator[str]:
    """All the text in an argument."""
    if isinstance(value, str | bytes):
        yield value if isinstance(value, str) else repr(value)
    elif isinstance(value, Mapping):
        yield from _texts([*value, *value.values()])
    elif isinstance(value, list | tuple | set):
        for inner in value:
            yield from _texts(inner)
