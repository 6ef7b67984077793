"""One world of the commons as a PettingZoo `ParallelEnv`: `parallel_env(num_agents=4)` makes it."""

from __future__ import annotations

import copy
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from dualhead.worlds.commons.config import CommonsConfig
from dualhead.worlds.commons.world import Commons
from dualhead.worlds.streams import UnavailableEnvironment

try:
    from pettingzoo import ParallelEnv
except ModuleNotFoundError as error:
    raise UnavailableEnvironment(
        f"the commons as a ParallelEnv needs the package {error.name}: pip install -e '.[pettingzoo]' in the checkout"
    ) from error


def parallel_env(
    config: CommonsConfig | None = None, *, render_mode: str | None = None, **settings: Any
) -> CommonsParallelEnv:
    """One world as a PettingZoo `ParallelEnv`; its rules as a config, or as settings: `parallel_env(num_agents=4)`.

    `render_mode` is None, "ansi" or "rgb_array".

    Raises:
        ValueError: a setting is not possible, or came both ways.
    """
    if config is not None and settings:
        raise ValueError(f"parallel_env: expected a config or settings, got both: {sorted(settings)}")
    return CommonsParallelEnv(config or CommonsConfig(**settings), render_mode=render_mode)


class CommonsParallelEnv(ParallelEnv):
    """The commons for PettingZoo: agents `agent_0`, `agent_1`, ...; an episode is an epoch. See `parallel_env`.

    Observations, actions and rules are those of `Commons`, as NumPy arrays. All agents are truncated together after
    `epoch_turns`. `reset()` goes on with the run (level, debts, phases); with a seed it begins a new one.
    An info says what the agent `collected` (a name or None) and whether it was `punished` for it.
    """

    metadata: dict[str, Any] = {  # noqa: RUF012
        "name": "dualhead_commons_v0",
        "render_modes": ["ansi", "rgb_array"],
        "is_parallelizable": True,
        "render_fps": 5,
    }

    def __init__(self, config: CommonsConfig, *, render_mode: str | None = None) -> None:
        if render_mode is not None and render_mode not in self.metadata["render_modes"]:
            raise ValueError(f"render_mode: expected None, 'ansi' or 'rgb_array', got {render_mode!r}")
        self.render_mode = render_mode
        self.commons, self.resources = Commons(config), config.resources
        self.possible_agents = [f"agent_{number}" for number in range(config.num_agents)]
        self.agents: list[str] = []
        # One object per agent: each can be seeded by itself.
        commons, names = self.commons, self.possible_agents
        self.observation_spaces = {name: copy.deepcopy(commons.observation_space) for name in names}
        self.action_spaces = {name: copy.deepcopy(commons.action_space) for name in names}
        self._is_fresh = True

    def observation_space(self, agent: str) -> gym.Space:
        return self.observation_spaces[agent]

    def action_space(self, agent: str) -> gym.Space:
        return self.action_spaces[agent]

    def reset(
        self, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
        """Begins an epoch; observations and empty infos by agent. `options` are ignored."""
        if seed is not None:
            self.commons.reset(seed=seed)
        elif not self._is_fresh:
            self.commons.next_epoch()
        self._is_fresh = True
        self.agents = self.possible_agents[:]
        return self._by_agent(self.commons.observations()), {name: {} for name in self.agents}

    def step(
        self, actions: dict[str, Any]
    ) -> tuple[dict[str, Any], dict[str, float], dict[str, bool], dict[str, bool], dict[str, dict[str, Any]]]:
        """One turn of all agents: observations, rewards, terminations, truncations and infos by agent.

        Raises:
            ValueError: no epoch is running, or an agent has no action.
        """
        if not self.agents:
            raise ValueError("step() needs a running epoch: call reset() before it, and after a truncation")
        missing = [name for name in self.agents if actions.get(name) is None]
        if missing:
            raise ValueError(f"step() needs an action of every agent, {missing} have none")
        given = [actions[name] for name in self.agents]
        heads = [sorted(action) if isinstance(action, dict) else [] for action in given]
        if heads != heads[:1] * len(given):
            raise ValueError(f"step() needs actions of one form, got {actions}")
        step = self.commons.step({head: [a[head] for a in given] for head in heads[0]} if heads[0] else given)
        punished, collected = self.commons.events
        assert collected is not None
        kinds = [next((kind for kind, taken in zip(self.commons.resources, row) if taken), None) for row in collected]
        infos = {
            name: {"collected": kind, "punished": bool(own.any())}
            for name, kind, own in zip(self.agents, kinds, punished)
        }
        ended = step.final_observations is not None
        observations = self._by_agent(step.final_observations if ended else step.observations)
        rewards = dict(zip(self.agents, step.rewards.tolist()))
        terminations, truncations = dict.fromkeys(self.agents, False), dict.fromkeys(self.agents, ended)
        self._is_fresh = ended  # the next epoch is laid out already
        if ended:
            self.agents = []
        return observations, rewards, terminations, truncations, infos

    def render(self) -> str | NDArray[np.uint8] | None:
        """The world as text or picture; None, with a warning, without a `render_mode`."""
        if self.render_mode is None:
            gym.logger.warn("render() needs render_mode 'ansi' or 'rgb_array' when the environment is made")
            return None
        if self.render_mode == "rgb_array":
            return self.commons.frame()
        level = f"turn {self.commons.turn}, level {int(self.commons.level_index)} (p = {float(self.commons.level):.2f})"
        return f"{level}\n{self.commons.ascii()}"

    def _by_agent(self, batched: Any) -> dict[str, Any]:
        return {name: _row(batched, i) for i, name in enumerate(self.possible_agents)}


def _row(batched: Any, index: int) -> Any:
    """One agent's part, copied out of the batch; single numbers as the NumPy integers that spaces want."""
    if isinstance(batched, dict):
        return {name: _row(part, index) for name, part in batched.items()}
    return batched[index].numpy().copy()[()]
