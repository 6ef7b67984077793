"""The parallel scan and its two memories, against loops over time in NumPy float64."""

import numpy as np
import pytest
import torch
from scipy.special import erf

from dualhead.networks.scan import CHUNK, Ends, LinearScan, MinGRUScan, ScanMemory, scan_segments
from dualhead.types import RecurrentState

kinds = pytest.mark.parametrize("kind", ["mingru", "lru"])
INPUTS, HIDDEN = 3, 5


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def layer_norm(x, weight, bias):
    return (x - x.mean()) / np.sqrt(x.var() + 1e-5) * weight + bias


def loop(kind, weights, features, state):
    """One segment: features [T, F] and a list of one state per layer -> outputs [T, H], final states.

    Written from the papers, with a complex state for the LRU. `weights` are those of the module, by name.
    """
    outputs = []
    for x in features:
        for layer, h in enumerate(state):
            w = {name.removeprefix(f"blocks.{layer}."): value for name, value in weights.items()}
            if kind == "lru" and layer == 0:
                x = w["project.weight"] @ x + w["project.bias"]
            u = layer_norm(x, w["norm.weight"], w["norm.bias"])
            if kind == "mingru":
                gate, candidate, shown, *skipped = np.split(w["linear.weight"] @ u + w["linear.bias"], 3 + (layer == 0))
                z = sigmoid(gate)
                state[layer] = (1 - z) * h + z * candidate
                x = (x if layer else skipped[0]) + state[layer] * shown * sigmoid(shown)
            else:
                factor = np.exp(-np.exp(w["nu_log"]) + 1j * np.exp(w["theta_log"]))
                B = w["B.weight"][:HIDDEN] + 1j * w["B.weight"][HIDDEN:]
                C = w["C.weight"][:, :HIDDEN] - 1j * w["C.weight"][:, HIDDEN:]
                state[layer] = factor * h + np.exp(w["gamma_log"]) * (B @ u)
                y = (C @ state[layer]).real + w["D"] * u
                y = y * (1 + erf(y / np.sqrt(2))) / 2
                left, right = np.split(w["gate.weight"] @ y + w["gate.bias"], 2)
                x = x + left * sigmoid(right)
        outputs.append(x)
    return np.array(outputs), state


def make_memory(kind, *, num_layers=2, dtype=torch.float64, seed=0):
    """A memory whose weights are all random."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        memory = ScanMemory(kind, INPUTS, hidden_size=HIDDEN, num_layers=num_layers).to(dtype)
        for name, parameter in memory.named_parameters():
            if "log" not in name:
                parameter.data += 0.3 * torch.randn_like(parameter)
    return memory


def weights_of(memory):
    return {name: value.detach().double().numpy() for name, value in memory.named_parameters()}


def random_states(kind, memory, num_segments, seed=0):
    """A module's state and the loop's: for each segment a list of one array per layer."""
    rng = np.random.default_rng(seed)
    state = memory.initial_state(num_segments, device=torch.device("cpu"), dtype=torch.float64)
    state = state.map(lambda part: torch.from_numpy(rng.normal(size=part.shape)))
    parts = [part.numpy() for part in state]
    whole = parts[0] if kind == "mingru" else parts[0] + 1j * parts[1]
    return state, [list(whole[:, segment]) for segment in range(num_segments)]


@pytest.mark.parametrize("lengths", [[1], [7, 7, 3, 1], [40, 33, 16, 8, 8, 1, 1], [1] * 20])
@kinds
def test_segments_equal_a_loop_over_time(kind, lengths):
    """Outputs and final states of segments that begin from states of their own."""
    memory, lengths = make_memory(kind), np.array(lengths)
    state, of_loop = random_states(kind, memory, len(lengths))
    features = np.random.default_rng(1).normal(size=(lengths.sum(), INPUTS))
    plan = memory.plan(lengths, device=torch.device("cpu"), final_states=True)
    outputs, final = memory.unroll(torch.from_numpy(features), state, plan.layout)
    weights, finals = weights_of(memory), [part.detach().numpy() for part in final]
    for segment in range(len(lengths)):
        here = plan.segment == segment
        assert plan.step[here].tolist() == list(range(lengths[segment]))
        expected, after = loop(kind, weights, features[here], of_loop[segment])
        np.testing.assert_allclose(outputs.detach().numpy()[here], expected, rtol=0, atol=1e-12)
        whole = finals[0] if kind == "mingru" else finals[0] + 1j * finals[1]
        np.testing.assert_allclose(whole[:, segment], np.array(after), rtol=0, atol=1e-12)


@kinds
def test_a_thousand_steps_stay_exact(kind):
    """Without a reset: 1e-12 in float64, and in float32 1e-4 of the greatest output."""
    features = np.random.default_rng(1).normal(size=(1000, INPUTS))
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-4)):
        memory = make_memory(kind, dtype=dtype)
        state, of_loop = random_states(kind, memory, 1)
        plan = memory.plan(np.array([1000]), device=torch.device("cpu"))
        state = RecurrentState(**{name: part.to(dtype) for name, part in state.parts.items()})
        outputs, _ = memory.unroll(torch.from_numpy(features).to(dtype), state, plan.layout)
        expected, _ = loop(kind, weights_of(memory), features, of_loop[0])
        assert np.abs(outputs.detach().numpy() - expected).max() < tolerance * np.abs(expected).max()


@kinds
def test_acting_is_the_one_step_case(kind):
    memory = make_memory(kind)
    state, _ = random_states(kind, memory, 4)
    features = torch.randn(4, INPUTS, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    outputs, after = memory.step(features, state)
    plan = memory.plan(np.ones(4, dtype=np.int64), device=torch.device("cpu"))
    unrolled, final = memory.unroll(features, state, plan.layout)
    torch.testing.assert_close(outputs, unrolled, rtol=0, atol=1e-14)
    for part, other in zip(after, final):
        torch.testing.assert_close(part, other, rtol=0, atol=1e-14)


@pytest.mark.parametrize("num_steps", [1, 2, CHUNK, CHUNK + 1, 3 * CHUNK, CHUNK**2 + 5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_gradients_of_the_scan_equal_differences(num_steps, dtype):
    generator = torch.Generator().manual_seed(0)
    a = torch.polar(*torch.rand(2, num_steps, 2, dtype=torch.float64, generator=generator))
    a = a if dtype.is_complex else a.real.clone()
    b = torch.randn(num_steps, 2, dtype=dtype, generator=generator)
    assert torch.autograd.gradcheck(LinearScan.apply, (a.requires_grad_(), b.requires_grad_()))


@pytest.mark.parametrize("lengths", [[1], [3, 1, 1], [CHUNK + 1, CHUNK, 2], [CHUNK**2 + 5, 9]])
@pytest.mark.parametrize("wide", [3, 4])
def test_gradients_of_a_minGRU_equal_differences(lengths, wide):
    generator = torch.Generator().manual_seed(0)
    projected = torch.randn(sum(lengths), wide * 2, dtype=torch.float64, generator=generator, requires_grad=True)
    before = torch.randn(len(lengths), 2, dtype=torch.float64, generator=generator, requires_grad=True)
    after = torch.tensor(lengths).cumsum(0)

    def outputs(projected, before):
        return MinGRUScan.apply(projected, before, after - torch.tensor(lengths), after - 1)[0]

    assert torch.autograd.gradcheck(outputs, (projected, before))


def test_nothing_crosses_a_segment_s_start():
    """To the bit: a greater number before the start changes nothing after it, neither forwards nor backwards."""
    generator = torch.Generator().manual_seed(0)
    factors, inputs = torch.rand(2, 50, 3, generator=generator)
    ends = Ends(torch.tensor([0, 21]), torch.tensor([20, 49]))
    results = []
    for size in (1.0, 1e30):
        given = inputs.clone()
        given[:21] *= size
        given.requires_grad_()
        states = scan_segments(factors, given, torch.ones(2, 3), ends)
        states[21:].sum().backward()
        assert not given.grad[:21].any()
        results.append(states[21:].detach())
    assert torch.equal(*results)


def test_a_minGRU_keeps_for_as_many_steps_as_its_bias_says():
    """exp(b) steps: 1 - z = 1 / (1 + e^b). `forget_bias` multiplies the odds of keeping."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain = ScanMemory("mingru", 2, hidden_size=500, num_layers=1).blocks[0].linear.bias[:500]
        torch.manual_seed(0)
        longer = ScanMemory("mingru", 2, hidden_size=500, num_layers=1, forget_bias=1.5).blocks[0].linear.bias[:500]
    odds = (-plain).exp()
    assert 1 <= odds.min() < 1.1
    assert 60 < odds.max() <= 64
    assert abs(odds.log2().mean() - 3) < 0.3  # uniform on a log scale: 2^3 = 8 in the middle
    torch.testing.assert_close((-longer).exp() / odds, torch.full((500,), np.exp(1.5), dtype=torch.float32))


def test_an_LRU_begins_uniform_on_a_ring():
    """|λ|² uniform in [0.9², 0.999²], and γ² = 1 - |λ|²."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        block = ScanMemory("lru", 2, hidden_size=2000, num_layers=1).blocks[0]
    squared = (-2 * block.nu_log.exp()).exp().detach()
    assert squared.min() >= 0.9**2 - 1e-6
    assert squared.max() <= 0.999**2 + 1e-6
    assert abs(squared.mean() - (0.9**2 + 0.999**2) / 2) < 0.005
    torch.testing.assert_close(block.gamma_log.exp().square(), 1 - squared, rtol=1e-4, atol=1e-5)
