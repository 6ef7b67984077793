"""Memories that learn without a loop over time: minGRU and LRU, unrolled by a parallel scan with resets inside.

Both are linear in their state, h_t = a_t h_{t-1} + b_t, with a_t and b_t that depend on the input alone. Segments lie
one after another in flat steps [N, ...]. a_t is zero at the first step of each segment, so nothing crosses from one to
the next; the state that a segment begins from goes into its first b_t.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from dualhead.networks.linear import Linear
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


class MinGRUBlock(nn.Module):
    """minGRU, a GRU whose gate and candidate do not see the state, with an output gate and a skip connection.

        z_t = sigmoid(W_z u_t + b_z),  h_t = (1 - z_t) h_{t-1} + z_t (W_h u_t + b_h),  u = LayerNorm(x)
        block(x) = x + h * SiLU(W_o u + b_o)

    Each h_t is a weighted mean of candidates, and the scan multiplies numbers between 0 and 1. That is safe without the
    paper's log space, whose candidates have to be positive.

    At the start the units keep their content for 1 to `SLOWEST` steps, uniform on a log scale: alike units would forget
    alike. `forget_bias` is added to the gate 1 - z.

    Source: Feng et al. 2024, arXiv:2410.01201, section 3.1; time scales: Tallec and Ollivier 2018, arXiv:1804.11188.
    """

    parts = ("h",)
    SLOWEST = 64.0

    def __init__(self, size: int, *, forget_bias: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(size)
        self.linear = Linear(size, 3 * size)
        for matrix in self.linear.weight.split(size):
            nn.init.orthogonal_(matrix)
        nn.init.zeros_(self.linear.bias)
        steps_kept = self.SLOWEST ** torch.rand(size)
        with torch.no_grad():
            self.linear.bias[:size] = -steps_kept.log() - forget_bias

    def forward(self, x: Tensor, h: Tensor, ends: Ends | None) -> tuple[Tensor, Tensor]:
        gate, candidate, shown = self.linear(self.norm(x)).to(h.dtype).chunk(3, dim=1)
        kept, written = (-gate).sigmoid(), gate.sigmoid() * candidate
        h = kept * h + written if ends is None else scan_segments(kept, written, h, ends)
        return x + h * nn.functional.silu(shown), h if ends is None else h[ends.last]


class LRUBlock(nn.Module):
    """The linear recurrent unit: a complex diagonal state, with layer norm, gated output and skip connection.

        s_t = λ s_{t-1} + γ (B u_t),  y_t = Re(C s_t) + D u_t,  λ = exp(-exp(ν) + i exp(θ)),  u = LayerNorm(x)
        block(x) = x + GLU(W GELU(y) + b)

    |λ| < 1 whatever ν is. λ begins uniform on the ring between the radii `SMALLEST` and `GREATEST`: units keep their
    content for 10 to 1,000 steps. The state is kept as two real parts, `re` and `im`. `forget_bias` means nothing here.

    Source: Orvieto et al. 2023, arXiv:2303.06349, section 3 and appendix A.
    """

    parts = ("re", "im")
    SMALLEST, GREATEST = 0.9, 0.999

    def __init__(self, size: int, *, forget_bias: float) -> None:
        super().__init__()
        squared = self.SMALLEST**2 + torch.rand(size) * (self.GREATEST**2 - self.SMALLEST**2)
        self.nu_log = nn.Parameter((-0.5 * squared.log()).log())
        self.theta_log = nn.Parameter((torch.rand(size) * 2 * math.pi).log())
        self.gamma_log = nn.Parameter(0.5 * (1 - squared).log())
        self.norm = nn.LayerNorm(size)
        self.B = nn.Linear(size, 2 * size, bias=False)
        self.C = nn.Linear(2 * size, size, bias=False)
        self.D = nn.Parameter(torch.randn(size))
        self.gate = Linear(size, 2 * size)
        nn.init.normal_(self.B.weight, std=(2 * size) ** -0.5)
        nn.init.normal_(self.C.weight, std=size**-0.5)
        nn.init.orthogonal_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)

    def forward(self, x: Tensor, re: Tensor, im: Tensor, ends: Ends | None) -> tuple[Tensor, Tensor, Tensor]:
        decay, angle = (-self.nu_log.exp()).exp(), self.theta_log.exp()
        factor_re, factor_im = decay * angle.cos(), decay * angle.sin()
        u = self.norm(x)
        written_re, written_im = (self.B(u).to(re.dtype) * self.gamma_log.exp().repeat(2)).chunk(2, dim=1)
        if ends is None:
            re, im = factor_re * re - factor_im * im + written_re, factor_re * im + factor_im * re + written_im
            y = torch.cat([re, im], dim=1)
        else:
            factors = torch.complex(factor_re, factor_im).expand(len(x), -1)
            states = scan_segments(factors, torch.complex(written_re, written_im), torch.complex(re, im), ends)
            y = torch.cat([states.real, states.imag], dim=1)
            re, im = states.real[ends.last], states.imag[ends.last]
        y = self.C(y) + self.D * u
        return x + nn.functional.glu(self.gate(nn.functional.gelu(y)), dim=1), re, im


BLOCKS: dict[str, Any] = {"mingru": MinGRUBlock, "lru": LRUBlock}


class ScanMemory(MemoryCell):
    """Layers of minGRU or LRU blocks behind a linear layer.

    Args:
        kind: `mingru` or `lru`.
        input_size, hidden_size, num_layers: F, H (of an LRU also the number of its complex units), L.
        forget_bias: see `MinGRUBlock`.
    """

    def __init__(
        self, kind: str, input_size: int, *, hidden_size: int, num_layers: int, forget_bias: float = 0.0
    ) -> None:
        block = BLOCKS[kind]
        super().__init__(hidden_size, state_shapes=dict.fromkeys(block.parts, (num_layers, hidden_size)))
        self.project = Linear(input_size, hidden_size)
        nn.init.orthogonal_(self.project.weight)
        nn.init.zeros_(self.project.bias)
        self.blocks = nn.ModuleList(block(hidden_size, forget_bias=forget_bias) for _ in range(num_layers))

    def plan(self, lengths: IntArray, *, device: torch.device, final_states: bool = False) -> Plan:
        """Segments one after another, without padding."""
        after = np.cumsum(lengths)
        segment = np.repeat(np.arange(len(lengths)), lengths)
        step = np.arange(len(segment)) - (after - lengths)[segment]
        first, last = (on_device(torch.from_numpy(places), device) for places in (after - lengths, after - 1))
        return Plan(segment, step, Ends(first, last))

    def step(self, features: Tensor, state: RecurrentState) -> tuple[Tensor, RecurrentState]:
        return self.unroll(features, state, None)

    def unroll(self, features: Tensor, state: RecurrentState, layout: Any) -> tuple[Tensor, RecurrentState]:
        x, layers = self.project(features), []
        for block, *before in zip(self.blocks, *state):
            x, *after = block(x, *before, layout)
            layers.append(after)
        return x, RecurrentState(**dict(zip(state.parts, map(torch.stack, zip(*layers)))))


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
