"""A run in progress: everything that continues from one step to the next, and how it is saved and restored."""

from __future__ import annotations

import functools
import math
import re
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from dualhead.agent import DualHeadRecurrentPPO
from dualhead.config import NonNegativeFloat, NonNegativeInt
from dualhead.errors import CheckpointError, DataError, RunError
from dualhead.population import IndependentLearners, Turnover, TurnoverState, strengths_by_agent
from dualhead.running.checkpoint import save_checkpoint
from dualhead.running.config import RunConfig
from dualhead.running.environment import Environment, is_streams, open_streams
from dualhead.running.episodes import EpisodeTracker, TrackerState
from dualhead.storage import RUN_PREFIX, Saved, with_prefix, without_prefix
from dualhead.worlds.replay import CannotReplay
from dualhead.worlds.streams import Streams, StreamStep, restart


class _RunState(Saved):
    """What a checkpoint says of the run, besides its learner."""

    config: dict[str, Any]
    """Compared by `checkpoint.expect_own`."""
    seconds: NonNegativeFloat
    learning_rate: NonNegativeFloat | None
    next_checkpoint: NonNegativeInt
    next_evaluation: NonNegativeInt | None
    metrics: dict[str, int | float]
    tracker: TrackerState
    turnover: TurnoverState | None
    streams: dict[str, Any] | None
    """Checked by the streams."""


class Session:
    """A run in progress: learner, streams, and what is counted.

    Args:
        env: in place of the environment that the settings name; streams are not closed.
        encoder, memory: the user's own parts of the policy.
        schedule: learning rate by progress, from 0 to 1; None: as configured.

    Attributes:
        observations: [B, ...] what the next actions answer to.
        metrics: of the last update.
        seconds: of training so far, over all parts of a resumed run.

    Raises:
        UnavailableEnvironment: the environment cannot be made.
        RunError: spaces, settings or the device do not fit each other.
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
        self.streams = open_streams(config, env, for_training=True, device=device)
        self._owns_streams = not is_streams(env)
        try:
            if self.streams.num_streams != config.num_streams:  # streams that `resume` got
                raise ValueError(f"expected {config.num_streams} streams, got {self.streams.num_streams}")
            self.learner = make_learner(config, self.streams, device=device, encoder=encoder, memory=memory)
        except (TypeError, ValueError) as error:
            self.close()
            raise RunError(f"{config.env}: {error}") from error
        except (MemoryError, RuntimeError) as error:
            self.close()
            if isinstance(error, RuntimeError) and not re.search("memory|overflow", str(error)):
                raise
            raise RunError(
                f"the networks and the rollout do not fit into memory: lower hidden_size={config.network.hidden_size}, "
                f"encoder_sizes, num_envs={config.num_envs} or rollout_length={config.ppo.rollout_length}"
            ) from error
        self.turnover: Turnover | None = None
        if config.turnover.first_turn is not None:
            self.turnover = Turnover(
                config.turnover,
                resources=config.world.resources,
                num_agents=config.world.num_agents,
                num_worlds=config.num_envs,
                seed=config.seed,
            )
        self.tracker = EpisodeTracker(self.streams.num_streams)
        self.metrics: dict[str, float] = {}
        self.seconds = 0.0
        self._due = {"checkpoint": config.checkpoint_every, "eval": config.eval_every}

    @property
    def learning_rate(self) -> float | None:
        """Of the next updates, in place of the configured one; None: as configured. Checkpoints keep it."""
        return self._learning_rate

    @learning_rate.setter
    def learning_rate(self, rate: Any) -> None:
        self._learning_rate = None if rate is None else _possible_rate(rate)

    def begin(self) -> None:
        """Resets the streams."""
        self.observations = self.streams.reset(seed=self.config.seed)

    def record(self, step: StreamStep) -> None:
        """Records what followed the last actions; DataError if a part is missing or cannot be learned from."""
        try:
            self.learner.record(
                step.rewards,
                step.terminated,
                step.truncated,
                final_observations=step.final_observations,
                events=step.events if self.config.enforce_norms else None,
            )
        except ValueError as error:
            raise DataError(str(error)) from error
        self.tracker.step(step)
        if self.turnover is not None and step.events is not None:
            self.turnover.count(step.events)
        self.observations = step.observations

    def learn(self) -> dict[str, float]:
        """Updates the learner, then replaces agents where turnover is due; metrics of the rollout and the update."""
        if self._schedule is not None:
            before = self.learner.num_steps - self.config.num_streams * self.config.ppo.rollout_length
            self._learning_rate = _possible_rate(self._schedule(before / self.config.total_steps))
        self.metrics = metrics = self.learner.learn(self.observations, learning_rate=self._learning_rate)
        metrics |= self.tracker.metrics() | self.streams.statistics()
        if self.turnover is not None:
            num_agents, num_streams = self.config.world.num_agents, self.streams.num_streams
            metrics |= self.turnover.metrics(strengths_by_agent(self.learner, num_agents))
            turn = self.learner.num_steps // num_streams
            while self.turnover.is_due(turn):
                newcomers = self.turnover.replace(self.learner, turn)
                self.tracker.abandon_episodes(np.isin(np.arange(num_streams) % num_agents, newcomers))
        return metrics

    def is_due(self, what: Literal["checkpoint", "eval"]) -> bool:
        """Whether a checkpoint or an evaluation is due; if so, plans the next one."""
        every, num_steps = getattr(self.config, f"{what}_every"), self.learner.num_steps
        if every == 0 or num_steps < self._due[what]:
            return False
        self._due[what] = num_steps + every
        return True

    def postpone_evaluation(self) -> None:
        """Plans the evaluation that is under way for after the next update."""
        self._due["eval"] = self.learner.num_steps

    def save(self, run_dir: Path, *, seconds: float | None = None, with_streams: bool = True) -> Path:
        """Writes a checkpoint, after so many seconds of training.

        Args:
            with_streams: False after an environment failed in the middle of a step; a resumed run begins new episodes.
        """
        if seconds is not None:
            self.seconds = seconds
        state = self.state(with_streams=with_streams)
        return save_checkpoint(run_dir, *state, keep=self.config.keep_checkpoints)

    def state(self, *, with_streams: bool = True) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON of a checkpoint: the learner's own, and those of the run under the prefix `run`.

        The learner's tensors are its own and no copies.
        """
        tensors, metadata = self.learner.state(copy=False)
        run: dict[str, Any] = {  # as `_RunState` has it
            "config": self.config.identity(),
            "seconds": self.seconds,
            "learning_rate": self._learning_rate,
            "next_checkpoint": self._due["checkpoint"],
            "next_evaluation": self._due["eval"] if self.config.eval_every else None,
            "metrics": self.metrics,
            "tracker": self.tracker.state(),
            "turnover": None if self.turnover is None else self.turnover.state(),
            "streams": None,
        }
        of_run = {"rng": torch.get_rng_state()}
        if with_streams and self.streams.resumable is None:
            try:
                of_streams, run["streams"] = self.streams.state()
                of_run |= with_prefix("streams", of_streams)
            except CannotReplay as error:  # such as an episode that has become too long
                warnings.warn(f"{self.config.env} is not saved with this checkpoint: {error}", stacklevel=2)
        return tensors | with_prefix(RUN_PREFIX, of_run), metadata | {RUN_PREFIX: run}

    def restore(self, tensors: dict[str, Tensor], metadata: dict[str, Any], *, source: str) -> None:
        """Continues from a `state`; CheckpointError if it belongs to another run.

        Streams that could not be saved begin new episodes, with zero recurrent states. Recorded steps that were not
        learned from are dropped then.
        """
        own = {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{RUN_PREFIX}/")}
        of_run = without_prefix(RUN_PREFIX, tensors)
        run = _RunState.read(metadata.get(RUN_PREFIX), source=source)
        if (run.turnover is None) != (self.turnover is None):
            raise CheckpointError(f"{source} has no valid turnover: expected one exactly where newcomers are planned")
        self.learner.restore(own, metadata, source=source)
        self.seconds, self.metrics, self._learning_rate = run.seconds, dict(run.metrics), run.learning_rate
        # A resumed run may evaluate where it did not before.
        evaluation = run.next_evaluation or self.learner.num_steps + self.config.eval_every
        self._due = {"checkpoint": run.next_checkpoint, "eval": evaluation}
        try:
            self.tracker.restore(run.tracker)
            if self.turnover is not None and run.turnover is not None:
                self.turnover.restore(run.turnover)
            torch.set_rng_state(of_run["rng"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{source} lacks a part of the run: {error!r}") from error
        why_not = "their state was not saved"
        if run.streams is not None:
            try:
                self.observations = self.streams.restore(without_prefix("streams", of_run), run.streams, source=source)
                return
            except CannotReplay as error:
                why_not = str(error)
        dropped = self.learner.abandon_rollout()
        self.tracker.abandon_episodes()
        self.observations = restart(self.streams, seed=self.config.seed, num_steps=self.learner.num_steps)
        warnings.warn(
            f"the episodes of {self.config.env} begin again, with recurrent states reset: {why_not}"
            + (f", and {dropped} steps that were not learned from yet are dropped" if dropped else ""),
            stacklevel=2,
        )

    def close(self) -> None:
        """Closes the environments, unless they were passed as streams."""
        if self._owns_streams:
            self.streams.close()


def make_numbers(metrics: dict[str, Any]) -> None:
    """Converts every metric to a Python number, in place; RunError if one is no number, or is called `steps`."""
    if "steps" in metrics:
        raise RunError("metric 'steps': expected another name, this one is taken by the number of environment steps")
    for name, value in metrics.items():
        metrics[name] = _number(f"metric {name!r}", value)


def _possible_rate(rate: Any) -> float:
    number = float(_number("learning_rate", rate))
    if not 0 <= number < math.inf:
        raise RunError(f"learning_rate: expected a finite number of at least 0, got {rate!r}")
    return number


def _number(name: str, given: Any) -> float:
    """The Python number of a number of Python, NumPy or torch."""
    with suppress(ValueError, RuntimeError):  # an array of several numbers
        number = given.item() if isinstance(given, np.generic | np.ndarray | Tensor) else given
        if isinstance(number, int | float):
            return float(number) if isinstance(number, bool) else number
    raise RunError(f"{name}: expected a number, got {given!r}")


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
    """The agent, or the independent agents, of a configuration."""
    ppo, norms = config.ppo, None
    num_learners = config.world.num_agents if config.policies == "independent" else 1
    if ppo.learning_rate_schedule == "linear" and ppo.learning_rate_decay_steps is None:
        ppo = ppo.model_copy(update={"learning_rate_decay_steps": math.ceil(config.total_steps / num_learners)})
    if config.enforce_norms:
        norms = config.norms.model_copy(update={"resources": config.world.resources})

    make = functools.partial(
        DualHeadRecurrentPPO,
        streams.observation_space,
        streams.action_space,
        num_streams=streams.num_streams // num_learners,
        config=ppo,
        network=config.network,
        norms=norms,
        encoder=encoder,
        memory=memory,
        device=device,
    )
    if config.policies == "shared":
        return make(seed=config.seed)
    for name, part in (("encoder", encoder), ("memory", memory)):
        if isinstance(part, nn.Module):
            raise ValueError(f"{name}: independent policies need one each: expected a class or factory, got a module")
    return IndependentLearners(lambda seed: make(seed=seed), num_agents=num_learners, seed=config.seed)
