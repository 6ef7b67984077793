"""The training loop."""

from __future__ import annotations

import random
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch

from dualhead.config import RunConfig
from dualhead.running.checkpoint import (
    RunError,
    checkpoints,
    locked,
    new_run_dir,
    read_config,
    read_json,
    save_best,
    write_json,
)
from dualhead.running.evaluation import evaluate, evaluation_envs
from dualhead.running.machine import keep_freed_memory, use_threads
from dualhead.running.metrics import CSVWriter, Writer, make_writers, require_packages
from dualhead.running.session import Session, restore_newest
from dualhead.types import DataError, DivergedError
from dualhead.worlds.registry import open_streams


def train(config: RunConfig, *, show_progress: bool = True) -> dict[str, Any]:
    """Trains an agent as configured and leaves a run directory behind.

    Ctrl-C (or SIGTERM) ends it after the step at hand, with a checkpoint; a second one ends it at once.

    Returns:
        What `summary.json` says: steps, seconds, the last metrics, the evaluation, and where the run is.

    Raises:
        UnavailableEnvironment: the environment cannot be made.
        RunError: spaces or settings do not go together, the run directory cannot be written or is in use, or the
            environment gave what cannot be learned from.
    """
    require_packages(config)
    _prepare(config)
    session = Session(config)
    try:
        run_dir = new_run_dir(config)
        with locked(run_dir):
            session.begin()
            return _run(session, run_dir, resume_at=None, show_progress=show_progress)
    finally:
        session.close()


def resume(run_dir: str | Path, *, total_steps: int | None = None, show_progress: bool = True) -> dict[str, Any]:
    """Goes on with a run that was stopped, from its newest whole checkpoint, to the bits of one that never stopped.

    Args:
        run_dir: of the run; one that was killed before its first checkpoint begins again.
        total_steps: new end of the run, written into its configuration; None: as it was. A learning rate that falls
            over the whole run then falls to the new end.
        show_progress: on the terminal.

    Returns:
        As `train` does.

    Raises:
        RunError: no run is there, it is complete, another process is writing it, or as `train` does.
        CheckpointError: its checkpoint does not fit its configuration.
    """
    run_dir = Path(run_dir)
    config = read_config(run_dir)
    if total_steps is not None:
        config = RunConfig(**config.model_dump() | {"total_steps": total_steps})
    config = config.model_copy(update={"run_dir": str(run_dir)})
    require_packages(config)
    _prepare(config)
    with locked(run_dir):
        session = Session(config)
        try:
            resume_at = 0
            if checkpoints(run_dir):
                path = restore_newest(session, run_dir)
                resume_at = session.learner.num_steps
                if resume_at >= config.total_steps and _is_complete(run_dir, resume_at):
                    raise RunError(
                        f"{run_dir} is complete after {resume_at} steps: say --total-steps to train it longer"
                    )
                print(f"going on from {path}")
            else:
                print(f"{run_dir} was stopped before its first checkpoint: it begins again")
                session.begin()
            if total_steps is not None:
                write_json(run_dir / "config.json", config.model_dump())
            return _run(session, run_dir, resume_at=resume_at, show_progress=show_progress)
        finally:
            session.close()


def _prepare(config: RunConfig) -> None:
    keep_freed_memory()
    use_threads(config.num_threads)
    # Our own code never draws from these; an environment may.
    random.seed(config.seed)
    np.random.seed(config.seed % 2**32)  # noqa: NPY002
    torch.manual_seed(config.seed)


def _is_complete(run_dir: Path, num_steps: int) -> bool:
    summary = read_json(run_dir / "summary.json")
    return summary is not None and summary.get("steps") == num_steps and not summary.get("stopped_early")


def _run(session: Session, run_dir: Path, *, resume_at: int | None, show_progress: bool) -> dict[str, Any]:
    """Trains to the end, evaluates and sums up."""
    config = session.config
    if session.streams.resumable is not None:
        warnings.warn(
            f"{config.env}: {session.streams.resumable}. A resumed run will begin new episodes, with recurrent states "
            f"reset, instead of going on exactly",
            stacklevel=3,
        )
    with ExitStack() as stack:
        writers = make_writers(config, run_dir, resume_at=resume_at, show_progress=show_progress)
        for writer in writers:
            stack.callback(writer.close)
        evaluator = stack.enter_context(Evaluator(session, run_dir, resume_at=resume_at))
        stop = stack.enter_context(stop_requests())
        try:
            metrics = run_loop(session, writers, evaluator, run_dir, stop)
        except (DataError, DivergedError) as error:
            raise RunError(
                f"{config.env} after {session.learner.num_steps} steps: {error}; the newest checkpoint is "
                f"{next(iter(checkpoints(run_dir)), 'none')}"
            ) from error
        return _conclude(session, evaluator, run_dir, metrics, stopped=bool(stop))


def run_loop(
    session: Session, writers: list[Writer], evaluator: Evaluator, run_dir: Path, stop: list[int]
) -> dict[str, float]:
    """Act, step, record, learn, log, until `total_steps` or a request to stop; the last metrics."""
    config, learner = session.config, session.learner
    metrics: dict[str, float] = {}
    begun = update_begun = time.perf_counter()
    seconds_before = session.seconds
    while learner.num_steps < config.total_steps and not stop:
        session.step()
        if learner.rollout_is_ready:
            learn_begun = time.perf_counter()
            metrics = session.learn()
            now = time.perf_counter()
            metrics |= {
                "time/steps_per_s": config.ppo.rollout_length * config.num_streams / (now - update_begun),
                "time/rollout_s": learn_begun - update_begun,
                "time/update_s": now - learn_begun,
            }
            update_begun = now
            if learner.num_steps >= session.next_evaluation:
                metrics |= evaluator.evaluate()
                session.next_evaluation = learner.num_steps + config.eval_every
            for writer in writers:
                writer.write(learner.num_steps, metrics)
            session.seconds = seconds_before + time.perf_counter() - begun
            if learner.num_steps >= session.next_checkpoint:
                session.next_checkpoint = learner.num_steps + config.checkpoint_every
                session.save(run_dir)
    session.seconds = seconds_before + time.perf_counter() - begun
    session.save(run_dir)
    return metrics


class Evaluator:
    """Evaluates a session's policy in environments of its own; rows of `evaluations.csv`, and the best checkpoint.

    Training does not notice: global random states are as before.
    """

    def __init__(self, session: Session, run_dir: Path, *, resume_at: int | None) -> None:
        self._session, self._run_dir = session, run_dir
        self._writer = CSVWriter(run_dir, name="evaluations.csv", resume_at=resume_at)
        self._episodes = session.config.eval_episodes or 20
        self._streams: Any = None
        self._last: tuple[int, dict[str, float]] = (-1, {})

    def __enter__(self) -> Evaluator:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()
        if self._streams is not None:
            self._streams.close()

    def evaluate(self) -> dict[str, float]:
        """Plays episodes; metrics `evaluation/*`. The best by mean return is kept as `best.safetensors`."""
        session = self._session
        if self._last[0] == session.learner.num_steps:
            return self._last[1]
        with preserved_randomness():
            if self._streams is None:
                self._streams = open_streams(session.config, num_envs=evaluation_envs(session.config, self._episodes))
            summary = evaluate(session.learner.policy, self._streams, episodes=self._episodes).summary()
        self._writer.write(session.learner.num_steps, summary)
        if session.config.eval_every:
            save_best(self._run_dir, *session.learner.state(), score=summary["mean_return"])
        metrics = {f"evaluation/{name}": value for name, value in summary.items()}
        self._last = session.learner.num_steps, metrics
        return metrics


@contextmanager
def preserved_randomness() -> Iterator[None]:
    """Puts the global random states back as they were."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        torch.set_rng_state(before[2])


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
    session: Session, evaluator: Evaluator, run_dir: Path, metrics: dict[str, float], *, stopped: bool
) -> dict[str, Any]:
    config, num_steps = session.config, session.learner.num_steps
    summary: dict[str, Any] = {
        "env": config.env,
        "memory": config.network.memory,
        "seed": config.seed,
        "steps": num_steps,
        "stopped_early": stopped,
        "seconds": round(session.seconds, 3),
        "steps_per_s": round(num_steps / session.seconds, 1),
        "run_dir": str(run_dir),
        "checkpoint": str(next(iter(checkpoints(run_dir)))),
        "metrics": metrics,
    }
    if config.eval_episodes and not stopped:
        evaluated = evaluator.evaluate()
        summary["evaluation"] = {name.removeprefix("evaluation/"): value for name, value in evaluated.items()}
    write_json(run_dir / "summary.json", summary)
    return summary
