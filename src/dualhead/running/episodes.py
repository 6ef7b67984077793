"""Returns, lengths and other numbers of episodes while they run."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from dualhead.types import as_numpy
from dualhead.worlds.streams import StreamStep

EPISODE_WINDOW = 100


class EpisodeTracker:
    """Return, length and other numbers of the last 100 episodes that ended.

    Args:
        num_streams: B.
    """

    def __init__(self, num_streams: int) -> None:
        self.running_returns = np.zeros(num_streams)
        self.running_lengths = np.zeros(num_streams, dtype=np.int64)
        self.returns: deque[float] = deque(maxlen=EPISODE_WINDOW)
        self.lengths: deque[int] = deque(maxlen=EPISODE_WINDOW)
        self.numbers: dict[str, deque[float]] = {}
        self.num_episodes = 0
        self._waiting: list[tuple[Tensor, NDArray[np.bool_]]] = []

    def step(self, step: StreamStep, numbers: Mapping[str, ArrayLike] | None = None) -> None:
        """Adds the rewards of a step, and closes the episodes that ended with it.

        Rewards on an accelerator are fetched later, many steps at once, so that no step waits for the device.

        Args:
            step: its rewards, terminated and truncated are used.
            numbers: numbers about the episodes that ended with this step, by name, [B] each: `success` or `score` from
                an environment's `info`, say. `metrics` gives the mean of each over the last 100 episodes that had it,
                as `episode/NAME`. Entries of streams whose episode continues are ignored; NaN means that the episode
                has no such number.

        Raises:
            ValueError: one of `numbers` does not have the shape [B].
        """
        ended = as_numpy(step.terminated) | as_numpy(step.truncated)
        if numbers and ended.any():
            self._take_numbers(numbers, ended)
        if isinstance(step.rewards, Tensor) and step.rewards.device.type != "cpu":
            self._waiting.append((step.rewards, ended))
        else:
            self._take(as_numpy(step.rewards), ended)

    def _fetch(self) -> None:
        if self._waiting:
            rewards = as_numpy(torch.stack([rewards for rewards, _ in self._waiting]))
            for rewards_of_step, (_, ended) in zip(rewards, self._waiting):
                self._take(rewards_of_step, ended)
            self._waiting = []

    def _take(self, rewards: NDArray[Any], ended: NDArray[np.bool_]) -> None:
        self.running_returns += rewards
        self.running_lengths += 1
        for stream in np.flatnonzero(ended):
            self.returns.append(float(self.running_returns[stream]))
            self.lengths.append(int(self.running_lengths[stream]))
            self.num_episodes += 1
        self.running_returns[ended] = 0.0
        self.running_lengths[ended] = 0

    def _take_numbers(self, numbers: Mapping[str, ArrayLike], ended: NDArray[np.bool_]) -> None:
        for name, given in numbers.items():
            values = np.asarray(as_numpy(given) if isinstance(given, Tensor) else given, dtype=np.float64)
            if values.shape != ended.shape:
                raise ValueError(
                    f"{name!r} of episodes: expected one number per stream {ended.shape}, got {values.shape}"
                )
            values = values[ended]
            if not np.isnan(values).all():
                kept = self.numbers.setdefault(name, deque(maxlen=EPISODE_WINDOW))
                kept.extend(values[~np.isnan(values)].tolist())

    def metrics(self) -> dict[str, float]:
        """Means over the window (NaN before the first episode ends), and the count of all episodes."""
        self._fetch()
        # Ours come last: an environment's number of the same name must not take their place.
        return {f"episode/{name}": float(np.mean(values)) for name, values in self.numbers.items()} | {
            "episode/mean_return": float(np.mean(self.returns)) if self.returns else math.nan,
            "episode/mean_length": float(np.mean(self.lengths)) if self.lengths else math.nan,
            "episode/count": self.num_episodes,
        }

    def abandon_episodes(self, streams: NDArray[np.bool_] | None = None) -> None:
        """Drops the running episodes of some streams ([B] bool), or of all. They count nowhere."""
        self._fetch()
        abandoned = slice(None) if streams is None else streams
        self.running_returns[abandoned] = 0.0
        self.running_lengths[abandoned] = 0

    def state(self) -> dict[str, Any]:
        """JSON that `restore` takes back."""
        self._fetch()
        return {
            "running_returns": self.running_returns.tolist(),
            "running_lengths": self.running_lengths.tolist(),
            "returns": list(self.returns),
            "lengths": list(self.lengths),
            "numbers": {name: list(values) for name, values in self.numbers.items()},
            "num_episodes": self.num_episodes,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Takes back what `state` gave.

        Raises:
            ValueError: it is of another number of streams.
        """
        running = np.array(state["running_returns"], dtype=np.float64)
        if running.shape != self.running_returns.shape:
            raise ValueError(f"episodes of {len(running)} streams, expected {len(self.running_returns)}")
        self._waiting = []
        self.running_returns = running
        self.running_lengths = np.array(state["running_lengths"], dtype=np.int64)
        self.returns = deque(map(float, state["returns"]), maxlen=EPISODE_WINDOW)
        self.lengths = deque(map(int, state["lengths"]), maxlen=EPISODE_WINDOW)
        self.numbers = {name: deque(values, maxlen=EPISODE_WINDOW) for name, values in state["numbers"].items()}
        self.num_episodes = int(state["num_episodes"])
