"""Gymnasium environments as streams of experience, always in SAME_STEP autoreset: no filler step exists."""

from __future__ import annotations

import copy
import functools
import importlib
import importlib.util
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.vector.utils import concatenate, create_empty_array, iterate
from numpy.typing import NDArray
from torch import Tensor

import dualhead.worlds.tasks  # noqa: F401  (registers dualhead/...)
from dualhead.errors import UnavailableEnvironment
from dualhead.norms import NormEvents
from dualhead.storage import CheckpointError
from dualhead.worlds.object_graph import CannotSnapshot, Snapshot
from dualhead.worlds.snapshots import SnapshotWrapper, can_snapshot, capture_process, restore_process, seed_spaces

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

    @property
    def resumable(self) -> str | None:
        """None where `state` and `restore` go on to the same bits, else the reason in words why they cannot."""

    def reset(self, *, seed: int | None = None) -> Any:
        """Begins an episode in every stream; observations [B, ...]."""

    def step(self, actions: Any) -> StreamStep:
        """Steps all streams with actions in the form of the batched action space."""

    def statistics(self) -> dict[str, float]:
        """Numbers for the log since the last call."""

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that the coming steps depend on: tensors by name, and JSON metadata."""

    def restore(self, tensors: dict[str, Tensor], metadata: dict[str, Any], *, source: str = "checkpoint") -> Any:
        """Takes back what `state` gave, in streams made in the same way; the observations [B, ...] of that moment."""

    def close(self) -> None:
        """Frees what the environments hold."""


class GymnasiumStreams:
    """A Gymnasium vector environment in SAME_STEP mode, one stream per sub-environment.

    An environment may write every observation to the same array. Gymnasium keeps a reference to the final observation
    while it resets the environment, so that the reset overwrites it. Environments inside a `SyncVectorEnv` are wrapped
    in `KeepsFinalObservation`. Those of an `AsyncVectorEnv` live in other processes and cannot be wrapped afterwards:
    one more environment of the first kind is made and tried.

    Raises:
        ValueError: another autoreset mode (its filler steps would be learned from), or an `AsyncVectorEnv` of
            environments that overwrite their final observation.
    """

    def __init__(self, envs: VectorEnv) -> None:
        mode = envs.metadata.get("autoreset_mode")
        if mode != AutoresetMode.SAME_STEP:
            raise ValueError(
                f"expected a vector environment in autoreset mode SAME_STEP, got {mode}, whose filler steps would be "
                f"learned from. Make it by make_streams(id, num_envs), or by gym.make_vec(id, num_envs, "
                f"vectorization_mode='sync', "
                f"vector_kwargs={{'autoreset_mode': gym.vector.AutoresetMode.SAME_STEP}})"
            )
        inner = envs.unwrapped
        if isinstance(inner, SyncVectorEnv) and not isinstance(inner, LeanSyncVectorEnv):
            for number, env in enumerate(inner.envs):
                if not isinstance(env, KeepsFinalObservation):
                    inner.envs[number] = KeepsFinalObservation(env)
        elif isinstance(inner, AsyncVectorEnv) and _overwrites_final_observation(inner.env_fns[0]):
            raise ValueError(
                "the reset of these environments overwrites the observation that their last step returned, and "
                "AsyncVectorEnv copies it too late: wrap each environment in "
                "dualhead.worlds.streams.KeepsFinalObservation, or use make_streams(..., vectorization='async')"
            )
        self.envs = envs
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
        """None where `state` and `restore` go on to the same bits, else the reason in words.

        It is found by playing two more environments of the first kind for a moment, once.
        """
        if not isinstance(self.envs, SyncVectorEnv | AsyncVectorEnv):
            return f"the environments inside {type(self.envs).__name__} cannot be reached"
        make_one = self.envs.env_fns[0]
        if isinstance(self.envs, AsyncVectorEnv):
            one = make_one()
            one.close()
            if not isinstance(one, SnapshotWrapper):
                return "environments in processes of their own must be wrapped in SnapshotWrapper (make_streams does)"
        return can_snapshot(make_one)

    def reset(self, *, seed: int | None = None) -> Any:
        self._observations, _ = self.envs.reset(seed=seed)
        if seed is not None and isinstance(self.envs, SyncVectorEnv):
            for number, env in enumerate(self.envs.envs):
                seed_spaces(env, seed + number)
        return self._observations

    def step(self, actions: Any) -> StreamStep:
        observations, rewards, terminated, truncated, infos = self.envs.step(actions)
        self._observations = observations
        final = None
        if "final_obs" in infos:
            final = self._join(observations, infos["final_obs"])
        return StreamStep(observations, rewards, terminated, truncated, final)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Every environment, the observations to act on next, and the processes' global generators.

        The vector environment itself keeps nothing from one step to the next: each step overwrites its arrays.

        Returns:
            tensors: uint8, structure and data of a snapshot each. They are of this process; with processes for the
                environments there is one more for each of them.
            metadata: JSON.

        Raises:
            CannotSnapshot: see `resumable`.
            RuntimeError: there was no `reset()` yet.
        """
        if self._observations is None:
            raise RuntimeError("state() needs streams that have begun: call reset() first")
        if isinstance(self.envs, AsyncVectorEnv):
            snapshots = [capture_process(observations=self._observations)]
            for number, given in enumerate(self.envs.call("take_snapshot")):
                if isinstance(given, str):
                    raise CannotSnapshot(f"environment {number}: {given}")
                snapshots.append(given)
        elif isinstance(self.envs, SyncVectorEnv):
            snapshots = [capture_process(envs=self.envs.envs, observations=self._observations)]
        else:
            raise CannotSnapshot(f"the environments inside {type(self.envs).__name__} cannot be reached")
        tensors = {}
        for number, snapshot in enumerate(snapshots):
            for part, contents in snapshot._asdict().items():
                tensors[f"{number}/{part}"] = torch.from_numpy(np.frombuffer(bytearray(contents), np.uint8))
        return tensors, {"num_streams": self.num_streams, "num_snapshots": len(snapshots)}

    def restore(self, tensors: dict[str, Tensor], metadata: dict[str, Any], *, source: str = "checkpoint") -> Any:
        """Takes back what `state` gave, and the global generators of `random` and NumPy with it.

        Returns:
            The observations [B, ...] that were to be acted on.

        Raises:
            CheckpointError: it is of other environments, another number of them, or another vectorization; the
                environments must be reset then.
        """
        num_snapshots = 1 + self.num_streams if isinstance(self.envs, AsyncVectorEnv) else 1
        ours = {"num_streams": self.num_streams, "num_snapshots": num_snapshots}
        if metadata != ours:
            raise CheckpointError(
                f"{source} is of other streams: {metadata}, expected {ours}; resume with the same num_envs and "
                f"vectorization"
            )
        try:
            saved = {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}
            snapshots = [Snapshot(saved[f"{n}/structure"], saved[f"{n}/data"]) for n in range(num_snapshots)]
        except KeyError as error:
            raise CheckpointError(f"{source} lacks the state of an environment: {error}") from error
        parts: dict[str, Any] = {"observations": self.envs.reset(seed=0)[0]}
        if isinstance(self.envs, AsyncVectorEnv):
            self.envs.set_attr("snapshot", snapshots[1:])
        elif isinstance(self.envs, SyncVectorEnv):
            parts["envs"] = self.envs.envs
        self._observations = restore_process(snapshots[0], source=source, **parts).observations
        return self._observations

    def _join(self, observations: Any, final: NDArray[np.object_]) -> Any:
        """The observations with those of ended streams replaced by their final ones."""
        if isinstance(observations, np.ndarray):
            # The same as below, made quick: among many short episodes some stream ends at nearly every step.
            joined = observations.copy()
            for stream, before in enumerate(final):
                if before is not None:
                    joined[stream] = before
            return joined
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


class KeepsFinalObservation(gym.Wrapper):
    """Copies the observation that ends an episode, so that a reset which writes to the same arrays leaves it alone."""

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        if terminated or truncated:
            observation = copy.deepcopy(observation)
        return observation, reward, terminated, truncated, info


def _overwrites_final_observation(make_one: Callable[[], gym.Env]) -> bool:
    """Whether a reset returns arrays in the memory of those that the step before it returned."""
    env = make_one()
    try:
        if _has_layer(env, KeepsFinalObservation):
            return False
        action_space = copy.deepcopy(env.action_space)
        action_space.seed(0)
        before, _ = env.reset(seed=0)
        before = env.step(legal_action(action_space, before))[0]
        after, _ = env.reset()
        return any(np.shares_memory(a, b) for a, b in zip(_arrays(before), _arrays(after)))
    finally:
        env.close()


def _has_layer(env: gym.Env, kind: type[gym.Wrapper]) -> bool:
    while isinstance(env, gym.Wrapper):
        if isinstance(env, kind):
            return True
        env = env.env
    return False


def _arrays(observation: Any) -> Iterator[NDArray[Any]]:
    if isinstance(observation, dict):
        observation = tuple(observation.values())
    if isinstance(observation, tuple):
        for part in observation:
            yield from _arrays(part)
    else:
        yield np.asarray(observation)


def legal_action(space: gym.Space, observation: Any) -> Any:
    """A random action of the space that the observation's `action_mask` allows, where it has one.

    Args:
        space: of the actions; its generator is drawn from.
        observation: of one environment. Its mask is one array with an entry for each choice of each head, or a Dict of
            one array per head.
    """
    mask = observation.get("action_mask") if isinstance(observation, Mapping) else None
    if mask is None:
        return space.sample()
    by_name = {name: np.asarray(part, np.int8) for name, part in mask.items()} if isinstance(mask, Mapping) else None
    flat = np.zeros(0, np.int8) if by_name is not None else np.asarray(mask, np.int8).ravel()

    def take(name: str, n: int) -> NDArray[np.int8]:
        nonlocal flat
        if by_name is not None:
            return by_name.get(name, np.ones(n, np.int8))
        head, flat = flat[:n], flat[n:]
        return head

    def masks(part: gym.Space, name: str) -> Any:
        if isinstance(part, gym.spaces.Discrete):
            return take(name, int(part.n))
        if isinstance(part, gym.spaces.MultiDiscrete):
            return tuple(take(f"{name}_{i}", int(n)) for i, n in enumerate(part.nvec))
        if isinstance(part, gym.spaces.Dict):
            return {key: masks(inner, key) for key, inner in part.items()}
        return None

    return space.sample(mask=masks(space, "head" if isinstance(space, gym.spaces.MultiDiscrete) else "action"))


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
                infos["final_obs"][i] = copy.deepcopy(observation)  # reset() may write to the same arrays
                observation, _ = env.reset()
            if self._plain:
                rows[i] = observation
            else:
                self._env_obs[i] = observation
        if not self._plain:
            concatenate(self.single_observation_space, self._env_obs, rows)
        return rows, self._rewards, self._terminations, self._truncations, infos


def make_streams(
    env: str | Callable[..., gym.Env], num_envs: int, *, vectorization: str = "sync", **kwargs: Any
) -> GymnasiumStreams:
    """Streams of a Gymnasium environment.

    Args:
        env: a Gymnasium id (`popgym-...`, `MiniGrid-...` and `BabyAI-...` load their package), or a callable that makes
            one environment.
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
        wrapped = [lambda: SnapshotWrapper(KeepsFinalObservation(one()))] * num_envs
        with _ignored_by_children(signal.SIGINT):
            return GymnasiumStreams(AsyncVectorEnv(wrapped, autoreset_mode=AutoresetMode.SAME_STEP))
    return GymnasiumStreams(LeanSyncVectorEnv([one] * num_envs))


@contextmanager
def _ignored_by_children(number: signal.Signals) -> Iterator[None]:
    """Processes that are started meanwhile ignore a signal for good.

    A terminal sends Ctrl-C to them as well, and environments must outlive it to finish the step and be saved.
    """
    if threading.current_thread() is not threading.main_thread():  # only that one may set handlers
        yield
        return
    before = signal.signal(number, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(number, before)


def make_env(env: str | Callable[..., gym.Env], **kwargs: Any) -> gym.Env:
    """One environment, by id with what its package needs around it; see `make_streams`."""
    if not isinstance(env, str):
        own = env(**kwargs)
        if not isinstance(own, gym.Env):
            raise TypeError(f"expected a callable that makes one Gymnasium environment, got one that made {own!r}")
        return own
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
    except (gym.error.Error, ImportError, TypeError) as error:
        raise UnavailableEnvironment(f"cannot make environment {env!r}: {error}") from error
    return _without_mission(made, env) if env.startswith(_EXTRAS["minigrid"]) else made


def restart(streams: Streams, *, seed: int, num_steps: int) -> Any:
    """Begins an episode in every stream of a resumed run whose streams' state was not kept.

    Args:
        streams: of which `resumable` says why.
        seed: of the run.
        num_steps: done before; with it the seed changes, so that the run does not see its beginning again.

    Returns:
        Observations [B, ...]. Recurrent states must be reset with it.
    """
    return streams.reset(seed=int(np.random.SeedSequence([seed, num_steps]).generate_state(1)[0] >> 1))


def gymnasium_ids() -> list[str]:
    """Ids of Gymnasium's environments, ours and those of installed extras among them."""
    for package in _EXTRAS:
        if importlib.util.find_spec(package) is not None:
            importlib.import_module(package)
    own = "phys2d", "tabular", "GymV21", "GymV26"
    return [name for name in gym.registry if not name.startswith(own)]


def _import_extra(env: str) -> None:
    for package, prefixes in _EXTRAS.items():
        if not env.startswith(prefixes):
            continue
        try:
            importlib.import_module(package)
        except ModuleNotFoundError as error:
            raise UnavailableEnvironment(
                f"environment {env!r} needs the package {error.name}: pip install -e '.[{package}]' in the checkout"
            ) from error


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
