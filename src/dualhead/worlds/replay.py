"""Episodes in progress, saved as how they began and the actions since, and played again to resume.

No object of an environment is written or read. A saved episode is numbers and a fingerprint, and it is not trusted: it
counts only if playing it again leads to the same last observation and the same state of the generators.
"""

from __future__ import annotations

import copy
import hashlib
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector.utils import batch_space, concatenate, create_empty_array, iterate
from numpy.typing import NDArray
from torch import Tensor

from dualhead.storage import CheckpointError

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


# Actions.


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
            np.empty((64, *(space.shape or ())), stored_dtype(space)) for space in _leaf_spaces(action_space)
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
    low, high = _bounds(space)
    if np.issubdtype(space.dtype, np.integer) and np.min(low) >= 0 and np.max(high) <= 255:
        return np.dtype(np.uint8)
    return np.dtype(space.dtype)


def _bounds(space: gym.Space) -> tuple[Any, Any]:
    if isinstance(space, spaces.Discrete):
        return space.start, space.start + space.n - 1
    if isinstance(space, spaces.MultiDiscrete):
        return space.start, space.start + space.nvec - 1
    if isinstance(space, spaces.MultiBinary):
        return 0, 1
    assert isinstance(space, spaces.Box)
    return space.low, space.high


def _parts(space: gym.Space) -> tuple[gym.Space, ...]:
    if isinstance(space, spaces.Dict):
        return tuple(part for _, part in sorted(space.items()))  # spaces and actions do not keep one order of keys
    return tuple(space.spaces) if isinstance(space, spaces.Tuple) else ()


def _leaf_spaces(space: gym.Space) -> list[gym.Space]:
    """The arrays that an action consists of; none where a part is of another kind, whose actions cannot be saved."""
    if isinstance(space, spaces.Dict | spaces.Tuple):
        found = [_leaf_spaces(part) for part in _parts(space)]
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
    for space, leaf in zip(_leaf_spaces(beginnings.env.action_space), actions):
        if not _are_inside(space, leaf):
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


# In a checkpoint.


def pack(episodes: list[Episode]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and JSON of an episode for each environment."""
    tensors = {
        f"actions/{n}": torch.from_numpy(np.concatenate(parts))
        for n, parts in enumerate(zip(*(episode.actions for episode in episodes)))
    }
    said = [
        {**start._asdict(), "num_steps": len(actions[0]), "fingerprint": fingerprint}
        for start, actions, fingerprint in episodes
    ]
    return tensors, {"episodes": said}


def unpack(
    tensors: Mapping[str, Tensor], metadata: Any, action_space: gym.Space, num_envs: int, *, source: str
) -> list[Episode]:
    """The inverse of `pack`; everything is checked before anything is used.

    Args:
        tensors, metadata: from a file.
        action_space: of one environment.
        num_envs: how many there are.
        source: what errors call the file.

    Raises:
        CheckpointError: it is no such state, or of other actions or another number of environments.
    """

    def expect(holds: bool, what: str) -> None:
        if not holds:
            raise CheckpointError(f"{source} holds no state of these environments: {what}")

    said = metadata.get("episodes") if isinstance(metadata, dict) else None
    expect(isinstance(said, list), "it has no list of episodes")
    assert isinstance(said, list)
    expect(len(said) == num_envs, f"it is of {len(said)} environments, expected num_envs={num_envs}")
    starts = []
    for env, one in enumerate(said):
        where = f"environment {env}: "
        expect(isinstance(one, dict), where + "no episode")
        for name, end in (("root", 2**64), ("number", 2**63), ("num_steps", MAX_REPLAYED_STEPS + 1)):
            expect(_is_whole(one.get(name), end), f"{where}expected {name} in [0, {end}), got {one.get(name)!r}")
        given = one.get("fingerprint")
        is_digest = isinstance(given, str) and re.fullmatch("[0-9a-f]{64}", given) is not None
        expect(is_digest, f"{where}expected a fingerprint of 64 hexadecimal digits, got {given!r:.80}")
        given = one.get("generators")
        expect(
            isinstance(given, list) and all(map(_is_generator_state, given)), f"{where}wrong states of its generators"
        )
        starts.append(Start(one["root"], one["number"], [tuple(state) for state in one["generators"]]))
    lengths = [one["num_steps"] for one in said]
    leaf_spaces = _leaf_spaces(action_space)
    expect(bool(leaf_spaces), f"actions of {action_space} cannot be saved")
    names = {f"actions/{n}" for n in range(len(leaf_spaces))}
    expect(tensors.keys() == names, f"it has {sorted(tensors)}, expected {sorted(names)}")
    parts = []
    for n, space in enumerate(leaf_spaces):
        tensor = tensors[f"actions/{n}"]
        wanted = torch.from_numpy(np.empty(0, stored_dtype(space))).dtype
        shape = (sum(lengths), *(space.shape or ()))
        expect(
            tensor.dtype == wanted and tuple(tensor.shape) == shape,
            f"its actions are {tensor.dtype} {list(tensor.shape)}, expected {wanted} {list(shape)}",
        )
        array = tensor.numpy()
        expect(_are_inside(space, array), f"an action is outside {space}")
        parts.append(np.split(array, np.cumsum(lengths)[:-1]))
    actions = [list(of_env) for of_env in zip(*parts)]
    return [Episode(start, acted, one["fingerprint"]) for start, acted, one in zip(starts, actions, said)]


def _are_inside(space: gym.Space, actions: NDArray[Any]) -> bool:
    """Whether all actions [n, ...] of a leaf lie within its space; NaN does not."""
    low, high = _bounds(space)
    return bool(np.all((actions >= low) & (actions <= high)))


def _is_whole(value: Any, end: int) -> bool:
    return type(value) is int and 0 <= value < end


def _is_generator_state(given: Any) -> bool:
    ends = (2**128, 2**128, 2, 2**32)
    is_four = isinstance(given, list | tuple) and len(given) == 4
    return is_four and all(map(_is_whole, given, ends)) and given[1] % 2 == 1


# The process's own generators.


def global_randomness() -> tuple[Any, ...]:
    """State of `random` and of NumPy's global generator."""
    return random.getstate(), np.random.get_state()  # noqa: NPY002


def set_global_randomness(state: tuple[Any, ...]) -> None:
    """Takes back what `global_randomness` gave."""
    random.setstate(state[0])
    np.random.set_state(state[1])  # noqa: NPY002


def pack_randomness() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and JSON of `global_randomness`."""
    (_, words, gauss), (_, key, position, has_gauss, cached) = global_randomness()
    tensors = {"python": torch.tensor(words), "numpy": torch.from_numpy(np.append(key.astype(np.int64), position))}
    return tensors, {"python": gauss, "numpy": [has_gauss, float(cached)]}


def unpack_randomness(tensors: Mapping[str, Tensor], metadata: Any, *, source: str) -> tuple[Any, ...]:
    """The inverse of `pack_randomness`, for `set_global_randomness`.

    Raises:
        CheckpointError: it is no such state.
    """
    states = []
    for name in ("python", "numpy"):
        words = tensors.get(name)
        is_state = words is not None and words.dtype == torch.int64 and tuple(words.shape) == (625,)
        if words is None or not is_state or words.min() < 0 or words.max() >= 2**32 or words[-1] > 624:
            raise CheckpointError(f"{source} holds no state of {name}'s global generator")
        states.append(words.tolist())
    try:
        gauss, (has_gauss, cached) = metadata["python"], metadata["numpy"]
        if not (gauss is None or type(gauss) is float) or type(cached) is not float or has_gauss not in (0, 1):
            raise TypeError
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{source} holds no state of the global generators: {metadata!r:.200}") from None
    of_numpy = ("MT19937", np.array(states[1][:-1], np.uint32), states[1][-1], int(has_gauss), cached)
    return (3, tuple(states[0]), gauss), of_numpy


# Whether an environment can be replayed.


def why_not_replayed(
    make_env: Callable[[], gym.Env], *, min_steps: int = 20, max_steps: int = 300, seconds: float = 0.1
) -> str | None:
    """Tries whether an episode that is played again in a fresh environment is the same to the bit.

    Plays a little with random legal actions, begins another episode and plays that in a fresh environment as well,
    across a reset at least. Global generators are left as they were.

    Args:
        make_env: makes the environment.
        min_steps, max_steps: of the comparison.
        seconds: after which it ends once `min_steps` are done; it takes this twice.

    Returns:
        None if every observation, reward and flag agreed, else the reason in words.
    """
    before = global_randomness()
    made: list[gym.Env] = []
    try:
        return _compare(make_env, made, min_steps=min_steps, max_steps=max_steps, seconds=seconds)
    except CannotReplay as error:
        return str(error)
    except Exception as error:  # whatever an environment may raise: it only costs the exact resume
        return f"trying it raised {type(error).__name__}: {error}"
    finally:
        for env in made:
            env.close()
        set_global_randomness(before)


def _compare(
    make_env: Callable[[], gym.Env], made: list[gym.Env], *, min_steps: int, max_steps: int, seconds: float
) -> str | None:
    env, other = make_env(), make_env()
    made += [env, other]
    if not _leaf_spaces(env.action_space):
        return f"actions of {env.action_space} cannot be saved"
    action_space = copy.deepcopy(env.action_space)
    action_space.seed(0)
    _seed_globally(0)
    beginnings = Beginnings(env)
    observation = beginnings.reset(seed=0)
    for _ in range(7):
        observation, _, terminated, truncated, _ = env.step(legal_action(action_space, observation))
        if terminated or truncated:
            observation = beginnings.reset()

    beginnings.reset()  # `again` resets twice: not the same number of times
    observation = beginnings.reset()
    start = beginnings.start()
    actions: list[Any] = []
    seen: list[Any] = [_bits(observation)]
    ends_at = time.perf_counter() + seconds
    while len(actions) < min_steps or (len(actions) < max_steps and time.perf_counter() < ends_at):
        actions.append(legal_action(action_space, observation))
        observation = _step(beginnings, actions[-1], seen)
    observation = beginnings.reset()
    actions.append(legal_action(action_space, observation))
    seen.append(_bits(observation))
    observation = _step(beginnings, actions[-1], seen)
    seen.append(beginnings.fingerprint(as_row(env.observation_space, observation)))

    _seed_globally(1)  # what an environment draws from there must not agree
    beginnings = Beginnings(other)
    again: list[Any] = [_bits(beginnings.again(start))]
    for number, action in enumerate(actions, 1):
        if number == len(actions):
            again.append(_bits(beginnings.reset()))
        observation = _step(beginnings, action, again)
        if again != seen[: len(again)]:
            return (
                f"an episode that was played again differed at step {number}: it keeps state beyond an episode, or "
                f"draws from other generators than its np_random"
            )
    again.append(beginnings.fingerprint(as_row(other.observation_space, observation)))
    return None if again == seen else "an episode that was played again left a generator in another state"


def _step(beginnings: Beginnings, action: Any, seen: list[Any]) -> Any:
    """One step, and the reset that it may ask for; appends what is to be compared."""
    observation, reward, terminated, truncated, _ = beginnings.env.step(copy.deepcopy(action))
    seen.append((_bits(observation), _bits(reward), bool(terminated), bool(truncated)))
    if terminated or truncated:
        observation = beginnings.reset()
        seen.append(_bits(observation))
    return observation


def _bits(value: Any) -> list[Any]:
    return [(leaf.dtype.str, leaf.shape, leaf.tobytes()) for leaf in leaves(value)]


def _seed_globally(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002


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
        if isinstance(part, spaces.Discrete):
            return take(name, int(part.n))
        if isinstance(part, spaces.MultiDiscrete):
            return tuple(take(f"{name}_{i}", int(n)) for i, n in enumerate(part.nvec))
        if isinstance(part, spaces.Dict):
            return {key: masks(inner, key) for key, inner in part.items()}
        return None

    return space.sample(mask=masks(space, "head" if isinstance(space, spaces.MultiDiscrete) else "action"))
