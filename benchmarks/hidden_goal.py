"""PettingZoo's speaker and listener as a task of memory: the speaker sees the goal in the first steps only.

    cd benchmarks
    dualhead study results/pettingzoo/speaker.toml

The study trains with it; on the command line it is `--wrappers hidden_goal:HidesGoal`.
"""

from typing import Any

import numpy as np
from pettingzoo.utils.wrappers import BaseParallelWrapper


class HidesGoal(BaseParallelWrapper):
    """Zeros in place of an agent's observation after the first `shown` steps of an episode."""

    def __init__(self, env: Any, agent: str = "speaker_0", shown: int = 2) -> None:
        super().__init__(env)
        self._agent, self._shown, self._turn = agent, shown, 0

    def reset(self, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
        self._turn = 0
        return super().reset(seed=seed, options=options)

    def step(self, actions: dict[str, Any]) -> tuple[dict, dict, dict, dict, dict]:
        observations, *rest = super().step(actions)
        self._turn += 1
        if self._turn >= self._shown and self._agent in observations:
            observations = observations | {self._agent: np.zeros_like(observations[self._agent])}
        return observations, *rest
