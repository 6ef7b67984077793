"""Returns, lengths and other numbers of episodes, counted step by step."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from dualhead.config import NonNegativeInt
from dualhead.errors import DataError
from dualhead.storage import Saved
from dualhead.types import as_numpy
from dualhead.worlds.streams import StreamStep

_WINDOW = 100
"""Episodes that the means are over."""


class TrackerState(Saved):
    """What a checkpoint says of the episodes: those in progress by stream, and the last ones that ended."""

    running_returns: list[float]
    running_lengths: list[NonNegativeInt]
    returns: list[float] = Field(max_length=_WINDOW)
    lengths: list[NonNegativeInt] = Field(max_length=_WINDOW)
    numbers: dict[str, Annotated[list[float], Field(max_length=_WINDOW)]]
    num_episodes: NonNegativeInt


def _window(values: Iterable[float] = ()) -> deque[float]:
    return deque(values, maxlen=_WINDOW)


class EpisodeTracker:
    """Return, length and other numbers of the last 100 episodes that ended, in B streams."""

    def __init__(self, num_streams: int) -> None:
        self.running_returns = np.zeros(num_streams)
        self.running_lengths = np.zeros(num_streams, dtype=np.int64)
        self.num_episodes = 0
        self._returns, self._lengths = _window(), _window()
        self._numbers: dict[str, deque[float]] = {}
        self._waiting: list[tuple[Any, NDArray[np.bool_], NDArray[np.bool_] | None]] = []

    def step(self, step: StreamStep) -> None:
        """Adds the rewards of a step, and the numbers of the episodes that ended; DataError if they are not [B].

        Nothing is counted of streams that sat the step out.

        Rewards on an accelerator are fetched later, many steps at once, so no step forces a host-device sync.
        """
        ended = as_numpy(step.terminated) | as_numpy(step.truncated)
        active = None if step.active is None else as_numpy(step.active)
        if active is not None:
            ended = ended & active
        if step.numbers and ended.any():
            over = ended if active is None else ended | ~active  # some are told of when their world's episode ends
            for name, given in step.numbers.items():
                values = np.asarray(as_numpy(given), dtype=np.float64)
                if values.shape != ended.shape:
                    raise DataError(f"{name!r} of episodes: expected shape {ended.shape}, got {values.shape}")
                if len(values := values[over & ~np.isnan(values)]):
                    self._numbers.setdefault(name, _window()).extend(values.tolist())
        self._waiting.append((step.rewards, ended, active))
        if not (isinstance(step.rewards, Tensor) and step.rewards.device.type != "cpu"):
            self._fetch()

    def _fetch(self) -> None:
        rewards = [reward for reward, _, _ in self._waiting]
        if rewards and isinstance(rewards[0], Tensor):
            rewards = list(as_numpy(torch.stack(rewards)))
        for reward, (_, ended, active) in zip(rewards, self._waiting):
            self.running_returns += reward if active is None else np.where(active, reward, 0.0)
            self.running_lengths += 1 if active is None else active
            self._returns.extend(self.running_returns[ended].tolist())
            self._lengths.extend(self.running_lengths[ended].tolist())
            self.num_episodes += int(ended.sum())
            self.running_returns[ended] = 0.0
            self.running_lengths[ended] = 0
        self._waiting = []

    def metrics(self) -> dict[str, float]:
        """Means over the last 100 episodes (NaN before the first one ends), and the count of all episodes."""
        self._fetch()
        # Ours come last: an environment's number of the same name must not replace them.
        return {f"episode/{name}": float(np.mean(values)) for name, values in self._numbers.items()} | {
            "episode/mean_return": float(np.mean(self._returns)) if self._returns else math.nan,
            "episode/mean_length": float(np.mean(self._lengths)) if self._lengths else math.nan,
            "episode/count": self.num_episodes,
        }

    def abandon_episodes(self, streams: NDArray[np.bool_] | slice = slice(None)) -> None:
        """Forgets the running episodes of some streams ([B] bool), or of all."""
        self._fetch()
        self.running_returns[streams] = 0.0
        self.running_lengths[streams] = 0

    def state(self) -> dict[str, Any]:
        """JSON, which `TrackerState` reads for `restore`."""
        self._fetch()
        return TrackerState(
            running_returns=self.running_returns.tolist(),
            running_lengths=self.running_lengths.tolist(),
            returns=list(self._returns),
            lengths=[int(length) for length in self._lengths],
            numbers={name: list(values) for name, values in self._numbers.items()},
            num_episodes=self.num_episodes,
        ).model_dump()

    def restore(self, state: TrackerState) -> None:
        """Continues from a `state`; ValueError if it has another number of streams."""
        running, lengths = np.array(state.running_returns), np.array(state.running_lengths, dtype=np.int64)
        if not running.shape == lengths.shape == self.running_returns.shape:
            raise ValueError(f"episodes of {len(running)} streams, expected {len(self.running_returns)}")
        self.running_returns, self.running_lengths, self._waiting = running, lengths, []
        self._returns, self._lengths = _window(state.returns), _window(state.lengths)
        self._numbers = {name: _window(values) for name, values in state.numbers.items()}
        self.num_episodes = state.num_episodes
