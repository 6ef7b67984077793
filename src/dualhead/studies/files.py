"""Files of studies: those that come with the package, and the user's own."""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path

from dualhead.errors import RunError

_FOLDER = resources.files("dualhead.studies")


def study_names() -> list[str]:
    """Studies that come with the package."""
    return sorted(file.name.removesuffix(".toml") for file in _FOLDER.iterdir() if file.name.endswith(".toml"))


def study_text(name: str) -> str:
    """The file of a study: a path, or the name of one that comes with the package.

    Raises:
        RunError: there is none.
    """
    try:
        return (_FOLDER / f"{name}.toml" if name in study_names() else Path(name)).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise RunError(
            f"no study {name!r}: expected a TOML file, or one of {', '.join(study_names())}; "
            f"`dualhead study norms --copy my.toml` writes one to change"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"cannot read the study {name}: {getattr(error, 'strerror', None) or error}") from error


def copy_study(name: str, path: str) -> None:
    """Writes a study's file to a new place.

    Raises:
        RunError: no such study, or something is there already, or it cannot be written.
    """
    from dualhead.storage import write_bytes  # loads torch, and the command line imports this module

    text = study_text(name)
    if os.path.lexists(path):
        raise RunError(f"{path} is there already: choose another name")
    try:
        write_bytes(path, text.encode())
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}") from error
