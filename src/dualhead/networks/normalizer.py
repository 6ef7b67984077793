"""Running mean and deviation, and the observations that are scaled by them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from dualhead.spaces import Leaf
from dualhead.types import Observations


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


class ObservationNormalizer(nn.Module):
    """Scales vectors of an observation, each number by its own statistics; other leaves stay as they are.

    Args:
        leaves: the vectors; none: nothing is scaled.
    """

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
