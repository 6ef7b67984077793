"""What the agent did and earned one step before, as inputs of the policy."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from dualhead.spaces import ActionSpec
from dualhead.types import Observations

PREVIOUS_ACTION = "previous/action"
PREVIOUS_REWARD = "previous/reward"
NO_ACTION = -1
"""Stands in `previous/action` of discrete heads where no action came before: every one-hot code is then zero."""


class PreviousStep(nn.Module):
    """R2D2's further inputs: the action and reward of the step before, both zero at an episode's first step.

    They travel as two more leaves of an observation, so rollouts, minibatches, burn-in and checkpoints need not know of
    them:

        previous/action   [N, K] int64 head indices, or −1; of a Box [N, D] actions in the policy's units, clipped where
                          the environment clips them, or 0
        previous/reward   [N] the task's reward as it was recorded: neither scaled nor with guilt

    Args:
        spec: of the actions.
        action, reward: which of the two the policy sees.

    Attributes:
        num_features: width of what `forward` returns; 0 where neither is seen.

    Source: Kapturowski et al. 2019 (R2D2) §2.3: the LSTM sees encoder features, previous action and previous reward.
    """

    bounded: Tensor
    head_of: Tensor
    choice_of: Tensor

    def __init__(self, spec: ActionSpec, *, action: bool, reward: bool) -> None:
        super().__init__()
        self.sees_action, self.sees_reward = action, reward
        self.is_continuous = spec.is_continuous
        self.num_columns = spec.num_columns
        width = spec.num_columns if spec.is_continuous else sum(spec.nvec)
        self.num_features = action * width + reward
        heads = np.arange(len(spec.nvec)).repeat(spec.nvec)
        choices = np.concatenate([np.arange(n) for n in spec.nvec]) if spec.nvec else np.zeros(0, np.int64)
        buffers = {"head_of": heads, "choice_of": choices}
        buffers["bounded"] = spec.bounded if spec.is_continuous else np.zeros(0, bool)
        for name, array in buffers.items():
            self.register_buffer(name, torch.from_numpy(np.ascontiguousarray(array)), persistent=False)

    def shapes(self, dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape of one stream's entry and dtype of each leaf."""
        leaves: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        if self.sees_action:
            leaves[PREVIOUS_ACTION] = ((self.num_columns,), dtype if self.is_continuous else torch.int64)
        if self.sees_reward:
            leaves[PREVIOUS_REWARD] = ((), dtype)
        return leaves

    def nothing(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> Observations:
        """Leaves of `batch` streams at an episode's first step."""
        return {
            name: torch.full((batch, *shape), self._blank(name), dtype=leaf_dtype, device=device)
            for name, (shape, leaf_dtype) in self.shapes(dtype).items()
        }

    def after(self, actions: Tensor, rewards: Tensor) -> Observations:
        """Leaves of the step that follows.

        Args:
            actions: [B, K] head indices, or [B, D] in the policy's units before clipping.
            rewards: [B] of the task.
        """
        leaves = {}
        if self.sees_action:
            leaves[PREVIOUS_ACTION] = (
                torch.where(self.bounded, actions.clamp(-1.0, 1.0), actions) if self.is_continuous else actions.clone()
            )
        if self.sees_reward:
            leaves[PREVIOUS_REWARD] = rewards.clone()
        return leaves

    def reset_where(self, leaves: Observations, mask: Tensor) -> Observations:
        """Blank leaves in the streams where `mask` [B] is true."""
        return {
            name: leaf.masked_fill(mask if leaf.dim() == 1 else mask[:, None], self._blank(name))
            for name, leaf in leaves.items()
        }

    def _blank(self, name: str) -> int:
        return NO_ACTION if name == PREVIOUS_ACTION and not self.is_continuous else 0

    def forward(self, observations: Observations, dtype: torch.dtype) -> Tensor:
        """Features [N, num_features]: one-hot codes of the heads side by side (or the D numbers), then the reward."""
        parts = []
        if self.sees_action:
            action = observations[PREVIOUS_ACTION]
            parts.append(action if self.is_continuous else action[:, self.head_of] == self.choice_of)
        if self.sees_reward:
            parts.append(observations[PREVIOUS_REWARD][:, None])
        return torch.cat([part.to(dtype) for part in parts], dim=1)
