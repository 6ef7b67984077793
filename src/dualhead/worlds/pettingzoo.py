"""PettingZoo's ParallelEnvs, each as one Gymnasium environment in whose observation everything travels.

Letters: A agents of a world, `possible_agents` in their order; R kinds of resources.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector.utils import batch_space, concatenate, create_empty_array, iterate
from numpy.typing import NDArray

from dualhead.errors import UnavailableEnvironment
from dualhead.spaces import ACTION_MASK, WHOLE, ActionSpec
from dualhead.worlds.replay_trial import legal_action
from dualhead.worlds.vectors import numbers_in

_EVENTS = ("punished", "collected")
"""Entries of an agent's info that tell of norms."""


class JointSpace(spaces.Dict):
    """What the agents of a world are told in a step, all of them together.

    observations: [A, ...] nested as one agent's, or a Tuple of one for each agent where their spaces differ.
    rewards: [A].
    terminated, truncated: [A], whose episode ended in this step.
    active: [A], who acts next.
    punished, collected: [A, R], in a world with resources.

    Whoever is not active and did not act in this step has filler: zeros, or what is nearest in the space; ones in a
    mask.
    """

    def __init__(
        self,
        agent_names: Sequence[str],
        spaces_by_agent: Sequence[tuple[gym.Space, gym.Space]],
        resources: Sequence[str],
    ) -> None:
        self.agent_names, self.resources = tuple(agent_names), tuple(resources)
        self.spaces_by_agent = tuple(spaces_by_agent)
        self.are_equal = all(own == self.spaces_by_agent[0] for own in self.spaces_by_agent)
        num_agents = len(self.agent_names)
        flags = ("terminated", "truncated", "active")
        super().__init__(
            {"observations": self.of_all(0), "rewards": spaces.Box(-np.inf, np.inf, (num_agents,), np.float64)}
            | {name: spaces.MultiBinary(num_agents) for name in flags}
            | {name: spaces.MultiBinary([num_agents, len(self.resources)]) for name in _EVENTS if self.resources}
        )

    def of_all(self, part: int) -> gym.Space:
        """The agents' observation spaces (0) or action spaces (1) as one."""
        own = [of_agent[part] for of_agent in self.spaces_by_agent]
        return batch_space(own[0], len(own)) if self.are_equal else spaces.Tuple(own)


class JointEnv(gym.Env):
    """A ParallelEnv as a Gymnasium environment of all its agents; observations as `JointSpace` says, rewards 0.

    The episode ends when no agent is left. An agent leaves when it is terminated or truncated, or when it disappears
    from `agents`, which counts as terminated. It may come later than others, and come back. Each reset has a seed,
    drawn from `np_random`, so that an episode can be played again whatever generator the environment has.

    Infos may hold, for each agent,

    action_mask: of an agent whose observation has none; found in a reset here. The observation space becomes a Dict.
    punished, collected: see `docs/multiagent.md`.
    numbers: of an agent's last step; the info of the episode's end has them as `NAME@AGENT`, by the agent's number.

    Args:
        env: the ParallelEnv; it belongs to the JointEnv from now on.
        drop_observations: keys that are left out of Dict observations.

    Raises:
        UnavailableEnvironment: the agents are not known beforehand, or a key to drop is in no agent's observation.
    """

    observation_space: JointSpace

    def __init__(self, env: Any, *, drop_observations: Collection[str] = ()) -> None:
        self.env = env
        self.metadata, self.render_mode = dict(env.metadata), getattr(env, "render_mode", None)
        self._agents = list(getattr(env, "possible_agents", ()))
        if not self._agents:
            raise UnavailableEnvironment(
                f"{type(env).__name__} has no possible_agents: expected a list of all agents that may ever take part"
            )
        seen = [env.observation_space(agent) for agent in self._agents]
        actions = [env.action_space(agent) for agent in self._agents]
        self._dropped = frozenset(drop_observations)
        keys = {key for space in seen if isinstance(space, spaces.Dict) for key in space}
        if unknown := self._dropped - keys:
            raise UnavailableEnvironment(
                f"drop_observations: expected keys of the agents' Dict observations, "
                f"{', '.join(sorted(keys)) or 'which have none'}, got {', '.join(sorted(unknown))}"
            )
        seen = list(map(self._without_dropped, seen))
        _, infos = env.reset(seed=0)
        self._masks_in_infos = any(ACTION_MASK in infos.get(agent, ()) for agent in self._agents)
        if self._masks_in_infos:
            seen = [_with_mask(space, action_space) for space, action_space in zip(seen, actions)]
        resources = env.metadata.get("resources") or getattr(env.unwrapped, "resources", None) or ()
        self.observation_space = JointSpace(list(map(str, self._agents)), list(zip(seen, actions)), resources)
        self.action_space = self.observation_space.of_all(1)
        self._filler = [_filler(space) for space in seen]
        self._active: set[Any] = set()
        self._gone: set[Any] = set()
        self._numbers: dict[str, float] = {}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        observations, infos = self.env.reset(seed=int(self.np_random.integers(2**31)))
        self._active, self._gone, self._numbers = set(), set(), {}
        joint = self._joint(observations, {}, {}, {}, infos)
        if not self._active:
            raise ValueError(f"agents: expected some of {self._agents} after reset, got none")
        return joint, {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        own = iterate(self.action_space, action) if self.observation_space.are_equal else action
        by_agent = dict(zip(self._agents, own))
        joint = self._joint(*self.env.step({agent: by_agent[agent] for agent in self.env.agents}))
        is_over = not self._active
        return joint, 0.0, is_over, False, self._numbers if is_over else {}

    def render(self) -> Any:
        return self.env.render()

    def close(self) -> None:
        self.env.close()

    def legal_action(self, space: gym.Space, observation: Any) -> Any:
        """A random action of all agents that their masks allow; `space` is a copy of ours with its own generator."""
        joint = self.observation_space
        of_all = joint["observations"]
        own = iterate(of_all, observation["observations"]) if joint.are_equal else observation["observations"]
        chosen = []
        for (_, action_space), seen, is_active in zip(joint.spaces_by_agent, own, observation["active"]):
            action_space = copy.deepcopy(action_space)
            action_space.seed(int(space.np_random.integers(2**31)))
            chosen.append(legal_action(action_space, seen) if is_active else action_space.sample())
        return self._together(1, chosen)

    def _joint(
        self,
        observations: Mapping[Any, Any],
        rewards: Mapping[Any, Any],
        terminated: Mapping[Any, Any],
        truncated: Mapping[Any, Any],
        infos: Mapping[Any, Any],
    ) -> dict[str, Any]:
        """What all agents are told; decides who is active from now on. In a reset nobody has acted."""
        agents, acted, present = self._agents, self._active, set(self.env.agents)
        if strangers := present - set(agents):
            raise ValueError(f"agents: expected only possible_agents={agents}, got also {sorted(map(str, strangers))}")
        flagged = {agent for agent in acted if terminated.get(agent) or truncated.get(agent)}
        cut_off = {agent for agent in flagged if not terminated.get(agent)}
        # Some environments go on listing agents that have left. One that was not listed for a step has come back.
        self._gone = (self._gone | flagged) & present
        self._active = active = present - self._gone
        seen = [
            self._seen(number, observations, infos, is_needed=agent in active or agent in cut_off)
            for number, agent in enumerate(agents)
        ]
        told = [infos.get(agent) or {} if agent in acted else {} for agent in agents]
        for number, agent in enumerate(agents):
            if agent in acted and agent not in active:
                numbers = {name: of for name, of in numbers_in(told[number]).items() if name not in _EVENTS}
                self._numbers |= {f"{name}@{number}": of for name, of in numbers.items()}
        joint = {
            "observations": self._together(0, seen),
            "rewards": np.array([rewards.get(agent, 0.0) if agent in acted else 0.0 for agent in agents], np.float64),
            "terminated": _flags(agents, acted - active - cut_off),
            "truncated": _flags(agents, {agent for agent in flagged if truncated.get(agent)}),
            "active": _flags(agents, active),
        }
        if resources := self.observation_space.resources:
            joint |= dict(zip(_EVENTS, np.stack([_events(info, resources) for info in told], axis=1)))
        return joint

    def _seen(self, number: int, observations: Mapping[Any, Any], infos: Mapping[Any, Any], *, is_needed: bool) -> Any:
        """What one agent sees; filler where it sees nothing any more."""
        agent = self._agents[number]
        seen = observations.get(agent)
        if seen is None:
            if is_needed:
                raise ValueError(f"observations: expected one of agent {agent!r}, which acts next or was truncated")
            return self._filler[number]
        if self._dropped and isinstance(seen, Mapping):
            seen = self._without_dropped(seen)
        filler = self._filler[number]
        if self._masks_in_infos and isinstance(filler, dict) and ACTION_MASK in filler:
            mask: Any = (infos.get(agent) or {}).get(ACTION_MASK, filler[ACTION_MASK])
            seen = {**(seen if isinstance(seen, Mapping) else {WHOLE: seen}), ACTION_MASK: np.ravel(mask)}
        return seen

    def _together(self, part: int, rows: list[Any]) -> Any:
        """Copies of the agents' observations (0) or actions (1), as the joint spaces hold them."""
        joint = self.observation_space
        if not joint.are_equal:
            return tuple(copy.deepcopy(rows))
        space = joint.spaces_by_agent[0][part]
        try:
            out: Any = create_empty_array(space, n=len(rows))
            return concatenate(space, rows, out)
        except Exception as error:
            wrong = next((agent for agent, row in zip(self._agents, rows) if not space.contains(row)), "unknown")
            raise ValueError(f"agent {wrong!r}: expected one of {space}: {error}") from error

    def _without_dropped(self, parts: Any) -> Any:
        """A Dict space, or an observation of it, without the keys to drop."""
        if not self._dropped or not isinstance(parts, Mapping | spaces.Dict):
            return parts
        kept = {key: part for key, part in parts.items() if key not in self._dropped}
        return spaces.Dict(kept) if isinstance(parts, spaces.Dict) else kept


def is_multi_agent(env: Any) -> bool:
    """Whether this is an environment of PettingZoo, a ParallelEnv or an AECEnv, rather than what makes one."""
    methods = ("observation_space", "action_space", "reset", "step")
    return (
        not isinstance(env, type)
        and not isinstance(env, gym.Env)
        and hasattr(env, "possible_agents")
        and all(callable(getattr(env, name, None)) for name in methods)
    )


def as_parallel(env: Any) -> Any:
    """The ParallelEnv that an environment of PettingZoo is, or can be used as.

    Raises:
        UnavailableEnvironment: its agents take turns.
    """
    if not hasattr(env, "agent_iter"):
        return env
    from pettingzoo.utils.conversions import aec_to_parallel

    try:
        return aec_to_parallel(env)
    except AssertionError as error:
        raise UnavailableEnvironment(
            f"{env}: expected an environment whose agents act at the same time; here they take turns: {error}"
        ) from error


def copied(env: Any) -> Any:
    """A copy of an environment of PettingZoo that Python handed over.

    Raises:
        TypeError: it cannot be copied.
    """
    try:
        return copy.deepcopy(env)
    except Exception as error:  # whatever its parts may raise
        raise TypeError(
            f"env: {type(env).__name__} cannot be copied, and each world needs its own ({error}): expected what makes "
            f"one, such as dualhead.train(simple_spread_v3.parallel_env) or lambda: ..."
        ) from error


def _with_mask(space: gym.Space, action_space: gym.Space) -> gym.Space:
    """The observation space of an agent whose mask comes by its infos."""
    parts = dict(space) if isinstance(space, spaces.Dict) else {WHOLE: space}
    size = sum(ActionSpec(action_space).nvec)
    if ACTION_MASK in parts or not size:
        return space
    return spaces.Dict(parts | {ACTION_MASK: spaces.MultiBinary(size)})


def _filler(space: gym.Space, *, is_mask: bool = False) -> Any:
    """The observation of an agent that is not there: as near to zero as the space allows; ones in a mask."""
    if isinstance(space, spaces.Dict):
        return {key: _filler(part, is_mask=is_mask or key == ACTION_MASK) for key, part in space.items()}
    if isinstance(space, spaces.Tuple):
        return tuple(_filler(part, is_mask=is_mask) for part in space)
    low, high = getattr(space, "low", -np.inf), getattr(space, "high", np.inf)
    near = np.full(space.shape or (), int(is_mask)).clip(low, high) + getattr(space, "start", 0)
    return near.astype(space.dtype)


def _flags(agents: Sequence[Any], chosen: Collection[Any]) -> NDArray[np.int8]:
    return np.array([agent in chosen for agent in agents], np.int8)


def _events(info: Mapping[str, Any], resources: Sequence[str]) -> NDArray[np.int8]:
    """Who was punished for which resource, and collected which: [2, R]."""
    collected = _marks(info.get("collected"), resources, "collected")
    punished = info.get("punished")
    if isinstance(punished, bool | np.bool_):
        own = collected if len(resources) > 1 else np.ones(1, np.int8)
        if punished and not own.any():
            raise ValueError(
                f"punished=True of an agent that collected nothing: expected the name of a resource of {resources}"
            )
        return np.stack([own * np.int8(punished), collected])
    return np.stack([_marks(punished, resources, "punished"), collected])


def _marks(given: Any, resources: Sequence[str], what: str) -> NDArray[np.int8]:
    """[R] of the name of a resource, of several, of an array [R] of bools, or of None."""
    if not (given is None or np.iterable(given)):
        raise ValueError(f"{what}: expected the name of a resource of {resources}, or None, got {given!r}")
    if isinstance(given, str):
        given = [given]
    if given is None or all(isinstance(name, str) for name in given):
        named = set(given or ())
        if unknown := named - set(resources):
            raise ValueError(f"{what}: expected resources of {resources}, got {sorted(unknown)}")
        return np.array([name in named for name in resources], np.int8)
    marks = np.asarray(given)
    if marks.shape != (len(resources),) or not ((marks == 0) | (marks == 1)).all():
        raise ValueError(f"{what}: expected names, or {len(resources)} bools for {resources}, got {given!r}")
    return marks.astype(np.int8)
