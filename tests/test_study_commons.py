"""Studies of the commons: phases, shares, relapses and figures, against numbers by hand."""

import csv
import math
from pathlib import Path

import numpy as np
import pytest

from dualhead.running.results import Run, Table
from dualhead.studies import figures, tables
from dualhead.studies.commons_measures import closed_form, fading, measure_commons, spans
from dualhead.studies.config import StudyConfig
from dualhead.studies.measures import summarise

PUNISHED_THEN_NOT = ({"mode": "fixed", "level": 9, "num_turns": 40}, {"mode": "off"})


def settings(**commons):
    """One world of 2 agents, 80 turns in rollouts of 10."""
    rules = {"form": "bandit", "num_agents": 2, "resources": ("A", "B"), "phases": PUNISHED_THEN_NOT}
    return {
        "num_envs": 1,
        "total_steps": 160,
        "world": rules | commons,
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
    metrics = Table(steps, known | columns)
    return Run(Path("nowhere"), config, metrics, Table(steps[:0], {}), {"seconds": 2.0}, condition)


def measured(study, run):
    return measure_commons(study, run).values


def summarised(study, runs):
    return summarise([measure_commons(study, run) for run in runs])


NAN = math.nan


# What is measured.


THREE_PHASES = ({"num_turns": 30}, {"mode": "off", "num_turns": 30}, {"level": 3, "num_turns": 20})
REPEATED = {"phases": ({"mode": "off", "num_turns": 5}, {"num_turns": 5}), "repeat_phases": True}


@pytest.mark.parametrize(
    ("rules", "total_steps", "expected"),
    [
        ({}, 160, [("punishment", 9, 0, 40, True), ("no punishment", None, 40, 80, False)]),
        # 190 steps of 2 agents end in turn 95; the last phase, planned for 20 turns, stays until then.
        (
            {"phases": THREE_PHASES},
            190,
            [("votes (1)", None, 0, 30, True), ("no punishment", None, 30, 60, False), ("votes (2)", 3, 60, 95, True)],
        ),
        # A phase that the run does not reach is left out. A rollout is always finished, so 81 steps are 41 turns.
        ({}, 80, [("punishment", 9, 0, 40, True)]),
        ({}, 81, [("punishment", 9, 0, 40, True), ("no punishment", None, 40, 41, False)]),
        (REPEATED, 160, [("all phases", None, 0, 80, True)]),
    ],
)
def test_phases_become_spans_of_turns(rules, total_steps, expected):
    assert spans(one_study(settings(**rules) | {"total_steps": total_steps}).run("one", 0, "")) == expected


def test_shares_and_rewards_are_those_of_second_halves():
    """Punishment ends with turn 40, so its second half are the rollouts that end in turns 30 and 40."""
    study = one_study()
    found = measured(study, made_run(study, [0.5, 0.4, 0.2, 0.1, 0.1, 0.3, 0.6, 0.8]))
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
    assert measured(single, made_run(single, [0.0] * 4 + [0.25] * 4)) == {"A share": 0.25, "reward": 2.5}


def test_where_nothing_is_taken_there_is_no_share():
    study = one_study()
    run = made_run(study, [0.0] * 8, commons__taken__B=[1, 1, 0, 0, 0, 0, 0, 1])
    found = measured(study, run)
    assert "A share, punishment" not in found
    assert found["A share, no punishment"] == 0.0  # of one rollout; the other says nothing
    assert found["turns to relapse"] == math.inf


def test_relapse_needs_a_rollout_without_any_punishment():
    """The phase ends in turn 45: the rollout of turns 41 to 50 is still half punished."""
    study = one_study(settings(phases=({"mode": "fixed", "num_turns": 45}, {"mode": "off"})))
    assert measured(study, made_run(study, [0, 0, 0, 0, 0.9, 0.1, 0.5, 0.6]))["turns to relapse"] == 80 - 45
    assert measured(study, made_run(study, [0, 0, 0, 0, 0.9, 0.1, 0.5, 0.5]))["turns to relapse"] == math.inf
    never_off = one_study(settings(phases=({"mode": "off", "num_turns": 40}, {"mode": "fixed"})))
    assert "turns to relapse" not in measured(never_off, made_run(never_off, [0.9] * 8))


def test_the_closed_form_stands_beside_the_relapse():
    """Gain 10, scale -10, threshold 5: guilt outweighs above 6. From 8 at decay 0.99, ln(8/6)/-ln(0.99) = 28.62."""
    norms = {"intrinsic_scale": -10.0, "decay_rate": 0.99}
    study = one_study(settings() | {"enforce_norms": True, "norms": norms})
    run = made_run(study, [0.0] * 8, norms__strength__A=[2, 6, 9, 8, 7, 6, 5, 4])
    found = measured(study, run)
    assert found["norm strength at the end of punishment"] == 8.0
    assert found["turns by the closed form"] == pytest.approx(28.62, abs=0.01)
    assert fading(study, run).turn == 40
    assert fading(study, run).lasts == pytest.approx(28.62, abs=0.01)
    assert "turns by the closed form" not in measured(study, made_run(study, [0.0] * 8))


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
    found = measured(study, made_run(study, [0.1] * 4 + [0.3, 0.35, 0.5, 0.6], **groups))
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
    found = measured(study, made_run(study, [0.1] * 8, **nobody_left))
    assert "turns to relapse, incumbents" not in found
    assert "A share of incumbents, no punishment" not in found


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
    tables.print_commons_table(study, rows)
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
    tables.write_csv(tmp_path / "results.csv", tables.results(study, runs, ()), without=("environment",))
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


# Figures.


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
    figure = figures.overview(study, runs)
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
    titles = [axes.get_title(loc="left") for axes in figures.details(study, runs).axes]
    assert titles == ["share of A among what is taken", "task reward per agent and turn"]
    voted = one_study(settings(phases=({"mode": "voted"},)))
    figure = figures.details(voted, [made_run(voted, [0.1, 0.2] * 4, **votes)])
    assert "votes up less votes down, per agent and turn" in [axes.get_title(loc="left") for axes in figure.axes]
    np.testing.assert_allclose(next(iter(drawn_lines(figure, 1).values()))[:2], [[10, -0.2], [20, -0.1]])


def test_a_study_in_which_nothing_happens_is_drawn(tmp_path):
    study = one_study(settings(phases=({"mode": "fixed"},)))
    run = made_run(study, [0.0] * 8, commons__taken__B=[0.0] * 8)
    for path in figures.draw_figures(study, [measure_commons(study, run)], (), tmp_path):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_repeated_phases_are_smoothed_over_whole_rounds():
    """Rounds of 15 turns in rollouts of 10 come out even after 30 turns: means over three updates are constant."""
    phases = [{"mode": "fixed", "level": 0, "num_turns": 5}, {"mode": "fixed", "level": 9, "num_turns": 10}]
    study = one_study(settings(phases=phases, repeat_phases=True) | {"total_steps": 600}, seeds=(0, 1))
    rewards = np.tile([1.0, 2.0, 6.0], 10)
    runs = [made_run(study, [0.5] * 30, seed=seed, rollout__task_reward=rewards + seed) for seed in (0, 1)]
    figure = figures.overview(study, runs)
    points = next(iter(drawn_lines(figure).values()))
    np.testing.assert_allclose(points, [[turn, 3.5] for turn in range(30, 301, 10)])
    assert "rolling means over 30 turns" in figure.legends[0].get_title().get_text()
    assert figure._suptitle.get_text() == "what is earned"
    seeds = figure.axes[1].collections[0].get_offsets()
    np.testing.assert_allclose(np.sort(seeds[:, 1]), [3.0, 4.0])
    assert not figure.axes[0].patches
