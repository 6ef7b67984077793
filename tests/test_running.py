"""A run: what it leaves behind, that it repeats to the bit, and that bad input loses nothing."""

import csv
import errno
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import psutil
import pytest
import torch
from gymnasium import spaces
from processes import COMMAND, run_process, started
from settings import spec_segments

import dualhead
from dualhead import DualHeadRecurrentPPO
from dualhead.cli import main
from dualhead.config import NetworkConfig, PPOConfig, flat
from dualhead.errors import SettingsError
from dualhead.running import machine, trainer
from dualhead.running.checkpoint import RunError, checkpoints, locked, new_run_dir, read_config, read_newest
from dualhead.running.config import RunConfig
from dualhead.running.episodes import EpisodeTracker
from dualhead.running.trainer import train
from dualhead.running.writers import CSVWriter, ProgressDisplay
from dualhead.storage import read_tensors
from dualhead.worlds import registry
from dualhead.worlds.streams import StreamStep, make_streams

SMALL = NetworkConfig.spec(hidden_size=8, encoder_sizes=(8,))
TINY_OPTIONS = ["--total-steps", "64", "--num-envs", "2", "--rollout-length", "8", "--sequence-length", "4"]
TINY_OPTIONS += ["--batch-size", "8", "--num-epochs", "1", "--hidden-size", "8", "--encoder-sizes", "8"]
TINY_OPTIONS += ["--eval-episodes", "2", "--num-threads", "1"]


class Odd(gym.Env):
    """An environment that misbehaves at its fifth step, or has a space nobody can learn from."""

    action_space = spaces.Discrete(2)

    def __init__(self, how: str) -> None:
        self.how = how
        self.observation_space = spaces.Text(5) if how == "text" else spaces.Box(-1, 1, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.t += 1
        bad = self.t == 5
        observation = np.array([0.0, np.inf if bad and self.how == "observation" else 0.0], np.float32)
        return observation, math.nan if bad and self.how == "reward" else 0.0, False, self.t == 9, {}


for how in ("reward", "observation", "text"):
    gym.register(f"test/Odd-{how}-v0", lambda how=how: Odd(how))


def tiny_config(run_dir, **changes):
    settings = {
        "env": "dualhead/RecallCue-v0",
        "total_steps": 400,
        "num_envs": 2,
        "run_dir": str(run_dir),
        "eval_episodes": 2,
        "network": SMALL,
        "ppo": spec_segments(
            rollout_length=50, batch_size=25, burn_in=3, normalize_observations=True, normalize_rewards=True
        ),
    }
    return RunConfig(**{**settings, **changes})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run's directory and summary. It is trained in another thread than the main one, which alone handles signals."""
    run = tmp_path_factory.mktemp("trained") / "run"
    with ThreadPoolExecutor(1) as pool:
        return run, pool.submit(train, tiny_config(run)).result().summary


def test_run_directory_holds_everything(trained):
    run, summary = trained
    assert summary["steps"] == 400
    assert json.loads((run / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert RunConfig.model_validate_json((run / "config.json").read_text()).total_steps == 400
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["steps"]) for row in rows] == [100, 200, 300, 400]
    needed = {"loss/policy", "loss/value", "entropy/where", "entropy/what", "policy/approx_kl", "policy/clip_fraction"}
    needed |= {"policy/explained_variance", "policy/grad_norm", "state_drift/value_last", "state_drift/kl_first"}
    assert needed | {"time/steps_per_s", "episode/mean_return"} <= rows[0].keys()
    assert float(rows[0]["policy/first_ratio_error"]) < 1e-5
    assert list((run / "tensorboard").glob("events*"))
    assert [path.name for path in checkpoints(run)] == ["step-000000000400.safetensors"]
    assert summary["evaluation"]["episodes"] == 2
    assert summary["evaluation"]["ci95_low"] <= summary["evaluation"]["ci95_high"]


def test_same_seed_same_run_to_the_bit(tmp_path):
    runs = {
        name: train(tiny_config(tmp_path / name, seed=seed)).summary for name, seed in (("a", 1), ("b", 1), ("c", 2))
    }
    tensors = {name: read_newest(tmp_path / name)[1] for name in runs}
    # Gymnasium gives spaces that nobody samples from generators of their own, seeded by the system.
    names = [name for name in tensors["a"] if not name.startswith("run/streams")]
    assert all(torch.equal(tensors["a"][name], tensors["b"][name]) for name in names)
    assert not torch.equal(tensors["a"]["policy/critic.weight"], tensors["c"]["policy/critic.weight"])
    timeless = [{k: v for k, v in runs[name]["metrics"].items() if not k.startswith("time/")} for name in ("a", "b")]
    assert timeless[0] == timeless[1]


def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(tmp_path, capsys):
    """Two are kept; statistics belong to them."""
    run = tmp_path / "run"
    train(tiny_config(run, checkpoint_every=100))
    newest, before = checkpoints(run)
    assert [newest.name, before.name] == ["step-000000000400.safetensors", "step-000000000300.safetensors"]
    tensors, metadata = read_tensors(newest)
    assert tensors["policy/normalizer.of_leaf.0.count"] == tensors["reward_scale/statistics.count"] == 400
    assert metadata["num_steps"] == 400
    newest.write_bytes(newest.read_bytes()[:-100])
    capsys.readouterr()
    assert main(["eval", str(run), "--episodes", "2", "--json"]) == 0
    captured = capsys.readouterr()
    assert "step-000000000400.safetensors is not a whole dualhead checkpoint" in captured.err
    assert json.loads(captured.out)["episodes"] == 2


def test_nothing_changes_a_run_that_is_there(trained, capsys):
    """Neither another run in its place nor an evaluation, which repeats."""
    run, _ = trained
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(RunError, match="holds a run already"):
        train(tiny_config(run, seed=5))
    results = []
    for _ in range(2):
        capsys.readouterr()
        assert main(["eval", str(run), "--episodes", "7", "--seed", "3", "--sample", "--json"]) == 0
        results.append(json.loads(capsys.readouterr().out))
    assert results[0] == results[1]
    numbers = {"mean_return", "std_return", "ci95_low", "ci95_high", "mean_length", "episodes", "episodes_cut"}
    assert results[0].keys() == numbers | {"returns", "lengths"}
    assert (results[0]["episodes"], results[0]["mean_length"]) == (7, 22)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_of_two_runs_that_begin_at_once_each_gets_a_directory(tmp_path, monkeypatch):
    """The first has made the directory and holds its lock, and has not written its configuration yet."""
    monkeypatch.chdir(tmp_path)
    config = tiny_config(None).model_copy(update={"run_dir": None})
    first = tmp_path / "runs" / "dualhead-RecallCue-v0" / "lstm-seed0"
    (first / "checkpoints").mkdir(parents=True)
    with locked(first):
        assert new_run_dir(config).name == "lstm-seed0-2"
        with pytest.raises(RunError, match="is being written by process"):
            new_run_dir(config.model_copy(update={"run_dir": str(first)}))


def test_full_disk_leaves_the_checkpoint_before_whole(tmp_path, monkeypatch):
    run = tmp_path / "run"
    real = os.fsync

    def fsync(descriptor):
        if list(run.glob("checkpoints/.step-000000000300*")):  # the third checkpoint is being written
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(
        RunError, match=r"after 300 steps .*No space left on device; the newest checkpoint is .*step-000000000200"
    ):
        train(tiny_config(run, checkpoint_every=100))
    assert [path.name for path in (run / "checkpoints").iterdir() if path.suffix != ".safetensors"] == []
    assert read_newest(run)[2]["num_steps"] == 200


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "NoSuch-v0"], "unknown environment 'NoSuch-v0'"),
        (["train", "test/Odd-text-v0"], "unsupported observation space Text"),
        (["train", "test/Odd-reward-v0"], "reward of stream 0 is nan"),
        (["train", "test/Odd-observation-v0"], "'observation' of stream 0 is inf"),
        (["train", "CartPole-v1", "--batch-size", "32"], "2 streams x 8 steps = 16 steps does not fill"),
        (["train", "CartPole-v1", "--batch-size", "2"], "batch_size=2 cannot hold one segment of 4 steps"),
        (["train", "CartPole-v1", "--gamma", "1.5"], "gamma: Input should be less than or equal to 1, got 1.5"),
        (["train", "CartPole-v1", "--total-steps", "9"], "total_steps=9 ends before the first update"),
        (["train", "CartPole-v1", "--entropy-coef", "0.1", "0.2"], "entropy_coef: expected one number or 1"),
        (["train", "CartPole-v1", "--entropy-coef-end", "0.1"], "entropy_coef_end needs entropy_decay_steps"),
        (["train", "CartPole-v1", "--device", "cuda"], "torch sees no GPU here"),
        (["eval", "nowhere"], "nowhere holds no run"),
        (["eval", "nowhere", "--seed", "-1"], "seed: expected at least 0 and less than 2**64, got -1"),
        (["eval", __file__], "is no checkpoint of a run: expected a run directory"),
        (["train", "CartPole-v1", "--run-dir", "file/run"], "cannot write the run directory"),
        (["train", "CartPole-v1", "--preset", "tuned"], "nothing was tuned for 'CartPole-v1', only for dualhead/Cart"),
        (["train", "CartPole-v1", "--seed", str(2**64)], f"seed: Input should be less than {2**64}, got {2**64}"),
        (["eval", "nowhere", "--seed", str(2**64)], f"seed: expected at least 0 and less than 2**64, got {2**64}"),
        (["train", "Humanoid-v2"], "cannot make environment 'Humanoid-v2': The mujoco v2"),
    ],
)
def test_bad_input_gives_one_clear_message(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("not a folder")
    if arguments[0] == "train":
        arguments = [*arguments[:2], *TINY_OPTIONS, "--run-dir", "run", *arguments[2:]]
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not checkpoints(tmp_path / "run")
    assert not list(tmp_path.rglob(".*.safetensors.*"))


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "CartPole-v1", "--no-such", "1"],
        ["train", "CartPole-v1", "--world.num-agents", "3"],
        ["train", "--preset", "spec"],
        ["train", "--run-dir", "CartPole-v1", "--seed", "3"],
        ["train"],
        ["fly"],
        [],
    ],
)
def test_wrong_usage_exits_with_2(capsys, arguments):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2


def test_checkpoint_of_another_architecture(trained, tmp_path, capsys):
    run = shutil.copytree(trained[0], tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    config["network"]["memory"] = "gru"
    (run / "config.json").write_text(json.dumps(config))
    assert main(["resume", str(run), "--total-steps", "500"]) == 1
    assert "is of another run: expected network.memory=" in capsys.readouterr().err


def test_tuned_settings_are_said_and_overridable(tmp_path, capsys):
    options = ["--total-steps", "256", "--num-envs", "2", "--eval-episodes", "0", "--run-dir", str(tmp_path / "run")]
    assert main(["train", "dualhead/CartPoleNoVel-v1", "--batch-size", "64", *options]) == 0
    said = capsys.readouterr().out.splitlines()[0]
    tuned, given = said.split("; given: ")
    assert tuned.startswith("settings: tuned for dualhead/CartPoleNoVel-v1:")
    assert "hidden_size=64" in tuned
    assert "batch_size" not in tuned
    assert "batch_size=64" in given
    assert "hidden_size" not in given
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["network"]["hidden_size"], config["ppo"]["batch_size"]) == (64, 64)


def test_the_specification_s_settings_are_a_preset(tmp_path, capsys):
    """Also where settings were tuned; what is given lies over the preset, in Python as on the command line."""
    options = ["--total-steps", "200", "--num-envs", "2", "--eval-episodes", "0", "--run-dir", str(tmp_path / "run")]
    assert main(["train", "--preset", "spec", "dualhead/CartPoleNoVel-v1", "--hidden-size", "8", *options]) == 0
    assert capsys.readouterr().out.startswith("settings: the specification's class (docs/spec.md)")
    config = read_config(tmp_path / "run")
    assert config.ppo == PPOConfig.spec()
    assert config.network == NetworkConfig.spec(hidden_size=8)
    given = {"total_steps": 200, "num_envs": 2, "eval_episodes": 0, "run_dir": str(tmp_path / "run")}
    network = {"hidden_size": 8}
    assert config == RunConfig(env="dualhead/CartPoleNoVel-v1", preset="spec", network=network, **given)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        # Where a run goes chooses neither environment nor preset nor policies.
        ("--run-dir commons CartPole-v1", {"env": "CartPole-v1", "preset": "default", "run_dir": "commons"}),
        ("--run_dir=commons CartPole-v1", {"env": "CartPole-v1", "run_dir": "commons", "ppo.gamma": 0.99}),
        ("commons --run-dir runs/independent", {"preset": "tuned", "policies": "shared", "ppo.batch_size": 500}),
        ("commons --policies independent --policies shared", {"policies": "shared", "ppo.batch_size": 500}),
        ("--preset=spec dualhead/CartPoleNoVel-v1", {"preset": "spec", "ppo.batch_size": 64}),
        ("--policies=independent commons", {"policies": "independent", "ppo.batch_size": 64}),
        ("--seed 3 CartPole-v1 --gamma 1", {"env": "CartPole-v1", "seed": 3, "ppo.gamma": 1.0}),
        (
            "--encoder-sizes 32 16 --head-sizes 6 6 CartPole-v1",
            {"env": "CartPole-v1", "network.encoder_sizes": (32, 16), "network.head_sizes": (6, 6)},
        ),
        ("--head-sizes 6 6 commons --world.num-agents 3 --run-dir x", {"env": "commons", "network.head_sizes": (6, 6)}),
        ("--log-to wandb CartPole-v1 --seed 3", {"env": "CartPole-v1", "log_to": ("wandb",), "seed": 3}),
        ("CartPole-v1 --head-sizes 6 --memory gru", {"network.head_sizes": (6,), "network.memory": "gru"}),
        ("CartPole-v1 --entropy-coef 0.5 --max-grad-norm None", {"ppo.entropy_coef": 0.5, "ppo.max_grad_norm": None}),
        ("CartPole-v1 --entropy-coef 0.5 0 --no-previous-action", {"ppo.entropy_coef": (0.5, 0.0)}),
        ("CartPole-v1 --memory mine:X --encoder mine:Y", {"memory": "mine:X", "encoder": "mine:Y"}),
        (
            "commons --norms.intrinsic-scale -1e-1 --total-steps 1e6",
            {"norms.intrinsic_scale": -0.1, "total_steps": 1e6},
        ),
        (
            'commons --world.phases [{"mode":"off"}]',
            {"world.phases": ({"mode": "off", "level": None, "num_turns": None},)},
        ),
        (f"CartPole-v1 --seed {2**64 - 1}", {"seed": 2**64 - 1}),
    ],
)
def test_what_a_command_means(monkeypatch, arguments, expected):
    configs = []
    monkeypatch.setattr(trainer, "train", lambda config: configs.append(config) or trained_nothing)
    trained_nothing = SimpleNamespace(summary={"stopped_early": True, "steps": 0, "checkpoint": "", "run_dir": ""})
    assert main(["train", *arguments.split()]) == 130
    settings = flat(configs[0].model_dump())
    assert {name: settings[name] for name in expected} == expected


def test_every_wrong_setting_has_a_line(capsys):
    wrong = ["--gamma", "1.5", "--num-envs", "-3", "--world.harms", '{"A": -1}', "--memory", "lst"]
    assert main(["train", "commons", *wrong]) == 1
    lines = capsys.readouterr().err.splitlines()
    names = [line.removeprefix("error: ").partition(": ")[0] for line in lines]
    assert sorted(names) == ["network.memory", "num_envs", "ppo.gamma", "world.harms.A"]


def test_help_shows_what_the_environment_can_use(capsys):
    shown = {}
    for env in ("CartPole-v1", "commons"):
        with pytest.raises(SystemExit):
            main(["train", env, "--help"])
        shown[env] = capsys.readouterr().out
        assert re.search(rf"--hidden-size INT.*\(default: {64 if env == 'commons' else 128}\)", shown[env], flags=re.S)
    for option in ("--world.num-agents", "--policies", "--turnover.first-turn"):
        assert option in shown["commons"]
        assert option not in shown["CartPole-v1"]
    with pytest.raises(SystemExit):
        main(["train", "CartPole-v1", "--num-env", "3"])
    assert re.search(r"Unrecognized options: --num-env, 3.*--num-envs INT", capsys.readouterr().err, flags=re.S)


def test_independent_policies_fit_the_tuned_settings(tmp_path):
    options = ["--total-steps", "2000", "--eval-episodes", "0", "--run-dir", str(tmp_path / "run")]
    assert main(["train", "commons", "--policies", "independent", "--num-threads", "1", *options]) == 0


def test_help_and_import_do_not_load_torch():
    for command in (["-c", "import dualhead"], ["-m", "dualhead", "--help"], ["-m", "dualhead", "train", "--help"]):
        done = run_process([sys.executable, "-X", "importtime", *command])
        assert done.returncode == 0, done.stderr
        loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
        assert not loaded & {"torch", "gymnasium", "numpy"}, command


def test_the_version_is_said(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"dualhead {dualhead.__version__}\n"


def test_output_that_nobody_reads_is_no_error():
    with started([*COMMAND, "envs"]) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait() == 141


def test_progress_that_nobody_reads_does_not_end_a_run(monkeypatch):
    tried = []

    def refuse(text):
        tried.append(text)
        raise BrokenPipeError

    stream = io.StringIO()
    monkeypatch.setattr(stream, "write", refuse)
    ProgressDisplay(100, stream=stream).write(10, {"time/steps_per_s": 1.0, "episode/mean_return": math.nan})
    assert "return        - " in tried[0]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_saves_a_checkpoint_and_says_where(tmp_path, number):
    command = [*COMMAND, "train", "CartPole-v1", *TINY_OPTIONS]
    command += ["--total-steps", "10000000", "--run-dir", str(tmp_path / "run")]
    with started(command) as process:
        assert any(line.startswith("steps") for line in process.stderr)  # it has begun
        process.send_signal(number)
        out, err = process.communicate()
    assert process.returncode == 130, err
    assert "Traceback" not in err
    saved = re.search(r"stopped after ([\d,]+) steps; checkpoint: (\S+)", out)
    _, metadata = read_tensors(saved[2])
    assert metadata["num_steps"] == int(saved[1].replace(",", ""))
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["stopped_early"]


@pytest.fixture
def clocks(monkeypatch):
    """In the place of psutil's: two cores of ours and one that is not, this process, and one child."""
    clocks = SimpleNamespace(seconds=0.0, own=0.0, ended=0.0, child=0.0, by_core=[0.0, 0.0, 0.0], are_told=True)

    def of_child():
        if clocks.child is None:
            raise psutil.NoSuchProcess(1)
        return clocks.child, 0.0, 99.0, 99.0

    def of_cores(percpu):
        if not clocks.are_told:
            raise psutil.AccessDenied
        return [SimpleNamespace(user=b / 2, system=b / 2, idle=7.0, steal=9.0, guest=b / 2) for b in clocks.by_core]

    process = SimpleNamespace(
        cpu_times=lambda: (clocks.own / 2, clocks.own / 2, clocks.ended / 2, clocks.ended / 2, 99.0),
        children=lambda recursive: [SimpleNamespace(cpu_times=of_child)],
    )
    monkeypatch.setattr(machine, "_cores", lambda: {0, 2})
    monkeypatch.setattr(machine.psutil, "Process", lambda: process)
    monkeypatch.setattr(machine.psutil, "cpu_times", of_cores)
    monkeypatch.setattr(machine.time, "perf_counter", lambda: clocks.seconds)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    return clocks


def test_a_busy_machine_is_said(monkeypatch, clocks):
    use = machine.CoreUse()
    clocks.seconds, clocks.own, clocks.child, clocks.by_core = 4.0, 2.0, 1.5, [4.0, 4.0, 4.0]
    # Of 8 seconds on our two cores 3.5 were ours.
    assert use.others() == pytest.approx(4.5 / 4)
    with pytest.warns(UserWarning, match=r"2 threads, and other programs keep 1\.1 of the 2 cores.*--num-threads 1"):
        use.warn()
    clocks.child, clocks.ended = None, 1.5  # it ended, which changes nothing
    assert use.others() == pytest.approx(4.5 / 4)
    clocks.own = 5.0
    use.warn()  # 0.4 cores; warnings are errors here
    clocks.own = 2.0
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    use.warn()  # one thread does not compete


@pytest.mark.parametrize("when", [False, True])
def test_a_system_that_does_not_tell_is_not_called_busy(clocks, when):
    clocks.are_told = when
    use = machine.CoreUse()
    clocks.are_told, clocks.seconds, clocks.by_core = not when, 4.0, [4e6] * 3
    use.warn()


@pytest.mark.slow
def test_a_run_says_that_others_fight_with_it_for_the_cores(tmp_path):
    cores, threads = machine.num_cores(), max(2, machine.num_cores())
    spin = [sys.executable, "-c", "while True: pass"]
    command = [*COMMAND, "train", "CartPole-v1", *TINY_OPTIONS, "--num-threads", str(threads)]
    command += ["--total-steps", "10000000", "--run-dir", str(tmp_path / "run")]
    with ExitStack() as stack:
        for _ in range(cores):
            stack.enter_context(started(spin))
        process = stack.enter_context(started(command, stdout=subprocess.DEVNULL))
        said = next((line for line in process.stderr if "threads" in line), "")
    assert re.search(rf"uses {threads} threads, and other programs keep \d+\.\d of the {cores} cores busy", said)


def test_metrics_file_grows_columns(tmp_path):
    writer = CSVWriter(tmp_path)
    writer.write(1, {"a": 1.0})
    writer.write(2, {"a": 2.0, "b": math.nan})
    writer.write(3, {"b": 3.0})
    writer.close()
    assert (tmp_path / "metrics.csv").read_text().split() == ["steps,a,b", "1,1.0,", "2,2.0,nan", "3,,3.0"]


def test_episode_tracker_by_hand():
    tracker = EpisodeTracker(2)
    for rewards, terminated in (([1.0, 2.0], [False, True]), ([1.0, 5.0], [True, False])):
        tracker.step(StreamStep(None, np.array(rewards), np.array(terminated), np.array([False, False]), None))
    assert tracker.metrics() == {"episode/mean_return": 2.0, "episode/mean_length": 1.5, "episode/count": 2}
    assert tracker.running_returns.tolist() == [0.0, 5.0]


@pytest.mark.parametrize(("terminal", "shown"), [("xterm", "return 7.5"), ("dumb", "return    7.500")])
def test_live_display_on_a_terminal(terminal, shown, monkeypatch):
    """A terminal that cannot move its cursor gets plain lines."""
    monkeypatch.setenv("TERM", terminal)
    monkeypatch.setenv("COLUMNS", "120")  # a narrow terminal shows less
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: True)
    display = ProgressDisplay(100, stream=stream)
    display.write(50, {"time/steps_per_s": 1234.0, "episode/mean_return": 7.5})
    display.close()
    assert "1,234 steps/s" in stream.getvalue()
    assert shown in stream.getvalue()


def test_an_agent_of_ones_own_loads_the_checkpoint_of_a_run(trained):
    run, summary = trained
    config, saved = read_config(run), read_newest(run)[1]
    streams = make_streams(config.env, config.num_envs)
    spaces_of_both = (streams.observation_space, streams.action_space)
    agent = DualHeadRecurrentPPO(*spaces_of_both, num_streams=2, config=config.ppo, network=config.network)
    agent.load(summary["checkpoint"])
    for name, weight in agent.policy.state_dict().items():
        assert torch.equal(weight, saved[f"policy/{name}"])
    assert agent.num_steps == summary["steps"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_output_that_cannot_be_written_is_said_without_a_traceback():
    with open("/dev/full", "w") as full:
        done = run_process([*COMMAND, "envs", "CartPole"], stdout=full)
    assert (done.returncode, done.stderr) == (1, "error: cannot write the output: No space left on device\n")


OWN_WORLD = """
from pydantic import Field
from dualhead import Commons, CommonsConfig, WorldConfig, register_world

class MyConfig(WorldConfig):
    num_agents: int = Field(default=200, description="Agents.")
    payoff: float = Field(description="What A pays.")
    pairs: tuple[tuple[int, int], ...] | None = Field(default=None, description="Of agents.")

def open_mine(settings, *, num_worlds, device):
    rules = CommonsConfig(form="bandit", num_agents=settings.num_agents)
    return Commons(rules, num_worlds=num_worlds, device=device)

register_world("mine", MyConfig, open_mine)
"""
OWN_WORLD_OPTIONS = [
    "mine",
    "--import",
    "my_world",
    "--world.payoff",
    "3",
    "--world.pairs",
    "[[1, 2]]",
    "--total-steps",
    "2000",
    "--num-envs",
    "1",
]
OWN_WORLD_OPTIONS += ["--rollout-length", "5", "--batch-size", "500", "--eval-episodes", "0", "--run-dir", "run"]


@pytest.fixture
def in_folder_of_own_world(tmp_path, monkeypatch):
    (tmp_path / "my_world.py").write_text(OWN_WORLD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    registry.WORLDS.pop("mine", None)
    sys.modules.pop("my_world", None)


@pytest.mark.usefixtures("in_folder_of_own_world")
def test_a_world_with_required_settings_and_many_agents(capsys):
    """The settings that are printed are compared with defaults that would be impossible on their own."""
    assert main(["train", *OWN_WORLD_OPTIONS]) == 0
    said = capsys.readouterr().out.splitlines()[0]
    assert said.startswith("settings: defaults for any environment")
    assert "payoff=3.0 pairs=((1, 2),)" in said.partition("; given: ")[2]
    assert "num_agents" not in said
    assert main(["train", "mine", "--num-envs", "1"]) == 1
    assert "error: world.payoff: Field required" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["train", "mine", "--help"])
    assert "--world.payoff FLOAT" in capsys.readouterr().out
    registry.WORLDS.pop("mine")
    sys.modules.pop("my_world")
    for command in (["resume", "run", "--total-steps", "3000"], ["eval", "run"]):
        assert main(command) == 1
        assert re.search(r"no world 'mine' is registered here: import .*--import MODULE", capsys.readouterr().err)
    assert main(["resume", "run", "--total-steps", "3000", "--import", "my_world"]) == 0


@pytest.mark.usefixtures("in_folder_of_own_world")
def test_a_study_imports_modules():
    with open("study.toml", "w") as file:
        file.write(
            "seeds = [0]\n[base]\nenv = 'mine'\ntotal_steps = 2000\nnum_envs = 1\neval_episodes = 0\n"
            "world = {payoff = 3.0}\nppo = {rollout_length = 5, batch_size = 500}\n[conditions.only]\n"
        )
    assert main(["study", "study.toml", "--import", "my_world", "--out", "out", "--jobs", "1"]) == 0
    assert read_config("out/only/seed0").world.payoff == 3.0


def test_a_core_of_ours_is_no_part_of_ones_own():
    with pytest.raises(RunError, match=r"NetworkConfig\(memory='gru'\)"):
        train("CartPole-v1", memory="gru")


def test_an_unknown_setting_is_answered_with_the_nearest_name():
    for settings, nearest in (
        ({"num_env": 3}, "num_envs"),
        ({"ppo": {"gama": 0.9}}, "gamma"),
        ({"hidden_size": 8}, "network.hidden_size"),
    ):
        with pytest.raises(SettingsError, match=rf"did you mean {nearest}\b"):
            RunConfig(env="CartPole-v1", **settings)
