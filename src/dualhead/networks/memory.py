"""LSTM, GRU and the memoryless control behind one interface.

Acting is the one-step case of training: `step` and `unroll` use the weights of the same `nn.LSTM` / `nn.GRU`.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from dualhead.config import NetworkConfig
from dualhead.networks.linear import Linear
from dualhead.types import Layout, RecurrentState

SEQUENCE_CALL_STREAMS = 32
"""From so many streams on, one step is cheaper as a sequence of length one; below, the cell functions are, on the same
weights (a quarter of the time for one stream)."""


CALL_COST_STEPS, CALL_COST_PRODUCTS = 60.0, 10e6
"""What a recurrent call costs beyond its steps, forward and backward: handling the weights takes as long as some steps
do, whatever their size; the rest is constant time, said as products of weights (measured: docs/performance.md)."""
GRU_STEP_COST = 12.0
"""What a time step of `nn.GRU` costs beside its rows: torch steps through a GRU itself, through an LSTM by oneDNN in
one call (measured: docs/performance.md)."""


class Memory(Protocol):
    """What the policy asks of a recurrent core."""

    num_features: int
    block_cost: float
    """Price of one more recurrent call, in steps; see `learning.segments.lay_out`."""
    step_cost: float
    """Price of one more time step of a recurrent call, in steps."""

    def initial_state(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> RecurrentState:
        """Zeros for `batch` streams: what every episode begins from."""

    def step(self, features: Tensor, state: RecurrentState) -> tuple[Tensor, RecurrentState]:
        """One time step of B streams: features [B, F] -> (h [B, H] of the top layer, next state)."""

    def unroll(self, features: Tensor, state: RecurrentState, layout: Layout) -> tuple[Tensor, RecurrentState]:
        """Segments from the states they begin with: features [N, F], state [L, S, H] -> (h [N, H], final state).

        The final state [L, S, H] is the one after each segment's last step only where the layout has no padding.
        """


class RecurrentMemory(nn.Module):
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
        super().__init__()
        self.kind = kind
        self.num_features = hidden_size
        self.num_layers = num_layers
        if kind == "lstm":
            self.lstm = nn.LSTM(input_size, hidden_size, num_layers, batch_first=True)
        else:
            self.gru = nn.GRU(input_size, hidden_size, num_layers, batch_first=True)
        num_weights = sum(parameter.numel() for parameter in self.cell.parameters())
        self.block_cost = CALL_COST_STEPS + CALL_COST_PRODUCTS / num_weights
        self.step_cost = GRU_STEP_COST if kind == "gru" else 0.0
        self._init_weights(forget_bias, orthogonal_per_gate)

    @property
    def cell(self) -> nn.LSTM | nn.GRU:
        return self.lstm if self.kind == "lstm" else self.gru

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

    def initial_state(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> RecurrentState:
        h = torch.zeros(self.num_layers, batch, self.num_features, device=device, dtype=dtype)
        return RecurrentState(h, torch.zeros_like(h) if self.kind == "lstm" else None)

    def step(self, features: Tensor, state: RecurrentState) -> tuple[Tensor, RecurrentState]:
        if features.shape[0] >= SEQUENCE_CALL_STREAMS:
            # cuDNN refuses states that are not contiguous.
            output, final = self._call(features[:, None], state.map(Tensor.contiguous))
            return output[:, 0], final
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

    def _call(self, features: Tensor, state: RecurrentState) -> tuple[Tensor, RecurrentState]:
        """The recurrent layer on [S, T, F] from a contiguous state: outputs [S, T, H] and the final state."""
        if self.kind == "lstm":
            output, final = self.cell(features, tuple(state))
            return output, RecurrentState(*final)
        output, final = self.cell(features, state.h)
        return output, RecurrentState(final)

    def unroll(self, features: Tensor, state: RecurrentState, layout: Layout) -> tuple[Tensor, RecurrentState]:
        rows = features if layout.padding is None else features.index_select(0, layout.padding)
        outputs, finals = [], []
        segment = 0
        # Not sliced one by one: the gradient of a slice is a whole tensor of zeros around it.
        in_blocks = rows.split([num_segments * num_steps for num_segments, num_steps in layout.blocks])
        for (num_segments, num_steps), block in zip(layout.blocks, in_blocks):
            steps = block.view(num_steps, num_segments, -1)
            begin = state.select(slice(segment, segment + num_segments)).map(Tensor.contiguous)
            output, final = self._call(steps.transpose(0, 1), begin)
            outputs.append(output.transpose(0, 1).reshape(num_steps * num_segments, -1))
            finals.append(final)
            segment += num_segments
        h_rows = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        if layout.real is not None:
            h_rows = h_rows.index_select(0, layout.real)
        return h_rows, RecurrentState.concatenate(finals)


def make_memory(config: NetworkConfig, kind: str, input_size: int) -> Memory:
    """The recurrent core, or memoryless control, that a configuration asks for; an `nn.Module`."""
    if kind == "none":
        return NoMemory(input_size, hidden_size=config.hidden_size)
    return RecurrentMemory(
        kind,
        input_size,
        hidden_size=config.hidden_size,
        num_layers=config.num_layers,
        forget_bias=config.forget_bias,
        orthogonal_per_gate=config.orthogonal_per_gate,
    )


class NoMemory(nn.Module):
    """The memoryless control: features pass through, the state has no units.

    A ReLU layer of the memory's width stands where the recurrent core would, so that the control loses memory and not
    depth.
    """

    def __init__(self, input_size: int, *, hidden_size: int) -> None:
        super().__init__()
        self.num_features = hidden_size
        self.block_cost = self.step_cost = 0.0  # nothing recurrent is called
        self.linear = Linear(input_size, hidden_size)

    def initial_state(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> RecurrentState:
        return RecurrentState(torch.zeros(1, batch, 0, device=device, dtype=dtype))

    def step(self, features: Tensor, state: RecurrentState) -> tuple[Tensor, RecurrentState]:
        return self.linear(features).relu(), state

    def unroll(self, features: Tensor, state: RecurrentState, layout: Layout) -> tuple[Tensor, RecurrentState]:
        return self.linear(features).relu(), state
