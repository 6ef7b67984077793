"""Our training speed compared with other recurrent PPOs, on this machine, in one run.

    pip install -e '.[bench]'
    python benchmarks/peers.py
    python benchmarks/peers.py --workload vector --json

The workloads of throughput.py on our trainer, on sb3-contrib's RecurrentPPO where it is installed, and on a recurrent
PPO in the style of CleanRL's single files (below). They alternate, update by update, in one process, so that a machine
that slows down slows all of them. Every figure is a median over the updates. Networks, rollout, epochs and minibatches
are the same; the others train on whole sequences of the rollout, as they always do.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Callable

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from torch import Tensor, nn
from torch.distributions import Categorical
from workloads import Workload, add_options, chosen_workloads, encoder, time_ours

from dualhead.running.machine import keep_freed_memory

INSTALL = "sb3-contrib is not installed and left out; to install it: pip install -e '.[bench]'"


def sb3_contrib(workload: Workload) -> Callable[[], None]:
    """RecurrentPPO of sb3-contrib: a function that does one rollout and one update."""
    from sb3_contrib import RecurrentPPO
    from stable_baselines3.common.preprocessing import get_flattened_obs_dim
    from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
    from stable_baselines3.common.vec_env import DummyVecEnv

    class Features(BaseFeaturesExtractor):
        def __init__(self, observation_space: gym.Space) -> None:
            super().__init__(observation_space, features_dim=workload.encoder_sizes[-1])
            # Discrete observations come one-hot.
            is_grid = len(observation_space.shape or ()) == 3
            shape = observation_space.shape if is_grid else (get_flattened_obs_dim(observation_space),)
            self.layers = encoder(workload, shape)

        def forward(self, observations: Tensor) -> Tensor:
            return self.layers(observations)

    model = RecurrentPPO(
        "MlpLstmPolicy",
        DummyVecEnv([workload.make_env] * workload.num_envs),
        n_steps=workload.rollout_length,
        batch_size=workload.batch_size,
        n_epochs=workload.num_epochs,
        ent_coef=0.01,
        seed=0,
        device="cpu",
        policy_kwargs={
            "features_extractor_class": Features,
            "net_arch": [],
            "lstm_hidden_size": workload.hidden_size,
            "n_lstm_layers": 1,
            "shared_lstm": True,
            "enable_critic_lstm": False,
        },
    )

    def update() -> None:
        # Runs until this many more steps are taken and learned from: one rollout and one update.
        model.learn(total_timesteps=workload.num_steps, reset_num_timesteps=False)

    return update


class SingleFilePolicy(nn.Module):
    """Encoder, an LSTM that is unrolled step by step and reset where episodes begin, heads and critic."""

    def __init__(self, workload: Workload, shape: tuple[int, ...], nvec: list[int]) -> None:
        super().__init__()
        self.nvec = nvec
        self.encoder = encoder(workload, shape)
        self.lstm = nn.LSTM(workload.encoder_sizes[-1], workload.hidden_size)
        self.actor = nn.Linear(workload.hidden_size, sum(nvec))
        self.critic = nn.Linear(workload.hidden_size, 1)
        for name, parameter in self.named_parameters():
            if "bias" in name:
                nn.init.zeros_(parameter)
            else:
                nn.init.orthogonal_(parameter, 2**0.5 if "encoder" in name else 1.0)

    def hidden(
        self, observations: Tensor, state: tuple[Tensor, Tensor], starts: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Observations [T · B, ...], starts [T · B] -> h [T · B, H] and the state [1, B, H] after the last step."""
        num_envs = state[0].shape[1]
        features = self.encoder(observations).view(-1, num_envs, self.lstm.input_size)
        outputs = []
        for x, start in zip(features, starts.view(-1, num_envs)):
            keep = (1.0 - start).view(1, -1, 1)
            h, state = self.lstm(x[None], (keep * state[0], keep * state[1]))
            outputs.append(h)
        return torch.cat(outputs).flatten(0, 1), state

    def forward(
        self, observations: Tensor, state: tuple[Tensor, Tensor], starts: Tensor, actions: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Actions, their joint log-probability, entropy and value, each for T · B steps; and the state after them."""
        h, state = self.hidden(observations, state, starts)
        heads = [Categorical(logits=logits) for logits in self.actor(h).split(self.nvec, dim=1)]
        if actions is None:
            actions = torch.stack([head.sample() for head in heads], dim=1)
        log_probs = sum(head.log_prob(column) for head, column in zip(heads, actions.unbind(1)))
        return actions, log_probs, sum(head.entropy() for head in heads), self.critic(h)[:, 0], state


class SingleFile:
    """Recurrent PPO as in single-file implementations: minibatches of whole environments, truncation is termination."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self.envs = SyncVectorEnv([workload.make_env] * workload.num_envs, autoreset_mode=AutoresetMode.SAME_STEP)
        space, actions = self.envs.single_observation_space, self.envs.single_action_space
        self.num_symbols = int(space.n) if isinstance(space, spaces.Discrete) else 0
        shape = (self.num_symbols,) if self.num_symbols else space.shape
        self.one_action = isinstance(actions, spaces.Discrete)
        nvec = [int(actions.n)] if self.one_action else actions.nvec.tolist()
        self.policy = SingleFilePolicy(workload, shape, nvec)
        self.optimizer = torch.optim.Adam(self.policy.parameters(), lr=3e-4, eps=1e-5)
        T, B = workload.rollout_length, workload.num_envs
        self.observations = torch.zeros(T, B, *shape)
        self.actions = torch.zeros(T, B, len(nvec), dtype=torch.long)
        self.log_probs, self.rewards, self.starts, self.values = (torch.zeros(T, B) for _ in range(4))
        self.next_observation = self._tensor(self.envs.reset(seed=0)[0])
        self.next_start = torch.ones(B)
        self.state = (torch.zeros(1, B, workload.hidden_size), torch.zeros(1, B, workload.hidden_size))

    def _tensor(self, observations: np.ndarray) -> Tensor:
        tensor = torch.as_tensor(observations)
        return nn.functional.one_hot(tensor, self.num_symbols).float() if self.num_symbols else tensor.float()

    def update(self) -> None:
        """One rollout and one update."""
        state_before = tuple(part.clone() for part in self.state)
        for t in range(self.workload.rollout_length):
            self.observations[t], self.starts[t] = self.next_observation, self.next_start
            with torch.no_grad():
                actions, self.log_probs[t], _, self.values[t], self.state = self.policy(
                    self.next_observation, self.state, self.next_start
                )
            self.actions[t] = actions
            chosen = actions[:, 0] if self.one_action else actions
            observations, rewards, terminated, truncated, _ = self.envs.step(chosen.numpy())
            self.rewards[t] = torch.as_tensor(rewards)
            self.next_observation = self._tensor(observations)
            self.next_start = torch.as_tensor(terminated | truncated).float()
        advantages = self._advantages()
        self._learn(state_before, advantages, advantages + self.values)

    @torch.no_grad()
    def _advantages(self, gamma: float = 0.99, gae_lambda: float = 0.95) -> Tensor:
        h, _ = self.policy.hidden(self.next_observation, self.state, self.next_start)
        next_value, alive = self.policy.critic(h)[:, 0], 1.0 - self.next_start
        advantages, last = torch.zeros_like(self.rewards), 0.0
        for t in reversed(range(self.workload.rollout_length)):
            delta = self.rewards[t] + gamma * alive * next_value - self.values[t]
            advantages[t] = last = delta + gamma * gae_lambda * alive * last
            next_value, alive = self.values[t], 1.0 - self.starts[t]
        return advantages

    def _learn(self, state: tuple[Tensor, ...], advantages: Tensor, returns: Tensor) -> None:
        def pick(buffer: Tensor, chosen: Tensor) -> Tensor:
            return buffer[:, chosen].flatten(0, 1)

        for _ in range(self.workload.num_epochs):
            for chosen in torch.randperm(self.workload.num_envs).chunk(self.workload.num_minibatches):
                _, log_probs, entropy, values, _ = self.policy(
                    pick(self.observations, chosen),
                    (state[0][:, chosen], state[1][:, chosen]),
                    pick(self.starts, chosen),
                    pick(self.actions, chosen),
                )
                advantage = pick(advantages, chosen)
                advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
                ratio = (log_probs - pick(self.log_probs, chosen)).exp()
                surrogate = torch.min(advantage * ratio, advantage * ratio.clamp(0.8, 1.2)).mean()
                value_loss = 0.5 * (values - pick(returns, chosen)).square().mean()
                loss = -surrogate - 0.01 * entropy.mean() + 0.5 * value_loss
                self.optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(self.policy.parameters(), 0.5)
                self.optimizer.step()


def compare(workload: Workload, *, updates: int, warm_up: int, state_refresh: str) -> list[dict]:
    """Steps/s of each library on one workload, ours first, and how many times as fast ours is."""
    peers: dict[str, Callable[[], None]] = {}
    if importlib.util.find_spec("sb3_contrib") is not None:
        peers["sb3-contrib"] = sb3_contrib(workload)
    peers["single file"] = SingleFile(workload).update
    seconds: dict[str, list[float]] = {name: [] for name in ("dualhead", *peers)}

    def take_turns() -> None:
        for name, update in peers.items():
            began = time.perf_counter()
            update()
            seconds[name].append(time.perf_counter() - began)

    timings = time_ours(workload, num_updates=warm_up + updates, between=take_turns, state_refresh=state_refresh)
    seconds["dualhead"] = [timing.total for timing in timings]
    rates = {name: [workload.num_steps / turn for turn in turns[warm_up:]] for name, turns in seconds.items()}
    ours = statistics.median(rates["dualhead"])
    return [
        {
            "workload": workload.name,
            "library": name,
            "steps_per_s": round(statistics.median(of_library), 1),
            "steps_per_s_min": round(min(of_library), 1),
            "steps_per_s_max": round(max(of_library), 1),
            "ours_is_faster_by": round(ours / statistics.median(of_library), 2),
        }
        for name, of_library in rates.items()
    ]


def expect_equal_groups(workload: Workload) -> None:
    """Raises ValueError if the environments cannot be divided into the minibatches of the other libraries."""
    if workload.num_envs % workload.num_minibatches:
        raise ValueError(
            f"{workload.name}: expected a number of environments that {workload.num_minibatches} minibatches divide, "
            f"got {workload.num_envs}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument(
        "--state-refresh", choices=["never", "once"], default="never", help="`once`: our default's extra pass"
    )
    args = parser.parse_args()
    workloads = chosen_workloads(parser, args, check=expect_equal_groups)

    keep_freed_memory()
    torch.set_num_threads(args.threads)
    lines = sys.stderr if args.json else sys.stdout
    if importlib.util.find_spec("sb3_contrib") is None:
        print(INSTALL, file=sys.stderr)
    print(
        f"torch {torch.__version__}, {args.threads} of {os.cpu_count()} threads, median of {args.updates} updates "
        f"after {args.warm_up}; ours with state_refresh={args.state_refresh}; environments x{args.num_envs_factor:g}, "
        f"rollout x{args.rollout_factor:g}",
        file=lines,
    )
    results = []
    for workload in workloads:
        rows = compare(workload, updates=args.updates, warm_up=args.warm_up, state_refresh=args.state_refresh)
        results += rows
        for row in rows:
            beside = "" if row is rows[0] else f"  ours x {row['ours_is_faster_by']:.2f}"
            print(
                f"{row['workload']:>7} {row['library']:<12} {row['steps_per_s']:>8,.0f} steps/s "
                f"({row['steps_per_s_min']:,.0f}-{row['steps_per_s_max']:,.0f}){beside}",
                file=lines,
                flush=True,
            )
    if args.json:
        print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
