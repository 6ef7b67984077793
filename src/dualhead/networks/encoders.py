"""From observations to features: one part per leaf of the observation space, joined by ReLU layers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from dualhead.networks.linear import Linear
from dualhead.spaces import Leaf, ObservationSpec
from dualhead.types import Observations

NATURE_MIN_PIXELS = 36
GREATEST_PIXEL = 65_535.0
"""Bounds of float images beyond this mean "no bound" and not a brightness."""
ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh}


class _Flat(nn.Module):
    """Numbers as they are, flattened."""

    def __init__(self, space: gym.Space) -> None:
        super().__init__()
        self.num_features = math.prod(space.shape or (1,))

    def forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.reshape(x.shape[0], -1).to(dtype)


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
    """Convolutions over an image or grid; pixels from 0 to a bound are divided by it.

    `small`: 3x3 C→32→64 with padding 1, for grids. `nature`: Mnih et al. 2015, for large frames.
    """

    def __init__(self, space: spaces.Box, *, kind: str, channels_last: bool) -> None:
        super().__init__()
        shape = space.shape if len(space.shape) == 3 else (1, *space.shape)
        if channels_last and len(space.shape) == 3:
            shape = (shape[2], shape[0], shape[1])
        self.channels_last = channels_last
        self.shape = shape
        high = float(np.max(space.high))
        is_integer = np.issubdtype(space.dtype, np.integer)
        has_pixels = is_integer or (float(np.min(space.low)) == 0.0 and high <= GREATEST_PIXEL)
        self.scale = 1.0 / max(high, 1.0) if has_pixels else 1.0
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


@runtime_checkable
class Encoder(Protocol):
    """What the policy asks of an encoder, an `nn.Module` that initialises its own weights.

    Called with the leaves [N, ...] of N observations by name (a plain space has the one leaf `observation`): integers
    in their own dtype, floats in the policy's, vectors scaled where `normalize_observations` is on. Returns features
    [N, num_features].

    Attributes:
        num_features: F.
    """

    num_features: int

    def __call__(self, observations: Observations) -> Tensor: ...


EncoderFactory = Callable[[gym.Space], nn.Module]
"""Makes an encoder for an observation space."""


class JoinedEncoder(nn.Module):
    """Each leaf encoded, all joined, then Linear layers with an activation each.

    Args:
        spec: which leaves there are.
        encoder_sizes: widths of the joining layers.
        activation: of the joining layers, a key of `ACTIVATIONS`.
        image_encoder, image_layout: see `NetworkConfig`.
    """

    no_numbers: Tensor

    def __init__(
        self,
        spec: ObservationSpec,
        *,
        encoder_sizes: Sequence[int],
        activation: str = "relu",
        image_encoder: str,
        image_layout: str,
    ) -> None:
        super().__init__()
        self.names = tuple(leaf.name for leaf in spec.inputs)
        parts = [_part(leaf.space, image_encoder, image_layout) for leaf in spec.inputs]
        self.parts = nn.ModuleList(parts)
        num_joined = sum(part.num_features for part in parts)
        sizes = [num_joined, *encoder_sizes]
        layers: list[nn.Module] = []
        for given, wanted in itertools.pairwise(sizes):
            layers += [Linear(given, wanted), ACTIVATIONS[activation]()]
        self.joined = nn.Sequential(*layers)
        self.num_features = sizes[-1]
        # Follows casts of the module, which need not have any weight.
        self.register_buffer("no_numbers", torch.zeros(0), persistent=False)

    def forward(self, observations: Observations) -> Tensor:
        dtype = self.no_numbers.dtype
        parts = [part(observations[name], dtype) for name, part in zip(self.names, self.parts)]
        return self.joined(parts[0] if len(parts) == 1 else torch.cat(parts, dim=1))


def is_image(space: gym.Space, image_encoder: str = "auto") -> bool:
    """Whether a leaf goes through convolutions: a Box of three axes, or of two axes of uint8."""
    if image_encoder == "flat" or not isinstance(space, spaces.Box) or min(space.shape, default=0) == 0:
        return False
    return len(space.shape) == 3 or (len(space.shape) == 2 and space.dtype == np.uint8)


def vectors(spec: ObservationSpec, image_encoder: str = "auto") -> list[Leaf]:
    """The leaves that running statistics can scale: Boxes of numbers that are no images."""
    return [
        leaf for leaf in spec.inputs if isinstance(leaf.space, spaces.Box) and not is_image(leaf.space, image_encoder)
    ]


def _has_channels_last(shape: tuple[int, ...], image_layout: str) -> bool:
    """Two equal neighbours are height and width; where none are, the shorter end holds the channels."""
    if image_layout != "auto" or shape[1] == shape[2]:
        return image_layout == "hwc"
    return shape[0] == shape[1] or shape[2] < shape[0]


def _part(space: gym.Space, image_encoder: str, image_layout: str) -> _Flat | _OneHot | _Image:
    if isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
        return _OneHot(space)
    if isinstance(space, spaces.Box) and is_image(space, image_encoder):
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
    return _Flat(space)


def init_layers(part: nn.Module, gain: float = math.sqrt(2)) -> None:
    """Orthogonal weights with `gain` and zero biases for every linear and convolutional layer of a part."""
    for layer in part.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.orthogonal_(layer.weight, gain)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
