"""From features to actions: factored categorical heads with masks, diagonal Gaussians, or both."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from dualhead.errors import DataError
from dualhead.spaces import ACTION_MASK, ActionSpec, Leaf
from dualhead.types import Observations


class FactoredCategorical:
    """Independent categorical heads. Masked choices have probability zero and add nothing to the entropy.

    Args:
        logits: [N, sum(nvec)], heads side by side.
        nvec: choices per head, K of them.
        mask: [N, sum(nvec)] bool, true where a choice is allowed; None: everything is.

    Attributes:
        logits: normalised, per head [N, n_k].
    """

    def __init__(self, logits: Tensor, nvec: tuple[int, ...], mask: Tensor | None = None) -> None:
        if mask is not None:
            logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
        self.logits = [head.log_softmax(-1) for head in logits.split(nvec, dim=-1)]

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Random actions [N, K]."""
        # The exponential race: argmin of Exp(1)/p is a draw from p.
        actions = []
        for log_p in self.logits:
            race = torch.empty_like(log_p).exponential_(generator=generator)
            actions.append((log_p - race.log()).argmax(-1))
        return torch.stack(actions, dim=-1)

    def mode(self) -> Tensor:
        """The likeliest actions [N, K]."""
        return torch.stack([log_p.argmax(-1) for log_p in self.logits], dim=-1)

    def log_probs(self, actions: Tensor) -> Tensor:
        """Log-probability per head, [N, K]."""
        chosen = [log_p.gather(-1, action[:, None])[:, 0] for log_p, action in zip(self.logits, actions.unbind(-1))]
        return torch.stack(chosen, dim=-1)

    def entropies(self) -> Tensor:
        """Entropy per head in nats, [N, K]."""
        return torch.stack([-(log_p.exp() * log_p).sum(-1) for log_p in self.logits], dim=-1)

    def kl_from(self, other: Any) -> Tensor:
        """KL(other || self) summed over heads, [N]; `other` is of the same kind."""
        kl = [(p.exp() * (p - q)).sum(-1) for p, q in zip(other.logits, self.logits)]
        return torch.stack(kl, dim=-1).sum(-1)


class DiagonalGaussian:
    """Independent normal distributions over D numbers, with the methods of `FactoredCategorical`.

    Args:
        mean: [N, D].
        log_std: [D].
        sizes: how many of the numbers each head has, K of them; None: one head has all.
    """

    def __init__(self, mean: Tensor, log_std: Tensor, sizes: tuple[int, ...] | None = None) -> None:
        self.mean = mean
        self.log_std = log_std
        self.sizes = sizes or (mean.shape[-1],)

    def _per_head(self, numbers: Tensor) -> Tensor:
        """Sums over the numbers of each head, [..., D] -> [..., K]."""
        if len(self.sizes) == 1:
            return numbers.sum(-1, keepdim=True)
        return torch.stack([own.sum(-1) for own in numbers.split(self.sizes, dim=-1)], dim=-1)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        noise = torch.empty_like(self.mean).normal_(generator=generator)
        return self.mean + self.log_std.exp() * noise

    def mode(self) -> Tensor:
        return self.mean

    def log_probs(self, actions: Tensor) -> Tensor:
        z = (actions - self.mean) * (-self.log_std).exp()
        return -self._per_head(0.5 * z.square() + self.log_std + 0.5 * math.log(2 * math.pi))

    def entropies(self) -> Tensor:
        entropies = self._per_head(self.log_std + 0.5 * math.log(2 * math.pi * math.e))
        return entropies.expand(self.mean.shape[0], len(self.sizes))

    def kl_from(self, other: Any) -> Tensor:
        ratio = (2 * (other.log_std - self.log_std)).exp()
        shift = ((other.mean - self.mean) * (-self.log_std).exp()).square()
        return 0.5 * (ratio + shift - 1 - 2 * (other.log_std - self.log_std)).sum(-1)


class Mixed:
    """Categorical heads and Gaussian ones after them, independent of each other, with the methods of both.

    Actions [N, C] are head indices, then numbers. Log-probabilities and entropies [N, K] are of all heads.
    """

    def __init__(self, categorical: FactoredCategorical, gaussian: DiagonalGaussian) -> None:
        self.categorical, self.gaussian = categorical, gaussian

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        return self._joined(self.categorical.sample(generator), self.gaussian.sample(generator))

    def mode(self) -> Tensor:
        return self._joined(self.categorical.mode(), self.gaussian.mode())

    def _joined(self, indices: Tensor, numbers: Tensor) -> Tensor:
        # The dtype of a parameter: under autocast the mean is bfloat16, which has no integers from 257 on.
        return torch.cat([indices.to(self.gaussian.log_std.dtype), numbers], dim=-1)

    def log_probs(self, actions: Tensor) -> Tensor:
        indices, numbers = actions.tensor_split([len(self.categorical.logits)], dim=-1)
        return torch.cat([self.categorical.log_probs(indices.long()), self.gaussian.log_probs(numbers)], dim=-1)

    def entropies(self) -> Tensor:
        return torch.cat([self.categorical.entropies(), self.gaussian.entropies()], dim=-1)

    def kl_from(self, other: Any) -> Tensor:
        return self.categorical.kl_from(other.categorical) + self.gaussian.kl_from(other.gaussian)


Distribution = FactoredCategorical | DiagonalGaussian | Mixed
"""Over actions of N states."""


class Heads(nn.Module):
    """One `Linear(H, n_k)` per categorical head, then mean and free log-deviation of a Gaussian per Box."""

    def __init__(self, num_features: int, spec: ActionSpec, masks: tuple[Leaf, ...]) -> None:
        super().__init__()
        spec.check_masks(masks)
        self.nvec = spec.nvec
        self.names = spec.names
        self.box_sizes = spec.box_sizes
        # Leaf name of each categorical head's mask (None: it has none), or of the one mask of all of them.
        by_head = {leaf.head: leaf.name for leaf in masks}
        is_whole = ACTION_MASK in by_head
        self._masks = (by_head[ACTION_MASK],) if is_whole else tuple(map(by_head.get, spec.names[: len(spec.nvec)]))
        self.linears = nn.ModuleList([nn.Linear(num_features, n) for n in (*spec.nvec, *spec.box_sizes)])
        if spec.box_sizes:
            self.log_std = nn.Parameter(torch.zeros(sum(spec.box_sizes)))

    def mask(self, observations: Observations) -> Tensor | None:
        """The mask [N, sum(nvec)] that the observations carry, or None."""
        masks = [None if name is None else observations[name].flatten(1) != 0 for name in self._masks]
        some = next((mask for mask in masks if mask is not None), None)
        if some is None or len(masks) == 1:
            return some
        parts = [some.new_ones(some.shape[0], n) if mask is None else mask for mask, n in zip(masks, self.nvec)]
        return torch.cat(parts, dim=1)

    def check_mask(self, observations: Observations) -> None:
        """Raises DataError where a mask leaves a head no choice."""
        mask = self.mask(observations)
        if mask is None:
            return
        for name, allowed in zip(self.names, mask.split(self.nvec, dim=-1)):
            empty = ~allowed.any(-1)
            if empty.any():
                raise DataError(
                    f"{ACTION_MASK!r} of stream {int(empty.nonzero()[0])} allows no choice for head {name!r}: "
                    f"expected at least one"
                )

    def forward(self, h: Tensor, observations: Observations) -> Distribution:
        outputs = [linear(h) for linear in self.linears]
        logits, means = outputs[: len(self.nvec)], outputs[len(self.nvec) :]
        if not means:
            return FactoredCategorical(_side_by_side(logits), self.nvec, self.mask(observations))
        gaussian = DiagonalGaussian(_side_by_side(means), self.log_std, self.box_sizes)
        if not logits:
            return gaussian
        return Mixed(FactoredCategorical(_side_by_side(logits), self.nvec, self.mask(observations)), gaussian)


def _side_by_side(outputs: list[Tensor]) -> Tensor:
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
