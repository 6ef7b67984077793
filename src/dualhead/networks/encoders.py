"""From observations to features: one part per leaf of the observation space, joined by ReLU layers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from dualhead.networks.linear import Linear
from dualhead.types import DataError, Observations, on_device

ACTION_MASK = "action_mask"
WHOLE = "observation"
NATURE_MIN_PIXELS = 36
ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh}
_SUPPORTED = "Box, Discrete, MultiDiscrete, MultiBinary, and Dict or Tuple of them"


class Leaf(NamedTuple):
    """One array of an observation: its name (`part/subpart`), space, and whether it is an action mask."""

    name: str
    space: gym.Space
    is_mask: bool


class ObservationSpec:
    """Turns what environments give (arrays, numbers, dicts, tuples, batched) into named tensors, checking on the way.

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
            # What comes from an accelerator would have to be waited for at each step; learn() checks it.
            if tensor.device.type == "cpu":
                check_leaf(leaf, tensor, streams)
            tensors[leaf.name] = tensor if device is None else on_device(tensor, device)
        return tensors


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
    """What came in as a tensor, sharing memory where it may be written to."""
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
    """Whether all numbers are finite; one sum settles it unless the sum itself overflows."""
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
    raise TypeError(f"unsupported observation space {space}{where}: expected {_SUPPORTED}")


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


class RunningNormalizer(nn.Module):
    """Scales by running mean and deviation, kept in float64 and updated between rollouts only.

    Because the statistics stand still while a rollout is collected and learned from, acting and evaluation see the
    same features and the first probability ratio is exactly 1.

    Source: Chan, Golub & LeVeque 1983, parallel mean and variance.
    """

    mean: Tensor
    variance: Tensor
    count: Tensor

    def __init__(self, shape: Sequence[int], *, clip: float = 10.0) -> None:
        super().__init__()
        self.clip = clip
        self.register_buffer("mean", torch.zeros(tuple(shape), dtype=torch.float64))
        self.register_buffer("variance", torch.ones(tuple(shape), dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RunningNormalizer:
        # A cast to the policy's dtype moves the statistics to its device and leaves them in float64.
        super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)
        return self

    def update(self, batch: Tensor) -> None:
        """Takes in a batch [N, *shape]."""
        batch = batch.to(torch.float64)
        count = batch.shape[0]
        total = self.count + count
        delta = batch.mean(0) - self.mean
        spread = self.variance * self.count + batch.var(0, unbiased=False) * count
        self.mean += delta * count / total
        self.variance.copy_((spread + delta.square() * self.count * count / total) / total)
        self.count.copy_(total)

    def forward(self, x: Tensor) -> Tensor:
        mean, deviation = self.mean.to(x.dtype), (self.variance + 1e-8).sqrt().to(x.dtype)
        return ((x - mean) / deviation).clamp(-self.clip, self.clip)


class _Flat(nn.Module):
    """Numbers as they are, flattened; optionally normalised."""

    def __init__(self, space: gym.Space, *, normalize: bool) -> None:
        super().__init__()
        self.num_features = int(np.prod(space.shape or (1,)))
        self.normalizer = RunningNormalizer((self.num_features,)) if normalize else None

    def flat(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.reshape(x.shape[0], -1).to(dtype)

    def forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        x = self.flat(x, dtype)
        return x if self.normalizer is None else self.normalizer(x)


class _OneHot(nn.Module):
    """`Discrete` and `MultiDiscrete`: one-hot codes side by side."""

    starts: Tensor
    offsets: Tensor

    def __init__(self, space: spaces.Discrete | spaces.MultiDiscrete) -> None:
        super().__init__()
        sizes = np.atleast_1d(space.n if isinstance(space, spaces.Discrete) else space.nvec).ravel()
        self.num_features = int(sizes.sum())
        self.register_buffer(
            "starts", torch.from_numpy(np.atleast_1d(space.start).ravel().astype(np.int64)), persistent=False
        )
        self.register_buffer("offsets", torch.from_numpy(np.cumsum(sizes) - sizes), persistent=False)

    def forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        index = x.reshape(x.shape[0], -1).long() - self.starts + self.offsets
        return torch.zeros(x.shape[0], self.num_features, dtype=dtype, device=x.device).scatter_(1, index, 1.0)


class _Image(nn.Module):
    """Convolutions over an image or grid; integer pixels are divided by the space's upper bound.

    `small`: 3x3 C→32→64 with padding 1, for grids. `nature`: Mnih et al. 2015, for large frames.
    """

    def __init__(self, space: spaces.Box, *, kind: str, channels_last: bool) -> None:
        super().__init__()
        shape = space.shape if len(space.shape) == 3 else (1, *space.shape)
        if channels_last and len(space.shape) == 3:
            shape = (shape[2], shape[0], shape[1])
        self.channels_last = channels_last
        self.shape = shape
        integer = np.issubdtype(space.dtype, np.integer)
        self.scale = 1.0 / max(float(np.max(space.high)), 1.0) if integer else 1.0
        channels = shape[0]
        if kind == "nature":
            convolutions = [
                nn.Conv2d(channels, 32, 8, stride=4),
                nn.Conv2d(32, 64, 4, stride=2),
                nn.Conv2d(64, 64, 3),
            ]
        else:
            convolutions = [nn.Conv2d(channels, 32, 3, padding=1), nn.Conv2d(32, 64, 3, padding=1)]
        self.convolutions = nn.Sequential(*(m for conv in convolutions for m in (conv, nn.ReLU(inplace=True))))
        with torch.no_grad():
            self.num_features = self.convolutions(torch.zeros(1, *shape)).numel()

    def forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        x = x.to(dtype)
        if self.scale != 1.0:
            x = x * self.scale
        x = x.permute(0, 3, 1, 2) if self.channels_last and x.dim() == 4 else x.reshape(x.shape[0], *self.shape)
        return self.convolutions(x).flatten(1)


def _is_image(space: gym.Space) -> bool:
    return isinstance(space, spaces.Box) and len(space.shape) in (2, 3) and min(space.shape) > 0


class Encoder(nn.Module):
    """Features of an observation: each leaf encoded, all joined, then Linear layers with an activation each.

    Args:
        spec: which leaves there are.
        encoder_sizes: widths of the joining layers.
        activation: of the joining layers, a key of `ACTIVATIONS`.
        image_encoder, image_layout: see `NetworkConfig`.
        normalize: give vectors of floats a running normaliser.
    """

    def __init__(
        self,
        spec: ObservationSpec,
        *,
        encoder_sizes: Sequence[int],
        activation: str = "relu",
        image_encoder: str,
        image_layout: str,
        normalize: bool,
    ) -> None:
        super().__init__()
        self.names = tuple(leaf.name for leaf in spec.inputs)
        parts = [_part(leaf.space, image_encoder, image_layout, normalize) for leaf in spec.inputs]
        self.parts = nn.ModuleList(parts)
        num_joined = sum(part.num_features for part in parts)
        sizes = [num_joined, *encoder_sizes]
        layers: list[nn.Module] = []
        for given, wanted in itertools.pairwise(sizes):
            layers += [Linear(given, wanted), ACTIVATIONS[activation]()]
        self.joined = nn.Sequential(*layers)
        self.num_features = sizes[-1]

    @property
    def normalizers(self) -> dict[str, RunningNormalizer]:
        return {
            name: part.normalizer
            for name, part in zip(self.names, self.parts)
            if isinstance(part, _Flat) and part.normalizer is not None
        }

    def update_normalizers(self, observations: Observations) -> None:
        """Takes observations [N, ...] into the running statistics."""
        for name, normalizer in self.normalizers.items():
            normalizer.update(observations[name].flatten(1))

    def forward(self, observations: Observations, dtype: torch.dtype) -> Tensor:
        parts = [part(observations[name], dtype) for name, part in zip(self.names, self.parts)]
        return self.joined(parts[0] if len(parts) == 1 else torch.cat(parts, dim=1))


def _has_channels_last(shape: tuple[int, ...], image_layout: str) -> bool:
    """Two equal neighbours are height and width; where none are, the shorter end holds the channels."""
    if image_layout != "auto" or shape[1] == shape[2]:
        return image_layout == "hwc"
    return shape[0] == shape[1] or shape[2] < shape[0]


def _part(space: gym.Space, image_encoder: str, image_layout: str, normalize: bool) -> _Flat | _OneHot | _Image:
    if isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
        return _OneHot(space)
    if isinstance(space, spaces.Box) and _is_image(space):
        shape = space.shape
        channels_last = len(shape) == 3 and _has_channels_last(shape, image_layout)
        pixels = min(shape) if len(shape) == 2 else min(shape[:2] if channels_last else shape[1:])
        if image_encoder == "auto":
            image_encoder = "nature" if pixels >= NATURE_MIN_PIXELS else "small"
        if image_encoder == "nature" and pixels < NATURE_MIN_PIXELS:
            raise ValueError(
                f"image_encoder='nature' needs images of at least {NATURE_MIN_PIXELS} pixels a side, got {shape}: "
                f"use image_encoder='small'"
            )
        return _Image(space, kind=image_encoder, channels_last=channels_last)
    floats = isinstance(space, spaces.Box) and np.issubdtype(space.dtype, np.floating)
    return _Flat(space, normalize=normalize and floats)


def init_layer(layer: nn.Module, gain: float = math.sqrt(2)) -> None:
    """Orthogonal weight with `gain`, zero bias, for a linear or convolutional layer."""
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    nn.init.orthogonal_(layer.weight, gain)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
