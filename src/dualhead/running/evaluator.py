"""Evaluations while a run trains."""

from __future__ import annotations

from pathlib import Path

from dualhead.errors import DataError, EnvironmentFailed, RunError, UnavailableEnvironment
from dualhead.running.checkpoint import save_best
from dualhead.running.config import EVAL_EPISODES, EVALUATION_SEED
from dualhead.running.environment import Environment, is_streams, open_streams, settings_of
from dualhead.running.evaluation import SELECTION_SEED, Stopped, evaluation_size, play_episodes
from dualhead.running.machine import Requests, preserved_randomness
from dualhead.running.session import Session
from dualhead.running.writers import CSVWriter
from dualhead.storage import RUN_PREFIX
from dualhead.worlds.streams import Streams


def open_evaluation(session: Session, env: str | Environment | None, *, is_other: bool = False) -> Streams:
    """Streams for evaluating a session's policy; RunError if they cannot be opened, or have other spaces.

    Args:
        env: None: what the run's settings name.
        is_other: it is not what the run trains in, so the run's `env_args` are not for it.
    """
    config = session.config
    num_envs, _ = evaluation_size(config, config.eval_episodes or EVAL_EPISODES)
    try:
        if env is not None:
            settings_of(env)  # checks it
        if is_other:
            config = config.model_copy(update={"env_args": {}})
        with preserved_randomness():
            streams = open_streams(config, env, num_envs=num_envs)  # type: ignore[arg-type]
        for name in ("observation_space", "action_space"):
            expected, given = getattr(session.streams, name), getattr(streams, name)
            if given != expected:
                raise ValueError(f"expected the {name} of the training, {expected}, got {given}")
    except (TypeError, ValueError, UnavailableEnvironment) as error:
        raise RunError(f"eval_env: {str(error).removeprefix('env: ')}") from error
    return streams


class Evaluator:
    """Evaluates a session's policy in streams of its own: rows of `evaluations.csv`, and the best checkpoint.

    Training does not notice: global random states stay as they are.

    Args:
        env: what to play in; None: what the run's settings name.
        resume_at: environment steps of the checkpoint that the run resumes from.
        requests: one to stop ends an evaluation, which then counts as not begun.
    """

    def __init__(
        self,
        session: Session,
        run_dir: Path,
        *,
        env: Environment | None = None,
        resume_at: int | None = None,
        requests: Requests | None = None,
    ) -> None:
        self._session, self._run_dir, self._env, self._requests = session, run_dir, env, requests
        self._writer = CSVWriter(run_dir, name="evaluations.csv", resume_at=resume_at)
        self._streams: Streams | None = None
        self._last: tuple[int, dict[str, float]] = (-1, {})

    def __enter__(self) -> Evaluator:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()
        if self._streams is not None and not is_streams(self._env):
            self._streams.close()

    def evaluate(self) -> dict[str, float]:
        """Plays episodes during training; metrics `evaluation/*`. Saves the best mean return as `best.safetensors`."""
        num_steps = self._session.learner.num_steps
        if self._last[0] != num_steps:
            summary = self._play(SELECTION_SEED)
            if summary is None:
                self._session.postpone_evaluation()
                return {}
            tensors, metadata = self._session.learner.state(copy=False)
            metadata[RUN_PREFIX] = {"config": self._session.config.identity()}
            save_best(self._run_dir, tensors, metadata, score=summary["mean_return"])
            self._last = num_steps, {f"evaluation/{name}": value for name, value in summary.items()}
        return self._last[1]

    def conclude(self) -> dict[str, float] | None:
        """The summary of the episodes that `dualhead eval` plays too, and that did not choose the best checkpoint."""
        if self._session.config.eval_every:
            self.evaluate()
        return self._play(EVALUATION_SEED)

    def _play(self, seed: int) -> dict[str, float] | None:
        """Plays episodes, and writes their row unless there is one of these steps. None after a request to stop."""
        session = self._session
        if self._streams is None:
            self._streams = open_evaluation(session, self._env)
        _, episodes = evaluation_size(session.config, session.config.eval_episodes or EVAL_EPISODES)
        try:
            with preserved_randomness():
                played = play_episodes(
                    session.learner.policy,
                    self._streams,
                    episodes=episodes,
                    seed=seed,
                    max_steps=session.config.eval_max_steps,
                    requests=self._requests,
                )
        except (DataError, EnvironmentFailed) as error:
            session.postpone_evaluation()
            session.save(self._run_dir)
            raise RunError(f"in an evaluation, {error}") from error
        except Stopped:
            return None
        summary = played.summary()
        if self._writer.last_steps != session.learner.num_steps:  # a killed run may have written it
            self._writer.write(session.learner.num_steps, summary)
        return summary
