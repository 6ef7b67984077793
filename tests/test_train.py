"""`dualhead.train` from Python: environments, parts, writers, hooks and schedules that a user hands over."""

import json
import math
import sys
import warnings
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from processes import run_process
from saved_runs import rows_of

import dualhead
from dualhead import (
    Commons,
    CommonsConfig,
    DualHeadRecurrentPPO,
    NetworkConfig,
    PPOConfig,
    RunError,
    SettingsError,
    StreamStep,
)
from dualhead.cli import main
from dualhead.running.checkpoint import read_config
from dualhead.running.config import planned
from dualhead.worlds.tasks import RecallCue

OWN_PARTS = """
from torch import nn
from dualhead import MemoryCell, RecurrentState

class MyEncoder(nn.Module):
    def __init__(self, observation_space):
        super().__init__()
        self.num_features = 6
        self.layer = nn.Linear(observation_space.shape[0], 6)

    def forward(self, observations):
        return self.layer(observations["observation"]).relu()

class MyCell(MemoryCell):
    def __init__(self, input_size, hidden_size):
        super().__init__(hidden_size, state_shapes={"h": (1, hidden_size)})
        self.cell = nn.RNNCell(input_size, hidden_size)

    def step(self, features, state):
        h = self.cell(features, state.h[0])
        return h, RecurrentState(h=h[None])
"""
OWN_WORLD = """
from pydantic import Field
from dualhead import CommonsConfig, Commons, WorldConfig, register_world

class MyConfig(WorldConfig):
    "A small commons."
    num_agents: int = Field(default=2, description="Agents.")
    payoff: float = Field(default=1.0, description="What A pays.")

def open_mine(settings, *, num_worlds, device):
    return Commons(CommonsConfig(form="bandit", num_agents=settings.num_agents), num_worlds=num_worlds, device=device)

register_world("mine", MyConfig, open_mine)
"""
SMALL = {
    "total_steps": 200,
    "num_envs": 2,
    "eval_episodes": 0,
    "show_progress": False,
    "network": NetworkConfig(hidden_size=8, encoder_sizes=(8,)),
    "ppo": PPOConfig(rollout_length=25, batch_size=25, num_epochs=1, sequence_length=5),
}
STREAMS_SMALL = {name: value for name, value in SMALL.items() if name != "num_envs"}
"""Streams say themselves how many they are."""


def make_cue():
    return RecallCue(delay=3)


def weights(result):
    agents = getattr(result.agent, "learners", [result.agent])
    return torch.cat([torch.nn.utils.parameters_to_vector(one.policy.parameters()) for one in agents]).detach()


def test_an_id_gives_the_run_of_the_command_line(tmp_path):
    result = dualhead.train("CartPole-v1", run_dir=str(tmp_path / "python"), **SMALL)
    assert isinstance(result.agent, DualHeadRecurrentPPO)
    assert result.summary["steps"] == result.agent.num_steps == 200
    options = "--total-steps 200 --num-envs 2 --eval-episodes 0 --hidden-size 8 --encoder-sizes 8 --rollout-length 25"
    options += f" --batch-size 25 --num-epochs 1 --sequence-length 5 --run-dir {tmp_path / 'line'}"
    assert main(["train", "CartPole-v1", *options.split()]) == 0
    python, line = (read_config(tmp_path / name).model_dump(exclude={"run_dir"}) for name in ("python", "line"))
    assert python == line
    saved = dualhead.load_policy(tmp_path / "line")
    assert torch.equal(torch.nn.utils.parameters_to_vector(saved.policy.parameters()), weights(result))


def test_tuned_settings_are_used_and_lie_under_what_is_given():
    tuned = planned("dualhead/CartPoleNoVel-v1", ppo=PPOConfig(gamma=0.9))
    assert (tuned.preset, tuned.ppo.gamma, tuned.ppo.gae_lambda, tuned.ppo.rollout_length) == ("tuned", 0.9, 0.98, 128)
    assert planned("CartPole-v1").preset == "default"
    with pytest.raises(SettingsError, match=r"^ppo\.gama: no such setting"):
        planned("dualhead/CartPoleNoVel-v1", ppo={"gama": 0.9})


def test_a_callable_makes_environments_for_training_and_evaluation(tmp_path):
    run = tmp_path / "run"
    settings = SMALL | {"eval_episodes": 3, "run_dir": str(run)}
    summary = dualhead.train(make_cue, **settings).summary
    assert summary["evaluation"]["mean_length"] == 5  # the cue, three steps, the answer
    said = json.loads((run / "config.json").read_text())
    assert (said["env"], said["env_from"]) == ("make_cue", "callable")
    for call in (lambda: dualhead.resume(run, total_steps=300), lambda: dualhead.evaluate(run, episodes=1)):
        with pytest.raises(RunError, match=r"env=\.\.\."):
            call()
    assert dualhead.evaluate(run, env=make_cue, episodes=4).lengths == [5, 5, 5, 5]
    assert dualhead.resume(run, env=make_cue, total_steps=300, show_progress=False).summary["steps"] == 300
    dualhead.train("CartPole-v1", **SMALL, run_dir=str(tmp_path / "id"))
    with pytest.raises(RunError, match="env: this run began without"):
        dualhead.resume(tmp_path / "id", env=make_cue)


def test_a_vector_environment_is_trained_in_and_stays_open(tmp_path):
    settings = {name: value for name, value in STREAMS_SMALL.items() if name != "eval_episodes"}
    envs = SyncVectorEnv([make_cue] * 2, autoreset_mode=AutoresetMode.SAME_STEP)
    result = dualhead.train(envs, **settings, run_dir=str(tmp_path / "run"))
    same = dualhead.train(make_cue, **SMALL, run_dir=str(tmp_path / "same"))
    torch.testing.assert_close(weights(result), weights(same), rtol=0, atol=0)
    envs.reset()  # a closed one would raise
    assert "evaluation" not in result.summary
    with pytest.raises(RunError, match="pass eval_env="):
        dualhead.train(envs, **settings, eval_episodes=2, run_dir=str(tmp_path / "other"))
    evaluation = {"eval_env": make_cue, "eval_episodes": 2, "run_dir": str(tmp_path / "evaluated")}
    assert dualhead.train(envs, **settings, **evaluation).summary["evaluation"]["episodes"] == 2
    with pytest.raises(TypeError, match="num_envs: the environment that was given decides"):
        dualhead.train(envs, **settings, num_envs=2)
    with pytest.raises(ValueError, match="SAME_STEP"):
        dualhead.train(SyncVectorEnv([make_cue] * 2), **settings)


def test_streams_bring_their_agents_and_events(tmp_path):
    """The same commons by name and as an object."""
    rules = CommonsConfig(form="bandit", num_agents=3)
    ppo = PPOConfig(rollout_length=10, batch_size=20, num_epochs=1, sequence_length=5)
    settings = {**STREAMS_SMALL, "ppo": ppo, "total_steps": 120, "policies": "independent", "enforce_norms": True}
    by_name = {"world": rules, "preset": "default", "num_envs": 2}
    named = dualhead.train("commons", **by_name, **settings, run_dir=str(tmp_path / "named"))
    given = dualhead.train(Commons(rules, num_worlds=2), **settings, run_dir=str(tmp_path / "given"))
    config = read_config(tmp_path / "given")
    assert (config.env, config.env_from, config.num_envs, config.num_streams) == ("Commons", "streams", 2, 6)
    assert config.world.resources == rules.resources
    torch.testing.assert_close(weights(given), weights(named), rtol=0, atol=0)
    again = {"env": Commons(rules, num_worlds=2), "total_steps": 180, "show_progress": False}
    assert dualhead.resume(tmp_path / "given", **again).summary["steps"] == 180


@pytest.mark.parametrize("env", [None, 3, gym.make("CartPole-v1")])
def test_what_is_no_environment_is_refused(env):
    with pytest.raises(TypeError, match="env: expected an environment id, a callable"):
        dualhead.train(env, **SMALL)
    with pytest.raises(TypeError, match="expected a callable that makes one Gymnasium environment"):
        dualhead.train(lambda: env and 3, **SMALL)


class Judged(gym.Env):
    """Episodes of three steps: the last step's info has numbers, a word, an array, and what a wrapper adds."""

    observation_space, action_space = gym.spaces.Box(-1, 1, (2,)), gym.spaces.Discrete(2)

    def __init__(self):
        self.num_episodes = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.num_episodes, self.turn = self.num_episodes + 1, 0
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.turn += 1
        info = {"success": False, "score": -1.0}
        if self.turn == 3:
            info = {"success": self.num_episodes % 2 == 1, "score": 10.0 * self.num_episodes, "text": "x"}
            info |= {"array": np.ones(3), "episode": {"r": 5.0, "l": 3, "t": 0.1, "lives": 2}}
            if self.num_episodes == 1:
                info["only_first"] = 7
        return np.zeros(2, np.float32), 0.0, self.turn == 3, False, info


@pytest.mark.parametrize("how", ["sync", "async", "given"])
def test_numbers_of_episodes_are_logged(tmp_path, how):
    """Two environments, 16 steps each in two rollouts of 8: two episodes each, then five."""
    settings = SMALL | {"total_steps": 32, "ppo": {"rollout_length": 8, "batch_size": 16, "num_epochs": 1}}
    env = Judged
    if how == "given":
        del settings["num_envs"]
        # Inside a wrapper the environments are stepped by Gymnasium itself.
        env = gym.vector.VectorWrapper(SyncVectorEnv([Judged] * 2, autoreset_mode=AutoresetMode.SAME_STEP))
    else:
        settings["vectorization"] = how
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Judged|VectorWrapper")  # cannot be resumed exactly
        dualhead.train(env, **settings, run_dir=str(tmp_path / "run"))
    first, second = rows_of(tmp_path / "run")
    assert [float(first[f"episode/{name}"]) for name in ("success", "score", "lives")] == [0.5, 15.0, 2.0]
    assert [float(second[f"episode/{name}"]) for name in ("success", "score", "only_first")] == [0.6, 30.0, 7.0]
    logged = {name for name in first if name.startswith("episode/")}
    ours = {"episode/mean_return", "episode/mean_length", "episode/count"}
    assert logged == ours | {f"episode/{name}" for name in ("success", "score", "lives", "only_first")}


def test_a_world_that_lacks_something_is_told_what():
    world = SimpleNamespace(num_streams=2, observation_space=None, action_space=None, reset=None, step=None)
    with pytest.raises(TypeError, match="SimpleNamespace lacks resumable, statistics, close of"):
        dualhead.train(world, **STREAMS_SMALL)


class Notes:
    """A writer that remembers."""

    def __init__(self):
        self.written, self.num_closed = [], 0

    def write(self, num_steps, metrics):
        self.written.append((num_steps, dict(metrics)))

    def close(self):
        self.num_closed += 1


def test_writers_and_a_hook_that_stops_the_run(tmp_path):
    notes, run = Notes(), tmp_path / "run"

    def on_update(session, metrics):
        metrics["mine/answer"] = 42.0
        session.learning_rate = 1e-4
        return session.learner.num_steps >= 100

    settings = SMALL | {"eval_episodes": 1, "run_dir": str(run)}
    summary = dualhead.train("CartPole-v1", **settings, writers=[notes], on_update=on_update).summary
    assert (summary["steps"], summary["stopped_early"], summary["evaluation"]["episodes"]) == (100, True, 1)
    assert [steps for steps, _ in notes.written] == [50, 100]
    assert [float(row["mine/answer"]) for row in rows_of(run)] == [42.0, 42.0]
    assert [metrics["update/learning_rate"] for _, metrics in notes.written] == [PPOConfig().learning_rate, 1e-4]
    assert notes.num_closed == 1
    # What the hook had set holds on without it.
    assert dualhead.resume(run, show_progress=False).summary["metrics"]["update/learning_rate"] == 1e-4
    for wrong in (Notes, print, "metrics.csv"):
        with pytest.raises(TypeError, match=r"expected a writer.*write\(num_steps, metrics\) and close\(\)"):
            dualhead.train("CartPole-v1", **SMALL, writers=[notes, wrong])
    with pytest.raises(ZeroDivisionError):
        dualhead.train("CartPole-v1", **SMALL, run_dir=f"{run}2", writers=[notes], on_update=lambda *_: 1 / 0)
    assert notes.num_closed == 2


def test_a_schedule_sets_the_learning_rate(tmp_path):
    """Four updates of 50 of 200 steps: progress before each is 0, 1/4, 1/2, 3/4."""
    run = tmp_path / "run"

    def schedule(progress):
        return 1e-3 * (1 - progress) ** 2

    refused = r"learning_rate: expected a schedule.*got 0\.001.*ppo="
    with pytest.raises(TypeError, match=refused):
        dualhead.train("CartPole-v1", **SMALL, run_dir=str(run), learning_rate=1e-3)
    assert not run.exists()
    dualhead.train("CartPole-v1", **SMALL, run_dir=str(run), learning_rate=schedule)
    rates = [float(row["update/learning_rate"]) for row in rows_of(run)]
    assert rates == pytest.approx([1e-3, 5.625e-4, 2.5e-4, 6.25e-5])
    assert json.loads((run / "config.json").read_text())["learning_rate_from"] == "callable"
    with pytest.raises(RunError, match=r"learning_rate=\.\.\."):
        dualhead.resume(run, total_steps=250)
    with pytest.raises(TypeError, match=refused):
        dualhead.resume(run, total_steps=250, learning_rate=1e-3)
    dualhead.resume(run, total_steps=250, learning_rate=schedule, show_progress=False)
    assert float(rows_of(run)[-1]["update/learning_rate"]) == pytest.approx(1e-3 * 0.2**2)


def test_own_parts_by_name_and_as_objects(tmp_path, capsys, monkeypatch):
    """A file names them and nothing imports them unasked; with them a run goes on, is played, and is exported."""
    (tmp_path / "mine.py").write_text(OWN_PARTS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    parts = ["--encoder", "mine:MyEncoder", "--memory", "mine:MyCell"]
    options = "--total-steps 200 --num-envs 2 --rollout-length 25 --batch-size 25 --num-epochs 1 --eval-episodes 1"
    assert main(["train", "CartPole-v1", *options.split(), *parts, "--run-dir", "run"]) == 0
    said = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (said["encoder"], said["memory"]) == ("mine:MyEncoder", "mine:MyCell")
    monkeypatch.delitem(sys.modules, "mine")
    capsys.readouterr()
    for command in (["eval", "run"], ["export", "run"], ["resume", "run", "--total-steps", "250"]):
        assert main(command) == 1
        assert "--encoder mine:MyEncoder" in capsys.readouterr().err
    assert "mine" not in sys.modules
    assert main(["eval", "run", "--episodes", "1", *parts]) == 0
    assert main(["resume", "run", "--total-steps", "250", *parts]) == 0
    mine = sys.modules["mine"]
    objects = {"encoder": mine.MyEncoder, "memory": mine.MyCell}
    again = dualhead.train("CartPole-v1", **SMALL, **objects, run_dir=str(tmp_path / "again"))
    assert read_config(tmp_path / "again").encoder == "mine:MyEncoder"
    player = dualhead.load_policy(tmp_path / "again", **objects)
    assert torch.equal(torch.nn.utils.parameters_to_vector(player.policy.parameters()), weights(again))
    for wrong, message in (("mine", "MODULE:NAME"), ("nowhere:X", "cannot import 'nowhere'"), ("mine:X", "has no X")):
        assert main(["train", "CartPole-v1", "--encoder", wrong]) == 1
        assert message in capsys.readouterr().err


def test_an_imported_module_brings_a_world_and_its_options(tmp_path):
    (tmp_path / "my_world.py").write_text(OWN_WORLD)
    command = [sys.executable, "-m", "dualhead", "train", "mine", "--import", "my_world"]
    said = run_process([*command, "--help"], cwd=tmp_path).stdout
    assert "--world.payoff FLOAT" in said
    assert "--world.punishment" not in said
    options = "--world.payoff 3 --total-steps 80 --num-envs 2 --rollout-length 20 --batch-size 20 --eval-episodes 0"
    assert run_process([*command, *options.split(), "--run-dir", "run"], cwd=tmp_path).returncode == 0
    world = json.loads((tmp_path / "run" / "config.json").read_text())["world"]
    assert world == {"num_agents": 2, "resources": [], "payoff": 3.0}


class Points:
    """Own streams: two of them, whose episodes are cut off after four steps."""

    num_streams, resumable = 2, "it keeps count"
    observation_space, action_space = gym.spaces.Box(-1, 1, (2,)), gym.spaces.Discrete(2)

    def __init__(self, **given):
        self.time, self.given = 0, {"final_observations": np.zeros((2, 2), np.float32)} | given

    def reset(self, *, seed=None):
        return np.zeros((2, 2), np.float32)

    def step(self, actions):
        self.time += 1
        ended = np.full(2, self.time % 4 == 0)
        return StreamStep(self.reset(), np.ones(2), np.zeros(2, bool), ended, **self.given)

    def statistics(self):
        return {"points/numpy": np.float32(0.5), "points/tensor": torch.tensor(1.5), "points/count": np.int64(3)}

    def close(self): ...


@pytest.mark.filterwarnings("ignore:Points")  # it cannot be resumed exactly
def test_metrics_of_every_number_type_are_saved(tmp_path):
    def on_update(session, metrics):
        metrics |= {"mine/array": np.array(0.25), "mine/flag": np.bool_(True), "mine/tensor": torch.tensor([7])}
        session.learning_rate = np.float32(0.125)

    run = tmp_path / "run"
    dualhead.train(Points(), **STREAMS_SMALL, run_dir=str(run), on_update=on_update)
    expected = {"points/numpy": 0.5, "points/tensor": 1.5, "points/count": 3.0, "mine/array": 0.25, "mine/flag": 1.0}
    expected |= {"mine/tensor": 7.0, "update/learning_rate": 0.125}
    assert {name: float(rows_of(run)[-1][name]) for name in expected} == expected
    saved = json.loads((run / "summary.json").read_text())["metrics"]
    assert {name: saved[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("name", "value"), [("mine/word", "high"), ("mine/array", np.ones(2)), ("mine/none", None), ("steps", 1.0)]
)
def test_what_is_no_metric_is_refused_by_name_at_the_first_update(tmp_path, name, value):
    notes = Notes()

    def on_update(session, metrics):
        metrics[name] = value

    with pytest.raises(RunError, match=f"'{name}'"):
        dualhead.train("CartPole-v1", **SMALL, run_dir=str(tmp_path), writers=[notes], on_update=on_update)
    assert (notes.written, notes.num_closed) == ([], 1)


@pytest.mark.parametrize("rate", [-1, math.nan, math.inf, "1e-3", np.float32(-1), torch.ones(2)])
def test_an_impossible_learning_rate_is_refused(tmp_path, rate):
    def on_update(session, metrics):
        session.learning_rate = rate

    for number, given in enumerate(({"on_update": on_update}, {"learning_rate": lambda progress: rate})):
        with pytest.raises(RunError, match=r"learning_rate: expected a (finite )?number"):
            dualhead.train("CartPole-v1", **SMALL, run_dir=str(tmp_path / str(number)), **given)


@pytest.mark.parametrize(
    ("eval_env", "message"),
    [
        (gym.make("CartPole-v1"), "expected an environment id, a callable"),
        (3, "expected an environment id, a callable"),
        (SyncVectorEnv([make_cue] * 2), ".*SAME_STEP"),
        (lambda: 3, "expected a callable that makes one Gymnasium environment"),
        ("Nothing-v0", "unknown environment 'Nothing-v0'"),
        ("CartPole-v1", "the training has the spaces"),
    ],
)
def test_a_wrong_evaluation_environment_is_refused_at_the_start(tmp_path, eval_env, message):
    run = tmp_path / "run"
    with pytest.raises(RunError, match=f"^eval_env: {message}"):
        dualhead.train(make_cue, **SMALL | {"eval_episodes": 1}, run_dir=str(run), eval_env=eval_env)
    assert not run.exists()
    dualhead.train(make_cue, **SMALL, run_dir=str(run))
    before = (run / "config.json").read_bytes()
    with pytest.raises(RunError, match=f"^eval_env: {message}"):
        dualhead.resume(run, env=make_cue, total_steps=300, eval_env=eval_env)
    assert (run / "config.json").read_bytes() == before


@pytest.mark.filterwarnings("ignore:Points")
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"final_observations": None}, r"6 steps \(3 of each stream\): streams \[0, 1\] were truncated"),
        ({"numbers": {"score": [1.0]}}, r"8 steps \(4 of each stream\): 'score'"),
    ],
)
def test_a_step_of_own_streams_that_lacks_something_names_environment_and_step(tmp_path, given, message):
    with pytest.raises(RunError, match=rf"^Points after {message}"):
        dualhead.train(Points(**given), **STREAMS_SMALL, run_dir=str(tmp_path))
