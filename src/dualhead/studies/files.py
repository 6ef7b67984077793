"""Files of studies: those that come with the package, and the user's own."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from dualhead.errors import RunError


def study_names() -> list[str]:
    """Studies that come with the package."""
    folder = resources.files("dualhead.studies")
    return sorted(file.name.removesuffix(".toml") for file in folder.iterdir() if file.name.endswith(".toml"))


def study_text(name: str) -> str:
    """The file of a study: a path, or the name of one that comes with the package.

    Raises:
        RunError: there is none.
    """
    try:
        if name in study_names():
            return (resources.files("dualhead.studies") / f"{name}.toml").read_text(encoding="utf-8")
        return Path(name).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise RunError(
            f"no study {name!r}: expected a TOML file, or one of {', '.join(study_names())}; "
            f"`dualhead study norms --copy my.toml` writes one to change"
        ) from error
    except OSError as error:
        raise RunError(f"cannot read the study {name}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise RunError(f"{name} is no TOML file: {error}") from error


def copy_study(name: str, path: str) -> None:
    """Writes a study's file to a new place.

    Raises:
        RunError: no such study, or something is there already, or it cannot be written.
    """
    text = study_text(name)
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise RunError(f"{path} is there already: choose another name") from error
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}") from error
