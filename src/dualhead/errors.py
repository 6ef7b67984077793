"""All errors of our own. Each message says what was expected, what came, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SettingsError(ValueError):
    """Settings that are not possible; the message has a line for each.

    Attributes:
        problems: names of settings, "" where several together are wrong, and what is wrong with each.
    """

    def __init__(self, problems: Iterable[tuple[str, str]]) -> None:
        self.problems = list(dict.fromkeys(problems))
        super().__init__(self.problems)

    def __str__(self) -> str:
        return "\n".join(f"{name}: {message}" if name else message for name, message in self.problems)


class DataError(ValueError):
    """An environment gave data that nothing can be learned from: wrong shape, missing part, NaN or infinity."""


class EnvironmentFailed(RuntimeError):
    """An environment raised an error, or its process ended."""


class DivergedError(RuntimeError):
    """Losses or gradients stayed non-finite for too many optimiser steps in a row."""


class RunError(RuntimeError):
    """A run cannot continue or be read; the message says why and what to do."""


class RunInUseError(RunError):
    """Another process is writing the run directory."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read, or does not fit what it is loaded into."""


class UnavailableEnvironment(RuntimeError):
    """An environment is unknown, not installed, or cannot be made; the message says what to do."""


class UnknownEnvironment(UnavailableEnvironment):
    """No environment has this name.

    Args:
        name: that was given.
        known: names of which the nearest is suggested.
    """

    def __init__(self, name: str, known: Iterable[str]) -> None:
        self.name, self.known = name, tuple(known)
        super().__init__(self.name, self.known)  # what it is made of again in another process

    def __str__(self) -> str:
        return (
            f"unknown environment {self.name!r}: `dualhead envs` lists all; --import MODULE imports one of your own "
            f"that registers more{did_you_mean(self.name, self.known)}"
        )


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest of those known, or nothing where none is near.

    A name with a prefix, such as `ppo.gamma`, is as near as its last part.
    """
    whole: dict[str, str] = {}
    for full in known:
        whole |= {full.rpartition(".")[2]: whole.get(full.rpartition(".")[2], full), full: full}
    near = difflib.get_close_matches(name, whole, n=1)
    return f"; did you mean {whole[near[0]]}?" if near else ""
