"""From features to actions: factored categorical heads with masks, or a diagonal Gaussian."""

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
    """Independent normal distributions over D numbers, one head (K = 1), with the methods of `FactoredCategorical`.

    Args:
        mean: [N, D].
        log_std: [D].
    """

    def __init__(self, mean: Tensor, log_std: Tensor) -> None:
        self.mean = mean
        self.log_std = log_std

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        noise = torch.empty_like(self.mean).normal_(generator=generator)
        return self.mean + self.log_std.exp() * noise

    def mode(self) -> Tensor:
        return self.mean

    def log_probs(self, actions: Tensor) -> Tensor:
        z = (actions - self.mean) * (-self.log_std).exp()
        return -(0.5 * z.square() + self.log_std + 0.5 * math.log(2 * math.pi)).sum(-1, keepdim=True)

    def entropies(self) -> Tensor:
        entropy = (self.log_std + 0.5 * math.log(2 * math.pi * math.e)).sum()
        return entropy.expand(self.mean.shape[0], 1)

    def kl_from(self, other: Any) -> Tensor:
        ratio = (2 * (other.log_std - self.log_std)).exp()
        shift = ((other.mean - self.mean) * (-self.log_std).exp()).square()
        return 0.5 * (ratio + shift - 1 - 2 * (other.log_std - self.log_std)).sum(-1)


Distribution = FactoredCategorical | DiagonalGaussian
"""Over actions of N states."""


class Heads(nn.Module):
    """One `Linear(H, n_k)` per categorical head, or mean and free log-deviation of a Gaussian."""

    def __init__(self, num_features: int, spec: ActionSpec, masks: tuple[Leaf, ...]) -> None:
        super().__init__()
        spec.check_masks(masks)
        self.nvec = spec.nvec
        self.names = spec.names
        self.is_continuous = spec.is_continuous
        # Leaf name of each head's mask (None: it has none), or of the one mask of all heads.
        by_head = {leaf.name.rpartition("/")[2]: leaf.name for leaf in masks}
        self._masks = (by_head[ACTION_MASK],) if ACTION_MASK in by_head else tuple(map(by_head.get, spec.names))
        sizes = (spec.num_columns,) if spec.is_continuous else spec.nvec
        self.linears = nn.ModuleList([nn.Linear(num_features, n) for n in sizes])
        if spec.is_continuous:
            self.log_std = nn.Parameter(torch.zeros(spec.num_columns))

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
        if self.is_continuous:
            return DiagonalGaussian(outputs[0], self.log_std)
        logits = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        return FactoredCategorical(logits, self.nvec, self.mask(observations))
