"""Places that nobody plans for: no output, other encodings, long names, little room, and files of other runs."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import suppress

import psutil
import pytest
import torch
from full_disk import files_of_at_most
from processes import COMMAND, is_alive, run_process, started, wait_until
from saved_runs import save_run

from dualhead.cli import main
from dualhead.errors import CheckpointError, RunError, RunInUseError, SettingsError
from dualhead.running.checkpoint import checkpoints, locked, read_best, read_newest, save_checkpoint
from dualhead.running.config import RunConfig
from dualhead.running.evaluation import evaluate
from dualhead.running.playing import load_policy
from dualhead.running.report import write_report
from dualhead.running.trainer import resume, train
from dualhead.storage import read_tensors, write_bytes
from dualhead.studies.processes import OUTPUT, run_all
from dualhead.studies.study import run_study

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
STUDY = """
seeds = [0]
[base]
env = "CartPole-v1"
total_steps = 64
num_envs = 2
eval_episodes = 0
network = {hidden_size = 8, encoder_sizes = [8]}
ppo = {rollout_length = 8, batch_size = 8, num_epochs = 1}
[conditions.plain]
"""
LONG = "x" * 300


def train_tiny(run_dir, **changes):
    return train("CartPole-v1", run_dir=str(run_dir), show_progress=False, **TINY | changes).summary


# Output.


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_run_needs_no_standard_streams(tmp_path, closed):
    """No file of the run takes the place of a closed stream either: what libraries print would end in it."""
    command = ["bash", "-c", f'exec "$@" {closed}', "bash", *COMMAND, "train", "CartPole-v1", *OPTIONS]
    done = run_process([*command, "--run-dir", str(tmp_path / "run")])
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 64


def test_a_study_needs_no_standard_streams(tmp_path):
    (tmp_path / "study.toml").write_text(STUDY)
    command = [*COMMAND, "study", str(tmp_path / "study.toml"), "--out", str(tmp_path / "out"), "--jobs", "1"]
    done = run_process(["bash", "-c", 'exec "$@" >&-', "bash", *command])
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "summary.csv").exists()


@pytest.mark.parametrize("encoding", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}])
def test_output_in_ascii_shows_what_it_lacks_as_an_escape(tmp_path, encoding):
    saved = save_run(tmp_path / "rün")
    video = [*COMMAND, "eval", str(saved), "--episodes", "2", "--video", "rün.txt"]
    done = run_process(video, env=os.environ | encoding)
    assert done.returncode == 1
    # Where the name itself was read as ASCII, its two bytes are shown.
    assert re.search(r"r\\(xfc|udcc3\\udcbc)n\.txt: expected a name that ends in \.mp4", done.stderr)


def test_a_study_in_ascii(tmp_path):
    (tmp_path / "study.toml").write_text(STUDY)
    command = [*COMMAND, "study", str(tmp_path / "study.toml"), "--out", str(tmp_path / "ü"), "--jobs", "1"]
    done = run_process(command, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr
    assert "results: " in done.stdout


# Names.


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such a name by themselves")
def test_a_name_that_no_json_can_hold_is_refused_before_training(tmp_path):
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    with pytest.raises(SettingsError, match="run_dir: expected a name in UTF-8"):
        train_tiny(odd)
    assert not os.path.exists(odd)
    (tmp_path / "study.toml").write_text(STUDY)
    with pytest.raises(RunError, match="run_dir: expected a name in UTF-8"):
        run_study(str(tmp_path / "study.toml"), out=odd)
    train_tiny(tmp_path / "run")
    os.rename(tmp_path / "run", odd)  # afterwards it can be played and goes on
    assert len(evaluate(odd, episodes=2).returns) == 2
    checkpoints(odd)[0].unlink()
    assert resume(odd, show_progress=False).summary["steps"] == 64


def test_names_of_300_characters_are_refused_in_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_run(tmp_path / "run")
    (tmp_path / "study.toml").write_text(STUDY)
    (tmp_path / "long.toml").write_text(STUDY.replace("plain", LONG))
    for command in (
        ["train", "CartPole-v1", *OPTIONS, "--run-dir", LONG],
        ["train", LONG],
        ["resume", LONG],
        ["eval", LONG],
        ["report", LONG],
        ["export", LONG],
        ["eval", "run", "--video", f"{LONG}.gif"],
        ["study", "study.toml", "--out", LONG],
        ["study", "study.toml", "--copy", LONG],
        ["study", LONG],
        ["study", "long.toml"],
    ):
        assert main(command) == 1, command
        assert capsys.readouterr().err.splitlines()[0].startswith("error: "), command


def test_a_name_may_be_as_long_as_the_system_takes(tmp_path):
    write_bytes(tmp_path / LONG[:255], b"whole")
    assert (tmp_path / LONG[:255]).read_bytes() == b"whole"


# Run directories.


def test_a_copy_of_a_run_may_lack_empty_folders(tmp_path):
    """A run that was killed before its first checkpoint, copied by a tool that copies files."""
    train_tiny(tmp_path / "whole")
    (tmp_path / "copy").mkdir()
    shutil.copy(tmp_path / "whole" / "config.json", tmp_path / "copy")
    assert resume(tmp_path / "copy", show_progress=False).summary["steps"] == 64
    newest, expected = read_newest(tmp_path / "copy")[1], read_newest(tmp_path / "whole")[1]
    assert all(torch.equal(newest[name], expected[name]) for name in expected if name.startswith("policy/"))


def test_a_run_whose_lock_was_deleted_is_still_locked(tmp_path):
    with locked(tmp_path):
        (tmp_path / ".lock").unlink()
        with pytest.raises(RunInUseError, match="being written by another process"), locked(tmp_path):
            pass
    with locked(tmp_path):
        pass


def test_a_network_that_does_not_fit_into_memory_is_refused(tmp_path, capsys):
    assert main(["train", "CartPole-v1", "--hidden-size", "1000000000", "--run-dir", str(tmp_path / "run")]) == 1
    assert "do not fit into memory: lower hidden_size=1000000000" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# A full disk.


@pytest.mark.skipif(sys.platform != "linux", reason="needs /dev/full")
def test_a_run_of_a_study_says_what_went_wrong_on_a_full_disk(tmp_path):
    """Its own output cannot be written any more either."""
    (tmp_path / OUTPUT).symlink_to("/dev/full")
    config = RunConfig(env="dualhead/Nothing-v0", run_dir=str(tmp_path), **TINY)
    ((_, problem, _),) = run_all({"one": config}, jobs=1)
    assert problem.startswith("unknown environment 'dualhead/Nothing-v0'")


def test_the_copy_of_a_study_can_be_made_again_after_the_disk_was_full(tmp_path, capsys):
    copy = tmp_path / "mine.toml"
    for size in (100, 10**6):
        with files_of_at_most(size):
            assert main(["study", "norms", "--copy", str(copy)]) == int(size == 100)
        assert copy.exists() == (size > 100)
    assert main(["study", "norms", "--copy", str(copy)]) == 1
    assert "is there already" in capsys.readouterr().err


def test_a_report_is_written_whole_or_not_at_all(tmp_path):
    train_tiny(tmp_path / "run")
    page = write_report([tmp_path / "run"], replay=False)
    before = page.read_bytes()
    with files_of_at_most(len(before) // 2), pytest.raises(RunError, match="cannot write the report"):
        write_report([tmp_path / "run"], replay=False)
    assert page.read_bytes() == before
    assert not list(page.parent.glob(".*.tmp"))


# Checkpoints that are whole, and wrong.


@pytest.mark.parametrize(
    ("change", "named"), [({"seed": 1}, "seed=0.*got 1"), ({"ppo": TINY["ppo"] | {"gamma": 0.5}}, "ppo.gamma=")]
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, change, named):
    """It has the same shapes, so nothing else would notice."""
    train_tiny(tmp_path / "ours", eval_every=32)
    train_tiny(tmp_path / "theirs", eval_every=32, **change)
    for path in (tmp_path / "theirs" / "checkpoints").iterdir():
        shutil.copy(path, tmp_path / "ours" / "checkpoints")
    said = rf"{tmp_path / 'ours'}/checkpoints/\S+ is of another run: expected {named}"
    for use in (evaluate, load_policy, read_newest, read_best, lambda run: resume(run, total_steps=128)):
        with pytest.raises(CheckpointError, match=said):
            use(tmp_path / "ours")
    with pytest.raises(CheckpointError, match=said):
        evaluate(tmp_path / "ours" / "checkpoints" / "best.safetensors")


def test_how_long_and_where_a_run_goes_on_may_change(tmp_path):
    train_tiny(tmp_path / "run")
    os.rename(tmp_path / "run", tmp_path / "moved")
    config = json.loads((tmp_path / "moved" / "config.json").read_text())
    config |= {"vectorization": "async", "checkpoint_every": 7, "keep_checkpoints": 9}
    (tmp_path / "moved" / "config.json").write_text(json.dumps(config))
    assert resume(tmp_path / "moved", total_steps=96, show_progress=False).summary["steps"] == 96


def test_weights_that_are_not_finite_are_not_played(tmp_path):
    saved = save_run(tmp_path / "run")
    path, tensors, metadata = read_newest(saved)
    name = next(name for name in tensors if name.startswith("policy/") and tensors[name].is_floating_point())
    tensors[name].view(-1)[0] = math.nan
    save_checkpoint(saved, tensors, metadata, keep=2)
    assert torch.isnan(read_tensors(path)[0][name]).any()
    for use in (evaluate, load_policy):
        with pytest.raises(CheckpointError, match=f"no valid {name}: it holds nan"):
            use(saved)


# The tests themselves.


@pytest.mark.skipif(sys.platform != "linux", reason="needs the environment of other processes")
def test_a_test_that_fails_leaves_no_process():
    """Neither the one that it started nor an orphan of that one in a session of its own."""
    orphan = "import os, time; os.setsid(); print(os.getpid(), flush=True); time.sleep(1000)"
    command = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {orphan!r}]); sys.stdin.read()"
    with suppress(ZeroDivisionError), started([sys.executable, "-c", command], stdin=subprocess.PIPE) as process:
        left = psutil.Process(int(process.stdout.readline()))
        assert is_alive(left)
        raise ZeroDivisionError
    assert process.returncode == -signal.SIGKILL
    wait_until(lambda: not is_alive(left))
