"""The policy: encoder -> memory -> heads and critic, a pure function of observations and state."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from dualhead.config import NetworkConfig
from dualhead.networks.encoders import (
    EncoderFactory,
    JoinedEncoder,
    ObservationNormalizer,
    PreviousStep,
    init_layers,
    joining_layers,
    vectors,
)
from dualhead.networks.heads import Distribution, Heads
from dualhead.networks.memory import Memory, MemoryCell, MemoryFactory, NoMemory, RecurrentMemory
from dualhead.networks.parts import CRITIC, check_encoder, check_memory, make_part, part_name
from dualhead.networks.scan import BLOCKS, ScanMemory
from dualhead.spaces import ActionSpec, ObservationSpec, torch_dtype
from dualhead.types import IntArray, Observations, Plan, RecurrentState, SegmentBatch, on_device


class PolicyOutput(NamedTuple):
    distribution: Distribution  # over actions of N (or B) states
    values: Tensor  # [N], the critic's


class Latents(NamedTuple):
    actor: Tensor  # [N, H], what the action heads see
    critic: Tensor  # [N, H], what the critic sees: the same tensor where the memory is shared


class _TwoLayouts(NamedTuple):
    actor: Any = None
    critic: Any = None
    rows: tuple[Tensor, ...] | None = None  # where they differ: the actor's row of each row of the critic's, and back


class RecurrentPolicy(nn.Module):
    """Holds weights and nothing else: the recurrent state comes in and goes out.

        encoder(observations), previous step -> memory -> actor layers -> heads
                                             `-> the critic's memory, or the same -> critic layers -> critic

    `encoder` and `memory` are parts of the user's own, or factories of them, in place of those that `config` describes;
    they initialise their own weights.

    Raises:
        TypeError: an encoder or memory without the methods that are needed.
        ValueError: settings do not fit the spaces, or a part does not do what it should.
    """

    def __init__(
        self,
        observation_spec: ObservationSpec,
        action_spec: ActionSpec,
        *,
        config: NetworkConfig,
        normalize_observations: bool = False,
        encoder: nn.Module | EncoderFactory | None = None,
        memory: nn.Module | MemoryFactory | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        image_encoder = config.image_encoder if encoder is None else "auto"
        scaled = vectors(observation_spec, image_encoder) if normalize_observations else []
        if encoder is not None:  # integers may be indices
            scaled = [leaf for leaf in scaled if torch_dtype(leaf.space.dtype).is_floating_point]
        self.normalizer = ObservationNormalizer(scaled)
        self.previous = PreviousStep(action_spec, action=config.previous_action, reward=config.previous_reward)
        taken = [leaf.name for leaf in observation_spec.leaves if leaf.name in self.previous.shapes(torch.float32)]
        if taken:
            raise ValueError(
                f"observation part {taken[0]!r} has the name of the policy's own input: switch off "
                f"previous_action and previous_reward, or rename the part"
            )
        self.encoder: Any
        if encoder is None:
            self.encoder = JoinedEncoder(observation_spec, config)
        else:
            self.encoder = make_part(encoder, "encoder", observation_spec.space)
            check_encoder(self.encoder, observation_spec)
        num_inputs = self.encoder.num_features + self.previous.num_features
        self.memory: Any
        if memory is None:
            self.memory = _make_memory(config, config.memory, num_inputs)
        else:
            self.memory = make_part(memory, "memory", num_inputs, config.hidden_size)
            check_memory(self.memory, num_inputs)
        sizes = [self.memory.num_features, *config.head_sizes]
        self.actor_layers = joining_layers(sizes, config.activation)
        self.heads = Heads(sizes[-1], action_spec, observation_spec.masks)
        self.critic_memory: Any = None
        if config.critic_memory != "shared":
            self.critic_memory = _make_memory(config, config.critic_memory, num_inputs)
            sizes = [self.critic_memory.num_features, *config.head_sizes]
        self.critic_layers = joining_layers(sizes, config.activation)
        self.critic = nn.Linear(sizes[-1], 1)
        foreign = {"encoder": encoder is not None, "memory": memory is not None}
        for name, part in self.named_children():
            if not foreign.get(name) and not isinstance(part, ScanMemory):  # those initialise their own layers
                init_layers(part)
        for head in self.heads.linears:
            init_layers(head, config.head_gain)
        if self.heads.box_sizes:
            nn.init.constant_(self.heads.log_std, config.log_std_init)
        self.foreign_parts = {name: part_name(getattr(self, name)) for name in foreign if foreign[name]}

    @property
    def dtype(self) -> torch.dtype:
        return self.critic.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.critic.weight.device

    def trainable(self) -> dict[str, nn.Parameter]:
        """The weights that learn, by name: all but those that a user's own part has frozen."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def plan(self, lengths: IntArray, *, final_states: bool = False) -> Plan:
        """How `unroll` (with `final_states`: `advance`) wants segments of `lengths` [S], from long to short, packed."""
        plan = self.memory.plan(lengths, device=self.device, final_states=final_states)
        if self.critic_memory is None:
            return plan
        own = self.critic_memory.plan(lengths, device=self.device, final_states=final_states)
        rows = None
        if not (np.array_equal(plan.segment, own.segment) and np.array_equal(plan.step, own.step)):
            ours, theirs = (np.lexsort((packing.step, packing.segment)) for packing in (plan, own))
            to_critic, from_critic = np.empty_like(ours), np.empty_like(ours)
            to_critic[theirs], from_critic[ours] = ours, theirs
            rows = tuple(on_device(torch.from_numpy(each), self.device) for each in (to_critic, from_critic))
        return plan._replace(layout=_TwoLayouts(plan.layout, own.layout, rows))

    def initial_state(self, batch: int) -> RecurrentState:
        """Zero state [L, batch, H]: the beginning of an episode."""
        actor = self.memory.initial_state(batch, device=self.device, dtype=self.dtype)
        if self.critic_memory is None:
            return actor
        return _join(actor, self.critic_memory.initial_state(batch, device=self.device, dtype=self.dtype))

    def _forward_base(
        self, observations: Observations, state: RecurrentState, layout: Any = None
    ) -> tuple[Latents, RecurrentState]:
        """Encoder and memories: one step of B streams, or N steps of segments where a layout is given."""
        features = self.encoder(self.normalizer(observations, self.dtype))
        if self.previous.num_features:
            features = torch.cat([features, self.previous(observations, self.dtype).to(features.dtype)], dim=1)
        if self.critic_memory is None:
            h, after = _remember(self.memory, features, state, layout)
            return Latents(h, h), after
        of_actor, of_critic = _split(state)
        layouts = layout or _TwoLayouts()
        h, after_actor = _remember(self.memory, features, of_actor, layouts.actor)
        if layouts.rows is not None:
            features = features[layouts.rows[0]]
        v, after_critic = _remember(self.critic_memory, features, of_critic, layouts.critic)
        if layouts.rows is not None:
            v = v[layouts.rows[1]]
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

    def unroll(self, observations: Observations, state: RecurrentState, layout: Any) -> PolicyOutput:
        """Leaves [N, ...] and the states [L, S, H] that segments begin from -> outputs [N].

        Heads and critic are never under autocast.
        """
        latents, _ = self._forward_base(observations, state, layout)
        with torch.autocast(self.device.type, enabled=False):
            return self._output(Latents(*(latent.to(self.dtype) for latent in latents)), observations)

    def evaluate(self, segments: SegmentBatch) -> PolicyOutput:
        """All N steps of a minibatch of segments, each from its own state."""
        return self.unroll(segments.observations, segments.state, segments.layout)

    def advance(self, observations: Observations, state: RecurrentState, layout: Any) -> RecurrentState:
        """State [L, S, H] after the last step of each segment, packed by a plan with `final_states`."""
        return self._forward_base(observations, state, layout)[1]

    def values(self, observations: Observations, state: RecurrentState) -> Tensor:
        """V [B] of one observation per stream."""
        return self._value(self._forward_base(observations, state)[0])


def _remember(memory: Memory, features: Tensor, state: RecurrentState, layout: Any) -> tuple[Tensor, RecurrentState]:
    return memory.step(features, state) if layout is None else memory.unroll(features, state, layout)


def _join(actor: RecurrentState, critic: RecurrentState) -> RecurrentState:
    """One state of both memories."""
    return RecurrentState(**actor.parts, **{CRITIC + name: part for name, part in critic.parts.items()})


def _split(state: RecurrentState) -> tuple[RecurrentState, RecurrentState]:
    """The state of the policy's memory, and of the critic's."""
    own = {name: part for name, part in state.parts.items() if not name.startswith(CRITIC)}
    critic = {name.removeprefix(CRITIC): part for name, part in state.parts.items() if name.startswith(CRITIC)}
    return RecurrentState(**own), RecurrentState(**critic)


def _make_memory(config: NetworkConfig, kind: str, input_size: int) -> MemoryCell:
    """The recurrent core, or memoryless control, that a configuration asks for."""
    if kind == "none":
        return NoMemory(input_size, hidden_size=config.hidden_size)
    settings = config.model_dump(include={"hidden_size", "num_layers", "forget_bias"})
    if kind in BLOCKS:
        return ScanMemory(kind, input_size, **settings)
    if kind not in ("lstm", "gru"):
        raise ValueError(
            f"memory {kind!r} is not one of ours (lstm, gru, {', '.join(BLOCKS)}, none): pass it, "
            f"memory={kind.rpartition(':')[2]}"
        )
    return RecurrentMemory(kind, input_size, orthogonal_per_gate=config.orthogonal_per_gate, **settings)
