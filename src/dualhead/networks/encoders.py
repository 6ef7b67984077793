"""From observations to features: running scales, one part per leaf of the space joined by layers, the step before."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Protocol, TypeGuard, runtime_checkable

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from dualhead.config import NetworkConfig
from dualhead.networks.linear import Linear
from dualhead.spaces import ActionSpec, Leaf, ObservationSpec
from dualhead.types import Observations

NATURE_MIN_PIXELS = 36
GREATEST_PIXEL = 65_535.0
"""A float image with a greater bound has no bound, rather than that brightness."""
ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh}
_CONVOLUTIONS = {"small": [(32, 3, 1, 1), (64, 3, 1, 1)], "nature": [(32, 8, 4, 0), (64, 4, 2, 0), (64, 3, 1, 0)]}
"""Channels, kernel, stride and padding of each layer. `small` is for grids, `nature` (Mnih et al. 2015) for frames."""
PREVIOUS_ACTION = "previous/action"
PREVIOUS_REWARD = "previous/reward"


@runtime_checkable
class Encoder(Protocol):
    """What the policy asks of an encoder, an `nn.Module` that initialises its own weights.

    Called with the leaves [N, ...] of N observations by name (a plain space has the one leaf `observation`): integers
    as they are, floats in the policy's dtype, vectors of floats scaled where `normalize_observations` is on. Returns
    features [N, num_features].
    """

    num_features: int

    def __call__(self, observations: Observations) -> Tensor: ...


EncoderFactory = Callable[[gym.Space], nn.Module]
"""Makes an encoder for an observation space."""


class _Flat(nn.Module):
    """Numbers as they are, flattened."""

    def __init__(self, space: gym.Space) -> None:
        super().__init__()
        self.num_features = math.prod(space.shape or ())

    def forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return _rows(x).to(dtype)


class _OneHot(nn.Module):
    """`Discrete` and `MultiDiscrete`: one-hot codes side by side."""

    shift: Tensor

    def __init__(self, space: spaces.Discrete | spaces.MultiDiscrete) -> None:
        super().__init__()
        sizes = np.ravel(space.n if isinstance(space, spaces.Discrete) else space.nvec)
        self.num_features = int(sizes.sum())
        shift = np.cumsum(sizes) - sizes - np.ravel(space.start)
        self.register_buffer("shift", torch.from_numpy(shift.astype(np.int64)), persistent=False)

    def forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        index = _rows(x).long() + self.shift
        return torch.zeros(x.shape[0], self.num_features, dtype=dtype, device=x.device).scatter_(1, index, 1.0)


class _Image(nn.Module):
    """Convolutions over an image or grid; pixels from 0 to a bound are divided by it."""

    def __init__(self, space: spaces.Box, image_encoder: str, image_layout: str) -> None:
        super().__init__()
        shape = space.shape if len(space.shape) == 3 else (1, *space.shape)
        self.channels_last = len(space.shape) == 3 and _has_channels_last(shape, image_layout)
        self.shape = (shape[2], *shape[:2]) if self.channels_last else shape
        pixels = min(self.shape[1:])
        kind = image_encoder
        if kind == "auto":
            kind = "nature" if pixels >= NATURE_MIN_PIXELS else "small"
        if kind == "nature" and pixels < NATURE_MIN_PIXELS:
            raise ValueError(
                f"image_encoder='nature' needs images of at least {NATURE_MIN_PIXELS} pixels a side, got "
                f"{space.shape}: use image_encoder='small'"
            )
        high = float(np.max(space.high))
        is_integer = np.issubdtype(space.dtype, np.integer)
        has_pixels = is_integer or (float(np.min(space.low)) == 0.0 and high <= GREATEST_PIXEL)
        self.scale = 1.0 / max(high, 1.0) if has_pixels else 1.0
        modules: list[nn.Module] = []
        given = self.shape[0]
        for wanted, kernel, stride, padding in _CONVOLUTIONS[kind]:
            modules += [nn.Conv2d(given, wanted, kernel, stride, padding), nn.ReLU(inplace=True)]
            given = wanted
        self.convolutions = nn.Sequential(*modules)
        with torch.no_grad():
            self.num_features = self.convolutions(torch.zeros(1, *self.shape)).numel()

    def forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        x = x.to(dtype)
        if self.scale != 1.0:
            x = x * self.scale
        x = x.permute(0, 3, 1, 2) if self.channels_last else x.reshape(x.shape[0], *self.shape)
        return self.convolutions(x).flatten(1)


class JoinedEncoder(nn.Module):
    """Each leaf encoded, all joined, then layers of `config.encoder_sizes`."""

    no_numbers: Tensor

    def __init__(self, spec: ObservationSpec, config: NetworkConfig) -> None:
        super().__init__()
        self.names = tuple(leaf.name for leaf in spec.inputs)
        parts: list[_OneHot | _Image | _Flat] = []
        for leaf in spec.inputs:
            if isinstance(leaf.space, spaces.Discrete | spaces.MultiDiscrete):
                parts.append(_OneHot(leaf.space))
            elif is_image(leaf.space, config.image_encoder):
                parts.append(_Image(leaf.space, config.image_encoder, config.image_layout))
            else:
                parts.append(_Flat(leaf.space))
        self.parts = nn.ModuleList(parts)
        sizes = [sum(part.num_features for part in parts), *config.encoder_sizes]
        self.joined = joining_layers(sizes, config.activation, Linear)
        self.num_features = sizes[-1]
        # Has the dtype that the module was cast to, which need not have any weight.
        self.register_buffer("no_numbers", torch.zeros(0), persistent=False)

    def forward(self, observations: Observations) -> Tensor:
        dtype = self.no_numbers.dtype
        parts = [part(observations[name], dtype) for name, part in zip(self.names, self.parts)]
        return self.joined(parts[0] if len(parts) == 1 else torch.cat(parts, dim=1))


def joining_layers(sizes: Sequence[int], activation: str, linear: type[nn.Linear] = nn.Linear) -> nn.Sequential:
    """Linear layers from each size to the next, with an activation after each."""
    modules: list[nn.Module] = []
    for given, wanted in itertools.pairwise(sizes):
        modules += [linear(given, wanted), ACTIVATIONS[activation]()]
    return nn.Sequential(*modules)


def init_layers(part: nn.Module, gain: float = math.sqrt(2)) -> None:
    """Orthogonal weights with `gain` and zero biases for every linear and convolutional layer of a part."""
    for layer in part.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.orthogonal_(layer.weight, gain)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def is_image(space: gym.Space, image_encoder: str = "auto") -> TypeGuard[spaces.Box]:
    """Whether a leaf goes through convolutions: a Box of three axes, or of two axes of uint8."""
    if image_encoder == "flat" or not isinstance(space, spaces.Box) or min(space.shape, default=0) == 0:
        return False
    return len(space.shape) == 3 or (len(space.shape) == 2 and space.dtype == np.uint8)


def _has_channels_last(shape: tuple[int, ...], image_layout: str) -> bool:
    """`auto`: two equal neighbours are height and width; where none are, the shorter end holds the channels."""
    if image_layout != "auto" or shape[1] == shape[2]:
        return image_layout == "hwc"
    return shape[0] == shape[1] or shape[2] < shape[0]


def vectors(spec: ObservationSpec, image_encoder: str = "auto") -> list[Leaf]:
    """The leaves that running statistics can scale: Boxes of numbers that are no images."""
    return [
        leaf for leaf in spec.inputs if isinstance(leaf.space, spaces.Box) and not is_image(leaf.space, image_encoder)
    ]


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
        if count == 0:
            return
        total = self.count + count
        delta = batch.mean(0) - self.mean
        spread = self.variance * self.count + batch.var(0, unbiased=False) * count
        self.mean += delta * count / total
        self.variance.copy_((spread + delta.square() * self.count * count / total) / total)
        self.count.copy_(total)

    def forward(self, x: Tensor) -> Tensor:
        mean, deviation = self.mean.to(x.dtype), (self.variance + 1e-8).sqrt().to(x.dtype)
        return ((x - mean) / deviation).clamp(-self.clip, self.clip)


class ObservationNormalizer(nn.Module):
    """Scales each number of the vectors among an observation's leaves; other leaves stay as they are."""

    def __init__(self, leaves: Sequence[Leaf]) -> None:
        super().__init__()
        self.names = tuple(leaf.name for leaf in leaves)
        self.of_leaf = nn.ModuleList(RunningNormalizer((math.prod(leaf.space.shape or ()),)) for leaf in leaves)

    def update(self, observations: Observations) -> None:
        """Takes in leaves [N, ...]."""
        for name, normalizer in zip(self.names, self.of_leaf):
            assert isinstance(normalizer, RunningNormalizer)
            normalizer.update(_rows(observations[name]))

    def forward(self, observations: Observations, dtype: torch.dtype) -> Observations:
        scaled = {
            name: normalizer(_rows(observations[name]).to(dtype)).view(observations[name].shape)
            for name, normalizer in zip(self.names, self.of_leaf)
        }
        return observations | scaled if scaled else observations


def _rows(leaf: Tensor) -> Tensor:
    """[N, ...] as [N, F]."""
    return leaf.reshape(leaf.shape[0], -1)


class PreviousStep(nn.Module):
    """R2D2's further inputs: the action and reward of the step before, both zero at an episode's first step.

    They are two more leaves of an observation, which rollouts, minibatches, burn-in and checkpoints treat as any:

        previous/action   [N, C] head indices, or −1, and the numbers of Boxes in the policy's units, clipped where the
                          environment clips them, or 0: int64, or the policy's dtype where there is a Box
        previous/reward   [N] the task's reward as it was recorded: neither scaled nor with guilt

    `forward` returns `num_features` features, none where the policy sees neither `action` nor `reward`.

    Source: Kapturowski et al. 2019 (R2D2) §2.3: the LSTM sees encoder features, previous action and previous reward.
    """

    blank: Tensor
    bounded: Tensor
    head_of: Tensor
    choice_of: Tensor

    def __init__(self, spec: ActionSpec, *, action: bool, reward: bool) -> None:
        super().__init__()
        self.sees_action, self.sees_reward = action, reward
        self._spec = spec
        self.num_features = action * (sum(spec.nvec) + sum(spec.box_sizes)) + reward
        buffers = {
            # What stands where no step came before: the one-hot code of −1 is zeros.
            "blank": np.repeat([-1, 0], [len(spec.nvec), sum(spec.box_sizes)]),
            "head_of": np.arange(len(spec.nvec)).repeat(spec.nvec),
            "choice_of": np.concatenate([np.zeros(0, np.int64), *(np.arange(n) for n in spec.nvec)]),
            "bounded": np.concatenate([np.zeros(len(spec.nvec), bool), spec.bounded]),
        }
        for name, array in buffers.items():
            self.register_buffer(name, torch.from_numpy(np.ascontiguousarray(array)), persistent=False)

    def shapes(self, dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape of one stream's entry and dtype of each leaf."""
        leaves: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        if self.sees_action:
            leaves[PREVIOUS_ACTION] = ((self._spec.num_columns,), self._spec.dtype(dtype))
        if self.sees_reward:
            leaves[PREVIOUS_REWARD] = ((), dtype)
        return leaves

    def nothing(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> Observations:
        """Leaves of `batch` streams at an episode's first step."""
        leaves = {
            name: torch.zeros((batch, *shape), dtype=leaf_dtype, device=device)
            for name, (shape, leaf_dtype) in self.shapes(dtype).items()
        }
        return self.reset_where(leaves, torch.ones(batch, dtype=torch.bool, device=device))

    def after(self, actions: Tensor, rewards: Tensor) -> Observations:
        """Leaves of the next step, after actions [B, C] and task rewards [B]."""
        leaves = {}
        if self.sees_action:
            clipped = torch.where(self.bounded, actions.clamp(-1.0, 1.0), actions) if self._spec.boxes else actions
            leaves[PREVIOUS_ACTION] = clipped.clone()
        if self.sees_reward:
            leaves[PREVIOUS_REWARD] = rewards.clone()
        return leaves

    def reset_where(self, leaves: Observations, mask: Tensor) -> Observations:
        """Blank leaves in the streams where `mask` [B] is true."""
        blank = {}
        if self.sees_action:
            blank[PREVIOUS_ACTION] = torch.where(mask[:, None], self.blank, leaves[PREVIOUS_ACTION])
        if self.sees_reward:
            blank[PREVIOUS_REWARD] = leaves[PREVIOUS_REWARD].masked_fill(mask, 0)
        return blank

    def forward(self, observations: Observations, dtype: torch.dtype) -> Tensor:
        """Features [N, num_features]: one-hot codes of the heads side by side, numbers of Boxes, then the reward."""
        parts = []
        if self.sees_action:
            action = observations[PREVIOUS_ACTION]
            if self._spec.discrete:
                parts.append(action[:, self.head_of] == self.choice_of)
            if self._spec.boxes:
                parts.append(action[:, len(self._spec.nvec) :])
        if self.sees_reward:
            parts.append(observations[PREVIOUS_REWARD][:, None])
        return torch.cat([part.to(dtype) for part in parts], dim=1)
