"""Everything of a run that goes on from one step to the next, and how it is saved and taken back."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dualhead.agent import DualHeadRecurrentPPO
from dualhead.population import IndependentLearners, Turnover, strengths_by_agent
from dualhead.running.checkpoint import RunError, save_checkpoint
from dualhead.running.config import RunConfig
from dualhead.running.environment import Environment, is_streams, open_streams
from dualhead.running.episodes import EpisodeTracker
from dualhead.storage import RUN_PREFIX, CheckpointError, with_prefix, without_prefix
from dualhead.types import DataError
from dualhead.worlds.replay import CannotReplay
from dualhead.worlds.streams import Streams, StreamStep, restart


class Session:
    """A run in progress: learner, world, and what is counted on the way.

    Args:
        config: of the run.
        env: in place of the environment that the settings name; it stays open.
        encoder, memory: parts of the user's own for the policy.
        schedule: step size of the optimiser by progress, from 0 to 1; None: as configured.

    Attributes:
        observations: [B, ...] what the next actions answer to.
        learning_rate: of the next updates, in place of what the settings say; None: as they say. It goes with
            checkpoints, and a schedule sets it before every update.
        metrics: of the last update.
        seconds: training took so far, over all parts of a resumed run.
        next_checkpoint, next_evaluation: environment steps.

    Raises:
        UnavailableEnvironment: the environment cannot be made.
        RunError: spaces, settings or the device do not go together.
    """

    observations: Any

    def __init__(
        self,
        config: RunConfig,
        *,
        env: Environment | None = None,
        encoder: Any = None,
        memory: Any = None,
        schedule: Callable[[float], float] | None = None,
    ) -> None:
        self.config, self._schedule = config, schedule
        self._learning_rate: float | None = None
        device = choose_device(config)
        self.streams = open_streams(config, env, vectorization=config.vectorization, device=device)
        self._owns_streams = not is_streams(env)
        try:
            if self.streams.num_streams != config.num_streams:
                raise ValueError(f"expected {config.num_streams} streams, got {self.streams.num_streams}")
            self.learner = make_learner(config, self.streams, device=device, encoder=encoder, memory=memory)
        except (TypeError, ValueError) as error:
            self.close()
            raise RunError(f"{config.env}: {error}") from error
        self.turnover = make_turnover(config)
        self.tracker = EpisodeTracker(self.streams.num_streams)
        self.metrics: dict[str, float] = {}
        self.seconds = 0.0
        self.next_checkpoint = config.checkpoint_every
        self.next_evaluation = config.eval_every or math.inf

    @property
    def learning_rate(self) -> float | None:
        """Raises, where it is set:
        RunError: it is no finite number of at least 0.
        """
        return self._learning_rate

    @learning_rate.setter
    def learning_rate(self, rate: Any) -> None:
        self._learning_rate = None if rate is None else _possible_rate(rate)

    def begin(self) -> None:
        """The first observations."""
        self.observations = self.streams.reset(seed=self.config.seed)

    def record(self, step: StreamStep) -> None:
        """Takes in what the world answered to the last actions.

        Raises:
            DataError: something of the step is missing, or cannot be learned from.
        """
        try:
            self.learner.record(
                step.rewards,
                step.terminated,
                step.truncated,
                final_observations=step.final_observations,
                events=step.events if self.config.enforce_norms else None,
            )
            self.tracker.step(step, step.numbers)
        except ValueError as error:
            raise DataError(str(error)) from error
        if self.turnover is not None and step.events is not None:
            self.turnover.count(step.events)
        self.observations = step.observations

    def learn(self) -> dict[str, float]:
        """Updates the learner, and lets newcomers in where they are due; metrics of the rollout and the update."""
        if self._schedule is not None:
            before = self.learner.num_steps - self.config.num_streams * self.config.ppo.rollout_length
            self._learning_rate = _possible_rate(self._schedule(before / self.config.total_steps))
        self.metrics = metrics = self.learner.learn(self.observations, learning_rate=self.learning_rate)
        metrics |= self.tracker.metrics() | self.streams.statistics()
        if self.turnover is not None:
            metrics |= self.turnover.metrics(strengths_by_agent(self.learner, self.config.world.num_agents))
            turn = self.learner.num_steps // self.streams.num_streams
            while self.turnover.is_due(turn):
                newcomers = self.turnover.replace(self.learner, turn)
                places = np.arange(self.streams.num_streams) % self.config.world.num_agents
                self.tracker.abandon_episodes(np.isin(places, newcomers))
        return metrics

    def is_due_for_evaluation(self) -> bool:
        """Whether an evaluation is due; the next one is planned then."""
        is_due = self.learner.num_steps >= self.next_evaluation
        if is_due:
            self.next_evaluation = self.learner.num_steps + self.config.eval_every
        return is_due

    def is_due_for_checkpoint(self) -> bool:
        """Whether a checkpoint is due; the next one is planned then."""
        is_due = self.learner.num_steps >= self.next_checkpoint
        if is_due:
            self.next_checkpoint = self.learner.num_steps + self.config.checkpoint_every
        return is_due

    def save(self, run_dir: Path, *, seconds: float) -> Path:
        """Writes a checkpoint, after so many seconds of training."""
        self.seconds = seconds
        tensors, metadata = self.state()
        return save_checkpoint(run_dir, tensors, metadata, keep=self.config.keep_checkpoints)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON of a checkpoint: the learner's own, and the rest under the prefix `run`."""
        tensors, metadata = self.learner.state()
        run: dict[str, Any] = {
            "seconds": self.seconds,
            "learning_rate": self.learning_rate,
            "next_checkpoint": self.next_checkpoint,
            "next_evaluation": None if math.isinf(self.next_evaluation) else self.next_evaluation,
            "metrics": self.metrics,
            "tracker": self.tracker.state(),
            "turnover": None if self.turnover is None else self.turnover.state(),
            "streams": None,
        }
        kept = {"rng": torch.get_rng_state()}
        if self.streams.resumable is None:
            try:
                of_streams, run["streams"] = self.streams.state()
                kept |= with_prefix("streams", of_streams)
            except CannotReplay as error:  # they could be saved when the run began
                warnings.warn(f"{self.config.env} is not saved with this checkpoint: {error}", stacklevel=2)
        return tensors | with_prefix(RUN_PREFIX, kept), metadata | {RUN_PREFIX: run}

    def restore(self, tensors: dict[str, Tensor], metadata: dict[str, Any], *, source: str) -> None:
        """Goes on where `state` was taken.

        Where the environments could not be saved their episodes begin again, with zero recurrent states, and steps
        that were recorded but not learned from are forgotten.

        Raises:
            CheckpointError: it belongs to another run.
        """
        own = {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{RUN_PREFIX}/")}
        kept = without_prefix(RUN_PREFIX, tensors)
        self.learner.restore(own, metadata, source=source)
        try:
            run = metadata[RUN_PREFIX]
            self.seconds, self.next_checkpoint = float(run["seconds"]), int(run["next_checkpoint"])
            # Settings that a resumed run may change decide, not what was planned before.
            if self.config.eval_every:
                planned = run["next_evaluation"] or self.learner.num_steps + self.config.eval_every
                self.next_evaluation = int(planned)
            rate = run["learning_rate"]
            self.learning_rate = None if rate is None else float(rate)
            self.metrics = dict(run["metrics"])
            self.tracker.restore(run["tracker"])
            if self.turnover is not None:
                self.turnover.restore(run["turnover"])
            of_streams = run["streams"]
            torch.set_rng_state(kept["rng"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{source} lacks a part of the run: {error!r}") from error
        why_not = "their state was not saved"
        if of_streams is not None:
            try:
                self.observations = self.streams.restore(without_prefix("streams", kept), of_streams, source=source)
                return
            except CannotReplay as error:
                why_not = str(error)
        forgotten = self.learner.abandon_rollout()
        self.tracker.abandon_episodes()
        self.observations = restart(self.streams, seed=self.config.seed, num_steps=self.learner.num_steps)
        warnings.warn(
            f"the episodes of {self.config.env} begin again, with recurrent states reset: {why_not}"
            + (f", and {forgotten} steps that were not learned from yet are forgotten" if forgotten else ""),
            stacklevel=2,
        )

    def close(self) -> None:
        """Closes the environments, unless they were handed over."""
        if self._owns_streams:
            self.streams.close()


def as_number(value: Any) -> float | None:
    """A Python number of one of Python, NumPy or torch; None of anything else."""
    try:
        number = value.item() if isinstance(value, np.generic | np.ndarray | Tensor) else value
    except (ValueError, RuntimeError):  # several numbers
        return None
    return float(number) if isinstance(number, bool) else number if isinstance(number, int | float) else None


def _possible_rate(rate: Any) -> float:
    number = as_number(rate)
    if number is None or not 0 <= number < math.inf:
        raise RunError(f"learning_rate: expected a finite number of at least 0, got {rate!r}")
    return float(number)


def make_numbers(metrics: dict[str, Any]) -> None:
    """Makes every metric a Python number, in place.

    Raises:
        RunError: one is no number, or has the name of the column of steps.
    """
    for name, value in metrics.items():
        number = as_number(value)
        if number is None:
            raise RunError(f"metric {name!r}: expected a number, got {value!r}")
        metrics[name] = number
    if "steps" in metrics:
        raise RunError("metric 'steps': expected another name, the environment steps of every update have this one")


def choose_device(config: RunConfig) -> str:
    """Where a run's networks live."""
    if config.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if config.device == "cuda" and not torch.cuda.is_available():
        raise RunError("device='cuda' but torch sees no GPU here: use --device cpu, or install torch with CUDA")
    return config.device


def make_learner(
    config: RunConfig, streams: Streams, *, device: str = "cpu", encoder: Any = None, memory: Any = None
) -> DualHeadRecurrentPPO | IndependentLearners:
    """The agent, or independent agents, that a configuration asks for."""
    ppo, norms = config.ppo, None
    num_learners = config.world.num_agents if config.policies == "independent" else 1
    if ppo.learning_rate_schedule == "linear" and ppo.learning_rate_decay_steps is None:
        ppo = ppo.model_copy(update={"learning_rate_decay_steps": math.ceil(config.total_steps / num_learners)})
    if config.enforce_norms:
        norms = config.norms.model_copy(update={"resources": config.world.resources})

    def make(seed: int) -> DualHeadRecurrentPPO:
        return DualHeadRecurrentPPO(
            streams.observation_space,
            streams.action_space,
            num_streams=streams.num_streams // num_learners,
            config=ppo,
            network=config.network,
            norms=norms,
            encoder=encoder,
            memory=memory,
            seed=seed,
            device=device,
        )

    if config.policies == "shared":
        return make(config.seed)
    for name, part in (("encoder", encoder), ("memory", memory)):
        if isinstance(part, nn.Module):
            raise ValueError(f"{name}: independent policies need one each: expected a class or factory, got a module")
    return IndependentLearners(make, num_agents=num_learners, seed=config.seed)


def make_turnover(config: RunConfig) -> Turnover | None:
    """The schedule of newcomers, where a run has one."""
    if config.turnover.first_turn is None:
        return None
    return Turnover(
        config.turnover,
        resources=config.world.resources,
        num_agents=config.world.num_agents,
        num_worlds=config.num_envs,
        seed=config.seed,
    )
