"""Modules, encoders and recurrent cores that a user names."""

from __future__ import annotations

import importlib
import operator
import os
import sys
from types import ModuleType
from typing import Any

from dualhead.errors import RunError


def import_module(name: str, *, what: str) -> ModuleType:
    """Imports a user's module, from the working directory as well.

    Raises:
        RunError: it cannot be imported.
    """
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last, so that no file there takes the place of a package
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise RunError(f"{what}: cannot import {name!r}: {error}") from error


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
