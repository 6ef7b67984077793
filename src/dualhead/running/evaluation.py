"""Play a trained policy for a score."""

from __future__ import annotations

import math
import os
import warnings
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np

from dualhead import snapshot
from dualhead.errors import CheckpointError, DataError, EnvironmentFailed
from dualhead.running.checkpoint import RunError
from dualhead.running.config import EVAL_EPISODES, EVAL_MAX_STEPS, EVALUATION_SEED, RunConfig
from dualhead.running.environment import Environment, config_to_play, is_streams, open_streams, open_window
from dualhead.running.machine import Requests
from dualhead.running.playing import Player, Policy, expect_spaces, load_player, run_directory
from dualhead.running.results import interval
from dualhead.types import as_numpy
from dualhead.worlds.streams import Streams

EVALUATION_ENVS = 20
SELECTION_SEED = 20_000
"""Of evaluations while training, which choose the best checkpoint; `dualhead eval` reports other episodes."""


class Stopped(Exception):
    """A request to stop ended an evaluation."""


class Evaluation(NamedTuple):
    """Sum of task rewards and number of steps of each episode, and how many were cut after `eval_max_steps`."""

    returns: list[float]
    lengths: list[int]
    num_cut: int = 0

    def summary(self) -> dict[str, float]:
        """Means over episodes, and a 95% confidence interval of the mean return (NaN for a single episode).

        `std_return` is the population standard deviation (divided by n).
        """
        low, high = interval(self.returns)
        return {
            "mean_return": float(np.mean(self.returns)),
            "std_return": float(np.std(self.returns)),
            "ci95_low": low,
            "ci95_high": high,
            "mean_length": float(np.mean(self.lengths)),
            "episodes": len(self.returns),
            "episodes_cut": self.num_cut,
        }


def play_episodes(
    policy: Policy,
    streams: Streams,
    *,
    episodes: int,
    seed: int = EVALUATION_SEED,
    deterministic: bool = True,
    max_steps: int = EVAL_MAX_STEPS,
    requests: Requests | None = None,
) -> Evaluation:
    """Plays whole episodes, an equal share in every stream: counting those that end first would favour short ones.

    The streams are reset first, so the same seed gives the same episodes.

    Args:
        policy: is only read.
        streams: B at most `episodes`.
        seed: of the environments and of sampling.
        deterministic: the likeliest actions, or sampled ones.
        max_steps: longer episodes are cut, with a warning.
        requests: one to stop raises `Stopped`.

    Raises:
        DataError: the environment gave invalid observations or rewards.
    """
    player = Player(policy, streams.observation_space, streams.action_space, seed=seed)
    num_streams = streams.num_streams
    shares = np.bincount(np.arange(episodes) % num_streams, minlength=num_streams)
    num_played, played, num_cut = np.zeros(num_streams, dtype=np.int64), [], 0
    while (num_played < shares).any():  # once, unless an episode is cut: only all streams together can be reset
        returns, lengths = np.zeros(num_streams), np.zeros(num_streams, dtype=np.int64)
        was_cut = np.zeros(num_streams, dtype=bool)
        observations, ended, rewards = streams.reset(seed=seed), ~was_cut, returns
        while (plays := (num_played < shares) & ~was_cut).any():
            if requests is not None and requests.stop:
                raise Stopped
            step = streams.step(player.act(observations, ended, rewards=rewards, deterministic=deterministic))
            observations, ended = step.observations, as_numpy(step.terminated) | as_numpy(step.truncated)
            rewards = as_numpy(step.rewards)
            returns, lengths = returns + rewards, lengths + 1
            cut = plays & ~ended & (lengths >= max_steps)
            over = plays & (ended | cut)
            played += [(i, float(returns[i]), int(lengths[i])) for i in np.flatnonzero(over)]
            num_played, was_cut, num_cut = num_played + over, was_cut | cut, num_cut + int(cut.sum())
            returns[ended], lengths[ended] = 0.0, 0
        seed += 1
    if num_cut:
        warnings.warn(
            f"{num_cut} of {len(played)} episodes of this evaluation were cut after {max_steps} steps "
            f"(eval_max_steps): their returns are the sums until then",
            stacklevel=2,
        )
    played.sort(key=lambda episode: episode[0])
    return Evaluation([score for _, score, _ in played], [length for _, _, length in played], num_cut)


def evaluation_size(config: RunConfig, episodes: int) -> tuple[int, int]:
    """How many environments (or worlds) to play in, and the number of episodes, raised to a multiple of the agents."""
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
    render: bool = False,
) -> Evaluation:
    """Plays the newest whole checkpoint of a run (or the checkpoint file given) in the run's environment.

    Args:
        run: a run directory, or one of its checkpoint files.
        episodes: how many to play; raised to a multiple of the agents in a world, so that each plays equally many.
        env: what to play in instead: a callable that makes one environment, a Gymnasium vector environment, `Streams`.
            Needed where `train` got one of these.
        encoder, memory: the parts of its own that the policy was trained with.
        seed: of the environments and of sampling.
        deterministic: the likeliest actions, or sampled ones.
        render: show the episodes in a window, one after the other. They are others than without.

    Raises:
        RunError: no run, or no whole checkpoint, is there, the environment gave invalid observations or rewards, or it
            cannot be shown.
        CheckpointError: the checkpoint does not fit the run's configuration, or a part is missing.
    """
    if episodes < 1:
        raise RunError(f"episodes: expected at least 1, got {episodes}")
    config = config_to_play(run_directory(run))
    player, path, metadata = load_player(run, encoder=encoder, memory=memory)
    num_streams, num_agents = snapshot.num_streams(metadata), config.world.num_agents
    if num_streams % num_agents:
        raise CheckpointError(f"{path} is of {num_streams} streams, but {run} is of worlds of {num_agents} agents")
    num_envs, episodes = evaluation_size(config, episodes)
    streams = open_window(config) if render else open_streams(config, env, num_envs=num_envs)
    try:
        expect_spaces(player, streams, path)
        return play_episodes(
            player.policy,
            streams,
            episodes=episodes,
            seed=seed,
            deterministic=deterministic,
            max_steps=config.eval_max_steps,
        )
    except (DataError, EnvironmentFailed) as error:
        raise RunError(f"{config.env}: {error}") from error
    except gym.error.DependencyNotInstalled as error:
        raise RunError(f"{config.env} cannot be shown, a package is missing: {error}") from error
    finally:
        if not is_streams(env):
            streams.close()
