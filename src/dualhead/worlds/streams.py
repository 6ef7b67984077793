"""Gymnasium environments as streams of experience, always in SAME_STEP autoreset: no filler step exists."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import gymnasium as gym
import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.vector.utils import concatenate, create_empty_array, iterate
from numpy.typing import NDArray

import dualhead.worlds.tasks  # noqa: F401  (registers dualhead/...)
from dualhead.config import COMMONS
from dualhead.norms import NormEvents

_EXTRAS = {"popgym": "popgym", "minigrid": "MiniGrid"}
"""Package and extra of the same name -> prefix of its environment ids."""


class UnavailableEnvironment(RuntimeError):
    """An environment that is unknown, not installed, or cannot be made; the message says what to do."""


class StreamStep(NamedTuple):
    """What one step of all streams gave. Arrays are valid until the next step.

    Fields:
        observations: [B, ...] what the next action answers to; of a new episode where one ended.
        rewards: [B].
        terminated, truncated: [B] bool.
        final_observations: [B, ...] what was seen before any reset (right for every stream), or None where no
            episode ended.
        events: what happened as far as norms are concerned, or None from a world that does not say.

    Gymnasium's worlds give NumPy arrays, batched ones tensors on their device.
    """

    observations: Any
    rewards: Any
    terminated: Any
    truncated: Any
    final_observations: Any
    events: NormEvents | None = None


class Streams(Protocol):
    """A source of experience."""

    num_streams: int

    @property
    def observation_space(self) -> gym.Space:
        """Of one stream."""

    @property
    def action_space(self) -> gym.Space:
        """Of one stream."""

    def reset(self, *, seed: int | None = None) -> Any:
        """Begins an episode in every stream; observations [B, ...]."""

    def step(self, actions: Any) -> StreamStep:
        """Steps all streams with actions in the form of the batched action space."""

    def statistics(self) -> dict[str, float]:
        """Numbers for the log since the last call."""

    def close(self) -> None:
        """Frees what the environments hold."""


class GymnasiumStreams:
    """A Gymnasium vector environment in SAME_STEP mode, one stream per sub-environment.

    Raises:
        ValueError: another autoreset mode (its filler steps would be learned from).
    """

    def __init__(self, envs: VectorEnv) -> None:
        mode = envs.metadata.get("autoreset_mode")
        if mode != AutoresetMode.SAME_STEP:
            raise ValueError(f"expected a vector environment with autoreset_mode=SAME_STEP, got {mode}")
        self.envs = envs
        self.num_streams = envs.num_envs

    @property
    def observation_space(self) -> gym.Space:
        return self.envs.single_observation_space

    @property
    def action_space(self) -> gym.Space:
        return self.envs.single_action_space

    def reset(self, *, seed: int | None = None) -> Any:
        observations, _ = self.envs.reset(seed=seed)
        return observations

    def step(self, actions: Any) -> StreamStep:
        observations, rewards, terminated, truncated, infos = self.envs.step(actions)
        final = None
        if "final_obs" in infos:
            final = self._join(observations, infos["final_obs"])
        return StreamStep(observations, rewards, terminated, truncated, final)

    def _join(self, observations: Any, final: NDArray[np.object_]) -> Any:
        """The observations with those of ended streams replaced by their final ones."""
        rows = [
            after if before is None else before
            for before, after in zip(final, iterate(self.envs.observation_space, observations))
        ]
        out = create_empty_array(self.observation_space, n=self.num_streams)
        assert out is not None
        return concatenate(self.observation_space, rows, out)

    def statistics(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        self.envs.close()


class LeanSyncVectorEnv(SyncVectorEnv):
    """Gymnasium's SyncVectorEnv in SAME_STEP mode without what learning does not use.

    Infos carry only `final_obs`, and returned arrays are overwritten by the next step: on small environments those
    two cost more than the environments themselves.
    """

    def __init__(self, env_fns: list[Callable[[], gym.Env]]) -> None:
        super().__init__(env_fns, copy=False, autoreset_mode=AutoresetMode.SAME_STEP)
        self._plain = isinstance(self.single_observation_space, gym.spaces.Box | gym.spaces.Discrete)

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        infos: dict[str, Any] = {}
        rows = self._observations
        for i, (env, action) in enumerate(zip(self.envs, iterate(self.action_space, actions))):
            observation, self._rewards[i], terminated, truncated, _ = env.step(action)
            self._terminations[i], self._truncations[i] = terminated, truncated
            if terminated or truncated:
                if not infos:
                    infos["final_obs"] = np.full(self.num_envs, None, dtype=object)
                infos["final_obs"][i] = observation
                observation, _ = env.reset()
            if self._plain:
                rows[i] = observation
            else:
                self._env_obs[i] = observation
        if not self._plain:
            concatenate(self.single_observation_space, self._env_obs, rows)
        return rows, self._rewards, self._terminations, self._truncations, infos


def make_streams(env: str, num_envs: int, *, vectorization: str = "sync", **kwargs: Any) -> GymnasiumStreams:
    """Streams of a registered Gymnasium environment.

    Args:
        env: a Gymnasium id; `popgym-...` and `MiniGrid-...` load their package.
        num_envs: B.
        vectorization: `sync` in this process, `async` one process per environment.
        kwargs: for the environment.

    Raises:
        UnavailableEnvironment: unknown id, missing package, or the environment could not be made.
    """

    def one() -> gym.Env:
        return make_env(env, **kwargs)

    if vectorization == "async":
        make_env(env, **kwargs).close()  # its errors are clearer from this process
        return GymnasiumStreams(AsyncVectorEnv([one] * num_envs, autoreset_mode=AutoresetMode.SAME_STEP))
    return GymnasiumStreams(LeanSyncVectorEnv([one] * num_envs))


def make_env(env: str, **kwargs: Any) -> gym.Env:
    """One environment by id, with what its package needs around it; see `make_streams`."""
    _import_extra(env)
    try:
        # The agent checks every observation and reward itself; Gymnasium's passive checker would slow each step.
        made = gym.make(env, disable_env_checker=True, **kwargs)
    except gym.error.NameNotFound as error:
        raise UnavailableEnvironment(
            f"unknown environment {env!r}: {error} `dualhead envs` lists what is there."
        ) from error
    except gym.error.DependencyNotInstalled as error:
        raise UnavailableEnvironment(f"environment {env!r} needs a package that is missing: {error}") from error
    except (gym.error.Error, ModuleNotFoundError, TypeError) as error:
        raise UnavailableEnvironment(f"cannot make environment {env!r}: {error}") from error
    return _without_mission(made) if env.startswith("MiniGrid") else made


def environment_ids() -> list[str]:
    """Every name that can be trained here: ours, Gymnasium's, and those of installed extras."""
    for package in _EXTRAS:
        if importlib.util.find_spec(package) is not None:
            importlib.import_module(package)
    own = "phys2d", "tabular", "GymV21", "GymV26"
    return sorted([COMMONS, *(name for name in gym.registry if not name.startswith(own))])


def _import_extra(env: str) -> None:
    for package, prefix in _EXTRAS.items():
        if not env.startswith(prefix):
            continue
        try:
            importlib.import_module(package)
        except ModuleNotFoundError as error:
            raise UnavailableEnvironment(
                f"environment {env!r} needs the package {error.name}: pip install 'dualhead[{package}]'"
            ) from error


def _without_mission(env: gym.Env) -> gym.Env:
    """MiniGrid for a network: one-hot cells and the direction; the mission text is left out."""
    from gymnasium.wrappers import TransformObservation
    from minigrid.wrappers import OneHotPartialObsWrapper

    one_hot = OneHotPartialObsWrapper(env)
    spaces = one_hot.observation_space
    assert isinstance(spaces, gym.spaces.Dict)
    shape = spaces["image"].shape
    assert shape is not None
    space = gym.spaces.Dict(image=gym.spaces.Box(0, 1, shape, np.uint8), direction=spaces["direction"])
    return TransformObservation(one_hot, lambda seen: {"image": seen["image"], "direction": seen["direction"]}, space)
