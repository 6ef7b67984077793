"""Modules, and what is in them, that a user names."""

from __future__ import annotations

import ast
import importlib
import operator
import os
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from dualhead.errors import RunError, did_you_mean

named_modules: set[str] = set()
"""Those that `import_module` has imported in this process."""


def module_name(given: str) -> str:
    """The module that a user means: `my_envs`, also as its file, `my_envs.py`."""
    return ".".join(Path(given.removesuffix(".py")).parts) if given.endswith(".py") else given


def import_module(given: str, *, what: str) -> ModuleType:
    """Imports a user's module. The working directory is searched last, and only for modules that are named here.

    Raises:
        RunError: it cannot be imported.
    """
    name, here = module_name(given), os.getcwd()
    if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*", name):
        raise RunError(f"{what}: expected the name of a module such as my_envs, got {given!r}")
    importlib.invalidate_caches()  # the file may be younger than what Python knows of its folder
    try:
        try:
            found = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if not _is_part_of(error.name, name) or here in sys.path:
                raise
            sys.path.append(here)  # it stays, for what the module imports later, here and in other processes
            try:
                found = importlib.import_module(name)
            except ModuleNotFoundError as error:
                if _is_part_of(error.name, name):
                    sys.path.remove(here)
                raise
    except ImportError as error:
        said = f"{what}: cannot import {name!r}: {error}"
        if isinstance(error, ModuleNotFoundError) and _is_part_of(error.name, name):
            said += f"; expected {name.replace('.', os.sep)}.py in {here}, or an installed package"
            said += did_you_mean(name, [path.stem for path in Path(here).glob("*.py")])
        raise RunError(said) from error
    named_modules.add(name)
    return found


def _is_part_of(missing: str | None, name: str) -> bool:
    """Whether the module that was not found is the one that was asked for, or a package around it."""
    return missing is not None and f"{name}.".startswith(f"{missing}.")


def find_part(given: Any, *, what: str) -> Any:
    """The object that `MODULE:NAME` names; anything but a string is the part itself.

    Raises:
        RunError: there is no such object.
    """
    if not isinstance(given, str):
        return given
    module, _, name = given.partition(":")
    if not module or not name:
        raise RunError(
            f"{what}={given!r}: expected MODULE:NAME of a part of your own, such as my_package.nets:MyNet; those of "
            f"dualhead are settings, such as network=NetworkConfig(memory='gru')"
        )
    found = import_module(module, what=what)
    try:
        return operator.attrgetter(name)(found)
    except AttributeError:
        raise RunError(f"{what}={given!r}: {module} has no {name}") from None


def name_of(part: Any) -> str | None:
    """`MODULE:NAME` of a part or of its factory, as a run's settings name it; None for none."""
    if part is None or isinstance(part, str):
        return part
    named = part if hasattr(part, "__qualname__") else type(part)
    return f"{named.__module__}:{named.__qualname__}"


_LONGEST_CALL = 1000
"""Characters; the text may come from a stranger, and Python's parser can crash on one that is deeply nested."""


class Call(NamedTuple):
    """A wrapper and what it is called with after the environment: `MODULE:NAME`, or `MODULE:NAME(4, key="text")`."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def read(cls, text: str) -> Call:
        """Reads what a user wrote; ValueError if it is none. Arguments are literals, nothing is evaluated."""
        name, bracket, rest = text.partition("(")
        try:
            if not re.fullmatch(r"[^:\s]+:[^\W\d]\w*", name) or len(text) > _LONGEST_CALL:
                raise ValueError
            call = ast.parse(f"f({rest}" if bracket else "f()", mode="eval").body
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
                raise ValueError
            args = tuple(map(ast.literal_eval, call.args))
            kwargs = {key.arg: ast.literal_eval(key.value) for key in call.keywords if key.arg is not None}
            if len(kwargs) < len(call.keywords):  # **{...}
                raise ValueError
            return cls(name, args, kwargs)
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):  # the last two of deep nesting
            raise ValueError(
                f"expected MODULE:NAME, or MODULE:NAME(...) with numbers, quoted text, True, False or None, such as "
                f"gymnasium.wrappers:FrameStackObservation(stack_size=4), got {text!r}"
            ) from None
