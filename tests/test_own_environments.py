"""Environments of one's own: files in the working directory, arguments, wrappers, dropped observations, and trust."""

import importlib.util
import json
import os
import signal
import sys
from contextlib import closing
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from processes import run_process

import dualhead
from dualhead import RunConfig, RunError, SettingsError, UnavailableEnvironment
from dualhead.cli import _arguments, main
from dualhead.errors import EnvironmentFailed
from dualhead.running import parts, trust
from dualhead.running.checkpoint import new_run_dir, read_config, read_newest
from dualhead.running.environment import maker_of, open_streams
from dualhead.running.video import record_video
from dualhead.worlds.replay import CannotReplay

MODULE = '''
import multiprocessing
import os
from subprocess import run

import gymnasium as gym
import numpy as np
from gymnasium import spaces

import my_helper

NUMBER = 5


class Door(gym.Env):
    """A walk to a door, from a random place."""

    metadata = {"render_modes": ["rgb_array"]}
    action_space = spaces.Discrete(2)

    def __init__(self, size=5, delay=0.5, title="plain", walls=(), render_mode=None):
        if size < my_helper.SMALLEST:
            raise ValueError(f"size must be at least 2, got {size}")
        if title == "fails there" and multiprocessing.parent_process():
            raise LookupError("no such title")
        self.given = [size, delay, title, walls]
        self.size, self.render_mode = size, render_mode
        self.observation_space = spaces.Dict(
            at=spaces.Box(0, size, (1,), np.float32), wind=spaces.Box(-9, 9, (2,), np.float32)
        )

    def _see(self):
        return {"at": np.array([self.at], np.float32), "wind": self.np_random.uniform(-1, 1, 2).astype(np.float32)}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.at, self.t = int(self.np_random.integers(self.size)), 0
        return self._see(), {}

    def step(self, action):
        self.at, self.t = max(0, self.at + 2 * int(action) - 1), self.t + 1
        if self.given[2] == "fails" and action == 1:
            raise LookupError("no such door")
        is_there = self.at >= self.size
        return self._see(), float(is_there), is_there, self.t == 30, {"place": self.at}

    def render(self):
        return np.zeros((8, 8, 3), np.uint8)


def make_door(size=3):
    return Door(size)


def make_number():
    return 5


def tripled(env, factor=3.0):
    return gym.wrappers.TransformReward(env, lambda reward: factor * reward)


def no_wrapper(env):
    return None


gym.register("Door-v0", "my_envs:Door", max_episode_steps=20)
'''
TINY = {
    "total_steps": 64,
    "num_envs": 2,
    "network": {"hidden_size": 8, "encoder_sizes": (8,)},
    "ppo": {"rollout_length": 8, "batch_size": 8, "num_epochs": 1},
    "eval_episodes": 2,
    "num_threads": 1,
}
OPTIONS = ["--total-steps", "64", "--num-envs", "2", "--rollout-length", "8", "--batch-size", "8", "--num-epochs", "1"]
OPTIONS += ["--hidden-size", "8", "--encoder-sizes", "8", "--eval-episodes", "2", "--num-threads", "1"]
SCREEN = ["gymnasium.wrappers:FlattenObservation", "gymnasium.wrappers:FrameStackObservation(stack_size=4)"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, with a module of environments and one that it needs. Nothing of them stays."""
    (tmp_path / "my_envs.py").write_text(MODULE)
    (tmp_path / "my_helper.py").write_text("SMALLEST = 2")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.setattr(parts, "named_modules", set())
    monkeypatch.setattr(trust, "named_modules", parts.named_modules)
    monkeypatch.setattr(trust, "_trusted", set())
    yield tmp_path
    for name in ("my_envs", "my_helper"):
        sys.modules.pop(name, None)
    gym.registry.pop("Door-v0", None)


def config_of(env="my_envs:Door", **changes):
    return RunConfig(env=env, **TINY | changes)


def train_tiny(env="my_envs:Door", **changes):
    return dualhead.train(env, show_progress=False, **TINY | changes).summary["run_dir"]


# A file in the working directory.


def run_command(folder, *words, start="None"):
    """The command as it is installed: unlike `python -m`, Python does not search the working directory for it."""
    script = folder / "bin" / "command.py"
    script.parent.mkdir(exist_ok=True)
    script.write_text(
        "import sys\nfrom dualhead.cli import main\nif __name__ == '__main__':\n"
        f"    __import__('multiprocessing').set_start_method({start})\n    sys.exit(main())"
    )
    done = run_process([sys.executable, str(script), *words], cwd=folder)
    assert done.returncode == 0, done.stderr
    return done


def test_a_class_in_a_file_trains_in_other_processes_is_resumed_and_filmed(folder):
    wrappers = [word for wrapper in SCREEN for word in ("--wrappers", wrapper)]
    processes = ["--vectorization", "async", "--num-workers", "1"]
    own = ["--drop-observations", "wind", "--env-args", "size=9", "my_envs:Door"]  # the last list would swallow it
    run_command(folder, "train", *OPTIONS, *wrappers, *processes, *own)
    run = str(Path("runs") / "my_envs-Door" / "lstm-seed0")
    assert json.loads((folder / run / "summary.json").read_text())["steps"] == 64
    run_command(folder, "resume", run, "--total-steps", "96", "--import", "my_envs.py")
    if importlib.util.find_spec("imageio"):
        run_command(folder, "eval", run, "--episodes", "2", "--video", "play.gif", "--trust")
        assert (folder / "play.gif").exists()


def test_an_id_that_a_file_registers_trains(folder):
    run_command(folder, "train", "my_envs:Door-v0", *OPTIONS)


def test_an_id_that_an_imported_file_registers_trains_in_processes_that_are_not_forked(folder):
    processes = ["--vectorization", "async", "--num-workers", "1"]
    run_command(folder, "train", "Door-v0", "--import", "my_envs.py", *OPTIONS, *processes, start="'spawn'")


def test_a_study_finds_the_file_too(folder):
    settings = json.dumps(TINY["network"]).replace(":", " ="), json.dumps(TINY["ppo"]).replace(":", " =")
    (folder / "study.toml").write_text(
        f"""
        seeds = [0]
        [base]
        env = "my_envs:Door"
        env_args = {{size = 3}}
        total_steps = 64
        num_envs = 2
        eval_episodes = 2
        network = {settings[0]}
        ppo = {settings[1]}
        [conditions.plain]
        """
    )
    run_command(folder, "study", "study.toml", "--jobs", "1")
    assert read_config(folder / "runs" / "study-study" / "plain" / "seed0").env_args == {"size": 3}


def test_the_working_directory_is_searched_only_for_what_the_user_names(folder):
    parts.import_module("json", what="--import")
    with pytest.raises(RunError, match=rf"cannot import 'my_env'.*expected my_env.py in {folder}.*mean my_envs\?"):
        parts.import_module("my_env", what="--import")
    assert str(folder) not in sys.path
    assert parts.import_module("./my_envs.py", what="--import").NUMBER == 5


def test_an_installed_package_comes_before_a_file(folder):
    (folder / "colorsys.py").write_text("1 / 0")
    sys.modules.pop("colorsys", None)
    parts.import_module("colorsys", what="--import")


def test_what_a_module_lacks_is_no_missing_module(folder):
    (folder / "needy.py").write_text("import no_such_package")
    with pytest.raises(RunError, match=r"cannot import 'needy': No module named 'no_such_package'$"):
        parts.import_module("needy", what="--import")


@pytest.mark.parametrize("name", ["..my_envs", "/tmp/my_envs.py", "", "my envs"])
def test_what_is_no_module_is_refused(folder, name):
    with pytest.raises(RunError, match="expected the name of a module"):
        parts.import_module(name, what="--import")


# What an id means.


@pytest.mark.parametrize(
    ("env", "size"), [("my_envs:Door", 5), ("my_envs.py:Door", 5), ("my_envs:make_door", 3), ("my_envs:Door-v0", 5)]
)
def test_a_class_a_function_and_an_id(folder, env, size):
    made = maker_of(config_of(env))()
    assert made.unwrapped.size == size
    assert (made.spec is None) == ("v0" not in env)


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ("my_envs:Dor", r"'my_envs:Dor': expected .* in .*my_envs.py .*got none such.*environments: Door"),
        ("my_envs:NUMBER", "got 5"),
        ("my_envs:make_number", "made 5"),
        ("my_envs:Door-v7", "version `v7`"),
        ("my_envs:Window-v0", "unknown environment 'my_envs:Window-v0'"),
    ],
)
def test_what_is_no_environment_is_said(folder, env, said):
    with pytest.raises(UnavailableEnvironment, match=said):
        open_streams(config_of(env))


# Arguments.


def test_arguments_reach_the_constructor_and_the_runs_settings(folder, capsys):
    words = ["size=4", "delay=1e-1", "title=8x8", "walls=[[1, 2], [3, 4]]"]
    assert main(["train", "my_envs:Door", *OPTIONS, "--env-args", *words]) == 0
    expected = {"size": 4, "delay": 0.1, "title": "8x8", "walls": [[1, 2], [3, 4]]}
    assert read_config("runs/my_envs-Door/lstm-seed0").env_args == expected
    assert list(expected.values()) == maker_of(config_of(env_args=expected))().unwrapped.given
    assert "env_args={'size': 4" in capsys.readouterr().out
    assert main(["train", "FrozenLake-v1", *OPTIONS, "--env-args", "is_slippery=false", "map_name=8x8"]) == 0
    made = maker_of(read_config("runs/FrozenLake-v1/lstm-seed0"))()
    assert made.observation_space.n == 64
    made.reset(seed=0)
    assert [made.step(1)[0] for _ in range(3)] == [8, 16, 24]


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("a=true", True),
        ("a=True", "True"),
        ("a=007", "007"),
        ("a=2026-01-01", "2026-01-01"),
        ("a=inf", "inf"),
        ('a="3"', "3"),
        ("a=b=c", "b=c"),
        ("a=", ""),
        ("a=1\nb = 2", "1\nb = 2"),
        ("a={low = 1}", {"low": 1}),
    ],
)
def test_values_are_toml_or_text(word, value):
    assert _arguments([word]) == {"a": value}


@pytest.mark.parametrize("words", [["size"], ["=3"], ["a b=3"]])
def test_arguments_have_names(folder, words, capsys):
    with pytest.raises(SystemExit):
        main(["train", "my_envs:Door", "--env-args", *words])
    assert "KEY=VALUE" in capsys.readouterr().err


@pytest.mark.parametrize("env", ["my_envs:Door", "my_envs:Door-v0", "Door-v0"])
def test_wrong_arguments_are_told_in_the_constructors_words(folder, env):
    parts.import_module("my_envs", what="--import")
    with pytest.raises(
        UnavailableEnvironment, match=r"'sise'.*its arguments are: size, delay, title, walls, render_mode"
    ):
        open_streams(config_of(env, env_args={"sise": 4}))
    with pytest.raises(
        UnavailableEnvironment, match=f"'{env}' with size=1: ValueError: size must be at least 2, got 1"
    ):
        open_streams(config_of(env, env_args={"size": 1}))


def test_arguments_that_no_file_can_hold_are_refused():
    for value in (float("nan"), np.float32(1), {1, 2}):
        with pytest.raises(SettingsError, match="env_args: expected finite numbers"):
            config_of("CartPole-v1", env_args={"x": value})
    assert config_of("CartPole-v1", env_args={"shape": (3, 4)}).env_args == {"shape": [3, 4]}


def test_a_callable_gets_arguments_and_wrappers_and_another_environment_only_wrappers(folder):
    door = parts.import_module("my_envs", what="--import").Door
    settings = {"env_args": {"size": 4}, "wrappers": SCREEN, "drop_observations": ("wind",)}
    run = train_tiny(door, **settings, eval_env=lambda: door(4))
    assert len(dualhead.evaluate(run, env=door, episodes=2).returns) == 2
    streams = open_streams(read_config(train_tiny(**settings)), lambda: door(6))
    assert streams.envs.envs[0].unwrapped.size == 6
    assert streams.observation_space.shape == (4, 1)


def test_streams_and_worlds_of_ours_have_no_arguments():
    with pytest.raises(SettingsError, match=r"env_args: expected none.*in `world`"):
        config_of("commons", env_args={"size": 3})
    envs = gym.make_vec("Acrobot-v1", 2, vector_kwargs={"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP})
    with pytest.raises(SettingsError, match=r"wrappers: expected none.*made already"):
        dualhead.train(envs, wrappers=SCREEN)


# Wrappers and dropped observations.


def test_wrappers_are_applied_in_order_after_keys_are_dropped(folder):
    scaled = ["my_envs:tripled", "my_envs:tripled(2.0)", "gymnasium.wrappers:ClipReward(min_reward=0, max_reward=5)"]
    limits = ["gymnasium.wrappers:TimeLimit(max_episode_steps=6)", "gymnasium.wrappers:RecordEpisodeStatistics"]
    config = config_of(env_args={"size": 3}, drop_observations=["wind"], wrappers=[*SCREEN, *scaled, *limits])
    plain = maker_of(config_of(env_args={"size": 3}))()
    with closing(open_streams(config)) as streams:
        assert streams.observation_space == spaces.Box(0, 3, (4, 1), np.float32)
        observations = streams.reset(seed=0)
        seeds = (np.random.SeedSequence(0).generate_state(2) >> 1).tolist()
        seen = [plain.reset(seed=seeds[0])[0]["at"]] * 4
        rewards = []
        for t, action in enumerate([0, 0, 1, 1, 0, 0, 1, 1, 1, 1]):
            np.testing.assert_array_equal(observations[0], np.stack(seen[-4:]))
            step = streams.step(np.full(2, action))
            now, reward, terminated, *_ = plain.step(action)
            seen.append(now["at"])
            rewards.append(step.rewards[0])
            assert step.rewards[0] == min(5.0, 6.0 * reward)
            assert (step.terminated[0], step.truncated[0]) == (terminated, t == 5)
            if terminated or t == 5:
                np.testing.assert_array_equal(step.final_observations[0], np.stack(seen[-4:]))
                assert step.numbers["place"][0] == now["at"][0]
                seen = [plain.reset()[0]["at"]] * 4
            observations = step.observations
        assert 5.0 in rewards


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Clip", "expected MODULE:NAME"),
        ("my_envs:tripled(factor=os.getpid())", "expected MODULE:NAME"),
        ("my_envs:tripled(__import__('os').getpid())", "expected MODULE:NAME"),
        ("my_envs:tripled(**{'factor': 3})", "expected MODULE:NAME"),
        ("my_envs:tripled(3)(4)", "expected MODULE:NAME"),
        ("my_envs:tripled({[]: 1})", "expected MODULE:NAME"),
        (f"my_envs:tripled({'-' * 950}1)", "expected MODULE:NAME"),
        (f"my_envs:tripled({'-' * 10**6}1)", "expected MODULE:NAME"),
        ("my_envs:os.getpid", "expected MODULE:NAME"),
        ("my_envs:nothing", "my_envs has no nothing"),
        ("my_envs:NUMBER", "got 5"),
        ("my_envs:no_wrapper", "expected a gymnasium.Env from it, got None"),
        ("my_envs:tripled(facto=2)", r"tripled\(facto=2\)' around .*: TypeError: .*'facto'"),
    ],
)
def test_wrong_wrappers_are_named(folder, text, said):
    with pytest.raises((SettingsError, RunError, UnavailableEnvironment), match=said):
        open_streams(config_of(wrappers=[text]))


def test_wrong_keys_are_told_the_right_ones(folder):
    for env, names in (("my_envs:Door", ["wint"]), ("my_envs:Door", ["at", "wind"]), ("CartPole-v1", ["at"])):
        with pytest.raises(
            UnavailableEnvironment, match=r"drop_observations: expected (some of the keys at, wind|.*Dict)"
        ):
            open_streams(config_of(env, drop_observations=names))


def test_a_run_with_arguments_and_wrappers_goes_on_to_the_same_bits(folder):
    settings = {"env_args": {"size": 4}, "wrappers": ["my_envs:tripled", *SCREEN], "drop_observations": ["wind"]}
    settings |= {"total_steps": 128, "ppo": TINY["ppo"] | {"learning_rate": 1e-2}}
    whole = train_tiny(**settings)
    begun = dualhead.train(
        "my_envs:Door",
        show_progress=False,
        on_update=lambda session, _: session.learner.num_steps == 48,
        **TINY | settings,
    ).summary["run_dir"]
    assert read_newest(begun)[2]["num_steps"] == 48
    dualhead.resume(begun, show_progress=False)
    (_, expected, _), (_, tensors, _) = read_newest(whole), read_newest(begun)
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    assert (
        json.loads(Path(whole, "summary.json").read_text())["evaluation"]
        == json.loads(Path(begun, "summary.json").read_text())["evaluation"]
    )


@pytest.mark.parametrize("num_workers", [1, 2, 4])
def test_shared_processes_give_and_save_what_this_process_does(folder, num_workers):
    config = config_of(num_envs=4, env_args={"size": 3}, wrappers=["gymnasium.wrappers:TimeLimit(max_episode_steps=5)"])
    there = config.model_copy(update={"vectorization": "async", "num_workers": num_workers})
    actions = np.random.default_rng(0).integers(2, size=(40, 4))

    def assert_same(a, b):
        if isinstance(a, dict):
            assert a.keys() == b.keys()
            for key in a:
                assert_same(a[key], b[key])
        elif a is not None:
            np.testing.assert_array_equal(a, b)
            assert np.asarray(a).dtype == np.asarray(b).dtype

    with closing(open_streams(config)) as here, closing(open_streams(there, for_training=True)) as there:
        assert len(there.envs.processes) == num_workers
        assert_same(here.reset(seed=0), there.reset(seed=0))
        for of_step in actions[:20]:
            for a, b in zip(here.step(of_step), there.step(of_step)):
                assert_same(a, b)
        tensors, metadata = here.state()
        assert there.state()[1]["episodes"] == metadata["episodes"]
        ahead = [here.step(of_step).rewards.copy() for of_step in actions[20:]]
        there.reset(seed=1)
        there.restore(tensors, metadata)
        np.testing.assert_array_equal([there.step(of_step).rewards for of_step in actions[20:]], ahead)
        metadata["episodes"][3]["fingerprint"] = "0" * 64
        with pytest.raises(CannotReplay, match="environment 3: its last observation"):
            there.restore(tensors, metadata)


def test_who_failed_in_a_shared_process_is_said(folder):
    settings = {"num_envs": 4, "env_args": {"title": "fails"}, "vectorization": "async", "num_workers": 2}
    with closing(open_streams(config_of(**settings), for_training=True)) as streams:
        streams.reset(seed=0)
        with pytest.raises(EnvironmentFailed, match=r"^environment 3 raised LookupError: no such door \(.*my_envs.py"):
            streams.step(np.array([0, 0, 0, 1]))
    with closing(open_streams(config_of(**settings), for_training=True)) as streams:
        streams.reset(seed=0)
        os.kill(streams.envs.processes[1].pid, signal.SIGKILL)
        with pytest.raises(EnvironmentFailed, match=r"the process of environments 2 to 3 \(killed by SIGKILL\) ended"):
            streams.step(np.zeros(4, int))
    assert not any(process.is_alive() for process in streams.envs.processes)
    with pytest.raises(UnavailableEnvironment, match=r"environments 0 to 1 \(exit status 1\)"):
        open_streams(config_of(**settings | {"env_args": {"title": "fails there"}}), for_training=True)


def test_shares_are_equal():
    for settings in ({"num_workers": 2}, {"num_workers": 3, "vectorization": "async"}):
        with pytest.raises(SettingsError, match="num_workers: expected vectorization='async' and a divisor"):
            config_of("CartPole-v1", num_envs=4, **settings)


# Runs of strangers.


@pytest.fixture
def strange(folder):
    """A function that makes the run of a stranger, who wrote other settings into its configuration."""
    run = train_tiny("CartPole-v1", run_dir="run")
    trust._trusted.clear()

    def changed(**changes):
        path = Path(run, "config.json")
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        for checkpoint in Path(run, "checkpoints").iterdir():  # the settings in it are another story
            checkpoint.unlink()
        return run

    return changed


@pytest.mark.parametrize("command", ["eval", "report", "export", "resume"])
def test_no_command_imports_a_wrapper_that_a_file_names(folder, command, capsys):
    run = train_tiny("CartPole-v1", wrappers=["my_envs:tripled"], run_dir="run")
    trust._trusted.clear()
    sys.modules.pop("my_envs")
    pytest.importorskip({"report": "plotly", "export": "onnx"}.get(command, "json"))
    status = main([command, run, *(["--total-steps", "96"] if command == "resume" else [])])
    assert "my_envs" not in sys.modules
    if command in ("eval", "resume"):
        assert status == 1
        assert "the wrapper 'my_envs:tripled' of run needs the module 'my_envs'" in capsys.readouterr().err
        allowed = ["--import", "my_envs"] if command == "eval" else ["--trust"]
        assert main([command, run, *allowed, *(["--total-steps", "96"] if command == "resume" else [])]) == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"env": "os:system", "env_args": {"command": "touch it-ran"}},
        {"env": "my_envs:run", "env_args": {"args": "touch it-ran"}},
        {"env": "my_envs:os", "env_args": {}},
        {"env": "gymnasium:make", "env_args": {"id": "CartPole-v1"}},
        {"env": "gymnasium:make:CartPole-v1"},
        {"wrappers": ["os:system"]},
        {"wrappers": ["my_envs:run"]},
        {"wrappers": ["my_envs:Door"]},
        {"wrappers": ["gymnasium.wrappers:RecordVideo('videos')"]},
        {"wrappers": ["gymnasium.wrappers:transform_reward"]},
        {"wrappers": ["my_envs:tripled('a.b')"]},
        {"wrappers": ["my_envs:tripled(factor=['/etc/passwd'])"]},
        {"wrappers": ["my_envs:tripled(b'a/b')"]},
        {"env_args": {"title": "a_module:Thing"}},
        {"env_args": {"walls": [{"..": 1}]}},
    ],
)
def test_an_imported_module_lends_a_stranger_only_its_environments(strange, changes):
    parts.import_module("my_envs", what="--import")
    run = strange(**{"env": "my_envs:Door"} | changes)
    for use in (dualhead.evaluate, dualhead.resume, lambda run: record_video(run, "x.gif")):
        with pytest.raises(RunError, match=r"(--import|If you trust it).*dualhead\.trust"):
            use(run)
    assert not Path("it-ran").exists()
    assert not Path("videos").exists()


def test_functions_need_to_be_named(strange, monkeypatch):
    run = strange(env="my_envs:make_door", env_args={"size": 4}, wrappers=["my_envs:tripled(2.0)", *SCREEN])
    monkeypatch.syspath_prepend(".")
    importlib.import_module("my_envs")
    with pytest.raises(RunError, match="a function of a module that you name"):
        trust.expect_trusted(read_config(run), run)
    parts.import_module("my_envs", what="--import")
    trust.expect_trusted(read_config(run), run)
    strange(env="os:getpid")
    dualhead.trust(run)
    trust.expect_trusted(read_config(run), run)


# Directories.


@pytest.mark.parametrize(
    ("env", "name"),
    [
        ("my_envs:Door", "my_envs-Door"),
        ("a.b:c<d>|e?*", "a.b-c-d--e--"),
        ("dualhead/RecallCue-v0", "dualhead-RecallCue-v0"),
    ],
)
def test_directories_have_names_that_every_file_system_takes(folder, env, name):
    path = new_run_dir(config_of(env))
    assert path == Path("runs") / name / "lstm-seed0"
    assert new_run_dir(config_of(env)).name == "lstm-seed0-2"
