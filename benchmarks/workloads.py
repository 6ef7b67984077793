"""The three reference workloads, the time that our trainer takes for them, and options that the scripts share."""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from torch import nn

from dualhead.config import NetworkConfig, PPOConfig
from dualhead.running.checkpoint import new_run_dir
from dualhead.running.config import RunConfig
from dualhead.running.evaluator import Evaluator
from dualhead.running.session import Session
from dualhead.running.trainer import run_loop
from dualhead.running.writers import make_writers
from dualhead.worlds.streams import UnavailableEnvironment, make_env


@dataclass(frozen=True)
class Workload:
    """An environment, and the size of a rollout and of the network.

    Fields:
        env: a Gymnasium id.
        num_envs: B, environments stepped one by one in this process.
        num_minibatches: per epoch; a minibatch has batch_size = rollout_length · num_envs / num_minibatches steps.
        encoder_sizes: widths of the ReLU layers before the memory (after the two 3x3 convolutions of a grid).
        rollout_length, num_epochs, hidden_size: T, passes over a rollout, H.
    """

    name: str
    env: str
    num_envs: int
    num_minibatches: int
    encoder_sizes: tuple[int, ...]
    rollout_length: int = 128
    num_epochs: int = 4
    hidden_size: int = 256

    @property
    def num_steps(self) -> int:
        """Environment steps of one update."""
        return self.rollout_length * self.num_envs

    @property
    def batch_size(self) -> int:
        return self.num_steps // self.num_minibatches

    def scaled(self, *, num_envs: float = 1.0, rollout_length: float = 1.0) -> Workload:
        """More (or fewer) environments and a longer rollout; as many minibatches as before, so larger ones.

        Raises:
            ValueError: no whole number of environments or steps, or too few for the minibatches.
        """
        sizes = {"num_envs": self.num_envs * num_envs, "rollout_length": self.rollout_length * rollout_length}
        for name, size in sizes.items():
            if not (math.isfinite(size) and size >= 1 and size == int(size)):
                raise ValueError(f"{self.name}: expected a whole number of {name}, the factor gives {size}")
        workload = replace(self, **{name: int(size) for name, size in sizes.items()})
        if workload.num_steps % workload.num_minibatches:
            raise ValueError(
                f"{self.name}: {workload.num_steps} steps are not {self.num_minibatches} equal minibatches"
            )
        return workload

    def make_env(self) -> gym.Env:
        return make_env(self.env)


class GridNoise(gym.Env[np.ndarray, np.ndarray]):
    """A grid world of almost no cost: it returns observations and rewards made beforehand.

    Observation: float32 [5, 11, 11], uniform in [0, 1).
    Action: MultiDiscrete([4, 3]), ignored.
    Reward: standard normal.
    Ends: terminated after a number of steps drawn uniformly from 20 .. 120.
    """

    observation_space = spaces.Box(0.0, 1.0, (5, 11, 11), np.float32)
    action_space = spaces.MultiDiscrete([4, 3])

    _made = np.random.default_rng(0)
    _observations = tuple(_made.random((509, 5, 11, 11), dtype=np.float32))
    _rewards = tuple(_made.standard_normal(509).tolist())
    _lengths = tuple(_made.integers(20, 120, size=1009, endpoint=True).tolist())

    _at = _episode = -1

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        if seed is not None or self._at < 0:
            # Environments side by side begin at different places of the same lists.
            self._at, self._episode = self.np_random.integers(1009, size=2).tolist()
        self._episode += 1
        self._left = self._lengths[self._episode % len(self._lengths)]
        return self._observations[self._at % len(self._observations)], {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        self._at += 1
        self._left -= 1
        place = self._at % len(self._observations)
        return self._observations[place], self._rewards[place], self._left == 0, False, {}


gym.register("benchmarks/GridNoise-v0", entry_point=GridNoise, order_enforce=False)

WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("vector", "dualhead/CartPoleNoVel-v1", num_envs=64, num_minibatches=8, encoder_sizes=(64,)),
        Workload("grid", "benchmarks/GridNoise-v0", num_envs=16, num_minibatches=4, encoder_sizes=(256,)),
        Workload("popgym", "popgym-RepeatPreviousEasy-v0", num_envs=64, num_minibatches=8, encoder_sizes=(64,)),
    )
}


def encoder(workload: Workload, shape: tuple[int, ...]) -> nn.Sequential:
    """The workload's encoder for observations of this shape."""
    layers: list[nn.Module] = []
    if len(shape) == 3:
        layers += [nn.Conv2d(shape[0], 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU()]
    layers += [nn.Flatten()]
    width = int(np.prod(shape)) if len(shape) != 3 else 64 * shape[1] * shape[2]
    for size in workload.encoder_sizes:
        layers += [nn.Linear(width, size), nn.ReLU()]
        width = size
    return nn.Sequential(*layers)


def add_options(parser: argparse.ArgumentParser, *, updates: int = 5) -> None:
    """Adds the options for workloads, sizes, updates and threads.

    Args:
        updates: default of `--updates`.
    """
    parser.add_argument("--workload", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--updates", type=int, default=updates, help=f"measured updates; default {updates}")
    parser.add_argument("--warm-up", type=int, default=2, help="updates before them; default 2")
    parser.add_argument("--threads", type=int, default=2, help="of torch; default 2")
    parser.add_argument("--num-envs-factor", type=float, default=1.0, help="times as many environments")
    parser.add_argument("--rollout-factor", type=float, default=1.0, help="times as long a rollout")
    parser.add_argument("--json", action="store_true", help="print a list of objects; the lines go to stderr")


def chosen_workloads(
    parser: argparse.ArgumentParser, args: argparse.Namespace, *, check: Callable[[Workload], object] = lambda _: None
) -> list[Workload]:
    """The workloads that the options of `add_options` ask for; exits with the parser's error if one cannot be measured.

    Args:
        check: raises ValueError where a script cannot use a workload.
    """
    if min(args.updates, args.warm_up, args.threads) < 1:
        parser.error("--updates, --warm-up and --threads: expected at least 1")
    factors = {"num_envs": args.num_envs_factor, "rollout_length": args.rollout_factor}
    try:
        workloads = [WORKLOADS[name].scaled(**factors) for name in args.workload]
        for workload in workloads:
            check(workload)
            workload.make_env().close()
    except (ValueError, UnavailableEnvironment) as error:
        parser.error(str(error))
    return workloads


def synchronize() -> None:
    """Waits until the GPU, if one is in use, has finished its work."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def device_name(device: str) -> str:
    """Name of a device in a table."""
    return torch.cuda.get_device_name() if device == "cuda" else device


class Timing(NamedTuple):
    """One update and the rollout before it; seconds. Logging counts as rollout."""

    total: float
    rollout: float
    update: float


class _Stopwatch:
    """The last writer: times each rollout and update, then calls `between` while its clock is stopped."""

    def __init__(self, between: Callable[[], None]) -> None:
        self.timings: list[Timing] = []
        self._between = between
        self._began = time.perf_counter()

    def write(self, num_steps: int, metrics: Mapping[str, float]) -> None:
        synchronize()
        total, update = time.perf_counter() - self._began, metrics["time/update_s"]
        self.timings.append(Timing(total, total - update, update))
        self._between()
        synchronize()
        self._began = time.perf_counter()

    def close(self) -> None:
        pass


def run_config(
    workload: Workload,
    run_dir: str,
    *,
    total_steps: int,
    memory: str = "lstm",
    precision: str = "fp32",
    state_refresh: str = "never",
    sequence_length: int = 16,
    device: str = "cpu",
) -> RunConfig:
    """Settings of a run of a workload that saves no checkpoint before its end.

    They are the specification's, but with segments and a bootstrapped end of rollouts. If these settings change,
    figures cannot be compared with earlier ones.
    """
    return RunConfig(
        env=workload.env,
        num_envs=workload.num_envs,
        total_steps=total_steps,
        run_dir=run_dir,
        checkpoint_every=total_steps,
        device=device,
        network=NetworkConfig.spec(
            memory=memory, hidden_size=workload.hidden_size, encoder_sizes=workload.encoder_sizes
        ),
        ppo=PPOConfig.spec(
            num_epochs=workload.num_epochs,
            rollout_length=workload.rollout_length,
            batch_size=workload.batch_size,
            sequence_length=sequence_length,
            state_refresh=state_refresh,
            bootstrap_last=True,
            precision=precision,
        ),
    )


def time_ours(workload: Workload, *, num_updates: int, between: Callable[[], None], **settings: Any) -> list[Timing]:
    """Runs our trainer's own loop, with its log files, for `num_updates` updates.

    Args:
        workload, num_updates: what is trained.
        between: called after each update while our clock is stopped. What we compare with is measured there, so that
            a machine that slows down slows both.
        settings: of `run_config`.

    Returns:
        Timings, one per update.
    """
    total_steps = num_updates * workload.num_steps
    with tempfile.TemporaryDirectory(prefix="dualhead-benchmark-") as folder:
        config = run_config(workload, f"{folder}/run", total_steps=total_steps, **settings)
        session = Session(config)
        run_dir = new_run_dir(config)
        stopwatch = _Stopwatch(between)
        logs = make_writers(config, run_dir, show_progress=False)
        try:
            session.begin()
            with Evaluator(session, run_dir, resume_at=None) as evaluator:
                run_loop(session, [*logs, stopwatch], evaluator, run_dir)
        finally:
            for log in logs:
                log.close()
            session.close()
    return stopwatch.timings
