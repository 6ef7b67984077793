"""The agent as a model of Sorrel, the multi-agent gridworlds that the specification comes from: docs/sorrel.md.

Sorrel calls models by the names of their methods and checks no type, so nothing of it is imported here.
"""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces

from dualhead.agent import DualHeadRecurrentPPO
from dualhead.config import NetworkConfig, NormConfig, PPOConfig
from dualhead.norms import NormEvents
from dualhead.worlds.commons.actions import NUM_VOTES, number_of

EndOfEpoch = Literal["truncated", "terminated"]


class SorrelDualHeadPPO:
    """`DualHeadRecurrentPPO` with the methods that Sorrel calls on a model. Every agent needs a model of its own.

        model = SorrelDualHeadPPO(observation_spec.input_size, action_spec.n_actions)
        agent = TreasurehuntAgent(observation_spec, action_spec, model)

    Args:
        input_size: D, how many numbers an observation has; of a shape such as (1, D) the product.
        action_space: number of actions.
        layer_size: width of the encoder's layer and of the memory; None: what `network` says.
        epsilon: for the host's log and decay only: the policy samples its actions, and explores by that.
        device: where the agent is kept.
        seed: of weights, sampling and shuffling; None draws one. The global random state is neither read nor changed.
        heads: None: one head with all actions. A mapping of names to numbers of choices: one head for each, and the
            action's number counts their combinations, the last head fastest. `composite` and `simple`: heads `move` and
            `vote` in the historical codings (13 and 7 actions for four moves); see `dualhead.worlds.commons.actions`.
        grid: (channels, height, width) of the observation's first numbers, which then go through convolutions; the
            numbers after them are used beside them. None: the observation is one vector.
        grid_high: the greatest number in the grid: 1 for one-hot codes, 255 for colours.
        end_of_epoch: how the last step of an epoch counts, whose next observation Sorrel never shows: `truncated`
            bootstraps from the value of the last observation that was seen; `terminated` from zero.
        memory_size: how many transitions `memory` keeps for the host.
        config, network, norms: as those of `DualHeadRecurrentPPO`.

    Attributes:
        agent: the `DualHeadRecurrentPPO` that acts and learns, one stream.
        memory: what the host reads and writes of past steps.
        metrics: of the last update, by name.
        epsilon, seed, device, input_size, action_space: as given.

    Raises:
        ValueError: sizes that do not fit each other.
    """

    def __init__(
        self,
        input_size: int | Sequence[int],
        action_space: int,
        layer_size: int | None = None,
        epsilon: float = 0.0,
        device: torch.device | str = "cpu",
        seed: int | None = None,
        *,
        heads: Mapping[str, int] | Literal["composite", "simple"] | None = None,
        grid: tuple[int, int, int] | None = None,
        grid_high: float = 1.0,
        end_of_epoch: EndOfEpoch = "truncated",
        memory_size: int = 1024,
        config: PPOConfig | None = None,
        network: NetworkConfig | None = None,
        norms: NormConfig | None = None,
    ) -> None:
        if end_of_epoch not in ("truncated", "terminated"):
            raise ValueError(f"end_of_epoch: expected 'truncated' or 'terminated', got {end_of_epoch!r}")
        self.input_size, self.action_space = input_size, action_space
        self.epsilon, self.device, self.end_of_epoch = epsilon, device, end_of_epoch
        self.seed = secrets.randbits(63) if seed is None else seed
        network = network or NetworkConfig()
        changes: dict[str, Any] = {}
        if layer_size is not None:
            changes |= {"hidden_size": layer_size, "encoder_sizes": (layer_size,)}
        if grid is not None and network.image_layout == "auto":
            changes["image_layout"] = "chw"
        self._num_numbers = math.prod(np.ravel(input_size).tolist())
        self._grid = grid
        self._heads = dict(heads) if isinstance(heads, Mapping) else heads
        self.agent = DualHeadRecurrentPPO(
            _observation_space(self._num_numbers, grid, grid_high),
            _action_space(action_space, heads),
            config=config,
            network=NetworkConfig(**network.model_dump() | changes),
            norms=norms,
            seed=self.seed,
            device=device,
        )
        self.memory = TransitionMemory(memory_size, self._num_numbers, self._complete)
        self.metrics: dict[str, float] = {}
        self._learns = True
        self._chosen: dict[str, int] | None = None  # by head: the last action
        self._is_waiting = False  # for what the world answers to the last action
        # What the world answered to the last action. It is recorded when the next observation comes, or none does.
        self._answer: tuple[float, bool] | None = None
        self._observation: Any = None
        self._epoch_began = False
        self._forget_events()

    def take_action(self, state: np.ndarray) -> int:
        """The action for an observation of D numbers in any shape. Learns first where the rollout is full.

        Raises:
            RuntimeError: `memory.add` has not followed the action before.
            ValueError: another number of numbers, or one that is not finite.
        """
        if self._is_waiting:
            raise RuntimeError("take_action() twice: expected memory.add(...) with the reward of the action before")
        observation = self._observation_of(state)
        self._epoch_began = False
        self._record(ends=False)
        if self.agent.rollout_is_ready:
            if self._learns:
                self._learn(observation)
            else:  # the episode goes on, and its state with it
                self.agent.num_steps -= self.agent.rollout_memory.length
                self.agent.rollout_memory.clear()
        actions = self.agent.act(observation)
        self._observation, self._is_waiting = observation, True
        if self._heads is None:
            self._chosen = {"action": int(actions[0])}
        else:
            self._chosen = {name: int(choice[0]) for name, choice in actions.items()}
        return self._number()

    def get_last_factored_actions(self) -> tuple[int, ...] | None:
        """What each head chose last. None with one head, and before the first action."""
        return None if self._heads is None or self._chosen is None else tuple(self._chosen.values())

    def note(self, resource: str, punished: bool = False) -> None:
        """Tells the norms that the last action collected a resource, and whether the agent was punished for it.

        Raises:
            ValueError: the model has no norms, or they do not know the resource.
            RuntimeError: no action was taken.
        """
        if self.agent.norms is None:
            raise ValueError("note() without norms: construct the model with norms=NormConfig(resources=...)")
        resources = self.agent.norms.resources
        if resource not in resources:
            raise ValueError(f"resource: expected one of {resources}, got {resource!r}")
        if not self._is_waiting and self._answer is None:
            raise RuntimeError("note() without an action: call take_action() before it")
        self._collected[0, resources.index(resource)] = True
        self._punished[0, resources.index(resource)] |= punished

    def add_memory_ppo(self, reward: float, done: bool) -> None:
        """`memory.add` under the name that the specification's class has for it; `memory` keeps no transition."""
        self._complete(None, reward, done)

    def start_epoch_action(self, **_: Any) -> None:
        """Begins an epoch with a zero state. Steps that `train_step` has not learned from are dropped.

        Raises:
            RuntimeError: several agents share this model.
        """
        if self._epoch_began:
            raise RuntimeError(
                "start_epoch_action() twice before any action: several agents share this model, and Sorrel does not "
                "say which of them asks; give each agent a SorrelDualHeadPPO of its own"
            )
        self._end_episode()
        if self.agent.rollout_memory.length:
            self.agent.abandon_rollout()
        self.memory.clear()
        self._epoch_began = True

    def end_epoch_action(self, **_: Any) -> None:
        """Ends the episode that is running."""
        self._end_episode()

    def train_step(self) -> float:
        """Learns from the steps of the epoch that ended, however many there are. Returns the loss.

        Without steps, and before `end_epoch_action`, it does nothing and returns 0.
        """
        self._learns = True
        if self._is_waiting or self._answer is not None or not self.agent.rollout_memory.length:
            return 0.0
        return self._learn(None)

    def reset(self) -> None:
        """Ends the episode that is running, if the host has not done so."""
        self._end_episode()
        self._epoch_began = False

    def train(self, mode: bool = True) -> SorrelDualHeadPPO:
        """Learns again, or (`mode=False`) not until the next `train_step`: full rollouts are dropped."""
        self._learns = mode
        return self

    def eval(self) -> SorrelDualHeadPPO:
        """`train(False)`: what `generate_memories` calls."""
        return self.train(False)

    def set_epsilon(self, new_epsilon: float) -> None:
        self.epsilon = new_epsilon

    def epsilon_decay(self, decay_rate: float) -> None:
        self.epsilon *= 1 - decay_rate

    def save(self, file_path: str | os.PathLike[str]) -> None:
        """Writes a checkpoint of dualhead (safetensors), whatever the name ends in; makes the folder.

        Raises:
            RuntimeError: in the middle of an epoch.
            OSError: it cannot be written.
        """
        if self._is_waiting or self._answer is not None:
            raise RuntimeError("save() in the middle of an epoch: call end_epoch_action() before it")
        Path(file_path).parent.mkdir(parents=True, exist_ok=True)
        self.agent.save(file_path)

    def load(self, file_path: str | os.PathLike[str]) -> None:
        """Continues where the model that saved this file was. A step that is not complete is forgotten.

        Raises:
            CheckpointError: no checkpoint of dualhead, or one of another architecture; the model is unchanged.
        """
        self.agent.load(file_path)
        self._is_waiting, self._answer = False, None
        self._forget_events()
        self.memory.clear()

    def _complete(self, action: int | None, reward: float, done: bool) -> None:
        if not self._is_waiting:
            raise RuntimeError("memory.add() without an action of this model: call take_action() before it")
        if action is not None and action != self._number():
            raise ValueError(f"action: expected {self._number()}, which take_action() returned, got {action!r}")
        self._answer, self._is_waiting = (float(reward), bool(done)), False

    def _record(self, *, ends: bool) -> None:
        """Records the last answer of the world; `ends`: no observation follows it."""
        if self._answer is None:
            return
        reward, done = self._answer
        events = None if self.agent.norms is None else NormEvents(self._punished, self._collected)
        self.agent.record(
            [reward],
            [done or (ends and self.end_of_epoch == "terminated")],
            [ends and not done and self.end_of_epoch == "truncated"],
            final_observations=self._observation,
            events=events,
        )
        self._answer = None
        self._forget_events()

    def _end_episode(self) -> None:
        if self._is_waiting:  # the world failed in the middle of a step: nobody knows how the episode ends
            self.agent.forget_actions()
            self.agent.abandon_rollout()
            self._is_waiting = False
            self._forget_events()
        self._record(ends=True)

    def _learn(self, next_observation: Any) -> float:
        self.metrics = self.agent.learn(next_observation, partial=True)
        return self.metrics["loss/total"]

    def _forget_events(self) -> None:
        shape = (1, 0 if self.agent.norms is None else len(self.agent.norms.resources))
        self._punished, self._collected = (torch.zeros(shape, dtype=torch.bool) for _ in range(2))

    def _observation_of(self, state: np.ndarray) -> Any:
        """A state of the host as a batch of one observation."""
        numbers = np.array(state, np.float32).reshape(1, -1)
        if numbers.size != self._num_numbers:
            raise ValueError(f"state: expected {self._num_numbers} numbers (input_size), got {np.shape(state)}")
        if self._grid is None:
            return numbers
        size = math.prod(self._grid)
        parts = {"grid": numbers[:, :size].reshape(1, *self._grid), "scalars": numbers[:, size:]}
        return parts if size < self._num_numbers else parts["grid"]

    def _number(self) -> int:
        """The host's number of the last action."""
        assert self._chosen is not None
        choices = tuple(self._chosen.values())
        if self._heads is None:
            return choices[0]
        if isinstance(self._heads, str):
            move, vote = choices
            return number_of(self._heads, move, vote, _num_moves(self.action_space, self._heads))
        return int(np.ravel_multi_index(choices, tuple(self._heads.values())))


class TransitionMemory:
    """The last transitions, in the arrays of Sorrel's `Buffer`. The agent learns from its own rollout, not from these.

    Attributes:
        states [capacity, D] float32, actions, rewards, dones [capacity]: as the host added them; `extra_data` likewise,
            by name, in arrays that the host puts there.
        idx, size: where the next one goes, and how many there are.
    """

    n_frames = 1

    def __init__(self, capacity: int, num_numbers: int, complete: Callable[[int, float, bool], None]) -> None:
        self.capacity, self.obs_shape = capacity, (num_numbers,)
        self.extra_data: dict[str, np.ndarray] = {}
        self._complete = complete
        self.clear()

    def clear(self) -> None:
        self.states = np.zeros((self.capacity, *self.obs_shape), np.float32)
        self.actions = np.zeros(self.capacity, np.int64)
        self.rewards, self.dones = np.zeros(self.capacity, np.float32), np.zeros(self.capacity, np.float32)
        self.idx = self.size = 0

    def add(self, obs: np.ndarray, action: int, reward: float, done: bool, **extra: Any) -> None:
        """Adds a transition, whose action must be the one that the model chose, and completes the model's step."""
        self._complete(action, reward, done)
        row = self.idx
        self.states[row] = np.ravel(obs)
        self.actions[row], self.rewards[row], self.dones[row] = action, reward, done
        for name, value in extra.items():
            self.extra_data[name][row] = value
        self.idx = (row + 1) % self.capacity
        self.size = min(self.size + 1, self.capacity)

    def add_empty(self) -> None:
        """Blank frames between games: the recurrent state makes them unnecessary."""

    def current_state(self) -> np.ndarray:
        """Earlier frames to stack before the next observation: none, float32 [0, D]."""
        return self.states[:0]

    def last_transition(self, offset: int = 0) -> tuple[int, float, bool] | None:
        """Action, reward and done of the transition `offset` before the last one, or None."""
        if self.size <= offset:
            return None
        row = (self.idx - 1 - offset) % self.capacity
        return int(self.actions[row]), float(self.rewards[row]), bool(self.dones[row])

    def __len__(self) -> int:
        return self.size


def _observation_space(num_numbers: int, grid: tuple[int, int, int] | None, high: float) -> gym.Space:
    if grid is None:
        return _numbers(num_numbers)
    rest = num_numbers - math.prod(grid)
    if len(grid) != 3 or min(grid) < 1 or rest < 0:
        raise ValueError(
            f"grid: expected channels, height and width of at most input_size={num_numbers} numbers, got {grid}"
        )
    image = spaces.Box(0.0, high, tuple(grid), np.float32)
    return spaces.Dict([("grid", image), ("scalars", _numbers(rest))]) if rest else image


def _numbers(count: int) -> spaces.Box:
    return spaces.Box(-np.inf, np.inf, (count,), np.float32)


def _action_space(num_actions: int, heads: Mapping[str, int] | str | None) -> gym.Space:
    if heads is None:
        return spaces.Discrete(num_actions)
    if isinstance(heads, str):
        sizes = {"move": _num_moves(num_actions, heads), "vote": NUM_VOTES}
    else:
        sizes = dict(heads)
        if math.prod(sizes.values()) != num_actions:
            raise ValueError(f"heads: expected {num_actions} combinations (action_space), got {sizes}")
    return spaces.Dict([(name, spaces.Discrete(size)) for name, size in sizes.items()])


def _num_moves(num_actions: int, coding: str) -> int:
    """Moves of a coding with so many actions: 3 · moves + 1 of them are `composite`, moves + 3 `simple`."""
    if coding not in ("composite", "simple"):
        raise ValueError(f"heads: expected a mapping of names to sizes, 'composite' or 'simple', got {coding!r}")
    moves, rest = divmod(num_actions - 1, NUM_VOTES) if coding == "composite" else (num_actions - NUM_VOTES, 0)
    if rest or moves < 1:
        raise ValueError(f"action_space: the {coding} coding has 13 or 7 actions for four moves, got {num_actions}")
    return moves
