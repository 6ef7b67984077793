"""Our training speed compared with what this machine's arithmetic allows.

    python benchmarks/throughput.py
    python benchmarks/throughput.py --workload vector grid --updates 9 --json
    python benchmarks/throughput.py --device cuda --workload vector grid --num-envs-factor 16

Our trainer's whole loop (environments stepped one by one, acting, storing, updating, log files) alternates with two
ceilings, update by update in one process, because a machine's speed drifts. Every figure is a median over the updates.

plain torch   What the same arithmetic costs without PPO: encoder, fused `nn.LSTM`, heads; one step at a time
              without gradient to act, then forward and backward on dense sequences for every minibatch of every epoch;
              no optimiser, no losses, no resets. Plus the environment's own time. The fastest of several sequence
              lengths counts.
ceiling       What matrix products alone would take: FLOPs of a step (see `flops_per_step`) divided by the rate of the
              fastest `torch.mm`, plus the environment's own time. In fp32 `torch.mm` uses MKL, which leaves AVX-512
              unused on AMD; `nn.LSTM` uses oneDNN, which does not, so plain torch can exceed that ceiling there. The
              printed line has the ceiling by oneDNN's product as well; `--product onednn` uses it for the figures.

The environment's own time is that of the same plain environments stepped with random actions, on the CPU. On a GPU
ours and both ceilings run there, every measurement includes a synchronisation, and the matrices are larger.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn
from workloads import Timing, Workload, add_options, chosen_workloads, device_name, encoder, synchronize, time_ours

from dualhead.running.machine import keep_freed_memory

PLAIN_SEQUENCE = 16
PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mm": lambda left, right: torch.mm(left, right.t())}
if torch.backends.mkldnn.is_available():
    PRODUCTS["onednn"] = lambda left, right: torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], "")
MATRICES = ((512, 512, 512), (1024, 1024, 1024), (1024, 256, 1024), (2048, 256, 1024))
"""Rows, inner and columns of the products that give the machine's rate: large, but small enough for its caches."""
GPU_MATRICES = ((4096, 4096, 4096), (8192, 1024, 4096))
KEYS = (
    "workload",
    "device",
    "precision",
    "memory",
    "steps_per_s",
    "steps_per_s_min",
    "steps_per_s_max",
    "rollout_s",
    "update_s",
    "plain_torch",
    "ceiling",
    "ratio_to_plain_torch",
    "ratio_to_ceiling",
)


def input_shape(space: gym.Space) -> tuple[int, ...]:
    """The shape of an observation as the network gets it; indices are one-hot."""
    return (int(space.n),) if isinstance(space, spaces.Discrete) else tuple(space.shape or ())


def num_logits(space: gym.Space) -> int:
    return int(space.n) if isinstance(space, spaces.Discrete) else int(space.nvec.sum())


def forward_flops(workload: Workload, shape: tuple[int, ...], *, logits: int, memory: str) -> int:
    """Multiplications and additions of the network on one observation, biases and activations left out.

    Two per weight and use: convolutions 2·9·C_in·C_out·height·width, a linear layer 2·in·out, the memory
    2·gates·H·(F + H) with 4 gates (LSTM) or 3 (GRU), all heads and the critic 2·H·(logits + 1).
    """
    flops, width = 0, math.prod(shape)
    if len(shape) == 3:
        channels, height, across = shape
        flops += 2 * 9 * (channels * 32 + 32 * 64) * height * across
        width = 64 * height * across
    for size in workload.encoder_sizes:
        flops += 2 * width * size
        width = size
    gates = 4 if memory == "lstm" else 3
    hidden = workload.hidden_size
    return flops + 2 * gates * hidden * (width + hidden) + 2 * hidden * (logits + 1)


def flops_per_step(workload: Workload, forward: int) -> int:
    """FLOPs of one environment step: one forward pass to act, one to train in each epoch, and twice that backward.

    The gradient with respect to the observation is counted, although it is not needed: 1% of *grid*, less elsewhere.
    """
    return (1 + 3 * workload.num_epochs) * forward


class PlainPolicy(nn.Module):
    """Encoder, fused recurrent layer, heads and critic in plain PyTorch."""

    def __init__(self, workload: Workload, shape: tuple[int, ...], *, logits: int, memory: str) -> None:
        super().__init__()
        self.encoder = encoder(workload, shape)
        kind = nn.LSTM if memory == "lstm" else nn.GRU
        self.memory = kind(workload.encoder_sizes[-1], workload.hidden_size, batch_first=True)
        self.heads = nn.Linear(workload.hidden_size, logits)
        self.critic = nn.Linear(workload.hidden_size, 1)

    def forward(self, observations: Tensor, state: Tensor | tuple[Tensor, Tensor] | None = None) -> tuple:
        """Observations [S, T, ...] from zero or given states -> logits, values, state after the last step."""
        features = self.encoder(observations.flatten(0, 1)).view(*observations.shape[:2], -1)
        h, state = self.memory(features, state)
        h = h.flatten(0, 1)
        return self.heads(h), self.critic(h), state


class Ceilings:
    """Measures the two ceilings, once per update of ours.

    Args:
        workload, memory, precision: what ours trains.
        sequences: lengths of the dense sequences for plain torch.
        device: of the network and the products; environments stay on the CPU.
    """

    def __init__(
        self, workload: Workload, *, memory: str, precision: str, sequences: tuple[int, ...], device: str = "cpu"
    ) -> None:
        self.workload = workload
        self.device = device
        self.sequences = sequences
        self.envs = [workload.make_env() for _ in range(workload.num_envs)]
        for env in self.envs:
            env.reset()
        space = self.envs[0].action_space
        # Drawn beforehand, because sampling costs more than a step of a small environment.
        self.actions = [[space.sample() for _ in self.envs] for _ in range(workload.rollout_length)]
        shape = input_shape(self.envs[0].observation_space)
        logits = num_logits(space)
        self.policy = PlainPolicy(workload, shape, logits=logits, memory=memory).to(device)
        self.flops = flops_per_step(workload, forward_flops(workload, shape, logits=logits, memory=memory))
        self.observations = torch.rand(workload.rollout_length, workload.num_envs, *shape, device=device)
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.matrices = [
            tuple(torch.rand(side, inner, dtype=self.dtype, device=device) for side in (rows, columns))
            for rows, inner, columns in (MATRICES if device == "cpu" else GPU_MATRICES)
        ]
        self.env_s: list[float] = []
        self.act_s: list[float] = []
        self.learn_s: dict[int, list[float]] = {length: [] for length in sequences}
        self.flops_per_s: dict[str, list[float]] = {name: [] for name in products_on(device)}

    def measure(self) -> None:
        """Measures what one rollout and its update take."""
        for name, product in products_on(self.device).items():
            self.flops_per_s[name].append(self._matrix_rate(product))
        self.env_s.append(_seconds(self._step_environments))
        self.act_s.append(_seconds(self._act))
        for length in self.sequences:
            self.learn_s[length].append(_seconds(lambda length=length: self._learn(length)))

    def _matrix_rate(self, product: Callable[[Tensor, Tensor], Tensor]) -> float:
        best = 0.0
        with torch.inference_mode():
            for left, right in self.matrices:
                for _ in range(5):
                    seconds = _seconds(lambda left=left, right=right: product(left, right))
                    best = max(best, 2 * left.shape[0] * right.numel() / seconds)
        return best

    def _step_environments(self) -> None:
        for actions in self.actions:
            for env, action in zip(self.envs, actions):
                _, _, terminated, truncated, _ = env.step(action)
                if terminated or truncated:
                    env.reset()

    @contextmanager
    def _autocast(self) -> Iterator[None]:
        with torch.autocast(self.device, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            yield

    def _act(self) -> None:
        state = None
        with torch.inference_mode(), self._autocast():
            for observations in self.observations:
                _, _, state = self.policy(observations[:, None], state)

    def _learn(self, length: int) -> None:
        sequences = self.observations.view(-1, length, *self.observations.shape[2:])
        for _ in range(self.workload.num_epochs):
            for minibatch in sequences.tensor_split(self.workload.num_minibatches):
                self.policy.zero_grad(set_to_none=True)
                with self._autocast():
                    logits, values, _ = self.policy(minibatch)
                    loss = logits.sum() + values.sum()
                loss.backward()

    def plain_torch(self, *, skip: int) -> dict[int, float]:
        """Plain torch's steps/s by sequence length, the fastest first; medians without the first turns."""
        env_s, act_s = (statistics.median(part[skip:]) for part in (self.env_s, self.act_s))
        rates = {
            length: self.workload.num_steps / (env_s + act_s + statistics.median(seconds[skip:]))
            for length, seconds in self.learn_s.items()
        }
        return dict(sorted(rates.items(), key=lambda item: -item[1]))

    def ceilings(self, *, skip: int) -> dict[str, tuple[float, float]]:
        """Steps/s and FLOP/s by each matrix product; medians without the first turns."""
        num_steps, env_s = self.workload.num_steps, statistics.median(self.env_s[skip:])
        rates = {name: statistics.median(of_product[skip:]) for name, of_product in self.flops_per_s.items()}
        return {name: (num_steps / (env_s + num_steps * self.flops / rate), rate) for name, rate in rates.items()}

    def close(self) -> None:
        for env in self.envs:
            env.close()


def products_on(device: str) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Those of `PRODUCTS` that the device has."""
    return PRODUCTS if device == "cpu" else {"mm": PRODUCTS["mm"]}


def _seconds(measured: Callable[[], object]) -> float:
    synchronize()
    began = time.perf_counter()
    measured()
    synchronize()
    return time.perf_counter() - began


def measure(workload: Workload, args: argparse.Namespace) -> tuple[dict, str]:
    """One workload's figures under `KEYS`, and a line of text with them."""
    ceilings = Ceilings(
        workload,
        memory=args.memory,
        precision=args.precision,
        sequences=plain_sequences(workload, args.plain_sequence),
        device=args.device,
    )
    timings = time_ours(
        workload,
        num_updates=args.warm_up + args.updates,
        between=ceilings.measure,
        memory=args.memory,
        precision=args.precision,
        state_refresh=args.state_refresh,
        sequence_length=args.sequence_length,
        device=args.device,
    )[args.warm_up :]
    ceilings.close()
    rates = [workload.num_steps / timing.total for timing in timings]
    ours = statistics.median(rates)
    plain_by_length = ceilings.plain_torch(skip=args.warm_up)
    plain = max(plain_by_length.values())
    by_product = ceilings.ceilings(skip=args.warm_up)
    ceiling, _ = by_product[args.product]
    seconds = Timing(*(statistics.median(part) for part in zip(*timings)))
    figures = (
        *(workload.name, device_name(args.device), args.precision, args.memory),
        *(round(ours, 1), round(min(rates), 1), round(max(rates), 1)),
        *(round(seconds.rollout, 4), round(seconds.update, 4), round(plain, 1), round(ceiling, 1)),
        *(round(ours / plain, 3), round(ours / ceiling, 3)),
    )
    line = (
        f"{workload.name:>7} {args.memory} {args.precision}: "
        f"{ours:,.0f} steps/s ({min(rates):,.0f}-{max(rates):,.0f}), "
        f"rollout {seconds.rollout:.3f} s, update {seconds.update:.3f} s; "
        + "".join(
            f"plain torch {rate:,.0f} (sequences of {length}), ratio {ours / rate:.2f}; "
            for length, rate in plain_by_length.items()
        )
        + "; ".join(
            f"ceiling by {name} {limit:,.0f} ({rate / 1e9:.0f} GFLOP/s), ratio {ours / limit:.2f}"
            for name, (limit, rate) in by_product.items()
        )
    )
    return dict(zip(KEYS, figures)), line


def plain_sequences(workload: Workload, asked: int | None) -> tuple[int, ...]:
    """Sequence lengths to try plain torch with: the one asked for, or short ones and the whole rollout.

    Raises:
        ValueError: it does not divide the rollout.
    """
    whole = workload.rollout_length
    if asked is None:
        return (PLAIN_SEQUENCE, whole) if whole % PLAIN_SEQUENCE == 0 and whole > PLAIN_SEQUENCE else (whole,)
    if whole % asked:
        raise ValueError(f"--plain-sequence: expected a divisor of the rollout's {whole} steps, got {asked}")
    return (asked,)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="of ours and of both ceilings")
    parser.add_argument("--memory", choices=["lstm", "gru"], default="lstm")
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cpu", help="of ours and both ceilings; default cpu"
    )
    parser.add_argument("--sequence-length", type=int, default=16, help="of our segments; default 16")
    parser.add_argument(
        "--state-refresh",
        choices=["never", "once"],
        default="never",
        help="`once`, the trainer's default, is an extra pass over the rollout; default never",
    )
    parser.add_argument(
        "--plain-sequence", type=int, help=f"plain torch's sequences; default the faster of {PLAIN_SEQUENCE} and all"
    )
    parser.add_argument("--product", choices=list(PRODUCTS), default="mm", help="the ceiling's; default mm")
    parser.add_argument(
        "--system-allocator",
        action="store_true",
        help="return freed memory to the system at once, as glibc does by default",
    )
    args = parser.parse_args()
    if args.sequence_length < 1:
        parser.error(f"--sequence-length: expected at least 1, got {args.sequence_length}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU")
    if args.product not in products_on(args.device):
        parser.error(f"--product {args.product}: expected one of {', '.join(products_on(args.device))} on a GPU")
    workloads = chosen_workloads(parser, args, check=lambda workload: plain_sequences(workload, args.plain_sequence))

    if not args.system_allocator:
        keep_freed_memory()
    torch.set_num_threads(args.threads)
    lines = sys.stderr if args.json else sys.stdout
    print(
        f"torch {torch.__version__}, NumPy {np.__version__}, {device_name(args.device)}, "
        f"{args.threads} of {os.cpu_count()} threads, median of "
        f"{args.updates} updates after {args.warm_up}; segments of {args.sequence_length}, "
        f"state_refresh={args.state_refresh}, environments x{args.num_envs_factor:g}, rollout x{args.rollout_factor:g}",
        file=lines,
    )
    results = []
    for workload in workloads:
        figures, line = measure(workload, args)
        results.append(figures)
        print(line, file=lines, flush=True)
    if args.json:
        print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
