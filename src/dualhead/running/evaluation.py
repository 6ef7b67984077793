"""Play a trained policy for a score."""

from __future__ import annotations

import math
import os
from typing import Any, NamedTuple

import numpy as np

from dualhead.errors import DataError
from dualhead.running.checkpoint import RunError, read_config
from dualhead.running.config import EVAL_EPISODES, EVALUATION_SEED, RunConfig
from dualhead.running.environment import Environment, is_streams, open_streams
from dualhead.running.playing import Player, Policy, load_weights, run_directory
from dualhead.running.results import interval
from dualhead.types import as_numpy
from dualhead.worlds.streams import Streams

EVALUATION_ENVS = 20
SELECTION_SEED = 20_000
"""Of evaluations while training, which choose the best checkpoint; `dualhead eval` reports other episodes."""


class Evaluation(NamedTuple):
    """Fields:
    returns, lengths: [episodes], the sum of task rewards and the number of steps of each.
    """

    returns: list[float]
    lengths: list[int]

    def summary(self) -> dict[str, float]:
        """Means over episodes, with a 95% confidence interval of the mean return: NaN where one episode gives none.

        `std_return` is the deviation of the episodes at hand, divided by n.
        """
        low, high = interval(self.returns)
        return {
            "mean_return": float(np.mean(self.returns)),
            "std_return": float(np.std(self.returns)),
            "ci95_low": low,
            "ci95_high": high,
            "mean_length": float(np.mean(self.lengths)),
            "episodes": len(self.returns),
        }


def play_episodes(
    policy: Policy, streams: Streams, *, episodes: int, seed: int = EVALUATION_SEED, deterministic: bool = True
) -> Evaluation:
    """Plays whole episodes, an equal share in every stream (counting whichever end first would favour short ones).

    The streams are reset first: the same seed gives the same episodes, whatever was played in them before.

    Args:
        policy: stays as it is.
        streams: B at most `episodes`.
        episodes: how many to play.
        seed: of the environments and of sampling.
        deterministic: the likeliest actions, or sampled ones.

    Raises:
        DataError: the environment gave what a policy cannot look at.
    """
    player = Player(policy, streams.observation_space, streams.action_space, seed=seed)
    num_streams = streams.num_streams
    shares = np.full(num_streams, episodes // num_streams) + (np.arange(num_streams) < episodes % num_streams)
    returns: list[list[float]] = [[] for _ in range(num_streams)]
    lengths: list[list[int]] = [[] for _ in range(num_streams)]
    running_return, running_length = np.zeros(num_streams), np.zeros(num_streams, dtype=np.int64)
    observations, ended = streams.reset(seed=seed), np.ones(num_streams, dtype=bool)
    rewards = np.zeros(num_streams)
    while any(len(done) < share for done, share in zip(returns, shares)):
        step = streams.step(player.act(observations, ended, rewards=rewards, deterministic=deterministic))
        observations, ended = step.observations, as_numpy(step.terminated) | as_numpy(step.truncated)
        rewards = as_numpy(step.rewards)
        running_return += rewards
        running_length += 1
        for stream in np.flatnonzero(ended):
            if len(returns[stream]) < shares[stream]:
                returns[stream].append(float(running_return[stream]))
                lengths[stream].append(int(running_length[stream]))
        running_return[ended] = 0.0
        running_length[ended] = 0
    return Evaluation([x for part in returns for x in part], [x for part in lengths for x in part])


def evaluation_size(config: RunConfig, episodes: int) -> tuple[int, int]:
    """Environments (or worlds) to play that many episodes in, and how many those are in fact.

    Each agent of a world plays its own; the number is raised to a multiple of theirs, so that all count the same.
    """
    per_env = config.num_streams // config.num_envs
    return max(1, min(episodes, EVALUATION_ENVS) // per_env), per_env * math.ceil(episodes / per_env)


def evaluate(
    run: str | os.PathLike[str],
    *,
    episodes: int = EVAL_EPISODES,
    env: Environment | None = None,
    encoder: Any = None,
    memory: Any = None,
    seed: int = EVALUATION_SEED,
    deterministic: bool = True,
) -> Evaluation:
    """Plays the newest whole checkpoint of a run (or the checkpoint file given) in the run's environment.

    Of several agents in a world each plays equally many episodes: in all up to one for each of them more than asked
    for.

    Args:
        run: a run directory, or one of its checkpoint files.
        episodes: how many to play.
        env: what to play in instead: a callable that makes one environment, a Gymnasium vector environment, `Streams`.
            Needed where `train` got one of these.
        encoder, memory: the parts of its own that the policy was trained with.
        seed: of the environments and of sampling.
        deterministic: the likeliest actions, or sampled ones.

    Raises:
        RunError: no run, or no whole checkpoint, is there, or the environment gave what a policy cannot look at.
        CheckpointError: the checkpoint does not fit the run's configuration, or a part is missing.
    """
    if episodes < 1:
        raise RunError(f"episodes: expected at least 1, got {episodes}")
    config = read_config(run_directory(run))
    num_envs, episodes = evaluation_size(config, episodes)
    streams = open_streams(config, env, num_envs=num_envs)
    try:
        loaded = load_weights(run, encoder=encoder, memory=memory)
        loaded.expect_spaces(streams.observation_space, streams.action_space, of=config.env)
        return play_episodes(loaded.policy, streams, episodes=episodes, seed=seed, deterministic=deterministic)
    except DataError as error:
        raise RunError(f"{config.env}: {error}") from error
    finally:
        if not is_streams(env):
            streams.close()
