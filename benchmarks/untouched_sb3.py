"""sb3-contrib's RecurrentPPO with its own defaults on one task and seed, for the comparison of untouched learners.

    pip install torch -e '.[bench]'
    python benchmarks/untouched_sb3.py popgym-CountRecallEasy-v0 --seed 0 --out benchmarks/results/untouched_sb3.csv

Only what a user must choose is set: the policy's name, sixteen environments in one process, and the seed. One thread.
Appends one row per 10,000 steps with the mean return of the last 100 training episodes, then one row with the mean
return of 100 evaluation episodes: greedy actions, and sampled ones.
"""

from __future__ import annotations

import argparse
import csv
import fcntl
import time
from importlib.metadata import version
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from sb3_contrib import RecurrentPPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.vec_env import DummyVecEnv

FIELDS = ("env", "learner", "version", "seed", "kind", "num_steps", "seconds", "return_mean")
NUM_ENVS = 16


def make_env(env: str) -> gym.Env:
    """The environment, with the packages that register it imported."""
    if env.startswith("popgym"):
        import popgym  # noqa: F401
    if env.startswith("MiniGrid"):
        import minigrid  # noqa: F401
    if env.startswith("dualhead/"):
        import dualhead.worlds.tasks  # noqa: F401
    made = gym.make(env)
    if isinstance(made.observation_space, spaces.Tuple):  # sb3 has no Tuple spaces
        made = gym.wrappers.FlattenObservation(made)
    return Monitor(made)


class Flatten(FlattenExtractor):
    """sb3's own extractor with a Python int as its width: recent torch refuses the NumPy integer of MultiDiscrete."""

    def __init__(self, observation_space: gym.Space) -> None:
        super().__init__(observation_space)
        self._features_dim = int(self._features_dim)


class Progress(BaseCallback):
    """Calls `write(num_steps, mean training return)` about every 10,000 steps."""

    def __init__(self, write: object) -> None:
        super().__init__()
        self.write = write
        self.next = 10_000

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        if self.num_timesteps >= self.next and self.model.ep_info_buffer:
            self.write(self.num_timesteps, float(np.mean([e["r"] for e in self.model.ep_info_buffer])))
            self.next += 10_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("env")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--total-steps", type=int, default=200_000)
    parser.add_argument("--out", type=Path, required=True, help="CSV file to append to")
    args = parser.parse_args()
    torch.set_num_threads(1)

    def append(kind: str, num_steps: int, seconds: float, value: float) -> None:
        with args.out.open("a", newline="") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            rows = csv.writer(file)
            if file.tell() == 0:
                rows.writerow(FIELDS)
            rows.writerow(
                (args.env, "sb3-contrib", version("sb3-contrib"), args.seed, kind, num_steps, f"{seconds:.1f}", value)
            )

    envs = DummyVecEnv([lambda: make_env(args.env)] * NUM_ENVS)
    if isinstance(envs.observation_space, spaces.Dict):
        model = RecurrentPPO("MultiInputLstmPolicy", envs, seed=args.seed, device="cpu")
    else:
        kwargs = {"features_extractor_class": Flatten}
        model = RecurrentPPO("MlpLstmPolicy", envs, seed=args.seed, device="cpu", policy_kwargs=kwargs)
    begin = time.perf_counter()
    model.learn(args.total_steps, Progress(lambda n, r: append("training", n, time.perf_counter() - begin, r)))
    seconds = time.perf_counter() - begin
    evaluation = DummyVecEnv([lambda: make_env(args.env)] * NUM_ENVS)
    for kind, greedy in (("greedy", True), ("sampled", False)):
        evaluation.seed(1_000_000 + args.seed)
        mean, _ = evaluate_policy(model, evaluation, n_eval_episodes=100, deterministic=greedy)
        append(kind, model.num_timesteps, seconds, mean)


if __name__ == "__main__":
    main()
