"""The training loop."""

from __future__ import annotations

import random
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch

from dualhead.running.checkpoint import (
    RunError,
    checkpoints,
    locked,
    new_run_dir,
    read_config,
    read_json,
    read_newest,
    save_best,
    write_json,
)
from dualhead.running.config import EVAL_EPISODES, RunConfig
from dualhead.running.environment import open_streams
from dualhead.running.evaluation import SELECTION_SEED, evaluate, evaluation_size
from dualhead.running.machine import CoreUse, keep_freed_memory
from dualhead.running.session import Session
from dualhead.running.writers import CSVWriter, Writer, make_writers, require_packages
from dualhead.types import DataError, DivergedError

SECONDS_OF_LOOKING = 2.0
"""After so long a run looks, once, whether others fight with it for the cores."""


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
            if show_progress:
                print(f"writing to {run_dir}", flush=True)
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
    config = read_config(run_dir).model_copy(update={"run_dir": str(run_dir)})
    if total_steps is not None:
        try:
            config = RunConfig(**config.model_dump() | {"total_steps": total_steps})
        except ValueError as error:
            raise RunError(str(error)) from None
    require_packages(config)
    _prepare(config)
    with locked(run_dir):
        saved = read_newest(run_dir) if checkpoints(run_dir) else None
        if saved is not None:
            num_steps = saved[2].get("num_steps", 0)
            _expect_unfinished(run_dir, num_steps, config)
            if total_steps is not None and total_steps < num_steps:
                raise RunError(f"{run_dir} has done {num_steps} steps: expected at least that, got {total_steps=}")
        session = Session(config)
        try:
            if saved is None:
                print(f"{run_dir} was stopped before its first checkpoint: it begins again")
                session.begin()
            else:
                path, tensors, metadata = saved
                session.restore(tensors, metadata, source=str(path))
                print(f"going on from {path}")
            if total_steps is not None:
                write_json(run_dir / "config.json", config.model_dump())
            return _run(session, run_dir, resume_at=session.learner.num_steps, show_progress=show_progress)
        finally:
            session.close()


def _prepare(config: RunConfig) -> None:
    keep_freed_memory()
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    # Our own code never draws from these; an environment may.
    random.seed(config.seed)
    np.random.seed(config.seed % 2**32)  # noqa: NPY002
    torch.manual_seed(config.seed)


def _expect_unfinished(run_dir: Path, num_steps: int, config: RunConfig) -> None:
    """Refuses a run that trained to its end and summed up; one that was killed in between still has that to do."""
    summary = read_json(run_dir / "summary.json") or {}
    concluded = summary.get("steps") == num_steps and not summary.get("stopped_early")
    if num_steps >= config.total_steps and concluded:
        raise RunError(f"{run_dir} is complete: say --total-steps with more than {num_steps} to train it longer")


def _run(session: Session, run_dir: Path, *, resume_at: int | None, show_progress: bool) -> dict[str, Any]:
    """Trains to the end, evaluates and sums up."""
    config = session.config
    with preserved_randomness():  # it is found by playing
        reason = session.streams.resumable
    if reason is not None:
        warnings.warn(
            f"{config.env}: {reason}. A resumed run will begin new episodes, with recurrent states reset, instead of "
            f"going on exactly",
            stacklevel=3,
        )
    with ExitStack() as stack:
        writers = make_writers(config, run_dir, resume_at=resume_at, show_progress=show_progress)
        for writer in writers:
            stack.callback(writer.close)
        evaluator = stack.enter_context(Evaluator(session, run_dir, resume_at=resume_at))
        stop = stack.enter_context(stop_requests())
        try:
            run_loop(session, writers, evaluator, run_dir, stop)
            return _conclude(session, evaluator, run_dir, stopped=bool(stop))
        except (DataError, DivergedError) as error:
            raise RunError(
                f"{config.env} after {session.learner.num_steps} steps "
                f"({session.learner.num_steps // config.num_streams} of each stream): {error}; {_name_newest(run_dir)}"
            ) from error
        except KeyboardInterrupt:
            print(f"stopped at once; {_name_newest(run_dir)}; go on with: dualhead resume {run_dir}", file=sys.stderr)
            raise


def _name_newest(run_dir: Path) -> str:
    newest = next(iter(checkpoints(run_dir)), None)
    return "no checkpoint was written yet" if newest is None else f"the newest checkpoint is {newest}"


def run_loop(session: Session, writers: list[Writer], evaluator: Evaluator, run_dir: Path, stop: list[int]) -> None:
    """Act, step, record, learn, log, until `total_steps` or a request to stop."""
    config, learner = session.config, session.learner
    begun = update_begun = time.perf_counter()
    seconds_before, steps_before = session.seconds, learner.num_steps
    core_use: CoreUse | None = CoreUse()
    while learner.num_steps < config.total_steps and not stop:
        session.step()
        if learner.rollout_is_ready:
            learn_begun = time.perf_counter()
            metrics = session.metrics = session.learn()
            now = time.perf_counter()
            metrics |= {
                "time/steps_per_s": (learner.num_steps - steps_before) / (now - update_begun),
                "time/rollout_s": learn_begun - update_begun,
                "time/update_s": now - learn_begun,
            }
            update_begun, steps_before = now, learner.num_steps
            if learner.num_steps >= session.next_evaluation:
                metrics |= evaluator.evaluate()
                session.next_evaluation = learner.num_steps + config.eval_every
            for writer in writers:
                writer.write(learner.num_steps, metrics)
            if core_use is not None and core_use.seconds > SECONDS_OF_LOOKING:
                core_use.warn()
                core_use = None
            session.seconds = seconds_before + time.perf_counter() - begun
            if learner.num_steps >= session.next_checkpoint:
                session.next_checkpoint = learner.num_steps + config.checkpoint_every
                session.save(run_dir)
    session.seconds = seconds_before + time.perf_counter() - begun
    session.save(run_dir)


class Evaluator:
    """Evaluates a session's policy in environments of its own; rows of `evaluations.csv`, and the best checkpoint.

    Training does not notice: global random states are as before.
    """

    def __init__(self, session: Session, run_dir: Path, *, resume_at: int | None) -> None:
        self._session, self._run_dir = session, run_dir
        self._writer = CSVWriter(run_dir, name="evaluations.csv", resume_at=resume_at)
        self._num_envs, self._episodes = evaluation_size(session.config, session.config.eval_episodes or EVAL_EPISODES)
        self._streams: Any = None
        self._last: tuple[int, dict[str, float]] = (-1, {})

    def __enter__(self) -> Evaluator:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()
        if self._streams is not None:
            self._streams.close()

    def evaluate(self) -> dict[str, float]:
        """Plays episodes; metrics `evaluation/*`. The best by mean return is kept as `best.safetensors`.

        Raises:
            DataError: the environment gave what a policy cannot look at.
            RunError: something cannot be written.
        """
        session, num_steps = self._session, self._session.learner.num_steps
        if self._last[0] == num_steps:
            return self._last[1]
        with preserved_randomness():
            if self._streams is None:
                self._streams = open_streams(session.config, num_envs=self._num_envs)
            try:
                played = evaluate(session.learner.policy, self._streams, episodes=self._episodes, seed=SELECTION_SEED)
                summary = played.summary()
            except DataError as error:
                raise DataError(f"in an evaluation, {error}") from error
        if self._writer.last_steps != num_steps:  # a run that was killed after this evaluation makes it once more
            self._writer.write(num_steps, summary)
        if session.config.eval_every:
            save_best(self._run_dir, *session.learner.state(), score=summary["mean_return"])
        metrics = {f"evaluation/{name}": value for name, value in summary.items()}
        self._last = num_steps, metrics
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
    if threading.current_thread() is not threading.main_thread():  # only that one may set handlers
        yield received
        return

    def remember(number: int, frame: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)
        with suppress(RuntimeError, OSError):  # it may come while something else is printed, or when nobody reads on
            print("stopping after this step; once more to stop at once", file=sys.stderr)

    before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _conclude(session: Session, evaluator: Evaluator, run_dir: Path, *, stopped: bool) -> dict[str, Any]:
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
        "metrics": session.metrics,
    }
    if config.eval_episodes and not stopped:
        evaluated = evaluator.evaluate()
        summary["evaluation"] = {name.removeprefix("evaluation/"): value for name, value in evaluated.items()}
    write_json(run_dir / "summary.json", summary)
    return summary
