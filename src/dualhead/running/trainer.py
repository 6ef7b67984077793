"""The training loop."""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from dualhead.agent import DualHeadRecurrentPPO
from dualhead.config import RunConfig
from dualhead.population import IndependentLearners, Learner, Turnover, strengths_by_agent
from dualhead.running.checkpoint import RunError, checkpoints, new_run_dir, save_checkpoint, write_json
from dualhead.running.evaluation import EVALUATION_ENVS, evaluate
from dualhead.running.machine import keep_freed_memory, use_threads
from dualhead.running.metrics import CSVWriter, EpisodeTracker, ProgressDisplay, TensorBoardWriter, Writer
from dualhead.types import DataError
from dualhead.worlds.registry import open_streams
from dualhead.worlds.streams import Streams


def train(config: RunConfig, *, show_progress: bool = True) -> dict[str, Any]:
    """Trains an agent as configured and leaves a run directory behind.

    Ctrl-C (or SIGTERM) ends it after the step at hand, with a checkpoint; a second one ends it at once.

    Returns:
        What `summary.json` says: steps, seconds, the last metrics, the evaluation, and where the run is.

    Raises:
        UnavailableEnvironment: the environment cannot be made.
        RunError: spaces or settings do not go together, the run directory cannot be written, or the environment gave
            what cannot be learned from.
    """
    keep_freed_memory()
    use_threads(config.num_threads)
    device = choose_device(config)
    streams = open_streams(config, vectorization=config.vectorization, device=device)
    try:
        try:
            agent = make_learner(config, streams, device=device)
        except (TypeError, ValueError) as error:
            raise RunError(f"{config.env}: {error}") from error
        run_dir = new_run_dir(config)
        writers: list[Writer] = [CSVWriter(run_dir), TensorBoardWriter(run_dir)]
        if show_progress:
            writers.append(ProgressDisplay(config.total_steps))
        try:
            with stop_requests() as stop:
                seconds, metrics = run_loop(config, agent, streams, writers, run_dir, stop)
        except DataError as error:
            raise RunError(
                f"{config.env} after {agent.num_steps} steps: {error}; the newest checkpoint is "
                f"{next(iter(checkpoints(run_dir)), 'none')}"
            ) from error
        finally:
            for writer in writers:
                writer.close()
    finally:
        streams.close()
    return _conclude(config, agent, run_dir, seconds, metrics, stopped=bool(stop))


def run_loop(
    config: RunConfig,
    agent: Learner,
    streams: Streams,
    writers: list[Writer],
    run_dir: Path,
    stop: list[int],
) -> tuple[float, dict[str, float]]:
    """Act, step, record, learn, log, until `total_steps` or a request to stop; seconds taken and the last metrics."""
    tracker = EpisodeTracker(streams.num_streams)
    turnover = make_turnover(config)
    metrics: dict[str, float] = {}
    started = update_started = time.perf_counter()
    next_checkpoint = config.checkpoint_every
    observations = streams.reset(seed=config.seed)
    while agent.num_steps < config.total_steps and not stop:
        actions = agent.act(observations)
        step = streams.step(agent.to_env(actions))
        agent.record(
            step.rewards,
            step.terminated,
            step.truncated,
            final_observations=step.final_observations,
            events=step.events if config.enforce_norms else None,
        )
        tracker.step(step)
        if turnover is not None and step.events is not None:
            turnover.count(step.events)
        observations = step.observations
        if agent.rollout_is_ready:
            learn_started = time.perf_counter()
            metrics = agent.learn(observations)
            now = time.perf_counter()
            steps = config.ppo.rollout_length * streams.num_streams
            metrics |= tracker.metrics() | streams.statistics()
            if turnover is not None:
                metrics |= turnover.metrics(strengths_by_agent(agent, config.commons.num_agents))
                turn = agent.num_steps // streams.num_streams
                while turnover.is_due(turn):
                    turnover.replace(agent, turn)
            metrics |= {
                "time/steps_per_s": steps / (now - update_started),
                "time/rollout_s": learn_started - update_started,
                "time/update_s": now - learn_started,
            }
            for writer in writers:
                writer.write(agent.num_steps, metrics)
            if agent.num_steps >= next_checkpoint:
                save_checkpoint(run_dir, *agent.state(), keep=config.keep_checkpoints)
                next_checkpoint = agent.num_steps + config.checkpoint_every
            update_started = now
    save_checkpoint(run_dir, *agent.state(), keep=config.keep_checkpoints)
    return time.perf_counter() - started, metrics


def choose_device(config: RunConfig) -> str:
    """Where a run's networks live."""
    if config.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if config.device == "cuda" and not torch.cuda.is_available():
        raise RunError("device='cuda' but torch sees no GPU here: use --device cpu, or install torch with CUDA")
    return config.device


def make_learner(config: RunConfig, streams: Streams, *, device: str = "cpu") -> Learner:
    """The agent, or independent agents, that a configuration asks for."""
    ppo, norms = config.ppo, None
    num_learners = config.commons.num_agents if config.policies == "independent" else 1
    if ppo.learning_rate_schedule == "linear" and ppo.learning_rate_decay_steps is None:
        ppo = ppo.model_copy(update={"learning_rate_decay_steps": math.ceil(config.total_steps / num_learners)})
    if config.enforce_norms:
        norms = config.norms.model_copy(update={"resources": config.commons.resources})

    def make(seed: int) -> DualHeadRecurrentPPO:
        return DualHeadRecurrentPPO(
            streams.observation_space,
            streams.action_space,
            num_streams=streams.num_streams // num_learners,
            config=ppo,
            network=config.network,
            norms=norms,
            seed=seed,
            device=device,
        )

    if config.policies == "shared":
        return make(config.seed)
    return IndependentLearners(make, num_agents=num_learners, seed=config.seed)


def make_turnover(config: RunConfig) -> Turnover | None:
    """The schedule of newcomers, where a run has one."""
    if config.turnover.first_turn is None:
        return None
    return Turnover(
        config.turnover,
        resources=config.commons.resources,
        num_agents=config.commons.num_agents,
        num_worlds=config.num_envs,
        seed=config.seed,
    )


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM in a list instead of dying of them; the second one acts as usual."""
    received: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)
        print("stopping after this step; once more to stop at once", file=sys.stderr)

    before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _conclude(
    config: RunConfig,
    agent: Learner,
    run_dir: Path,
    seconds: float,
    metrics: dict[str, float],
    *,
    stopped: bool,
) -> dict[str, Any]:
    summary: dict[str, Any] = {
        "env": config.env,
        "memory": config.network.memory,
        "seed": config.seed,
        "steps": agent.num_steps,
        "stopped_early": stopped,
        "seconds": round(seconds, 3),
        "steps_per_s": round(agent.num_steps / seconds, 1),
        "run_dir": str(run_dir),
        "checkpoint": str(next(iter(checkpoints(run_dir)))),
        "metrics": metrics,
    }
    if config.eval_episodes and not stopped:
        streams = open_streams(config, num_envs=min(config.eval_episodes, EVALUATION_ENVS))
        try:
            summary["evaluation"] = evaluate(agent.policy, streams, episodes=config.eval_episodes).summary()
        finally:
            streams.close()
    write_json(run_dir / "summary.json", summary)
    return summary
