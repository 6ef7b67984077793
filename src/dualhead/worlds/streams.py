"""Sources of experience, and Gymnasium environments as one: always in SAME_STEP autoreset, without filler steps."""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import concatenate, create_empty_array
from numpy.typing import NDArray
from torch import Tensor

import dualhead.worlds.tasks  # noqa: F401  (registers dualhead/...)
from dualhead.errors import DataError, UnavailableEnvironment, UnknownEnvironment
from dualhead.norms import NormEvents
from dualhead.worlds.replay import CannotReplay, as_actions, leaves, pack, unpack
from dualhead.worlds.replay_trial import why_not_replayed
from dualhead.worlds.vectors import LeanSyncVectorEnv, RecordedAsyncVectorEnv, episode_numbers, with_final_observations

_EXTRAS = {"popgym": ("popgym-",), "minigrid": ("MiniGrid-", "BabyAI-")}
"""Package and extra of the same name -> prefixes of its environment ids."""


class StreamStep(NamedTuple):
    """What one step of all streams gave. Arrays are valid until the next step.

    Fields:
        observations: [B, ...] what the next action answers to; of a new episode where one ended.
        rewards: [B].
        terminated, truncated: [B] bool.
        final_observations: [B, ...] what was seen before any reset (right for every stream), or None where no
            episode ended.
        events: what happened as far as norms are concerned, or None from a world that does not say.
        numbers: by name, numbers [B] about the episodes that ended with this step, such as `success`; NaN where an
            episode has none or goes on. None where there are none. The log has their means, as `episode/NAME`.

    Gymnasium's worlds give NumPy arrays, batched ones tensors on their device.
    """

    observations: Any
    rewards: Any
    terminated: Any
    truncated: Any
    final_observations: Any
    events: NormEvents | None = None
    numbers: Mapping[str, Any] | None = None


class Streams(Protocol):
    """A source of experience.

    A world of several agents has `num_agents` besides (stream = world · num_agents + agent), and `resources`, the names
    of resource kinds, if its steps have events about them.
    """

    num_streams: int

    @property
    def observation_space(self) -> gym.Space:
        """Of one stream."""

    @property
    def action_space(self) -> gym.Space:
        """Of one stream."""

    @property
    def resumable(self) -> str | None:
        """None where `state` and `restore` resume bit-identically, else the reason in words why they cannot."""

    def reset(self, *, seed: int | None = None) -> Any:
        """Begins an episode in every stream; observations [B, ...]."""

    def step(self, actions: Any) -> StreamStep:
        """Steps all streams with actions in the form of the batched action space."""

    def statistics(self) -> dict[str, float]:
        """Numbers for the log since the last call."""

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that the coming steps depend on: tensors by name, and JSON metadata.

        Raises:
            CannotReplay: it cannot be saved at this moment.
        """

    def restore(self, tensors: dict[str, Tensor], metadata: dict[str, Any], *, source: str = "checkpoint") -> Any:
        """Takes back what `state` gave, in streams made in the same way; the observations [B, ...] of that moment.

        Raises:
            CheckpointError: it is no state of these streams.
            CannotReplay: its episodes cannot go on; new ones can be begun by `restart`.
        """

    def close(self) -> None:
        """Frees what the environments hold."""


class GymnasiumStreams:
    """A Gymnasium vector environment in SAME_STEP mode, one stream per sub-environment.

    An environment may write every observation to the same array. Gymnasium keeps a reference to the final observation
    while it resets the environment, so that the reset overwrites it. The environments of a plain `SyncVectorEnv` are
    stepped by a `LeanSyncVectorEnv` instead; those of one inside a vector wrapper are wrapped in
    `KeepsFinalObservation`. Those of an `AsyncVectorEnv` cannot be wrapped afterwards: one more of them is made and
    tried.

    Raises:
        ValueError: another autoreset mode (its filler steps would be learned from), or an `AsyncVectorEnv` of
            environments that overwrite their final observation.
    """

    def __init__(self, envs: VectorEnv) -> None:
        self._name = getattr(envs.spec, "id", None) or type(envs.unwrapped).__name__
        mode = envs.metadata.get("autoreset_mode")
        if mode != AutoresetMode.SAME_STEP:
            raise ValueError(
                f"{self._name}: expected a vector environment in autoreset mode SAME_STEP, got {mode}, whose filler "
                f"steps would be learned from. Make it by make_streams(id, num_envs), or by gym.make_vec(id, num_envs, "
                f"vectorization_mode='sync', "
                f"vector_kwargs={{'autoreset_mode': gym.vector.AutoresetMode.SAME_STEP}})"
            )
        self.envs = with_final_observations(envs)
        self.num_streams = envs.num_envs
        self._observations: Any = None

    @property
    def observation_space(self) -> gym.Space:
        return self.envs.single_observation_space

    @property
    def action_space(self) -> gym.Space:
        return self.envs.single_action_space

    @functools.cached_property
    def resumable(self) -> str | None:
        """Found once, by playing two more environments of the first kind for a moment."""
        try:
            return why_not_replayed(self._recorded().makers[0])
        except CannotReplay as error:
            return str(error)

    def reset(self, *, seed: int | None = None) -> Any:
        """Begins an episode in every stream; observations [B, ...].

        Args:
            seed: of all randomness of the environments; None: from the system.
        """
        # Gymnasium's `seed + i` for environment i would give seeds 0 and 1 all environments but one in common.
        seeds: Any = (np.random.SeedSequence(seed).generate_state(self.num_streams) >> 1).tolist()
        self._observations, _ = self.envs.reset(seed=seeds)
        return self._observations

    def step(self, actions: Any) -> StreamStep:
        actions = as_actions(self.envs.action_space, actions)
        self._observations, rewards, terminated, truncated, infos = self.envs.step(actions)
        final = None
        if "final_obs" in infos:
            final = _joined(self._observations, infos["final_obs"])
        elif truncated.any():
            raise DataError(
                f"{self._name} truncated the episodes of environments {np.flatnonzero(truncated).tolist()[:8]}: "
                f"expected infos['final_obs'] with what each saw before its reset, as Gymnasium's vector environments "
                f"in SAME_STEP mode give it, got infos of {sorted(infos)}. Let its step() add them, or use make_streams"
            )
        numbers = episode_numbers(infos.get("final_info"))
        return StreamStep(self._observations, rewards, terminated, truncated, final, numbers=numbers)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """How the episodes in progress began, the actions since, and the process's global generators; see `replay`."""
        if self._observations is None:
            raise RuntimeError("state() needs streams that have begun: call reset() first")
        saved = self._recorded().call("saved")
        for number, episode in enumerate(saved):
            if isinstance(episode, str):
                raise CannotReplay(f"environment {number}: {episode}")
        return pack(saved, self.action_space)

    def restore(self, tensors: dict[str, Tensor], metadata: dict[str, Any], *, source: str = "checkpoint") -> Any:
        envs, space = self._recorded(), self.observation_space
        episodes, randomness = unpack(tensors, metadata, self.action_space, self.num_streams, source=source)
        envs.set_attr("episode", episodes)
        replayed = envs.call("replay")
        for number, (why_not, _) in enumerate(replayed):
            if why_not is not None:
                raise CannotReplay(f"environment {number}: {why_not}")
        out: Any = create_empty_array(space, n=self.num_streams)
        self._observations = concatenate(space, [observation for _, observation in replayed], out)
        randomness.set()
        return self._observations

    def _recorded(self) -> LeanSyncVectorEnv | RecordedAsyncVectorEnv:
        if not isinstance(self.envs, LeanSyncVectorEnv | RecordedAsyncVectorEnv):
            name = type(self.envs).__name__
            raise CannotReplay(f"the environments inside {name} cannot be reached: make_streams makes some that can")
        return self.envs

    def statistics(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        self.envs.close()


def _joined(observations: Any, final: NDArray[np.object_]) -> Any:
    """The observations with those of ended streams replaced by their final ones."""
    joined = copy.deepcopy(observations)
    is_array = isinstance(joined, np.ndarray)  # made quick: of many streams some end at nearly every step
    for stream, before in enumerate(final):
        if before is not None:
            for rows, row in [(joined, before)] if is_array else zip(leaves(joined), leaves(before)):
                rows[stream] = row
    return joined


def make_streams(
    env: str | Callable[..., gym.Env],
    num_envs: int,
    *,
    vectorization: str = "sync",
    num_workers: int | None = None,
    **env_args: Any,
) -> GymnasiumStreams:
    """Streams of a Gymnasium environment.

    Args:
        env: a Gymnasium id (`popgym-...`, `MiniGrid-...` and `BabyAI-...` load their package), or what makes one
            environment.
        num_envs: B.
        vectorization: `sync` in this process, `async` in others.
        num_workers: processes of `async`; None: one for each environment.
        env_args: for the environment.

    Raises:
        UnavailableEnvironment: unknown id, missing package, or the environment could not be made.
    """
    makers = [functools.partial(make_env, env, env_args)] * num_envs
    if vectorization == "async":
        return GymnasiumStreams(RecordedAsyncVectorEnv(makers, num_workers=num_workers))
    return GymnasiumStreams(LeanSyncVectorEnv(makers))


def make_env(
    env: str | Callable[..., gym.Env],
    env_args: Mapping[str, Any] = MappingProxyType({}),
    *,
    wrappers: Sequence[tuple[str, Callable[[gym.Env], gym.Env]]] = (),
    drop_observations: Sequence[str] = (),
) -> gym.Env:
    """One environment, by id with what its package needs around it; see `make_streams`.

    Args:
        env: see `make_streams`.
        env_args: of its constructor, or for `gymnasium.make`.
        wrappers: names for messages, and what is called with the environment; the innermost first.
        drop_observations: keys of its Dict observation that are left out, before wrappers are applied.

    Raises:
        UnavailableEnvironment: as `make_streams`, or a wrapper or a key does not fit.
    """
    made = _made(env, env_args)
    if drop_observations:
        made = _without_keys(made, drop_observations)
    for name, wrap in wrappers:
        inside = made
        try:
            made = wrap(inside)
        except Exception as error:
            raise UnavailableEnvironment(
                f"wrapper {name!r} around {inside}: {type(error).__name__}: {error}"
            ) from error
        if not isinstance(made, gym.Env):
            raise UnavailableEnvironment(f"wrapper {name!r}: expected a gymnasium.Env from it, got {made!r}")
    return made


def _made(env: str | Callable[..., gym.Env], env_args: Mapping[str, Any]) -> gym.Env:
    """An environment without the user's wrappers."""
    try:
        if isinstance(env, str):
            return _made_by_id(env, env_args)
        own = env(**env_args)
    except UnavailableEnvironment:
        raise
    except Exception as error:
        if not env_args:
            raise
        called = env if isinstance(env, str) else f"{env.__module__}:{getattr(env, '__qualname__', env)}"
        given = ", ".join(f"{name}={value!r}" for name, value in env_args.items())
        raise UnavailableEnvironment(
            f"cannot make environment {called!r} with {given}: "
            f"{type(error).__name__}: {error}" + _its_arguments(env, env_args)
        ) from error
    if not isinstance(own, gym.Env):
        raise TypeError(f"expected a callable that makes one Gymnasium environment, got one that made {own!r}")
    return own


def _made_by_id(env: str, env_args: Mapping[str, Any]) -> gym.Env:
    for package, prefixes in _EXTRAS.items():
        if env.startswith(prefixes):
            try:
                importlib.import_module(package)
            except ModuleNotFoundError as error:
                raise UnavailableEnvironment(
                    f"environment {env!r} needs the package {error.name}: pip install -e '.[{package}]' in the checkout"
                ) from error
    try:
        # The agent checks every observation and reward itself; Gymnasium's passive checker would slow each step.
        made = gym.make(env, disable_env_checker=True, **env_args)
    except (gym.error.NameNotFound, gym.error.NamespaceNotFound) as error:
        raise UnknownEnvironment(env, gymnasium_ids()) from error
    except (gym.error.Error, ImportError, TypeError) as error:
        raise UnavailableEnvironment(
            f"cannot make environment {env!r}: {error}{_its_arguments(env, env_args)}"
        ) from error
    return _without_mission(made, env) if env.startswith(_EXTRAS["minigrid"]) else made


def _its_arguments(env: str | Callable[..., gym.Env], given: Mapping[str, Any]) -> str:
    """The arguments that an environment has, for a message, where it lacks one of those given."""
    with suppress(Exception):  # an id that is not registered, a constructor in C
        make: Any = gym.spec(env.rpartition(":")[2]).entry_point if isinstance(env, str) else env
        make = gym.envs.registration.load_env_creator(make) if isinstance(make, str) else make
        known = inspect.signature(make).parameters.values()
        names = [part.name for part in known if part.kind not in (part.VAR_KEYWORD, part.VAR_POSITIONAL)]
        if not given.keys() <= set(names):
            return f"; its arguments are: {', '.join(names) or 'none'}"
    return ""


def _without_keys(env: gym.Env, names: Sequence[str]) -> gym.Env:
    """An environment without some keys of its Dict observation."""
    from gymnasium.wrappers import FilterObservation

    space = env.observation_space
    if not isinstance(space, gym.spaces.Dict):
        raise UnavailableEnvironment(f"drop_observations: expected an environment with Dict observations, got {space}")
    kept = [name for name in space if name not in names]
    if not set(names) <= set(space) or not kept:
        raise UnavailableEnvironment(
            f"drop_observations: expected some of the keys {', '.join(space)}, not all, got {', '.join(names)}"
        )
    return FilterObservation(env, kept)


def restart(streams: Streams, *, seed: int, num_steps: int) -> Any:
    """Begins an episode in every stream of a resumed run whose streams could not be restored; observations [B, ...].

    The seed changes with `num_steps`, so that the run does not see its beginning again. Recurrent states must be reset.
    """
    return streams.reset(seed=int(np.random.SeedSequence([seed, num_steps]).generate_state(1)[0] >> 1))


def gymnasium_ids() -> list[str]:
    """Ids of Gymnasium's environments, ours and those of installed extras among them."""
    for package in _EXTRAS:
        with suppress(ModuleNotFoundError):
            importlib.import_module(package)
    return [name for name in gym.registry if not name.startswith(("phys2d", "tabular", "GymV21", "GymV26"))]


def _without_mission(env: gym.Env, name: str) -> gym.Env:
    """MiniGrid for a network: one-hot cells and the direction; the mission text is left out.

    Where the mission differs between episodes a warning says so: part of the task cannot be seen then.
    """
    from gymnasium.wrappers import TransformObservation
    from minigrid.wrappers import OneHotPartialObsWrapper

    one_hot = OneHotPartialObsWrapper(env)
    spaces = one_hot.observation_space
    assert isinstance(spaces, gym.spaces.Dict)
    mission = env.unwrapped.observation_space["mission"]  # type: ignore[index]
    if name.startswith("BabyAI") or mission.ordered_placeholders:
        warnings.warn(f"{name} says in words what is to be done; the agent does not see them", stacklevel=2)
    shape = spaces["image"].shape
    assert shape is not None
    space = gym.spaces.Dict(image=gym.spaces.Box(0, 1, shape, np.uint8), direction=spaces["direction"])
    return TransformObservation(one_hot, lambda seen: {"image": seen["image"], "direction": seen["direction"]}, space)
