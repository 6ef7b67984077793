"""Run directories: what is in them, and some that nobody trained, with an untrained agent's checkpoint."""

import csv
from pathlib import Path

import torch
from settings import spec_segments

from dualhead.config import NetworkConfig
from dualhead.running.checkpoint import new_run_dir, save_checkpoint
from dualhead.running.config import RunConfig
from dualhead.running.session import make_learner
from dualhead.worlds.streams import make_streams


def save_run(path, env="dualhead/RecallCue-v0", *, memory="lstm", num_layers=1, seed=0, num_envs=2) -> Path:
    """The directory of a run of a small agent whose weights and observation statistics are all random."""
    config = RunConfig(
        env=env,
        seed=seed,
        run_dir=str(path),
        total_steps=50 * num_envs,
        num_envs=num_envs,
        network=NetworkConfig.spec(memory=memory, hidden_size=16, num_layers=num_layers, encoder_sizes=(12,)),
        ppo=spec_segments(rollout_length=50, batch_size=50, normalize_observations=True),
    )
    run_dir = new_run_dir(config)
    streams = make_streams(env, num_envs)
    agent = make_learner(config, streams)
    randomize(agent.policy, seed)
    save_checkpoint(run_dir, *agent.state(), keep=config.keep_checkpoints)
    streams.close()
    return run_dir


def rows_of(run_dir, name="metrics.csv"):
    """The rows of a file of metrics, as text by column."""
    with (Path(run_dir) / name).open(newline="") as file:
        return list(csv.DictReader(file))


def randomize(policy, seed=0):
    """Weights away from their initialisation, biases that are not zero, statistics that are not 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            fan_in = max(1, parameter[0].numel())
            parameter += 0.3 * fan_in**-0.5 * torch.randn(parameter.shape, generator=generator)
        for normalizer in policy.normalizer.of_leaf:
            normalizer.update(1.0 + 2.0 * torch.randn(50, *normalizer.mean.shape, generator=generator))
