"""Play a trained policy for a score."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from dualhead import snapshot
from dualhead.errors import CheckpointError, DataError, EnvironmentFailed
from dualhead.running.checkpoint import RunError
from dualhead.running.config import EVAL_EPISODES, EVAL_MAX_STEPS, EVALUATION_SEED, RunConfig
from dualhead.running.environment import Environment, config_to_play, is_streams, open_streams, open_window
from dualhead.running.machine import Requests
from dualhead.running.playing import Player, Players, expect_spaces, load_player, run_directory
from dualhead.running.results import interval
from dualhead.types import as_numpy
from dualhead.worlds.streams import Streams, names_of_agents

EVALUATION_ENVS = 20
SELECTION_SEED = 20_000
"""Of evaluations while training, which choose the best checkpoint; `dualhead eval` reports other episodes."""


class Stopped(Exception):
    """A request to stop ended an evaluation."""


def scores(returns: Sequence[float]) -> dict[str, float]:
    """Mean return, and its 95% confidence interval (NaN for a single episode).

    `std_return` is the population standard deviation (divided by n).
    """
    low, high = interval(returns)
    mean, std = (float(np.mean(returns)), float(np.std(returns))) if returns else (math.nan, math.nan)
    return {"mean_return": mean, "std_return": std, "ci95_low": low, "ci95_high": high}


class Evaluation(NamedTuple):
    """The return (sum of task rewards) of each episode of every agent.

    Fields:
        returns, lengths: return and number of steps of each episode.
        num_cut: how many were cut after `eval_max_steps`.
        agents: in a world of several agents the returns of each, by its name.
        team: in such a world the sum of its agents' returns, for each episode of the world.
    """

    returns: list[float]
    lengths: list[int]
    num_cut: int = 0
    agents: Mapping[str, list[float]] = MappingProxyType({})
    team: Sequence[float] = ()

    def summary(self) -> dict[str, float]:
        """Means over the episodes of all agents; see `scores`."""
        return scores(self.returns) | {
            "mean_length": float(np.mean(self.lengths)),
            "episodes": len(self.returns),
            "episodes_cut": self.num_cut,
        }


def play_episodes(
    player: Player | Players,
    streams: Streams,
    *,
    episodes: int,
    seed: int = EVALUATION_SEED,
    deterministic: bool = True,
    max_steps: int = EVAL_MAX_STEPS,
    requests: Requests | None = None,
) -> Evaluation:
    """Plays whole episodes, an equal share in every stream: counting those that end first would favour short ones.

    The streams are reset first, so the same seed gives the same episodes. What a stream does while it is not `active`
    does not count.

    Args:
        player: is reset first, too.
        streams: B at most `episodes`.
        seed: of the environments and of sampling.
        deterministic: the likeliest actions, or sampled ones.
        max_steps: longer episodes are cut, with a warning.
        requests: one to stop raises `Stopped`.

    Raises:
        DataError: the environment gave invalid observations or rewards.
    """
    num_streams, num_agents = streams.num_streams, getattr(streams, "num_agents", 1)

    def with_worlds(of_streams: NDArray[Any], of_worlds: Callable[..., Any]) -> NDArray[Any]:
        """Numbers of B streams, and behind them those of W worlds of several agents: a world plays for its team."""
        if num_agents == 1:
            return of_streams
        return np.concatenate([of_streams, of_worlds(of_streams.reshape(-1, num_agents), axis=1)])

    shares = with_worlds(np.bincount(np.arange(episodes) % num_streams, minlength=num_streams), np.min)
    num_played, played, num_cut, everybody = np.zeros_like(shares), [], 0, np.ones(num_streams, dtype=bool)
    player.reset(seed=seed)
    while (num_played < shares)[:num_streams].any():  # once, unless one is cut: only all streams can be reset together
        before, returns = num_played, np.zeros(len(shares))
        # Steps of the episode; and since the stream last took part.
        lengths, idle = np.zeros_like(shares), np.zeros_like(shares)
        was_cut = np.zeros(len(shares), dtype=bool)
        observations, rewards, starts = streams.reset(seed=seed), np.zeros(num_streams), everybody
        while (plays := (num_played < shares) & ~was_cut)[:num_streams].any():
            if requests is not None and requests.stop:
                raise Stopped
            actions = player.act(observations, starts, rewards=rewards, deterministic=deterministic)
            active = getattr(streams, "active", None)
            active = everybody if active is None else np.array(as_numpy(active))
            step = streams.step(actions)
            observations, rewards = step.observations, as_numpy(step.rewards)
            # A stream that comes back begins an episode.
            starts = as_numpy(step.terminated) | as_numpy(step.truncated) | ~active
            acted = with_worlds(active, np.any)
            ended = with_worlds(starts, np.all) & acted
            returns = returns + with_worlds(np.multiply(rewards, active, dtype=np.float64), np.sum)
            lengths, idle = lengths + acted, np.where(acted, 0, idle + 1)
            cut = plays & ~ended & (np.maximum(lengths, idle) >= max_steps)
            over = plays & acted & (ended | cut)
            played += [(i, float(returns[i]), int(lengths[i])) for i in np.flatnonzero(over)]
            num_played, was_cut = num_played + over, was_cut | cut
            num_cut += int((cut & over)[:num_streams].sum())
            returns[ended], lengths[ended] = 0.0, 0
        shares[num_played == before] = 0  # never took part
        seed += 1
    if num_cut:
        warnings.warn(
            f"{num_cut} of {num_played[:num_streams].sum()} episodes of this evaluation were cut after {max_steps} "
            f"steps (eval_max_steps): their returns are the sums until then",
            stacklevel=2,
        )
    played.sort(key=lambda episode: episode[0])
    of_streams = [episode for episode in played if episode[0] < num_streams]
    names = names_of_agents(streams) if num_agents > 1 else ()
    return Evaluation(
        [score for _, score, _ in of_streams],
        [length for _, _, length in of_streams],
        num_cut,
        {name: [score for i, score, _ in of_streams if i % num_agents == agent] for agent, name in enumerate(names)},
        [score for i, score, _ in played if i >= num_streams],
    )


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
            player,
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
