"""Training runs: how one begins, how one is resumed, and the loop."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dualhead import snapshot
from dualhead.agent import DualHeadRecurrentPPO
from dualhead.config import WorldConfig, names_of
from dualhead.errors import (
    CheckpointError,
    DataError,
    DivergedError,
    EnvironmentFailed,
    RunError,
    SettingsError,
    did_you_mean,
)
from dualhead.population import IndependentLearners
from dualhead.running import machine
from dualhead.running.checkpoint import (
    Checkpoint,
    checkpoints,
    locked,
    new_run_dir,
    read_config,
    use_newest,
    write_json,
)
from dualhead.running.config import RunConfig, planned
from dualhead.running.config_file import config_from
from dualhead.running.environment import Environment, config_to_play, is_streams, settings_of, world_of
from dualhead.running.evaluator import Evaluator, open_evaluation
from dualhead.running.parts import find_part, name_of
from dualhead.running.results import read_summary
from dualhead.running.session import Session, make_numbers
from dualhead.running.trust import trust
from dualhead.running.writers import Writer, expect_writers, make_writers, require_packages

OnUpdate = Callable[[Session, dict[str, float]], bool | None]
Schedule = Callable[[float], float]


class TrainingResult(NamedTuple):
    """The contents of `summary.json` (steps, seconds, last metrics, evaluation, where the run is), and the agent."""

    summary: dict[str, Any]
    agent: DualHeadRecurrentPPO | IndependentLearners  # one agent for each place with `policies="independent"`


class _Given(NamedTuple):
    """What `train` and `resume` get besides settings, in the order of their arguments."""

    env: Environment | None
    encoder: Any
    memory: Any
    learning_rate: Schedule | None
    writers: Iterable[Writer]
    on_update: OnUpdate | None
    eval_env: str | Environment | None
    show_progress: bool


def train(
    env: str | RunConfig | Environment | None = None,
    *,
    config: str | os.PathLike[str] | None = None,
    encoder: Any = None,
    memory: Any = None,
    learning_rate: Schedule | None = None,
    writers: Iterable[Writer] = (),
    on_update: OnUpdate | None = None,
    eval_env: str | Environment | None = None,
    show_progress: bool = True,
    **settings: Any,
) -> TrainingResult:
    """Trains an agent and writes a run directory, as `dualhead train` does.

        result = dualhead.train("CartPole-v1", total_steps=50_000, ppo=PPOConfig(gamma=0.95))
        result = dualhead.train(lambda: MyEnv(size=7), num_envs=8, writers=[MyWriter()])
        result = dualhead.train(simple_spread_v3.parallel_env, num_envs=8, policies="independent")

    Ctrl-C (or SIGTERM, or SIGHUP) ends the run after the current step, with a checkpoint; a second one ends it at once.
    Where an environment fails, the run ends with a checkpoint of the agent before the step.

    Args:
        env: an environment id, a callable that makes one environment (of Gymnasium, or a ParallelEnv of PettingZoo),
            a ParallelEnv, a Gymnasium vector environment in SAME_STEP mode, or `Streams`; or all settings of a run.
            `resume` needs the same object again. None: that of `config`.
        config: file of settings below those that are given: the `config.json` of another run, YAML or TOML.
        encoder, memory: your own parts of the policy, see `DualHeadRecurrentPPO`; or MODULE:NAME of one.
        learning_rate: schedule of the learning rate by progress, which rises from 0 to 1 over `total_steps`.
        writers: get the metrics of each update, besides the run's own writers. They are closed with the run.
        on_update: called after each update with the session and its metrics, before they are written; may add numbers
            to them. Returning True ends the run, with a checkpoint and an evaluation. `session.learning_rate = ...`
            sets the learning rate from the next update on.
        eval_env: what evaluations play in, like `env`, with its `wrappers` but without its `env_args`; needed when
            `env` is a vector environment or `Streams` and evaluations are asked for.
        show_progress: on the terminal.
        settings: fields of `RunConfig`. Without a `preset`, settings that are not given are the tuned ones of this
            environment if there are any; `PPOConfig(gamma=0.95)` gives one setting.

    Raises:
        TypeError: an argument is none of what is expected.
        ValueError: `env` is a vector environment in another mode than SAME_STEP.
        SettingsError: impossible settings.
        UnavailableEnvironment: the environment cannot be made.
        RunError: spaces or settings do not fit each other, `eval_env` cannot be used, the run directory cannot be
            written or is in use, an environment failed or gave data that cannot be learned from, or a metric is no
            number.
    """
    own_env = None if isinstance(env, str | RunConfig) else env
    given = _Given(own_env, encoder, memory, learning_rate, writers, on_update, eval_env, show_progress)
    named = {"encoder": name_of(encoder), "memory": name_of(memory)}
    over: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
    over["learning_rate_from"] = "config" if learning_rate is None else "callable"
    if isinstance(env, RunConfig):
        if settings or config is not None:
            further = sorted([*settings, *([] if config is None else ["config"])])
            raise TypeError(f"train(RunConfig(...)) takes no further settings, got {further}")
        of_env = env.model_dump(include={"env_args", "wrappers", "drop_observations"})
        found = world_of(env.env, of_env) if env.env_from == "id" and env.world == WorldConfig() else {}
        run = env.model_copy(update=over | found)
    else:
        of_env = {} if env is None and config is not None else settings_of(env)  # type: ignore[arg-type]
        if twice := sorted(settings.keys() & of_env.keys()):
            raise TypeError(f"{', '.join(twice)}: the environment that was given decides, expected no such setting")
        if env is not None:
            of_env |= world_of(env, settings)
        if unknown := settings.keys() - RunConfig.model_fields.keys():
            known = [*(train.__kwdefaults__ or ()), *names_of(RunConfig)]
            raise SettingsError((name, f"no such setting{did_you_mean(name, known)}") for name in sorted(unknown))
        # Streams that were passed are in use by training: no evaluation unless it is asked for.
        in_use = of_env.get("env_from") == "streams" and eval_env is None
        over = ({"eval_episodes": 0} if in_use else {}) | of_env | settings | over
        run = planned(**over) if config is None else config_from(config, over)
    given = given._replace(
        encoder=run.encoder if encoder is None else encoder, memory=run.memory if memory is None else memory
    )
    return _run(run, given)


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
    eval_env: str | Environment | None = None,
    show_progress: bool = True,
) -> TrainingResult:
    """Resumes a run that was stopped, from its newest whole checkpoint, bit-identically.

    Args:
        run: its directory; a run that was killed before its first checkpoint begins again.
        total_steps: new end of the run, written into its configuration; None: as it was. A learning rate that falls
            over the whole run then falls to the new end.
        env, encoder, memory, learning_rate: what `train` got as an object; the run's files only name it.
        writers, on_update, eval_env, show_progress: as for `train`.

    Raises:
        RunError: no run is there, it is complete, another process is writing it, an object is missing, or as `train`.
        CheckpointError: its checkpoint does not fit its configuration.
    """
    given = _Given(env, encoder, memory, learning_rate, writers, on_update, eval_env, show_progress)
    config = config_to_play(run).model_copy(update={"run_dir": str(run)})
    if total_steps is not None:
        try:
            config = RunConfig(**config.model_dump() | {"total_steps": total_steps})
        except SettingsError as error:
            raise RunError(str(error)) from None
    expected = {
        "env": None if config.env_from == "id" else f"{config.env_from} {config.env!r}",
        "encoder": config.encoder,
        "memory": config.memory,
        "learning_rate": None if config.learning_rate_from == "config" else "schedule",
    }
    for name, part in expected.items():
        if part is None and getattr(given, name) is not None:
            raise RunError(f"{name}: this run began without its own: expected None, got {getattr(given, name)!r}")
        if part is not None and getattr(given, name) is None:
            how = f"--{name} {part}, or {name}=... in Python" if ":" in part else f"dualhead.resume(run, {name}=...)"
            raise RunError(f"{name}: this run began with the {part}, which its files cannot hold: pass it, {how}")
    return _run(config, given, resumed=Path(run))


def _run(config: RunConfig, given: _Given, *, resumed: Path | None = None) -> TrainingResult:
    """Begins a run, or resumes the one in `resumed`; trains to the end, evaluates, and writes the summary."""
    own_writers, schedule = expect_writers(given.writers), given.learning_rate
    if schedule is not None and not callable(schedule):
        raise TypeError(
            f"learning_rate: expected a schedule, a function of progress from 0 to 1, got {schedule!r}; pass a number "
            f"by ppo=PPOConfig(learning_rate=...)"
        )
    if is_streams(given.env) and given.eval_env is None and (config.eval_episodes or config.eval_every):
        raise RunError(
            f"eval_episodes={config.eval_episodes}, eval_every={config.eval_every}: evaluations cannot use the "
            f"streams of the training; pass eval_env=..., or set both to 0"
        )
    require_packages(config)
    machine.keep_freed_memory()
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    machine.seed_everything(config.seed)
    run_dir, saved, untold = resumed, None, False
    with ExitStack() as stack:

        def say_how_to_go_on(_: Any, error: BaseException | None, __: Any) -> None:
            if error is not None and untold:
                said = "stopped at once" if isinstance(error, KeyboardInterrupt) else "the run failed"
                with suppress(OSError):  # the terminal may be gone
                    print(f"{said}; {_how_to_go_on(run_dir)}", file=sys.stderr)

        stack.push(say_how_to_go_on)  # the first here is the last on the way out
        requests = stack.enter_context(machine.requests_by_signal(save_on=config.save_on))
        if resumed is not None:
            stack.enter_context(locked(resumed))
            saved = _newest_unfinished(resumed, config)
        parts = {name: find_part(getattr(given, name), what=name) for name in ("encoder", "memory")}
        session = Session(config, env=given.env, schedule=schedule, **parts)
        stack.callback(session.close)
        evaluation_env = given.env
        if given.eval_env is not None:
            evaluation_env = open_evaluation(session, given.eval_env, is_other=True)
            if not is_streams(given.eval_env):
                stack.callback(evaluation_env.close)
        run_dir = resumed or new_run_dir(config)
        if resumed is None:
            trust(run_dir)  # this process writes it
            stack.enter_context(locked(run_dir))
            if given.show_progress:
                print(f"writing to {run_dir}", flush=True)
        elif saved is None:
            print(f"{run_dir} was stopped before its first checkpoint: it begins again")
        if saved is None:
            session.begin()
        else:
            print(f"going on from {_restore(session, run_dir, saved)}")
        if resumed is not None and read_config(run_dir).total_steps != config.total_steps:
            write_json(run_dir / "config.json", config.model_dump())
        with machine.preserved_randomness():  # `resumable` plays a trial episode
            reason = session.streams.resumable
        if reason is not None:
            warnings.warn(
                f"{config.env}: {reason}. A resumed run will begin new episodes, with recurrent states reset, instead "
                f"of continuing exactly",
                stacklevel=3,
            )
        resume_at = None if resumed is None else session.learner.num_steps
        for writer in own_writers:
            stack.callback(writer.close)
        writers = make_writers(config, run_dir, resume_at=resume_at, show_progress=given.show_progress)
        for writer in writers:
            stack.callback(writer.close)
        writers += own_writers
        evaluator = stack.enter_context(
            Evaluator(session, run_dir, env=evaluation_env, resume_at=resume_at, requests=requests)
        )
        untold = True
        try:
            run_loop(session, writers, evaluator, run_dir, requests=requests, on_update=given.on_update)
            return TrainingResult(_conclude(session, evaluator, run_dir, requests=requests), session.learner)
        except (Exception, SystemExit) as error:
            said = _why_it_ended(error, session, run_dir)
            if said is None:
                raise
            untold = False
            raise RunError(said) from error


def _why_it_ended(error: BaseException, session: Session, run_dir: Path) -> str | None:
    """What to say of an error that ended a run; None where it is not one of its environments, its data or its files.

    Where its environments failed, the agent is saved first, as it was before their step.
    """
    learner, config = session.learner, session.config
    failed_in_step = learner.forget_actions() or isinstance(error, DataError | EnvironmentFailed)
    done = f"{config.env} after {learner.num_steps} steps ({learner.num_steps // config.num_streams} of each stream)"
    known = isinstance(error, DataError | EnvironmentFailed | DivergedError | RunError)
    if not failed_in_step and not known:
        return None
    if failed_in_step and session.metrics:  # something was learned
        with suppress(RunError):  # such as a full disk: the checkpoint before is named
            session.save(run_dir, with_streams=False)
    said = str(error) if known else f"the step raised {type(error).__name__}: {error}"
    return f"{done}: {said}; {_how_to_go_on(run_dir)}"


def _restore(session: Session, run_dir: Path, newest: Checkpoint) -> Path:
    """Restores the newest checkpoint, or the one before it where that is not a possible one; its file."""

    def restore(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> Path:
        session.restore(tensors, metadata, source=str(path))
        return path

    return use_newest(run_dir, restore, first=newest)


def _newest_unfinished(run_dir: Path, config: RunConfig) -> Checkpoint | None:
    """The checkpoint to resume from, or None before the first one; RunError if the run has reached its end."""
    if not checkpoints(run_dir):
        return None

    def check(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> Checkpoint:
        snapshot.learners(tensors, metadata, source=str(path))
        return path, tensors, metadata

    newest = use_newest(run_dir, check)
    num_steps, summary = newest[2]["num_steps"], read_summary(run_dir)
    # A run that was killed in its last evaluation has no summary yet.
    is_concluded = summary.get("steps") == num_steps and not summary.get("stopped_early")
    if num_steps >= config.total_steps and is_concluded:
        raise RunError(f"{run_dir} is complete: say --total-steps with more than {num_steps} to train it longer")
    if num_steps >= config.total_steps + config.num_streams:
        raise RunError(
            f"{run_dir} has done {num_steps} steps: expected at least that, got total_steps={config.total_steps}"
        )
    # Before anything is made of that size.
    if (num_streams := snapshot.num_streams(newest[2])) != config.num_streams:
        raise CheckpointError(
            f"{newest[0]} is of another architecture: its num_streams is {num_streams}, expected {config.num_streams}"
        )
    return newest


def _how_to_go_on(run_dir: Path | None) -> str:
    newest = None if run_dir is None else next(iter(checkpoints(run_dir)), None)
    if newest is None:
        return "no checkpoint was written yet"
    return f"the newest checkpoint is {newest}; go on with: dualhead resume {run_dir}"


def run_loop(
    session: Session,
    writers: Sequence[Writer],
    evaluator: Evaluator,
    run_dir: Path,
    *,
    requests: machine.Requests | None = None,
    on_update: OnUpdate | None = None,
) -> None:
    """Act, step, record, learn, log, until `total_steps`, a request to stop, or an `on_update` that asks for it."""
    requests = requests or machine.Requests()
    learner, streams = session.learner, session.streams
    clock, cores, is_enough = machine.Stopwatch(session.seconds, learner.num_steps), machine.CoreUse(), False
    while learner.num_steps < session.config.total_steps and not requests.stop and not is_enough:
        actions = learner.act(session.observations, active=getattr(streams, "active", None))
        step = streams.step(actions)
        session.record(step)
        if learner.rollout_is_ready:
            clock.begin_update()
            metrics = session.learn()
            metrics |= clock.end_update(learner.num_steps)
            if session.is_due("eval"):
                metrics |= evaluator.evaluate()
            is_enough = on_update is not None and bool(on_update(session, metrics))
            make_numbers(metrics)
            for writer in writers:
                writer.write(learner.num_steps, metrics)
            cores.warn_once()
            requests.save |= session.is_due("checkpoint")
        if requests.save:
            requests.save = False
            session.save(run_dir, seconds=clock.seconds)
    session.save(run_dir, seconds=clock.seconds)


def _conclude(session: Session, evaluator: Evaluator, run_dir: Path, *, requests: machine.Requests) -> dict[str, Any]:
    config, num_steps = session.config, session.learner.num_steps
    summary: dict[str, Any] = {
        "env": config.env,
        "memory": config.memory_name,
        "seed": config.seed,
        "steps": num_steps,
        "stopped_early": requests.stop or num_steps < config.total_steps,
        "seconds": round(session.seconds, 3),
        "steps_per_s": round(num_steps / session.seconds, 1),
        "run_dir": str(run_dir),
        "checkpoint": str(checkpoints(run_dir)[0]),
        "metrics": session.metrics,
    }
    if config.eval_episodes and not requests.stop:
        evaluation = evaluator.conclude()
        summary |= {"stopped_early": True} if evaluation is None else {"evaluation": evaluation}
    write_json(run_dir / "summary.json", summary)
    return summary
