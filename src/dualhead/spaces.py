"""Observation and action spaces: their leaves and heads, checked and converted between worlds and tensors."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector.utils import concatenate, create_empty_array
from torch import Tensor

from dualhead.errors import DataError
from dualhead.types import Observations, on_device

ACTION_MASK = "action_mask"
WHOLE = "observation"
_MAX_DEPTH = 20
_MAX_NUMBERS = 10_000_000
"""Of one observation. A file may claim any shape, and must not fill the memory by it."""
_OBSERVATIONS = "Box, Discrete, MultiDiscrete, MultiBinary, and Dict or Tuple of them"
_ACTIONS = "Discrete, MultiDiscrete (one axis), a Dict of those, or a one-axis Box"


class Leaf(NamedTuple):
    """One array of an observation: name (`part/subpart`), space, whether it is an action mask, and its keys."""

    name: str
    space: gym.Space
    is_mask: bool
    path: tuple[str | int, ...]


class ObservationSpec:
    """Checks batched observations (arrays, numbers, dicts, tuples) and turns them into named tensors.

    A Dict part called `action_mask` (one array, or a Dict of one array per head) is kept apart for the heads.

    Raises:
        TypeError: the space, or a part of it, is of an unsupported kind.
        ValueError: two parts have the same name.
    """

    def __init__(self, space: gym.Space) -> None:
        self.space = space
        self.leaves = tuple(_leaves(space, ()))
        _expect_unique((leaf.name for leaf in self.leaves), f"observation space {space} has two parts")
        self.masks = tuple(leaf for leaf in self.leaves if leaf.is_mask)
        self.inputs = tuple(leaf for leaf in self.leaves if not leaf.is_mask)
        if not self.inputs:
            raise TypeError(f"observation space {space} has no part that a policy could look at")

    def to_tensors(
        self,
        observations: Any,
        batch: int,
        *,
        streams: Tensor | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype,
    ) -> Observations:
        """Batched observations as tensors: floats as `dtype`, integers and bools in their own dtype.

        Tensors may share memory with what was given.

        Args:
            observations: [batch, ...], nested as the space is; a single stream may come without its batch axis.
            streams: check and return only these rows.
            device: where the tensors go; None: where they come from.

        Raises:
            DataError: a part is missing, has another shape than [batch, *space.shape], is not finite, or is out of
                a Discrete range.
        """
        tensors = {}
        for leaf in self.leaves:
            tensor = as_tensor(_pick(observations, leaf), f"observation {leaf.name!r}")
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
            own = torch_dtype(leaf.space.dtype)
            tensor = tensor.to(dtype if own.is_floating_point else own)
            tensors[leaf.name] = tensor if device is None else on_device(tensor, device)
        return tensors

    def stack(self, given: np.ndarray, streams: Tensor) -> Any:
        """One batch of single observations, [B] objects of which only those of `streams` are read.

        Raises:
            DataError: one of them is None.
        """
        missing = [stream for stream in streams.tolist() if given[stream] is None]
        if missing:
            raise DataError(f"final observations of streams {missing[:8]} are None, and their episodes were truncated")
        rows = [given[int(streams[0])] if row is None else row for row in given]
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
    own, what = torch_dtype(leaf.space.dtype), f"observation {leaf.name!r}"
    if tensor.is_floating_point():
        check_finite(tensor, what, streams)
    if own.is_floating_point:
        return
    expected: Any = leaf.space
    if leaf.is_mask and tensor.dtype != own:
        bad, expected = (tensor != 0) & (tensor != 1), "0 or 1"
    elif tensor.is_floating_point():
        raise DataError(f"{what}: expected {leaf.space.dtype}, got {tensor.dtype}")
    elif isinstance(leaf.space, spaces.Discrete | spaces.MultiDiscrete):
        size = leaf.space.n if isinstance(leaf.space, spaces.Discrete) else leaf.space.nvec
        low = torch.as_tensor(leaf.space.start, device=tensor.device)
        bad = (tensor < low) | (tensor >= low + torch.as_tensor(size, device=tensor.device))
    elif tensor.dtype == own:
        return
    else:
        bad = tensor.to(own).to(torch.float64) != tensor.to(torch.float64)
    if bad.any():
        raise DataError(_of_stream(what, tensor, bad, streams, expected))


def check_finite(tensor: Tensor, what: str, streams: Tensor | None = None) -> None:
    """Raises DataError for the first non-finite number of a [B, ...] tensor; see `check_leaf`."""
    if not all_finite(tensor):
        raise DataError(_of_stream(what, tensor, ~torch.isfinite(tensor), streams, "finite numbers"))


def _of_stream(what: str, tensor: Tensor, bad: Tensor, streams: Tensor | None, expected: Any) -> str:
    where = bad.nonzero()[0].tolist()
    stream = where[0] if streams is None else int(streams[where[0]])
    return f"{what} of stream {stream} is {tensor[tuple(where)].item()}: expected {expected}"


def all_finite(tensor: Tensor) -> bool:
    """Whether all numbers are finite. One sum answers that unless the sum overflows."""
    return math.isfinite(tensor.sum().item()) or bool(torch.isfinite(tensor).all())


@functools.cache  # called at every step
def torch_dtype(dtype: Any) -> torch.dtype:
    """The torch dtype of a NumPy dtype."""
    return torch.from_numpy(np.empty(0, dtype=dtype)).dtype


def as_tensor(values: Any, name: str) -> Tensor:
    """`values` as a tensor. It shares memory with a writeable array, and copies others.

    Raises:
        DataError: they are no array of real numbers.
    """
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


def _leaves(space: gym.Space, path: tuple[str | int, ...]) -> list[Leaf]:
    if isinstance(space, spaces.Dict | spaces.Tuple):
        parts: Iterable[Any] = space.items() if isinstance(space, spaces.Dict) else enumerate(space)
        return [leaf for key, part in parts for leaf in _leaves(part, (*path, key))]
    name = "/".join(map(str, path)) or WHOLE
    if not isinstance(space, spaces.Box | spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary):
        raise TypeError(f"unsupported observation space {space} (part {name!r}): expected {_OBSERVATIONS}")
    return [Leaf(name, space, ACTION_MASK in path, path)]


def _expect_unique(names: Iterable[str], what: str) -> None:
    for name, count in Counter(names).most_common(1):
        if count > 1:
            raise ValueError(f"{what} named {name!r}: rename one")


def _pick(observations: Any, leaf: Leaf) -> Any:
    """The leaf's part of a nested observation, or of a flat one with leaves by name."""
    if isinstance(observations, Mapping) and leaf.name in observations:
        return observations[leaf.name]
    for key in leaf.path:
        parts = dict(enumerate(observations)) if isinstance(observations, tuple) else observations
        if not isinstance(parts, Mapping) or key not in parts:
            got = f"dict with keys {sorted(map(str, parts))}" if isinstance(parts, Mapping) else type(parts).__name__
            got = f"tuple of {len(parts)}" if isinstance(observations, tuple) else got
            raise DataError(f"observation part {leaf.name!r} is missing: got a {got}")
        observations = parts[key]
    return observations


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
        ValueError: two heads have the same name.
    """

    def __init__(self, space: gym.Space) -> None:
        self.space = space
        self.is_continuous = isinstance(space, spaces.Box)
        self.names: tuple[str, ...] = ("action",)
        self.nvec: tuple[int, ...] = ()
        if isinstance(space, spaces.Box):
            if len(space.shape) != 1 or not np.issubdtype(space.dtype, np.floating):
                raise TypeError(f"unsupported action space {space}: expected {_ACTIONS} of floats")
            self.num_columns = space.shape[0]
            self.bounded = np.isfinite(space.low) & np.isfinite(space.high)
            low, high = np.where(self.bounded, space.low, -1.0), np.where(self.bounded, space.high, 1.0)
            # Halved first: the difference of float32's greatest numbers would overflow.
            self.centre, self.half = low / 2 + high / 2, high / 2 - low / 2
            self._box = torch.from_numpy(np.stack([self.bounded, self.centre, self.half, space.low, space.high]))
            return
        self._parts: dict[Any, Any] = dict(space) if isinstance(space, spaces.Dict) else {None: space}
        heads = [head for key, part in self._parts.items() for head in self._heads(key, part)]
        self.names, self.nvec, starts = zip(*heads, strict=True)
        _expect_unique(self.names, f"action space {space} has two heads")
        self.starts = np.array(starts, dtype=np.int64)
        self.num_columns = len(heads)

    def _heads(self, key: str | None, part: gym.Space) -> list[tuple[str, int, int]]:
        """Name, number of choices and lowest index of each head."""
        if isinstance(part, spaces.Discrete):
            return [(key or "action", int(part.n), int(part.start))]
        if isinstance(part, spaces.MultiDiscrete) and len(part.shape) == 1:
            choices = zip(part.nvec.tolist(), part.start.tolist())
            return [(f"{key or 'head'}_{i}", n, start) for i, (n, start) in enumerate(choices)]
        raise TypeError(f"unsupported action space {self.space}: expected {_ACTIONS}")

    def to_env(self, actions: Tensor, *, numpy: bool) -> Any:
        """Actions [B, K] (or [B, D] in the policy's units) in the form of the batched action space.

        The policy's units span [-1, 1] over a bounded Box: actions are clipped there and scaled.

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
        if self.starts.any():
            actions = actions + torch.from_numpy(self.starts).to(actions.device)
        parts, first = {}, 0
        for key, part in self._parts.items():
            own = actions[:, first : first + math.prod(part.shape)].to(torch_dtype(part.dtype))
            first += own.shape[1]
            own = own.view(-1, *part.shape)
            parts[key] = own.numpy() if numpy else own
        return parts if isinstance(self.space, spaces.Dict) else parts[None]

    def check_masks(self, masks: tuple[Leaf, ...]) -> None:
        """Checks that the `action_mask` parts of an observation space fit the heads.

        Raises:
            ValueError: expected one array of sum(nvec) entries, or one of n_k entries for each head by name.
        """
        if not masks:
            return
        if self.is_continuous:
            raise ValueError(f"an {ACTION_MASK!r} needs discrete heads, the action space is {self.space}")
        sizes = {leaf.name.rpartition("/")[2]: math.prod(leaf.space.shape or ()) for leaf in masks}
        heads = dict(zip(self.names, self.nvec))
        whole = len(masks) == 1 and sizes == {ACTION_MASK: sum(self.nvec)}
        if not (whole or sizes.items() <= heads.items()):
            raise ValueError(
                f"{ACTION_MASK!r} does not fit the heads {heads}: expected one array of {sum(self.nvec)} entries or "
                f"a Dict with one array per head, got sizes {sizes}"
            )


def space_to_json(space: gym.Space) -> dict[str, Any]:
    """What `space_from_json` makes the space of again. Spaces that no agent can have are refused elsewhere."""
    if isinstance(space, spaces.Dict):
        return {"kind": "Dict", "parts": [[name, space_to_json(part)] for name, part in space.items()]}
    if isinstance(space, spaces.Tuple):
        return {"kind": "Tuple", "parts": [space_to_json(part) for part in space]}
    if isinstance(space, spaces.MultiBinary):
        return {"kind": "MultiBinary", "n": space.n if isinstance(space.n, int) else [int(n) for n in space.n]}
    if isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
        size = {"n": int(space.n)} if isinstance(space, spaces.Discrete) else {"nvec": space.nvec.tolist()}
        dtype = {} if space.dtype == np.int64 else {"dtype": str(space.dtype)}
        return {"kind": type(space).__name__, **size, "start": np.asarray(space.start).tolist(), **dtype}
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
    space = _space(saved, depth=0)
    if space_to_json(space) != saved:
        raise ValueError(
            f"expected the description of a space, got {saved!s:.80}: that of {space!s:.80} has other entries"
        )
    return space


def _space(saved: Any, *, depth: int) -> gym.Space:
    try:
        if depth > _MAX_DEPTH:
            raise ValueError(f"it has more than {_MAX_DEPTH} spaces inside each other")
        dtype: Any = np.dtype(str(saved.get("dtype", "int64")))
        if dtype.kind not in "biuf":
            raise ValueError(f"its dtype is {dtype}")
        match saved["kind"]:
            case "Dict":
                # Pairs keep their order; a mapping would be sorted.
                return spaces.Dict([(str(name), _space(part, depth=depth + 1)) for name, part in saved["parts"]])
            case "Tuple":
                return spaces.Tuple([_space(part, depth=depth + 1) for part in saved["parts"]])
            case "Discrete":
                return spaces.Discrete(saved["n"], start=saved["start"], dtype=dtype)
            case "MultiDiscrete":
                return spaces.MultiDiscrete(saved["nvec"], dtype, start=saved["start"])
            case "MultiBinary":
                n = saved["n"]
                return spaces.MultiBinary(_shape(n) if isinstance(n, list) else n)
            case "Box":
                shape = _shape(saved["shape"])
                low, high = (_bound(saved[name], shape, dtype) for name in ("low", "high"))
                return spaces.Box(low, high, shape, dtype)
            case kind:
                raise ValueError(f"its kind is {kind!r}")
    except (KeyError, TypeError, AttributeError, AssertionError, OverflowError, ValueError) as error:
        raise ValueError(f"expected the description of a space, got {saved!s:.80}: {error!s:.200}") from error


def _bound(saved: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
    """A bound of a Box: one number for all, or all of them."""
    numbers = np.array(saved, np.float64 if dtype.kind == "f" else dtype)
    return np.broadcast_to(numbers if numbers.ndim == 0 else numbers.reshape(shape), shape).astype(dtype)


def _shape(shape: list[int]) -> tuple[int, ...]:
    if math.prod(shape) > _MAX_NUMBERS or min(shape, default=0) < 0:
        raise ValueError(f"expected a shape of at most {_MAX_NUMBERS:,} numbers, got {shape}")
    return tuple(shape)
