"""Memories that learn without a loop over time: minGRU and LRU, unrolled by a parallel scan with resets inside.

Both are linear in their state, h_t = a_t h_{t-1} + b_t, with a_t and b_t that depend on the input alone. Segments lie
one after another in flat steps [N, ...]; a_t is zero at the first step of each, so nothing crosses from one to the next,
and the state that a segment begins from goes into its b_t.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from dualhead.networks.memory import MemoryCell
from dualhead.types import IntArray, Plan, RecurrentState, on_device

CHUNK = 8
"""Steps that are computed one after another, in all chunks at once: three passes over the data in place of log2(N)."""


class Ends(NamedTuple):
    """Fields:
    first, last: [S] places of each segment's first and last step in the N flat steps.
    """

    first: Tensor
    last: Tensor


class LinearScan(torch.autograd.Function):
    """h_n = a_n h_{n-1} + b_n over the first axis, h_{-1} = 0; real or complex [N, ...].

    The factors must be at most 1 in absolute value: products of many of them then vanish and never overflow.
    Source: Blelloch 1990, "Prefix sums and their applications"; backwards it is the same scan from the last step on.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        h = b.clone(memory_format=torch.contiguous_format)
        _scan(a.clone(memory_format=torch.contiguous_format), h)
        ctx.save_for_backward(a, h)
        return h

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        a, h = ctx.saved_tensors
        grad_b = grads[0].flip(0)
        _scan(a.conj().roll(-1, 0).flip(0).resolve_conj(), grad_b)  # of the first, which wraps around, nothing is read
        grad_b = grad_b.flip(0)
        grad_a = torch.zeros_like(a)
        torch.mul(grad_b[1:], h[:-1].conj(), out=grad_a[1:])
        return grad_a, grad_b


def _scan(a: Tensor, h: Tensor) -> None:
    """h_n += a_n h_{n-1} from the second step on, in place; `a` is overwritten."""
    num_whole = len(h) // CHUNK * CHUNK if len(h) > CHUNK else 0
    if num_whole:
        within, products = h[:num_whole].unflatten(0, (-1, CHUNK)), a[:num_whole].unflatten(0, (-1, CHUNK))
        for step in range(1, CHUNK):
            within[:, step].addcmul_(products[:, step], within[:, step - 1])
            products[:, step].mul_(products[:, step - 1])
        ends = within[:, -1].clone()
        _scan(products[:, -1].clone(), ends)
        within[1:].addcmul_(products[1:], ends[:-1, None])
    for step in range(max(num_whole, 1), len(h)):
        h[step].addcmul_(a[step], h[step - 1])


class ScanCell(MemoryCell):
    """A memory of layers that are scanned; a derived class says what a layer does."""

    num_layers: int

    def plan(self, lengths: IntArray, *, device: torch.device, final_states: bool = False) -> Plan:
        """Segments one after another, without padding."""
        ends = np.cumsum(lengths)
        segment = np.repeat(np.arange(len(lengths)), lengths)
        step = np.arange(len(segment)) - (ends - lengths)[segment]
        first, last = (on_device(torch.from_numpy(places), device) for places in (ends - lengths, ends - 1))
        return Plan(segment, step, Ends(first, last))

    def step(self, features: Tensor, state: RecurrentState) -> tuple[Tensor, RecurrentState]:
        return self._through(features, state, None)

    def unroll(self, features: Tensor, state: RecurrentState, layout: Ends) -> tuple[Tensor, RecurrentState]:
        return self._through(features, state, layout)

    def _through(self, x: Tensor, state: RecurrentState, ends: Ends | None) -> tuple[Tensor, RecurrentState]:
        raise NotImplementedError


class MinGRU(ScanCell):
    """minGRU: a GRU whose gate and candidate do not see the state.

        z_t = sigmoid(W_z x_t + b_z),  h_t = (1 - z_t) h_{t-1} + z_t (W_h x_t + b_h)

    Every h_t is a weighted mean of candidates, and the scan multiplies numbers between 0 and 1: that is safe without
    the paper's log space, whose candidates would have to be positive.

    Args:
        input_size, hidden_size, num_layers: F, H, L.
        forget_bias: added to the gate that keeps the past, 1 - z.

    Source: Feng et al. 2024, arXiv:2410.01201, section 3.1.
    """

    def __init__(self, input_size: int, *, hidden_size: int, num_layers: int, forget_bias: float = 0.0) -> None:
        super().__init__(hidden_size, state_shapes={"h": (num_layers, hidden_size)})
        self.layers = nn.ModuleList(
            nn.Linear(input_size if layer == 0 else hidden_size, 2 * hidden_size) for layer in range(num_layers)
        )
        for layer in self.layers:
            for matrix in layer.weight.split(hidden_size):
                nn.init.orthogonal_(matrix)
            nn.init.zeros_(layer.bias)
            nn.init.constant_(layer.bias[:hidden_size], -forget_bias)

    def _through(self, x: Tensor, state: RecurrentState, ends: Ends | None) -> tuple[Tensor, RecurrentState]:
        after = []
        for layer, before in zip(self.layers, state.h):
            gate, candidate = layer(x).to(before.dtype).chunk(2, dim=1)
            written, kept = gate.sigmoid() * candidate, (-gate).sigmoid()
            if ends is None:
                x = kept * before + written
                after.append(x)
            else:
                x = scan_segments(kept, written, before, ends)
                after.append(x[ends.last])
        return x, RecurrentState(torch.stack(after))


class LRU(ScanCell):
    """The linear recurrent unit: a complex diagonal state, in blocks with layer norm, gate and skip connection.

        s_t = λ s_{t-1} + γ (B u_t),  y_t = Re(C s_t) + D u_t,  λ = exp(-exp(ν) + i exp(θ))
        block(x) = x + GLU(GELU(y)),  u = LayerNorm(x)

    |λ| < 1 whatever ν is. The state is kept as two real parts, `re` and `im`.

    Args:
        input_size, hidden_size, num_layers: F, H (also the number of complex units), L blocks.

    Source: Orvieto et al. 2023, arXiv:2303.06349, section 3 and appendix A.
    """

    SMALLEST, GREATEST = 0.0, 0.99
    """Between which |λ| lies at the start, uniform on the ring."""

    def __init__(self, input_size: int, *, hidden_size: int, num_layers: int) -> None:
        super().__init__(
            hidden_size, state_shapes={"re": (num_layers, hidden_size), "im": (num_layers, hidden_size)}
        )
        self.project = nn.Linear(input_size, hidden_size)
        self.blocks = nn.ModuleList(LRUBlock(hidden_size, self.SMALLEST, self.GREATEST) for _ in range(num_layers))

    def _through(self, x: Tensor, state: RecurrentState, ends: Ends | None) -> tuple[Tensor, RecurrentState]:
        x = self.project(x)
        after: list[tuple[Tensor, Tensor]] = []
        for block, re, im in zip(self.blocks, *state):
            x, re, im = block(x, re, im, ends)
            after.append((re, im))
        return x, RecurrentState(**dict(zip(("re", "im"), map(torch.stack, zip(*after)))))


class LRUBlock(nn.Module):
    """One block of `LRU`; see there."""

    def __init__(self, size: int, smallest: float, greatest: float) -> None:
        super().__init__()
        squared = smallest**2 + torch.rand(size) * (greatest**2 - smallest**2)
        self.nu_log = nn.Parameter((-0.5 * squared.log()).log())
        self.theta_log = nn.Parameter((torch.rand(size) * 2 * math.pi).log())
        self.gamma_log = nn.Parameter(0.5 * (1 - squared).log())
        self.norm = nn.LayerNorm(size)
        self.B = nn.Linear(size, 2 * size, bias=False)
        self.C = nn.Linear(2 * size, size, bias=False)
        self.D = nn.Parameter(torch.randn(size))
        self.gate = nn.Linear(size, 2 * size)
        nn.init.normal_(self.B.weight, std=(2 * size) ** -0.5)
        nn.init.normal_(self.C.weight, std=size**-0.5)

    def forward(self, x: Tensor, re: Tensor, im: Tensor, ends: Ends | None) -> tuple[Tensor, Tensor, Tensor]:
        decay, angle = (-self.nu_log.exp()).exp(), self.theta_log.exp()
        factor_re, factor_im = decay * angle.cos(), decay * angle.sin()
        u = self.norm(x)
        in_re, in_im = (self.B(u).to(re.dtype) * self.gamma_log.exp().repeat(2)).chunk(2, dim=1)
        if ends is None:
            re, im = factor_re * re - factor_im * im + in_re, factor_re * im + factor_im * re + in_im
            states = after = (re, im)
        else:
            factors = torch.complex(factor_re, factor_im).expand(len(x), -1)
            scanned = scan_segments(factors, torch.complex(in_re, in_im), torch.complex(re, im), ends)
            states = (scanned.real, scanned.imag)
            after = (scanned.real[ends.last], scanned.imag[ends.last])
        y = self.C(torch.cat(states, dim=1)) + self.D * u
        return x + nn.functional.glu(self.gate(nn.functional.gelu(y)), dim=1), *after


def scan_segments(factors: Tensor, inputs: Tensor, before: Tensor, ends: Ends) -> Tensor:
    """States [N, H] of segments that lie one after another.

    Args:
        factors, inputs: a and b of each step, [N, H].
        before: [S, H] states that the segments begin from.
        ends: where the segments are.
    """
    inputs = inputs.index_add(0, ends.first, factors[ends.first] * before)
    result: Tensor = LinearScan.apply(factors.index_fill(0, ends.first, 0), inputs)
    return result
