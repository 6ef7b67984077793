"""The policy: encoder -> memory -> heads and critic, a pure function of observations and state."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from dualhead.config import NetworkConfig
from dualhead.networks.encoders import Encoder, ObservationSpec, init_layer
from dualhead.networks.heads import ActionSpec, Distribution, Heads
from dualhead.networks.memory import NoMemory, RecurrentMemory
from dualhead.types import Layout, Observations, RecurrentState, SegmentBatch


class PolicyOutput(NamedTuple):
    """Fields:
    distribution: over actions of N (or B) states.
    values: [N] critic.
    """

    distribution: Distribution
    values: Tensor


class RecurrentPolicy(nn.Module):
    """Holds weights and nothing else: the recurrent state comes in and goes out.

    Args:
        observation_spec, action_spec: what it sees and decides.
        config: its shape.
        normalize_observations: keep running statistics of vector observations.
    """

    def __init__(
        self,
        observation_spec: ObservationSpec,
        action_spec: ActionSpec,
        *,
        config: NetworkConfig,
        normalize_observations: bool = False,
    ) -> None:
        super().__init__()
        self.encoder = Encoder(
            observation_spec,
            encoder_sizes=config.encoder_sizes,
            image_encoder=config.image_encoder,
            image_layout=config.image_layout,
            normalize=normalize_observations,
        )
        self.memory: RecurrentMemory | NoMemory
        if config.memory == "none":
            self.memory = NoMemory(self.encoder.num_features, hidden_size=config.hidden_size)
        else:
            self.memory = RecurrentMemory(
                config.memory,
                self.encoder.num_features,
                hidden_size=config.hidden_size,
                num_layers=config.num_layers,
                forget_bias=config.forget_bias,
                orthogonal_per_gate=config.orthogonal_per_gate,
            )
        self.heads = Heads(self.memory.num_features, action_spec, observation_spec.masks)
        self.critic = nn.Linear(self.memory.num_features, 1)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                init_layer(module)
        for head in self.heads.linears:
            init_layer(head, config.head_gain)

    @property
    def dtype(self) -> torch.dtype:
        return self.critic.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.critic.weight.device

    def initial_state(self, batch: int) -> RecurrentState:
        """Zero state [L, batch, H]: the beginning of an episode."""
        return self.memory.initial_state(batch, device=self.device, dtype=self.dtype)

    def _forward_base(
        self, observations: Observations, state: RecurrentState, layout: Layout | None = None
    ) -> tuple[Tensor, RecurrentState]:
        """Encoder and memory: one step of B streams, or N steps of segments where a layout is given."""
        features = self.encoder(observations, self.dtype)
        if layout is None:
            return self.memory.step(features, state)
        return self.memory.unroll(features, state, layout)

    def _output(self, h: Tensor, observations: Observations) -> PolicyOutput:
        return PolicyOutput(self.heads(h, observations), self.critic(h)[:, 0])

    def step(self, observations: Observations, state: RecurrentState) -> tuple[PolicyOutput, RecurrentState]:
        """One time step: leaves [B, ...] and state [L, B, H] -> outputs [B] and the state after the step."""
        h, next_state = self._forward_base(observations, state)
        return self._output(h, observations), next_state

    def unroll(self, observations: Observations, state: RecurrentState, layout: Layout) -> PolicyOutput:
        """Leaves [N, ...] and the states [L, S, H] that segments begin from -> outputs [N].

        Heads and critic are never under autocast.
        """
        h, _ = self._forward_base(observations, state, layout)
        with torch.autocast(self.device.type, enabled=False):
            return self._output(h.to(self.dtype), observations)

    def evaluate(self, segments: SegmentBatch) -> PolicyOutput:
        """All N steps of a minibatch of segments, each from its own state."""
        return self.unroll(segments.observations, segments.state, segments.layout)

    def advance(self, observations: Observations, state: RecurrentState, layout: Layout) -> RecurrentState:
        """State [L, S, H] after the last step of each segment of an unpadded layout."""
        _, final = self._forward_base(observations, state, layout)
        return final

    def values(self, observations: Observations, state: RecurrentState) -> Tensor:
        """V [B] of one observation per stream."""
        h, _ = self._forward_base(observations, state)
        return self.critic(h)[:, 0]
