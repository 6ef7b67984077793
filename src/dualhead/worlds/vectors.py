"""Several Gymnasium environments as one, in SAME_STEP mode, whose episodes in progress can be saved."""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.vector.utils import batch_space, concatenate, create_empty_array, iterate
from numpy.typing import NDArray

from dualhead.worlds.replay import (
    ActionLog,
    Beginnings,
    CannotReplay,
    Episode,
    as_row,
    episode_of,
    leaves,
    play_again,
)
from dualhead.worlds.replay_trial import legal_action

NUMBERS = "numbers"
"""Where `LeanSyncVectorEnv` puts the numbers [B] of episodes that ended, by name."""
_OURS = ("r", "l", "t")
"""What `RecordEpisodeStatistics` says of an episode is counted here anyway."""


class LeanSyncVectorEnv(SyncVectorEnv):
    """Gymnasium's SyncVectorEnv in SAME_STEP mode without what learning does not use.

    Infos carry only `final_obs` and the numbers of episodes that ended, and returned arrays are overwritten by the next
    step: on small environments those two cost more than the environments themselves.

    Attributes:
        makers: of the environments.
    """

    def __init__(self, env_fns: Sequence[Callable[[], gym.Env]], *, observation_mode: Any = "same") -> None:
        super().__init__(env_fns, copy=False, observation_mode=observation_mode, autoreset_mode=AutoresetMode.SAME_STEP)
        self.makers = env_fns
        self._plain = isinstance(self.single_observation_space, gym.spaces.Box | gym.spaces.Discrete)
        self._beginnings = [Beginnings(env) for env in self.envs]
        self._log = ActionLog(self.action_space, self.num_envs)

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begins an episode in every environment; `seed` is one for each, or None, and there are no options."""
        for i, (beginnings, given) in enumerate(zip(self._beginnings, _one_seed_each(seed, self.num_envs))):
            self._env_obs[i] = beginnings.reset(seed=given)
            self._log.begin(i)
        return self._joined(), {}

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        infos: dict[str, Any] = {}
        rows, plain = self._observations, self._plain
        # Lists are filled faster than arrays.
        rewards, terminations, truncations = [], [], []
        self._log.append(actions)
        for i, (env, action) in enumerate(zip(self.envs, iterate(self.action_space, actions))):
            observation, reward, terminated, truncated, info = env.step(action)
            rewards.append(reward)
            terminations.append(terminated)
            truncations.append(truncated)
            if terminated or truncated:
                if not infos:
                    infos["final_obs"] = np.full(self.num_envs, None, dtype=object)
                # reset() may write to the same arrays.
                is_array = type(observation) is np.ndarray
                infos["final_obs"][i] = observation.copy() if is_array else copy.deepcopy(observation)
                for name, number in _numbers(info):
                    numbers = infos.setdefault(NUMBERS, {}).setdefault(name, np.full(self.num_envs, np.nan))
                    numbers[i] = number
                observation = self._beginnings[i].reset()
                self._log.begin(i)
            if plain:
                rows[i] = observation
            else:
                self._env_obs[i] = observation
        if not plain:
            concatenate(self.single_observation_space, self._env_obs, rows)
        self._rewards[:], self._terminations[:], self._truncations[:] = rewards, terminations, truncations
        return rows, self._rewards, self._terminations, self._truncations, infos

    def episodes(self) -> list[Episode]:
        """The episode in progress of each environment.

        Raises:
            CannotReplay: one cannot be saved.
        """
        return [
            episode_of(beginnings, self._log, i, _row(self._observations, i))
            for i, beginnings in enumerate(self._beginnings)
        ]

    def replay(self, episodes: list[Episode]) -> Any:
        """Plays episodes in progress again, one in each environment; the observations [B, ...] to act on.

        Raises:
            CannotReplay: one led elsewhere.
        """
        for i, (beginnings, episode) in enumerate(zip(self._beginnings, episodes)):
            try:
                self._env_obs[i] = play_again(beginnings, episode)
            except CannotReplay as error:
                raise CannotReplay(f"environment {i}: {error}") from error
        self._log.fill([episode.actions for episode in episodes])
        return self._joined()

    def _joined(self) -> Any:
        return concatenate(self.single_observation_space, self._env_obs, self._observations)


class ReplayingAsyncVectorEnv(AsyncVectorEnv):
    """Gymnasium's AsyncVectorEnv in SAME_STEP mode, with a `Recorder` around each environment in its process.

    Attributes:
        makers: of the environments without it.
    """

    def __init__(self, env_fns: Sequence[Callable[[], gym.Env]]) -> None:
        recorders = [functools.partial(_recorder, env_fn, i) for i, env_fn in enumerate(env_fns)]
        super().__init__(recorders, autoreset_mode=AutoresetMode.SAME_STEP)
        self.makers = env_fns

    def reset_async(self, seed: Any = None, options: dict[str, Any] | None = None) -> None:
        super().reset_async(seed=_one_seed_each(seed, self.num_envs), options=options)

    def episodes(self) -> list[Episode]:
        """As `LeanSyncVectorEnv.episodes`."""
        given = self.call("saved")
        for episode in given:
            if isinstance(episode, str):
                raise CannotReplay(episode)
        return list(given)

    def replay(self, episodes: list[Episode]) -> Any:
        """As `LeanSyncVectorEnv.replay`."""
        self.set_attr("episode", episodes)
        observations = []
        for why_not, observation in self.call("replayed"):
            if why_not is not None:
                raise CannotReplay(why_not)
            observations.append(observation)
        out = create_empty_array(self.single_observation_space, n=self.num_envs)
        assert out is not None
        return concatenate(self.single_observation_space, observations, out)


class KeepsFinalObservation(gym.Wrapper):
    """Copies the observation that ends an episode, so that a reset which writes to the same arrays leaves it alone."""

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        if terminated or truncated:
            observation = copy.deepcopy(observation)
        return observation, reward, terminated, truncated, info


class Recorder(gym.Wrapper):
    """Records the episode in progress of one environment in a process of its own.

    Args:
        env: what is recorded.
        number: of the environment, for messages.
    """

    def __init__(self, env: gym.Env, number: int) -> None:
        super().__init__(env)
        self.number = number
        self.replayed: tuple[str | None, Any] = (None, None)
        """Why the last episode that was set could not be played again, or None and its last observation."""
        self._beginnings = Beginnings(env)
        self._log = ActionLog(batch_space(env.action_space, 1), 1)
        self._observation: Any = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """With a seed, of the process's global generators too: Python seeds `random` by the system after a fork."""
        if seed is not None:
            random.seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002
        self._observation = self._beginnings.reset(seed=seed)
        self._log.begin(0)
        return self._observation, {}

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        self._log.append(action)
        self._observation, reward, terminated, truncated, info = self.env.step(action)
        return self._observation, reward, terminated, truncated, info

    def saved(self) -> Episode | str:
        """The episode in progress, or why it cannot be saved: an error would end the process."""
        try:
            row = as_row(self.observation_space, self._observation)
            return episode_of(self._beginnings, self._log, 0, row)
        except CannotReplay as error:
            return f"environment {self.number}: {error}"

    @property
    def episode(self) -> None:
        """Setting it plays an episode again; `replayed` says what came of it."""

    @episode.setter
    def episode(self, given: Episode) -> None:
        try:
            self._observation = play_again(self._beginnings, given)
            self._log.fill([given.actions])
            self.replayed = None, self._observation
        except CannotReplay as error:
            self.replayed = f"environment {self.number}: {error}", None


def _recorder(env_fn: Callable[[], gym.Env], number: int) -> gym.Env:
    return Recorder(KeepsFinalObservation(env_fn()), number)


def with_final_observations(envs: VectorEnv) -> VectorEnv:
    """A vector environment in SAME_STEP mode whose `final_obs` no reset overwrites: see `GymnasiumStreams`."""
    inner = envs.unwrapped
    if type(envs) is SyncVectorEnv:
        made = [functools.partial(_itself, env) for env in envs.envs]
        lean = LeanSyncVectorEnv(made, observation_mode=envs.observation_mode)
        lean.makers = envs.env_fns
        return lean
    if isinstance(inner, SyncVectorEnv) and not isinstance(inner, LeanSyncVectorEnv):
        inner.envs = [KeepsFinalObservation(env) for env in inner.envs]
    elif isinstance(inner, AsyncVectorEnv) and not isinstance(inner, ReplayingAsyncVectorEnv):
        _refuse_overwritten(inner.env_fns[0])
    return envs


def _numbers(info: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers in the `info` of an episode's last step: at its top, and under `episode`."""
    of_episode = info.get("episode")
    named = [*info.items()]
    if isinstance(of_episode, dict):
        named += [(name, value) for name, value in of_episode.items() if name not in _OURS]
    for name, value in named:
        if isinstance(value, bool | int | float | np.bool_ | np.integer | np.floating):
            yield name, float(value)


def gymnasium_numbers(final_info: Any) -> dict[str, NDArray[np.float64]] | None:
    """The same from `infos["final_info"]` of Gymnasium's vector environments: arrays, and under `_NAME` who has one."""
    if not isinstance(final_info, dict):
        return None
    found: dict[str, NDArray[np.float64]] = {}
    of_episode = final_info.get("episode")
    for infos in (final_info, of_episode if isinstance(of_episode, dict) else {}):
        for name, values in infos.items():
            mask = infos.get(f"_{name}")
            is_numbers = isinstance(values, np.ndarray) and values.ndim == 1 and values.dtype.kind in "biuf"
            if is_numbers and isinstance(mask, np.ndarray) and not (infos is not final_info and name in _OURS):
                found[name] = np.where(mask, values, np.nan)
    return found or None


def _itself(env: gym.Env) -> gym.Env:
    return env


def _refuse_overwritten(env_fn: Callable[[], gym.Env]) -> None:
    """Refuses environments whose reset returns arrays in the memory of those that the step before it returned."""
    env = layer = env_fn()
    try:
        while isinstance(layer, gym.Wrapper):
            if isinstance(layer, KeepsFinalObservation):
                return
            layer = layer.env
        action_space = copy.deepcopy(env.action_space)
        action_space.seed(0)
        before, _ = env.reset(seed=0)
        before = env.step(legal_action(action_space, before))[0]
        after, _ = env.reset()
        if any(np.shares_memory(a, b) for a, b in zip(leaves(before), leaves(after))):
            raise ValueError(
                "the reset of these environments overwrites the observation that their last step returned, and "
                "AsyncVectorEnv copies it too late: wrap each environment in "
                "dualhead.worlds.vectors.KeepsFinalObservation, or use make_streams(make_env, num_envs, "
                "vectorization='async')"
            )
    finally:
        env.close()


def _one_seed_each(seed: Any, num_envs: int) -> list[int | None]:
    if seed is None or isinstance(seed, int):
        return [None if seed is None else seed + i for i in range(num_envs)]
    return list(seed)


def _row(observations: Any, i: int) -> Any:
    """One of batched observations, as a batch of one."""
    if isinstance(observations, dict):
        return {key: _row(part, i) for key, part in observations.items()}
    if isinstance(observations, tuple):
        return tuple(_row(part, i) for part in observations)
    return observations[i : i + 1]
