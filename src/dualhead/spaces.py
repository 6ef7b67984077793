"""Observation and action spaces: their leaves and heads, checked and converted between worlds and tensors."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
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
_MAX_HEADS = 10_000
"""Of a policy: each is a layer, and a file may claim any MultiBinary."""
_SPACES = "Box, Discrete, MultiDiscrete, MultiBinary, and Dict or Tuple of them"


class Leaf(NamedTuple):
    """One array of an observation or action: name (`part/subpart`), space, whether it is an action mask, its keys."""

    name: str
    space: gym.Space
    is_mask: bool
    path: tuple[str | int, ...]

    @property
    def head(self) -> str:
        """Of a mask: the head that it is for, or `action_mask` where it is for all of them."""
        return "/".join(map(str, self.path[self.path.index(ACTION_MASK) + 1 :])) or ACTION_MASK


class ObservationSpec:
    """Checks batched observations (arrays, numbers, dicts, tuples) and turns them into named tensors.

    A Dict part called `action_mask` (one array, or a Dict of one array per head) is kept apart for the heads.

    Raises:
        TypeError: the space, or a part of it, is of an unsupported kind.
        ValueError: two parts have the same name.
    """

    def __init__(self, space: gym.Space) -> None:
        self.space = space
        self.leaves = tuple(_leaves(space, WHOLE))
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


def _leaves(space: gym.Space, whole: str, path: tuple[str | int, ...] = ()) -> list[Leaf]:
    """The leaves of an observation or action space; `whole` says of which, and names a plain space."""
    if isinstance(space, spaces.Dict | spaces.Tuple):
        parts: Iterable[Any] = space.items() if isinstance(space, spaces.Dict) else enumerate(space)
        return [leaf for key, part in parts for leaf in _leaves(part, whole, (*path, key))]
    name = "/".join(map(str, path)) or whole
    if not isinstance(space, spaces.Box | spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary):
        raise TypeError(f"unsupported {whole} space {space} (part {name!r}): expected {_SPACES}")
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
    """Which heads an action space has, and how rows of [B, C] columns become what the environment takes.

    Every number of a Discrete, MultiDiscrete or MultiBinary part has a categorical head, every Box has one head. The
    categorical heads come first, each part in the order of the space: in names, log-probs and columns alike.

    Attributes:
        discrete, boxes: the leaves of the action space that have categorical heads, and the Boxes.
        names: one per head, such as `move`, `part/subpart` or, of one number among several, `vote_0`; K of them.
        nvec: choices of each categorical head.
        starts: [len(nvec)] lowest index of each, in the environment's counting.
        box_sizes: how many numbers each Box has; D altogether.
        num_columns: C = len(nvec) + D, the width of the actions tensor.
        bounded, centre, half: [D] which numbers have two bounds, and where the policy's [-1, 1] lies.

    Raises:
        TypeError: an unsupported action space.
        ValueError: two heads have the same name, or there are too many.
    """

    def __init__(self, space: gym.Space) -> None:
        self.space = space
        leaves = _leaves(space, "action")
        self.discrete = [leaf for leaf in leaves if not isinstance(leaf.space, spaces.Box)]
        self.boxes = [leaf for leaf in leaves if isinstance(leaf.space, spaces.Box)]
        for leaf in self.boxes:
            if not np.issubdtype(leaf.space.dtype, np.floating):
                raise TypeError(
                    f"unsupported action space {space} (part {leaf.name!r}): expected a Box of floats; "
                    f"whole numbers are a Discrete or MultiDiscrete space"
                )
        widths = [math.prod(leaf.space.shape or ()) for leaf in self.discrete]
        self.box_sizes = tuple(math.prod(leaf.space.shape or ()) for leaf in self.boxes)
        self.num_columns = sum(widths) + sum(self.box_sizes)
        if sum(widths) + len(self.boxes) > _MAX_HEADS:
            raise ValueError(f"action space {space} has more than {_MAX_HEADS:,} heads")
        if not leaves or 0 in (*widths, *self.box_sizes):
            raise TypeError(f"unsupported action space {space}: a part of it has no number to choose")
        heads = [head for leaf in self.discrete for head in _heads(leaf)]
        self.names = (*(name for name, _, _ in heads), *(leaf.name for leaf in self.boxes))
        _expect_unique(self.names, f"action space {space} has two heads")
        self.nvec = tuple(n for _, n, _ in heads)
        self.starts = np.array([start for _, _, start in heads], dtype=np.int64)
        boxes: list[Any] = [leaf.space for leaf in self.boxes]
        bounds = [(box.low.ravel(), box.high.ravel()) for box in boxes] or [(np.zeros(0), np.zeros(0))]
        low, high = (np.concatenate(side) for side in zip(*bounds))
        self.bounded = np.isfinite(low) & np.isfinite(high)
        bottom, top = np.where(self.bounded, low, -1.0), np.where(self.bounded, high, 1.0)
        # Halved first: the difference of float32's greatest numbers would overflow.
        self.centre, self.half = bottom / 2 + top / 2, top / 2 - bottom / 2
        self._choices, self._numbers = _own_columns(self.discrete), _own_columns(self.boxes)
        limit = np.where(self.bounded, 1.0, np.inf).astype(low.dtype)
        self._box = torch.from_numpy(np.stack([-limit, limit, self.half, self.centre, low, high]))

    def dtype(self, of_policy: torch.dtype) -> torch.dtype:
        """Dtype of the actions tensor: int64, or the policy's where there is a Box.

        Indices stand beside numbers then. They stay exact: float32 has every integer up to 2^24.
        """
        return of_policy if self.boxes else torch.int64

    def indices(self, actions: Tensor) -> Tensor:
        """The categorical heads' columns [B, len(nvec)] of actions [B, C], as int64."""
        return actions[:, : len(self.nvec)].long()

    def to_env(self, actions: Tensor, *, numpy: bool) -> Any:
        """Actions [B, C] in the form of the batched action space.

        The policy's units span [-1, 1] over a bounded Box: actions are clipped there and scaled.

        Args:
            numpy: return NumPy arrays instead of tensors on the device of `actions`.
        """
        if numpy:
            actions = actions.cpu()
        parts: dict[tuple[str | int, ...], Any] = {}
        if self.discrete:
            chosen = self.indices(actions) if self.boxes else actions.long()
            if self.starts.any():
                chosen = chosen + torch.from_numpy(self.starts).to(chosen.device)
            parts = {path: chosen[:, own].to(dtype).view(-1, *shape) for path, own, dtype, shape in self._choices}
        if self.boxes:
            self._box = self._box.to(actions.device)
            least, most, half, centre, low, high = self._box
            numbers = actions[:, len(self.nvec) :].clamp(least, most) * half + centre
            numbers = numbers.to(self._box.dtype).clamp(low, high)
            parts |= {path: numbers[:, own].to(dtype).view(-1, *shape) for path, own, dtype, shape in self._numbers}
        if numpy:
            parts = {path: own.numpy() for path, own in parts.items()}
        return _nested(self.space, parts)

    def check_masks(self, masks: tuple[Leaf, ...]) -> None:
        """Checks that the `action_mask` parts of an observation space fit the heads.

        Raises:
            ValueError: expected one array of sum(nvec) entries, or one of n_k entries for each head by name.
        """
        if not masks:
            return
        if not self.nvec:
            raise ValueError(f"an {ACTION_MASK!r} needs discrete heads, the action space is {self.space}")
        sizes = {leaf.head: math.prod(leaf.space.shape or ()) for leaf in masks}
        heads = dict(zip(self.names, self.nvec))
        whole = len(masks) == 1 and sizes == {ACTION_MASK: sum(self.nvec)}
        if not (whole or sizes.items() <= heads.items()):
            raise ValueError(
                f"{ACTION_MASK!r} does not fit the heads {heads}: expected one array of {sum(self.nvec)} entries or "
                f"a Dict with one array per head, got sizes {sizes}"
            )


def _heads(leaf: Leaf) -> Iterator[tuple[str, int, int]]:
    """Name, number of choices and lowest index of each categorical head of a leaf."""
    space: Any = leaf.space
    name = leaf.name if leaf.path or isinstance(space, spaces.Discrete) else "head"
    sizes: Any = (
        2 if isinstance(space, spaces.MultiBinary) else space.n if isinstance(space, spaces.Discrete) else space.nvec
    )
    starts: Any = 0 if isinstance(space, spaces.MultiBinary) else space.start
    sizes, starts = (np.broadcast_to(of_each, space.shape) for of_each in (sizes, starts))
    for index in np.ndindex(space.shape):
        yield "_".join(map(str, (name, *index))), int(sizes[index]), int(starts[index])


def _own_columns(leaves: list[Leaf]) -> list[tuple[Any, slice, torch.dtype, tuple[int, ...]]]:
    """Keys of each leaf, where it stands among the columns of all, and its dtype and shape in the environment."""
    shapes = [leaf.space.shape or () for leaf in leaves]
    ends = np.cumsum([math.prod(shape) for shape in shapes]).tolist()
    return [
        (leaf.path, slice(end - math.prod(shape), end), torch_dtype(leaf.space.dtype), shape)
        for leaf, end, shape in zip(leaves, ends, shapes)
    ]


def _nested(space: gym.Space, parts: dict[tuple[str | int, ...], Any], path: tuple[str | int, ...] = ()) -> Any:
    """The parts, by their keys, nested as the space is."""
    if isinstance(space, spaces.Dict):
        return {key: _nested(part, parts, (*path, key)) for key, part in space.items()}
    if isinstance(space, spaces.Tuple):
        return tuple(_nested(part, parts, (*path, key)) for key, part in enumerate(space))
    return parts[path]


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
