"""Modules, encoders and recurrent cores that a user names."""

from __future__ import annotations

import importlib
import os
import sys
from types import ModuleType
from typing import Any

from dualhead.errors import RunError


def import_module(name: str, *, what: str) -> ModuleType:
    """Imports what a user has named, from the working directory as well.

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
    """What `MODULE:NAME` names; anything but a string is the part itself.

    Raises:
        RunError: there is no such thing.
    """
    if not isinstance(given, str):
        return given
    module, _, name = given.partition(":")
    if not module or not name:
        raise RunError(
            f"{what}={given!r}: expected MODULE:NAME of a part of your own, such as my_package.nets:MyNet; those of "
            f"dualhead are settings, such as network=NetworkConfig(memory='gru')"
        )
    found: Any = import_module(module, what=what)
    for attribute in name.split("."):
        if not hasattr(found, attribute):
            raise RunError(f"{what}={given!r}: {module} has no {name}")
        found = getattr(found, attribute)
    return found


def name_of(part: Any) -> str | None:
    """`MODULE:NAME` of a part or of its factory, as a run's settings name it; None for none."""
    if part is None or isinstance(part, str):
        return part
    named = part if hasattr(part, "__qualname__") else type(part)
    return f"{named.__module__}:{named.__qualname__}"
