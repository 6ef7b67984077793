"""The command line: settings from files, several seeds, names that are nearly right, a window."""

import json
import math
import os
import pickle
import re
import signal
import sys
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from processes import COMMAND, started, wait_until
from saved_runs import rows_of, save_run

import dualhead
from dualhead.cli import main
from dualhead.config import flat
from dualhead.errors import RunError, SettingsError, UnavailableEnvironment, UnknownEnvironment
from dualhead.running import parts, trainer
from dualhead.running.checkpoint import checkpoints, read_config, read_newest
from dualhead.running.config import RunConfig
from dualhead.running.config_file import read_settings
from dualhead.studies import seeds
from dualhead.studies.processes import OUTPUT
from dualhead.worlds.streams import make_streams

TINY = ["--total-steps", "64", "--num-envs", "2", "--rollout-length", "8", "--sequence-length", "4"]
TINY += ["--batch-size", "8", "--num-epochs", "1", "--hidden-size", "8", "--encoder-sizes", "8"]
TINY += ["--eval-episodes", "2", "--num-threads", "1"]
TINY_SETTINGS = {
    "total_steps": 64,
    "num_envs": 2,
    "eval_episodes": 2,
    "num_threads": 1,
    "network": {"hidden_size": 8, "encoder_sizes": [8]},
    "ppo": {"rollout_length": 8, "sequence_length": 4, "batch_size": 8, "num_epochs": 1},
}


@pytest.fixture
def planned(monkeypatch):
    """What `dualhead train` would train; nothing is trained."""
    configs = []
    summary = {"stopped_early": True, "steps": 0, "checkpoint": "", "run_dir": ""}
    monkeypatch.setattr(dualhead, "train", dualhead.train)  # loaded by name at its first use: not the one below
    monkeypatch.setattr(trainer, "train", lambda config: configs.append(config) or SimpleNamespace(summary=summary))

    def plan(*arguments):
        assert main(["train", *map(str, arguments)]) == 130
        return configs.pop()

    return plan


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory, from which modules can be imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    before, named = set(sys.modules), set(parts.named_modules)
    yield tmp_path
    parts.named_modules.intersection_update(named)
    for name in set(sys.modules) - before:
        if name.startswith("mine"):
            del sys.modules[name]


def weights(run):
    return {name: tensor for name, tensor in read_newest(run)[1].items() if not name.startswith("run/")}


def write_config(path, **changes):
    path.write_text(json.dumps({"env": "CartPole-v1", **TINY_SETTINGS, **changes}))
    return path


def test_a_run_is_repeated_from_its_own_file_to_the_bit(here, capsys):
    """In a directory of its own, by the command line and in Python."""
    assert main(["train", "CartPole-v1", *TINY, "--seed", "3", "--gamma", "0.9", "--run-dir", "first"]) == 0
    assert main(["train", "--config", "first/config.json"]) == 0
    assert "results: runs/CartPole-v1/lstm-seed3" in capsys.readouterr().out
    again = dualhead.train(config="first/config.json", show_progress=False)
    assert again.summary["run_dir"] == os.path.join("runs", "CartPole-v1", "lstm-seed3-2")
    first = weights("first")
    for run in ("runs/CartPole-v1/lstm-seed3", again.summary["run_dir"]):
        assert read_config(run) == read_config("first").model_copy(update={"run_dir": None})
        assert all(torch.equal(tensor, first[name]) for name, tensor in weights(run).items())
    other = dualhead.train(config="first/config.json", seed=4, show_progress=False).summary["run_dir"]
    assert not torch.equal(weights(other)["policy/critic.weight"], first["policy/critic.weight"])


FILES = {
    "mine.toml": """
env = "CartPole-v1"
run_dir = "there"
total_steps = 1e4
[network]
memory = "gru"
[ppo]
learning_rate = 3e-4
gamma = 0.9
""",
    "mine.yaml": """
env: CartPole-v1
run_dir: there
total_steps: 1e4
network: {memory: gru}
ppo:
  learning_rate: 3e-4
  gamma: 0.9
""",
    "mine.json": """{"env": "CartPole-v1", "run_dir": "there", "total_steps": 10000, "network": {"memory": "gru"},
"ppo": {"learning_rate": 3e-4, "gamma": 0.9}}""",
}


@pytest.mark.parametrize("name", FILES)
def test_what_is_given_lies_over_the_file_and_the_file_over_the_defaults(here, planned, name):
    if name.endswith(".yaml"):
        pytest.importorskip("yaml", reason="PyYAML is an extra")
    (here / name).write_text(FILES[name])
    config = flat(planned("--config", name).model_dump())
    expected = {"env": "CartPole-v1", "total_steps": 10_000, "network.memory": "gru", "network.hidden_size": 128}
    expected |= {"ppo.learning_rate": 3e-4, "ppo.gamma": 0.9, "run_dir": None if name.endswith(".json") else "there"}
    assert {key: config[key] for key in expected} == expected
    config = flat(planned("--gamma", "0.5", f"--config={name}", "--memory", "lru", "Acrobot-v1").model_dump())
    assert config == config | {"env": "Acrobot-v1", "ppo.gamma": 0.5, "network.memory": "lru", "total_steps": 10_000}


def test_another_environment_leaves_settings_of_the_first_behind(here, planned):
    """Its world's rules, its arguments, and that the settings were tuned for it."""
    path = write_config(here / "c.json", env="commons", preset="tuned", world={"num_agents": 3}, env_args={"size": 3})
    config = planned("--config", path, "CartPole-v1", "--batch-size", "4")
    assert (config.env, config.preset, config.world.num_agents) == ("CartPole-v1", "default", 1)
    assert (config.env_args, config.ppo.batch_size, config.ppo.num_epochs) == ({}, 4, 1)
    path = write_config(here / "c.json", env="commons", world={"num_agents": 3}, total_steps=3000)
    assert planned("--config", path, "--world.stay").world.num_agents == 3


def test_a_core_of_ours_takes_the_place_of_the_file_s_own(here, planned):
    assert planned("--config", write_config(here / "c.json", memory="mine:Cell"), "--memory", "gru").memory is None


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({"env_from": "callable"}, [], r"'CartPole-v1' in c.json was handed over in Python, as callable: name another"),
        ({"env_from": "streams"}, [], r"handed over in Python, as streams"),
        ({"learning_rate_from": "callable"}, [], r"was a schedule that Python handed over: give --learning-rate"),
        ({"preset": "spec"}, ["--preset", "default"], r"preset: c.json holds the settings of 'spec'"),
        ({"hidden_size": 3}, [], r"hidden_size: no such setting, got 3; did you mean network\.hidden_size\?"),
        ({"ppo": {"gama": 0.9}}, [], r"ppo\.gama: no such setting, got 0\.9; did you mean gamma\?"),
        ({"ppo": 3}, [], r"ppo: .*got 3"),
    ],
)
def test_what_a_file_cannot_give_is_said(here, capsys, changes, arguments, message):
    write_config(here / "c.json", **changes)
    assert main(["train", "--config", "c.json", *arguments]) == 1
    assert re.search(message, capsys.readouterr().err)
    assert not (here / "runs").exists()


def test_what_python_handed_over_can_be_given_again(here, planned):
    path = write_config(here / "c.json", env="Door", env_from="callable", learning_rate_from="callable")
    config = planned("--config", path, "CartPole-v1", "--learning-rate", "0.5")
    assert (config.env, config.env_from, config.learning_rate_from) == ("CartPole-v1", "id", "config")
    result = dualhead.train(
        lambda: gym.make("CartPole-v1"), config=path, learning_rate=lambda progress: 0.1, show_progress=False
    )
    assert read_config(result.summary["run_dir"]).env_from == "callable"
    with pytest.raises(RunError, match="was a schedule"):
        dualhead.train("CartPole-v1", config=path)
    with pytest.raises(TypeError, match=r"takes no further settings, got \['config'\]"):
        dualhead.train(RunConfig(env="CartPole-v1"), config=path)
    with pytest.raises(TypeError, match="env: expected an environment id"):
        dualhead.train()


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("none.json", None, "cannot read the settings in none.json: No such file"),
        ("c.txt", "", r"config c.txt: expected a file that ends in \.json, \.yaml, \.yml, \.toml"),
        ("c.json", "{", "cannot read the settings in c.json"),
        ("c.json", "[" * 100_000, "cannot read the settings in c.json"),
        ("c.toml", "a", "cannot read the settings in c.toml"),
        ("c.json", "[1]", r"c.json: expected settings by name, such as env and total_steps, got \[1\]"),
        ("c.json", '{"seed": 3}', "c.json names no environment"),
    ],
)
def test_a_file_that_holds_no_settings(here, capsys, name, contents, message):
    if contents is not None:
        (here / name).write_text(contents)
    assert main(["train", "--config", name]) == 1
    assert re.search(message, capsys.readouterr().err)


def test_yaml_says_what_it_needs(here, monkeypatch):
    (here / "c.yml").write_text("env: CartPole-v1")
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(RunError, match=r"need the package PyYAML: pip install -e '\.\[yaml\]'"):
        read_settings("c.yml")


@pytest.mark.parametrize("contents", ["a: [", "!!python/object/apply:os.mkdir [made]", "1: 2", ""])
def test_yaml_makes_no_objects(here, contents):
    pytest.importorskip("yaml", reason="PyYAML is an extra")
    (here / "c.yml").write_text(contents)
    with pytest.raises(RunError, match=r"c\.yml"):
        read_settings("c.yml")
    assert not (here / "made").exists()


OWN = """
from pathlib import Path
import gymnasium as gym, torch
Path("imported").touch()
class Net(torch.nn.Module):
    num_features = 4
    def __init__(self, space):
        super().__init__()
        self.layer = torch.nn.Linear(4, 4)
    def forward(self, leaves):
        return self.layer(leaves[""] if isinstance(leaves, dict) else leaves)
def make():
    return gym.make("CartPole-v1")
"""


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"encoder": "mine:Net"}, ["--encoder", "mine:Net"]),
        ({"memory": "mine:Net"}, ["--memory", "mine:Net"]),
        ({"env": "mine:make"}, ["mine:make"]),
        ({"env": "mine:make"}, ["--import", "mine"]),
        ({"wrappers": ["mine:Net"]}, ["--wrappers", "mine:Net"]),
        ({"env_args": {"path": "/etc"}}, ["--env-args", "path=/etc"]),
    ],
)
def test_a_file_imports_and_calls_nothing_that_its_user_has_not_named(here, planned, capsys, changes, named):
    (here / "mine.py").write_text(OWN)
    path = write_config(here / "c.json", **changes)
    assert main(["train", "--config", str(path)]) == 1
    assert "--trust" in capsys.readouterr().err
    with pytest.raises(RunError, match=r"dualhead\.trust\("):
        dualhead.train(config=path)
    assert not (here / "imported").exists()
    for arguments in (named, ["--trust"]):
        config = planned("--config", path, *arguments)
        assert all(getattr(config, name) in (value, tuple(value)) for name, value in changes.items())
    path = write_config(
        here / "other.json", **changes
    )  # trust is of one file, but the user has named a module for good
    assert main(["train", "--config", str(path)]) == (130 if "env" in changes else 1)


def test_help_shows_the_settings_of_a_file(here, capsys):
    write_config(here / "c.json", env="commons", world={"num_agents": 3}, total_steps=3000)
    with pytest.raises(SystemExit):
        main(["train", "--config", "c.json", "--help"])
    said = capsys.readouterr()
    assert said.err == ""
    assert re.search(r"--hidden-size INT.*\(default: 8\)", said.out, flags=re.S)
    assert re.search(r"--world\.num-agents INT.*\(default: 3\)", said.out, flags=re.S)


@pytest.mark.parametrize(
    ("env", "near"),
    [
        ("CartPol-v1", "CartPole-v1"),
        ("cartpole-v1", "CartPole-v1"),
        ("comons", "commons"),
        ("dualhead/CartPoleNoVl-v1", "dualhead/CartPoleNoVel-v1"),
    ],
)
def test_an_unknown_environment_is_answered_with_the_nearest_one(here, capsys, env, near):
    assert main(["train", env]) == 1
    assert f"unknown environment {env!r}" in (said := capsys.readouterr().err)
    assert said.endswith(f"; did you mean {near}?\n")


def test_an_unknown_environment_can_be_told_by_another_process():
    error = UnknownEnvironment("CartPol-v1", ["CartPole-v1"])
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_names_that_are_nothing_like_any_get_no_suggestion(here):
    with pytest.raises(UnavailableEnvironment, match=r"unknown environment 'zzz'.*registers more$"):
        make_streams("zzz", 1)


def test_unknown_options_and_arguments_are_answered_with_the_nearest_name(capsys):
    with pytest.raises(SystemExit):
        main(["train", "CartPole-v1", "--hiden-size", "3"])
    assert re.search(r"Unrecognized options: --hiden-size, 3.*--hidden-size INT", capsys.readouterr().err, flags=re.S)
    for wrong, near in (
        ("num_env", "num_envs"),
        ("writer", "writers"),
        ("on_updat", "on_update"),
        ("gama", "ppo.gamma"),
    ):
        with pytest.raises(SettingsError, match=rf"{wrong}: no such setting; did you mean {near}\?"):
            dualhead.train("CartPole-v1", **{wrong: 3})


def test_several_seeds_train_side_by_side(here, capsys):
    """The runs of `--seed`, where that would put them; finished ones are left alone."""
    assert main(["train", "--seeds", "1", "0", "CartPole-v1", *TINY]) == 0
    said = capsys.readouterr().out
    runs = {seed: os.path.join("runs", "CartPole-v1", f"lstm-seed{seed}") for seed in (0, 1)}
    alone = dualhead.train("CartPole-v1", seed=1, run_dir="alone", show_progress=False, **TINY_SETTINGS)
    assert all(torch.equal(tensor, weights("alone")[name]) for name, tensor in weights(runs[1]).items())
    for seed, run in runs.items():
        assert f"seed {seed}: {run}\n" in said
        assert re.search(rf"\] seed {seed} done in \d+ s", said)
    assert re.search(rf"seed 1 +{alone.summary['evaluation']['mean_return']:.6g}", said)
    before = {run: (here / run / "summary.json").stat().st_mtime_ns for run in runs.values()}
    assert main(["train", "CartPole-v1", *TINY, "--seeds", "0", "1", "--gamma", "0.99"]) == 0
    assert "2 of 2 runs are finished already" in capsys.readouterr().out
    assert {run: (here / run / "summary.json").stat().st_mtime_ns for run in runs.values()} == before
    assert main(["train", "CartPole-v1", *TINY, "--seeds", "0", "--gamma", "0.5"]) == 0  # another run
    assert read_config(f"{runs[0]}-2").ppo.gamma == 0.5


def test_the_table_of_several_seeds(here, monkeypatch, capsys):
    """Returns 1, 2, 3, 4: s = 1.290994, t(3) = 3.182446, so 2.5 ± 3.182446 · 1.290994 / 2."""
    monkeypatch.setattr(seeds, "run_missing", lambda planned, *, modules: iter(()))
    for seed in range(5):
        run = here / "runs" / "CartPole-v1" / f"lstm-seed{seed}"
        run.mkdir(parents=True)
        is_stopped = seed == 4
        evaluation = {"mean_return": seed + 1.0}
        (run / "summary.json").write_text(json.dumps({"stopped_early": is_stopped, "evaluation": evaluation}))
    seeds.train_seeds(RunConfig(env="CartPole-v1"), range(5))
    said = capsys.readouterr().out
    half = 3.182446 * 1.290994 / 2
    low, high = map(float, re.search(r"mean of 4 seeds: 2\.5, 95% interval (\S+) to (\S+) ", said).groups())
    assert (low, high) == (pytest.approx(2.5 - half, abs=1e-5), pytest.approx(2.5 + half, abs=1e-5))
    assert re.search(r"seed 3 +4 *\n *seed 4 +–", said)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--seeds", "seeds: expected numbers, such as --seeds 0 1 2, got none"),
        ("--seeds 0 1 --seed 2", "seed: expected --seeds alone, got --seed as well"),
        ("--seeds 0 1 --run-dir x", "run_dir: expected none with several seeds"),
        ("--seeds 0 1 0", "seeds: expected different ones, got 0 1 0"),
        ("--seeds 0 -1", "seed: Input should be greater than or equal to 0, got -1"),
    ],
)
def test_what_does_not_go_with_several_seeds(here, capsys, arguments, message):
    assert main(["train", "CartPole-v1", *TINY, *arguments.split()]) == 1
    assert message in capsys.readouterr().err
    assert not (here / "runs").exists()


def test_a_seed_that_fails_is_named_and_the_others_finish(here, capsys):
    (here / "mine.py").write_text(
        "import gymnasium as gym, torch\n"
        "class Env(gym.Wrapper):\n"
        "    def __init__(self):\n"
        "        super().__init__(gym.make('CartPole-v1'))\n"
        "    def step(self, action):\n"
        "        if torch.initial_seed() == 1: raise OSError('no more')\n"
        "        return super().step(action)\n"
    )
    assert main(["train", "mine:Env", *TINY, "--seeds", "0", "1", "--import", "mine"]) == 1
    said = capsys.readouterr()
    assert re.search(r"error: 1 of 2 runs failed; the same command repeats them\n +seed 1: .*no more", said.err)
    assert re.search(r"seed 0 +\d.*\n *seed 1 +–", said.out)


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs process groups")
@pytest.mark.slow
def test_ctrl_c_saves_all_seeds_and_the_same_command_resumes_them(here):
    command = [*COMMAND, "train", "CartPole-v1", *TINY, "--seeds", "0", "1"]
    runs = [here / "runs" / "CartPole-v1" / f"lstm-seed{seed}" for seed in (0, 1)]

    def num_rows(run):
        return len(rows_of(run)) if (run / "metrics.csv").exists() else 0

    command[command.index("64")] = "1000000"
    with started(command) as process:
        wait_until(lambda: num_rows(runs[0]) > 3, of=process)
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate()
    assert process.returncode == 130
    assert "0 of 2 runs are finished; the same command resumes the rest" in errors
    assert "Traceback" not in errors
    steps = json.loads((runs[0] / "summary.json").read_text())["steps"]
    assert checkpoints(runs[0])[0].name == f"step-{steps:012d}.safetensors"
    with started(command) as process:
        wait_until(lambda: num_rows(runs[0]) > steps // 16 + 2, of=process)
        process.send_signal(signal.SIGINT)
        process.communicate()
    assert f"step-{steps:012d}.safetensors" in (runs[0] / OUTPUT).read_text()
    assert not (runs[0].parent / "lstm-seed0-2").exists()


class Shown(gym.Env):
    """Three steps, each of which it would show in a window."""

    metadata = {"render_modes": ["human"], "render_fps": 1000}  # noqa: RUF012
    observation_space, action_space = spaces.Box(-1, 1, (2,), np.float32), spaces.Discrete(2)
    shown: list = []  # noqa: RUF012

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.t += 1
        if self.render_mode == "human":
            self.shown.append(self.t)
        return np.zeros(2, np.float32), 1.0, self.t == 3, False, {}


gym.register("test/Shown-v0", Shown)


def test_eval_shows_its_episodes_in_a_window(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    run = save_run(tmp_path / "run", "test/Shown-v0")
    Shown.shown.clear()
    assert main(["eval", str(run), "--episodes", "2", "--render", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["lengths"] == [3, 3]
    assert Shown.shown == [1, 2, 3, 1, 2, 3]
    assert dualhead.evaluate(run, episodes=2).lengths == [3, 3]
    assert len(Shown.shown) == 6


def test_pictures_are_shown_where_an_environment_has_no_window_of_its_own(tmp_path, monkeypatch):
    pygame = pytest.importorskip("pygame")
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    run, flips, flip = save_run(tmp_path / "run"), [], pygame.display.flip
    monkeypatch.setattr(pygame.display, "flip", lambda: flips.append(flip()))
    monkeypatch.setattr(pygame.time, "Clock", lambda: SimpleNamespace(tick=lambda fps: None))
    assert dualhead.evaluate(run, episodes=1, render=True).lengths == [22]
    assert len(flips) >= 22


def test_what_cannot_be_shown_is_said(tmp_path, capsys, monkeypatch):
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER"):
        monkeypatch.delenv(name, raising=False)
    run = save_run(tmp_path / "run")
    if sys.platform == "linux":
        assert main(["eval", str(run), "--render"]) == 1
        assert re.search("needs a screen.*--video FILE", capsys.readouterr().err)
    monkeypatch.setenv("DISPLAY", ":0")
    run = save_run(tmp_path / "plain", "dualhead/RecallCue-v0")
    monkeypatch.setitem(gym.spec("dualhead/RecallCue-v0").kwargs, "render_mode", None)
    monkeypatch.setattr("dualhead.worlds.tasks.RecallCue.metadata", {"render_modes": ["ansi"]})
    with pytest.raises(RunError, match=r"its render modes are \['ansi'\], expected 'human' or 'rgb_array' among them"):
        dualhead.evaluate(run, render=True)
    assert math.isfinite(dualhead.evaluate(run, episodes=1).returns[0])
