"""Memories: recurrent cores behind one interface. LSTM, GRU, the memoryless control, and what users bring.

Acting is the one-step case of training: `step` and `unroll` use the same weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from dualhead.config import NetworkConfig
from dualhead.networks.blocks import Blocks, lay_out
from dualhead.networks.linear import Linear
from dualhead.types import IntArray, Plan, RecurrentState

SEQUENCE_CALL_STREAMS = 32
"""From so many streams on, one step is cheaper as a sequence of length one; below, the cell functions are, on the same
weights (a quarter of the time for one stream)."""

CALL_COST_STEPS, CALL_COST_PRODUCTS = 60.0, 10e6
"""What a recurrent call costs beyond its steps, forward and backward: handling the weights takes as long as some steps
do, whatever their size; the rest is constant time, said as products of weights (measured: docs/performance.md)."""
GRU_STEP_COST = 12.0
"""What a time step of `nn.GRU` costs beside its rows: torch steps through a GRU itself, through an LSTM by oneDNN in
one call (measured: docs/performance.md)."""


@runtime_checkable
class Memory(Protocol):
    """What the policy asks of a recurrent core, an `nn.Module`. `MemoryCell` gives all but `step`.

    Attributes:
        num_features: H, width of what `step` and `unroll` return.
    """

    num_features: int

    def initial_state(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> RecurrentState:
        """Zeros [L, batch, ...] in every part: what every episode begins from."""

    def step(self, features: Tensor, state: RecurrentState) -> tuple[Tensor, RecurrentState]:
        """One time step of B streams: features [B, F] -> (outputs [B, H], next state)."""

    def plan(self, lengths: IntArray, *, device: torch.device, final_states: bool = False) -> Plan:
        """How the steps of segments should be packed for `unroll`.

        Args:
            lengths: [S] steps of each segment, from long to short.
            device: where the layout's tensors go.
            final_states: whether the final states of `unroll` will be used, and must be right.
        """

    def unroll(self, features: Tensor, state: RecurrentState, layout: Any) -> tuple[Tensor, RecurrentState]:
        """Segments from the states they begin with, packed as planned.

        Args:
            features: [N, F].
            state: [L, S, ...].
            layout: of the plan.

        Returns:
            outputs [N, H], and the state [L, S, ...] after each segment's last step where the plan was asked for it.
        """


MemoryFactory = Callable[[int, int], nn.Module]
"""Makes a memory from its input size F and the configured `hidden_size`."""


class MemoryCell(nn.Module):
    """A memory that needs only `step`; segments are unrolled by calling it, time step after time step.

        class MyCell(dualhead.MemoryCell):
            def __init__(self, input_size, hidden_size):
                super().__init__(hidden_size, state_shapes={"h": (1, hidden_size)})
                self.cell = nn.RNNCell(input_size, hidden_size)

            def step(self, features, state):
                h = self.cell(features, state.h[0])
                return h, RecurrentState(h=h[None])

    Where a faster call for whole sequences exists, `sequence` is the method to override.

    Args:
        num_features: H, width of the outputs.
        state_shapes: of each part of the state, [L, ...] without the stream axis, which comes second.

    Attributes:
        block_cost: price of one more call of `sequence`, in steps of a stream: padding is bought up to that price.
        step_cost: price of one more time step of such a call, likewise.
    """

    block_cost: float = 0.0
    step_cost: float = 100.0

    def __init__(self, num_features: int, *, state_shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__()
        self.num_features = num_features
        self.state_shapes = dict(state_shapes)

    def initial_state(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> RecurrentState:
        return RecurrentState(
            **{
                name: torch.zeros(layers, batch, *units, device=device, dtype=dtype)
                for name, (layers, *units) in self.state_shapes.items()
            }
        )

    def step(self, features: Tensor, state: RecurrentState) -> tuple[Tensor, RecurrentState]:
        raise NotImplementedError(
            f"{type(self).__name__} needs a method step(features, state) -> (outputs, next state)"
        )

    def sequence(self, features: Tensor, state: RecurrentState) -> tuple[Tensor, RecurrentState]:
        """T time steps of S streams: features [T, S, F] -> (outputs [T, S, H], the state after the last step).

        Steps are taken in full precision, also where the update runs under autocast: the state is.
        """
        outputs = []
        with torch.autocast(features.device.type, enabled=False):
            for now in features.to(torch.promote_types(features.dtype, torch.float32)):
                output, state = self.step(now, state)
                outputs.append(output)
        return torch.stack(outputs), state

    def plan(self, lengths: IntArray, *, device: torch.device, final_states: bool = False) -> Plan:
        if final_states:  # a padded segment's final state comes after its padding
            return lay_out(lengths, block_cost=0.0, device=device)
        return lay_out(lengths, block_cost=self.block_cost, step_cost=self.step_cost, device=device)

    def unroll(self, features: Tensor, state: RecurrentState, layout: Blocks) -> tuple[Tensor, RecurrentState]:
        rows = features if layout.padding is None else features.index_select(0, layout.padding)
        outputs, finals = [], []
        segment = 0
        # Not sliced one by one: the gradient of a slice is a whole tensor of zeros around it.
        in_blocks = rows.split([num_segments * num_steps for num_segments, num_steps in layout.sizes])
        for (num_segments, num_steps), block in zip(layout.sizes, in_blocks):
            begin = state.select(slice(segment, segment + num_segments))
            output, final = self.sequence(block.view(num_steps, num_segments, -1), begin)
            outputs.append(output.reshape(num_steps * num_segments, -1))
            finals.append(final)
            segment += num_segments
        packed = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        if layout.real is not None:
            packed = packed.index_select(0, layout.real)
        return packed, RecurrentState.concatenate(finals)


class RecurrentMemory(MemoryCell):
    """`nn.LSTM` or `nn.GRU` (attribute `lstm` or `gru`).

    Args:
        kind: `lstm` or `gru`.
        input_size, hidden_size, num_layers: F, H, L.
        forget_bias: initial bias of the gate that keeps the past (forget gate of an LSTM, update gate of a GRU).
        orthogonal_per_gate: initialise every gate's [H, ·] matrix orthogonally on its own; else the stacked one.
    """

    def __init__(
        self,
        kind: str,
        input_size: int,
        *,
        hidden_size: int,
        num_layers: int,
        forget_bias: float = 0.0,
        orthogonal_per_gate: bool = False,
    ) -> None:
        names = ("h", "c") if kind == "lstm" else ("h",)
        super().__init__(hidden_size, state_shapes=dict.fromkeys(names, (num_layers, hidden_size)))
        self.kind = kind
        self.num_layers = num_layers
        cell = (nn.LSTM if kind == "lstm" else nn.GRU)(input_size, hidden_size, num_layers, batch_first=True)
        self.add_module(kind, cell)
        num_weights = sum(parameter.numel() for parameter in self.cell.parameters())
        self.block_cost = CALL_COST_STEPS + CALL_COST_PRODUCTS / num_weights
        self.step_cost = GRU_STEP_COST if kind == "gru" else 0.0
        self._init_weights(forget_bias, orthogonal_per_gate)

    @property
    def cell(self) -> nn.LSTM | nn.GRU:
        cell: nn.LSTM | nn.GRU = getattr(self, self.kind)
        return cell

    def _init_weights(self, forget_bias: float, per_gate: bool) -> None:
        hidden = self.num_features
        for name, parameter in self.cell.named_parameters():
            if "weight" in name:
                for matrix in parameter.split(hidden) if per_gate else (parameter,):
                    nn.init.orthogonal_(matrix, 1.0)
            else:
                nn.init.zeros_(parameter)
                # The second of the stacked gates keeps the past: LSTM's i, f, g, o; GRU's r, z, n. One of two biases.
                if name.startswith("bias_ih"):
                    nn.init.constant_(parameter[hidden : 2 * hidden], forget_bias)

    def step(self, features: Tensor, state: RecurrentState) -> tuple[Tensor, RecurrentState]:
        if features.shape[0] >= SEQUENCE_CALL_STREAMS:
            output, final = self.sequence(features[None], state)
            return output[0], final
        x, layers = features, []
        for layer in range(self.num_layers):
            weights = [
                getattr(self.cell, f"{name}_l{layer}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            ]
            before = [part[layer] for part in state]
            after = (
                torch.lstm_cell(x, before, *weights) if self.kind == "lstm" else (torch.gru_cell(x, *before, *weights),)
            )
            x = after[0]
            layers.append(after)
        return x, RecurrentState(*(torch.stack(parts) for parts in zip(*layers)))

    def sequence(self, features: Tensor, state: RecurrentState) -> tuple[Tensor, RecurrentState]:
        parts = [part.contiguous() for part in state]  # cuDNN refuses others
        output, final = self.cell(features.transpose(0, 1), tuple(parts) if self.kind == "lstm" else parts[0])
        return output.transpose(0, 1), RecurrentState(*final) if self.kind == "lstm" else RecurrentState(final)


class NoMemory(MemoryCell):
    """The memoryless control: features pass through, the state has no units.

    A ReLU layer of the memory's width stands where the recurrent core would, so that the control loses memory and not
    depth.
    """

    step_cost = 0.0  # nothing recurrent is called

    def __init__(self, input_size: int, *, hidden_size: int) -> None:
        super().__init__(hidden_size, state_shapes={"h": (1, 0)})
        self.linear = Linear(input_size, hidden_size)

    def step(self, features: Tensor, state: RecurrentState) -> tuple[Tensor, RecurrentState]:
        return self.linear(features).relu(), state

    def unroll(self, features: Tensor, state: RecurrentState, layout: Blocks) -> tuple[Tensor, RecurrentState]:
        return self.step(features, state)


def make_memory(config: NetworkConfig, kind: str, input_size: int) -> MemoryCell:
    """The recurrent core, or memoryless control, that a configuration asks for."""
    if kind == "none":
        return NoMemory(input_size, hidden_size=config.hidden_size)
    if kind not in ("lstm", "gru"):
        raise ValueError(
            f"memory {kind!r} is not one of ours (lstm, gru, none): pass it, memory={kind.rpartition(':')[2]}"
        )
    return RecurrentMemory(
        kind,
        input_size,
        hidden_size=config.hidden_size,
        num_layers=config.num_layers,
        forget_bias=config.forget_bias,
        orthogonal_per_gate=config.orthogonal_per_gate,
    )
