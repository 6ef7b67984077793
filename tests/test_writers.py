"""Where metrics go: files that a killed run can go on with, full disks, and services that are optional."""

import json
import math
import os
import sys
import warnings
from unittest.mock import MagicMock, call

import numpy as np
import pytest
from full_disk import files_of_at_most
from saved_runs import rows_of
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import dualhead
from dualhead import RunConfig
from dualhead.running.checkpoint import RunError
from dualhead.running.episodes import EpisodeTracker, TrackerState
from dualhead.running.writers import CSVWriter, TensorBoardWriter, make_writers
from dualhead.worlds.streams import StreamStep

CONFIG = RunConfig(env="CartPole-v1", preset="spec", num_envs=8, total_steps=800, seed=3)
LOGGED = {"time/steps_per_s": 10.0, "episode/mean_return": 1.5, "loss/value": math.nan}


def write_row(run_dir, num_steps, metrics, **settings):
    writer = CSVWriter(run_dir, **settings)
    writer.write(num_steps, metrics)
    writer.close()


@pytest.mark.parametrize(
    ("there", "expected"),
    [
        ("steps,a\r\n10,1.0\r\n20,2.0\r\n", "steps,a 10,1.0 20,2.0 25,9.5"),
        ("steps,a\r\n10,1.0\r\n20,2.0\r\n30,3.0\r\n", "steps,a 10,1.0 20,2.0 25,9.5"),
        ("steps,a\n10,1.0\n20,2.0\n30,3", "steps,a 10,1.0 20,2.0 25,9.5"),
        ("steps,a\r\n10,1.0\r\n2", "steps,a 10,1.0 25,9.5"),
        ("steps,b\r\n10,1.0\r\n20,2.0\r\n", "steps,b,a 10,1.0, 20,2.0, 25,,9.5"),
        ("steps,a,b\r\n10,1.0,\r\n", "steps,a,b 10,1.0, 25,9.5,"),
        ('steps,"x,y",a\r\n10,1.0,\r\n', 'steps,"x,y",a 10,1.0, 25,,9.5'),
        ("steps,a\r\n30,1.0\r\n", "steps,a 25,9.5"),
        ("steps,a\r\n", "steps,a 25,9.5"),
        ("steps,", "steps,a 25,9.5"),
        ("", "steps,a 25,9.5"),
        (None, "steps,a 25,9.5"),
    ],
)
def test_a_resumed_run_goes_on_with_its_rows(there, expected, tmp_path):
    """Up to 20 steps: later rows go, and what was cut off; what was not there is begun."""
    if there is not None:
        (tmp_path / "evaluations.csv").write_bytes(there.encode())
    write_row(tmp_path, 25, {"a": 9.5}, name="evaluations.csv", resume_at=20)
    assert (tmp_path / "evaluations.csv").read_text().split() == expected.split()
    assert os.listdir(tmp_path) == ["evaluations.csv"]


def test_a_new_run_begins_its_rows_anew(tmp_path):
    (tmp_path / "metrics.csv").write_text("steps,old\n1,2\n")
    write_row(tmp_path, 5, {"a": 1})
    assert (tmp_path / "metrics.csv").read_text().split() == ["steps,a", "5,1"]


@pytest.mark.parametrize("damaged", ["15,1.0,2.0", "15", "15 1.0", "", "\0\0\0,1.0"])
def test_damaged_rows_are_said_and_left_out(damaged, tmp_path):
    (tmp_path / "metrics.csv").write_text(f"steps,a\n10,1.0\n{damaged}\n20,2.0\n")
    with pytest.warns(UserWarning, match=r"metrics.csv: 1 damaged rows are left out"):
        CSVWriter(tmp_path, resume_at=20).close()
    assert (tmp_path / "metrics.csv").read_text().split() == ["steps,a", "10,1.0", "20,2.0"]


def test_a_file_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "metrics.csv").write_text("name,grade\nA,1\n")
    with pytest.raises(RunError, match=r"metrics.csv is no file of metrics.*'name'"):
        CSVWriter(tmp_path, resume_at=20)
    assert (tmp_path / "metrics.csv").read_text() == "name,grade\nA,1\n"


def test_rows_are_whole_or_not_there_where_the_disk_is_full(tmp_path):
    writer, step = CSVWriter(tmp_path), 0

    def write_on():
        nonlocal step
        while True:
            writer.write(step, {"a": step / 7, "b": 1.0})
            step += 1

    with files_of_at_most(1000):
        with pytest.raises(RunError, match=r"cannot write .*metrics.csv: File too large"):
            write_on()
        # A column more is a new file: also that one there is no room for.
        before = (tmp_path / "metrics.csv").read_bytes()
        with pytest.raises(RunError, match="cannot write"):
            writer.write(step, {"c" * 900: 1.0})
    writer.close()
    assert (tmp_path / "metrics.csv").read_bytes() == before
    assert os.listdir(tmp_path) == ["metrics.csv"]
    assert len(before) > 950
    assert rows_of(tmp_path) == [{"steps": str(n), "a": str(n / 7), "b": "1.0"} for n in range(step)]
    write_row(tmp_path, step, {"a": 0.5, "b": 2.0}, resume_at=step - 1)
    assert (tmp_path / "metrics.csv").read_bytes() == before + f"{step},0.5,2.0\r\n".encode()


def tensorboard_steps(run_dir):
    events = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    return [(event.step, event.value) for event in events.Scalars("episode/mean_return")]


def test_tensorboard_forgets_what_came_after_the_checkpoint(tmp_path):
    first = TensorBoardWriter(tmp_path)
    for step in (100, 200, 300):
        first.write(step, {"episode/mean_return": step / 100})
    assert tensorboard_steps(tmp_path) == [(100, 1.0), (200, 2.0), (300, 3.0)]  # at once: a killed run closes nothing
    second = TensorBoardWriter(tmp_path, resume_at=200)
    second.write(250, {"episode/mean_return": 7.0})
    second.close()
    first.close()
    assert tensorboard_steps(tmp_path) == [(100, 1.0), (200, 2.0), (250, 7.0)]


def test_tensorboard_on_a_full_disk(tmp_path):
    writer, logged = TensorBoardWriter(tmp_path), 0

    def write_on():
        nonlocal logged
        while True:
            writer.write(logged, {"episode/mean_return": float(logged), "a": 1.0})
            logged += 1

    with files_of_at_most(5000), pytest.raises(RunError, match=r"cannot write .*tfevents.*: File too large"):
        write_on()
    assert logged > 20
    assert tensorboard_steps(tmp_path) == [(step, float(step)) for step in range(logged)]
    writer.write(999, {"episode/mean_return": 1.0})
    writer.close()
    assert tensorboard_steps(tmp_path)[logged:] == [(999, 1.0)]
    (tmp_path / "other").mkdir()
    with files_of_at_most(10), pytest.raises(RunError, match="cannot write"):
        TensorBoardWriter(tmp_path / "other")
    with pytest.raises(RunError, match="cannot write"):
        TensorBoardWriter(tmp_path / "nowhere")


@pytest.fixture
def services(monkeypatch):
    """Records the calls of `wandb`, and of the `MlflowClient` of `mlflow`, in the place of both packages."""
    for name in ("WANDB_PROJECT", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    wandb, mlflow, entities = MagicMock(), MagicMock(), MagicMock(Metric=lambda *metric: metric, Param=lambda *p: p)
    for name, module in (("wandb", wandb), ("mlflow", mlflow), ("mlflow.entities", entities)):
        monkeypatch.setitem(sys.modules, name, module)
    client = mlflow.MlflowClient.return_value
    client.get_experiment_by_name.side_effect = lambda name: MagicMock(experiment_id="7") if name == "known" else None
    client.create_experiment.return_value = "8"
    client.create_run.return_value.info.run_id = "run0"
    return wandb, mlflow.MlflowClient


def with_log_to(*names, **changes):
    return CONFIG.model_copy(update={"log_to": names, **changes})


def write_and_close(run_dir, config, num_steps, *, resume_at=None, logged=LOGGED):
    writers = make_writers(config, run_dir, resume_at=resume_at)
    try:
        for writer in writers:
            writer.write(num_steps, logged)
    finally:
        for writer in writers:
            writer.close()
    return [type(writer).__name__ for writer in writers]


def test_a_run_writes_csv_tensorboard_and_progress(tmp_path, capsys):
    assert write_and_close(tmp_path, CONFIG, 100) == ["CSVWriter", "TensorBoardWriter", "ProgressDisplay"]
    assert write_and_close(tmp_path, CONFIG, 150, resume_at=120)[0] == "CSVWriter"
    assert (tmp_path / "metrics.csv").read_text().split()[1:] == ["100,10.0,1.5,nan", "150,10.0,1.5,nan"]
    assert tensorboard_steps(tmp_path) == [(100, 1.5), (150, 1.5)]
    assert "steps       150 / 800" in capsys.readouterr().err


def test_wandb_gets_metrics_and_a_resumed_run_continues_there(services, tmp_path):
    wandb, _ = services
    write_and_close(tmp_path, with_log_to("wandb"), 100)
    settings, run = wandb.init.call_args.kwargs, wandb.init.return_value
    assert (settings["project"], settings["name"]) == ("dualhead", "CartPole-v1 lstm-seed3")
    assert (settings["dir"], settings["config"]["ppo"]["gamma"]) == (str(tmp_path), 0.99)
    assert run.mock_calls == [
        call.define_metric("steps"),
        call.define_metric("*", step_metric="steps"),
        call.log({"steps": 100, "time/steps_per_s": 10.0, "episode/mean_return": 1.5}),
        call.finish(exit_code=0),
    ]
    write_and_close(tmp_path, with_log_to("wandb"), 200, resume_at=100)
    resumed = wandb.init.call_args.kwargs
    assert (resumed["id"], resumed["resume"]) == (settings["id"], "allow")
    (tmp_path / "other").mkdir()
    write_and_close(tmp_path / "other", with_log_to("wandb"), 100)
    assert wandb.init.call_args.kwargs["id"] != settings["id"]


def test_mlflow_gets_metrics_and_a_resumed_run_continues_there(services, tmp_path, monkeypatch):
    _, make_client = services
    client = make_client.return_value
    write_and_close(tmp_path, with_log_to("mlflow"), 100, logged={**LOGGED, "entropy/Wo? (x)": 2.0})
    assert make_client.call_args == call(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    assert client.create_run.call_args_list == [call("8", run_name="CartPole-v1 lstm-seed3")]
    *parameters, logged = client.log_batch.call_args_list
    assert all(len(given.kwargs["params"]) <= 100 for given in parameters)
    pairs = [pair for given in parameters for pair in given.kwargs["params"]]
    assert {("ppo.gamma", "0.99"), ("network.memory", "lstm")} <= set(pairs)
    metrics = {name: (value, step) for name, value, _, step in logged.kwargs["metrics"]}
    assert metrics == {"time/steps_per_s": (10, 100), "episode/mean_return": (1.5, 100), "entropy/Wo_ _x_": (2, 100)}
    assert all(when > 1_600_000_000_000 for _, _, when, _ in logged.kwargs["metrics"])  # milliseconds
    assert client.set_terminated.call_args == call("run0", status="FINISHED")
    write_and_close(tmp_path, with_log_to("mlflow"), 200, resume_at=100)
    assert client.create_run.call_count == 1
    assert client.update_run.call_args == call("run0", status="RUNNING")
    assert client.log_batch.call_args.args == ("run0",)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://elsewhere")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "known")
    write_and_close(tmp_path, with_log_to("mlflow"), 300, resume_at=200)
    assert make_client.call_args == call(tracking_uri="https://elsewhere")
    assert client.create_run.call_args.args == ("7",)


def test_a_failed_run_is_a_failed_run_there_too(services, tmp_path):
    wandb, make_client = services
    with pytest.raises(KeyError, match="time/steps_per_s"):  # the progress line needs it
        write_and_close(tmp_path, with_log_to("wandb", "mlflow"), 100, logged={"a": 1.0})
    assert wandb.init.return_value.finish.call_args == call(exit_code=1)
    assert make_client.return_value.set_terminated.call_args == call("run0", status="FAILED")


def test_a_service_that_fails_is_warned_of_once_and_ends_no_run(services, tmp_path):
    wandb, make_client = services
    writers = make_writers(with_log_to("wandb", "mlflow"), tmp_path)
    for refusing in (wandb.init.return_value.log, make_client.return_value.log_batch):
        refusing.side_effect = ConnectionError("no line")
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for step in range(100, 400, 100):
            for writer in writers:
                writer.write(step, LOGGED)
        wandb.init.return_value.finish.side_effect = ConnectionError("no line")
        for writer in writers:
            writer.close()
    said = [str(warning.message) for warning in warned]
    refused = ["W&B refused metrics: no line", "MLflow refused metrics: no line"]
    assert said == [*refused, "W&B could not end its run: no line"]
    assert len((tmp_path / "metrics.csv").read_text().split()) == 4


def test_a_service_that_refuses_says_so_before_the_run(services, tmp_path):
    services[0].init.side_effect = ValueError("No API key configured.")
    with pytest.raises(RunError, match=r"cannot begin a run of W&B: No API key configured.*WANDB_MODE=offline"):
        make_writers(with_log_to("wandb"), tmp_path)
    (tmp_path / "wandb.json").write_text("{")
    with pytest.raises(RunError, match=r"cannot read .*wandb.json"):
        make_writers(with_log_to("wandb"), tmp_path, resume_at=100)


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_package_is_said_with_how_to_install_it(name, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda asked: None if asked == name else object())
    with pytest.raises(RunError, match=rf"log_to='{name}' needs .*pip install -e '\.\[{name}\]'"):
        dualhead.train(with_log_to(name, run_dir=str(tmp_path / "run")))
    assert os.listdir(tmp_path) == []


@pytest.mark.filterwarnings("ignore")
def test_the_real_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="the real Weights & Biases is not installed: pip install -e '.[wandb]'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    write_and_close(tmp_path, with_log_to("wandb"), 100)
    write_and_close(tmp_path, with_log_to("wandb"), 200, resume_at=100)
    run_id = json.loads((tmp_path / "wandb.json").read_text())["id"]
    parts = list(tmp_path.glob(f"wandb/offline-run-*-{run_id}/run-{run_id}.wandb"))
    assert parts
    assert all(b"episode/mean_return" in part.read_bytes() for part in parts)


@pytest.mark.filterwarnings("ignore")
def test_the_real_mlflow_in_the_run_directory(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="the real MLflow is not installed: pip install -e '.[mlflow]'")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    write_and_close(tmp_path, with_log_to("mlflow"), 100)
    write_and_close(tmp_path, with_log_to("mlflow"), 200, resume_at=100)
    known = json.loads((tmp_path / "mlflow.json").read_text())
    client = mlflow.MlflowClient(tracking_uri=known["tracking_uri"])
    run = client.get_run(known["run_id"])
    assert (run.info.status, run.data.params["ppo.gamma"]) == ("FINISHED", "0.99")
    history = client.get_metric_history(known["run_id"], "episode/mean_return")
    assert sorted((metric.step, metric.value) for metric in history) == [(100, 1.5), (200, 1.5)]


def test_numbers_of_episodes_by_hand():
    """Only ended episodes count; NaN means that an episode has none; they outlive a resume."""
    tracker = EpisodeTracker(3)

    def step(ended, **numbers):
        tracker.step(StreamStep(None, np.ones(3), np.array(ended), np.zeros(3, bool), None, numbers=numbers))

    step([False, False, False], success=[9, 9, 9])
    step([True, False, True], success=[True, True, False], score=[math.nan, 7, math.nan])
    assert tracker.metrics() == {
        "episode/success": 0.5,
        "episode/mean_return": 2.0,
        "episode/mean_length": 2.0,
        "episode/count": 2,
    }
    step([False, True, False], score=np.array([0.0, 4.0, 0.0]), count=[5, 5, 5])
    step([True, False, False], score=np.array([1.0, 0.0, 0.0]))
    resumed = EpisodeTracker(3)
    resumed.restore(TrackerState.read(json.loads(json.dumps(tracker.state())), source="test"))
    assert resumed.metrics() == tracker.metrics()
    assert (tracker.metrics()["episode/score"], tracker.metrics()["episode/count"]) == (2.5, 4)
    with pytest.raises(ValueError, match="'score'"):
        step([True, True, True], score=[1.0, 2.0])
