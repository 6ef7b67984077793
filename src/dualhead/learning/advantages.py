"""From rewards to advantages: GAE, the oracle-checked pure function, and the running scale of rewards."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dualhead.learning.rollout import of_active
from dualhead.networks.encoders import RunningNormalizer


def generalized_advantages(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    *,
    gamma: float,
    gae_lambda: float,
) -> Tensor:
    """Advantages of a time-major rollout by GAE.

        δ_t = r_t + γ (1 − terminated_t) V(s_{t+1}) − V(s_t)
        A_t = δ_t + γλ (1 − terminated_t)(1 − truncated_t) A_{t+1}

    Args:
        rewards: [T, B], shaped (task reward plus guilt).
        values: [T, B], V(s_t) under the behaviour policy.
        next_values: [T, B], V(s_{t+1}); at truncation the value of the final observation, never of the reset one.
        terminated, truncated: [T, B] bool, caused by the action at t.
        gamma, gae_lambda: discount and trace decay per step, in [0, 1].

    Returns:
        [T, B] advantages, not normalised; add `values` for λ-returns.

    Raises:
        ValueError: shapes disagree, or a coefficient is outside [0, 1].

    Source: Schulman et al. 2016, arXiv:1506.02438 §3. Departure: truncation stops the trace but still bootstraps.
    """
    shapes = {tuple(x.shape) for x in (rewards, values, next_values, terminated, truncated)}
    if len(shapes) != 1 or rewards.dim() != 2:
        raise ValueError(f"expected five tensors of one shape [T, B], got {sorted(shapes)}")
    if not (0 <= gamma <= 1 and 0 <= gae_lambda <= 1):
        raise ValueError(f"gamma and gae_lambda lie in [0, 1], got {gamma} and {gae_lambda}")
    deltas = rewards + gamma * next_values.masked_fill(terminated, 0.0) - values
    decays = gamma * gae_lambda * (~(terminated | truncated)).to(values.dtype)
    advantages = torch.empty_like(deltas)
    following = torch.zeros_like(deltas[0])
    for t in reversed(range(rewards.shape[0])):
        following = torch.addcmul(deltas[t], decays[t], following, out=advantages[t])
    return advantages


class RewardScale(nn.Module):
    """Divides rewards by the running deviation of the discounted return, one return per stream.

    Statistics are updated with a whole rollout before it is scaled, so all its rewards share one scale.

    Source: Engstrom et al. 2020, arXiv:2005.12729 §2 (reward scaling). Departure: one scale per rollout.
    """

    returns: Tensor

    def __init__(self, num_streams: int, *, gamma: float, clip: float = 10.0) -> None:
        super().__init__()
        self.gamma = gamma
        self.clip = clip
        self.statistics = RunningNormalizer(())
        self.register_buffer("returns", torch.zeros(num_streams, dtype=torch.float64))

    def forward(self, rewards: Tensor, ended: Tensor, active: Tensor | None = None) -> Tensor:
        """Takes in rewards [T, B] with `ended` [T, B] bool, and gives them scaled and clipped.

        Statistics are over the steps in which streams took part, `active` [T, B]; the other rewards are zero.
        """
        discounted = torch.empty(rewards.shape, dtype=torch.float64, device=rewards.device)
        for t in range(rewards.shape[0]):
            self.returns.mul_(self.gamma).add_(rewards[t])
            discounted[t] = self.returns
            self.returns.masked_fill_(ended[t], 0.0)
        self.statistics.update(of_active(discounted, active))
        deviation = (self.statistics.variance + 1e-8).sqrt().to(rewards.dtype)
        return (rewards / deviation).clamp(-self.clip, self.clip)
