"""Modules, encoders and recurrent cores that a user names."""

from __future__ import annotations

import importlib
import os
import sys
from types import ModuleType

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
