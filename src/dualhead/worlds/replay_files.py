"""Episodes in progress and the process's generators as tensors and JSON, and back; see `replay`."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from dualhead.storage import CheckpointError
from dualhead.worlds.replay import MAX_REPLAYED_STEPS, Episode, Start, are_inside, leaf_spaces, stored_dtype


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
    parts_of_action = leaf_spaces(action_space)
    expect(bool(parts_of_action), f"actions of {action_space} cannot be saved")
    names = {f"actions/{n}" for n in range(len(parts_of_action))}
    expect(tensors.keys() == names, f"it has {sorted(tensors)}, expected {sorted(names)}")
    parts = []
    for n, space in enumerate(parts_of_action):
        tensor = tensors[f"actions/{n}"]
        wanted = torch.from_numpy(np.empty(0, stored_dtype(space))).dtype
        shape = (sum(lengths), *(space.shape or ()))
        expect(
            tensor.dtype == wanted and tuple(tensor.shape) == shape,
            f"its actions are {tensor.dtype} {list(tensor.shape)}, expected {wanted} {list(shape)}",
        )
        array = tensor.numpy()
        expect(are_inside(space, array), f"an action is outside {space}")
        parts.append(np.split(array, np.cumsum(lengths)[:-1]))
    actions = [list(of_env) for of_env in zip(*parts)]
    return [Episode(start, acted, one["fingerprint"]) for start, acted, one in zip(starts, actions, said)]


def _is_whole(value: Any, end: int) -> bool:
    return type(value) is int and 0 <= value < end


def _is_generator_state(given: Any) -> bool:
    ends = (2**128, 2**128, 2, 2**32)
    is_four = isinstance(given, list | tuple) and len(given) == 4
    return is_four and all(map(_is_whole, given, ends)) and given[1] % 2 == 1


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
