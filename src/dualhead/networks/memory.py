"""Memories: recurrent cores behind one interface. LSTM, GRU, the memoryless control, and what users bring.

Acting is the one-step case of training: `step` and `unroll` use the same weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from dualhead.networks.linear import Linear
from dualhead.types import IntArray, Plan, RecurrentState, on_device

SEQUENCE_CALL_STREAMS = 32
"""From so many streams on, a step is cheaper as a sequence of length one; below, as a call of the cell function."""
CALL_COST_STEPS, CALL_COST_PRODUCTS = 60.0, 10e6
"""What a recurrent call costs beyond its steps, forward and backward: as much as so many steps, plus the constant time
of so many products of weights (measured: docs/performance.md)."""
GRU_STEP_COST = 12.0
"""What a time step of `nn.GRU` costs beside its rows, in steps (likewise); an LSTM runs in one oneDNN call."""


@runtime_checkable
class Memory(Protocol):
    """What the policy asks of a recurrent core, an `nn.Module`. `MemoryCell` has all but `step`."""

    num_features: int  # H, width of what `step` and `unroll` return

    def initial_state(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> RecurrentState:
        """Zeros [L, batch, ...] in every part: what every episode begins from."""

    def step(self, features: Tensor, state: RecurrentState) -> tuple[Tensor, RecurrentState]:
        """One time step of B streams: features [B, F] -> (outputs [B, H], next state)."""

    def plan(self, lengths: IntArray, *, device: torch.device, final_states: bool = False) -> Plan:
        """How to pack the steps of segments of `lengths` [S], from long to short, for `unroll`, whose returned state
        must be right if `final_states`."""

    def unroll(self, features: Tensor, state: RecurrentState, layout: Any) -> tuple[Tensor, RecurrentState]:
        """Features [N, F], packed as planned, and the states [L, S, ...] that segments begin with -> outputs [N, H] and
        the state after each segment's last step. `layout` is the plan's."""


MemoryFactory = Callable[[int, int], nn.Module]
"""Makes a memory from its input size F and the configured `hidden_size`."""


class Blocks(NamedTuple):
    """Where the N packed steps of S segments lie in dense blocks, for recurrent calls on [steps, segments] at once.

    Steps lie block after block, time-major inside a block. Where the segments of a block are not equally long, the rows
    past a segment's end are padding, which only the recurrent call sees.
    """

    sizes: tuple[tuple[int, int], ...]  # (segments, steps) of each; segments follow one another in the state
    padding: Tensor | None = None  # [rows] which of the N steps fills each row, padding too; None: there is none
    real: Tensor | None = None  # [N] the rows that are real steps


def lay_out(
    lengths: IntArray, *, block_cost: float, step_cost: float = 0.0, device: torch.device | str = "cpu"
) -> Plan:
    """The cheapest plan of dense blocks for segments of `lengths` [S], sorted from long to short.

    Padding is bought up to `block_cost`, the price of one more recurrent call in steps; 0 gives one block per distinct
    length. `step_cost` is the price of one more time step of a block beside its segments' steps.
    """
    assert (lengths[1:] <= lengths[:-1]).all(), "segments must come from long to short"
    blocks = _cheapest_blocks(lengths, block_cost, step_cost)
    packed = []
    num_rows = first = 0
    for num_segments, num_steps in blocks:
        step, which = np.nonzero(np.arange(num_steps)[:, None] < lengths[first : first + num_segments])
        packed.append((which + first, step, num_rows + step * num_segments + which))
        num_rows += num_segments * num_steps
        first += num_segments
    segment, step, real = (np.concatenate(parts) for parts in zip(*packed))
    if num_rows == len(real):
        return Plan(segment, step, Blocks(tuple(blocks)))
    padding = np.zeros(num_rows, dtype=np.int64)
    padding[real] = np.arange(len(real))
    rows = (on_device(torch.from_numpy(rows), torch.device(device)) for rows in (padding, real))
    return Plan(segment, step, Blocks(tuple(blocks), *rows))


def _cheapest_blocks(lengths: IntArray, block_cost: float, step_cost: float) -> list[tuple[int, int]]:
    """Blocks (segments, steps) of the least cost, by dynamic programming over groups of equal length.

    The cheapest way to lay out the first j groups ends with one block over groups i + 1 .. j:

        cost(j) = min_i cost(i) + block_cost + longest(i + 1) · (step_cost + segments(i + 1 .. j))
    """
    first = np.flatnonzero(np.diff(lengths, prepend=lengths[0] + 1))
    longest, ends = lengths[first], np.append(first, len(lengths))
    cost, chosen = np.zeros(len(ends)), np.zeros(len(ends), dtype=np.int64)
    for j in range(1, len(ends)):
        candidates = cost[:j] + block_cost + longest[:j] * (step_cost + ends[j] - ends[:j])
        chosen[j] = candidates.argmin()
        cost[j] = candidates[chosen[j]]
    blocks = []
    j = len(ends) - 1
    while j > 0:
        i = chosen[j]
        blocks.append((int(ends[j] - ends[i]), int(longest[i])))
        j = i
    return blocks[::-1]


class MemoryCell(nn.Module):
    """A memory that needs only `step`; segments are unrolled by calling it, time step after time step.

        class MyCell(dualhead.MemoryCell):
            def __init__(self, input_size, hidden_size):
                super().__init__(hidden_size, state_shapes={"h": (1, hidden_size)})
                self.cell = nn.RNNCell(input_size, hidden_size)

            def step(self, features, state):
                h = self.cell(features, state.h[0])
                return h, RecurrentState(h=h[None])

    Override `sequence` where a faster call for whole sequences exists.

    Args:
        num_features: H, width of the outputs.
        state_shapes: of each part of the state, [L, ...] without the stream axis, which comes second.
    """

    block_cost: float = 0.0  # prices of one more call of `sequence`, and of one more time step of it; see `lay_out`
    step_cost: float = 100.0

    def __init__(self, num_features: int, *, state_shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__()
        for name, shape in state_shapes.items():
            if not isinstance(shape, tuple | list) or not shape:
                raise ValueError(
                    f"state_shapes[{name!r}]: expected the shape (layers, ...) without the stream axis, got {shape!r}"
                )
        self.num_features = num_features
        self.state_shapes = dict(state_shapes)

    def initial_state(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> RecurrentState:
        shapes = {name: (layers, batch, *units) for name, (layers, *units) in self.state_shapes.items()}
        return RecurrentState(**{name: torch.zeros(each, device=device, dtype=dtype) for name, each in shapes.items()})

    def step(self, features: Tensor, state: RecurrentState) -> tuple[Tensor, RecurrentState]:
        raise NotImplementedError(
            f"{type(self).__name__} needs a method step(features, state) -> (outputs, next state)"
        )

    def sequence(self, features: Tensor, state: RecurrentState) -> tuple[Tensor, RecurrentState]:
        """T time steps of S streams: features [T, S, F] -> (outputs [T, S, H], the state after the last step).

        Calls `step` in full precision, also where the update runs under autocast: the state is in full precision.
        """
        outputs = []
        with torch.autocast(features.device.type, enabled=False):
            for now in features.to(torch.promote_types(features.dtype, torch.float32)):
                output, state = self.step(now, state)
                outputs.append(output)
        return torch.stack(outputs), state

    def plan(self, lengths: IntArray, *, device: torch.device, final_states: bool = False) -> Plan:
        if final_states:  # no padding, which a segment's final state would come after
            return lay_out(lengths, block_cost=0.0, device=device)
        return lay_out(lengths, block_cost=self.block_cost, step_cost=self.step_cost, device=device)

    def unroll(self, features: Tensor, state: RecurrentState, layout: Blocks) -> tuple[Tensor, RecurrentState]:
        rows = features if layout.padding is None else features.index_select(0, layout.padding)
        outputs, finals = [], []
        first = 0
        # One split: the gradient of each slice would be a whole tensor of zeros around it.
        in_blocks = rows.split([num_segments * num_steps for num_segments, num_steps in layout.sizes])
        for (num_segments, num_steps), block in zip(layout.sizes, in_blocks):
            begin = state.select(slice(first, first + num_segments))
            output, final = self.sequence(block.view(num_steps, num_segments, -1), begin)
            outputs.append(output.reshape(num_steps * num_segments, -1))
            finals.append(final)
            first += num_segments
        packed = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        if layout.real is not None:
            packed = packed.index_select(0, layout.real)
        return packed, RecurrentState.concatenate(finals)


class RecurrentMemory(MemoryCell):
    """`nn.LSTM` or `nn.GRU` (attribute `lstm` or `gru`). `NetworkConfig` describes the arguments."""

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
        self.block_cost = CALL_COST_STEPS + CALL_COST_PRODUCTS / sum(weight.numel() for weight in cell.parameters())
        self.step_cost = GRU_STEP_COST if kind == "gru" else 0.0
        for name, parameter in cell.named_parameters():
            if "weight" in name:
                for matrix in parameter.split(hidden_size) if orthogonal_per_gate else (parameter,):
                    nn.init.orthogonal_(matrix, 1.0)
            else:
                nn.init.zeros_(parameter)
                # The second of the stacked gates keeps the past: LSTM's i, f, g, o; GRU's r, z, n. One of two biases.
                if name.startswith("bias_ih"):
                    nn.init.constant_(parameter[hidden_size : 2 * hidden_size], forget_bias)

    @property
    def cell(self) -> Any:
        return getattr(self, self.kind)

    def step(self, features: Tensor, state: RecurrentState) -> tuple[Tensor, RecurrentState]:
        if features.shape[0] >= SEQUENCE_CALL_STREAMS:
            output, final = self.sequence(features[None], state)
            return output[0], final
        x, layers, cell = features, [], self.cell
        for layer in range(self.num_layers):
            weights = [getattr(cell, f"{name}_l{layer}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
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
    """The memoryless control: a ReLU layer in place of the recurrent core, so it lacks memory but not depth."""

    step_cost = 0.0  # nothing recurrent is called

    def __init__(self, input_size: int, *, hidden_size: int) -> None:
        super().__init__(hidden_size, state_shapes={"h": (1, 0)})
        self.linear = Linear(input_size, hidden_size)

    def step(self, features: Tensor, state: RecurrentState) -> tuple[Tensor, RecurrentState]:
        return self.linear(features).relu(), state

    def unroll(self, features: Tensor, state: RecurrentState, layout: Blocks) -> tuple[Tensor, RecurrentState]:
        return self.step(features, state)
