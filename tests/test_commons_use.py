"""The commons in use: its configuration, with an agent, as a PettingZoo environment, and for people to look at."""

from __future__ import annotations

import importlib
import math
import sys
from typing import Any

import numpy as np
import pytest
import torch
from commons_worlds import DESIGN_SCHEDULE, RIGHT, STAY, VARIED, act, assert_same, bandit, drawn, random_actions, row
from hypothesis import given, settings
from hypothesis import strategies as st
from settings import spec_segments

from dualhead.agent import DualHeadRecurrentPPO
from dualhead.config import NetworkConfig, NormConfig
from dualhead.worlds.commons.actions import NO_VOTE, VOTE_DOWN, VOTE_UP
from dualhead.worlds.commons.config import CommonsConfig, Phase
from dualhead.worlds.commons.parallel import parallel_env
from dualhead.worlds.commons.world import Commons
from dualhead.worlds.streams import UnavailableEnvironment

# Configuration.

OUT_OF_RANGE = [("num_agents", 0), ("resources", ()), ("resources", ("A", "A")), ("values", {"A": 1.0})]
OUT_OF_RANGE += [("harms", dict.fromkeys("ABCDE", -1.0)), ("schedule", {**DESIGN_SCHEDULE, "B": (1.1,) * 10})]
OUT_OF_RANGE += [("punishment", -1.0), ("punishments_are", "random"), ("vote_shift", 0.0), ("vote_shift", 1.5)]
OUT_OF_RANGE += [("voting_season", 1), ("epoch_turns", 0), ("patch_size", 2), ("window_radius", 0), ("bump", 1.0)]
OUT_OF_RANGE += [("respawn_probability", 1.1), ("form", "maze"), ("radius", 4)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(({name: value}, name) for name, value in OUT_OF_RANGE),
        ({"resources": tuple("ABCDEFGHI")}, "1 to 8"),
        ({"resources": ("A", "F")}, r"values.*\['F'\] missing"),
        ({"values": dict.fromkeys("ABCDE", math.inf)}, "values.*finite"),
        ({"schedule": {**DESIGN_SCHEDULE, "B": (0.1,)}}, "same number of levels"),
        ({"schedule": dict.fromkeys("ABCDE", ())}, "same number of levels"),
        ({"initial_level": 10}, "initial_level.*below 10, got 10"),
        ({"phases": ()}, "^phases: Tuple should have at least 1 item"),
        ({"phases": [{"mode": "on"}]}, r"^phases\.0\.mode: Input should be 'voted', 'fixed' or 'off', got 'on'$"),
        ({"phases": [{"num_turns": 0}]}, "num_turns"),
        ({"phases": (Phase(level=10),)}, "phases.*below 10, got 10"),
        ({"phases": (Phase(), Phase())}, "phase 0 has no num_turns"),
        ({"phases": (Phase(),), "repeat_phases": True}, "phase 0 has no num_turns"),
        ({"coding": "simple", "stay": True}, "stay"),
        ({"patch_size": 3, "initial_resources": 1}, "at most 0"),
        ({"max_resources": 3, "initial_resources": 4}, "at most 3"),
        ({"form": "bandit", "menu_size": 6}, "menu_size"),
    ],
)
def test_impossible_rules_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        CommonsConfig(**changes)


def test_numbers_of_worlds_are_checked():
    with pytest.raises(ValueError, match="num_worlds"):
        Commons(num_worlds=0)
    with pytest.raises(ValueError, match="below 2, got 2"):
        Commons(num_worlds=2).ascii(2)


PHASES = st.builds(
    Phase,
    mode=st.sampled_from(["voted", "fixed", "off"]),
    level=st.none() | st.integers(0, 9),
    num_turns=st.none() | st.integers(1, 4),
)
RULES = st.fixed_dictionaries(
    {"num_agents": st.integers(1, 3)},
    optional={
        "form": st.sampled_from(["grid", "bandit"]),
        "resources": st.sampled_from([("A",), ("B", "A"), tuple("ABCDE")]),
        "punishments_are": st.sampled_from(["probabilistic", "deterministic"]),
        "punishment": st.floats(-1, 50),
        "vote_shift": st.floats(0, 1),
        "initial_level": st.integers(0, 10),
        "level_visible": st.booleans(),
        "phases": st.lists(PHASES, min_size=1, max_size=3).map(tuple),
        "repeat_phases": st.booleans(),
        "voting_season": st.none() | st.integers(1, 3),
        "coding": st.sampled_from(["pair", "composite", "simple"]),
        "stay": st.booleans(),
        "agent_index": st.booleans(),
        "epoch_turns": st.integers(1, 4),
        "patch_size": st.integers(3, 6),
        "window_radius": st.integers(1, 5),
        "initial_resources": st.integers(0, 9),
        "respawn_probability": st.floats(0, 1),
        "max_resources": st.none() | st.integers(1, 9),
        "menu_size": st.integers(1, 3),
    },
)


@settings(max_examples=120, deadline=None)
@given(rules=RULES, seed=st.integers(0, 100))
def test_rules_are_refused_or_can_be_played(rules, seed):
    try:
        config = CommonsConfig(**rules)
    except ValueError:
        return
    worlds = Commons(config, num_worlds=2)
    observations = worlds.reset(seed=seed)
    worlds.action_space.seed(seed)
    for turn in range(1, 7):
        for stream in range(worlds.num_streams):
            assert worlds.observation_space.contains(row(observations, stream)), stream
        samples = [worlds.action_space.sample() for _ in range(worlds.num_streams)]
        pairs = config.coding == "pair"
        step = worlds.step(np.array([[*sample.values()] for sample in samples] if pairs else samples))
        assert torch.isfinite(step.rewards).all()
        assert step.truncated.all() == step.truncated.any() == (turn % config.epoch_turns == 0)
        assert (step.final_observations is None) == (not step.truncated.any())
        assert ((worlds.level >= 0) & (worlds.level <= 1)).all()
        if config.max_resources is not None and config.form == "grid":
            inside = worlds.forage.codes()[:, 1:-1, 1:-1]
            assert (inside > 0).sum((1, 2)).max() <= config.max_resources
        observations = step.observations
    assert_same(observations, worlds.observations())


# With an agent, and with PettingZoo.


@pytest.mark.parametrize("form", ["grid", "bandit"])
@pytest.mark.parametrize("coding", ["pair", "composite"])
def test_an_agent_learns_from_it_with_norms(form, coding):
    rules = {"num_agents": 3, "epoch_turns": 5, "respawn_probability": 0.3, "voting_season": 3, "agent_index": True}
    worlds = Commons(CommonsConfig(form=form, coding=coding, **rules), num_worlds=2)
    agent = DualHeadRecurrentPPO(
        worlds.observation_space,
        worlds.action_space,
        num_streams=worlds.num_streams,
        config=spec_segments(rollout_length=8, sequence_length=4, batch_size=24),
        network=NetworkConfig.spec(hidden_size=16, encoder_sizes=(16,)),
        norms=NormConfig(resources=worlds.resources, internalization_threshold=0.0),
    )
    observations = worlds.reset(seed=0)
    while not agent.rollout_is_ready:
        step = worlds.step(agent.act(observations))
        seen = {"final_observations": step.final_observations, "events": worlds.events}
        agent.record(step.rewards, step.terminated, step.truncated, **seen)
        observations = step.observations
    assert agent.norms.strengths.sum() > 0
    metrics = agent.learn(observations)
    assert all(math.isfinite(value) for value in metrics.values())
    assert "norms/strength/A" in metrics
    worlds.step(agent.act(observations))  # NumPy, in the form of the action space


@pytest.mark.filterwarnings("ignore:The old environment creation API")  # PettingZoo's own, on importing its tests
@pytest.mark.parametrize(
    "rules",
    [
        {"num_agents": 3, "epoch_turns": 12},
        {"num_agents": 2, "epoch_turns": 12, "form": "bandit", "coding": "simple"},
        {"num_agents": 2, "epoch_turns": 12, "voting_season": 3, "agent_index": True},
        {"num_agents": 2, "epoch_turns": 12, "voting_season": 3, "coding": "composite"},
    ],
)
def test_pettingzoo_accepts_it(rules):
    from pettingzoo.test import parallel_api_test, parallel_seed_test

    parallel_api_test(parallel_env(**rules), num_cycles=40)
    parallel_seed_test(lambda: parallel_env(**rules), num_cycles=15)


def test_a_parallel_env_is_the_batched_world():
    config = CommonsConfig(num_agents=3, epoch_turns=4, respawn_probability=0.3, stay=True)
    env, worlds = parallel_env(config, render_mode="ansi"), Commons(config)
    seen, infos = env.reset(seed=5)
    expected = worlds.reset(seed=5)
    assert infos == {"agent_0": {}, "agent_1": {}, "agent_2": {}}
    generator = torch.Generator().manual_seed(0)
    collections = 0
    for turn in range(1, 10):
        for i, name in enumerate(env.possible_agents):
            assert env.observation_space(name).contains(seen[name])
            np.testing.assert_array_equal(seen[name]["grid"], expected["grid"][i])
            np.testing.assert_array_equal(seen[name]["scalars"], expected["scalars"][i])
        actions = random_actions(worlds, generator)
        step = worlds.step(actions)
        heads = {name: {"move": m, "vote": v} for name, (m, v) in zip(env.agents, actions.tolist())}
        seen, rewards, terminated, truncated, infos = env.step(heads)
        expected = step.observations if step.final_observations is None else step.final_observations
        assert list(rewards.values()) == step.rewards.tolist()
        np.testing.assert_array_equal(np.stack([part["grid"] for part in seen.values()]), expected["grid"])
        assert set(terminated.values()) == {False}
        assert set(truncated.values()) == {turn % 4 == 0}
        for i, name in enumerate(env.possible_agents):
            kinds = [kind for kind, taken in zip("ABCDE", worlds.events.collected[i]) if taken]
            assert infos[name]["collected"] == (kinds[0] if kinds else None)
            assert infos[name]["punished"] == worlds.events.punished[i].any().item()
            collections += len(kinds)
        assert env.render().splitlines()[0].startswith(f"turn {turn}, level {worlds.level_index.item()} (p = ")
        if turn % 4 == 0:
            assert env.agents == []
            with pytest.raises(ValueError, match="reset"):
                env.step(heads)
            seen, _ = env.reset()  # the run goes on with the next epoch
            expected = worlds.observations()
    assert collections
    with pytest.raises(ValueError, match="agent_2"):
        env.step({"agent_0": {"move": 0, "vote": 0}, "agent_1": {"move": 0, "vote": 0}})
    for wrong in ({"move": 0}, 0, None):
        with pytest.raises(ValueError, match="action"):
            env.step({"agent_0": {"move": 0, "vote": 0}, "agent_1": wrong, "agent_2": {"move": 0, "vote": 0}})
    turn = env.commons.turn
    env.reset()  # in the middle of an epoch: a fresh one, the same run
    assert env.commons.turn == turn
    assert not env.step({name: {"move": 0, "vote": 0} for name in env.agents})[3]["agent_0"]


def test_parallel_env_says_what_is_wrong(monkeypatch):
    with pytest.raises(ValueError, match="render_mode"):
        parallel_env(render_mode="human")
    with pytest.raises(ValueError, match="got both"):
        parallel_env(CommonsConfig(), num_agents=2)
    monkeypatch.delitem(sys.modules, "dualhead.worlds.commons.parallel", raising=False)
    monkeypatch.setitem(sys.modules, "pettingzoo", None)
    with pytest.raises(UnavailableEnvironment, match=r"pettingzoo: pip install -e '\.\[pettingzoo\]'"):
        importlib.import_module("dualhead.worlds.commons.parallel")


# For people.


def test_a_frame_shows_patches_votes_punishment_and_level():
    worlds = drawn(
        "#####  #####\n#@A.#  #.B.#\n#...#  #.@.#\n#...#  #...#\n#####  #####",
        vote_shift=0.5,
        phases=(Phase(num_turns=1), Phase(mode="off")),
    )
    fresh = worlds.frame()
    assert fresh.dtype == np.uint8
    assert fresh.shape[2] == 3
    assert all(side % 16 == 0 for side in fresh.shape[:2])

    def cell(picture: Any, row: int, column: int) -> tuple[int, ...]:
        """The pixel in the middle of a cell, the margin being row and column 0."""
        return tuple(picture[row * 8 + 4, column * 8 + 4])

    white, wall = cell(fresh, 2, 2), cell(fresh, 1, 1)
    assert white == (255, 255, 255)
    assert cell(fresh, 3, 9) == white  # agent 1 in the middle of its patch, which begins at column 7
    A, B, ground = cell(fresh, 2, 3), cell(fresh, 2, 9), cell(fresh, 2, 4)
    assert len({A, B, ground, wall, white}) == 5
    bar = fresh[-16 - (fresh.shape[0] - 10 * 8) + 4, 8:-8]
    act(worlds, torch.tensor([RIGHT, STAY]), torch.tensor([VOTE_UP, VOTE_DOWN]))
    picture = worlds.frame()
    assert cell(picture, 2, 3) == white
    strip = 6 * 8 + 4  # the row of cells under the patches
    up, punished = tuple(picture[strip, 8 + 2]), tuple(picture[strip, 8 + 38])
    down, spared = tuple(picture[strip, 56 + 2]), tuple(picture[strip, 56 + 38])
    assert up[1] == max(up)  # green
    assert down[0] == max(down)  # red
    assert len({up, down, punished, spared}) == 4
    assert len({tuple(pixel) for pixel in bar[: 11 * 8].tolist()}) == 1  # level 0: empty from end to end


@pytest.mark.parametrize("level", [0, 3, 9])
def test_the_bar_is_as_long_as_the_level(level):
    for mode in ("fixed", "off"):
        picture = bandit(num_agents=7, phases=(Phase(mode=mode, level=level),)).frame()
        rows = [row for row in picture[-24:] if len(np.unique(row[8 : 8 + 15 * 8 - 8], axis=0)) <= 2]
        filled = max(np.all(row == colour, axis=1).sum() for row in rows for colour in ((255, 140, 0), (120, 124, 130)))
        is_orange = any((row == (255, 140, 0)).all(axis=1).any() for row in rows)
        width = (5 * 3 + 1) * 8 - 16
        assert filled == round(level / 9 * width)
        assert is_orange == (mode == "fixed" and level > 0)


def test_statistics_are_means_per_agent_and_turn():
    worlds = drawn("#####  #####\n#@AB#  #@..#\n#...#  #...#\n#...#  #...#\n#####  #####")
    assert set(worlds.statistics().values()) == {0.0}
    act(worlds, RIGHT, torch.tensor([VOTE_UP, VOTE_UP]))
    act(worlds, RIGHT, torch.tensor([VOTE_DOWN, NO_VOTE]))
    expected = {
        "taken": {"A": 1 / 4, "B": 1 / 4, "C": 0},
        "punished": {"A": 1 / 4, "B": 1 / 4, "C": 0},  # B was met at level 1 or 2, where it costs something
        "votes": {"up": 2 / 4, "down": 1 / 4},
        "harm": {"dealt": 5 / 4, "received": 5 / 4},
    }
    statistics = worlds.statistics()
    assert statistics["commons/level"] == pytest.approx((0.2 + 0.1) / 2)
    for what, numbers in expected.items():
        for name, value in numbers.items():
            assert statistics[f"commons/{what}/{name}"] == pytest.approx(value), (what, name)
    assert worlds.statistics()["commons/taken/A"] == 0  # reading begins anew


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("form", ["grid", "bandit"])
def test_it_runs_on_a_gpu(form):
    worlds = Commons(CommonsConfig(form=form, voting_season=3, **VARIED), num_worlds=4, device="cuda")
    one = worlds.reset(seed=0)
    steps = [worlds.step(torch.zeros(12, 2, dtype=torch.int64)) for _ in range(7)]
    assert one["scalars"].is_cuda
    assert_same(worlds.reset(seed=0), one)
    for step in steps:
        assert torch.equal(worlds.step(torch.zeros(12, 2, dtype=torch.int64)).rewards, step.rewards)
