"""Runs that get signals, and runs whose environments fail: nothing is lost, nothing hangs, nothing stays behind."""

import multiprocessing
import os
import resource
import signal
import sys
import threading
import time

import gymnasium as gym
import numpy as np
import psutil
import pytest
import torch
from gymnasium import spaces
from saved_runs import rows_of
from settings import spec_segments

from dualhead.agent import DualHeadRecurrentPPO
from dualhead.cli import main
from dualhead.config import NetworkConfig, PPOConfig
from dualhead.errors import EnvironmentFailed, RunError
from dualhead.running.checkpoint import checkpoints, read_json
from dualhead.running.config import RunConfig
from dualhead.running.machine import requests_by_signal
from dualhead.running.session import Session
from dualhead.running.trainer import resume, train
from dualhead.storage import read_tensors
from dualhead.worlds.streams import make_streams

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="signals of POSIX")
SECONDS = 30.0
"""After which a process of a test counts as one that hangs."""


def config_of(env="CartPole-v1", **changes):
    settings = {
        "env": env,
        "total_steps": 320,
        "num_envs": 2,
        "checkpoint_every": 64,
        "keep_checkpoints": 9,
        "eval_episodes": 0,
        "network": NetworkConfig.spec(hidden_size=4, encoder_sizes=(4,)),
        "ppo": spec_segments(rollout_length=16, sequence_length=8, batch_size=16, num_epochs=1),
    }
    return RunConfig(**{**settings, **changes})


def run_in(run_dir, config):
    return train(config.model_copy(update={"run_dir": str(run_dir)}), show_progress=False).summary


def weights(run_dir):
    tensors, _ = read_tensors(checkpoints(run_dir)[0])
    return {name: tensor for name, tensor in tensors.items() if name.startswith("policy/")}


def call_at_step(monkeypatch, number, action):
    """Calls `action(session)` after the session's step of that number."""
    real, count = Session.record, [0]

    def record(self, step):
        real(self, step)
        count[0] += 1
        if count[0] == number:
            action(self)

    monkeypatch.setattr(Session, "record", record)


# Signals.


def group_to_itself(run, log, ignored=()):
    """A run without end, as the leader of a process group."""
    os.setsid()
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    sys.stdout = sys.stderr = log.open("w", buffering=1)
    options = "--vectorization async --num-envs 2 --total-steps 10000000 --rollout-length 16 --batch-size 16"
    options += " --hidden-size 4 --encoder-sizes 4 --num-threads 1 --eval-episodes 0 --run-dir"
    sys.exit(main(["train", "CartPole-v1", *options.split(), str(run)]))


@pytest.fixture
def running(tmp_path):
    """A function that begins a run with processes of its own; what is left of it is killed in the end."""
    if torch.cuda.is_available():
        pytest.skip("where there is a GPU autograd does not survive a fork")
    begun = []

    def begin(**how):
        run, log = tmp_path / "run", tmp_path / "log"
        process = multiprocessing.get_context("fork").Process(target=group_to_itself, args=(run, log), kwargs=how)
        process.start()
        begun.append(process)
        wait_for(lambda: (run / "metrics.csv").exists() or not process.is_alive())
        assert process.is_alive(), log.read_text()
        return process, run, log

    yield begin
    for process in begun:
        for left in group_of(process.pid):
            left.kill()
        process.join()


def wait_for(happens):
    ends_at = time.perf_counter() + SECONDS
    while not happens():
        assert time.perf_counter() < ends_at
        time.sleep(0.02)


def group_of(leader):
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.Error, OSError):
            pass
    return found


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_the_whole_group_saves_the_step(running, number):
    """As systemd, Slurm and Kubernetes send SIGTERM, and a closed terminal SIGHUP."""
    process, run, log = running()
    os.killpg(process.pid, number)
    process.join(SECONDS)
    assert process.exitcode == 130, log.read_text()
    summary = read_json(run / "summary.json")
    assert checkpoints(run)[0].stem == f"step-{summary['steps']:012d}"
    assert f"go on with: dualhead resume {run}" in log.read_text()
    assert group_of(process.pid) == []


def test_a_second_signal_ends_a_run_whose_worker_is_stopped(running):
    process, _, log = running()
    psutil.Process(process.pid).children()[0].suspend()
    os.kill(process.pid, signal.SIGTERM)
    wait_for(lambda: "once more" in log.read_text())
    time.sleep(0.2)
    assert process.is_alive()
    began = time.perf_counter()
    os.kill(process.pid, signal.SIGTERM)
    process.join(SECONDS)
    assert process.exitcode == 130
    assert time.perf_counter() - began < 4.0
    assert "stopped at once; " in log.read_text()
    assert group_of(process.pid) == []


def test_workers_end_with_a_killed_parent(running):
    """One of them is stopped, and cannot end by itself."""
    process, _, _ = running()
    workers = psutil.Process(process.pid).children()
    workers[0].suspend()
    process.kill()
    process.join()
    wait_for(lambda: group_of(process.pid) == [])
    assert len(workers) == 2


def test_a_worker_killed_by_the_system_is_named_and_the_agent_saved(running):
    process, run, log = running()
    psutil.Process(process.pid).children()[1].kill()
    process.join(SECONDS)
    (error,) = [line for line in log.read_text().splitlines() if line.startswith("error: ")]
    assert "the process of environment 1 (killed by SIGKILL) ended" in error
    assert f"the newest checkpoint is {checkpoints(run)[0]}; go on with: dualhead resume {run}" in error
    assert process.exitcode == 1
    assert "Traceback" not in log.read_text()
    steps = read_tensors(checkpoints(run)[0])[1]["num_steps"]
    assert f" after {steps} steps " in error
    with pytest.warns(UserWarning, match="begin again"):
        assert resume(run, total_steps=steps + 64, show_progress=False).summary["steps"] >= steps + 64


def test_a_hangup_that_the_parent_ignores_stays_ignored(running):
    process, run, _ = running(ignored=[signal.SIGHUP])  # as under nohup
    os.killpg(process.pid, signal.SIGHUP)
    rows = len(rows_of(run))
    wait_for(lambda: len(rows_of(run)) > rows + 2)
    assert process.is_alive()


def test_a_signal_asks_for_a_checkpoint_and_the_run_goes_on(tmp_path, monkeypatch):
    plain = config_of(checkpoint_every=10_000)
    run_in(tmp_path / "never", plain)
    call_at_step(monkeypatch, 70, lambda _: signal.raise_signal(signal.SIGUSR1))
    summary = run_in(tmp_path / "run", plain.model_copy(update={"save_on": "SIGUSR1"}))
    assert not summary["stopped_early"]
    assert [int(path.stem[5:]) for path in checkpoints(tmp_path / "run")] == [320, 140]
    ours, theirs = weights(tmp_path / "run"), weights(tmp_path / "never")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_handlers_are_put_back():
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2)
    before = [signal.getsignal(number) for number in numbers]
    with requests_by_signal(save_on="SIGUSR2") as requests:
        signal.raise_signal(signal.SIGUSR2)
        assert (requests.stop, requests.save) == (False, True)
        signal.raise_signal(signal.SIGHUP)
        assert requests.stop
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(number)
    assert [signal.getsignal(number) for number in numbers] == before


def test_streams_that_nobody_closes_do_not_keep_a_process():
    """At its exit Python sends SIGTERM to such workers, which ignore it, and waits for them."""

    def work():
        kept.append(make_streams("CartPole-v1", 2, vectorization="async"))
        kept[0].reset(seed=0)

    kept = []
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(SECONDS)
    is_over = process.exitcode == 0
    process.kill()
    assert is_over


# Environments that fail.


class Fails(gym.Env):
    """Its 50th step goes wrong, in the second environment of a run alone."""

    observation_space = spaces.Box(-9, 9, (3,), np.float32)
    action_space = spaces.Discrete(2)
    seeds = (np.random.SeedSequence(0).generate_state(2) >> 1).tolist()

    def __init__(self, how):
        self.how, self.steps, self.is_bad = how, 0, False

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.is_bad = seed == self.seeds[1]
        self.t = 0
        return np.zeros(3, np.float32), {}

    def step(self, action):
        self.t += 1
        self.steps += 1
        seen = np.full(3, self.t / 10, np.float32)
        if self.steps == 50 and self.is_bad:
            if self.how == "raises":
                raise LookupError("no such door")
            if self.how == "exits":
                sys.exit("bye")
            seen = seen[:1]
        return seen, 1.0, self.t == 20, False, {}


for how in ("raises", "exits", "shape"):
    gym.register(f"test/Fails-{how}-v0", lambda how=how: Fails(how), disable_env_checker=True)


@pytest.mark.parametrize("vectorization", ["sync", "async"])
@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("raises", r"environment 1 raised LookupError: '?no such door'? \(.*test_signals.py, line \d+\)"),
        ("exits", r"environment 1 raised SystemExit: bye \(.*test_signals.py, line \d+\)"),
        ("shape", r"environment 1 raised ValueError: observation: expected .*\(3,\).*, got .*\(1,\)"),
    ],
)
def test_an_environment_that_fails_is_named_and_the_agent_saved(tmp_path, how, said, vectorization):
    run = tmp_path / "run"
    with pytest.raises(RunError, match=rf"test/Fails-{how}-v0 after 98 steps \(49 of each stream\): {said}") as raised:
        run_in(run, config_of(f"test/Fails-{how}-v0", vectorization=vectorization))
    newest = checkpoints(run)[0]
    assert newest.stem == f"step-{98:012d}"
    assert str(raised.value).endswith(f"; the newest checkpoint is {newest}; go on with: dualhead resume {run}")
    with pytest.warns(UserWarning, match="begin again.* and 2 steps that were not learned from yet are dropped"):
        assert resume(run, show_progress=False).summary["steps"] == 320


def test_an_act_that_is_forgotten_leaves_the_agent_as_it_was():
    agent = DualHeadRecurrentPPO(
        spaces.Box(-1, 1, (3,), np.float32),
        spaces.Discrete(2),
        num_streams=2,
        config=PPOConfig(rollout_length=8, batch_size=16, burn_in=2),
        network=NetworkConfig.spec(hidden_size=4, encoder_sizes=(4,)),
    )
    seen = np.full((2, 3), 0.5, np.float32)
    for _ in range(3):
        agent.act(seen)
        agent.record(np.zeros(2), np.zeros(2, bool), np.zeros(2, bool))
    assert not agent.forget_actions()
    before, _ = agent.state()
    agent.act(seen)
    assert agent.forget_actions()
    after, _ = agent.state()
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"rng/sampling"}


def test_async_environments_that_fail_close():
    streams = make_streams("test/Fails-raises-v0", 2, vectorization="async")
    streams.envs.reset(seed=[0, Fails.seeds[1]])
    for _ in range(49):
        streams.step(np.zeros(2, np.int64))
    with pytest.raises(EnvironmentFailed, match="environment 1"):
        streams.step(np.zeros(2, np.int64))
    streams.close()
    assert not any(process.is_alive() for process in streams.envs.processes)


# Evaluations.


class Endless(gym.Env):
    """Its episodes never end."""

    observation_space = spaces.Box(-9, 9, (1,), np.float32)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        return np.zeros(1, np.float32), 1.0, False, False, {}


gym.register("test/Endless-v0", Endless)


def test_an_evaluation_cuts_episodes_without_end_and_says_how_many(tmp_path):
    with pytest.warns(UserWarning, match=r"25 of 25 episodes .* were cut after 7 steps \(eval_max_steps\)"):
        summary = run_in(tmp_path / "run", config_of("test/Endless-v0", eval_episodes=25, eval_max_steps=7))
    evaluation = summary["evaluation"]
    names = ("mean_return", "mean_length", "episodes", "episodes_cut")
    assert [evaluation[name] for name in names] == [7.0, 7.0, 25, 25]
    assert rows_of(tmp_path / "run", "evaluations.csv")[0]["episodes_cut"] == "25"


def interrupt_soon(_):
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()


def test_one_ctrl_c_ends_the_last_evaluation(tmp_path, monkeypatch):
    run = tmp_path / "run"
    call_at_step(monkeypatch, 160, interrupt_soon)  # the last step
    summary = run_in(run, config_of("test/Endless-v0", eval_episodes=2, eval_max_steps=10**9))
    assert summary["stopped_early"]
    assert "evaluation" not in summary
    assert checkpoints(run)[0].stem == f"step-{320:012d}"
    config = (run / "config.json").read_text()
    (run / "config.json").write_text(config.replace(str(10**9), "5"))
    with pytest.warns(UserWarning, match="were cut after 5 steps"):
        assert resume(run, show_progress=False).summary["evaluation"]["episodes_cut"] == 2


def test_an_evaluation_while_training_that_was_stopped_comes_after_the_next_update(tmp_path, monkeypatch):
    run = tmp_path / "run"
    call_at_step(monkeypatch, 80, interrupt_soon)  # the fifth update, and the first evaluation
    config = config_of("test/Endless-v0", eval_episodes=2, eval_every=160, eval_max_steps=10**9)
    assert run_in(run, config)["steps"] == 160
    text = (run / "config.json").read_text()
    (run / "config.json").write_text(text.replace(str(10**9), "5"))
    with pytest.warns(UserWarning, match="were cut after 5 steps"):
        resume(run, show_progress=False)
    assert [row["steps"] for row in rows_of(run, "evaluations.csv")] == ["192", "320"]


# Saving.


def test_a_checkpoint_holds_only_what_is_still_to_be_learned_from(tmp_path):
    space = spaces.Box(-1, 1, (500,), np.float32)
    agent = DualHeadRecurrentPPO(
        space,
        spaces.Discrete(2),
        num_streams=8,
        config=PPOConfig(rollout_length=500, batch_size=1000, burn_in=3),
        network=NetworkConfig.spec(hidden_size=4, encoder_sizes=(4,)),
    )
    rollout_bytes = 500 * 8 * 500 * 4
    agent.save(tmp_path / "empty")
    for _ in range(2):
        agent.act(np.full((8, 500), 0.5, np.float32))
        agent.record(np.zeros(8), np.zeros(8, bool), np.zeros(8, bool))
    agent.save(tmp_path / "two")
    empty, two = ((tmp_path / name).stat().st_size for name in ("empty", "two"))
    assert empty < rollout_bytes / 50
    assert 2 * 8 * 500 * 4 <= two - empty < 3 * 8 * 500 * 4
    other = DualHeadRecurrentPPO.from_file(tmp_path / "two")
    assert torch.equal(other.rollout_memory.observations["observation"][3:5], torch.full((2, 8, 500), 0.5))


def test_a_save_copies_no_whole_rollout(tmp_path):
    """In a process of its own, whose peak memory is that of this save."""

    def work(answer):
        agent = DualHeadRecurrentPPO(
            spaces.Box(-1, 1, (4000,), np.float32),
            spaces.Discrete(2),
            num_streams=8,
            config=PPOConfig(rollout_length=500, batch_size=1000),
            network=NetworkConfig.spec(hidden_size=4, encoder_sizes=(4,)),
        )
        for buffer in agent.rollout_memory.observations.values():
            buffer.fill_(0.5)
        agent.rollout_memory.length = 500
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        agent.save(tmp_path / "agent")
        answer.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)

    receiver, sender = multiprocessing.get_context("spawn").Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=work, args=(sender,))
    process.start()
    process.join(SECONDS)
    assert process.exitcode == 0
    kilobytes = receiver.recv()
    assert kilobytes * (1 if sys.platform == "darwin" else 1024) < 0.5 * 500 * 8 * 4000 * 4
