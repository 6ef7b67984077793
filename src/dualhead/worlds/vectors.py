"""Several Gymnasium environments as one, in SAME_STEP mode, whose episodes in progress can be saved."""

from __future__ import annotations

import copy
import functools
import os
import random
import signal
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.vector.utils import concatenate, iterate
from numpy.typing import NDArray

from dualhead.worlds.replay import Recorder, action_bytes, layers_of, leaves
from dualhead.worlds.replay_trial import legal_action

_OURS = ("r", "l", "t")
"""What `RecordEpisodeStatistics` says of an episode is counted here anyway."""


class LeanSyncVectorEnv(SyncVectorEnv):
    """Gymnasium's SyncVectorEnv in SAME_STEP mode, of `Recorder`s, without what learning does not use.

    Infos carry only `final_obs` and the numbers of episodes that ended, and returned arrays are overwritten by the next
    step: on small environments those two cost more than the environments themselves.

    Attributes:
        makers: of the environments without their recorders.
    """

    envs: list[Recorder]  # type: ignore[assignment]

    def __init__(self, env_fns: Sequence[Callable[[], gym.Env]], *, observation_mode: Any = "same") -> None:
        recorders = [functools.partial(_recorded, env_fn) for env_fn in env_fns]
        super().__init__(
            recorders, copy=False, observation_mode=observation_mode, autoreset_mode=AutoresetMode.SAME_STEP
        )
        self.makers = env_fns
        self._plain = isinstance(self.single_observation_space, gym.spaces.Box | gym.spaces.Discrete)

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        infos: dict[str, Any] = {}
        rows, plain = self._observations, self._plain
        # Lists are filled faster than arrays.
        rewards, terminations, truncations = [], [], []
        in_bytes = action_bytes(self.envs[0].row, actions, self.num_envs)
        for i, (recorder, action, row) in enumerate(zip(self.envs, iterate(self.action_space, actions), in_bytes)):
            # As `Recorder.step` does, without the time that a call takes.
            recorded = recorder.actions
            if len(recorded) <= recorder.max_bytes:
                recorded += row
            observation, reward, terminated, truncated, info = recorder.env.step(action)
            rewards.append(reward)
            terminations.append(terminated)
            truncations.append(truncated)
            if terminated or truncated:
                if not infos:
                    infos["final_obs"] = np.full(self.num_envs, None, dtype=object)
                # reset() may write to the same arrays.
                is_array = type(observation) is np.ndarray
                infos["final_obs"][i] = observation.copy() if is_array else copy.deepcopy(observation)
                if numbers := _numbers(info):
                    infos = self._add_info(infos, {"final_info": numbers}, i)
                observation, _ = recorder.reset()
            recorder.observation = observation
            if plain:
                rows[i] = observation
            else:
                self._env_obs[i] = observation
        if not plain:
            concatenate(self.single_observation_space, self._env_obs, rows)
        self._rewards[:], self._terminations[:], self._truncations[:] = rewards, terminations, truncations
        return rows, self._rewards, self._terminations, self._truncations, infos


class RecordedAsyncVectorEnv(AsyncVectorEnv):
    """Gymnasium's AsyncVectorEnv in SAME_STEP mode, with a `Recorder` around each environment in its process.

    Attributes:
        makers: of the environments without their recorders.
    """

    def __init__(self, env_fns: Sequence[Callable[[], gym.Env]]) -> None:
        recorders = [functools.partial(_recorded, env_fn, parent=os.getpid()) for env_fn in env_fns]
        super().__init__(recorders, autoreset_mode=AutoresetMode.SAME_STEP)
        self.makers = env_fns


class KeepsFinalObservation(gym.Wrapper):
    """Copies the observation that ends an episode, so that a reset which writes to the same arrays leaves it alone."""

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        if terminated or truncated:
            observation = copy.deepcopy(observation)
        return observation, reward, terminated, truncated, info


class _InProcess(Recorder):
    """A recorder in a process of its own: a seed is for that process's global generators too.

    Python seeds `random` by the system after a fork.
    """

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        if seed is not None:
            random.seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002
        return super().reset(seed=seed)


def _recorded(env_fn: Callable[[], gym.Env], *, parent: int | None = None) -> Recorder:
    if parent is None:
        return Recorder(env_fn())
    if os.getpid() != parent:  # an AsyncVectorEnv makes one here, too, to see its spaces
        # A terminal sends Ctrl-C to all processes. Those of environments finish the step, so that it can be saved.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    return _InProcess(KeepsFinalObservation(env_fn()))


def with_final_observations(envs: VectorEnv) -> VectorEnv:
    """A vector environment in SAME_STEP mode whose `final_obs` no reset overwrites: see `GymnasiumStreams`."""
    inner = envs.unwrapped
    if type(envs) is SyncVectorEnv:
        made = [functools.partial(envs.envs.__getitem__, i) for i in range(envs.num_envs)]
        lean = LeanSyncVectorEnv(made, observation_mode=envs.observation_mode)
        lean.makers = envs.env_fns
        return lean
    if isinstance(inner, SyncVectorEnv) and not isinstance(inner, LeanSyncVectorEnv):
        inner.envs = [KeepsFinalObservation(env) for env in inner.envs]
    elif isinstance(inner, AsyncVectorEnv) and not isinstance(inner, RecordedAsyncVectorEnv):
        _refuse_overwritten(inner.env_fns[0])
    return envs


def _numbers(info: dict[str, Any]) -> dict[str, float]:
    """The numbers in the `info` of an episode's last step: at its top, and under `episode`."""
    of_episode = info.get("episode")
    inner = {n: v for n, v in of_episode.items() if n not in _OURS} if isinstance(of_episode, dict) else {}
    return {name: float(v) for name, v in (info | inner).items() if isinstance(v, Real | np.bool_)}


def episode_numbers(final_info: Any) -> dict[str, NDArray[np.float64]] | None:
    """The same by name [B], NaN where an episode goes on, from `infos["final_info"]` of a vector environment."""
    if not isinstance(final_info, dict):
        return None
    found = {}
    of_episode = final_info.get("episode")
    for infos, left_out in ((final_info, ()), (of_episode if isinstance(of_episode, dict) else {}, _OURS)):
        for name, values in infos.items():
            mask = infos.get(f"_{name}")  # who has one
            is_numbers = isinstance(values, np.ndarray) and values.ndim == 1 and values.dtype.kind in "biuf"
            if is_numbers and isinstance(mask, np.ndarray) and name not in left_out:
                found[name] = np.where(mask, values, np.nan)
    return found or None


def _refuse_overwritten(env_fn: Callable[[], gym.Env]) -> None:
    """Refuses environments whose reset returns arrays in the memory of those that the step before it returned."""
    env = env_fn()
    try:
        if any(isinstance(layer, KeepsFinalObservation) for layer in layers_of(env)):
            return
        action_space = copy.deepcopy(env.action_space)
        action_space.seed(0)
        before, _ = env.reset(seed=0)
        before = env.step(legal_action(action_space, before))[0]
        after, _ = env.reset()
    finally:
        env.close()
    if any(np.shares_memory(a, b) for a, b in zip(leaves(before), leaves(after))):
        raise ValueError(
            "the reset of these environments overwrites the observation that their last step returned, and "
            "AsyncVectorEnv copies it too late: wrap each environment in dualhead.worlds.vectors."
            "KeepsFinalObservation, or use make_streams(make_env, num_envs, vectorization='async')"
        )
