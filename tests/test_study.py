"""Studies: what is measured, against numbers by hand; the file; and runs in processes that are stopped and go on."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest

from dualhead.cli import main
from dualhead.config import RunConfig, StudyConfig, tuned_settings
from dualhead.running.checkpoint import RunError, checkpoints
from dualhead.running.trainer import resume, train
from dualhead.studies import commons_figures, figures, processes, tables
from dualhead.studies.commons_measures import (
    closed_form,
    closed_form_turn,
    measures,
    print_summary,
    results,
    spans,
)
from dualhead.studies.measures import (
    Measured,
    Run,
    chosen_measures,
    curves_among,
    interval,
    measure,
    measure_all,
    read_run,
    summarise,
)
from dualhead.studies.processes import OUTPUT, run_in_processes
from dualhead.studies.study import plan, read_study, safe_name, study_names

PUNISHED_THEN_NOT = ({"mode": "fixed", "level": 9, "num_turns": 40}, {"mode": "off"})


def settings(**commons):
    """One world of 2 agents, 80 turns in rollouts of 10."""
    rules = {"form": "bandit", "num_agents": 2, "resources": ("A", "B"), "phases": PUNISHED_THEN_NOT}
    return {
        "num_envs": 1,
        "total_steps": 160,
        "commons": rules | commons,
        "network": {"memory": "gru", "hidden_size": 4, "encoder_sizes": (4,)},
        "ppo": {"rollout_length": 10, "batch_size": 10, "num_epochs": 1},
    }


def one_study(base=None, conditions=None, **more):
    return StudyConfig(base=base or settings(), conditions=conditions or {"one": {}}, **{"seeds": (0,), **more})


def made_run(study, taken_a, condition="one", seed=0, **columns):
    """A run whose agents took A and B 1 time per turn together, A as given."""
    taken_a = np.array(taken_a, dtype=float)
    known = {"commons/taken/A": taken_a, "commons/taken/B": 1.0 - taken_a, "rollout/task_reward": 10 * taken_a}
    config = study.run(condition, seed, "nowhere")
    steps = 10 * np.arange(1, len(taken_a) + 1) * config.num_streams
    columns = {name.replace("__", "/"): np.array(column, dtype=float) for name, column in columns.items()}
    return Run(condition, config, steps, known | columns, {"seconds": 2.0})


def summarised(study, runs):
    return summarise([Measured(run, measures(study, run)) for run in runs])


NAN = math.nan


# What is measured.


def test_phases_become_spans_of_turns():
    config = one_study().run("one", 0, "")
    assert [(span.name, span.begin, span.end, span.punishes, span.level) for span in spans(config)] == [
        ("punishment", 0, 40, True, 9),
        ("no punishment", 40, 80, False, None),
    ]
    # 190 steps of 2 agents end in turn 95; the last phase, planned for 20 turns, stays until then.
    phases = [{"num_turns": 30}, {"mode": "off", "num_turns": 30}, {"level": 3, "num_turns": 20}]
    config = one_study(settings(phases=phases) | {"total_steps": 190}).run("one", 0, "")
    assert [(span.name, span.begin, span.end) for span in spans(config)] == [
        ("votes (1)", 0, 30),
        ("no punishment", 30, 60),
        ("votes (2)", 60, 95),
    ]
    # A phase that the run does not reach is none of it; a rollout that is begun is finished, so 81 steps are 41 turns.
    config = one_study(settings() | {"total_steps": 80}).run("one", 0, "")
    assert [(span.name, span.end) for span in spans(config)] == [("punishment", 40)]
    config = one_study(settings() | {"total_steps": 81}).run("one", 0, "")
    assert spans(config)[-1].end == 41
    repeated = [{"mode": "off", "num_turns": 5}, {"num_turns": 5}]
    config = one_study(settings(phases=repeated, repeat_phases=True)).run("one", 0, "")
    assert [(span.name, span.begin, span.end) for span in spans(config)] == [("all phases", 0, 80)]


def test_shares_and_rewards_are_those_of_second_halves():
    """Punishment ends with turn 40, so its second half are the rollouts that end in turns 30 and 40."""
    study = one_study()
    found = measures(study, made_run(study, [0.5, 0.4, 0.2, 0.1, 0.1, 0.3, 0.6, 0.8]))
    assert found == pytest.approx(
        {
            "A share, punishment": 0.15,
            "reward, punishment": 1.5,
            "A share, no punishment": 0.7,
            "reward, no punishment": 7.0,
            "turns to relapse": 30.0,  # the rollout that ends in turn 70 is the first above one half
        }
    )
    single = one_study(settings(phases=({"mode": "fixed", "level": 0},)))
    assert measures(single, made_run(single, [0.0] * 4 + [0.25] * 4)) == {"A share": 0.25, "reward": 2.5}


def test_where_nothing_is_taken_there_is_no_share():
    study = one_study()
    run = made_run(study, [0.0] * 8, commons__taken__B=[1, 1, 0, 0, 0, 0, 0, 1])
    found = measures(study, run)
    assert "A share, punishment" not in found
    assert found["A share, no punishment"] == 0.0  # of one rollout; the other says nothing
    assert found["turns to relapse"] == math.inf


def test_relapse_needs_a_rollout_without_any_punishment():
    """The phase ends in turn 45: the rollout of turns 41 to 50 is still half punished."""
    study = one_study(settings(phases=({"mode": "fixed", "num_turns": 45}, {"mode": "off"})))
    assert measures(study, made_run(study, [0, 0, 0, 0, 0.9, 0.1, 0.5, 0.6]))["turns to relapse"] == 80 - 45
    assert measures(study, made_run(study, [0, 0, 0, 0, 0.9, 0.1, 0.5, 0.5]))["turns to relapse"] == math.inf
    never_off = one_study(settings(phases=({"mode": "off", "num_turns": 40}, {"mode": "fixed"})))
    assert "turns to relapse" not in measures(never_off, made_run(never_off, [0.9] * 8))


def test_the_closed_form_stands_beside_the_relapse():
    """Gain 10, scale -10, threshold 5: guilt outweighs above 6. From 8 at decay 0.99, ln(8/6)/-ln(0.99) = 28.62."""
    norms = {"intrinsic_scale": -10.0, "decay_rate": 0.99}
    study = one_study(settings() | {"enforce_norms": True, "norms": norms})
    run = made_run(study, [0.0] * 8, norms__strength__A=[2, 6, 9, 8, 7, 6, 5, 4])
    found = measures(study, run)
    assert found["norm strength at the end of punishment"] == 8.0
    assert found["turns by the closed form"] == pytest.approx(28.62, abs=0.01)
    assert closed_form_turn(study, run) == pytest.approx(68.62, abs=0.01)
    assert "turns by the closed form" not in measures(study, made_run(study, [0.0] * 8))


@pytest.mark.parametrize(
    ("norms", "resources", "turns"),
    [
        ({"intrinsic_scale": -0.5}, ("A", "B"), 0.0),  # at most 2.5 of guilt against a gain of 10
        ({"intrinsic_scale": 0.0}, ("A", "B"), 0.0),  # guilt weighs nothing
        ({"intrinsic_scale": -10.0, "decay_rate": 1.0}, ("A", "B"), math.inf),  # norms that never fade
        ({"intrinsic_scale": -10.0, "decay_rate": 0.99}, ("B", "C", "A"), 28.62),
        ({"intrinsic_scale": -10.0, "decay_rate": 0.99}, ("A",), 13.28),  # 20 against nothing: above 7
    ],
)
def test_closed_form_at_the_edges(norms, resources, turns):
    study = one_study(settings(resources=resources, menu_size=1) | {"enforce_norms": True, "norms": norms})
    assert closed_form(study, study.run("one", 0, ""), 8.0) == pytest.approx(turns, abs=0.01)


def test_a_harmful_resource_without_gain_tempts_nobody_while_the_norm_is_felt():
    study = one_study(harmful="B")
    config = study.run("one", 0, "").model_copy(update={"enforce_norms": True})
    # No gain: any guilt outweighs it, so until the threshold of 5; ln(8/5)/-ln(0.995) = 93.77.
    assert closed_form(study, config, 8.0) == pytest.approx(93.77, abs=0.01)


def test_newcomers_and_incumbents_are_measured_apart():
    study = one_study(settings() | {"turnover": {"first_turn": 40}})
    groups = {
        "newcomers__taken__A": [NAN] * 4 + [0.5, 0.6, 0.9, 0.9],
        "newcomers__taken__B": [NAN] * 4 + [0.5, 0.4, 0.1, 0.1],
        "incumbents__taken__A": [0.1] * 4 + [0.1, 0.1, 0.1, 0.3],
        "incumbents__taken__B": [0.9] * 4 + [0.9, 0.9, 0.9, 0.7],
    }
    found = measures(study, made_run(study, [0.1] * 4 + [0.3, 0.35, 0.5, 0.6], **groups))
    assert found["A share of newcomers, no punishment"] == pytest.approx(0.9)
    assert found["A share of incumbents, no punishment"] == pytest.approx(0.2)
    assert "A share of incumbents, punishment" not in found  # there are no others yet
    assert found["turns to relapse"] == 40
    assert found["turns to relapse, newcomers"] == 20
    assert found["turns to relapse, incumbents"] == math.inf
    nobody_left = groups | {
        "incumbents__taken__A": [0.1] * 4 + [NAN] * 4,
        "incumbents__taken__B": [0.9] * 4 + [NAN] * 4,
    }
    found = measures(study, made_run(study, [0.1] * 8, **nobody_left))
    assert "turns to relapse, incumbents" not in found
    assert "A share of incumbents, no punishment" not in found


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


def test_the_summary_has_a_row_per_condition_and_measure(capsys):
    study = one_study(conditions={"one": {}, "two": {"enforce_norms": True}}, seeds=(0, 1, 2), title="Who relapses")
    late = {0: [0.9, 0.9], 1: [0.9, 0.9], 2: [0.1, 0.1]}
    runs = [made_run(study, [0.1] * 6 + late[seed], "one", seed) for seed in study.seeds]
    strengths = {"norms__strength__A": [0, 0, 0, 3, 3, 3, 3, 3]}
    runs += [made_run(study, [0.01 * (seed + 1)] * 8, "two", seed, **strengths) for seed in study.seeds]
    rows = summarised(study, runs)
    by_name = {(row["condition"], row["measure"]): row for row in rows}
    assert len(by_name) == len(rows) == 5 + 7
    share = by_name["two", "A share, punishment"]
    # 0.02 ± 4.302653 · 0.01 / √3
    assert [share[name] for name in ("mean", "min", "max", "seeds")] == pytest.approx([0.02, 0.01, 0.03, 3])
    assert [share["ci95_low"], share["ci95_high"]] == pytest.approx([0.02 - 0.0248414, 0.02 + 0.0248414], abs=1e-6)
    relapse = by_name["one", "turns to relapse"]
    assert (relapse["min"], relapse["max"], relapse["seeds"]) == (30.0, math.inf, 3)
    print_summary(study, rows)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].strip() == "Who relapses"
    assert max(map(len, lines)) <= 120
    assert next(line.split() for line in lines if "turns to relapse" in line)[3:] == ["30", "to", "never", "never"]
    assert "".join(next(line.split() for line in lines if "A share, punishment" in line)[3:]) == "0.10±0.000.02±0.02"
    assert next(line.split() for line in lines if "norm strength" in line)[-4:] == ["–", "3.00", "±", "0.00"]
    assert "mean of 3 seeds ± half of its 95% interval" in " ".join(" ".join(lines).split())


def test_a_measure_that_some_seeds_lack_is_averaged_over_the_others():
    study = one_study(seeds=(0, 1))
    nothing = {"commons__taken__B": [0.0] * 8}
    runs = [made_run(study, [0.25] * 8), made_run(study, [0.0] * 8, seed=1, **nothing)]
    row = next(row for row in summarised(study, runs) if row["measure"] == "A share, no punishment")
    assert (row["mean"], row["seeds"], math.isnan(row["ci95_low"])) == (0.25, 1, True)


def test_results_of_the_commons_are_tidy(tmp_path):
    """The rollout of turns 41 to 50 begins in one phase and ends in the next: it counts to the one that it ends in."""
    study = one_study(settings(phases=({"mode": "fixed", "num_turns": 45}, {"mode": "off"})))
    runs = [made_run(study, [0.25] * 8), made_run(study, [0.5] * 8, guilt=[NAN, *[-1] * 7])]
    tables.write_csv(tmp_path / "results.csv", *results(study, runs))
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 16
    assert rows[0] == {
        "condition": "one",
        "seed": "0",
        "steps": "20",
        "turn": "10",
        "phase": "punishment",
        "commons/share/A": "0.25",
        "commons/taken/A": "0.25",
        "commons/taken/B": "0.75",
        "rollout/task_reward": "2.5",
        "guilt": "",
    }
    assert [row["phase"] for row in rows[:8]] == ["punishment"] * 4 + ["no punishment"] * 4
    assert [row["guilt"] for row in rows[8:]] == [""] + ["-1.0"] * 7


# The file.


def test_a_condition_changes_what_it_names_and_no_more():
    base = {"total_steps": 9000, "ppo": {"gamma": 0.5, "batch_size": 40}, "commons": {"harms": {"A": 1.0, "B": 2.0}}}
    base["commons"] |= {"resources": ["A", "B"], "form": "bandit"}
    study = StudyConfig(
        base=base,
        conditions={
            "plain": {},
            "other": {"ppo": {"gamma": 0.9}, "commons": {"harms": {"B": 3.0, "A": 0.0}}, "enforce_norms": True},
        },
    )
    plain, other = study.run("plain", 3, "p"), study.run("other", 4, "o")
    assert (plain.env, plain.seed, plain.run_dir, plain.num_threads, plain.eval_episodes) == ("commons", 3, "p", 1, 0)
    assert (plain.ppo.gamma, other.ppo.gamma) == (0.5, 0.9)
    assert plain.ppo.batch_size == other.ppo.batch_size == 40
    assert other.commons.harms == {"A": 0.0, "B": 3.0}
    assert other.commons.form == "bandit"
    assert other.enforce_norms
    assert not plain.enforce_norms


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
        ("sedes = [1]\n[conditions.a]", "sedes: Extra inputs"),
        ("[conditions.'a b']", "expected names of letters, digits, '-' and '_', got 'a b'"),
        ("[conditions.'']", "expected names of letters"),
        ("[conditions.'../a']", "got '../a'"),
        ("harmful = 'Z'\n[conditions.a]", "harmful='Z' is none of condition 'a'"),
        ("[conditions.a]\n[conditions.b.ppo]\ngama = 1", "condition 'b': ppo: gama: Extra inputs"),
        ("[conditions.b]\ntotal_step = 5", "condition 'b': total_step: Extra inputs"),
        ("[conditions.b]\nenv = 'CartPole-v1'", "condition 'b': env: .*`environments` lists several"),
        ("environments = ['X']\n[base]\nenv = 'Y'\n[conditions.b]", "condition 'b' in 'X': env: "),
        ("environments = []\n[conditions.b]", "environments: expected one id or several different ones"),
        ("environments = ['X', 'X']\n[conditions.b]", "environments: .* different"),
        ("[environments.X]\nseed = 3\n[conditions.b]", "condition 'b' in 'X': seed: .*`seeds` lists them"),
        ("[environments.X]\npo = 3\n[conditions.b]", "condition 'b' in 'X': po: Extra inputs"),
        ("measures = ['a', 'a']\n[conditions.b]", "measures: expected different ones"),
        ("[base]\nenv = 'X'\n[conditions.b]\ntuned = true", "condition 'b': tuned: there are no tuned settings"),
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
        RunError, match=r"no study 'nowhere.toml': expected a TOML file, or one of hidden_level, learning, level_flip"
    ):
        read_study("nowhere.toml")
    with pytest.raises(RunError, match="cannot read the study"):
        read_study(str(tmp_path))
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RunError, match="is no TOML file"):
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
    assert study_names() == sorted([*of_the_commons, "learning", "recall_cue"])
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
        for rules in [studies["level_flip"].run("level-0", 0, "").commons]
        for kind in "AB"
    }
    assert nets == {"A": pytest.approx([12.5, 10, 6.25, -1.25, -5]), "B": pytest.approx([10, 8.75, 7.5, 7.5, 5])}
    hidden = studies["hidden_level"].run("lstm", 0, "")
    assert [phase.level for phase in hidden.commons.phases] == [0, 9]
    assert ((nets["B"][0] + nets["B"][-1]) / 2, (nets["A"][0] + nets["B"][-1]) / 2) == (7.5, 8.75)
    assert spans(newcomers)[1].punishes is False
    levels = [run.commons.phases[0].level for run in (studies["level_flip"].run(f"level-{n}", 0, "") for n in (0, 9))]
    assert levels == [0, 9]


# Runs in processes.

TINY = """
title = "Tiny"
seeds = [0, 1]

[base]
num_envs = 1
total_steps = {steps}
checkpoint_every = 20
commons = {{ form = "bandit", num_agents = 2, resources = ["A", "B"], phases = [
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
    with (out / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * 8
    assert [int(row["turn"]) for row in rows[:8]] == [10, 20, 30, 40, 50, 60, 70, 80]
    assert {row["phase"] for row in rows if int(row["turn"]) <= 40} == {"punishment"}
    assert {row["phase"] for row in rows if int(row["turn"]) > 40} == {"no punishment"}
    for row in rows:
        a, b = float(row["commons/taken/A"]), float(row["commons/taken/B"])
        assert float(row["commons/share/A"]) == pytest.approx(a / (a + b))
        assert (row["norms/strength/A"] == "") == (row["condition"] == "plain")
        assert (float(row["commons/punished/A"]) == 0.0) == (row["phase"] == "no punishment" or a == 0.0)
    with (out / "summary.csv").open() as file:
        summary = list(csv.DictReader(file))
    assert [row["condition"] for row in summary] == ["plain"] * 5 + ["norms"] * 7
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
    assert "holds a run of other settings (commons): the study was changed since" in capsys.readouterr().err
    assert {path: stamp for path, stamp in stamps(out).items() if path in before} == before


def test_a_run_of_a_study_is_the_run_by_itself(tmp_path):
    """The bits of one that was trained here, without a process of its own."""
    study = read_study(str(tiny_file(tmp_path)))
    alone, config = study.run("norms", 1, str(tmp_path / "alone")), study.run("norms", 1, str(tmp_path / "run"))
    train(alone, show_progress=False)
    assert [problem for _, problem, _ in run_in_processes({"one": config}, jobs=1)] == [None]
    assert timeless(tmp_path / "run") == timeless(tmp_path / "alone")


def timeless(run):
    with (run / "metrics.csv").open() as file:
        return [{name: cell for name, cell in row.items() if "time/" not in name} for row in csv.DictReader(file)]


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
    assert "1 of 4 runs are missing; the same command goes on with them\n  plain seed 1: cannot write" in captured.err
    assert not (out / "summary.csv").exists()
    (out / "plain" / "seed1").unlink()
    assert main(["study", str(path), "--out", str(out)]) == 0
    captured = capsys.readouterr()
    assert "3 of 4 runs are finished already" in captured.out
    assert captured.out.count(" done in ") == 1


def endless(tmp_path):
    """A study whose runs take minutes, and its first run's files as they appear."""
    return tiny_file(tmp_path, steps=2_000_000)


def children_of(pid):
    """Processes that train for a process: descendants by way of multiprocessing's fork server, too."""
    found, parents = [], {pid}
    listed = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    pairs = [tuple(map(int, line.split())) for line in listed.splitlines()]
    while parents:
        parents = {child for child, parent in pairs if parent in parents}
        found += parents
    return found


def is_alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def begin_study(path, out, jobs=1):
    """Starts the command as a terminal would: in a process group of its own."""
    command = [sys.executable, "-m", "dualhead", "study", str(path), "--out", str(out), "--jobs", str(jobs)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def rows_of(run):
    try:
        return len((run / "metrics.csv").read_text().splitlines()) - 1
    except FileNotFoundError:
        return 0


needs_proc = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks at processes in /proc")


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize("how", ["ctrl-c", "killed"])
def test_stopping_a_study_stops_its_runs_and_the_next_call_goes_on(tmp_path, how):
    """Ctrl-C reaches the whole process group; a kill only the parent, whose end its children notice."""
    path, out = endless(tmp_path), tmp_path / "out"
    first = out / "plain" / "seed0"
    process = begin_study(path, out)
    wait_until(lambda: rows_of(first) > 3)
    workers = children_of(process.pid)
    assert workers
    if how == "ctrl-c":
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.kill()
    _, errors = process.communicate(timeout=60)
    wait_until(lambda: not any(map(is_alive, workers)), seconds=20)
    summary = json.loads((first / "summary.json").read_text())
    assert summary["stopped_early"]
    assert checkpoints(first)[0].name == f"step-{summary['steps']:012d}.safetensors"
    if how == "ctrl-c":
        assert process.returncode == 130
        assert "0 of 4 runs are finished; the same command goes on" in errors
        assert "Traceback" not in errors
    # The next call goes on with it: shown on the run alone, for the study has minutes to go.
    process = begin_study(path, out)
    wait_until(lambda: rows_of(first) > summary["steps"] // 20)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert f"going on from {checkpoints_before(first, summary)}" in (first / OUTPUT).read_text()
    steps = [int(row["steps"]) for row in timeless(first)]
    assert steps == list(range(20, 20 * len(steps) + 1, 20))


def checkpoints_before(run, summary):
    return run / "checkpoints" / f"step-{summary['steps']:012d}.safetensors"


@needs_proc
def test_a_killed_worker_is_named_and_the_next_call_goes_on(tmp_path):
    path, out = endless(tmp_path), tmp_path / "out"
    study = read_study(str(path))
    configs = {seed: study.run("plain", seed, str(out / str(seed))) for seed in (0, 1)}
    configs[1] = configs[1].model_copy(update={"total_steps": 60})
    outcomes = {}
    for key, problem, _ in run_in_processes(configs, jobs=2):
        outcomes[key] = problem
        if key == 1:
            wait_until(lambda: rows_of(out / "0") > 3)
            pid = int((out / "0" / ".lock").read_text().split()[1])
            os.kill(pid, signal.SIGKILL)
    assert outcomes[1] is None
    assert "killed by signal 9" in outcomes[0]
    assert str(out / "0" / OUTPUT) in outcomes[0]
    done = checkpoints(out / "0")
    config = configs[0].model_copy(update={"total_steps": 0})
    assert config.run_dir
    steps = int(done[0].stem.removeprefix("step-"))
    summary = resume(out / "0", total_steps=steps + 40, show_progress=False)
    assert summary["steps"] == steps + 40


@pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="the alarm ends what would wait for ever")
def test_a_long_complaint_does_not_block_the_process_that_has_it(tmp_path):
    """A pipe takes 64 kB, and nobody reads from it until the process has ended."""

    def too_late(*_):
        raise TimeoutError

    config = RunConfig(env="dualhead/" + "x" * 200_000, run_dir=str(tmp_path / "run"))
    before = signal.signal(signal.SIGALRM, too_late)
    signal.alarm(40)
    try:
        ((_, problem, _),) = run_in_processes({"one": config}, jobs=1)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert problem.startswith("unknown environment 'dualhead/xxx")
    assert "x" * 200_000 in (tmp_path / "run" / OUTPUT).read_text()


def test_workers_have_one_thread_and_at_most_jobs_run_at_once(tmp_path):
    """The process of a run, while it trains, has torch's own thread and the one that watches its parent."""
    study = read_study(str(endless(tmp_path)))
    configs = {seed: study.run("plain", seed, str(tmp_path / str(seed))) for seed in (0, 1, 2)}
    configs[0] = configs[0].model_copy(update={"total_steps": 60})
    outcomes = run_in_processes(configs, jobs=2)
    assert next(outcomes)[:2] == (0, None)
    wait_until(lambda: rows_of(tmp_path / "1") > 3)
    pid = int((tmp_path / "1" / ".lock").read_text().split()[1])
    assert psutil.Process(pid).num_threads() == 2
    assert not (tmp_path / "2").exists()  # the third begins when the second is asked for
    outcomes.close()
    wait_until(lambda: not is_alive(pid), seconds=20)
    assert json.loads((tmp_path / "1" / "summary.json").read_text())["stopped_early"]


# Figures.


def test_rolling_means_leave_out_what_is_not_there():
    means = figures.rolling_mean(np.array([1.0, 3.0, 5.0, NAN, 2.0, 4.0]), 2)
    np.testing.assert_allclose(means, [NAN, 2.0, 4.0, NAN, NAN, 3.0])
    np.testing.assert_allclose(figures.rolling_mean(np.array([1.0, 2.0]), 3), [NAN, NAN])


def drawn_lines(figure, number=0):
    """Curves of one pair of axes: (colour, style) -> points; marks and guide lines have few."""
    lines = [line for line in figure.axes[number].lines if len(line.get_xdata()) > 2]
    return {(line.get_color(), line.get_linestyle()): np.stack(line.get_data(), 1) for line in lines}


def test_the_overview_shows_means_phases_groups_and_the_closed_form():
    norms = {"enforce_norms": True, "norms": {"intrinsic_scale": -10.0, "decay_rate": 0.99}}
    conditions = {"plain": {}, "new": norms | {"turnover": {"first_turn": 40}}}
    study = one_study(conditions=conditions, seeds=(0, 1), title="Who relapses")
    after = {"newcomers__taken__A": [NAN] * 4 + [0.8] * 4, "newcomers__taken__B": [NAN] * 4 + [0.2] * 4}
    after |= {"incumbents__taken__A": [0.1] * 8, "incumbents__taken__B": [0.9] * 8}
    after |= {"norms__strength__A": [8.0] * 8}
    runs = [made_run(study, [0.2 + 0.2 * seed] * 8, "plain", seed) for seed in (0, 1)]
    runs += [made_run(study, [0.5] * 8, "new", seed, **after) for seed in (0, 1)]
    figure = commons_figures._overview(study, runs)
    blue, red = figures.COLOURS[:2]
    lines = drawn_lines(figure)
    assert lines.keys() == {(blue, "-"), (red, "-"), (red, ":"), (red, "--")}
    np.testing.assert_allclose(lines[blue, "-"], [[turn, 0.3] for turn in range(10, 81, 10)])
    np.testing.assert_allclose(lines[red, ":"], [[turn, 0.8] for turn in (50, 60, 70, 80)])
    np.testing.assert_allclose(lines[red, "--"], [[turn, 0.1] for turn in (50, 60, 70, 80)])
    marks = [line.get_xdata()[0] for line in figure.axes[0].lines if line.get_marker() == "v"]
    assert marks == pytest.approx([68.62], abs=0.01)  # as by hand above
    assert [text.get_text() for text in figure.axes[0].texts] == ["punishment at level 9", "no punishment"]
    shaded = figure.axes[0].patches
    assert [(patch.get_x(), patch.get_width()) for patch in shaded] == [(0, 40)]
    assert [text.get_text() for text in figure.legends[0].texts][:2] == ["plain", "new"]
    assert "closed form" in figure.legends[0].texts[-1].get_text()
    assert figure._suptitle.get_text() == "Who relapses: how often A is taken"


def test_details_leave_out_what_has_nothing_to_show():
    """A fixed level, and votes that do nothing; no guilt without norms."""
    study = one_study()
    votes = {"commons__votes__up": [0.1, 0.2] * 4, "commons__votes__down": [0.3] * 8, "commons__level": [1.0] * 8}
    runs = [made_run(study, [0.1, 0.2] * 4, **votes)]
    titles = [axes.get_title(loc="left") for axes in commons_figures._details(study, runs).axes]
    assert titles == ["share of A among what is taken", "task reward per agent and turn"]
    voted = one_study(settings(phases=({"mode": "voted"},)))
    figure = commons_figures._details(voted, [made_run(voted, [0.1, 0.2] * 4, **votes)])
    assert "votes up less votes down, per agent and turn" in [axes.get_title(loc="left") for axes in figure.axes]
    np.testing.assert_allclose(next(iter(drawn_lines(figure, 1).values()))[:2], [[10, -0.2], [20, -0.1]])


def test_a_study_in_which_nothing_happens_is_drawn(tmp_path):
    study = one_study(settings(phases=({"mode": "fixed"},)))
    run = made_run(study, [0.0] * 8, commons__taken__B=[0.0] * 8)
    for path in commons_figures.draw_figures(study, [run], tmp_path):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_repeated_phases_are_smoothed_over_whole_rounds():
    """Rounds of 15 turns in rollouts of 10 come out even after 30 turns: means over three updates are constant."""
    phases = [{"mode": "fixed", "level": 0, "num_turns": 5}, {"mode": "fixed", "level": 9, "num_turns": 10}]
    study = one_study(settings(phases=phases, repeat_phases=True) | {"total_steps": 600}, seeds=(0, 1))
    rewards = np.tile([1.0, 2.0, 6.0], 10)
    runs = [made_run(study, [0.5] * 30, seed=seed, rollout__task_reward=rewards + seed) for seed in (0, 1)]
    figure = commons_figures._overview(study, runs)
    points = next(iter(drawn_lines(figure).values()))
    np.testing.assert_allclose(points, [[turn, 3.5] for turn in range(30, 301, 10)])
    assert "rolling means over 30 turns" in figure.legends[0].get_title().get_text()
    assert figure._suptitle.get_text() == "what is earned"
    seeds = figure.axes[1].collections[0].get_offsets()
    np.testing.assert_allclose(np.sort(seeds[:, 1]), [3.0, 4.0])
    assert not figure.axes[0].patches


def test_the_window_of_a_terminal_shows_how_far_runs_are(tmp_path):
    config = RunConfig(env="commons", num_envs=1, run_dir=str(tmp_path))
    assert processes._steps_so_far(config) == 0
    (tmp_path / "metrics.csv").write_text("steps,loss\r\n100,1\r\n200,2\r\n")
    assert processes._steps_so_far(config) == 200
