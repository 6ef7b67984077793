"""A trained policy that acts, with a recurrent state and random numbers of its own."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dualhead import snapshot
from dualhead.agent import DualHeadRecurrentPPO
from dualhead.errors import DataError
from dualhead.networks.encoders import EncoderFactory
from dualhead.networks.memory import MemoryFactory
from dualhead.networks.policy import RecurrentPolicy
from dualhead.population import Learner, individual_seed
from dualhead.running.checkpoint import RunError, expect_own, use_newest
from dualhead.spaces import ActionSpec, ObservationSpec, all_finite, as_tensor, holds_tensors
from dualhead.storage import CheckpointError, read_tensors
from dualhead.types import RecurrentState, joined_rows, on_device, own_rows
from dualhead.worlds.streams import Streams, spaces_of_agents


class Player:
    """Plays a policy in any number of streams.

        player = dualhead.load_policy("runs/...")
        observation, _ = env.reset()
        reward, episode_start = 0.0, True
        while True:
            action = player.act(observation, episode_start, rewards=reward)
            observation, reward, terminated, truncated, _ = env.step(action)
            episode_start = terminated or truncated
            if episode_start:
                observation, _ = env.reset()

    Args:
        policy: is only read. If it goes on learning elsewhere, the player uses its newest weights.
        observation_space, action_space: of one stream.
        seed: of sampled actions; the global random state is neither read nor changed.
    """

    def __init__(
        self, policy: RecurrentPolicy, observation_space: gym.Space, action_space: gym.Space, *, seed: int = 0
    ) -> None:
        self.policy = policy
        self.observation_space = observation_space
        self.action_space = action_space
        self._observation_spec = ObservationSpec(observation_space)
        self._action_spec = ActionSpec(action_space)
        self._sampling = torch.Generator(policy.device).manual_seed(seed)
        self._state: RecurrentState | None = None
        self._actions = torch.empty(0)  # of the last call, in the policy's units

    def reset(self, *, seed: int | None = None) -> None:
        """Forgets everything: the next call of `act` begins an episode in every stream, in any number of streams.

        Args:
            seed: of sampled actions from now on; None: sampling goes on.
        """
        self._state = None
        if seed is not None:
            self._sampling.manual_seed(seed)

    def act(self, observations: Any, episode_starts: Any, *, rewards: Any = None, deterministic: bool = True) -> Any:
        """Chooses actions and advances the recurrent state.

        Args:
            observations: [B, ...] nested like the observation space; without the B for one plain environment.
            episode_starts: [B] bool, this observation is the first of an episode, so the stream's state is reset. A
                single bool for one plain environment. The first call begins an episode in every stream.
            rewards: [B] task rewards of the last actions (one number for one plain environment). Only a policy that was
                trained with `previous_reward` needs them, unless an episode begins in every stream.
            deterministic: the likeliest actions, or sampled ones.

        Returns:
            Actions as the action space has them, with a batch axis, or without it where `episode_starts` was a single
            bool: tensors where observations are tensors, else NumPy arrays.

        Raises:
            DataError: wrong shapes, missing parts, missing rewards, non-finite numbers, a mask without a legal choice.
            ValueError: another number of streams than before.
        """
        starts = np.asarray(episode_starts)
        actions = self._prepare(observations, starts, rewards)(deterministic)
        return actions if starts.ndim else _first(actions)

    @torch.no_grad()
    def _prepare(self, observations: Any, starts: NDArray[Any], rewards: Any) -> Callable[[bool], Any]:
        """Everything that `act` may refuse. Nothing changes until the function it returns is called."""
        if starts.ndim > 1 or not ((starts == 0) | (starts == 1)).all():
            raise DataError(f"episode_starts: expected a bool for each stream, or one bool, got {starts.tolist()}")
        num_streams, policy, state = starts.size, self.policy, self._state
        if state is not None and state.num_streams != num_streams:
            raise ValueError(
                f"episode_starts of {num_streams} streams after calls with {state.num_streams}: "
                f"reset() comes before another number of streams"
            )
        tensors = self._observation_spec.to_tensors(observations, num_streams, dtype=policy.dtype)
        policy.heads.check_mask(tensors)
        tensors = {name: on_device(tensor, policy.device) for name, tensor in tensors.items()}
        if state is None or starts.all():
            state = policy.initial_state(num_streams)
            tensors |= policy.previous.nothing(num_streams, device=policy.device, dtype=policy.dtype)
        else:
            begins = on_device(torch.from_numpy(starts.reshape(num_streams) != 0), policy.device)
            state = state.reset_where(begins)
            previous = policy.previous.after(self._actions, self._rewards(rewards, num_streams))
            tensors |= policy.previous.reset_where(previous, begins)
        numpy = not holds_tensors(observations)

        @torch.no_grad()
        def choose(deterministic: bool) -> Any:
            output, self._state = policy.step(tensors, state)
            distribution = output.distribution
            self._actions = distribution.mode() if deterministic else distribution.sample(self._sampling)
            # A copy: the caller may change what is returned.
            return self._action_spec.to_env(self._actions.clone(), numpy=numpy)

        return choose

    def _rewards(self, rewards: Any, num_streams: int) -> Tensor:
        """[B] rewards of the last actions; zeros for a policy that does not see them."""
        policy = self.policy
        if not policy.previous.sees_reward:
            return torch.zeros(num_streams, dtype=policy.dtype, device=policy.device)
        if rewards is None:
            raise DataError(
                "rewards: this policy was trained with previous_reward: "
                "expected act(observations, episode_starts, rewards=...) within an episode, got none"
            )
        tensor = as_tensor(rewards, "rewards")
        tensor = tensor.reshape(1) if tensor.numel() == num_streams == 1 else tensor
        if tuple(tensor.shape) != (num_streams,) or not all_finite(tensor):
            raise DataError(f"rewards: expected {num_streams} finite numbers, one per stream, got {rewards!r}")
        return on_device(tensor.to(policy.dtype), policy.device)


def _first(actions: Any) -> Any:
    if isinstance(actions, tuple):
        return tuple(map(_first, actions))
    return {key: _first(part) for key, part in actions.items()} if isinstance(actions, dict) else actions[0]


class Players:
    """Plays a policy for each of the A agents of worlds, used like one `Player` of all their streams.

    Stream b = world · A + agent is played by player b mod A. Agents may have different spaces: observations come as
    `ByAgent` then, and actions are returned as `ByAgent`.

    Args:
        players: one for each agent.
    """

    def __init__(self, players: Sequence[Player]) -> None:
        self.players = tuple(players)

    def reset(self, *, seed: int | None = None) -> None:
        """See `Player.reset`. Each player samples by a seed of its own, which `seed` and its number determine."""
        for agent, player in enumerate(self.players):
            player.reset(seed=None if seed is None else individual_seed(seed, agent))

    def act(self, observations: Any, episode_starts: Any, *, rewards: Any = None, deterministic: bool = True) -> Any:
        """Actions of all agents; see `Player.act`. What one player refuses changes none of them.

        Args:
            observations: [B, ...] of all streams; or `ByAgent`, [W, ...] of each agent.
            episode_starts: [B] bool.
            rewards: [B].
            deterministic: the likeliest actions, or sampled ones.
        """
        starts, num_agents = np.asarray(episode_starts), len(self.players)
        if starts.ndim != 1 or starts.size % num_agents:
            raise DataError(
                f"episode_starts: expected a bool for each of {num_agents} agents in every world, "
                f"got {episode_starts!r}"
            )
        rewards = None if rewards is None else as_tensor(rewards, "rewards")
        chosen = [
            player._prepare(*own_rows((observations, starts, rewards), agent, num_agents))
            for agent, player in enumerate(self.players)
        ]
        return joined_rows([choose(deterministic) for choose in chosen], like=observations)


def player_of(learner: Learner, *, seed: int = 0) -> Player | Players:
    """Plays the policies that a learner has now; they go on learning.

    Args:
        learner: one agent, or independent ones.
        seed: of sampled actions.
    """
    learners = [learner] if isinstance(learner, DualHeadRecurrentPPO) else learner.learners
    players = [Player(one.policy, one.observation_spec.space, one.action_spec.space) for one in learners]
    player = players[0] if isinstance(learner, DualHeadRecurrentPPO) else Players(players)
    player.reset(seed=seed)
    return player


def load_policy(
    run: str | os.PathLike[str],
    *,
    encoder: nn.Module | EncoderFactory | None = None,
    memory: nn.Module | MemoryFactory | None = None,
    seed: int = 0,
) -> Player | Players:
    """A trained policy, ready to act; see `Player.act`. The file describes the spaces, so no environment is made.

    Of a run with independent policies: `Players`, one for each agent of a world.

    Args:
        run: a run directory (its newest whole checkpoint is taken), one of its checkpoint files, or a file that
            `DualHeadRecurrentPPO.save` wrote.
        encoder, memory: the parts of its own that the policy was trained with; independent policies need a class or
            factory, which makes one for each.
        seed: of sampled actions.

    Raises:
        RunError: no run, or no whole checkpoint, is there.
        CheckpointError: the checkpoint cannot be read, a part is missing, or a part is of another class.
    """
    return load_player(run, seed=seed, encoder=encoder, memory=memory)[0]


Loaded = tuple[Player | Players, Path, dict[str, Any]]


def load_player(run: str | os.PathLike[str], *, seed: int = 0, **foreign: Any) -> Loaded:
    """As `load_policy`, with the checkpoint's path and metadata."""
    path = Path(run)

    def load(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> Loaded:
        return _player(path, tensors, metadata, seed=seed, foreign=foreign), path, metadata

    if os.path.isfile(path):  # unlike the method, False for names that are too long
        tensors, metadata = read_tensors(path)
        expect_own(path, metadata)
        return load(path, tensors, metadata)
    if not os.path.exists(path / "config.json"):
        raise RunError(f"{run} holds no run: expected a run directory, or a checkpoint file")
    return use_newest(path, load)


def _player(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any], *, seed: int, foreign: dict[str, Any]
) -> Player | Players:
    """The player, or players, of one checkpoint."""
    learners = snapshot.learners(tensors, metadata, source=str(path))
    for name, part in foreign.items():
        if "learners" in metadata and isinstance(part, nn.Module):
            raise CheckpointError(f"{name}: {path} has several policies: expected a class or factory, got a module")
    players = []
    for of_learner, own in learners:
        arguments = snapshot.arguments(own, source=str(path))
        parts = snapshot.foreign_arguments(own, source=str(path), **foreign)
        made = snapshot.make_policy(arguments, of_learner, parts, source=str(path))
        for name, part in made.foreign_parts.items():
            saved = str(own["foreign_parts"][name])
            if saved.rpartition(":")[2] != part.rpartition(":")[2]:  # the class may have moved to another module
                raise CheckpointError(f"{path} was saved with the {name} {saved}, got {part}")
        players.append(Player(made, arguments["observation_space"], arguments["action_space"]))
    player = Players(players) if "learners" in metadata else players[0]
    player.reset(seed=seed)
    return player


def expect_spaces(player: Player | Players, world: Streams | gym.Env, source: object) -> None:
    """Raises CheckpointError where a world has other spaces, or other agents, than the policy of `source`."""
    players = player.players if isinstance(player, Players) else [player]
    ours, theirs = [(one.observation_space, one.action_space) for one in players], spaces_of_agents(world)
    if isinstance(player, Player) and theirs == theirs[:1] * len(theirs):
        theirs = theirs[:1]  # one policy for all
    if ours != theirs:
        of_agents, of_theirs = (of if len(of) > 1 else of[0] for of in (ours, theirs))
        raise CheckpointError(f"{source} has the spaces {of_agents}, but the environment has {of_theirs}")


def run_directory(run: str | os.PathLike[str]) -> Path:
    """The run directory, where `run` is one or one of its checkpoint files.

    Raises:
        RunError: it is a file that lies in no run.
    """
    path = Path(run)
    if not os.path.isfile(path):
        return path
    folder = path.absolute().parent.parent
    if not (folder / "config.json").exists():
        raise RunError(f"{run} is no checkpoint of a run: expected a run directory, or a file in its `checkpoints`")
    return folder
