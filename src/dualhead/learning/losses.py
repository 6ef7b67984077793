"""PPO's surrogate, value and entropy losses: pure functions of tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class SurrogateLoss(NamedTuple):
    loss: Tensor  # scalar, to be minimised
    approx_kl: Tensor  # scalar estimate of KL(behaviour || policy) over the joint action, in nats
    clip_fraction: Tensor  # scalar share of ratios outside the clip range
    ratio: Tensor  # [N, K] per head, or [N, 1] joint


def clipped_surrogate(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, *, clip_coef: float, joint: bool
) -> SurrogateLoss:
    """The clipped surrogate of N steps, per head (K of them) and summed, or with `joint` on the product of ratios.

        L_k = −mean_n min(r_nk A_n, clip(r_nk, 1 − ε, 1 + ε) A_n),   L = Σ_k L_k,   ε = clip_coef

    Log-probabilities are [N, K], advantages [N].

    Source: Schulman et al. 2017, arXiv:1707.06347 eq. 7; approx_kl: Schulman 2020, "Approximating KL divergence", k3.
    """
    log_ratio = log_probs - old_log_probs
    joint_log_ratio = log_ratio.sum(-1)
    if joint:
        log_ratio = joint_log_ratio[:, None]
    ratio = log_ratio.exp()
    weights = advantages[:, None]
    surrogate = torch.minimum(ratio * weights, ratio.clamp(1 - clip_coef, 1 + clip_coef) * weights)
    with torch.no_grad():
        approx_kl = (joint_log_ratio.exp() - 1 - joint_log_ratio).mean()
        clip_fraction = ((ratio - 1).abs() > clip_coef).to(ratio.dtype).mean()
    return SurrogateLoss(-surrogate.sum(-1).mean(), approx_kl, clip_fraction, ratio)


def value_loss(values: Tensor, returns: Tensor, old_values: Tensor, *, value_clip: float | None) -> Tensor:
    """Mean squared error of values [N]; with `value_clip` the worse of it and of the error after a clipped change."""
    error = (values - returns).square()
    if value_clip is not None:
        clipped = old_values + (values - old_values).clamp(-value_clip, value_clip)
        error = torch.maximum(error, (clipped - returns).square())
    return error.mean()


def normalize(advantages: Tensor) -> Tensor:
    """Mean 0, deviation 1 (unbiased, plus 1e-8); a single step becomes 0 and not NaN."""
    centred = advantages - advantages.mean()
    return centred / (advantages.std() + 1e-8) if advantages.numel() > 1 else centred


def explained_variance(values: Tensor, returns: Tensor) -> Tensor:
    """1 − Var(returns − values) / Var(returns): 1 is perfect, 0 no better than a constant; NaN where nothing varies."""
    variance = returns.var(unbiased=False)
    return torch.where(variance > 0, 1 - (returns - values).var(unbiased=False) / variance, torch.nan)
