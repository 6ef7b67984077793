"""Studies: the plan, measures against numbers by hand, tables, figures; the file; runs that are stopped and go on."""

import csv
import importlib.metadata
import itertools
import json
import math
import os
import signal
import threading
from contextlib import closing
from pathlib import Path

import numpy as np
import psutil
import pytest
from processes import COMMAND, is_alive, started, wait_until

from dualhead.cli import main
from dualhead.running.checkpoint import RunError, checkpoints
from dualhead.running.config import RunConfig, preset_settings, tuned_settings
from dualhead.running.results import Run, Table, interval, last_steps, read_run
from dualhead.running.trainer import resume, train
from dualhead.studies import figures, tables
from dualhead.studies.commons_measures import closed_form, spans
from dualhead.studies.config import StudyConfig
from dualhead.studies.files import study_names
from dualhead.studies.measures import (
    chosen_measures,
    curves_among,
    measure,
    measures_of,
    summarise,
)
from dualhead.studies.processes import OUTPUT, run_all
from dualhead.studies.study import plan, read_study, safe_name

NAN = math.nan
POLES = ("CartPole-v1", "dualhead/CartPoleNoVel-v1")


def poles(**more):
    """Two environments, two conditions, two seeds."""
    conditions = {"lstm": {}, "none": {"network": {"memory": "none"}}}
    return StudyConfig(**{"environments": POLES, "conditions": conditions, "seeds": (0, 1)} | more)


def made_run(study, columns, condition="lstm", seed=0, env=POLES[0], **summary):
    """A run of updates of 100 steps."""
    columns = {name: np.array(values, dtype=float) for name, values in columns.items()}
    steps = 100 * np.arange(1, 1 + len(next(iter(columns.values()))))
    config = study.run(condition, seed, "nowhere", env=env)
    return Run(Path("nowhere"), config, Table(steps, columns), Table(steps[:0], {}), summary, condition)


def cells(path):
    with path.open() as file:
        return list(csv.DictReader(file))


# The plan.


def test_a_plan_has_every_environment_condition_and_seed():
    planned = plan(poles(), Path("out"))
    assert {label: config.run_dir for label, config in planned.items()} == {
        f"{env} {condition} seed {seed}": f"out/{folder}/{condition}/seed{seed}"
        for env, folder in zip(POLES, ("CartPole-v1", "dualhead-CartPoleNoVel-v1"))
        for condition in ("lstm", "none")
        for seed in (0, 1)
    }
    for label, config in planned.items():
        assert label == f"{config.env} {config.network.memory} seed {config.seed}"
        assert (config.num_threads, config.eval_episodes) == (1, RunConfig(env="X").eval_episodes)
    with pytest.raises(RunError, match="environments: two of a/b, a-b would have the same folder"):
        plan(poles(environments=("a/b", "a-b")), Path("out"))


def test_a_plan_of_the_commons_has_no_folder_for_its_environment():
    planned = plan(read_study("norms"), Path("out"))
    assert len(planned) == 4 * 5
    config = planned["weak-norms seed 3"]
    assert config.run_dir == "out/weak-norms/seed3"
    assert (config.env, config.seed, config.num_threads, config.eval_episodes) == ("commons", 3, 1, 0)
    assert (config.total_steps, config.norms.intrinsic_scale, config.norms.decay_rate) == (256_000, -0.5, 0.999)


def test_settings_of_a_condition_win_over_those_of_its_environment_and_these_over_base():
    ppo = [{"gamma": gamma, "gae_lambda": gamma, "clip_coef": gamma} for gamma in (0.5, 0.6)]
    del ppo[1]["clip_coef"]
    study = poles(
        base={"preset": "spec", "total_steps": 5000, "num_envs": 2, "ppo": ppo[0]},
        environments={POLES[0]: {}, POLES[1]: {"total_steps": 6000, "ppo": ppo[1]}},
        conditions={"plain": {}, "other": {"ppo": {"gamma": 0.7}}},
    )
    for env, condition, expected in (
        (POLES[0], "plain", (5000, 0.5, 0.5, 0.5)),
        (POLES[0], "other", (5000, 0.7, 0.5, 0.5)),
        (POLES[1], "plain", (6000, 0.6, 0.6, 0.5)),
        (POLES[1], "other", (6000, 0.7, 0.6, 0.5)),
    ):
        config = study.run(condition, 0, "", env=env)
        assert (config.total_steps, config.ppo.gamma, config.ppo.gae_lambda, config.ppo.clip_coef) == expected


def test_a_condition_changes_what_it_names_and_no_more():
    base = {"world": {"harms": {"A": 1.0, "B": 2.0}, "resources": ["A", "B"], "form": "bandit"}}
    changed = {"world": {"harms": {"B": 3.0, "A": 0.0}}, "enforce_norms": True}
    study = StudyConfig(base=base, conditions={"plain": {}, "other": changed})
    plain, other = study.run("plain", 3, "p"), study.run("other", 4, "o")
    assert (plain.env, plain.seed, plain.run_dir, plain.enforce_norms) == ("commons", 3, "p", False)
    assert (other.world.harms, other.world.form, other.enforce_norms) == ({"A": 0.0, "B": 3.0}, "bandit", True)


def test_tuned_settings_lie_below_those_of_the_study():
    env, tuned = POLES[1], tuned_settings(POLES[1])
    study = poles(base={"env": env, "total_steps": 9000}, environments={env: {}}, conditions={
        "tuned": {"preset": "tuned", "ppo": {"num_epochs": 3}}, "spec": {"preset": "spec"}, "plain": {}
    })  # fmt: skip
    config, spec, plain = (study.run(name, 0, "") for name in ("tuned", "spec", "plain"))
    assert (config.total_steps, config.ppo.num_epochs) == (9000, 3)
    assert config.ppo.learning_rate == tuned["ppo"]["learning_rate"] != spec.ppo.learning_rate
    assert config.network.hidden_size == tuned["network"]["hidden_size"] != spec.network.hidden_size
    given = {"env": env, "total_steps": 9000, "num_threads": 1, "run_dir": ""}
    assert (spec, plain) == (RunConfig(preset="spec", **given), RunConfig(**given))


def test_the_studies_of_tuned_tasks_train_as_the_command_line_does():
    """`learning` and `recall_cue` differ from `dualhead train` in what their conditions say, and in threads."""
    for name in ("learning", "recall_cue"):
        for config in plan(read_study(name), Path("out")).values():
            changed = {"memory": config.network.memory, "sequence_length": config.ppo.sequence_length}
            tuned = preset_settings("tuned", config.env)
            network = tuned["network"] | {"memory": changed["memory"]}
            ppo = tuned["ppo"] | {"sequence_length": changed["sequence_length"]}
            given = {"env": config.env, "seed": config.seed, "run_dir": config.run_dir, "num_threads": 1}
            given["preset"] = "tuned"
            assert config == RunConfig(**tuned | given | {"network": network, "ppo": ppo})
    recall = {label.partition(" ")[0]: config for label, config in plan(read_study("recall_cue"), Path("x")).items()}
    assert {name: (config.network.memory, config.ppo.sequence_length) for name, config in recall.items()} == {
        "lstm-segments-of-32": ("lstm", 32),
        "gru-segments-of-32": ("gru", 32),
        "lstm-one-step-slices": ("lstm", 1),
        "no-memory": ("none", 32),
    }


@pytest.mark.parametrize(
    ("env", "folder"),
    [
        ("dualhead/CartPoleNoVel-v1", "dualhead-CartPoleNoVel-v1"),
        ("my_worlds.grid:Maze-v0", "my_worlds.grid-Maze-v0"),
        ("../../etc", "-..-etc"),
        ("..", "-"),
        ("C:\\é", "C---"),
    ],
)
def test_folders_of_environments_are_safe(env, folder):
    assert safe_name(env) == folder


# Measures.


def test_a_column_becomes_the_mean_of_the_last_tenth_and_a_time_the_median():
    """Of 25 updates the last three count; what is missing among them does not."""
    columns = {
        "loss": [0.0] * 22 + [1.0, NAN, 4.0],
        "time/steps_per_s": [NAN] + [10.0] * 13 + [90.0] * 11,
        "empty": [NAN] * 25,
        "evaluation/mean_return": [8.0] * 25,
    }
    run = made_run(poles(), columns, steps_per_s=7.0)
    names = ["loss", "time/steps_per_s", "steps_per_s", "empty", "evaluation/mean_return", "nothing"]
    assert measure(run, names).values == {"loss": 2.5, "time/steps_per_s": 10.0, "steps_per_s": 7.0}
    evaluated = run._replace(summary={"evaluation": {"mean_return": 3.0}})
    assert measure(evaluated, ["evaluation/mean_return"]).values == {
        "evaluation/mean_return": 3.0
    }  # the final one, not one on the way


def test_a_run_has_columns_and_the_numbers_of_its_summary(tmp_path):
    (tmp_path / "metrics.csv").write_text("steps,loss,late\n80,1.5,\n160,0.5,2\n")
    summary = {"env": "X", "seed": 3, "stopped_early": False, "steps": 160, "seconds": 2.5}
    (tmp_path / "summary.json").write_text(json.dumps(summary | {"evaluation": {"mean_return": 9.0}}))
    config = poles(base={"num_envs": 8}).run("lstm", 3, str(tmp_path), env=POLES[0])
    (tmp_path / "config.json").write_text(config.model_dump_json())
    run = read_run(tmp_path, condition="lstm")
    assert (run.config, run.condition) == (config, "lstm")
    assert measures_of(run) == {"steps": 160, "seconds": 2.5, "evaluation/mean_return": 9.0, "loss": 0.5, "late": 2.0}
    np.testing.assert_array_equal(run.column("late"), [NAN, 2.0])
    assert run.steps.tolist() == [80, 160]
    assert run.turns.tolist() == [10, 20]  # of eight environments


def test_a_measure_that_no_run_has_is_refused_with_the_nearest_ones():
    study = poles(measures=("episode/mean_retrun", "loss"))
    runs = [made_run(study, {"episode/mean_return": [1.0]}), made_run(study, {"loss": [1.0]}, condition="none")]
    with pytest.raises(RunError, match=r"mean_retrun.* is no measure .* nearest: episode/mean_return") as raised:
        chosen_measures(study, runs)
    assert "'loss'" not in str(raised.value)
    assert chosen_measures(poles(), runs) == ("episode/mean_return",)  # without evaluations there is that
    assert curves_among(["steps_per_s", "loss"], runs) == ["loss"]
    assert curves_among(["steps_per_s"], runs) == ["episode/mean_return"]


@pytest.mark.parametrize(
    ("values", "low", "high"),
    [
        # 2 ± 4.302653 · 1 / √3
        ([1.0, 2.0, 3.0], 2 - 2.484138, 2 + 2.484138),
        # 30 ± 2.776445 · √250 / √5
        ([10, 20, 30, 40, 50], 30 - 19.632432, 30 + 19.632432),
        ([4.0, 4.0], 4.0, 4.0),
        ([4.0], NAN, NAN),
        ([4.0, math.inf], NAN, NAN),
    ],
)
def test_intervals_are_students(values, low, high):
    assert interval(np.array(values, dtype=float)) == pytest.approx((low, high), abs=1e-5, nan_ok=True)


@pytest.fixture
def measured():
    """Two environments, two conditions, three seeds; `none` has no return in the second environment."""
    study = poles(seeds=(0, 1, 2), title="Who balances", measures=("evaluation/mean_return", "loss"))
    returns = {(POLES[0], "lstm"): (101.0, 102.0, 103.0), (POLES[0], "none"): (21.0, 22.0, 23.0)}
    returns[POLES[1], "lstm"] = (0.25, 0.5, 0.75)
    runs = []
    for env, condition, seed in itertools.product(POLES, ("lstm", "none"), study.seeds):
        known = {"mean_return": returns[env, condition][seed]} if (env, condition) in returns else {}
        runs.append(
            made_run(study, {"loss": range(500)}, condition, seed, env, steps=50_060, seconds=2.0, evaluation=known)
        )
    return study, [measure(run, study.measures) for run in runs]


def test_the_summary_has_a_row_per_environment_condition_and_measure(measured):
    rows = summarise(measured[1])
    names = [(row["environment"], row["condition"], row["measure"]) for row in rows]
    assert names == [
        (env, condition, name)
        for env in POLES
        for condition in ("lstm", "none")
        for name in ("evaluation/mean_return", "loss")
        if (env, condition, name) != (POLES[1], "none", "evaluation/mean_return")
    ]
    # 0.5 ± 4.302653 · 0.25 / √3
    row = rows[names.index((POLES[1], "lstm", "evaluation/mean_return"))]
    assert list(row.values())[3:] == pytest.approx([0.5, 0.5 - 0.6210345, 0.5 + 0.6210345, 0.25, 0.75, 3], abs=1e-6)


def test_tables_show_a_measure_each_and_every_seed(measured, capsys):
    study, runs = measured
    tables.print_tables(study, runs, summarise(runs), study.measures)
    said = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["CartPole-v1", "102.0", "±", "2.5", "22.0", "±", "2.5"] in said
    assert ["dualhead/CartPoleNoVel-v1", "0.500", "±", "0.621", "–"] in said
    assert ["CartPole-v1", "lstm", "101.0", "102.0", "103.0"] in said
    assert ["none", "21.0", "22.0", "23.0"] in said
    assert ["dualhead/CartPoleNoVel-v1", "lstm", "0.250", "0.500", "0.750"] in said
    assert ["none", "–", "–", "–"] in said


def test_files_have_every_seed_and_curves_that_are_thinned(tmp_path, measured):
    study, runs = measured
    tables.write_csv(tmp_path / "runs.csv", tables.every_seed(runs))
    rows = cells(tmp_path / "runs.csv")
    assert len(rows) == 12
    assert rows[1] == {
        "environment": "CartPole-v1",
        "condition": "lstm",
        "seed": "1",
        "steps": "50060",  # of the whole run, 60 of them after the last update
        "seconds": "2.0",
        "evaluation/mean_return": "102.0",
        "loss": "474.5",  # of updates 450 to 499
    }
    tables.write_csv(tmp_path / "results.csv", tables.results(study, [run for run, _ in runs], ["loss"]))
    rows = cells(tmp_path / "results.csv")
    assert len(rows) == 12 * 167  # every third of 500, and the last one among them
    assert rows[0] == {"environment": "CartPole-v1", "condition": "lstm", "seed": "0", "steps": "200", "loss": "1.0"}
    assert [row["steps"] for row in rows[1:167]] == [str(steps) for steps in range(500, 50_001, 300)]


# The file.


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seeds = [0", "TOML|Unclosed"),
        ("[conditions.a]\n[conditions.a]", "twice|Cannot declare"),
        ("seeds = [1, 1]\n[conditions.a]", "seeds: expected different ones, got \\(1, 1\\)"),
        ("seeds = []\n[conditions.a]", "seeds: "),
        ("seeds = [-1]\n[conditions.a]", "seeds.0: "),
        ("seeds = 3\n[conditions.a]", "seeds: "),
        ("title = 'none'", "conditions: Field required"),
        ("sedes = [1]\n[conditions.a]", "sedes: no such setting"),
        ("[conditions.'a b']", "expected names of at most 100 letters, digits, '-' and '_', got 'a b'"),
        ("[conditions.'']", "expected names of at most 100 letters"),
        ("[conditions.'../a']", "got '../a'"),
        ("harmful = 'Z'\n[conditions.a]", "harmful='Z' is none of condition 'a'"),
        ("[conditions.a]\n[conditions.b.ppo]\ngama = 1", "condition 'b': ppo.gama: no such setting"),
        ("[conditions.b]\ntotal_step = 5", "condition 'b': total_step: no such setting"),
        ("[conditions.b]\nenv = 'CartPole-v1'", "condition 'b': env: .*`environments` lists several"),
        ("environments = ['X']\n[base]\nenv = 'Y'\n[conditions.b]", "condition 'b' in 'X': env: "),
        ("environments = []\n[conditions.b]", "environments: expected one id or several different ones"),
        ("environments = ['X', 'X']\n[conditions.b]", "environments: .* different"),
        ("[environments.X]\nseed = 3\n[conditions.b]", "condition 'b' in 'X': seed: .*`seeds` lists them"),
        ("[environments.X]\npo = 3\n[conditions.b]", "condition 'b' in 'X': po: no such setting"),
        ("measures = ['a', 'a']\n[conditions.b]", "measures: expected different ones"),
        (
            "[base]\nenv = 'X'\n[conditions.b]\npreset = 'tuned'",
            "condition 'b': preset='tuned': nothing was tuned for 'X'",
        ),
        ("[base]\nseed = 4\n[conditions.b]", "condition 'b': seed: .*`seeds` lists them"),
        ("[conditions.b]\nrun_dir = 'x'", "condition 'b': run_dir: .*--out"),
        ("[base]\ntotal_steps = 10\n[conditions.b]", "condition 'b': total_steps=10 ends before the first update"),
    ],
)
def test_impossible_studies_name_the_place(tmp_path, text, message):
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(RunError, match=message) as raised:
        read_study(str(path))
    assert str(raised.value).startswith(f"{path}: ")


def test_studies_that_cannot_be_read(tmp_path, capsys):
    with pytest.raises(
        RunError, match=r"no study 'nowhere.toml': expected a TOML file, or one of .*hidden_level, learning, level_flip"
    ):
        read_study("nowhere.toml")
    with pytest.raises(RunError, match="cannot read the study"):
        read_study(str(tmp_path))
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RunError, match="cannot read the study"):
        read_study(str(tmp_path / "binary.toml"))
    assert main(["study", "nowhere.toml"]) == 1
    assert "error: no study 'nowhere.toml'" in capsys.readouterr().err
    assert main(["study", "norms", "--jobs", "0", "--out", str(tmp_path / "out")]) == 1
    assert "jobs: expected at least 1, got 0" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_study_is_copied_to_be_changed(tmp_path, capsys):
    path = tmp_path / "my.toml"
    assert main(["study", "norms_small", "--copy", str(path)]) == 0
    assert read_study(str(path)) == read_study("norms_small")
    assert main(["study", "norms", "--copy", str(path)]) == 1
    assert "is there already" in capsys.readouterr().err
    assert read_study(str(path)) == read_study("norms_small")
    assert main(["study", "norms", "--copy", str(tmp_path / "no" / "folder.toml")]) == 1


def test_the_studies_that_come_with_the_package():
    """They are possible, and what their comments say of numbers is so."""
    of_the_commons = ["hidden_level", "level_flip", "norms", "norms_small"]
    planned = {name: plan(read_study(name), Path("out")) for name in study_names()}
    assert {*of_the_commons, "learning", "recall_cue", "untouched", "development", "confirmation"} <= planned.keys()
    development, confirmation = (
        {config.env for config in planned[name].values()} for name in ("development", "confirmation")
    )
    assert not development & confirmation
    assert len(development) >= 8
    assert len(confirmation) >= 4
    # What is compared with sb3-contrib comes from both sets.
    compared = {config.env for config in planned["untouched"].values()}
    assert compared <= development | confirmation
    assert compared & development
    assert compared & confirmation
    studies = {name: read_study(name) for name in of_the_commons}
    turns = {name: study.base["total_steps"] // (10 * study.base["num_envs"]) for name, study in studies.items()}
    assert turns == {"hidden_level": 8000, "level_flip": 4000, "norms": 1600, "norms_small": 1500}
    for name in ("norms", "norms_small"):
        config = studies[name].run("with-norms", 0, "")
        weak = studies[name].run("weak-norms", 0, "")
        # Above 6 guilt outweighs the gain: from 6 on at once, from 6 / 0.999 after one turn.
        assert closed_form(studies[name], config, 6.0) == 0.0
        assert closed_form(studies[name], config, 6.0 / 0.999) == pytest.approx(1.0)
        assert closed_form(studies[name], weak, 10.0) == 0.0
        assert weak.norms.decay_rate == config.norms.decay_rate == 0.999
        # One of 40 turns where A costs 15 more than B, at the entropy weight as a temperature.
        assert round(1 / (1 + math.exp(15 / config.ppo.entropy_coef[0])), 3) == pytest.approx(1 / 40, abs=0.003)
    newcomers = studies["norms"].run("newcomers", 0, "")
    assert newcomers.turnover.first_turn == spans(newcomers)[0].end == 500
    nets = {
        kind: [rules.values[kind] - rules.punishment * rules.schedule[kind][level] for level in (0, 1, 2, 4, 9)]
        for rules in [studies["level_flip"].run("level-0", 0, "").world]
        for kind in "AB"
    }
    assert nets == {"A": pytest.approx([12.5, 10, 6.25, -1.25, -5]), "B": pytest.approx([10, 8.75, 7.5, 7.5, 5])}
    hidden = studies["hidden_level"].run("lstm", 0, "")
    assert [phase.level for phase in hidden.world.phases] == [0, 9]
    assert ((nets["B"][0] + nets["B"][-1]) / 2, (nets["A"][0] + nets["B"][-1]) / 2) == (7.5, 8.75)
    assert spans(newcomers)[1].punishes is False
    levels = [run.world.phases[0].level for run in (studies["level_flip"].run(f"level-{n}", 0, "") for n in (0, 9))]
    assert levels == [0, 9]


# Runs in processes.

TINY = """
title = "Tiny"
seeds = [0, 1]

[base]
num_envs = 1
total_steps = {steps}
checkpoint_every = 20
world = {{ form = "bandit", num_agents = 2, resources = ["A", "B"], phases = [
    {{ mode = "fixed", level = 9, num_turns = 40 }}, {{ mode = "off" }}] }}
network = {{ memory = "gru", hidden_size = 4, encoder_sizes = [4] }}
ppo = {{ rollout_length = 10, batch_size = 10, num_epochs = 1 }}

[conditions.plain]

[conditions.norms]
enforce_norms = true
"""

POPULATION = """
[conditions.population]
policies = "independent"
enforce_norms = true
turnover = { first_turn = 15, every_turns = 20 }
"""


def tiny_file(tmp_path, steps=160, more=""):
    path = tmp_path / "tiny.toml"
    path.write_text(TINY.format(steps=steps) + more)
    return path


def stamps(out):
    return {path: path.stat().st_mtime_ns for path in sorted(out.glob("*/seed*/metrics.csv"))}


def test_a_study_from_one_command(tmp_path, capsys):
    """Two conditions x two seeds of 80 turns; then nothing is repeated, a new seed is added, a changed file refused."""
    path, out = tiny_file(tmp_path), tmp_path / "out"
    command = ["study", str(path), "--out", str(out), "--jobs", "2"]
    assert main(command) == 0
    said = capsys.readouterr().out
    for name in ("plain seed 0", "plain seed 1", "norms seed 0", "norms seed 1"):
        assert f"{name} done in " in said
    assert "[4/4]" in said
    assert {item.name for item in out.iterdir()} == {
        "plain", "norms", "study.json", "versions.json", "results.csv", "runs.csv", "summary.csv",
        "overview.png", "details.png",
    }  # fmt: skip
    assert (out / "overview.png").read_bytes().startswith(b"\x89PNG")
    rows = cells(out / "results.csv")
    assert len(rows) == 4 * 8
    assert [int(row["turn"]) for row in rows[:8]] == [10, 20, 30, 40, 50, 60, 70, 80]
    assert {row["phase"] for row in rows if int(row["turn"]) <= 40} == {"punishment"}
    assert {row["phase"] for row in rows if int(row["turn"]) > 40} == {"no punishment"}
    for row in rows:
        a, b = float(row["commons/taken/A"]), float(row["commons/taken/B"])
        assert float(row["commons/share/A"]) == pytest.approx(a / (a + b))
        assert (row["norms/strength/A"] == "") == (row["condition"] == "plain")
        assert (float(row["commons/punished/A"]) == 0.0) == (row["phase"] == "no punishment" or a == 0.0)
    assert [row["condition"] for row in cells(out / "summary.csv")] == ["plain"] * 5 + ["norms"] * 7
    assert json.loads((out / "study.json").read_text())["title"] == "Tiny"

    before = stamps(out)
    os.rename(out, tmp_path / "moved")
    (tmp_path / "moved" / "summary.csv").unlink()
    assert main([*command[:3], str(tmp_path / "moved")]) == 0
    said = capsys.readouterr().out
    assert "4 of 4 runs are finished already" in said
    assert "done in" not in said
    assert list(stamps(tmp_path / "moved").values()) == list(before.values())
    assert (tmp_path / "moved" / "summary.csv").exists()
    os.rename(tmp_path / "moved", out)

    path.write_text(path.read_text().replace("seeds = [0, 1]", "seeds = [0, 1, 2]"))
    assert main(command) == 0
    assert "[6/6]" in capsys.readouterr().out
    assert {path: stamp for path, stamp in stamps(out).items() if path in before} == before

    path.write_text(path.read_text().replace("level = 9", "level = 8"))
    assert main(command) == 1
    assert "holds a run of other settings (world): the study was changed since" in capsys.readouterr().err
    assert {path: stamp for path, stamp in stamps(out).items() if path in before} == before


def test_a_run_of_a_study_is_the_run_by_itself(tmp_path):
    """The bits of one that was trained here, without a process of its own."""
    study = read_study(str(tiny_file(tmp_path)))
    alone, config = study.run("norms", 1, str(tmp_path / "alone")), study.run("norms", 1, str(tmp_path / "run"))
    train(alone, show_progress=False)
    assert [problem for _, problem, _ in run_all({"one": config}, jobs=1)] == [None]
    assert timeless(tmp_path / "run") == timeless(tmp_path / "alone")


def timeless(run):
    return [{name: cell for name, cell in row.items() if "time/" not in name} for row in cells(run / "metrics.csv")]


@pytest.mark.parametrize("summary", [None, {"stopped_early": True}], ids=["killed", "stopped"])
def test_a_run_that_was_stopped_is_resumed(tmp_path, capsys, summary):
    """A run with half its steps, a checkpoint and a part of a row after it; no summary, or one of a run that stopped.

    With everything that a run can have: independent learners, some of them newcomers, and norms.
    """
    path = tiny_file(tmp_path, more=POPULATION)
    study = read_study(str(path))
    whole = study.run("population", 0, str(tmp_path / "whole"))
    train(whole, show_progress=False)
    half = tmp_path / "out" / "population" / "seed0"
    train(whole.model_copy(update={"run_dir": str(half), "total_steps": 80}), show_progress=False)
    assert checkpoints(half)[0].name == "step-000000000080.safetensors"
    (half / "config.json").write_text(study.run("population", 0, str(half)).model_dump_json())
    (half / "summary.json").write_text(json.dumps(summary))
    if summary is None:
        (half / "summary.json").unlink()
    with (half / "metrics.csv").open("a") as file:
        file.write("90,1,2")
    assert main(["study", str(path), "--out", str(tmp_path / "out"), "--jobs", "2"]) == 0
    assert "going on from" in (half / OUTPUT).read_text()
    assert "step-000000000080" in (half / OUTPUT).read_text()
    assert timeless(half) == timeless(tmp_path / "whole")
    assert [row["lineage/agent_1"] for row in timeless(half)[1:]] != ["1.0"] * 7
    said = " ".join(capsys.readouterr().out.split())
    assert "[6/6]" in said
    assert "A share of newcomers, no punishment" in said


@pytest.mark.slow
def test_a_failed_run_is_named_and_the_others_finish(tmp_path, capsys):
    path, out = tiny_file(tmp_path), tmp_path / "out"
    (out / "plain").mkdir(parents=True)
    (out / "plain" / "seed1").write_text("a file in the way")
    assert main(["study", str(path), "--out", str(out), "--jobs", "2"]) == 1
    captured = capsys.readouterr()
    assert "plain seed 1 failed after" in captured.out
    assert captured.out.count(" done in ") == 3
    assert "1 of 4 runs failed; the same command repeats them\n  plain seed 1: cannot write" in captured.err
    assert not (out / "summary.csv").exists()
    (out / "plain" / "seed1").unlink()
    assert main(["study", str(path), "--out", str(out)]) == 0
    captured = capsys.readouterr()
    assert "3 of 4 runs are finished already" in captured.out
    assert captured.out.count(" done in ") == 1


POLES_FILE = """
title = "Two poles"
seeds = [0, 1]
environments = ["CartPole-v1", "dualhead/CartPoleNoVel-v1"]
measures = ["evaluation/mean_return", "episode/mean_return"]

[base]
total_steps = 200
num_envs = 2
eval_episodes = 2
network = { hidden_size = 4, encoder_sizes = [4] }
ppo = { rollout_length = 10, batch_size = 20, num_epochs = 1 }

[conditions.lstm]

[conditions.none]
network = { memory = "none" }
"""


def test_a_study_of_two_environments_from_one_command(tmp_path, capsys):
    """Eight runs; then one is lost and alone repeated; then measures are changed and no run is."""
    path, out = tmp_path / "poles.toml", tmp_path / "out"
    path.write_text(POLES_FILE)
    command = ["study", str(path), "--out", str(out), "--jobs", "2"]
    assert main(command) == 0
    assert "dualhead/CartPoleNoVel-v1 none seed 1 done in" in capsys.readouterr().out
    assert {item.name for item in out.iterdir()} == {
        "CartPole-v1", "dualhead-CartPoleNoVel-v1", "study.json", "versions.json", "results.csv", "runs.csv",
        "summary.csv", "curves.png", "final.png",
    }  # fmt: skip
    runs = cells(out / "runs.csv")
    assert len(runs) == 8
    for row in runs:
        folder = out / safe_name(row["environment"]) / row["condition"] / f"seed{row['seed']}"
        summary = json.loads((folder / "summary.json").read_text())
        assert float(row["evaluation/mean_return"]) == summary["evaluation"]["mean_return"]
        last = cells(folder / "metrics.csv")[-1]  # of ten updates
        assert float(row["episode/mean_return"]) == float(last["episode/mean_return"])
        assert row["steps"] == last["steps"] == "200"
    for name in ("curves", "final"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    (made_with,) = json.loads((out / "versions.json").read_text())["runs_were_made_with"]
    assert made_with["torch"] == importlib.metadata.version("torch")
    assert made_with["command"] == f"dualhead study {path}"

    first = {name: (out / name).read_bytes() for name in ("summary.csv", "results.csv")}
    (out / "CartPole-v1" / "none" / "seed1" / "summary.json").unlink()  # as where a kill came before the end
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "7 of 8 runs are finished already" in said
    assert said.count(" done in ") == 1
    assert {name: (out / name).read_bytes() for name in first} == first
    assert len(json.loads((out / "versions.json").read_text())["runs_were_made_with"]) == 1

    path.write_text(POLES_FILE.replace('"episode/mean_return"', '"episode/mean_lenght"'))
    assert main(command) == 1
    captured = capsys.readouterr()
    assert "8 of 8 runs are finished already" in captured.out
    assert "'episode/mean_lenght' is no measure of these runs; the nearest: episode/mean_length" in captured.err
    assert "Traceback" not in captured.err
    path.write_text(POLES_FILE.replace("num_epochs = 1", "num_epochs = 2"))
    assert main(command) == 1
    assert "holds a run of other settings (ppo)" in capsys.readouterr().err


def test_a_misspelt_measure_is_seen_after_the_first_run(tmp_path, capsys):
    path = tmp_path / "poles.toml"
    path.write_text(POLES_FILE.replace("[0, 1]", "[0]").replace("episode/mean_return", "episode/mean_retrun"))
    assert main(["study", str(path), "--out", str(tmp_path / "out"), "--jobs", "1"]) == 1
    errors = capsys.readouterr().err
    assert errors.count("warning: measures: 'episode/mean_retrun' is no measure") == 1
    assert "error: measures: 'episode/mean_retrun' is no measure" in errors
    assert not (tmp_path / "out" / "summary.csv").exists()


def test_the_help_lists_the_studies(capsys):
    with pytest.raises(SystemExit):
        main(["study", "--help"])
    said = capsys.readouterr().out
    assert all(name in said for name in study_names())


def endless(tmp_path):
    """A study whose runs take minutes."""
    return tiny_file(tmp_path, steps=2_000_000)


def num_rows(run):
    path = run / "metrics.csv"
    return len(path.read_text().splitlines()) - 1 if path.exists() else 0


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs process groups")
@pytest.mark.slow
@pytest.mark.parametrize("how", ["ctrl-c", "killed"])
def test_stopping_a_study_stops_its_runs_and_the_next_call_resumes_them(tmp_path, how):
    """Ctrl-C reaches the whole process group; a kill only the parent, whose end its children notice."""
    path, out = endless(tmp_path), tmp_path / "out"
    first = out / "plain" / "seed0"
    command = [*COMMAND, "study", str(path), "--out", str(out), "--jobs", "1"]
    with started(command) as process:
        wait_until(lambda: num_rows(first) > 3, of=process)
        workers = psutil.Process(process.pid).children(recursive=True)
        assert workers
        if how == "ctrl-c":
            os.killpg(process.pid, signal.SIGINT)
        else:
            process.kill()
        _, errors = process.communicate()
        wait_until(lambda: not any(map(is_alive, workers)))
    summary = json.loads((first / "summary.json").read_text())
    assert summary["stopped_early"]
    assert checkpoints(first)[0].name == f"step-{summary['steps']:012d}.safetensors"
    if how == "ctrl-c":
        assert process.returncode == 130
        assert "0 of 4 runs are finished; the same command resumes the rest" in errors
        assert "Traceback" not in errors
    # Resuming is shown on this run alone, because the study would take minutes.
    with started(command) as process:
        wait_until(lambda: num_rows(first) > summary["steps"] // 20, of=process)
        process.send_signal(signal.SIGINT)
        process.communicate()
    newest = first / "checkpoints" / f"step-{summary['steps']:012d}.safetensors"
    assert f"going on from {newest}" in (first / OUTPUT).read_text()
    steps = [int(row["steps"]) for row in timeless(first)]
    assert steps == list(range(20, 20 * len(steps) + 1, 20))


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="a signal of POSIX")
def test_runs_get_the_signal_that_asks_for_a_checkpoint_from_their_parent(tmp_path):
    config = read_study(str(endless(tmp_path))).run("plain", 0, str(tmp_path / "run"))
    config = config.model_copy(update={"total_steps": 2000, "checkpoint_every": 10**9, "save_on": "SIGUSR1"})
    stop = threading.Event()

    def ask():
        wait_until(lambda: num_rows(tmp_path / "run") > 3)
        while not stop.wait(0.2):
            os.kill(os.getpid(), signal.SIGUSR1)

    before, asking = signal.getsignal(signal.SIGUSR1), threading.Thread(target=ask)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # the last one may come after the end
    try:
        asking.start()
        assert [problem for _, problem, _ in run_all({"one": config}, jobs=1)] == [None]
    finally:
        stop.set()
        asking.join()
        signal.signal(signal.SIGUSR1, before)
    assert len(checkpoints(tmp_path / "run")) == 2


def seconds_of_threads(process):
    return [thread.user_time + thread.system_time for thread in process.threads()]


def test_runs_side_by_side_one_of_which_is_killed(tmp_path):
    """At most `jobs` at a time, in each of which one thread does the work."""
    study = read_study(str(endless(tmp_path)))
    runs = {name: tmp_path / name for name in ("short", "long", "last")}
    tasks = {name: study.run("plain", 0, str(path)) for name, path in runs.items()}
    tasks["short"] = tasks["short"].model_copy(
        update={"total_steps": 1000}
    )  # some seconds, in which no third may start
    with closing(run_all(tasks, jobs=2)) as outcomes:
        assert next(outcomes)[:2] == ("short", None)
        wait_until(lambda: num_rows(runs["long"]) > 3)
        process = psutil.Process(int((runs["long"] / ".lock").read_text().split()[1]))
        wait_until(lambda: sum(seconds_of_threads(process)) > 0.5)
        assert max(seconds_of_threads(process)) > 0.9 * sum(seconds_of_threads(process))
        assert not runs["last"].exists()  # it begins when the next outcome is asked for
        process.kill()
        name, problem, _ = next(outcomes)
        assert name == "long"
        assert "killed by signal 9" in problem
        assert str(runs["long"] / OUTPUT) in problem
        wait_until(lambda: num_rows(runs["last"]) > 3)
        process = psutil.Process(int((runs["last"] / ".lock").read_text().split()[1]))
    wait_until(lambda: not is_alive(process))
    assert json.loads((runs["last"] / "summary.json").read_text())["stopped_early"]
    steps = int(checkpoints(runs["long"])[0].stem.removeprefix("step-"))
    assert resume(runs["long"], total_steps=steps + 40, show_progress=False).summary["steps"] == steps + 40


def test_a_long_error_message_does_not_block_the_process_that_reports_it(tmp_path):
    """A pipe takes 64 kB, and nobody reads from it until the process has ended."""
    config = RunConfig(env="dualhead/" + "x" * 200_000, run_dir=str(tmp_path / "run"))
    ((_, problem, _),) = run_all({"one": config}, jobs=1)
    assert problem.startswith("unknown environment 'dualhead/xxx")
    assert "x" * 200_000 in (tmp_path / "run" / OUTPUT).read_text()


# Figures.


def test_rolling_means_leave_out_what_is_not_there():
    means = figures.rolling_mean(np.array([1.0, 3.0, 5.0, NAN, 2.0, 4.0]), 2)
    np.testing.assert_allclose(means, [NAN, 2.0, 4.0, NAN, NAN, 3.0])
    np.testing.assert_allclose(figures.rolling_mean(np.array([1.0, 2.0]), 3), [NAN, NAN])


def test_curves_and_final_values_have_axes_for_each_environment(measured):
    study, runs = measured
    blue, red = figures.COLOURS[:2]
    curves = figures.curves(study, [run for run, _ in runs], "loss")
    assert [axes.get_title(loc="left") for axes in curves.axes] == list(POLES)
    for axes in curves.axes:
        assert [line.get_color() for line in axes.lines] == [blue, red]
        # Means over two of 500 updates: the first is of losses 0 and 1, at 200 steps.
        assert np.stack(axes.lines[0].get_data(), 1)[[0, -1]].tolist() == [[200, 0.5], [50_000, 498.5]]
    final = figures.final(study, runs, "evaluation/mean_return")
    assert [len(axes.collections) for axes in final.axes] == [2, 1]  # `none` has no return in the second
    assert sorted(final.axes[1].collections[0].get_offsets()[:, 1]) == [0.25, 0.5, 0.75]
    low, high = final.axes[1].lines[0].get_ydata()
    assert (low, high) == pytest.approx((0.5 - 0.6210345, 0.5 + 0.6210345), abs=1e-6)
    assert [text.get_text() for text in final.legends[0].texts] == ["lstm", "none"]
    assert final._suptitle.get_text() == "Who balances: evaluation/mean_return"


def test_bands_are_from_the_lowest_to_the_highest_seed_on_a_conditions_own_steps():
    """Conditions may have other rollouts, and seeds whose first episode ends later."""
    study = poles(environments=POLES[:1])
    runs = [made_run(study, {"r": [NAN, 2.0, 4.0]}), made_run(study, {"r": [1.0, 4.0, 8.0]}, seed=1)]
    runs += [made_run(study, {"r": [5.0] * 9}, "none", seed) for seed in (0, 1)]
    (axes,) = figures.curves(study, runs, "r").axes
    assert np.stack(axes.lines[0].get_data(), 1).tolist() == [[200, 3.0], [300, 6.0]]
    assert len(axes.lines[1].get_xdata()) == 9
    edges = {tuple(point) for point in axes.collections[0].get_paths()[0].vertices.tolist()}
    assert edges == {(200, 2.0), (200, 4.0), (300, 4.0), (300, 8.0)}


def test_an_environment_without_values_says_so(measured, tmp_path):
    study, runs = measured
    (tmp_path / "figures").mkdir()
    paths = figures.draw_figures(study, runs, ["nothing"], tmp_path / "figures")
    assert [path.name for path in paths] == ["curves.png", "final.png"]
    figure = figures.final(study, runs, "nothing")
    assert [[text.get_text() for text in axes.texts] for axes in figure.axes] == [["no values"]] * 2


def test_the_last_row_says_how_far_a_run_is(tmp_path):
    path = tmp_path / "metrics.csv"
    assert last_steps(path) == 0
    path.write_text("steps,loss\r\n100,1\r\n200,2\r\n")
    assert last_steps(path) == 200
