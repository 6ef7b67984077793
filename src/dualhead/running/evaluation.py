"""Play a trained policy with a recurrent state of its own."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import numpy as np
import torch

from dualhead.config import RunConfig
from dualhead.networks.encoders import ObservationSpec
from dualhead.networks.heads import ActionSpec
from dualhead.networks.policy import RecurrentPolicy
from dualhead.running.checkpoint import RunError, read_config, read_newest
from dualhead.storage import fill, without_prefix
from dualhead.worlds.streams import Streams, make_streams

EVALUATION_ENVS = 20
EVALUATION_SEED = 10_000


class Evaluation(NamedTuple):
    """Fields:
    returns, lengths: [episodes], the sum of task rewards and the number of steps of each.
    """

    returns: list[float]
    lengths: list[int]

    def summary(self) -> dict[str, float]:
        return {
            "mean_return": float(np.mean(self.returns)),
            "std_return": float(np.std(self.returns)),
            "mean_length": float(np.mean(self.lengths)),
            "episodes": len(self.returns),
        }


@torch.no_grad()
def evaluate(
    policy: RecurrentPolicy, streams: Streams, *, episodes: int, seed: int = EVALUATION_SEED, deterministic: bool = True
) -> Evaluation:
    """Plays whole episodes, an equal share in every stream (counting whichever end first would favour short ones).

    Args:
        policy: stays as it is.
        streams: B at most `episodes`.
        episodes: how many to play.
        seed: of the environments and of sampling.
        deterministic: the likeliest actions, or sampled ones.
    """
    observation_spec, action_spec = ObservationSpec(streams.observation_space), ActionSpec(streams.action_space)
    generator = torch.Generator(policy.device).manual_seed(seed)
    num_streams = streams.num_streams
    shares = np.full(num_streams, episodes // num_streams) + (np.arange(num_streams) < episodes % num_streams)
    returns: list[list[float]] = [[] for _ in range(num_streams)]
    lengths: list[list[int]] = [[] for _ in range(num_streams)]
    running_return, running_length = np.zeros(num_streams), np.zeros(num_streams, dtype=np.int64)
    state = policy.initial_state(num_streams)
    observations = streams.reset(seed=seed)
    while any(len(done) < share for done, share in zip(returns, shares)):
        tensors = observation_spec.to_tensors(observations, num_streams, device=policy.device, dtype=policy.dtype)
        output, state = policy.step(tensors, state)
        actions = output.distribution.mode() if deterministic else output.distribution.sample(generator)
        step = streams.step(action_spec.to_env(actions.cpu().numpy()))
        observations = step.observations
        running_return += step.rewards
        running_length += 1
        ended = step.terminated | step.truncated
        for stream in np.flatnonzero(ended):
            if len(returns[stream]) < shares[stream]:
                returns[stream].append(float(running_return[stream]))
                lengths[stream].append(int(running_length[stream]))
        running_return[ended] = 0.0
        running_length[ended] = 0
        state = state.reset_where(torch.from_numpy(ended).to(policy.device))
    return Evaluation([x for part in returns for x in part], [x for part in lengths for x in part])


def evaluate_run(
    run_dir: str | os.PathLike[str], *, episodes: int, seed: int = EVALUATION_SEED, deterministic: bool = True
) -> Evaluation:
    """Plays the newest whole checkpoint of a run in the run's environment.

    Raises:
        RunError: no run, or no whole checkpoint, is there.
        CheckpointError: the checkpoint does not fit the run's configuration.
    """
    if episodes < 1:
        raise RunError(f"episodes: expected at least 1, got {episodes}")
    config = read_config(run_dir)
    streams = make_streams(config.env, min(episodes, EVALUATION_ENVS))
    try:
        policy = load_weights(config, streams, run_dir)
        return evaluate(policy, streams, episodes=episodes, seed=seed, deterministic=deterministic)
    finally:
        streams.close()


def load_weights(config: RunConfig, streams: Streams, run_dir: str | os.PathLike[str]) -> RecurrentPolicy:
    """The policy of a run's newest whole checkpoint."""
    policy = RecurrentPolicy(
        ObservationSpec(streams.observation_space),
        ActionSpec(streams.action_space),
        config=config.network,
        normalize_observations=config.ppo.normalize_observations,
    )
    path, tensors, _ = read_newest(run_dir)
    weights: dict[str, Any] = policy.state_dict(keep_vars=True)
    fill(weights, without_prefix("policy", tensors), what=str(path))
    return policy
