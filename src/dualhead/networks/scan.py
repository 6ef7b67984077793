"""Memories that learn without a loop over time: minGRU and LRU, unrolled by a parallel scan with resets inside.

Both are linear in their state, h_t = a_t h_{t-1} + b_t, with a_t and b_t that depend on the input alone. Segments lie
one after another in flat steps [N, ...]. a_t is zero at the first step of each segment, so nothing crosses from one to
the next; the state that a segment begins from goes into its first b_t.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
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
        grad_b = grads[0].clone(memory_format=torch.contiguous_format)
        following = a.conj().roll(-1, 0).resolve_conj()  # of the last, which wraps around, nothing is read
        _scan(following, grad_b, back=True)
        grad_a = torch.zeros_like(a)
        torch.mul(grad_b[1:], h[:-1].conj(), out=grad_a[1:])
        return grad_a, grad_b


class MinGRUScan(torch.autograd.Function):
    """h_n = (1 - z_n) h_{n-1} + z_n c_n with z = sigmoid(gate), then h_n SiLU(o_n), of segments one after another.

    The gradient is written by hand and makes half of the passes over memory that PyTorch makes for the same equations.
    With g_n the gradient of h_n, from the outputs and from h_{n+1}:

        d gate_n = g_n (c_n - h_{n-1}) z_n (1 - z_n),  d c_n = g_n z_n,  d h_{n-1} = g_n (1 - z_n)

    Takes gates, candidates and o as one [N, 3 H], or with what is added to the outputs [N, 4 H]; the states [S, H]
    before each segment; and the segments' `Ends`. Returns the outputs and the states h, both [N, H]; only the outputs
    have a gradient.
    """

    @staticmethod
    def forward(ctx: Any, projected: Tensor, before: Tensor, first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        gate, candidate, shown, *added = projected.split(before.shape[1], dim=1)
        z = gate.sigmoid()
        kept = 1 - z
        h = z * candidate
        h.index_add_(0, first, kept[first] * before)
        _scan(kept.index_fill_(0, first, 0), h)
        ctx.save_for_backward(projected, before, first, last, z, h)
        ctx.mark_non_differentiable(h)
        outputs = nn.functional.silu(shown).mul_(h)
        return outputs.add_(added[0]) if added else outputs, h

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None]:
        projected, before, first, last, z, h = ctx.saved_tensors
        _, candidate, shown, *_ = projected.split(before.shape[1], dim=1)
        result = torch.empty_like(projected)
        grad_gate, grad_candidate, grad_shown, *grad_added = result.split(before.shape[1], dim=1)
        for each in grad_added:
            each.copy_(grad)
        torch.ops.aten.silu_backward.grad_input(grad * h, shown, grad_input=grad_shown)
        g = nn.functional.silu(shown).mul_(grad)
        kept = torch.ones_like(z)
        kept[:-1] -= z[1:]
        _scan(kept.index_fill_(0, last, 0), g, back=True)
        torch.mul(g, z, out=grad_candidate)
        torch.sub(candidate[1:], h[:-1], out=grad_gate[1:])
        grad_gate.index_copy_(0, first, candidate[first] - before)
        torch.ops.aten.sigmoid_backward.grad_input(g * grad_gate, z, grad_input=grad_gate)
        return result, (g - grad_candidate)[first], None, None


def _scan(a: Tensor, h: Tensor, *, back: bool = False) -> None:
    """h_n += a_n h_{n-1} from the second step on, in place; `back`: h_n += a_n h_{n+1} from the last but one.

    `a` is overwritten.
    """
    rest = len(h) % CHUNK if len(h) > CHUNK else len(h)
    turn = -1 if back else 1
    if rest < len(h):
        whole = slice(rest, None) if back else slice(len(h) - rest)
        within, products = (steps[whole].unflatten(0, (-1, CHUNK)) for steps in (h, a))
        _one_by_one(products.unbind(1)[::turn], within.unbind(1)[::turn], and_factors=True)
        end = 0 if back else -1
        ends = within[:, end].clone()
        _scan(products[:, end].clone(), ends, back=back)
        sources, targets = (slice(1, None), slice(-1)) if back else (slice(-1), slice(1, None))
        within[targets].addcmul_(products[targets], ends[sources, None])
        rest += 1
    if rest > 1:
        remaining = slice(rest) if back else slice(len(h) - rest, None)
        _one_by_one(a[remaining].unbind()[::turn], h[remaining].unbind()[::turn])


def _one_by_one(a: Sequence[Tensor], h: Sequence[Tensor], and_factors: bool = False) -> None:
    """h_n += a_n h_{n-1}, and a_n *= a_{n-1} if `and_factors`, from the second on, in place."""
    for n in range(1, len(h)):
        h[n].addcmul_(a[n], h[n - 1])
        if and_factors:
            a[n].mul_(a[n - 1])


class MinGRUBlock(nn.Module):
    """minGRU, a GRU whose gate and candidate do not see the state, with an output gate and a skip connection.

        z_t = sigmoid(W_z u_t + b_z),  h_t = (1 - z_t) h_{t-1} + z_t (W_h u_t + b_h),  u = LayerNorm(x)
        block(x) = W_s u + b_s + h * SiLU(W_o u + b_o)

    Where the inputs are as wide as the state, x itself takes the place of W_s u + b_s. One product computes all of it.

    Each h_t is a weighted mean of candidates, and the scan multiplies numbers between 0 and 1. That is safe without the
    paper's log space, whose candidates have to be positive.

    At the start the units keep their content for 1 to `SLOWEST` steps, uniform on a log scale: alike units would forget
    alike. `forget_bias` is added to the gate 1 - z.

    Source: Feng et al. 2024, arXiv:2410.01201, section 3.1; time scales: Tallec and Ollivier 2018, arXiv:1804.11188.
    """

    parts = ("h",)
    SLOWEST = 64.0

    def __init__(self, input_size: int, size: int, *, forget_bias: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(input_size)
        self.linear = Linear(input_size, (3 if input_size == size else 4) * size)
        for matrix in self.linear.weight.split(size):
            nn.init.orthogonal_(matrix)
        nn.init.zeros_(self.linear.bias)
        steps_kept = self.SLOWEST ** torch.rand(size)
        with torch.no_grad():
            self.linear.bias[:size] = -steps_kept.log() - forget_bias

    def forward(self, x: Tensor, h: Tensor, ends: Ends | None) -> tuple[Tensor, Tensor]:
        projected = self.linear(self.norm(x)).to(h.dtype)
        skips = projected.shape[1] > 3 * h.shape[1]
        if ends is not None:
            outputs, states = MinGRUScan.apply(projected, h, *ends)
            return outputs if skips else x + outputs, states[ends.last]
        gate, candidate, shown, *skipped = projected.split(h.shape[1], dim=1)
        h = h.lerp(candidate, gate.sigmoid())
        return (skipped[0] if skips else x).addcmul(h, nn.functional.silu(shown)), h


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

    def __init__(self, input_size: int, size: int, *, forget_bias: float) -> None:
        super().__init__()
        self.project = Linear(input_size, size) if input_size != size else nn.Identity()
        for name, parameter in self.project.named_parameters():
            (nn.init.orthogonal_ if name == "weight" else nn.init.zeros_)(parameter)
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
        x = self.project(x)
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
        sizes = [input_size] + [hidden_size] * num_layers
        self.blocks = nn.ModuleList(block(*each, forget_bias=forget_bias) for each in itertools.pairwise(sizes))

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
        x, layers = features, []
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
