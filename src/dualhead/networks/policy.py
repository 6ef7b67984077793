"""The policy: encoder -> memory -> heads and critic, a pure function of observations and state."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dualhead.config import NetworkConfig
from dualhead.networks.encoders import ACTIVATIONS, Encoder, ObservationSpec, init_layer
from dualhead.networks.heads import ActionSpec, Distribution, Heads
from dualhead.networks.memory import Memory, make_memory
from dualhead.networks.previous import PreviousStep
from dualhead.types import Layout, Observations, RecurrentState, SegmentBatch

CRITIC = "critic_"
"""How the names of the state's parts begin that belong to the critic's own memory."""


class PolicyOutput(NamedTuple):
    """Fields:
    distribution: over actions of N (or B) states.
    values: [N] critic.
    """

    distribution: Distribution
    values: Tensor


class Latents(NamedTuple):
    """Fields:
    actor: [N, H] what the action heads see.
    critic: [N, H] what the critic sees; the same tensor where the memory is shared.
    """

    actor: Tensor
    critic: Tensor


class RecurrentPolicy(nn.Module):
    """Holds weights and nothing else: the recurrent state comes in and goes out.

        encoder(observations), previous step -> memory -> actor layers -> heads
                                             `-> the critic's memory, or the same -> critic layers -> critic

    Args:
        observation_spec, action_spec: what it sees and decides.
        config: its shape.
        normalize_observations: keep running statistics of vector observations.

    Raises:
        ValueError: settings do not fit the spaces.
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
            activation=config.activation,
            image_encoder=config.image_encoder,
            image_layout=config.image_layout,
            normalize=normalize_observations,
        )
        self.previous = PreviousStep(action_spec, action=config.previous_action, reward=config.previous_reward)
        taken = [leaf.name for leaf in observation_spec.leaves if leaf.name in self.previous.shapes(torch.float32)]
        if taken:
            raise ValueError(
                f"observation part {taken[0]!r} has the name of the policy's own input: switch off "
                f"previous_action and previous_reward, or rename the part"
            )
        num_inputs = self.encoder.num_features + self.previous.num_features
        self.memory: Memory = make_memory(config, config.memory, num_inputs)
        num_features = self.memory.num_features
        self.actor_layers, num_actor = _layers(num_features, config)
        self.heads = Heads(num_actor, action_spec, observation_spec.masks)
        self.critic_memory: Memory | None = None
        if config.critic_memory != "shared":
            self.critic_memory = make_memory(config, config.critic_memory, num_inputs)
            num_features = self.critic_memory.num_features
        self.critic_layers, num_critic = _layers(num_features, config)
        self.critic = nn.Linear(num_critic, 1)
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

    @property
    def has_memory(self) -> bool:
        """Whether any part of the recurrent state has units."""
        return any(part.shape[-1] for part in self.initial_state(1))

    @property
    def block_cost(self) -> float:
        """Price of one more recurrent call, in steps; see `learning.segments.lay_out`."""
        return max(memory.block_cost for memory in (self.memory, self.critic_memory) if memory is not None)

    @property
    def step_cost(self) -> float:
        """Price of one more time step of a recurrent call, in steps; see `learning.segments.lay_out`."""
        return max(memory.step_cost for memory in (self.memory, self.critic_memory) if memory is not None)

    def initial_state(self, batch: int) -> RecurrentState:
        """Zero state [L, batch, H]: the beginning of an episode."""
        actor = self.memory.initial_state(batch, device=self.device, dtype=self.dtype)
        if self.critic_memory is None:
            return actor
        return _join(actor, self.critic_memory.initial_state(batch, device=self.device, dtype=self.dtype))

    def _forward_base(
        self, observations: Observations, state: RecurrentState, layout: Layout | None = None
    ) -> tuple[Latents, RecurrentState]:
        """Encoder and memories: one step of B streams, or N steps of segments where a layout is given."""
        features = self.encoder(observations, self.dtype)
        if self.previous.num_features:
            features = torch.cat([features, self.previous(observations, self.dtype).to(features.dtype)], dim=1)
        if self.critic_memory is None:
            h, after = _remember(self.memory, features, state, layout)
            return Latents(h, h), after
        of_actor, of_critic = _split(state)
        h, after_actor = _remember(self.memory, features, of_actor, layout)
        v, after_critic = _remember(self.critic_memory, features, of_critic, layout)
        return Latents(h, v), _join(after_actor, after_critic)

    def _output(self, latents: Latents, observations: Observations) -> PolicyOutput:
        distribution = self.heads(self.actor_layers(latents.actor), observations)
        return PolicyOutput(distribution, self._value(latents))

    def _value(self, latents: Latents) -> Tensor:
        return self.critic(self.critic_layers(latents.critic))[:, 0]

    def step(self, observations: Observations, state: RecurrentState) -> tuple[PolicyOutput, RecurrentState]:
        """One time step: leaves [B, ...] and state [L, B, H] -> outputs [B] and the state after the step."""
        latents, next_state = self._forward_base(observations, state)
        return self._output(latents, observations), next_state

    def unroll(self, observations: Observations, state: RecurrentState, layout: Layout) -> PolicyOutput:
        """Leaves [N, ...] and the states [L, S, H] that segments begin from -> outputs [N].

        Heads and critic are never under autocast.
        """
        latents, _ = self._forward_base(observations, state, layout)
        with torch.autocast(self.device.type, enabled=False):
            return self._output(Latents(*(latent.to(self.dtype) for latent in latents)), observations)

    def evaluate(self, segments: SegmentBatch) -> PolicyOutput:
        """All N steps of a minibatch of segments, each from its own state."""
        return self.unroll(segments.observations, segments.state, segments.layout)

    def advance(self, observations: Observations, state: RecurrentState, layout: Layout) -> RecurrentState:
        """State [L, S, H] after the last step of each segment of an unpadded layout."""
        _, final = self._forward_base(observations, state, layout)
        return final

    def values(self, observations: Observations, state: RecurrentState) -> Tensor:
        """V [B] of one observation per stream."""
        latents, _ = self._forward_base(observations, state)
        return self._value(latents)


def _layers(num_features: int, config: NetworkConfig) -> tuple[nn.Sequential, int]:
    """The layers between a memory and its heads, and how many features they give."""
    sizes = [num_features, *config.head_sizes]
    modules: list[nn.Module] = []
    for given, wanted in itertools.pairwise(sizes):
        modules += [nn.Linear(given, wanted), ACTIVATIONS[config.activation]()]
    return nn.Sequential(*modules), sizes[-1]


def _remember(
    memory: Memory, features: Tensor, state: RecurrentState, layout: Layout | None
) -> tuple[Tensor, RecurrentState]:
    return memory.step(features, state) if layout is None else memory.unroll(features, state, layout)


def _join(actor: RecurrentState, critic: RecurrentState) -> RecurrentState:
    """One state of both memories."""
    return RecurrentState(**actor.parts, **{CRITIC + name: part for name, part in critic.parts.items()})


def _split(state: RecurrentState) -> tuple[RecurrentState, RecurrentState]:
    """The state of the policy's memory, and of the critic's."""
    own = {name: part for name, part in state.parts.items() if not name.startswith(CRITIC)}
    critic = {name.removeprefix(CRITIC): part for name, part in state.parts.items() if name.startswith(CRITIC)}
    return RecurrentState(**own), RecurrentState(**critic)
