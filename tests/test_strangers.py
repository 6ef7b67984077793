"""Runs from strangers: their files run no code, lead nowhere else, and are checked before anything is used."""

import importlib
import json
import os
import shutil
import struct
import sys
from pathlib import Path

import pytest
import torch
from saved_runs import save_run

import dualhead
from dualhead import CheckpointError, DualHeadRecurrentPPO, RunConfig, RunError, SettingsError
from dualhead.cli import main
from dualhead.running.checkpoint import checkpoints, read_config, save_checkpoint
from dualhead.running.results import read_run, read_table
from dualhead.storage import read_tensors, write_tensors

CODE = """
import gymnasium
from pathlib import Path
Path("it-ran").touch()
gymnasium.register("Stranger-v0", "gymnasium.envs.classic_control:CartPoleEnv", max_episode_steps=5)
"""


class Watch:
    """Notes what is imported."""

    def __init__(self):
        self.names = []

    def find_spec(self, name, path=None, target=None):
        self.names.append(name)


@pytest.fixture
def imports(monkeypatch):
    watch = Watch()
    monkeypatch.setattr(sys, "meta_path", [watch, *sys.meta_path])
    return watch.names


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run directory with two checkpoints and some rows of metrics, in the working directory."""
    monkeypatch.chdir(tmp_path)
    path = save_run(tmp_path / "run", "CartPole-v1")
    tensors, metadata = read_tensors(checkpoints(path)[0])
    save_checkpoint(path, tensors, metadata | {"num_steps": 8}, keep=2)
    (path / "metrics.csv").write_text("steps,episode/mean_return\n4,1.0\n8,2.0\n")
    return path


@pytest.fixture
def strange(run, tmp_path, monkeypatch):
    """A run that names modules which lie in the working directory."""
    for name in ("stranger_world", "stranger_net"):
        (tmp_path / f"{name}.py").write_text(CODE)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    edit(run, env="stranger_world:Stranger-v0", encoder="stranger_net:Net")
    yield run
    for name in ("stranger_world", "stranger_net"):
        sys.modules.pop(name, None)


def edit(run, **changes):
    path = run / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_run_of_a_stranger_imports_nothing_that_it_names(strange, imports, capsys):
    for command in (["eval"], ["resume", "--total-steps", "1000"], ["eval", "--video", "x.gif"]):
        assert main([command[0], str(strange), *command[1:]]) == 1
        said = capsys.readouterr().err
        assert "stranger_world" in said
        assert "--import stranger_world, or --trust" in said
    pytest.importorskip("plotly")
    assert main(["report", str(strange)]) == 0
    assert "stranger_world" in (strange / "report.html").read_text()
    if importlib.util.find_spec("onnx") is not None:
        assert main(["export", str(strange), "--out", "policy.onnx"]) == 0
    dualhead.load_policy(strange)
    with pytest.raises(RunError, match="stranger_world"):
        dualhead.evaluate(strange)
    with pytest.raises(RunError, match="stranger_world"):
        dualhead.resume(strange, total_steps=1000)
    assert not [name for name in imports if "stranger" in name]
    assert not Path("it-ran").exists()


@pytest.mark.parametrize("env", ["this:Stranger-v0", "..x:Stranger-v0", ":Stranger-v0", "a.b:c:d"])
def test_no_other_spelling_of_a_module_is_imported(env, run, imports):
    sys.modules.pop("this", None)
    edit(run, env=env)
    with pytest.raises(RunError, match="is not imported by itself"):
        dualhead.evaluate(run)
    assert not {"this", "a", "a.b"} & set(imports)


def test_what_the_user_names_is_imported(strange, imports, capsys):
    edit(strange, encoder=None)
    assert main(["eval", str(strange), "--episodes", "1", "--import", "stranger_world"]) == 0
    assert "stranger_world" in imports
    assert Path("it-ran").exists()
    dualhead.evaluate(strange, episodes=1)  # it is imported now


def test_trust_imports_what_the_run_names(strange, imports, capsys):
    edit(strange, encoder=None)
    assert main(["eval", str(strange), "--episodes", "1", "--trust"]) == 0
    assert "stranger_world" in imports
    edit(strange, encoder="stranger_net:Net")
    assert main(["resume", str(strange), "--trust"]) == 1
    assert "stranger_net has no Net" in capsys.readouterr().err


# Links.


@pytest.mark.parametrize(
    "name",
    [".lock", "report.html", "checkpoints", "tensorboard", "config.json", "metrics.csv", "summary.json", "replay.gif"],
)
def test_links_lead_nowhere(name, run, tmp_path, capsys):
    outside, inside = tmp_path / "outside", run / name
    if inside.is_dir():
        shutil.move(inside, outside)
        (outside / ".x.tmp").write_text("precious")
    elif name == "tensorboard":
        outside.mkdir()
    elif inside.exists():
        shutil.move(inside, outside)
    else:
        outside.write_text("precious")
    inside.symlink_to(outside)

    def contents():
        files = [outside] if outside.is_file() else sorted(outside.rglob("*"))
        return {path: path.read_bytes() for path in files}

    before = contents()
    for command in (["resume", "--total-steps", "1000"], ["eval"], ["report"]):
        assert main([command[0], str(run), *command[1:]]) == 1
        assert f"{name} is a symbolic link" in capsys.readouterr().err
    assert contents() == before


def test_a_link_in_the_place_of_a_checkpoint_is_refused(run, tmp_path):
    file = checkpoints(run)[0]
    shutil.move(file, tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RunError, match="is a symbolic link"):
        dualhead.load_policy(run)


def test_the_run_directory_itself_may_be_a_link_and_services_keep_theirs(run, tmp_path):
    (run / "wandb").mkdir()
    (run / "wandb" / "latest-run").symlink_to(run)
    (tmp_path / "link").symlink_to(run)
    assert read_config(tmp_path / "link") == read_config(run)


# Files that are none of ours.


@pytest.mark.parametrize("contents", [b"\xff\xfe\x00", b"", b"[" * 100_000, b"7", b'{"env": "\xff"}'])
def test_settings_that_are_no_text_or_no_json(contents, run):
    (run / "config.json").write_bytes(contents)
    with pytest.raises(RunError, match=r"config.json cannot be read"):
        read_config(run)


@pytest.mark.parametrize(
    "changes",
    [{"seed": 2**64}, {"seed": -1}, {"total_steps": 10**400}, {"total_steps": float("inf")}, {"num_envs": 2**70}],
)
def test_settings_beyond_what_numbers_hold(changes, run):
    edit(run, **changes)
    with pytest.raises(RunError, match=next(iter(changes))):
        read_config(run)
    with pytest.raises(SettingsError, match=next(iter(changes))):
        RunConfig(env="CartPole-v1", **changes)


def test_a_pipe_is_not_waited_for(run):
    (run / "config.json").unlink()
    os.mkfifo(run / "config.json")
    with pytest.raises(RunError, match="not a file"):
        read_config(run)


def test_a_folder_in_the_place_of_a_checkpoint_gives_way_to_the_one_before(run):
    newest, before = checkpoints(run)
    newest.unlink()
    newest.mkdir()
    with pytest.warns(UserWarning, match="not a file; trying the one before it"):
        assert dualhead.running.playing.load_player(run)[1] == before
    save_checkpoint(run, *read_tensors(before), keep=1)
    assert newest.with_suffix(".passed-over").is_dir()


def test_a_terabyte_with_a_genuine_header_is_refused_unread(run):
    file = checkpoints(run)[0]
    with file.open("r+b") as opened:
        opened.truncate(10**12)
    with pytest.raises(CheckpointError, match="has 1000000000000 bytes, its header says"):
        read_tensors(file)


def changed(run, change):
    """Writes the newest checkpoint again, with other contents and the checksum that belongs to them."""
    tensors, metadata = read_tensors(checkpoints(run)[0])
    change(tensors, metadata)
    write_tensors(checkpoints(run)[0], tensors, metadata)


IMPOSSIBLE = {
    "a count beyond float": lambda tensors, metadata: metadata.update(num_steps=10**400),
    "a count of another type": lambda tensors, metadata: metadata.update(num_steps="8"),
    "more streams": lambda tensors, metadata: metadata.update(num_streams=10**9),
    "a wider memory": lambda tensors, metadata: metadata["network"].update(hidden_size=10**9),
    "more layers": lambda tensors, metadata: metadata["network"].update(num_layers=10**9),
    "an unknown entry of a space": lambda tensors, metadata: metadata["action_space"].update(code="import os"),
    "an unknown entry": lambda tensors, metadata: metadata.update(code="import os"),
    "a larger space": lambda tensors, metadata: metadata["observation_space"].update(shape=[10**12]),
    "weights that are no numbers": lambda tensors, metadata: tensors["policy/critic.bias"].fill_(torch.nan),
}


@pytest.mark.parametrize("what", IMPOSSIBLE)
def test_the_checkpoint_before_an_impossible_one_is_used(what, run):
    newest, before = checkpoints(run)
    changed(run, IMPOSSIBLE[what])
    with pytest.raises(CheckpointError, match=r"no valid|no possible|another architecture"):
        DualHeadRecurrentPPO.from_file(newest)
    with pytest.warns(UserWarning, match="trying the one before it"):
        assert dualhead.running.playing.load_player(run)[1] == before


def test_a_summary_that_no_run_wrote_is_not_used(run):
    for contents in ('{"steps": "x"}', '{"steps": 8, "evaluation": {"mean_return": []}}', '{"steps": 1e999}'):
        (run / "summary.json").write_text(contents)
        with pytest.warns(UserWarning, match="no summary of a run"):
            assert read_run(run).summary == {}
    large = {"mean_return": 10**30}
    (run / "summary.json").write_text(json.dumps({"steps": 8, "evaluation": large}))
    assert read_run(run).summary["evaluation"]["mean_return"] == 1e30  # NumPy knows no such whole number


def test_steps_beyond_numbers_are_damaged_rows(tmp_path):
    (tmp_path / "metrics.csv").write_text(f"steps,a\n1,2\n{'9' * 5000},3\n{2**63},4\n5,6\n")
    assert read_table(tmp_path / "metrics.csv").steps.tolist() == [1, 5]


def test_a_header_that_claims_much_costs_nothing(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(struct.pack("<Q", 99_999_999) + b'{"__metadata__":{')
    with pytest.raises(CheckpointError, match="no readable header"):
        read_tensors(path)


def test_crafted_files_are_refused_or_are_what_they_say(monkeypatch):
    """Some hundreds of them; `benchmarks/crafted_files.py` makes as many as asked for."""
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    assert importlib.import_module("crafted_files").main(300, seed=7, limited=False).keys() <= {"refused", "loaded"}
