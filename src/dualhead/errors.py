"""What can go wrong, by name; each message says what was expected, what came, and what to do."""

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


class RunError(RuntimeError):
    """A run that cannot go on or be read; the message says why and what to do."""


class RunInUseError(RunError):
    """Another process is writing the run directory."""


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read, or does not fit what it is loaded into."""


class UnavailableEnvironment(RuntimeError):
    """An environment that is unknown, not installed, or cannot be made; the message says what to do."""
