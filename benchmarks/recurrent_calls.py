"""Recurrent calls over segments of many lengths: our dense blocks and `PackedSequence`, forward and backward.

    python benchmarks/recurrent_calls.py
    python benchmarks/recurrent_calls.py --device cuda --steps 8192 --precision bf16
    python benchmarks/recurrent_calls.py --fit --memory gru --hidden-size 128 --threads 1

Lengths are those of a minibatch: episodes of random length cut into segments of at most `--sequence-length` steps. Both
take the same packed features [N, F] and return [N, H], so the cost of reordering steps is measured as well.

blocks     as in the update: `lay_out` into a few dense blocks, one call each. `block_cost` is the value measured on a
           CPU, and other values, because a call on a GPU has another cost.
packed     `nn.utils.rnn.PackedSequence`, one call.
one block  all segments padded to the longest.

They alternate. Figures are medians in ms, and the largest difference from the blocks with the value in use.

`--fit` measures single calls of many shapes instead, and fits the cost of a call, a time step and a row (one step of
one segment) by least squares of relative errors. `block_cost` and `step_cost` come from it.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from workloads import device_name, synchronize

from dualhead.networks.memory import RecurrentMemory, lay_out
from dualhead.running.machine import keep_freed_memory
from dualhead.types import RecurrentState


def draw_lengths(num_steps: int, *, sequence_length: int, mean_episode: float, seed: int) -> np.ndarray:
    """Lengths of segments, from long to short, of about `num_steps` together."""
    rng = np.random.default_rng(seed)
    lengths: list[int] = []
    while sum(lengths) < num_steps:
        episode = rng.geometric(1.0 / mean_episode)
        lengths += [sequence_length] * (episode // sequence_length)
        lengths += [episode % sequence_length] * bool(episode % sequence_length)
    return np.sort(np.array(lengths, dtype=np.int64))[::-1].copy()


def blocks(
    memory: RecurrentMemory, lengths: np.ndarray, features: Tensor, state: RecurrentState, *, block_cost: float
) -> Callable[[], Tensor]:
    """A call that takes features in the order of segments (one after another) and returns h in the same order."""
    segment, step, layout = lay_out(lengths, block_cost=block_cost, step_cost=memory.step_cost, device=features.device)
    begins = np.cumsum(lengths) - lengths
    order = torch.from_numpy(begins[segment] + step).to(features.device)
    back = order.argsort()
    return lambda: memory.unroll(features.index_select(0, order), state, layout)[0].index_select(0, back)


def packed(
    memory: RecurrentMemory, lengths: np.ndarray, features: Tensor, state: RecurrentState
) -> Callable[[], Tensor]:
    """The same by `PackedSequence`: time-major over all segments, with a batch that shrinks as they end."""
    step, segment = np.nonzero(np.arange(lengths[0])[:, None] < lengths)
    begins = np.cumsum(lengths) - lengths
    order = torch.from_numpy(begins[segment] + step).to(features.device)
    back = order.argsort()
    batch_sizes = torch.from_numpy(np.bincount(step))
    begin = tuple(state) if len(state.parts) > 1 else state.h

    def call() -> Tensor:
        output, _ = memory.cell(PackedSequence(features.index_select(0, order), batch_sizes), begin)
        return output.data.index_select(0, back)

    return call


def fit_costs(memory: RecurrentMemory, size: int, *, repeats: int) -> np.ndarray:
    """Microseconds [3] of a call, a time step and a row, forward and backward, from the fastest of the repeats."""
    shapes, times = [], []
    for num_segments, num_steps in itertools.product((1, 2, 4, 8, 16, 32), (8, 16, 52, 128)):
        features = torch.randn(num_segments * num_steps, size, requires_grad=True)
        state = memory.initial_state(num_segments, device=features.device, dtype=features.dtype)
        _, _, layout = lay_out(np.full(num_segments, num_steps), block_cost=0.0)
        fastest = np.inf
        for _ in range(repeats):
            begun = time.perf_counter()
            memory.unroll(features, state, layout)[0].sum().backward()
            fastest = min(fastest, time.perf_counter() - begun)
        shapes.append((1.0, num_steps, num_segments * num_steps))
        times.append(1e6 * fastest)
    weights = 1.0 / np.array(times)[:, None]
    return np.linalg.lstsq(np.array(shapes) * weights, np.ones(len(times)), rcond=None)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--memory", choices=["lstm", "gru"], default="lstm")
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--num-layers", type=int, default=1)
    parser.add_argument("--steps", type=int, default=1024, help="of a minibatch; default 1024")
    parser.add_argument("--sequence-length", type=int, default=16)
    parser.add_argument("--mean-episode", type=float, default=70.0, help="steps; default 70, as in the grid workload")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--fit", action="store_true", help="what a call, a time step and a row cost, on the CPU")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU")
    keep_freed_memory()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    size = args.hidden_size
    memory = RecurrentMemory(args.memory, size, hidden_size=size, num_layers=args.num_layers).to(args.device)
    if args.fit:
        call, step, row = fit_costs(memory, size, repeats=args.repeats)
        print(f"{args.memory} {size}: a call {call:.0f} µs, a time step {step:.1f} µs, a row {row:.2f} µs")
        print(f"in rows: a call {call / row:.0f}, a time step {step / row:.1f}")
        return
    lengths = draw_lengths(args.steps, sequence_length=args.sequence_length, mean_episode=args.mean_episode, seed=0)
    features = torch.randn(int(lengths.sum()), size, device=args.device, requires_grad=True)
    state = memory.initial_state(len(lengths), device=features.device, dtype=features.dtype)
    used = f"blocks at {memory.block_cost:.0f} steps a call (used)"
    prices = {used: memory.block_cost, "blocks at 0": 0.0, "blocks at 200": 200.0, "blocks at 1000": 1000.0}
    calls = {name: blocks(memory, lengths, features, state, block_cost=price) for name, price in prices.items()}
    calls["one block"] = blocks(memory, lengths, features, state, block_cost=1e9)
    calls["packed"] = packed(memory, lengths, features, state)

    print(
        f"torch {torch.__version__}, {device_name(args.device)}, {args.memory} {args.num_layers} x {size}, "
        f"{args.precision}: {len(lengths)} segments of {lengths[-1]} to {lengths[0]} steps, {lengths.sum()} in all"
    )
    forward: dict[str, list[float]] = {name: [] for name in calls}
    backward: dict[str, list[float]] = {name: [] for name in calls}
    outputs: dict[str, Tensor] = {}
    for _ in range(args.repeats + 3):
        for name, call in calls.items():
            memory.zero_grad(set_to_none=True)
            features.grad = None
            synchronize()
            begun = time.perf_counter()
            with torch.autocast(args.device, torch.bfloat16, enabled=args.precision == "bf16"):
                output = call()
            synchronize()
            between = time.perf_counter()
            output.float().square().sum().backward()
            synchronize()
            forward[name].append(1e3 * (between - begun))
            backward[name].append(1e3 * (time.perf_counter() - between))
            outputs[name] = output.detach().float()
    for name in calls:
        ahead, back = (statistics.median(parts[name][3:]) for parts in (forward, backward))
        difference = (outputs[name] - outputs[used]).abs().max().item()
        print(
            f"{name:>36}: forward {ahead:8.3f}, backward {back:8.3f}, both {ahead + back:8.3f}; off by {difference:.1g}"
        )


if __name__ == "__main__":
    main()
