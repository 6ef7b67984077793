"""The benchmarks run, and count the arithmetic right."""

import importlib.util
import itertools
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from processes import run_process

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
TINY = ["--updates", "1", "--warm-up", "1", "--threads", "1", "--num-envs-factor", "0.25", "--rollout-factor", "0.125"]


def run(script, *options, tiny=TINY, **environment):
    command = [sys.executable, str(BENCHMARKS / script), *tiny, *options]
    return run_process(command, env=os.environ | {"OMP_NUM_THREADS": "1"} | environment)


@pytest.fixture
def throughput(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("throughput")


@pytest.fixture
def workloads(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("workloads").WORKLOADS


@pytest.mark.parametrize(
    ("workload", "shape", "logits", "memory", "flops"),
    [
        # 2·(2·64) + 2·1024·(64 + 256) + 2·256·3
        ("vector", (2,), 2, "lstm", 657_152),
        # 2·(2·64) + 2·768·(64 + 256) + 2·256·3
        ("vector", (2,), 2, "gru", 493_312),
        # 2·9·(5·32 + 32·64)·121 + 2·7744·256 + 2·1024·(256 + 256) + 2·256·8
        ("grid", (5, 11, 11), 7, "lstm", 9_826_624),
    ],
)
def test_counts_the_arithmetic_of_a_forward_pass(throughput, workloads, workload, shape, logits, memory, flops):
    chosen = workloads[workload]
    assert throughput.forward_flops(chosen, shape, logits=logits, memory=memory) == flops
    assert throughput.flops_per_step(chosen, flops) == 13 * flops


def test_workloads_are_those_of_the_design(workloads):
    sizes = {
        name: (w.num_envs, w.num_minibatches, w.rollout_length, w.num_epochs, w.hidden_size, w.batch_size)
        for name, w in workloads.items()
    }
    assert sizes == {
        "vector": (64, 8, 128, 4, 256, 1024),
        "grid": (16, 4, 128, 4, 256, 512),
        "popgym": (64, 8, 128, 4, 256, 1024),
    }


def test_grid_episodes_last_20_to_120_steps(workloads):
    env = workloads["grid"].make_env()
    observation, _ = env.reset(seed=3)
    assert env.observation_space.contains(observation)
    lengths = []
    for _ in range(500):
        length, ended = 0, False
        while not ended:
            observation, _, ended, truncated, _ = env.step(env.action_space.sample())
            assert not truncated
            length += 1
        lengths.append(length)
        env.reset()
    assert min(lengths) == 20
    assert max(lengths) == 120


@pytest.mark.slow
def test_throughput_prints_its_figures(throughput):
    done = run("throughput.py", "--workload", "vector", "grid", "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert [row["workload"] for row in rows] == ["vector", "grid"]
    for row in rows:
        assert tuple(row) == throughput.KEYS
        assert 0 < row["steps_per_s_min"] <= row["steps_per_s"] <= row["steps_per_s_max"]
        assert row["ratio_to_plain_torch"] == pytest.approx(
            row["steps_per_s"] / row["plain_torch"], rel=0.01, abs=0.001
        )
        assert row["ratio_to_ceiling"] == pytest.approx(row["steps_per_s"] / row["ceiling"], rel=0.01, abs=0.001)


@pytest.mark.slow
def test_overhead_prints_its_figures():
    done = run("overhead.py", "--workload", "vector", "--json")
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)
    assert row["workload"] == "vector"
    # 16 streams of 16 steps: a checkpoint after every 196th update.
    assert row["checkpoint"] == pytest.approx(row["checkpoint_ms"] / 1000 / 196 / row["update_s"], rel=0.05, abs=2e-5)
    assert row["logging"] == pytest.approx(row["logging_ms"] / 1000 / row["update_s"], rel=0.05, abs=2e-5)
    assert row["overhead"] == pytest.approx(row["logging"] + row["checkpoint"], abs=2e-5)
    assert row["logging"] > 0
    assert row["checkpoint_mb"] > 3  # 20 buffers of weights and moments alone


@pytest.mark.slow
def test_throughput_refuses_what_it_cannot_measure():
    done = run("throughput.py", "--workload", "vector", "--plain-sequence", "5")
    assert done.returncode == 2
    assert "--plain-sequence: expected a divisor" in done.stderr
    done = run("throughput.py", "--num-envs-factor", "inf")
    assert done.returncode == 2
    assert "expected a whole number of num_envs, the factor gives inf" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["lstm", "gru"])
def test_recurrent_calls_agree(memory):
    options = ["--memory", memory, "--num-layers", "2", "--hidden-size", "16", "--steps", "200", "--repeats", "1"]
    done = run("recurrent_calls.py", *options, tiny=["--threads", "1"])
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()[1:]
    assert [line.split(":")[0].split()[0] for line in lines] == ["blocks"] * 4 + ["one", "packed"]
    assert all(float(line.rpartition("off by ")[2]) < 1e-5 for line in lines)


@pytest.mark.slow
def test_peers_are_compared():
    done = run("peers.py", "--workload", "vector", "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    installed = importlib.util.find_spec("sb3_contrib") is not None
    assert [row["library"] for row in rows] == ["dualhead", *(["sb3-contrib"] if installed else []), "single file"]
    assert installed or "pip install -e '.[bench]'" in done.stderr
    assert all(row["steps_per_s"] > 0 for row in rows)


@pytest.mark.slow
def test_a_long_run_is_told_part_by_part():
    done = run("level.py", "--workload", "vector", "--total-steps", "25000", "--parts", "3", "--threads", "1", tiny=[])
    assert done.returncode == 0, done.stderr
    header, *parts = (line.split() for line in done.stdout.splitlines())
    assert header == ["steps", "steps/s", "MiB"]
    assert [steps for steps, _, _ in parts] == ["8,192", "16,384", "24,576"]
    assert all(float(number.replace(",", "")) > 100 for part in parts for number in part)
    refused = run("level.py", "--workload", "vector", "--total-steps", "20000", "--parts", "3", tiny=[])
    assert "an update of 8192 steps for each part" in refused.stderr


@pytest.mark.slow
def test_versions_are_compared_to_the_bit(tmp_path):
    here = BENCHMARKS.parent
    other = tmp_path / "other"
    for folder in ("src", "benchmarks"):
        shutil.copytree(here / folder, other / folder)
    options = ["--turns", "1", "--threads", "1", "--workload", "vector"]
    for change, verdict in ((0, "bit-identical weights"), (1e-5, "weights differ")):
        source = (here / "src" / "dualhead" / "learning" / "losses.py").read_text()
        assert source.count("return error.mean()") == 1
        changed = source.replace("return error.mean()", f"return error.mean() * {1 + change}")
        (other / "src" / "dualhead" / "learning" / "losses.py").write_text(changed)
        done = run("versions.py", str(here), str(other), *options, tiny=[])
        assert done.returncode == 0, done.stderr
        *lines, last = done.stdout.splitlines()
        assert last == verdict
        assert [line.split(":")[0] for line in lines] == [str(here), str(other)]
        assert "1.000 of the first version's time" in lines[0]
    refused = run("versions.py", str(here), str(tmp_path), *options, tiny=[])
    assert refused.returncode == 2
    assert str(tmp_path) in refused.stderr


def test_untouched_learners_are_compared_at_equal_steps_and_seconds(tmp_path):
    """By hand: sb3-contrib needs 200,000 / 100 = 2,000 s; ours, at 1,000 steps/s, is at 600,000 before that."""
    files = {
        "sb3": "env,kind,num_steps,seed,return_mean\nA,training,1,0,9\nA,greedy,200704,0,1\nA,greedy,200704,1,3\n"
        "B,greedy,200704,0,5\nC,greedy,200704,0,5\n",
        "ours": "env,condition,seed,num_steps,return_mean\n"
        + "".join(f"A,x,{seed},{n},{n // 100_000 + seed}\n" for n in (200_704, 600_064, 2_100_000) for seed in (0, 2))
        + "C,x,0,200704,6\n",
        "speed": "env,rounds,ours_steps_per_s,sb3_steps_per_s\nA,3,1000,100\n",
    }
    for name, text in files.items():
        (tmp_path / f"untouched_{name}.csv").write_text(text)
    done = run("untouched.py", "--results", str(tmp_path), "table", tiny=[])
    assert done.returncode == 0, done.stderr
    # t(0.975, 1) = 12.706; returns 1 and 3 deviate by 1.414.
    assert done.stdout.splitlines()[2:] == [
        "| A | 200,704 | 2.000 ± 12.706 | 3.000 ± 12.706 | 2,007 | 201 | 7.000 ± 12.706 at 600,064 (600 s) |",
        "| C | 200,704 | 5.000 (one seed) | 6.000 (one seed) | – | – | – |",  # no run of ours of B, no speed of C
    ]


def test_the_costs_of_recurrent_calls_are_fitted(monkeypatch):
    """From made times: a call takes 300 µs, a time step 20 µs, a row 5 µs."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("recurrent_calls")
    clock = itertools.count()
    shapes = list(itertools.product((1, 2, 4, 8, 16, 32), (8, 16, 52, 128)))

    def time_of_call():
        turn, ends = divmod(next(clock), 2)
        segments, steps = shapes[turn]
        return ends * 1e-6 * (300 + 20 * steps + 5 * segments * steps)

    monkeypatch.setattr(module.time, "perf_counter", time_of_call)
    memory = module.RecurrentMemory("gru", 2, hidden_size=2, num_layers=1)
    assert module.fit_costs(memory, 2, repeats=1) == pytest.approx([300, 20, 5])
