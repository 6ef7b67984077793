"""Observation and action spaces: their leaves and heads, checked and converted between worlds and tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector.utils import concatenate, create_empty_array
from torch import Tensor

from dualhead.types import DataError, Observations, on_device

ACTION_MASK = "action_mask"
WHOLE = "observation"
MAX_NUMBERS = 100_000_000
"""Of one observation that a file describes: what a file claims must not fill the memory."""
_OBSERVATIONS = "Box, Discrete, MultiDiscrete, MultiBinary, and Dict or Tuple of them"
_ACTIONS = "Discrete, MultiDiscrete (one axis), a Dict of those, or a one-axis Box"


class Leaf(NamedTuple):
    """One array of an observation: its name (`part/subpart`), space, and whether it is an action mask."""

    name: str
    space: gym.Space
    is_mask: bool


class ObservationSpec:
    """Checks batched observations (arrays, numbers, dicts, tuples) and turns them into named tensors.

    A Dict part called `action_mask` (one array, or a Dict of one array per head) is kept apart for the heads.

    Raises:
        TypeError: the space, or a part of it, is of an unsupported kind.
    """

    def __init__(self, space: gym.Space) -> None:
        self.space = space
        self.leaves = tuple(_leaves(space, ""))
        if all(leaf.is_mask for leaf in self.leaves):
            raise TypeError(f"observation space {space} has no part that a policy could look at")

    @property
    def masks(self) -> tuple[Leaf, ...]:
        return tuple(leaf for leaf in self.leaves if leaf.is_mask)

    @property
    def inputs(self) -> tuple[Leaf, ...]:
        return tuple(leaf for leaf in self.leaves if not leaf.is_mask)

    def to_tensors(
        self,
        observations: Any,
        batch: int,
        *,
        streams: Tensor | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype,
    ) -> Observations:
        """Batched observations as tensors on `device`: floats as `dtype`, integers and bools in their own dtype.

        A single stream may come without its batch axis. Nothing is copied that need not be: tensors may share memory
        with what was given. Where `streams` are chosen, only their rows are looked at and returned. Without a `device`
        everything stays where it came from.

        Raises:
            DataError: a part is missing, has another shape than [batch, *space.shape], is not finite, or is out of
                a Discrete range.
        """
        tensors = {}
        for leaf in self.leaves:
            tensor = as_tensor(_pick(observations, leaf.name), f"observation {leaf.name!r}")
            expected = (batch, *(leaf.space.shape or ()))
            if batch == 1 and tuple(tensor.shape) == expected[1:]:
                tensor = tensor[None]
            if tuple(tensor.shape) != expected:
                raise DataError(
                    f"observation {leaf.name!r}: expected shape {expected} ({batch} streams of {leaf.space}), "
                    f"got {tuple(tensor.shape)}"
                )
            if streams is not None:
                tensor = tensor[on_device(streams, tensor.device)]
            if tensor.is_floating_point() and np.issubdtype(leaf.space.dtype, np.floating):
                tensor = tensor.to(dtype)  # before the check: a large float64 number overflows float32
            # Checking a tensor on an accelerator would sync at every step; learn() checks those once per rollout.
            if tensor.device.type == "cpu":
                check_leaf(leaf, tensor, streams)
            tensors[leaf.name] = tensor if device is None else on_device(tensor, device)
        return tensors

    def stack(self, given: np.ndarray, streams: Tensor) -> Any:
        """One batch of single observations, [B] objects of which only those of `streams` are looked at.

        Raises:
            DataError: one of them is None.
        """
        missing = [stream for stream in streams.tolist() if given[stream] is None]
        if missing:
            raise DataError(f"final observations of streams {missing[:8]} are None, and their episodes were truncated")
        some = given[int(streams[0])]
        rows = [some if row is None else row for row in given]
        batch: Any = create_empty_array(self.space, n=len(rows))
        return concatenate(self.space, rows, batch)


def holds_tensors(observations: Any) -> bool:
    """Whether nested observations are tensors, judged by the first."""
    while isinstance(observations, dict | tuple) and len(observations):
        observations = next(iter(observations.values() if isinstance(observations, dict) else observations))
    return isinstance(observations, Tensor)


def check_leaf(leaf: Leaf, tensor: Tensor, streams: Tensor | None = None) -> None:
    """Refuses numbers [B, ...] that are not finite, outside a Discrete space, or that storing them would change.

    Args:
        streams: [B] which streams the rows belong to; None: 0 .. B - 1.

    Raises:
        DataError: names the leaf, the stream and the number.
    """
    own = torch_dtype(leaf.space.dtype)
    expected: Any = leaf.space
    if own.is_floating_point or tensor.is_floating_point():
        if tensor.is_floating_point() and not all_finite(tensor):
            bad, expected = ~torch.isfinite(tensor), "finite numbers"
        elif own.is_floating_point:
            return
        elif not leaf.is_mask:
            raise DataError(f"observation {leaf.name!r}: expected {leaf.space.dtype}, got {tensor.dtype}")
        else:
            bad = tensor.to(own).to(tensor.dtype) != tensor
    elif isinstance(leaf.space, spaces.Discrete | spaces.MultiDiscrete):
        size = leaf.space.n if isinstance(leaf.space, spaces.Discrete) else leaf.space.nvec
        low = torch.as_tensor(leaf.space.start, device=tensor.device)
        bad = (tensor < low) | (tensor >= low + torch.as_tensor(size, device=tensor.device))
    elif tensor.dtype == own:
        return
    else:
        bad = tensor.to(own).to(torch.float64) != tensor.to(torch.float64)
    if leaf.is_mask and not bad.any():
        bad, expected = (tensor != 0) & (tensor != 1), "0 or 1"
    if bad.any():
        where = bad.nonzero()[0].tolist()
        stream = where[0] if streams is None else int(streams[where[0]])
        given = tensor[tuple(where)].item()
        raise DataError(f"observation {leaf.name!r} of stream {stream} is {given}: expected {expected}")


def torch_dtype(dtype: Any) -> torch.dtype:
    """The torch dtype of a NumPy dtype."""
    return torch.from_numpy(np.empty(0, dtype=dtype)).dtype


def as_tensor(values: Any, name: str) -> Tensor:
    """`values` as a tensor. It shares memory with a writeable array, and copies others."""
    if isinstance(values, Tensor):
        return values
    try:
        array = np.asarray(values)
    except ValueError as error:  # rows of several lengths
        raise DataError(f"{name}: expected an array of numbers: {error}") from None
    if array.dtype.kind not in "biuf":
        what = "objects" if array.dtype == object else str(array.dtype)
        raise DataError(f"{name}: expected real numbers, got an array of {what}")
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def all_finite(tensor: Tensor) -> bool:
    """Whether all numbers are finite. One sum answers that unless the sum overflows."""
    return math.isfinite(tensor.sum().item()) or bool(torch.isfinite(tensor).all())


def non_finite_message(what: str, tensor: Tensor) -> str:
    """Says which stream has the first non-finite value of a [B, ...] tensor."""
    bad = (~torch.isfinite(tensor)).nonzero()[0].tolist()
    return f"{what} of stream {bad[0]} is {tensor[tuple(bad)].item()}: expected finite numbers"


def _leaves(space: gym.Space, name: str) -> list[Leaf]:
    is_mask = ACTION_MASK in name.split("/")
    if isinstance(space, spaces.Dict):
        return [leaf for key, part in space.items() for leaf in _leaves(part, f"{name}/{key}".lstrip("/"))]
    if isinstance(space, spaces.Tuple):
        return [leaf for i, part in enumerate(space) for leaf in _leaves(part, f"{name}/{i}".lstrip("/"))]
    if isinstance(space, spaces.Box | spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary):
        return [Leaf(name or WHOLE, space, is_mask)]
    where = f" (part {name!r})" if name else ""
    raise TypeError(f"unsupported observation space {space}{where}: expected {_OBSERVATIONS}")


def _pick(observations: Any, name: str) -> Any:
    """The part of a nested observation that a leaf's name leads to."""
    if name == WHOLE and not isinstance(observations, Mapping):
        return observations
    if isinstance(observations, Mapping) and name in observations:
        return observations[name]
    for key in name.split("/"):
        if isinstance(observations, Mapping) and key in observations:
            observations = observations[key]
        elif isinstance(observations, tuple) and key.isdigit() and int(key) < len(observations):
            observations = observations[int(key)]
        else:
            raise DataError(f"observation part {name!r} is missing: got {_outline(observations)}")
    return observations


def _outline(observations: Any) -> str:
    if isinstance(observations, Mapping):
        return f"a dict with keys {sorted(map(str, observations))}"
    if isinstance(observations, tuple):
        return f"a tuple of {len(observations)}"
    return f"a {type(observations).__name__}"


class ActionSpec:
    """Which heads an action space has, and how [B, K] head indices become what the environment takes.

    Attributes:
        names: one per head; K of them.
        nvec: choices per head, or empty for a Box.
        num_columns: width of the actions tensor: K, or D for a Box of D numbers.
        starts: [K] lowest index of each head, in the environment's counting.
        bounded, centre, half: [D] of a Box: which numbers have two bounds, and where the policy's [-1, 1] lies.

    Raises:
        TypeError: an unsupported action space.
    """

    def __init__(self, space: gym.Space) -> None:
        self.space = space
        self.is_continuous = isinstance(space, spaces.Box)
        self.names: tuple[str, ...]
        self.nvec: tuple[int, ...] = ()
        if isinstance(space, spaces.Box):
            if len(space.shape) != 1 or not np.issubdtype(space.dtype, np.floating):
                raise TypeError(f"unsupported action space {space}: expected {_ACTIONS} of floats")
            self.names = ("action",)
            self.num_columns = space.shape[0]
            bounded = np.isfinite(space.low) & np.isfinite(space.high)
            low, high = np.where(bounded, space.low, -1.0), np.where(bounded, space.high, 1.0)
            # Halved first: the difference of float32's greatest numbers would overflow.
            self.bounded, self.centre, self.half = bounded, low / 2 + high / 2, high / 2 - low / 2
            self._box = torch.from_numpy(np.stack([bounded, self.centre, self.half, space.low, space.high]))
            return
        heads = _heads(space, "action", nested=False)
        self.names = tuple(name for name, _, _ in heads)
        self.nvec = tuple(n for _, n, _ in heads)
        self.starts = np.array([start for _, _, start in heads], dtype=np.int64)
        self._has_starts = bool(self.starts.any())
        self.num_columns = len(heads)

    def to_env(self, actions: Tensor, *, numpy: bool) -> Any:
        """Actions [B, K] (or [B, D] in the policy's units) in the form of the batched action space.

        A Gaussian acts in units in which a bounded Box spans [-1, 1]: its actions are clipped there and scaled.

        Args:
            numpy: return NumPy arrays instead of tensors on the device of `actions`.
        """
        if numpy:
            actions = actions.cpu()
        if self.is_continuous:
            self._box = self._box.to(actions.device)
            bounded, centre, half, low, high = self._box
            scaled = torch.where(bounded != 0, actions.clamp(-1.0, 1.0), actions) * half + centre
            scaled = scaled.to(self._box.dtype).clamp(low, high)
            return scaled.numpy() if numpy else scaled
        if self._has_starts:
            actions = actions + torch.from_numpy(self.starts).to(actions.device)
        return _split(self.space, actions.numpy() if numpy else actions)[0]

    def check_masks(self, masks: tuple[Leaf, ...]) -> None:
        """Checks that the `action_mask` parts of an observation space fit the heads.

        Raises:
            ValueError: expected one array of sum(nvec) entries, or one of n_k entries for each head by name.
        """
        if not masks:
            return
        if self.is_continuous:
            raise ValueError(f"an {ACTION_MASK!r} needs discrete heads, the action space is {self.space}")
        sizes = {leaf.name.rpartition("/")[2]: int(np.prod(leaf.space.shape or ())) for leaf in masks}
        whole = len(masks) == 1 and sizes == {ACTION_MASK: sum(self.nvec)}
        per_head = all(name in self.names and n == self.nvec[self.names.index(name)] for name, n in sizes.items())
        if not (whole or per_head):
            heads = dict(zip(self.names, self.nvec))
            raise ValueError(
                f"{ACTION_MASK!r} does not fit the heads {heads}: expected one array of {sum(self.nvec)} entries or "
                f"a Dict with one array per head, got sizes {sizes}"
            )


def _heads(space: gym.Space, name: str, *, nested: bool) -> list[tuple[str, int, int]]:
    """Name, number of choices and lowest index of each head."""
    if isinstance(space, spaces.Discrete):
        return [(name, int(space.n), int(space.start))]
    if isinstance(space, spaces.MultiDiscrete) and len(space.shape) == 1:
        prefix = name if nested else "head"
        return [(f"{prefix}_{i}", int(n), int(s)) for i, (n, s) in enumerate(zip(space.nvec, space.start))]
    if isinstance(space, spaces.Dict) and not nested:
        return [head for key, part in space.items() for head in _heads(part, key, nested=True)]
    raise TypeError(f"unsupported action space {space}: expected {_ACTIONS}")


def _split(space: gym.Space, actions: Any) -> tuple[Any, Any]:
    """The first columns in the form of `space`, and the columns left over."""
    if isinstance(space, spaces.Discrete):
        return actions[:, 0], actions[:, 1:]
    if isinstance(space, spaces.MultiDiscrete):
        return actions[:, : len(space.nvec)], actions[:, len(space.nvec) :]
    assert isinstance(space, spaces.Dict)
    parts = {}
    for key, part in space.items():
        parts[key], actions = _split(part, actions)
    return parts, actions


def space_to_json(space: gym.Space) -> dict[str, Any]:
    """What `space_from_json` makes the space of again. Spaces that no agent can have are refused elsewhere."""
    if isinstance(space, spaces.Dict):
        return {"kind": "Dict", "parts": [[name, space_to_json(part)] for name, part in space.items()]}
    if isinstance(space, spaces.Tuple):
        return {"kind": "Tuple", "parts": [space_to_json(part) for part in space]}
    if isinstance(space, spaces.Discrete):
        return {"kind": "Discrete", "n": int(space.n), "start": int(space.start)}
    if isinstance(space, spaces.MultiDiscrete):
        return {"kind": "MultiDiscrete", "nvec": space.nvec.tolist(), "start": space.start.tolist()}
    if isinstance(space, spaces.MultiBinary):
        return {"kind": "MultiBinary", "n": space.n if isinstance(space.n, int) else [int(n) for n in space.n]}
    assert isinstance(space, spaces.Box)
    bounds = {}
    for name, bound in (("low", space.low), ("high", space.high)):
        numbers = [number if math.isfinite(number) else str(number) for number in bound.ravel().tolist()]
        bounds[name] = numbers[0] if len(set(numbers)) == 1 else numbers
    return {"kind": "Box", "shape": list(space.shape), "dtype": str(space.dtype)} | bounds


def space_from_json(saved: Any) -> gym.Space:
    """The space that `space_to_json` described.

    Raises:
        ValueError: it is no such description.
    """
    try:
        match saved["kind"]:
            case "Dict":
                # Pairs keep their order; a mapping would be sorted.
                return spaces.Dict([(str(name), space_from_json(part)) for name, part in saved["parts"]])
            case "Tuple":
                return spaces.Tuple([space_from_json(part) for part in saved["parts"]])
            case "Discrete":
                return spaces.Discrete(_number(saved["n"]), start=_number(saved["start"]))
            case "MultiDiscrete":
                return spaces.MultiDiscrete(np.array(saved["nvec"], np.int64), start=np.array(saved["start"], np.int64))
            case "MultiBinary":
                n = saved["n"]
                return spaces.MultiBinary(list(_shape(n)) if isinstance(n, list) else _number(n))
            case "Box":
                shape, dtype = _shape(saved["shape"]), np.dtype(str(saved["dtype"]))
                if dtype.kind not in "biuf":
                    raise ValueError(f"a Box of {dtype}")
                low, high = (_bound(saved[name], shape, dtype) for name in ("low", "high"))
                return spaces.Box(low, high, shape, dtype)
            case kind:
                raise ValueError(f"its kind is {kind!r}")
    except (KeyError, TypeError, AttributeError, AssertionError, OverflowError, ValueError) as error:
        raise ValueError(f"expected the description of a space, got {str(saved)[:80]}: {error}") from error


def _bound(saved: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
    """A bound of a Box: one number for all, or all of them."""
    numbers = np.array(saved, np.float64 if dtype.kind == "f" else dtype)
    return np.broadcast_to(numbers if numbers.ndim == 0 else numbers.reshape(shape), shape).astype(dtype)


def _number(value: Any) -> int:
    if type(value) is not int:
        raise ValueError(f"expected a whole number, got {value!r}")
    return value


def _shape(value: Any) -> tuple[int, ...]:
    shape = tuple(_number(size) for size in value)
    if math.prod(shape) > MAX_NUMBERS or min(shape, default=0) < 0:
        raise ValueError(f"expected a shape of at most {MAX_NUMBERS:,} numbers, got {list(shape)}")
    return shape
