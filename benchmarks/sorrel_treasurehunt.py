"""Sorrel's treasurehunt with its own IQN, with this agent and with random actions: the reward of every epoch.

    python -m benchmarks.sorrel_treasurehunt --seeds 0 1 2 --out benchmarks/results/sorrel/treasurehunt.csv
    python -m benchmarks.sorrel_treasurehunt --summary benchmarks/results/sorrel/*.csv

Needs Python 3.12 and `pip install dualhead[sorrel]`. World, turns and the IQN's settings are those of
`sorrel.examples.treasurehunt`; every model learns at the end of each epoch, this agent with its default settings. After
training, 20 epochs are played without learning (`phase` says which), the IQN then without random actions (epsilon 0).
"""

import argparse
import csv
import itertools
import random
import statistics
import tempfile
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

NUM_PLAYED = 20
FIELDS = ("model", "observations", "seed", "phase", "epoch", "reward")


def make_env(kind, observations, seed, *, epochs, num_agents):
    from sorrel.examples.treasurehunt.entities import EmptyEntity
    from sorrel.examples.treasurehunt.env import TreasurehuntEnv
    from sorrel.examples.treasurehunt.world import TreasurehuntWorld
    from sorrel.models.base_model import RandomModel

    from dualhead.sorrel import SorrelDualHeadPPO

    class Env(TreasurehuntEnv):
        def setup_agents(self):
            super().setup_agents()
            for number, agent in enumerate(self.agents):
                sizes = agent.observation_spec.input_size, agent.action_spec.n_actions
                if kind == "dualhead":
                    agent.model = SorrelDualHeadPPO(*sizes, seed=100 * seed + number)
                elif kind == "random":
                    agent.model = RandomModel(*sizes, memory_size=1024)
                    agent.model.memory.n_frames = 1

    config = {
        "experiment": {"epochs": epochs - 1, "max_turns": 100, "record_period": 50},  # Sorrel runs one more
        "model": {
            "agent_vision_radius": 2,
            "epsilon_decay": 0.0005,
            "observation_spec": observations,
            "num_agents": num_agents,
        },
        "world": {
            "height": 21,
            "width": 21,
            "gem_value": 10,
            "food_value": 5,
            "bone_value": -10,
            "spawn_prob": 0.005,
        },
    }
    seeds = itertools.count(100 * seed)
    with patch("torch.random.seed", lambda: next(seeds)):  # the example seeds its models by the clock
        return Env(TreasurehuntWorld(config=config, default_entity=EmptyEntity()), config)


def play(env, num_epochs):
    """The world's reward of epochs without learning and without random actions."""
    rewards = []
    for epoch in range(num_epochs):
        env.reset()
        for agent in env.agents:
            agent.model.set_epsilon(0.0)
            agent.model.start_epoch_action(epoch=epoch)
        while env.turn < 100:
            env.take_turn(epoch)
        for agent in env.agents:
            agent.model.end_epoch_action(epoch=epoch)
        rewards.append(env.world.total_reward)
    return rewards


def run(kind, observations, seed, *, epochs, num_agents, write):
    """Trains and plays; `write` takes the phase, the epoch and its reward, as they come."""
    from sorrel.utils.logging import Logger

    class Writer(Logger):
        def record_epoch(self, epoch, loss, reward, epsilon=0, **_):
            write("train", epoch, reward)

    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  (what the worlds draw from)
    torch.manual_seed(seed)
    env = make_env(kind, observations, seed, epochs=epochs, num_agents=num_agents)
    with tempfile.TemporaryDirectory() as folder:
        env.run_experiment(animate=False, logger=Writer(epochs), output_dir=Path(folder))
    for epoch, reward in enumerate(play(env, NUM_PLAYED)):
        write("play", epoch, reward)


def summarise(paths):
    """Mean reward of an epoch for each model: over the first and the last 50 of training, and played."""
    rows = [row for path in paths for row in csv.DictReader(path.read_text().splitlines())]
    for observations in sorted({row["observations"] for row in rows}):
        for kind in ("random", "iqn", "dualhead"):
            own = [row for row in rows if (row["observations"], row["model"]) == (observations, kind)]
            line = []
            for seed in sorted({row["seed"] for row in own}):
                of_seed = [row for row in own if row["seed"] == seed]
                train = [float(row["reward"]) for row in of_seed if row["phase"] == "train"]
                played = [float(row["reward"]) for row in of_seed if row["phase"] == "play"]
                line.append((statistics.mean(train[:50]), statistics.mean(train[-50:]), statistics.mean(played)))
            for name, numbers in zip(("first 50", "last 50", "played"), zip(*line)):
                seeds = ", ".join(f"{number:.1f}" for number in numbers)
                print(f"{observations:<7} {kind:<9} {name:<10} {statistics.mean(numbers):8.1f}   seeds {seeds}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["dualhead", "iqn", "random"])
    parser.add_argument("--observations", choices=["onehot", "rgb"], default="onehot")
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--agents", type=int, default=1)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--summary", type=Path, nargs="+")
    arguments = parser.parse_args()
    if arguments.summary:
        return summarise(arguments.summary)
    torch.set_num_threads(1)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        for seed, kind in itertools.product(arguments.seeds, arguments.models):

            def write(*of_epoch, start=(kind, arguments.observations, seed)):
                writer.writerow(dict(zip(FIELDS, (*start, *of_epoch))))
                file.flush()

            sizes = {"epochs": arguments.epochs, "num_agents": arguments.agents}
            run(kind, arguments.observations, seed, **sizes, write=write)


if __name__ == "__main__":
    main()
