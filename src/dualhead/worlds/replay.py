"""Episodes in progress, saved as how they began and the actions since, and played again to resume.

No object of an environment is written or read. A saved episode is numbers and a fingerprint, and it is not trusted: it
counts only if playing it again leads to the same last observation and the same state of the generators.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector.utils import batch_space, concatenate, create_empty_array, iterate
from numpy.typing import NDArray

MAX_REPLAYED_STEPS = 100_000
"""Longer episodes begin again on resume. An Atari game has at most 27,000 steps, a MuJoCo task 1,000: only an endless
environment gets here, and to play it again would then take minutes."""

_SEEDED_EACH_EPISODE = ("ale_py.", "popgym.envs.labyrinth_")
"""Modules of environments whose `reset(seed=...)` seeds a generator that cannot be read: in C, or the process's own."""

GeneratorState = tuple[int, int, int, int]
"""Of a PCG64, Gymnasium's kind: state, increment, whether half a draw is left, and that half."""


class CannotReplay(RuntimeError):
    """An episode cannot be saved, or playing it again led elsewhere. The caller can begin a new one."""


class Start(NamedTuple):
    """How an episode began.

    Fields:
        root: the seed of the last reset with one.
        number: of resets since then.
        generators: states before the reset: the environment's `np_random`, if it has one, and its spaces'.
    """

    root: int
    number: int
    generators: list[GeneratorState]


class Episode(NamedTuple):
    """An episode in progress.

    Fields:
        start: see there.
        actions: an array [num_steps, ...] for each leaf of the action space, as `ActionLog` stores them.
        fingerprint: of the last observation and the generators' states: SHA-256 in hexadecimal.
    """

    start: Start
    actions: list[NDArray[Any]]
    fingerprint: str


class Beginnings:
    """Resets one environment so that the episode can be begun once more, in this or a fresh environment.

    A reset without a seed goes on with the environment's generator, as Gymnasium means it. Environments of
    `_SEEDED_EACH_EPISODE` get a seed for each episode instead.

    Args:
        env: with all its wrappers.
    """

    def __init__(self, env: gym.Env) -> None:
        self.env = env
        self._unwrapped = env.unwrapped
        self._own_spaces, self._spaces = own_spaces(env)
        self._seeds_each = type(self._unwrapped).__module__.startswith(_SEEDED_EACH_EPISODE)
        self._root = self._number = 0
        self._states: list[dict[str, Any]] = []

    def reset(self, *, seed: int | None = None) -> Any:
        """Begins an episode; its first observation. With a seed the spaces, which Gymnasium leaves out, are seeded."""
        if seed is None:
            self._number += 1
        else:
            self._root, self._number = seed, 0
            for space in self._own_spaces:
                space.seed(seed)
        self._states = [generator.state for generator in self._generators_of_reset()]
        return self.env.reset(seed=self._seed())[0]

    def start(self) -> Start:
        """How the present episode began.

        Raises:
            CannotReplay: a generator is not of Gymnasium's kind.
        """
        return Start(self._root, self._number, [_numbers_of(state) for state in self._states])

    def again(self, start: Start) -> Any:
        """Begins an episode as it began once; its first observation.

        Raises:
            CannotReplay: this environment has other generators.
        """
        self._root, self._number = start.root, start.number
        if start.number and not self._seeds_each:
            self.env.reset(seed=start.root)  # the environment makes its generators
        generators = self._generators_of_reset()
        if len(start.generators) != len(generators):
            raise CannotReplay(f"it has {len(generators)} generators, expected {len(start.generators)}")
        for generator, numbers in zip(generators, start.generators):
            if not isinstance(generator, np.random.PCG64):
                raise CannotReplay(_other_kind(type(generator).__name__))
            generator.state = _state_of(numbers)
        self._states = [generator.state for generator in generators]
        return self.env.reset(seed=self._seed())[0]

    def fingerprint(self, row: Any) -> str:
        """Of this moment.

        Args:
            row: the last observation as a batch of one, in the space's dtypes.
        """
        digest = hashlib.sha256()
        for leaf in leaves(row):
            digest.update(f"{leaf.dtype.str}{leaf.shape}".encode() + leaf.tobytes())
        generators = [space.np_random.bit_generator for space in self._spaces] + self._own_generator()
        digest.update(repr([generator.state for generator in generators]).encode())
        return digest.hexdigest()

    def _seed(self) -> int | None:
        if self._seeds_each:
            return int(np.random.SeedSequence([self._root, self._number]).generate_state(1)[0] >> 1)
        return None if self._number else self._root

    def _generators_of_reset(self) -> list[Any]:
        """Those that a reset draws from. With a seed the environment's own is made anew."""
        is_seeded = self._seeds_each or self._number == 0
        return [space.np_random.bit_generator for space in self._spaces] + ([] if is_seeded else self._own_generator())

    def _own_generator(self) -> list[Any]:
        own = getattr(self._unwrapped, "_np_random", None)  # the property would make one, seeded by the system
        return [own.bit_generator] if isinstance(own, np.random.Generator) else []


def own_spaces(env: gym.Env) -> tuple[list[gym.Space], list[gym.Space]]:
    """Gives an environment spaces that it shares with no other, so that each draws from generators of its own.

    Spaces are often attributes of a class, or one object that is passed to many wrappers.

    Returns:
        The spaces of the environment and of the wrappers around it, and the same with all their parts; each once.
    """
    layers = [env]
    while isinstance(layers[-1], gym.Wrapper):
        layers.append(layers[-1].env)
    whole: dict[int, gym.Space] = {}
    for layer in reversed(layers):
        for name in ("action_space", "observation_space"):
            if id(getattr(layer, name)) not in whole:
                with suppress(AttributeError):  # a property: it stays as it is
                    setattr(layer, name, copy.deepcopy(getattr(layer, name)))
                space = getattr(layer, name)
                whole[id(space)] = space
    found = dict(whole)
    waiting = list(whole.values())
    while waiting:
        parts = _parts(waiting.pop())
        waiting += [part for part in parts if id(part) not in found]
        found |= {id(part): part for part in parts}
    return list(whole.values()), list(found.values())


def _numbers_of(state: Mapping[str, Any]) -> GeneratorState:
    if state["bit_generator"] != "PCG64":
        raise CannotReplay(_other_kind(state["bit_generator"]))
    words = state["state"]
    return words["state"], words["inc"], state["has_uint32"], state["uinteger"]


def _state_of(numbers: GeneratorState) -> Any:
    state, inc, has_uint32, uinteger = numbers
    words = {"state": state, "inc": inc}
    return {"bit_generator": "PCG64", "state": words, "has_uint32": has_uint32, "uinteger": uinteger}


def _other_kind(name: str) -> str:
    return f"its generator is a {name}: only PCG64, which Gymnasium makes, can be saved"


class ActionLog:
    """The actions of the episodes in progress, of all environments that step together.

    Time-major arrays that grow. What is older than every episode in progress, or than `max_steps`, is dropped.

    Args:
        action_space: of all environments, batched.
        num_envs: how many there are.
        max_steps: longest episode that is kept.
    """

    def __init__(self, action_space: gym.Space, num_envs: int, *, max_steps: int = MAX_REPLAYED_STEPS) -> None:
        self.max_steps = max_steps
        self._starts = [0] * num_envs
        self._length = 0
        self._arrays = [  # [time, B, ...]
            np.empty((64, *(space.shape or ())), stored_dtype(space)) for space in leaf_spaces(action_space)
        ]

    def append(self, actions: Any) -> None:
        """Adds a step of all environments; of a single one its action may come without the axis of environments."""
        if self._arrays and self._length == len(self._arrays[0]):
            self._make_room()
        for array, leaf in zip(self._arrays, leaves(actions)):
            array[self._length] = leaf
        self._length += 1

    def begin(self, env: int) -> None:
        """A new episode begins in that environment with the next step."""
        self._starts[env] = self._length

    def of(self, env: int) -> list[NDArray[Any]]:
        """Actions of the environment's present episode.

        Raises:
            CannotReplay: they are too many.
        """
        num_steps = self._length - self._starts[env]
        if num_steps > self.max_steps:
            raise CannotReplay(
                f"environment {env} is more than {self.max_steps} steps into its episode, too many to play them again"
            )
        return [array[self._length - num_steps : self._length, env] for array in self._arrays]

    def fill(self, episodes: list[list[NDArray[Any]]]) -> None:
        """Takes the actions of an episode in progress for each environment instead of what was recorded."""
        lengths = [len(actions[0]) for actions in episodes]
        self._length = max(lengths)
        self._arrays = [np.empty((self._length + 64, *a.shape[1:]), a.dtype) for a in self._arrays]
        for env, (actions, length) in enumerate(zip(episodes, lengths)):
            self._starts[env] = self._length - length
            for array, leaf in zip(self._arrays, actions):
                array[self._starts[env] : self._length, env] = leaf

    def _make_room(self) -> None:
        first = max(0, min(self._starts), self._length - self.max_steps)
        kept = self._length - first
        for n, array in enumerate(self._arrays):
            size = 2 * len(array) if 2 * kept > len(array) else len(array)
            moved = np.empty((size, *array.shape[1:]), array.dtype)
            moved[:kept] = array[first : self._length]
            self._arrays[n] = moved
        self._starts = [start - first for start in self._starts]
        self._length = kept


def as_actions(space: gym.Space, actions: Any) -> Any:
    """Batched actions with the dtypes of the batched space, so that what is recorded is what environments get.

    Raises:
        TypeError: an array of another kind, such as floats for integers.
    """
    if isinstance(space, spaces.Dict):
        return {key: as_actions(part, actions[key]) for key, part in space.items()}
    if isinstance(space, spaces.Tuple):
        return tuple(as_actions(part, given) for part, given in zip(space, actions))
    if space.dtype is None:
        return actions
    return np.asarray(actions).astype(space.dtype, casting="same_kind", copy=False)


def stored_dtype(space: gym.Space) -> np.dtype:
    """Of a leaf of an action space: one byte where that is enough, else the space's own."""
    low, high = bounds_of(space)
    if np.issubdtype(space.dtype, np.integer) and np.min(low) >= 0 and np.max(high) <= 255:
        return np.dtype(np.uint8)
    return np.dtype(space.dtype)


def bounds_of(space: gym.Space) -> tuple[Any, Any]:
    if isinstance(space, spaces.Discrete):
        return space.start, space.start + space.n - 1
    if isinstance(space, spaces.MultiDiscrete):
        return space.start, space.start + space.nvec - 1
    if isinstance(space, spaces.MultiBinary):
        return 0, 1
    assert isinstance(space, spaces.Box)
    return space.low, space.high


def are_inside(space: gym.Space, actions: NDArray[Any]) -> bool:
    """Whether all actions [n, ...] of a leaf lie within its space; NaN does not."""
    low, high = bounds_of(space)
    return bool(np.all((actions >= low) & (actions <= high)))


def _parts(space: gym.Space) -> tuple[gym.Space, ...]:
    if isinstance(space, spaces.Dict):
        return tuple(part for _, part in sorted(space.items()))  # spaces and actions do not keep one order of keys
    return tuple(space.spaces) if isinstance(space, spaces.Tuple) else ()


def leaf_spaces(space: gym.Space) -> list[gym.Space]:
    """The arrays that an action consists of; none where a part is of another kind, whose actions cannot be saved."""
    if isinstance(space, spaces.Dict | spaces.Tuple):
        found = [leaf_spaces(part) for part in _parts(space)]
        return [leaf for part in found for leaf in part] if all(found) else []
    known = isinstance(space, spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary | spaces.Box)
    return [space] if known else []


def _as_batch(space: gym.Space, stored: Iterator[NDArray[Any]]) -> Any:
    """The inverse of `leaves`, in the space's dtypes."""
    if isinstance(space, spaces.Dict):
        return {key: _as_batch(part, stored) for key, part in sorted(space.items())}
    if isinstance(space, spaces.Tuple):
        return tuple(_as_batch(part, stored) for part in space)
    return next(stored).astype(space.dtype)


def episode_of(beginnings: Beginnings, log: ActionLog, env: int, row: Any) -> Episode:
    """The episode in progress in one environment.

    Args:
        beginnings: of that environment.
        log, env: where its actions are.
        row: its last observation as a batch of one.

    Raises:
        CannotReplay: it cannot be saved.
    """
    actions = [leaf.copy() for leaf in log.of(env)]
    for space, leaf in zip(leaf_spaces(beginnings.env.action_space), actions):
        if not are_inside(space, leaf):
            raise CannotReplay(f"environment {env} got an action outside {space}")
    return Episode(beginnings.start(), actions, beginnings.fingerprint(row))


def play_again(beginnings: Beginnings, episode: Episode) -> Any:
    """Plays an episode again in a fresh environment.

    Returns:
        The observation that was to be acted on.

    Raises:
        CannotReplay: it led elsewhere.
    """
    env, num_steps = beginnings.env, len(episode.actions[0])
    space = batch_space(env.action_space, 1)
    try:
        observation = beginnings.again(episode.start)
        for number, action in enumerate(iterate(space, _as_batch(space, iter(episode.actions))), 1):
            observation, _, terminated, truncated, _ = env.step(action)
            if terminated or truncated:
                raise CannotReplay(f"its episode ended after {number} of {num_steps} steps")
    except CannotReplay:
        raise
    except Exception as error:  # whatever an environment may raise
        raise CannotReplay(f"playing it again raised {type(error).__name__}: {error}") from error
    if beginnings.fingerprint(as_row(env.observation_space, observation)) != episode.fingerprint:
        raise CannotReplay(f"its last observation or a generator differed after {num_steps} steps")
    return observation


def as_row(space: gym.Space, observation: Any) -> Any:
    """An observation as a batch of one."""
    row = create_empty_array(space, n=1)
    assert row is not None
    return concatenate(space, [observation], row)


def leaves(value: Any) -> Iterator[NDArray[Any]]:
    """The arrays of an observation or action, those of a Dict in the order of its keys."""
    if isinstance(value, dict):
        value = tuple(part for _, part in sorted(value.items()))
    if isinstance(value, tuple):
        for part in value:
            yield from leaves(part)
    else:
        yield np.asarray(value)
