"""Sources of experience, and Gymnasium environments as one: always in SAME_STEP autoreset, without filler steps."""

from __future__ import annotations

import copy
import functools
import inspect
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

from dualhead.errors import DataError, UnavailableEnvironment, UnknownEnvironment
from dualhead.norms import NormEvents
from dualhead.spaces import ACTION_MASK
from dualhead.types import ByAgent
from dualhead.worlds.pettingzoo import JointEnv, JointSpace, as_parallel, copied, is_multi_agent
from dualhead.worlds.replay import CannotReplay, as_actions, leaves, pack, unpack
from dualhead.worlds.replay_trial import why_not_replayed
from dualhead.worlds.suites import from_dm_env, known_ids, make_as_usual, missing, suite_of
from dualhead.worlds.vectors import (
    LeanSyncVectorEnv,
    RecordedAsyncVectorEnv,
    episode_numbers,
    mapped,
    with_final_observations,
)


class StreamStep(NamedTuple):
    """What one step of all streams gave. Arrays are valid until the next step.

    Fields:
        observations: [B, ...] what the next action answers to; of a new episode where one ended.
        rewards: [B].
        terminated, truncated: [B] bool.
        final_observations: [B, ...] what was seen before any reset (right for every stream), or None where no
            episode ended.
        events: what happened as far as norms are concerned, or None from a world that does not say.
        numbers: by name, numbers [B] about the episodes that ended with this step (or in a world of several agents
            before it, where one had left), such as `success`; NaN where an episode has none or goes on. None where
            there are none. The log has their means, as `episode/NAME`.
        active: [B] bool, who took part in this step, or None: all streams. Rewards of the others are 0, their flags
            False.

    Gymnasium's worlds give NumPy arrays, batched ones tensors on their device.
    """

    observations: Any
    rewards: Any
    terminated: Any
    truncated: Any
    final_observations: Any
    events: NormEvents | None = None
    numbers: Mapping[str, Any] | None = None
    active: Any = None


class Streams(Protocol):
    """A source of experience.

    A world of several agents has `num_agents` besides (stream = world · num_agents + agent), and may have

    resources: names of the resource kinds that the events of its steps are about.
    agent_names: what the agents are called.
    active: where agents leave before the others: [B] bool, who takes part in the next step (right after `reset`, `step`
        and `restore`), or None: all do. A stream's last step before it sits out is terminated or truncated. While it
        sits out, its observations are any legal values and its actions are ignored. It begins an episode when it takes
        part again.
    spaces_by_agent: observation and action space of each agent, where they differ; None: they do not. The streams'
        own spaces are those of the first agent then, and observations (the final ones too) and actions are `ByAgent`.
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


def spaces_of_agents(world: Any) -> list[tuple[gym.Space, gym.Space]]:
    """Observation and action space of each agent of a world; of one, where it does not say that it has several."""
    own = getattr(world, "spaces_by_agent", None)
    return own or [(world.observation_space, world.action_space)] * getattr(world, "num_agents", 1)


def names_of_agents(world: Any) -> tuple[str, ...]:
    """What the agents of a world are called."""
    return tuple(getattr(world, "agent_names", ())) or tuple(
        f"agent_{number}" for number in range(getattr(world, "num_agents", 1))
    )


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


class ParallelStreams:
    """Worlds of several agents, `JointEnv`s, with a stream for each agent: B = W · A, stream = world · A + agent.

    Args:
        worlds: W of them.

    Attributes:
        have_reset: [W] bool, which worlds began a new episode in the last step.
    """

    def __init__(self, worlds: GymnasiumStreams) -> None:
        joint = worlds.observation_space
        assert isinstance(joint, JointSpace)
        self._worlds = worlds
        self.agent_names, self.resources, self.num_agents = joint.agent_names, joint.resources, len(joint.agent_names)
        self.num_streams = worlds.num_streams * self.num_agents
        self.observation_space, self.action_space = joint.spaces_by_agent[0]
        self.spaces_by_agent = None if joint.are_equal else list(joint.spaces_by_agent)
        self.active: NDArray[np.bool_] | None = None
        self.have_reset = np.zeros(worlds.num_streams, dtype=bool)

    @property
    def resumable(self) -> str | None:
        return self._worlds.resumable

    def reset(self, *, seed: int | None = None) -> Any:
        """Begins an episode in every world; see `GymnasiumStreams.reset`."""
        return self._observed(self._worlds.reset(seed=seed))

    def step(self, actions: Any) -> StreamStep:
        acted = self.active
        step = self._worlds.step(self._joint(actions))
        self.have_reset = step.terminated
        told = step.observations if step.final_observations is None else step.final_observations
        terminated, truncated = self._flags(told["terminated"]), self._flags(told["truncated"])
        events = None
        if self.resources:
            punished: Any = self._flags(told["punished"])
            events = NormEvents(punished, self._flags(told["collected"]))  # type: ignore[arg-type]
        return StreamStep(
            self._observed(step.observations),
            told["rewards"].reshape(-1),
            terminated,
            truncated,
            self._by_stream(told["observations"]) if truncated.any() or terminated.any() else None,
            events,
            self._numbers(step.numbers),
            acted,
        )

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return self._worlds.state()

    def restore(self, tensors: dict[str, Tensor], metadata: dict[str, Any], *, source: str = "checkpoint") -> Any:
        return self._observed(self._worlds.restore(tensors, metadata, source=source))

    def statistics(self) -> dict[str, float]:
        return self._worlds.statistics()

    def frame(self) -> Any:
        """A picture of the first world, made with a `render_mode` that gives some."""
        worlds: Any = self._worlds.envs
        return worlds.call("render")[0]

    def close(self) -> None:
        self._worlds.close()

    def _observed(self, told: Any) -> Any:
        """The observations of all streams, with filler that allows every action where an agent has left."""
        active = self._flags(told["active"])
        self.active = None if active.all() else active
        seen = self._by_stream(told["observations"])
        if self.active is None:
            return seen
        if self.spaces_by_agent is None:
            return _opened(seen, ~active)
        return ByAgent(_opened(own, ~active[agent :: self.num_agents]) for agent, own in enumerate(seen))

    def _by_stream(self, seen: Any) -> Any:
        if self.spaces_by_agent is not None:
            return ByAgent(seen)
        return mapped(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), seen)

    def _joint(self, actions: Any) -> Any:
        """Actions as the worlds take them."""
        if self.spaces_by_agent is not None:
            return tuple(actions)
        return mapped(lambda leaf: leaf.reshape(-1, self.num_agents, *leaf.shape[1:]), actions)

    def _flags(self, given: NDArray[np.int8]) -> NDArray[np.bool_]:
        """[W, A, ...] as [B, ...]."""
        return given.reshape(self.num_streams, *given.shape[2:]).astype(bool)

    def _numbers(self, given: Mapping[str, Any] | None) -> dict[str, NDArray[np.float64]] | None:
        """[B] by name, of [W] by name and agent."""
        numbers: dict[str, NDArray[np.float64]] = {}
        for key, of_worlds in (given or {}).items():
            name, _, agent = key.rpartition("@")
            of_streams = numbers.setdefault(name, np.full(self.num_streams, np.nan))
            of_streams[int(agent) :: self.num_agents] = of_worlds
        return numbers or None


def _opened(seen: Any, streams: NDArray[np.bool_]) -> Any:
    """Observations whose masks allow everything in some streams, [B] bool; masks are copied for it."""
    if not isinstance(seen, dict):
        return seen
    parts = {key: _opened(part, streams) for key, part in seen.items() if key != ACTION_MASK}
    if ACTION_MASK in seen:
        mask = copy.deepcopy(seen[ACTION_MASK])
        for leaf in mask.values() if isinstance(mask, dict) else [mask]:
            leaf[streams] = 1
        parts[ACTION_MASK] = mask
    return parts


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
    env: Any,
    num_envs: int,
    *,
    vectorization: str = "sync",
    num_workers: int | None = None,
    **env_args: Any,
) -> GymnasiumStreams | ParallelStreams:
    """Streams of a Gymnasium environment, or of all agents of a ParallelEnv.

    Args:
        env: see `make_env`.
        num_envs: environments, or worlds of several agents.
        vectorization: `sync` in this process, `async` in others.
        num_workers: processes of `async`; None: one for each environment.
        env_args: for the environment.

    Raises:
        UnavailableEnvironment: unknown id, missing package, or the environment could not be made.
    """
    makers = [functools.partial(make_env, env, env_args)] * num_envs
    if vectorization == "async":
        streams = GymnasiumStreams(RecordedAsyncVectorEnv(makers, num_workers=num_workers))
    else:
        streams = GymnasiumStreams(LeanSyncVectorEnv(makers))
    return ParallelStreams(streams) if isinstance(streams.observation_space, JointSpace) else streams


def make_env(
    env: Any,
    env_args: Mapping[str, Any] = MappingProxyType({}),
    *,
    wrappers: Sequence[tuple[str, Callable[[Any], Any]]] = (),
    drop_observations: Sequence[str] = (),
) -> gym.Env:
    """One environment, by id with what its package needs around it; a ParallelEnv as a `JointEnv`.

    Args:
        env: a Gymnasium id (`popgym-...`, `MiniGrid-...` and `BabyAI-...` load their package); what makes one
            environment, of Gymnasium or a ParallelEnv; or a ParallelEnv, which is copied.
        env_args: of its constructor, or for `gymnasium.make`.
        wrappers: names for messages, and what is called with the environment; the innermost first.
        drop_observations: keys of its Dict observation that are left out, before wrappers are applied. Those of a
            ParallelEnv are left out after its wrappers, of the agents that have them.

    Raises:
        UnavailableEnvironment: as `make_streams`, or a wrapper or a key does not fit.
    """
    made = _made(env, env_args, is_plain=bool(wrappers))
    is_world = is_multi_agent(made)
    if drop_observations and not is_world:
        made = _without_keys(made, drop_observations)
    for name, wrap in wrappers:
        inside = made
        try:
            made = wrap(inside)
        except Exception as error:
            raise UnavailableEnvironment(
                f"wrapper {name!r} around {inside}: {type(error).__name__}: {error}"
            ) from error
        if not (is_multi_agent(made) if is_world else isinstance(made, gym.Env)):
            expected = "ParallelEnv" if is_world else "gymnasium.Env"
            raise UnavailableEnvironment(f"wrapper {name!r}: expected a {expected} from it, got {made!r}")
    return JointEnv(made, drop_observations=drop_observations) if is_world else made


def _made(env: Any, env_args: Mapping[str, Any], *, is_plain: bool) -> Any:
    """An environment of Gymnasium, or a ParallelEnv, without the user's wrappers; `is_plain`: they take the place of
    preprocessing."""
    if is_multi_agent(env):
        if env_args:
            raise TypeError(f"env_args: expected none, because {type(env).__name__} is made already, got {env_args}")
        return as_parallel(copied(env))
    try:
        if isinstance(env, str):
            return _made_by_id(env, env_args, is_plain=is_plain)
        own = from_dm_env(env(**env_args))
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
    if is_multi_agent(own):
        return as_parallel(own)
    if not isinstance(own, gym.Env):
        raise TypeError(
            f"expected a callable that makes one Gymnasium environment or ParallelEnv, got one that made {own!r}"
        )
    return own


def _made_by_id(env: str, env_args: Mapping[str, Any], *, is_plain: bool) -> gym.Env:
    suite = suite_of(env)
    if suite is not None and (lacks := missing(suite)):
        raise UnavailableEnvironment(f"environment {env!r} {lacks}")
    try:
        return make_as_usual(env, is_plain=is_plain, **env_args)
    except (gym.error.NameNotFound, gym.error.NamespaceNotFound) as error:
        raise UnknownEnvironment(env, known_ids()) from error
    except (gym.error.Error, ImportError, TypeError) as error:
        raise UnavailableEnvironment(
            f"cannot make environment {env!r}: {error}{_its_arguments(env, env_args)}"
        ) from error


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
