"""Episodes in progress, saved as how they began and the actions since, and played again to resume.

No object of an environment is written or read: a saved episode is numbers and a fingerprint, and it is not trusted. It
counts only if playing it again leads to the same last observation and the same state of the generators.
"""

from __future__ import annotations

import copy
import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Annotated, Any, Literal

import gymnasium as gym
import numpy as np
import torch
from annotated_types import Predicate
from gymnasium import spaces
from gymnasium.vector.utils import batch_space, create_empty_array, iterate
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from dualhead.config import FiniteFloat
from dualhead.errors import CheckpointError
from dualhead.spaces import torch_dtype
from dualhead.storage import Saved

MAX_REPLAYED_STEPS = 100_000
"""Longer episodes begin again on resume. An Atari game has at most 27,000 steps, a MuJoCo task 1,000. Only an endless
environment gets here, and to play it again would take minutes."""

_SEEDED_EACH_EPISODE = ("ale_py.", "popgym.envs.labyrinth_", "shimmy.dm_control_")
"""Modules of environments whose `reset(seed=...)` seeds a generator that cannot be read: in C, the process's own, or
NumPy's older kind."""

_KINDS = spaces.Dict | spaces.Tuple | spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary | spaces.Box
"""Action spaces whose actions are arrays of numbers. Only those can be saved."""

_Uint32 = Annotated[int, Field(ge=0, lt=2**32)]
_Uint128 = Annotated[int, Field(ge=0, lt=2**128)]


class CannotReplay(RuntimeError):
    """An episode cannot be saved, or playing it again led elsewhere. The caller can begin a new one."""


class _PCG64Words(Saved):
    state: _Uint128
    inc: Annotated[_Uint128, Predicate(lambda inc: inc % 2 == 1)]


class GeneratorState(Saved):
    """Of a generator of Gymnasium's kind, in NumPy's form."""

    bit_generator: Literal["PCG64"]
    state: _PCG64Words
    has_uint32: Annotated[int, Field(ge=0, le=1)]
    uinteger: _Uint32


class Episode(Saved):
    """An episode in progress, without its actions.

    Fields:
        root: the seed of the last reset with one.
        number: of resets since then.
        generators: states before the reset: the environment's `np_random`, if it has one, and its spaces'.
        num_steps: actions since.
        fingerprint: of the last observation and the generators' states: SHA-256 in hexadecimal.
    """

    root: int = Field(ge=0, lt=2**64)
    number: int = Field(ge=0, lt=2**63)
    generators: list[GeneratorState]
    num_steps: int = Field(ge=0, le=MAX_REPLAYED_STEPS)
    fingerprint: str = Field(pattern="^[0-9a-f]{64}$")


class MersenneTwister(Saved):
    key: list[_Uint32] = Field(min_length=624, max_length=624)
    position: int = Field(ge=0, le=624)
    gauss: FiniteFloat | None


class Randomness(Saved):
    """The process's own generators: that of `random`, and NumPy's global one."""

    python: MersenneTwister
    numpy: MersenneTwister

    @classmethod
    def now(cls) -> Randomness:
        _, (*words, index), gauss = random.getstate()
        other = np.random.get_state(legacy=False)  # noqa: NPY002
        key, position = other["state"]["key"].tolist(), other["state"]["pos"]
        return cls(
            python=MersenneTwister(key=words, position=index, gauss=gauss),
            numpy=MersenneTwister(key=key, position=position, gauss=other["gauss"] if other["has_gauss"] else None),
        )

    def set(self) -> None:
        random.setstate((3, (*self.python.key, self.python.position), self.python.gauss))
        key, position, gauss = self.numpy.key, self.numpy.position, self.numpy.gauss
        np.random.set_state(("MT19937", np.array(key, np.uint32), position, int(gauss is not None), gauss or 0.0))  # noqa: NPY002


class _State(Saved):
    episodes: list[Episode]
    randomness: Randomness


class Recorder(gym.Wrapper):
    """Records the episode in progress of one environment, and plays such a record again.

    A reset without a seed draws from the environment's generator, as Gymnasium means it; environments of
    `_SEEDED_EACH_EPISODE` get a seed instead. A seed is for the spaces too, which Gymnasium leaves out.

    Attributes:
        observation: the last one.
        row: dtype of one action, see `row_of`.
        actions: the actions since the last reset, rows as bytes. They end once they are too many to be saved.
        episode: what `replay` plays: an episode, and its actions.
    """

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        self.observation: Any = None
        self.row = row_of(env.action_space)
        self.actions = bytearray()
        self.max_bytes = MAX_REPLAYED_STEPS * self.row.itemsize
        self.episode: tuple[Episode, bytes] | None = None
        self._core = env.unwrapped
        self._own_spaces = _own_spaces(env)
        self._spaces = [part for space in self._own_spaces for part in _parts(space)]
        self._seeds_each = type(self._core).__module__.startswith(_SEEDED_EACH_EPISODE)
        self._root = self._number = 0
        self._states: list[Mapping[str, Any]] = []

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        if seed is None:
            self._number += 1
        else:
            self._root, self._number = seed, 0
            for space in self._own_spaces:
                space.seed(seed)
        self._states = [generator.state for generator in self._generators(before_reset=True)]
        return self._begin(), {}

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        if len(self.actions) <= self.max_bytes:
            self.actions += action_bytes(self.row, action, 1)[0]
        self.observation, reward, terminated, truncated, info = self.env.step(action)
        return self.observation, reward, terminated, truncated, info

    def saved(self) -> tuple[Episode, bytes] | str:
        """The episode in progress and its actions, or why it cannot be saved (an error would end a process)."""
        space, kinds = self.action_space, {state["bit_generator"] for state in self._states}
        if not self.row.names:
            return f"actions of {space} cannot be saved"
        if len(self.actions) > self.max_bytes:
            return f"it is more than {MAX_REPLAYED_STEPS} steps into its episode, too many to play them again"
        if others := kinds - {"PCG64"}:
            return f"its generator is a {others.pop()}: only PCG64, which Gymnasium makes, can be saved"
        rows = np.frombuffer(bytes(self.actions), self.row)
        if not _are_inside(space, rows):
            return f"it got an action outside {space}"
        episode = Episode(
            root=self._root,
            number=self._number,
            generators=[GeneratorState(**state) for state in self._states],
            num_steps=len(rows),
            fingerprint=self.fingerprint(),
        )
        return episode, rows.tobytes()

    def replay(self) -> tuple[str | None, Any]:
        """Plays `episode` again: why it led elsewhere or None, and the observation that is to be acted on."""
        assert self.episode is not None
        episode, actions = self.episode
        self._root, self._number = episode.root, episode.number
        self._states = [state.model_dump() for state in episode.generators]
        batch = actions_of(self.action_space, np.frombuffer(actions, self.row))
        try:
            if episode.number and not self._seeds_each:
                self.env.reset(seed=episode.root)  # the environment makes its generators
            generators = self._generators(before_reset=True)
            if len(generators) != len(self._states):
                return f"it has {len(generators)} generators, expected {len(self._states)}", None
            for generator, state in zip(generators, self._states):
                generator.state = state
            self._begin()
            for number, action in enumerate(iterate(batch_space(self.action_space, 1), batch), 1):
                _, _, terminated, truncated, _ = self.step(action)
                if terminated or truncated:
                    return f"its episode ended after {number} of {episode.num_steps} steps", None
        except Exception as error:  # whatever an environment may raise
            return f"playing it again raised {type(error).__name__}: {error}", None
        if self.fingerprint() != episode.fingerprint:
            return f"its last observation or a generator differed after {episode.num_steps} steps", None
        return None, self.observation

    def fingerprint(self) -> str:
        """Of this moment."""
        digest = hashlib.sha256()
        for leaf in leaves(self.observation):
            digest.update(f"{leaf.dtype.str}{leaf.shape}".encode() + leaf.tobytes())
        digest.update(repr([generator.state for generator in self._generators()]).encode())
        return digest.hexdigest()

    def _begin(self) -> Any:
        self.actions.clear()
        seed = None if self._number else self._root
        if self._seeds_each:
            seed = int(np.random.SeedSequence([self._root, self._number]).generate_state(1)[0] >> 1)
        self.observation = self.env.reset(seed=seed)[0]
        return self.observation

    def _generators(self, *, before_reset: bool = False) -> list[Any]:
        """Those of the spaces, and the environment's own unless the coming reset has a seed, which makes a new one."""
        found = [space.np_random for space in self._spaces]
        own = getattr(self._core, "_np_random", None)  # the property would make one, seeded by the system
        is_kept = not before_reset or (self._number > 0 and not self._seeds_each)
        if is_kept and isinstance(own, np.random.Generator):
            found.append(own)
        return [generator.bit_generator for generator in found]


def layers_of(env: gym.Env) -> list[gym.Env]:
    """An environment with all its wrappers, from outside to inside."""
    return [env, *layers_of(env.env)] if isinstance(env, gym.Wrapper) else [env]


def _own_spaces(env: gym.Env) -> list[gym.Space]:
    """The spaces of an environment and of the wrappers around it, replaced by copies with generators of their own.

    Spaces are often attributes of a class, or one object that is passed to many wrappers.
    """
    own: dict[int, gym.Space] = {}
    for layer in reversed(layers_of(env)):
        for name in ("action_space", "observation_space"):
            if id(getattr(layer, name)) not in own:
                with suppress(AttributeError):  # a property: it stays as it is
                    setattr(layer, name, copy.deepcopy(getattr(layer, name)))
                space = getattr(layer, name)
                own[id(space)] = space
    return list(own.values())


def _parts(space: gym.Space) -> list[gym.Space]:
    """A space, and all the spaces inside it."""
    inside = space.values() if isinstance(space, spaces.Dict) else space if isinstance(space, spaces.Tuple) else ()
    return [space, *(part for inner in inside for part in _parts(inner))]


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


def leaves(value: Any) -> Iterator[NDArray[Any]]:
    """The arrays of an observation or action, those of a Dict in the order of its keys."""
    if isinstance(value, dict):
        value = tuple(part for _, part in sorted(value.items()))
    if isinstance(value, tuple):
        for part in value:
            yield from leaves(part)
    else:
        yield np.asarray(value)


def row_of(action_space: gym.Space) -> np.dtype:
    """Dtype of one action: a field for each of its `leaves`, named `0`, `1`, ...; none where it cannot be saved."""
    if not all(isinstance(part, _KINDS) for part in _parts(action_space)):
        return np.dtype([])
    of_one = leaves(create_empty_array(action_space, n=1))
    return np.dtype([(str(n), leaf.dtype, leaf.shape[1:]) for n, leaf in enumerate(of_one)])


def action_bytes(row: np.dtype, actions: Any, num_envs: int) -> list[bytes]:
    """The action of each environment, as one row in bytes. A single one may come without its batch axis."""
    if not row.names:
        return [b""] * num_envs
    parts = [np.ascontiguousarray(leaf).reshape(num_envs, -1).view(np.uint8) for leaf in leaves(actions)]
    return np.concatenate(parts, axis=1).view(f"V{row.itemsize}").ravel().tolist()


def actions_of(action_space: gym.Space, rows: NDArray[Any]) -> Any:
    """Batched actions of rows."""
    batch = create_empty_array(action_space, n=len(rows))
    for name, leaf in zip(rows.dtype.names or (), leaves(batch)):
        leaf[...] = rows[name]
    return batch


def _are_inside(action_space: gym.Space, rows: NDArray[Any]) -> bool:
    return not len(rows) or batch_space(action_space, len(rows)).contains(actions_of(action_space, rows))


def pack(saved: Sequence[tuple[Episode, bytes]], action_space: gym.Space) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and JSON: the episode in each environment, and the process's generators.

    The tensors are the leaves of the actions, those of one environment after the other.
    """
    rows = np.frombuffer(b"".join(actions for _, actions in saved), row_of(action_space))
    tensors = {f"actions/{name}": torch.from_numpy(rows[name].copy()) for name in rows.dtype.names or ()}
    return tensors, _State(episodes=[episode for episode, _ in saved], randomness=Randomness.now()).model_dump()


def unpack(
    tensors: Mapping[str, Tensor], metadata: Any, action_space: gym.Space, num_envs: int, *, source: str
) -> tuple[list[tuple[Episode, bytes]], Randomness]:
    """The inverse of `pack`; everything is checked before anything is used.

    Raises:
        CheckpointError: it is no such state, or of other actions or another number of environments.
    """

    def wrong(what: str) -> CheckpointError:
        return CheckpointError(f"{source} holds no state of these environments: {what}")

    state = _State.read(metadata, source=source)
    lengths = [episode.num_steps for episode in state.episodes]
    if len(lengths) != num_envs:
        raise wrong(f"it is of {len(lengths)} environments, expected num_envs={num_envs}")
    row = row_of(action_space)
    fields = {f"actions/{name}": row[name] for name in row.names or ()}
    given = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    expected = {name: (torch_dtype(field.base), (sum(lengths), *field.shape)) for name, field in fields.items()}
    if given != expected:
        raise wrong(f"its actions are {given}, expected {expected}")
    rows = np.rec.fromarrays([tensors[name].numpy() for name in fields], dtype=row)
    if not _are_inside(action_space, rows):
        raise wrong(f"an action is outside {action_space}")
    of_env = np.split(rows, np.cumsum(lengths)[:-1])
    return [(episode, part.tobytes()) for episode, part in zip(state.episodes, of_env)], state.randomness
