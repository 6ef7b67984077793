"""All errors of our own. Each message says what was expected, what came, and what to do."""

from __future__ import annotations

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
