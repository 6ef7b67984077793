"""A run that was killed, interrupted or damaged goes on to the same bits as one that never stopped."""

import csv
import functools
import json
import os
import random
import signal
import time
import traceback
import warnings
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout, suppress

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dualhead.cli import main
from dualhead.config import CommonsConfig, NetworkConfig, PPOConfig, RunConfig, TurnoverConfig
from dualhead.running import checkpoint, metrics, trainer
from dualhead.running.checkpoint import RunError, checkpoints, locked
from dualhead.running.session import Session
from dualhead.running.trainer import resume, train
from dualhead.storage import read_tensors
from dualhead.worlds import streams
from dualhead.worlds.snapshots import can_snapshot

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="runs are killed in forked processes")
forks = pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU autograd does not survive a fork")


@pytest.fixture(autouse=True)
def quick_look_at_environments(monkeypatch):
    """Each life of a run tries out for more than half a second whether its environment can be saved."""
    monkeypatch.setattr(streams, "can_snapshot", functools.partial(can_snapshot, min_steps=5, seconds=0.0))


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
        "network": NetworkConfig(memory=memory, hidden_size=6, encoder_sizes=(5,)),
        "ppo": PPOConfig(
            rollout_length=32,
            sequence_length=8,
            batch_size=16,
            num_epochs=2,
            burn_in=3,
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
        "commons": rules,
        "enforce_norms": True,
        "turnover": TurnoverConfig(first_turn=40, every_turns=50, selection="random"),
    }
    return config_of("commons", **{**settings, **changes})


VARIANTS = {
    "vector lstm": config_of(),
    "vector gru": config_of(memory="gru", vectorization="async"),
    "image lstm": config_of("MiniGrid-Empty-5x5-v0", total_steps=330),
    "image gru": config_of("MiniGrid-DoorKey-5x5-v0", memory="gru", total_steps=330),
    "bandit lstm": commons("bandit"),
    "bandit gru": commons("bandit", memory="gru", policies="independent"),
    "grid lstm": commons("grid", policies="independent"),
    "grid gru": commons("grid", memory="gru"),
}


def timeless(numbers):
    return {name: value for name, value in numbers.items() if not name.startswith("time/")}


def what_is_left(run_dir):
    """Everything that a run leaves behind, but for the time it took; NaN as text, which is equal to itself."""
    left = {}
    for path in (run_dir / "checkpoints").iterdir():
        tensors, metadata = read_tensors(path)
        if "run" in metadata:
            metadata["run"]["metrics"] = timeless(metadata["run"]["metrics"])
            del metadata["run"]["seconds"]
        left |= {(path.name, name): (t.dtype, t.shape, t.numpy().tobytes()) for name, t in tensors.items()}
        left[path.name] = json.dumps(metadata, sort_keys=True)
    for path in run_dir.glob("*.csv"):
        with path.open(newline="") as file:
            left[path.name] = [timeless(row) for row in csv.DictReader(file)]
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
    "step": (Session, "step"),
    "learn": (Session, "learn"),
    "evaluate": (trainer, "evaluate"),
    "best": (trainer, "save_best"),
    "checkpoint": (Session, "save"),
    "json": (trainer, "write_json"),
    "fsync": (os, "fsync"),
    "replace": (os, "replace"),
    "unlink": (checkpoint.Path, "unlink"),
    "append": (metrics, "append_whole"),
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
    """One life of a run, in a process of its own: it begins, or goes on where the life before was ended.

    Args:
        kill: see `count_moments`; seconds as a float: whatever it does then.

    Returns:
        How many moments it had, or None where it was killed.
    """
    log, counted = run_dir.with_suffix(".log"), run_dir.with_suffix(".moments")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer Pythons warn of forking beside threads; none of ours computes
        child = os.fork()
    if child == 0:
        status = 1
        try:
            with log.open("w") as file, redirect_stdout(file), redirect_stderr(file):
                try:
                    counts = count_moments(kill)
                    if (run_dir / "config.json").exists():
                        resume(run_dir, show_progress=False)
                    else:
                        train(config.model_copy(update={"run_dir": str(run_dir)}), show_progress=False)
                    counted.write_text(str(counts["all"]))
                    status = 0
                except BaseException:
                    traceback.print_exc(file=file)
        finally:
            os._exit(status)
    if isinstance(kill, float):
        time.sleep(kill)
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return None
    assert status == 0, log.read_text()
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
    places = ["after step 40", "before replace 5", "torn append 4"]
    kill_and_compare(config_of(), tmp_path, places=places)


@forks
@pytest.mark.slow
@pytest.mark.usefixtures("imported")
@pytest.mark.parametrize(
    ("variant", "places"),
    [
        ("vector lstm", ["before replace 1", "after evaluate 2", "after best 1"]),
        ("vector gru", ["before learn 2", "torn append 6", "after fsync 8"]),
        ("image lstm", ["before step 1", "before fsync 5", "before json 1"]),
        ("image gru", ["after checkpoint 2", "before unlink 1", "after evaluate 3"]),
        ("bandit lstm", ["before checkpoint 1", "after append 5", "after replace 6"]),
        ("bandit gru", ["after learn 3", "before best 2", "before json 1"]),
        ("grid lstm", ["after learn 2", "before fsync 9", "after unlink 1"]),
        ("grid gru", ["torn append 3", "before evaluate 2", "after json 1"]),
    ],
)
def test_many_kills_leave_no_trace(tmp_path, variant, places):
    """40 kills in all: at places where something may be half done, at random moments, and by the clock."""
    kill_and_compare(VARIANTS[variant], tmp_path, places=places, num_random=1, num_timed=1, seed=len(variant))
