"""A run that was killed, interrupted or damaged resumes bit-identically."""

import functools
import json
import multiprocessing
import os
import random
import signal
import time
import warnings
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.envs.classic_control.pendulum import PendulumEnv
from processes import COMMAND, started, wait_until
from saved_runs import rows_of
from settings import spec_segments
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dualhead.cli import main
from dualhead.config import NetworkConfig, TurnoverConfig
from dualhead.running import checkpoint, evaluator, trainer, writers
from dualhead.running.checkpoint import RunError, checkpoints, locked
from dualhead.running.config import RunConfig
from dualhead.running.evaluation import evaluate
from dualhead.running.session import Session
from dualhead.running.trainer import resume, train
from dualhead.storage import read_tensors
from dualhead.worlds import streams
from dualhead.worlds.commons.config import CommonsConfig
from dualhead.worlds.replay_trial import why_not_replayed

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="runs are killed in forked processes")
forks = pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU autograd does not survive a fork")


@pytest.fixture(autouse=True)
def quick_look_at_environments(monkeypatch):
    """Each life of a run tries out whether its environment can be played again."""
    monkeypatch.setattr(streams, "why_not_replayed", functools.partial(why_not_replayed, min_steps=5, seconds=0.0))


# Runs.


def config_of(env="dualhead/CartPoleNoVel-v1", *, memory="lstm", **changes):
    """Six updates of two streams or so, and everything switched on that goes on from one update to the next."""
    settings = {
        "env": env,
        "total_steps": 420,  # ends in the middle of a rollout
        "num_envs": 2,
        "checkpoint_every": 60,
        "keep_checkpoints": 3,
        "eval_every": 120,
        "eval_episodes": 2,
        "network": NetworkConfig.spec(memory=memory, hidden_size=6, encoder_sizes=(5,)),
        "ppo": spec_segments(
            rollout_length=32,
            sequence_length=8,
            batch_size=16,
            num_epochs=2,
            burn_in=3,
            learning_rate=3e-4,
            learning_rate_schedule="linear",
            entropy_coef=0.02,
            entropy_coef_end=0.0,
            entropy_decay_steps=5,
            normalize_observations=True,
            normalize_rewards=True,
        ),
    }
    return RunConfig(**{**settings, **changes})


def commons(form, **changes):
    rules = CommonsConfig(form=form, num_agents=3, epoch_turns=10, patch_size=6, window_radius=2, initial_resources=4)
    settings = {
        "total_steps": 1250,
        "checkpoint_every": 190,
        "eval_every": 380,
        "eval_episodes": 6,
        "world": rules,
        "enforce_norms": True,
        "turnover": TurnoverConfig(first_turn=40, every_turns=50, selection="random"),
    }
    return config_of("commons", **{**settings, **changes})


VARIANTS = {
    "vector lstm": config_of(),
    "vector gru": config_of(memory="gru", vectorization="async"),
    "noise": config_of("test/GlobalNoise-v0"),
    "image lstm": config_of("MiniGrid-Empty-5x5-v0", total_steps=330),
    "image mingru": config_of("MiniGrid-DoorKey-5x5-v0", memory="mingru", total_steps=330),
    "bandit lstm": commons("bandit"),
    "bandit gru": commons("bandit", memory="gru", policies="independent"),
    "grid lstm": commons("grid", policies="independent"),
    "grid lru": commons("grid", memory="lru"),
}


def run_in(run_dir, config, **changes):
    return train(config.model_copy(update={"run_dir": str(run_dir), **changes}), show_progress=False).summary


def timeless(numbers):
    return {name: value for name, value in numbers.items() if not name.startswith("time/")}


def what_is_left(run_dir):
    """Everything that a run leaves behind, but for the time it took; NaN as text, which is equal to itself."""
    left = {}
    for path in (run_dir / "checkpoints").iterdir():
        tensors, metadata = read_tensors(path)
        if "metrics" in metadata.get("run", {}):  # not in the best one
            metadata["run"]["metrics"] = timeless(metadata["run"]["metrics"])
            del metadata["run"]["seconds"]
        left |= {(path.name, name): (t.dtype, t.shape, t.numpy().tobytes()) for name, t in tensors.items()}
        left[path.name] = json.dumps(metadata, sort_keys=True)
    for path in run_dir.glob("*.csv"):
        left[path.name] = [timeless(row) for row in rows_of(run_dir, path.name)]
    events = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    for name in timeless(dict.fromkeys(events.Tags()["scalars"])):
        left["tensorboard", name] = [(event.step, event.value) for event in events.Scalars(name)]
    summary = json.loads((run_dir / "summary.json").read_text())
    for name in ("seconds", "steps_per_s", "run_dir", "checkpoint"):
        del summary[name]
    left["summary"] = json.dumps(summary | {"metrics": timeless(summary["metrics"])}, sort_keys=True)
    left["config"] = json.loads((run_dir / "config.json").read_text()) | {"run_dir": None}
    left["hidden files"] = sorted(path.name for path in run_dir.rglob(".*"))
    return left


def assert_nothing_differs(run_dir, never_stopped):
    ours, theirs = what_is_left(run_dir), what_is_left(never_stopped)
    assert [name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)] == []


# Kills.

PLACES = {
    "record": (Session, "record"),
    "learn": (Session, "learn"),
    "evaluate": (evaluator, "play_episodes"),
    "best": (evaluator, "save_best"),
    "checkpoint": (Session, "save"),
    "json": (trainer, "write_json"),
    "fsync": (os, "fsync"),
    "replace": (os, "replace"),
    "unlink": (checkpoint.Path, "unlink"),
    "append": (writers, "append_whole"),
}
"""Moments of a run's life: before and after each call of these."""


def count_moments(kill):
    """Counts the moments of this process and kills it at one of them.

    Args:
        kill: "before" or "after" a place and which call of it, as in "after learn 3"; or which moment of all of them.
            "torn" instead of "before append" kills in the middle of a row.
    """
    counts = Counter()

    def moment(*names):
        for name in names:
            counts[name] += 1
        if kill in (counts["all"], *(f"{name} {counts[name]}" for name in names)):
            os.kill(os.getpid(), signal.SIGKILL)

    def watched(place, call):
        def watching(*args, **kwargs):
            moment("all", f"before {place}")
            if place == "append" and kill == f"torn append {counts['before append']}":
                args[0].write(args[1][: len(args[1]) // 2])
                moment(f"torn {place}", *[f"torn {place}"] * (counts["before append"] - 1))
            result = call(*args, **kwargs)
            moment("all", f"after {place}")
            return result

        return watching

    for place, (owner, name) in PLACES.items():
        setattr(owner, name, watched(place, getattr(owner, name)))
    return counts


def live(config, run_dir, *, kill=None):
    """One life of a run, in a process of its own: it begins, or is resumed where the life before was ended.

    Args:
        kill: see `count_moments`; seconds as a float: whatever it does then.

    Returns:
        How many moments it had, or None if it was killed.
    """
    log, counted = run_dir.with_suffix(".log"), run_dir.with_suffix(".moments")

    def work():
        with log.open("w") as file, redirect_stdout(file), redirect_stderr(file):
            counts = count_moments(kill)
            if (run_dir / "config.json").exists():
                resume(run_dir, show_progress=False)
            else:
                run_in(run_dir, config)
            counted.write_text(str(counts["all"]))

    process = multiprocessing.get_context("fork").Process(target=work)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer Pythons warn of forking beside threads; none of ours computes
        process.start()
    if isinstance(kill, float):
        time.sleep(kill)
        process.kill()
    process.join()
    if process.exitcode == -signal.SIGKILL:
        return None
    assert process.exitcode == 0, log.read_text()
    return int(counted.read_text())


def kill_and_compare(config, tmp_path, *, places, num_random=0, num_timed=0, seed=0):
    """Kills runs at the given places, at random moments and at random times, and compares them with one that was not.

    A run that came through to its end before all kills were spent is followed by another one.
    """
    began = time.perf_counter()
    num_moments = live(config, tmp_path / "never_stopped")
    seconds = time.perf_counter() - began
    chosen = random.Random(seed)
    kills = [chosen.randint(1, num_moments // 2) for _ in range(num_random)]
    kills += [chosen.uniform(0.0, seconds / 2) for _ in range(num_timed)]
    kills += places
    chosen.shuffle(kills)
    number = num_killed = 0
    while kills:
        run, number = tmp_path / f"run{number}", number + 1
        while kills and not (run / "summary.json").exists():
            is_first = not run.exists()
            was_killed = live(config, run, kill=kills[0]) is None
            assert was_killed or not is_first or isinstance(kills[0], float), f"no run comes to {kills[0]!r}"
            num_killed += was_killed
            # What a run does not come to any more, a later one is killed at.
            if was_killed or isinstance(kills[0], float):
                del kills[0]
        if not (run / "summary.json").exists():
            live(config, run)
        assert_nothing_differs(run, tmp_path / "never_stopped")
        with pytest.raises(RunError, match="is complete"):
            resume(run)
        assert_nothing_differs(run, tmp_path / "never_stopped")
    assert num_killed >= len(places) + num_random


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """What the first run of a process imports, imported here, so that not every life does it again."""
    train(config_of(total_steps=64, run_dir=str(tmp_path_factory.mktemp("first") / "run")), show_progress=False)


@forks
@pytest.mark.usefixtures("imported")
def test_a_killed_run_goes_on_to_the_same_bits(tmp_path):
    places = ["after record 70", "before replace 5", "torn append 4"]
    kill_and_compare(config_of(), tmp_path, places=places)


@forks
@pytest.mark.slow
@pytest.mark.usefixtures("imported")
@pytest.mark.parametrize(
    ("variant", "places"),
    [
        ("vector lstm", ["before replace 1", "after evaluate 2", "after best 1"]),
        ("vector gru", ["before learn 2", "torn append 6", "after fsync 8"]),
        ("image lstm", ["before record 1", "before fsync 5", "before json 1"]),
        ("image mingru", ["after checkpoint 2", "before unlink 1", "after evaluate 3"]),
        ("bandit lstm", ["before checkpoint 1", "after append 5", "after replace 6"]),
        ("bandit gru", ["after learn 3", "before best 2", "before json 1"]),
        ("grid lstm", ["after learn 2", "before fsync 9", "after unlink 1"]),
        ("grid lru", ["torn append 3", "before evaluate 2", "after json 1"]),
    ],
)
def test_many_kills_leave_no_trace(tmp_path, variant, places):
    """40 kills in all: at places where something may be half done, at random moments, and by the clock."""
    kill_and_compare(VARIANTS[variant], tmp_path, places=places, num_random=1, num_timed=1, seed=len(variant))


# Interruptions, and other ways to go on.


def call_at_step(monkeypatch, number, action):
    """Calls `action` after the session's step of that number, counted over all sessions from now on."""
    real, count = Session.record, [0]

    def record(self, step):
        real(self, step)
        count[0] += 1
        if count[0] == number:
            action()

    monkeypatch.setattr(Session, "record", record)


def press_ctrl_c():
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("variant", ["vector gru", "bandit lstm"])
def test_ctrl_c_in_the_middle_of_a_rollout_leaves_no_trace(tmp_path, monkeypatch, variant):
    run_in(tmp_path / "never_stopped", VARIANTS[variant], keep_checkpoints=1)
    for number in (5, 80, 90):  # before the first update, after the second, and when little is left to do
        call_at_step(monkeypatch, number, press_ctrl_c)
    stopped = run_in(tmp_path / "run", VARIANTS[variant], keep_checkpoints=1)
    num_streams = VARIANTS[variant].num_streams
    assert (stopped["steps"], stopped["stopped_early"], stopped["metrics"]) == (5 * num_streams, True, {})
    for number in (80, 90):
        stopped = resume(tmp_path / "run", show_progress=False).summary
        assert (stopped["steps"], stopped["stopped_early"]) == (number * num_streams, True)
        assert stopped["metrics"]["update/optimizer_steps"] > 0
    assert not resume(tmp_path / "run", show_progress=False).summary["stopped_early"]
    assert_nothing_differs(tmp_path / "run", tmp_path / "never_stopped")


SMALL = ["--total-steps", "1000000", "--rollout-length", "16", "--batch-size", "16", "--hidden-size", "4"]
SMALL += ["--encoder-sizes", "4", "--eval-episodes", "0", "--num-threads", "1", "--run-dir"]


@pytest.mark.slow
def test_ctrl_c_reaches_environments_in_processes_of_their_own_too(tmp_path):
    """A terminal sends it to every process in front of it."""
    run, log = tmp_path / "run", tmp_path / "log"
    command = [*COMMAND, "train", "CartPole-v1", "--vectorization", "async", "--num-envs", "2"]
    with log.open("w") as file, started([*command, *SMALL, str(run)], stdout=file, stderr=file) as process:
        wait_until((run / "metrics.csv").exists, of=process)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait() == 130, log.read_text()
    assert f"go on with: dualhead resume {run}" in log.read_text()
    reached = json.loads((run / "summary.json").read_text())["steps"]
    assert main(["resume", str(run), "--total-steps", str(reached + 9)]) == 0


def test_a_second_ctrl_c_stops_at_once_and_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    def twice():
        press_ctrl_c()
        press_ctrl_c()

    run = tmp_path / "run"
    call_at_step(monkeypatch, 70, twice)
    with pytest.raises(KeyboardInterrupt):
        run_in(run, config_of())
    said = capsys.readouterr().err
    assert "stopping after this step; once more to stop at once" in said
    assert f"the newest checkpoint is {checkpoints(run)[0]}; go on with: dualhead resume {run}" in said
    assert checkpoints(run)[0].name == "step-000000000128.safetensors"
    assert resume(run, show_progress=False).summary["steps"] == 420


def test_more_steps_are_as_if_they_had_been_asked_for_at_first(tmp_path):
    config = config_of(ppo=config_of().ppo.model_copy(update={"learning_rate_schedule": "constant"}), eval_episodes=0)
    run_in(tmp_path / "long", config, total_steps=500, eval_every=0)
    run_in(tmp_path / "run", config, total_steps=270, eval_every=0)
    assert resume(tmp_path / "run", total_steps=500, show_progress=False).summary["steps"] == 500
    ours, theirs = what_is_left(tmp_path / "run"), what_is_left(tmp_path / "long")
    assert {name for name in ours if ours[name] != theirs.get(name) and "step-000000000270" not in str(name)} == set()


def test_more_steps_stretch_a_falling_learning_rate_to_the_new_end(tmp_path):
    run_in(tmp_path / "run", config_of(), total_steps=256)
    resume(tmp_path / "run", total_steps=512, show_progress=False)
    rates = [float(row["update/learning_rate"]) for row in rows_of(tmp_path / "run")]
    # 3e-4 (1 − steps before the rollout / steps of the run), and the run's end moves after four rollouts of 64 steps.
    shares = [1, 3 / 4, 2 / 4, 1 / 4, 4 / 8, 3 / 8, 2 / 8, 1 / 8]
    assert rates == pytest.approx([3e-4 * share for share in shares])


def test_a_run_whose_newest_checkpoint_is_damaged_goes_on_from_the_one_before(tmp_path):
    run_in(tmp_path / "never_stopped", config_of())
    run_in(tmp_path / "run", config_of())
    newest = checkpoints(tmp_path / "run")[0]
    newest.write_bytes(newest.read_bytes()[:-1])
    with pytest.warns(UserWarning, match=r"step-000000000420.safetensors is not a whole .*trying the one before it"):
        resume(tmp_path / "run", show_progress=False)
    assert_nothing_differs(tmp_path / "run", tmp_path / "never_stopped")


def test_what_cannot_be_resumed_says_why_and_stays_as_it_is(tmp_path, capsys):
    run = tmp_path / "run"
    run_in(run, config_of(), total_steps=70)
    (tmp_path / "empty").mkdir()

    def files():
        return {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"}

    def refused(*arguments):
        before = files()
        capsys.readouterr()
        assert main(["resume", *map(str, arguments)]) == 1
        assert files() == before
        return capsys.readouterr().err

    for name in ("nowhere", "empty"):
        assert f"{name} holds no run: cannot read config.json" in refused(tmp_path / name)
    for options in ([], ["--total-steps", 70]):
        assert f"{run} is complete: say --total-steps with more than 70" in refused(run, *options)
    assert "total_steps=9 ends before the first update" in refused(run, "--total-steps", 9)
    with locked(run):
        assert f"{run} is being written by process {os.getpid()} on" in refused(run, "--total-steps", 128)
    checkpoint_file = checkpoints(run)[0]
    assert "holds no run: cannot read config.json" in refused(checkpoint_file)
    (run / "summary.json").unlink()  # as if it had been killed in its last evaluation
    run_config = (run / "config.json").read_text()
    (run / "config.json").write_text(run_config.replace('"num_envs": 2', '"num_envs": 1'))
    assert "is of another run: expected num_envs=1 " in refused(run)
    (run / "config.json").write_text(run_config)
    assert f"{run} has done 70 steps: expected at least that, got total_steps=64" in refused(run, "--total-steps", 64)
    for path in checkpoints(run):
        path.write_bytes(b"nothing")
    assert f"{run} holds no whole checkpoint" in refused(run)


# Environments that cannot be saved.


class CountsEpisodes(gym.Env):
    """Keeps a number from one episode to the next, which its rewards show."""

    observation_space = spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space = spaces.Discrete(2)
    episodes = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episodes += 1
        self.time = 0
        return self._see(), {}

    def step(self, action):
        self.time += 1
        return self._see(), float(action) + self.episodes, False, self.time == 30, {}

    def _see(self):
        return np.array([self.time], np.float32)


gym.register("test/CountsEpisodes-v0", CountsEpisodes)
CANNOT = r"test/CountsEpisodes-v0: .* keeps state beyond an episode.*A resumed run will begin new episodes"
BEGIN_AGAIN = "the episodes of test/CountsEpisodes-v0 begin again, with recurrent states reset"


def test_an_environment_that_cannot_be_saved_begins_its_episodes_again(tmp_path, monkeypatch):
    run, config = tmp_path / "run", config_of("test/CountsEpisodes-v0", eval_every=0)
    call_at_step(monkeypatch, 80, press_ctrl_c)  # 160 steps: two rollouts of 64, and 32 that were not learned from
    with pytest.warns(UserWarning, match=CANNOT):
        assert run_in(run, config)["steps"] == 160
    saved = read_tensors(checkpoints(run)[0])[0]

    seen, real = [], trainer.run_loop

    def run_loop(session, *arguments, **settings):
        agent = session.learner
        seen.append((agent.num_steps, agent.rollout_memory.length, agent.rollout_memory.tail_length))
        seen.append([float(part.abs().sum()) for part in agent._get_hidden_state()])
        seen.append([session.observations.ravel().tolist(), agent._episode_starts.tolist()])
        seen.append([agent.reward_scale.returns.tolist(), session.tracker.running_lengths.tolist()])
        seen.append(torch.equal(agent.policy.critic.weight.detach(), saved["policy/critic.weight"]))
        return real(session, *arguments, **settings)

    monkeypatch.setattr(trainer, "run_loop", run_loop)
    forgotten = f"^{BEGIN_AGAIN}: their state was not saved, and 32 steps that were not learned from yet are dropped$"
    with pytest.warns(UserWarning, match=CANNOT), pytest.warns(UserWarning, match=forgotten):
        summary = resume(run, show_progress=False).summary
    assert seen == [(128, 0, 0), [0.0, 0.0], [[0.0, 0.0], [True, True]], [[0.0, 0.0], [0, 0]], True]
    assert summary["steps"] == 420
    assert [int(row["steps"]) for row in rows_of(run)] == [64, 128, 192, 256, 320, 384]
    # The end lies in the middle of a rollout, whose steps would be forgotten: it is the end all the same.
    with pytest.raises(RunError, match="is complete"):
        resume(run, show_progress=False)


def test_an_episode_that_leads_elsewhere_begins_again(tmp_path, monkeypatch):
    """As when another version of an environment was installed meanwhile."""
    run = tmp_path / "run"
    call_at_step(monkeypatch, 40, press_ctrl_c)
    run_in(run, config_of("Pendulum-v1", eval_every=0))
    monkeypatch.setattr(PendulumEnv, "step", lambda self, u, step=PendulumEnv.step: step(self, 0.5 * u))
    with pytest.warns(UserWarning, match="episodes of Pendulum-v1 begin again.*: environment 0: its last observation"):
        assert resume(run, show_progress=False).summary["steps"] == 420


# Evaluation on the way.


class GlobalNoise(gym.Env):
    """Draws what it shows from the generators that everything in a process shares."""

    observation_space = spaces.Box(0, 1, (3,), np.float32)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self._see(), {}

    def step(self, action):
        return self._see(), float(action), False, random.random() < 0.1, {}

    def _see(self):
        return np.array([random.random(), np.random.rand(), torch.rand(()).item()], np.float32)  # noqa: NPY002


gym.register("test/GlobalNoise-v0", GlobalNoise)


@pytest.mark.filterwarnings("ignore:.*draws from other generators")  # torch's generator is not an environment's
@pytest.mark.parametrize("variant", ["vector lstm", "bandit lstm", "bandit gru", "noise"])
def test_evaluation_on_the_way_leaves_training_alone_and_keeps_the_best(tmp_path, variant):
    config = VARIANTS[variant]
    run_in(tmp_path / "with", config)
    run_in(tmp_path / "without", config, eval_every=0, eval_episodes=0)
    ours, theirs = (read_tensors(checkpoints(tmp_path / name)[0])[0] for name in ("with", "without"))
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name].numpy().tobytes() != theirs[name].numpy().tobytes()] == []

    rows = rows_of(tmp_path / "with", "evaluations.csv")
    rollout = config.ppo.rollout_length * config.num_streams
    end = -(-config.total_steps // config.num_streams) * config.num_streams
    due, last = [], 0
    for steps in range(rollout, end + 1, rollout):
        if steps >= last + config.eval_every:
            due.append(steps)
            last = steps
    assert [int(row["steps"]) for row in rows] == [*due, end]  # and once at the end
    assert len(due) >= 2
    best, metadata = read_tensors(tmp_path / "with" / "checkpoints" / "best.safetensors")
    scores = [float(row["mean_return"]) for row in rows]
    assert metadata["score"] == max(scores)
    assert metadata["num_steps"] == int(rows[scores.index(max(scores))]["steps"])
    assert not [name for name in best if name.startswith("run/")]  # a policy, and nothing of the run
    assert not (tmp_path / "without" / "evaluations.csv").exists()
    assert not (tmp_path / "without" / "checkpoints" / "best.safetensors").exists()


def test_the_best_checkpoint_is_chosen_on_other_episodes_than_eval_reports(tmp_path, monkeypatch):
    seeds, real = [], streams.GymnasiumStreams.reset

    def reset(self, *, seed=None):
        seeds.append(seed)
        return real(self, seed=seed)

    chosen_on = set()
    monkeypatch.setattr(streams.GymnasiumStreams, "reset", reset)
    monkeypatch.setattr(evaluator, "save_best", lambda *_, score: chosen_on.add(seeds[-1]))
    run_in(tmp_path / "run", config_of())
    assert len(chosen_on) == 1
    assert seeds[-1] not in chosen_on  # the evaluation at the end, which the summary has
    evaluate(tmp_path / "run", episodes=1)
    assert seeds[-1] == seeds[-2]
    assert seeds[0] not in chosen_on | {seeds[-1]}  # the run's own
