"""The speed of the commons alone, and its share of a training step with the specification's network.

    python benchmarks/commons.py [--json]

The world alone is stepped with random actions, ten agents per world; medians over `--repeats` periods of a second.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch

from dualhead.config import NetworkConfig, PPOConfig
from dualhead.running.config import RunConfig
from dualhead.running.machine import keep_freed_memory
from dualhead.running.session import Session
from dualhead.worlds.commons.config import CommonsConfig
from dualhead.worlds.commons.world import Commons


def world_alone(form: str, num_worlds: int, *, repeats: int) -> float:
    """Agent-steps per second."""
    worlds = Commons(CommonsConfig(form=form), num_worlds=num_worlds)
    worlds.reset(seed=0)
    choices = [worlds.action_space[head].n for head in ("move", "vote")]
    actions = [torch.stack([torch.randint(n, (worlds.num_streams,)) for n in choices], dim=1) for _ in range(16)]
    rates = []
    for _ in range(repeats + 1):  # the first one warms up
        steps, begun = 0, time.perf_counter()
        while time.perf_counter() - begun < 1.0:
            worlds.step(actions[steps % 16])
            steps += 1
        rates.append(steps * worlds.num_streams / (time.perf_counter() - begun))
    return statistics.median(rates[1:])


def share_of_training(form: str, *, num_updates: int) -> tuple[float, float]:
    """Agent-steps per second of training with the specification's network, and the world's share of its time."""
    config = RunConfig(
        env="commons",
        world={"form": form},
        num_envs=8,
        total_steps=10**9,
        device="cpu",
        network=NetworkConfig.spec(),
        ppo=PPOConfig.spec(batch_size=1000, sequence_length=16, state_refresh="once", bootstrap_last=True),
    )
    session = Session(config)
    session.begin()
    in_world, world_step = 0.0, session.streams.step

    def timed_step(actions):
        nonlocal in_world
        begun = time.perf_counter()
        step = world_step(actions)
        in_world += time.perf_counter() - begun
        return step

    session.streams.step = timed_step
    for update in range(num_updates + 1):
        if update == 1:  # after a warm-up
            in_world, begun, before = 0.0, time.perf_counter(), session.learner.num_steps
        while not session.learner.rollout_is_ready:
            session.record(session.streams.step(session.learner.act(session.observations)))
        session.learn()
    seconds = time.perf_counter() - begun
    return (session.learner.num_steps - before) / seconds, in_world / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--updates", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    rows = [
        {
            "form": form,
            "num_worlds": num_worlds,
            "agent_steps_per_s": world_alone(form, num_worlds, repeats=args.repeats),
        }
        for form in ("bandit", "grid")
        for num_worlds in (64, 1024)
    ]
    for form in ("bandit", "grid"):
        rate, share = share_of_training(form, num_updates=args.updates)
        rows.append({"form": form, "training_steps_per_s": rate, "share_of_world": share})
    if args.json:
        print(json.dumps(rows))
        return
    for row in rows:
        if "num_worlds" in row:
            print(f"{row['form']:>6}, {row['num_worlds']:>5} worlds of 10: {row['agent_steps_per_s']:>12,.0f} steps/s")
        else:
            print(
                f"{row['form']:>6}, training, default network: {row['training_steps_per_s']:>8,.0f} agent-steps/s, "
                f"{row['share_of_world']:.1%} of it in the world"
            )


if __name__ == "__main__":
    main()
