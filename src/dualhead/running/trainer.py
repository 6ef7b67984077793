"""Training runs: begin one, go on with one, and the loop."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dualhead.agent import DualHeadRecurrentPPO
from dualhead.errors import DataError, DivergedError, RunError, SettingsError
from dualhead.population import IndependentLearners
from dualhead.running.checkpoint import (
    checkpoints,
    locked,
    new_run_dir,
    read_config,
    read_json,
    read_newest,
    write_json,
)
from dualhead.running.config import RunConfig, planned
from dualhead.running.environment import Environment, is_streams, settings_of
from dualhead.running.evaluator import Evaluator
from dualhead.running.machine import CoreUse, Stopwatch, keep_freed_memory
from dualhead.running.parts import find_part, name_of
from dualhead.running.randomness import preserved_randomness, seed_everything
from dualhead.running.session import Session
from dualhead.running.signals import stop_requests
from dualhead.running.writers import Writer, expect_writers, make_writers, require_packages

OnUpdate = Callable[[Session, dict[str, float]], bool | None]
Schedule = Callable[[float], float]


class TrainingResult(NamedTuple):
    """Fields:
    summary: what `summary.json` says: steps, seconds, the last metrics, the evaluation, and where the run is.
    agent: as it is after the last update; an agent for each place with `policies="independent"`.
    """

    summary: dict[str, Any]
    agent: DualHeadRecurrentPPO | IndependentLearners


def train(
    env: str | RunConfig | Environment,
    *,
    encoder: Any = None,
    memory: Any = None,
    learning_rate: Schedule | None = None,
    writers: Iterable[Writer] = (),
    on_update: OnUpdate | None = None,
    eval_env: Environment | None = None,
    show_progress: bool = True,
    **settings: Any,
) -> TrainingResult:
    """Trains an agent and leaves a run directory behind, as `dualhead train` does.

        result = dualhead.train("CartPole-v1", total_steps=50_000, ppo=PPOConfig(gamma=0.95))
        result = dualhead.train(lambda: MyEnv(size=7), num_envs=8, writers=[MyWriter()])

    Ctrl-C (or SIGTERM) ends it after the step at hand, with a checkpoint; a second one ends it at once.

    Args:
        env: an environment id, a callable that makes one environment, a Gymnasium vector environment in SAME_STEP
            mode, or `Streams`; or all settings of a run. Who handed over an object hands it over again to resume.
        encoder, memory: parts of your own for the policy, see `DualHeadRecurrentPPO`; or MODULE:NAME of one.
        learning_rate: step size by progress, which rises from 0 to 1 over `total_steps`. A number: `ppo=`.
        writers: get the metrics of each update, beside those that the run has. They are closed with the run.
        on_update: called after each update with the session and its metrics, before these are written, and may add to
            them. True ends the run, with a checkpoint and an evaluation. `session.learning_rate = ...` sets the step
            size from the next update on.
        eval_env: what evaluations play in, like `env`; needed where that is a vector environment or `Streams` and
            evaluations are asked for.
        show_progress: on the terminal.
        settings: the fields of `RunConfig`. Where no `preset` is asked for, those that are not given are the ones that
            were tuned for this environment, if there are any; `PPOConfig(gamma=0.95)` gives one of them.

    Returns:
        The summary, and the agent.

    Raises:
        SettingsError: settings that are not possible.
        UnavailableEnvironment: the environment cannot be made.
        RunError: spaces or settings do not go together, the run directory cannot be written or is in use, or the
            environment gave what cannot be learned from.
    """
    if isinstance(env, RunConfig):
        if settings:
            raise TypeError(f"train(RunConfig(...)) takes no further settings, got {sorted(settings)}")
        config, given = env, None
    else:
        of_env = settings_of(env)
        if twice := sorted(settings.keys() & of_env.keys()):
            raise TypeError(f"{', '.join(twice)}: the environment that was given decides")
        config = planned(**_without_evaluation(of_env, eval_env) | of_env | settings)
        given = None if isinstance(env, str) else env
    learning_rate_from = "config" if learning_rate is None else "callable"
    encoder, memory = encoder or config.encoder, memory or config.memory
    named = {"encoder": name_of(encoder), "memory": name_of(memory), "learning_rate_from": learning_rate_from}
    config = config.model_copy(update=named)
    own_writers = expect_writers(writers)
    evaluation_env = _evaluation_env(config, given, eval_env)
    require_packages(config)
    _prepare(config)
    session = Session(config, env=given, schedule=learning_rate, **_parts(encoder, memory))
    try:
        run_dir = new_run_dir(config)
        with locked(run_dir):
            if show_progress:
                print(f"writing to {run_dir}", flush=True)
            session.begin()
            return _run(session, run_dir, own_writers, on_update, evaluation_env, show_progress=show_progress)
    finally:
        session.close()


def resume(
    run: str | Path,
    *,
    total_steps: int | None = None,
    env: Environment | None = None,
    encoder: Any = None,
    memory: Any = None,
    learning_rate: Schedule | None = None,
    writers: Iterable[Writer] = (),
    on_update: OnUpdate | None = None,
    eval_env: Environment | None = None,
    show_progress: bool = True,
) -> TrainingResult:
    """Goes on with a run that was stopped, from its newest whole checkpoint, to the bits of one that never stopped.

    Args:
        run: its directory; one that was killed before its first checkpoint begins again.
        total_steps: new end of the run, written into its configuration; None: as it was. A learning rate that falls
            over the whole run then falls to the new end.
        env, encoder, memory, learning_rate: what was handed to `train` as an object; its files only name it.
        writers, on_update, eval_env, show_progress: as for `train`.

    Returns:
        As `train` does.

    Raises:
        RunError: no run is there, it is complete, another process is writing it, an object is missing, or as `train`
            does.
        CheckpointError: its checkpoint does not fit its configuration.
    """
    run_dir = Path(run)
    config = read_config(run_dir).model_copy(update={"run_dir": str(run_dir)})
    if total_steps is not None:
        try:
            config = RunConfig(**config.model_dump() | {"total_steps": total_steps})
        except SettingsError as error:
            raise RunError(str(error)) from None
    _expect_objects(config, env=env, encoder=encoder, memory=memory, learning_rate=learning_rate)
    own_writers = expect_writers(writers)
    evaluation_env = _evaluation_env(config, env, eval_env)
    require_packages(config)
    _prepare(config)
    with locked(run_dir):
        saved = read_newest(run_dir) if checkpoints(run_dir) else None
        if saved is not None:
            num_steps = saved[2].get("num_steps", 0)
            _expect_unfinished(run_dir, num_steps, config)
            if total_steps is not None and total_steps < num_steps:
                raise RunError(f"{run_dir} has done {num_steps} steps: expected at least that, got {total_steps=}")
        session = Session(config, env=env, schedule=learning_rate, **_parts(encoder, memory))
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
            return _run(
                session,
                run_dir,
                own_writers,
                on_update,
                evaluation_env,
                resume_at=session.learner.num_steps,
                show_progress=show_progress,
            )
        finally:
            session.close()


def _without_evaluation(of_env: dict[str, Any], eval_env: Environment | None) -> dict[str, Any]:
    """Streams that were handed over are busy with training: unasked, nothing is evaluated."""
    return {"eval_episodes": 0} if of_env.get("env_from") == "streams" and eval_env is None else {}


def _evaluation_env(config: RunConfig, env: Environment | None, eval_env: Environment | None) -> Environment | None:
    """What evaluations play in; None: what the settings name.

    Raises:
        RunError: nothing, but they are asked for.
    """
    if eval_env is not None or not is_streams(env):
        return eval_env or env
    if config.eval_episodes or config.eval_every:
        raise RunError(
            f"eval_episodes={config.eval_episodes}, eval_every={config.eval_every}: the streams that were given are "
            f"busy with training; pass eval_env=... to evaluate in, or set both to 0"
        )
    return None


def _parts(encoder: Any, memory: Any) -> dict[str, Any]:
    return {"encoder": find_part(encoder, what="encoder"), "memory": find_part(memory, what="memory")}


def _expect_objects(config: RunConfig, **given: Any) -> None:
    """Refuses to resume without what was handed over, or with what was not.

    Raises:
        RunError: says which argument to pass.
    """
    expected = {
        "env": None if config.env_from == "id" else f"{config.env_from} {config.env!r}",
        "encoder": config.encoder,
        "memory": config.memory,
        "learning_rate": None if config.learning_rate_from == "config" else "schedule",
    }
    for name, part in expected.items():
        if (part is None) != (given[name] is None):
            if part is None:
                raise RunError(f"{name}: this run was begun without one of its own: expected None, got {given[name]!r}")
            how = f"--{name} {part}, or {name}=... in Python" if ":" in part else f"dualhead.resume(run, {name}=...)"
            raise RunError(
                f"{name}: this run was begun with the {part}, which its files name and cannot hold: pass it, {how}"
            )


def _prepare(config: RunConfig) -> None:
    keep_freed_memory()
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    seed_everything(config.seed)


def _expect_unfinished(run_dir: Path, num_steps: int, config: RunConfig) -> None:
    """Refuses a run that trained to its end and summed up; one that was killed in between still has that to do."""
    summary = read_json(run_dir / "summary.json") or {}
    concluded = summary.get("steps") == num_steps and not summary.get("stopped_early")
    if num_steps >= config.total_steps and concluded:
        raise RunError(f"{run_dir} is complete: say --total-steps with more than {num_steps} to train it longer")


def _run(
    session: Session,
    run_dir: Path,
    own_writers: list[Writer],
    on_update: OnUpdate | None,
    evaluation_env: Environment | None,
    *,
    resume_at: int | None = None,
    show_progress: bool,
) -> TrainingResult:
    """Trains to the end, evaluates and sums up."""
    config, learner = session.config, session.learner
    with preserved_randomness():  # it is found by playing
        reason = session.streams.resumable
    if reason is not None:
        warnings.warn(
            f"{config.env}: {reason}. A resumed run will begin new episodes, with recurrent states reset, instead of "
            f"going on exactly",
            stacklevel=3,
        )
    with ExitStack() as stack:
        for writer in own_writers:
            stack.callback(writer.close)
        writers = make_writers(config, run_dir, resume_at=resume_at, show_progress=show_progress)
        for writer in writers:
            stack.callback(writer.close)
        evaluator = stack.enter_context(Evaluator(session, run_dir, env=evaluation_env, resume_at=resume_at))
        stop = stack.enter_context(stop_requests())
        try:
            run_loop(session, [*writers, *own_writers], evaluator, run_dir, stop=stop, on_update=on_update)
            return TrainingResult(_conclude(session, evaluator, run_dir, interrupted=bool(stop)), learner)
        except (DataError, DivergedError) as error:
            raise RunError(
                f"{config.env} after {learner.num_steps} steps "
                f"({learner.num_steps // config.num_streams} of each stream): {error}; {_name_newest(run_dir)}"
            ) from error
        except KeyboardInterrupt:
            print(f"stopped at once; {_name_newest(run_dir)}; go on with: dualhead resume {run_dir}", file=sys.stderr)
            raise


def _name_newest(run_dir: Path) -> str:
    newest = next(iter(checkpoints(run_dir)), None)
    return "no checkpoint was written yet" if newest is None else f"the newest checkpoint is {newest}"


def run_loop(
    session: Session,
    writers: Sequence[Writer],
    evaluator: Evaluator,
    run_dir: Path,
    *,
    stop: Sequence[int] = (),
    on_update: OnUpdate | None = None,
) -> None:
    """Act, step, record, learn, log, until `total_steps`, a request to stop, or an `on_update` that asks for it."""
    learner, streams = session.learner, session.streams
    clock, cores, is_enough = Stopwatch(session.seconds, learner.num_steps), CoreUse(), False
    while learner.num_steps < session.config.total_steps and not stop and not is_enough:
        actions = learner.act(session.observations)
        step = streams.step(actions)
        session.record(step)
        if learner.rollout_is_ready:
            clock.begin_update()
            metrics = session.learn()
            metrics |= clock.end_update(learner.num_steps)
            if session.is_due_for_evaluation():
                metrics |= evaluator.evaluate()
            is_enough = on_update is not None and bool(on_update(session, metrics))
            for writer in writers:
                writer.write(learner.num_steps, metrics)
            cores.warn_once()
            if session.is_due_for_checkpoint():
                session.save(run_dir, seconds=clock.seconds)
    session.save(run_dir, seconds=clock.seconds)


def _conclude(session: Session, evaluator: Evaluator, run_dir: Path, *, interrupted: bool) -> dict[str, Any]:
    config, num_steps = session.config, session.learner.num_steps
    summary: dict[str, Any] = {
        "env": config.env,
        "memory": config.memory_name,
        "seed": config.seed,
        "steps": num_steps,
        "stopped_early": interrupted or num_steps < config.total_steps,
        "seconds": round(session.seconds, 3),
        "steps_per_s": round(num_steps / session.seconds, 1),
        "run_dir": str(run_dir),
        "checkpoint": str(next(iter(checkpoints(run_dir)))),
        "metrics": session.metrics,
    }
    if config.eval_episodes and not interrupted:
        summary["evaluation"] = evaluator.conclude()
    write_json(run_dir / "summary.json", summary)
    return summary
