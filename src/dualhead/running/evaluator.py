"""Evaluations while a run trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dualhead.errors import DataError
from dualhead.running.checkpoint import save_best
from dualhead.running.config import EVAL_EPISODES, EVALUATION_SEED
from dualhead.running.environment import Environment, is_streams, open_streams
from dualhead.running.evaluation import SELECTION_SEED, evaluation_size, play_episodes
from dualhead.running.randomness import preserved_randomness
from dualhead.running.session import Session
from dualhead.running.writers import CSVWriter


class Evaluator:
    """Evaluates a session's policy in environments of its own; rows of `evaluations.csv`, and the best checkpoint.

    Training does not notice: global random states are as before.

    Args:
        session: whose policy plays.
        run_dir: of the run.
        env: what to play in; None: what the run's settings name.
        resume_at: environment steps of the checkpoint that the run goes on from.
    """

    def __init__(
        self, session: Session, run_dir: Path, *, env: Environment | None = None, resume_at: int | None = None
    ) -> None:
        self._session, self._run_dir, self._env = session, run_dir, env
        self._writer = CSVWriter(run_dir, name="evaluations.csv", resume_at=resume_at)
        self._num_envs, self._episodes = evaluation_size(session.config, session.config.eval_episodes or EVAL_EPISODES)
        self._streams: Any = None
        self._last: tuple[int, dict[str, float]] = (-1, {})

    def __enter__(self) -> Evaluator:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()
        if self._streams is not None and not is_streams(self._env):
            self._streams.close()

    def evaluate(self) -> dict[str, float]:
        """Plays episodes on the way; metrics `evaluation/*`. The best by mean return is kept as `best.safetensors`.

        Raises:
            DataError: the environment gave what a policy cannot look at.
            RunError: something cannot be written.
        """
        session, num_steps = self._session, self._session.learner.num_steps
        if self._last[0] == num_steps:
            return self._last[1]
        summary = self._play(SELECTION_SEED)
        save_best(self._run_dir, *session.learner.state(), score=summary["mean_return"])
        metrics = {f"evaluation/{name}": value for name, value in summary.items()}
        self._last = num_steps, metrics
        return metrics

    def conclude(self) -> dict[str, float]:
        """The summary of the run's last evaluation: of the episodes that `dualhead eval` plays, which chose nothing.

        Raises:
            DataError, RunError: as `evaluate`.
        """
        if self._session.config.eval_every:
            self.evaluate()
        return self._play(EVALUATION_SEED)

    def _play(self, seed: int) -> dict[str, float]:
        """Plays episodes and writes their row, unless these steps have one."""
        session, num_steps = self._session, self._session.learner.num_steps
        with preserved_randomness():
            if self._streams is None:
                self._streams = open_streams(session.config, self._env, num_envs=self._num_envs)
            try:
                played = play_episodes(session.learner.policy, self._streams, episodes=self._episodes, seed=seed)
            except DataError as error:
                raise DataError(f"in an evaluation, {error}") from error
        if self._writer.last_steps != num_steps:  # a run that was killed after this evaluation makes it once more
            self._writer.write(num_steps, played.summary())
        return played.summary()
