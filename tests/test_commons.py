"""The commons: drawn worlds with exact outcomes, plain-Python oracles, frequencies within bounds, and closed forms."""

from __future__ import annotations

import json
import math
import sys
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dualhead.agent import DualHeadRecurrentPPO
from dualhead.config import CommonsConfig, NetworkConfig, NormConfig, Phase, PPOConfig
from dualhead.storage import CheckpointError, read_tensors, write_tensors
from dualhead.worlds import commons_view
from dualhead.worlds.commons import Commons, parallel_env
from dualhead.worlds.commons_actions import (
    NO_VOTE,
    VOTE_DOWN,
    VOTE_UP,
    composite_to_pair,
    pair_to_composite,
    pair_to_simple,
    simple_to_pair,
)
from dualhead.worlds.streams import UnavailableEnvironment

UP, DOWN, LEFT, RIGHT, STAY = range(5)
DESIGN_SCHEDULE = {
    "A": [0.30, 0.40, 0.55, 0.70, 0.85, 0.95, 1, 1, 1, 1],
    "B": [0, 0.05, 0.10, 0.10, 0.10, 0.10, 0.10, 0.15, 0.15, 0.20],
    "C": [0, 0, 0, 0.05, 0.10, 0.10, 0.10, 0.10, 0.15, 0.15],
    "D": [0, 0, 0, 0, 0, 0.05, 0.10, 0.10, 0.10, 0.15],
    "E": [0, 0, 0, 0, 0, 0, 0, 0.05, 0.10, 0.10],
}
STILL = {"initial_resources": 0, "respawn_probability": 0.0}
"""Nothing appears by itself."""
EXACT = {**STILL, "punishments_are": "deterministic", "patch_size": 5, "stay": True}


def drawn(*drawings: str, **changes: Any) -> Commons:
    """Worlds of drawings, with exact rules but for the changes."""
    num_agents = len(drawings[0].strip().splitlines()[0].split())
    return Commons.from_ascii(drawings, CommonsConfig(**{**EXACT, "num_agents": num_agents, **changes}))


def bandit(num_worlds: int = 1, **changes: Any) -> Commons:
    worlds = Commons(CommonsConfig(**{"form": "bandit", "stay": True, **changes}), num_worlds=num_worlds)
    worlds.reset(seed=0)
    return worlds


def act(worlds: Commons, moves: Any, votes: Any = NO_VOTE) -> Any:
    """One turn; a single number is for all streams."""
    columns = [torch.as_tensor(column).expand(worlds.num_streams) for column in (moves, votes)]
    return worlds.step(torch.stack(columns, dim=1))


def slots(worlds: Commons, wanted: torch.Tensor) -> torch.Tensor:
    """The slot of each stream's menu that holds the kind it wants."""
    menus = worlds.observations()["menu"].view(worlds.num_streams, -1, len(worlds.config.resources))
    assert (menus.sum(-1) == 1).all()
    return menus.gather(2, wanted.view(-1, 1, 1).expand(-1, menus.shape[1], 1))[:, :, 0].argmax(1)


def random_actions(worlds: Commons, generator: torch.Generator) -> torch.Tensor:
    """Any moves and votes [B, 2]; needs `stay`."""
    moves = torch.randint(worlds.forage.num_moves + 1, (worlds.num_streams,), generator=generator)
    return torch.stack([moves, torch.randint(3, (worlds.num_streams,), generator=generator)], dim=1)


def flat(observations: Any) -> dict[str, torch.Tensor]:
    """Observations with nested parts side by side."""
    parts = {}
    for name, part in observations.items():
        if isinstance(part, dict):
            parts |= {f"{name}/{head}": mask for head, mask in part.items()}
        else:
            parts[name] = part
    return parts


def assert_same(one: Any, other: Any) -> None:
    one, other = flat(one), flat(other)
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def assert_binomial(count: float, trials: int, probability: float, what: Any = "") -> None:
    """Within 4.5 standard deviations: one false alarm in 150,000."""
    deviation = math.sqrt(trials * probability * (1 - probability))
    assert abs(count - trials * probability) <= 4.5 * deviation, (what, count, trials * probability, deviation)


# The numbers of the design.


def test_defaults_are_those_of_the_design():
    config = CommonsConfig()
    assert config.values == {"A": 20, "B": 10, "C": 10, "D": 10, "E": 10}
    assert config.harms == {"A": 5, "B": 0, "C": 0, "D": 0, "E": 0}
    assert {kind: list(row) for kind, row in config.schedule.items()} == DESIGN_SCHEDULE
    assert (config.punishment, config.vote_shift, config.bump) == (25, 0.1, -1)
    assert (config.patch_size, config.window_radius, config.epoch_turns, config.num_agents) == (10, 4, 100, 10)
    assert config.punishments_are == "probabilistic"
    worlds = Commons(num_worlds=3)
    assert worlds.num_streams == 30
    assert worlds.observation_space["grid"].shape == (6, 9, 9)
    assert {name: head.n for name, head in worlds.action_space.items()} == {"move": 4, "vote": 3}


# Drawn worlds.


def test_a_walk_with_exact_rewards():
    worlds = drawn(
        """
        #####  #####
        #@A.#  #..B#
        #...#  #.@.#
        #.C.#  #...#
        #####  #####
        """
    )
    # Level 0: A costs 0.30 · 25 = 7.5, the others nothing. A harms the other agent by 5, one turn later.
    script = [
        ((RIGHT, RIGHT), (12.5, 0.0)),
        ((UP, UP), (-1.0, 5.0)),  # a wall, and B's 10 less the harm
        ((LEFT, RIGHT), (0.0, -1.0)),  # back to where A was: it is gone
        ((STAY, STAY), (0.0, 0.0)),
        ((DOWN, LEFT), (0.0, 0.0)),
        ((DOWN, LEFT), (0.0, 0.0)),
        ((RIGHT, UP), (10.0, -1.0)),
    ]
    for moves, rewards in script:
        step = act(worlds, torch.tensor(moves))
        assert step.rewards.tolist() == list(rewards), moves
        assert not step.terminated.any()
        assert not step.truncated.any()
    assert worlds.ascii() == "\n".join(["#####  #####", "#...#  #@..#", "#...#  #...#", "#.@.#  #...#", "#####  #####"])


def test_harm_reaches_every_other_agent_of_the_world_with_the_next_reward():
    scene = "#####  #####  #####\n#@A.#  #@A.#  #@..#\n#...#  #...#  #...#\n#...#  #...#  #...#\n#####  #####  #####"
    worlds = drawn(scene, scene)
    # World 0: agents 0 and 1 take A; world 1: nobody does.
    step = act(worlds, torch.tensor([RIGHT, RIGHT, STAY, STAY, STAY, STAY]))
    assert step.rewards.tolist() == [12.5, 12.5, 0, 0, 0, 0]
    assert worlds.harm_received.tolist() == [5, 5, 10, 0, 0, 0]
    # As a share of the most there can be, two others taking A: 10.
    assert step.observations["scalars"][:, 1].tolist() == [0.5, 0.5, 1, 0, 0, 0]
    step = act(worlds, STAY)
    assert step.rewards.tolist() == [-5, -5, -10, 0, 0, 0]
    assert step.observations["scalars"][:, 1].tolist() == [0] * 6
    assert act(worlds, STAY).rewards.tolist() == [0] * 6


def test_events_and_scalars_say_who_was_punished_for_what():
    worlds = drawn(
        "#####  #####\n#@A.#  #@B.#\n#...#  #...#\n#...#  #...#\n#####  #####", phases=(Phase(mode="fixed", level=0),)
    )
    step = act(worlds, RIGHT)
    assert worlds.events.collected.tolist() == [[True] + [False] * 4, [False, True] + [False] * 3]
    assert worlds.events.punished.tolist() == [[True] + [False] * 4, [False] * 5]  # B is free at level 0
    assert step.observations["scalars"][:, 2].tolist() == [1, 0]
    step = act(worlds, RIGHT)
    assert not worlds.events.collected.any()
    assert not worlds.events.punished.any()
    assert step.observations["scalars"][:, 2].tolist() == [0, 0]


def test_windows_show_what_lies_around_the_agent():
    worlds = Commons(CommonsConfig(num_agents=4, respawn_probability=0.1, stay=True, window_radius=3), num_worlds=5)
    worlds.reset(seed=0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        worlds.step(random_actions(worlds, generator))
    grid = worlds.observations()["grid"]
    assert grid.dtype == torch.uint8
    for world in range(5):
        rows = [line.split() for line in worlds.ascii(world).splitlines()]
        for agent, patch in enumerate(zip(*rows)):
            y, x = next((y, row.index("@")) for y, row in enumerate(patch) if "@" in row)
            for dy in range(-3, 4):
                for dx in range(-3, 4):
                    inside = 0 <= y + dy < 10 and 0 <= x + dx < 10
                    symbol = patch[y + dy][x + dx] if inside else "#"
                    seen = grid[world * 4 + agent, :, dy + 3, dx + 3].tolist()
                    assert seen == [int(symbol == kind) for kind in "ABCDE#"]


def test_drawings_round_trip():
    worlds = Commons(CommonsConfig(num_agents=3), num_worlds=2)
    again = Commons.from_ascii([worlds.ascii(0), worlds.ascii(1)], worlds.config)
    assert_same(again.observations(), worlds.observations())
    menus = bandit(2, num_agents=3, menu_size=3)
    again = Commons.from_ascii([menus.ascii(0), menus.ascii(1)], menus.config)
    assert_same(again.observations(), menus.observations())
    assert menus.ascii() == " ".join(
        "".join("ABCDE"[kind] for kind in menu)
        for menu in menus.observations()["menu"][:3].view(3, 3, 5).argmax(-1).tolist()
    )


@pytest.mark.parametrize(
    ("drawing", "message"),
    [
        ("####\n#@.#\n#..#\n####", "5 x 5"),
        ("#####\n#...#\n#...#\n#...#\n#####", "one agent"),
        ("#####\n#@@.#\n#...#\n#...#\n#####", "one agent"),
        ("#####\n#@..#\n#.@.#\n#...#\n#####", "one agent"),
        ("#####\n#@...\n#...#\n#...#\n#####", "border"),
        ("#####\n#@Z.#\n#...#\n#...#\n#####", "characters"),
        ("#####\n#@.#\n#...#\n#...#\n#####", "one length"),
        ("##### #####\n#@..#\n#...#\n#...#\n#####", "1 patches"),
    ],
)
def test_impossible_drawings_are_refused(drawing, message):
    with pytest.raises(ValueError, match=message):
        Commons.from_ascii([drawing], CommonsConfig(**{**EXACT, "num_agents": 1}))


def test_symbols_stand_for_names():
    assert commons_view.symbols(("B", "A")) == ".BA#"
    assert commons_view.symbols(("berry", "gem")) == ".AB#"
    with pytest.raises(ValueError, match="menus of 2 different"):
        Commons.from_ascii(["AA"], CommonsConfig(form="bandit", num_agents=1))


# Votes and the level.


def test_levels_of_each_tenth():
    """round(9 · k/10), ties to even, reached by votes up and then down again: floats would drift at 0.5."""
    worlds = bandit(num_agents=1)
    expected = [0, 1, 2, 3, 4, 4, 5, 6, 7, 8, 9]
    for tenths, index in enumerate(expected):
        assert worlds.level_index.tolist() == [index]
        assert worlds.level.tolist() == [pytest.approx(tenths / 10, abs=1e-7)]
        act(worlds, worlds.forage.num_moves, VOTE_UP)
    assert worlds.level.tolist() == [1.0]  # the eleventh vote was lost
    for tenths in range(10, -1, -1):
        assert worlds.level_index.tolist() == [expected[tenths]]
        act(worlds, worlds.forage.num_moves, VOTE_DOWN)
    assert worlds.level.tolist() == [0.0]


@pytest.mark.parametrize("vote_shift", [0.1, 0.07, 0.35, 1.0])
def test_votes_and_fines_follow_a_plain_oracle(vote_shift, monkeypatch):
    """Fractions instead of millionths, one agent after another; deterministic fines tell the level each one met."""
    W, A = 6, 5
    worlds = bandit(
        W, num_agents=A, vote_shift=vote_shift, punishments_are="deterministic", harms=dict.fromkeys("ABCDE", 0)
    )
    rng = np.random.default_rng(0)
    shift, p = Fraction(str(vote_shift)), [Fraction(0)] * W
    indices = set()
    for _ in range(60):
        order = np.stack([rng.permutation(A) for _ in range(W)])
        monkeypatch.setattr(worlds, "_turn_order", lambda order=order: torch.from_numpy(order))
        votes = rng.choice(3, (W, A), p=[0.2, 0.5, 0.3] if rng.random() < 0.5 else [0.2, 0.3, 0.5])
        menus = worlds.observations()["menu"].view(W, A, 2, 5).argmax(-1).numpy()
        moves = rng.integers(0, 2, (W, A))
        rewards = act(worlds, torch.from_numpy(moves.ravel()), torch.from_numpy(votes.ravel())).rewards.view(W, A)
        for world in range(W):
            for agent in order[world]:
                kind = "ABCDE"[menus[world, agent, moves[world, agent]]]
                index = round(9 * p[world])
                indices.add(index)
                value = 20 if kind == "A" else 10
                assert rewards[world, agent].item() == pytest.approx(
                    value - 25 * DESIGN_SCHEDULE[kind][index], abs=1e-5
                )
                change = {NO_VOTE: 0, VOTE_UP: shift, VOTE_DOWN: -shift}[votes[world, agent]]
                p[world] = min(Fraction(1), max(Fraction(0), p[world] + change))
    assert worlds.level.tolist() == [pytest.approx(float(q), abs=1e-6) for q in p]
    assert len(indices) > 5 or vote_shift > 0.3


def test_agents_act_in_random_order_and_meet_the_votes_before_them():
    """Agent 0 votes from level 0 to level 9 and takes A, agent 1 takes A: it pays 25 if it came later, else 7.5."""
    W = 4000
    worlds = bandit(W, num_agents=2, resources=("A", "B"), vote_shift=1.0, punishments_are="deterministic")
    takes_A = slots(worlds, torch.zeros(2 * W, dtype=torch.int64))
    rewards = act(worlds, takes_A, torch.tensor([VOTE_UP, NO_VOTE]).repeat(W)).rewards.view(W, 2)
    assert rewards[:, 0].unique().tolist() == [12.5]  # its own vote comes after its own move
    assert rewards[:, 1].unique().tolist() == [-5.0, 12.5]
    assert_binomial(int((rewards[:, 1] == -5).sum()), W, 0.5)


def test_orders_are_uniform_and_differ_between_worlds():
    worlds = bandit(6000, num_agents=3)
    orders = worlds._turn_order()
    assert (orders.sort(dim=1).values == torch.arange(3)).all()
    for order in ([0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]):
        assert_binomial(int((orders == torch.tensor(order)).all(1).sum()), 6000, 1 / 6, order)


# Punishment.


def test_punishment_frequencies_at_every_level():
    W, A = 2000, 5
    for level in range(10):
        worlds = bandit(W, num_agents=A, menu_size=5, phases=(Phase(mode="fixed", level=level),))
        wanted = torch.arange(A).repeat(W)
        act(worlds, slots(worlds, wanted))
        collected, punished = worlds.events.collected.view(W, A, 5), worlds.events.punished.view(W, A, 5)
        assert torch.equal(collected, torch.eye(5, dtype=torch.bool).expand(W, 5, 5))
        assert not (punished & ~collected).any()
        for agent, (kind, row) in enumerate(DESIGN_SCHEDULE.items()):
            assert_binomial(int(punished[:, agent, agent].sum()), W, row[level], (kind, level))


@pytest.mark.parametrize("level", [0, 1, 2, 4, 9])
def test_deterministic_fines_are_the_expected_ones(level):
    worlds = bandit(
        menu_size=5, num_agents=5, phases=(Phase(mode="fixed", level=level),), punishments_are="deterministic"
    )
    rewards = act(worlds, slots(worlds, torch.arange(5))).rewards
    expected = [(20 if kind == "A" else 10) - 25 * row[level] for kind, row in DESIGN_SCHEDULE.items()]
    assert rewards.tolist() == pytest.approx(expected)
    fined = [row[level] > 0 for row in DESIGN_SCHEDULE.values()]
    assert worlds.events.punished.diagonal().tolist() == fined


@pytest.mark.parametrize(("level", "net_A", "net_B"), [(0, 12.5, 10), (1, 10, 8.75), (2, 6.25, 7.5)])
@pytest.mark.parametrize("punishments_are", ["probabilistic", "deterministic"])
def test_best_response_flips_from_A_to_B_at_level_2(level, net_A, net_B, punishments_are):
    """What taking A or B is worth to the taker, ten agents, as the design computes it; others' harm is sunk."""
    W, A = 1500, 10
    worlds = bandit(
        W,
        num_agents=A,
        resources=("A", "B"),
        phases=(Phase(mode="fixed", level=level),),
        punishments_are=punishments_are,
    )
    wanted = (torch.arange(W * A) % 2).long()
    rewards = act(worlds, slots(worlds, wanted)).rewards
    for kind, net in ((0, net_A), (1, net_B)):
        mine = rewards[wanted == kind]
        p = DESIGN_SCHEDULE["AB"[kind]][level]
        deviation = 25 * math.sqrt(p * (1 - p) / len(mine)) * (punishments_are == "probabilistic")
        assert mine.mean().item() == pytest.approx(net, abs=4.5 * deviation + 1e-5)
    # Half of the agents took A: everybody owes for all of them but himself.
    assert worlds.harm_received[wanted == 0].unique().tolist() == [20]
    assert worlds.harm_received[wanted == 1].unique().tolist() == [25]


# Conservation.


@pytest.mark.parametrize("form", ["grid", "bandit"])
def test_every_harm_dealt_is_paid_for_across_epochs(form):
    """Unpunished and with every kind harmful: reward is value less debt, and debts are what the others did before."""
    W, A = 3, 4
    harms = dict(zip("ABCDE", (5.0, 1.0, 0.0, 2.0, 0.5)))
    worlds = Commons(
        CommonsConfig(
            form=form, num_agents=A, harms=harms, stay=True, epoch_turns=4, respawn_probability=0.2, bump=0.0,
            phases=(Phase(mode="off"),),
        ),
        num_worlds=W,
    )  # fmt: skip
    worlds.reset(seed=0)
    generator = torch.Generator().manual_seed(1)
    values, harm = torch.tensor([20.0, 10, 10, 10, 10]), torch.tensor(list(harms.values()))
    owed, dealt, paid = torch.zeros(W, A), 0.0, 0.0
    for turn in range(1, 14):
        step = worlds.step(random_actions(worlds, generator))
        collected = worlds.events.collected.float()
        pays = collected @ values - step.rewards
        assert torch.equal(pays.view(W, A), owed)
        by_agent = (collected @ harm).view(W, A)
        owed = torch.stack([by_agent.sum(1) - by_agent[:, agent] for agent in range(A)], dim=1)
        dealt += by_agent.sum().item() * (A - 1)
        paid += pays.sum().item()
        assert step.truncated.all() == (turn % 4 == 0)
        assert torch.equal(worlds.harm_received.view(W, A), owed)
        assert dealt == paid + owed.sum().item()
    assert dealt > 0
    statistics = worlds.statistics()
    assert statistics["commons/harm/dealt"] * 13 * W * A == pytest.approx(dealt)
    assert statistics["commons/harm/received"] * 13 * W * A == pytest.approx(paid)


# Growth.


def test_respawn_frequency_place_and_kind():
    num_agents, probability, cells = 3000, 0.05, 64
    worlds = Commons(
        CommonsConfig(num_agents=num_agents, initial_resources=0, respawn_probability=probability, stay=True)
    )
    worlds.reset(seed=0)
    act(worlds, STAY)
    codes = worlds.forage.codes(slice(None))
    inside = codes[:, 1:-1, 1:-1]
    assert_binomial(int((inside > 0).sum()), num_agents * (cells - 1), probability)
    for row in range(8):
        for column in range(8):
            # An agent stands on any cell with probability 1/64, and nothing grows under it.
            assert_binomial(int((inside[:, row, column] > 0).sum()), num_agents, probability * 63 / 64, (row, column))
    for kind in range(1, 6):
        assert_binomial(int((inside == kind).sum()), int((inside > 0).sum()), 0.2, kind)
    rows, columns = worlds.forage.agents(slice(None)).unbind(1)
    assert (codes[torch.arange(num_agents), rows, columns] == 0).all()
    inside = codes.clone()
    inside[:, 1:-1, 1:-1] = 6
    assert (inside == 6).all()  # the border is wall still
    before = codes.clone()
    act(worlds, STAY)
    after = worlds.forage.codes(slice(None))
    assert torch.equal(after[before > 0], before[before > 0])  # what lies there stays what it is


def test_growth_with_certainty_fills_the_patch():
    worlds = drawn("#####\n#...#\n#.@.#\n#..A#\n#####", respawn_probability=1.0)
    act(worlds, STAY)
    patch = worlds.ascii()
    assert patch.count("@") == 1
    assert "." not in patch
    assert patch.splitlines()[3][3] == "A"


def test_a_cap_limits_growth_and_favours_no_place():
    num_agents, cap = 4000, 3
    worlds = Commons(
        CommonsConfig(
            num_agents=num_agents,
            patch_size=5,
            initial_resources=1,
            respawn_probability=0.9,
            max_resources=cap,
            stay=True,
        )
    )
    worlds.reset(seed=0)
    act(worlds, STAY)
    inside = worlds.forage.codes(slice(None))[:, 1:-1, 1:-1]
    counts = (inside > 0).sum((1, 2))
    assert counts.max() == cap
    assert (counts == cap).float().mean() > 0.99  # seven cells at 0.9: two grow almost surely
    for row in range(3):
        for column in range(3):
            assert_binomial(int((inside[:, row, column] > 0).sum()), num_agents, cap / 9, (row, column))
    for _ in range(5):
        act(worlds, torch.randint(5, (num_agents,)))
        assert (worlds.forage.codes(slice(None))[:, 1:-1, 1:-1] > 0).sum((1, 2)).max() == cap


def test_fresh_patches_are_uniform():
    num_agents = 4000
    worlds = Commons(CommonsConfig(num_agents=num_agents, patch_size=5, initial_resources=3))
    worlds.reset(seed=1)
    inside = worlds.forage.codes(slice(None))[:, 1:-1, 1:-1]
    assert ((inside > 0).sum((1, 2)) == 3).all()
    rows, columns = (worlds.forage.agents(slice(None)) - 1).unbind(1)
    for row in range(3):
        for column in range(3):
            assert_binomial(int((inside[:, row, column] > 0).sum()), num_agents, 3 / 9)
            assert_binomial(int(((rows == row) & (columns == column)).sum()), num_agents, 1 / 9)
    for kind in range(1, 6):
        assert_binomial(int((inside == kind).sum()), 3 * num_agents, 0.2)


def test_menus_are_uniform_without_repetition():
    worlds = bandit(3000, num_agents=2, resources=("A", "B", "C"))
    menus = worlds.observations()["menu"].view(-1, 2, 3).argmax(-1)
    for first in range(3):
        for second in range(3):
            count = int(((menus[:, 0] == first) & (menus[:, 1] == second)).sum())
            assert_binomial(count, 6000, 0.0 if first == second else 1 / 6)
    act(worlds, 0)
    again = worlds.observations()["menu"].view(-1, 2, 3).argmax(-1)
    assert_binomial(int((again == menus).all(1).sum()), 6000, 1 / 6)
    act(worlds, worlds.forage.num_moves)
    assert not worlds.events.collected.any()


# Epochs, phases, seasons.


def test_an_epoch_ends_by_truncation_with_the_last_observation():
    worlds = drawn(
        "#####  #####\n#@.A#  #@..#\n#...#  #...#\n#...#  #...#\n#####  #####", epoch_turns=2, initial_resources=2
    )
    step = act(worlds, RIGHT, VOTE_UP)
    assert step.final_observations is None
    step = act(worlds, RIGHT, VOTE_UP)
    assert step.truncated.tolist() == [True, True]
    assert step.terminated.tolist() == [False, False]
    last, first = step.final_observations, step.observations
    # Both agents stand at the right wall of their old patch: walls right of the middle, left of it none for two cells.
    assert last["grid"][:, 5, 4].tolist() == [[1, 1, 0, 0, 0, 1, 1, 1, 1]] * 2
    assert not last["grid"][:, :5].any()
    assert first["grid"][:, :5].sum((1, 2, 3)).tolist() == [2, 2]  # a fresh patch; every cell of it is in sight
    assert torch.equal(first["scalars"], last["scalars"])  # level and debts go on
    assert last["scalars"][:, 0].tolist() == pytest.approx([0.4, 0.4])
    assert last["scalars"][:, 1].tolist() == [0, 1]
    assert act(worlds, STAY).rewards.tolist() == [0, -5]
    assert act(worlds, STAY).truncated.all()
    assert worlds.turn == 4


def test_phases_follow_each_other_in_turns_of_the_run():
    phases = (
        Phase(num_turns=2),
        Phase(mode="fixed", level=9, num_turns=3),
        Phase(mode="off", num_turns=2),
        Phase(mode="voted", level=3),
    )
    worlds = bandit(
        num_agents=1, resources=("A",), menu_size=1, phases=phases, epoch_turns=3, punishments_are="deterministic"
    )
    rewards, seen = [], [worlds.observations()["scalars"][0, 0].item()]
    for _ in range(9):
        step = act(worlds, 0, VOTE_UP)
        rewards.append(step.rewards.item())
        seen.append(step.observations["scalars"][0, 0].item())
    fines = [0.3, 0.4, 1, 1, 1, 0, 0, 0.7, 0.85]  # levels 0, 1 | 9 9 9 | off | 3, then 1/3 + 0.1 → 4
    assert rewards == pytest.approx([20 - 25 * fine for fine in fines])
    assert seen == pytest.approx([0, 0.1, 1, 1, 1, 1, 1, 1 / 3, 1 / 3 + 0.1, 1 / 3 + 0.2], abs=1e-6)
    assert worlds.phase is phases[3]


def test_phases_may_repeat_and_the_last_one_stays_otherwise():
    phases = (Phase(mode="fixed", level=0, num_turns=2), Phase(mode="fixed", level=9, num_turns=1))
    for repeats, expected in ((True, [0, 0, 9, 0, 0, 9, 0]), (False, [0, 0, 9, 9, 9, 9, 9])):
        worlds = bandit(num_agents=1, phases=phases, repeat_phases=repeats, initial_level=5)
        levels = []
        for _ in range(7):
            levels.append(worlds.level_index.item())
            act(worlds, 0, VOTE_DOWN)
        assert levels == expected
        worlds.reset()
        assert worlds.level_index.item() == 0
    worlds = bandit(num_agents=1, phases=(Phase(mode="fixed"),), initial_level=5)
    assert worlds.level_index.item() == 5


def test_nobody_is_punished_while_punishment_is_off():
    worlds = bandit(500, num_agents=4, resources=("A", "B"), phases=(Phase(mode="off", level=9),))
    rewards = act(worlds, slots(worlds, torch.zeros(2000, dtype=torch.int64)), VOTE_UP).rewards
    assert rewards.unique().tolist() == [20]
    assert not worlds.events.punished.any()
    assert worlds.level_index.unique().tolist() == [9]  # votes do nothing, and nothing gives it away


def test_a_hidden_level_is_not_seen():
    shown, hidden = (bandit(level_visible=visible, initial_level=9) for visible in (True, False))
    assert shown.observations()["scalars"][:, 0].unique().tolist() == [1]
    assert hidden.observations()["scalars"][:, 0].unique().tolist() == [0]
    assert hidden.level_index.tolist() == [9]


@pytest.mark.parametrize(
    ("coding", "stay", "moving", "voting"),
    [
        ("pair", False, {"move": [1, 1, 1, 1], "vote": [1, 0, 0]}, {"move": [1, 0, 0, 0], "vote": [1, 1, 1]}),
        ("pair", True, {"move": [1, 1, 1, 1, 1], "vote": [1, 0, 0]}, {"move": [0, 0, 0, 0, 1], "vote": [1, 1, 1]}),
        ("composite", False, [1, 0, 0] * 4 + [1], [0, 1, 1] + [0] * 9 + [1]),
        ("simple", False, [1, 1, 1, 1, 0, 0, 1], [0, 0, 0, 0, 1, 1, 1]),
    ],
)
def test_voting_seasons_are_masked_and_enforced(coding, stay, moving, voting):
    """Every third turn of an epoch of five; what the mask forbids does nothing."""
    worlds = drawn(
        "#####\n#@AB#\n#...#\n#...#\n#####", voting_season=3, epoch_turns=5, coding=coding, stay=stay, vote_shift=0.5
    )
    # Right and vote up at once; the simple coding can only vote, in turns for moves too.
    action = {"pair": [RIGHT, VOTE_UP], "composite": [RIGHT * 3 + VOTE_UP], "simple": [4]}[coding]
    rewards, levels, masks = [], [], []
    for _ in range(6):
        observations = worlds.observations()
        mask = observations["action_mask"]
        masks.append(
            {head: part[0].tolist() for head, part in mask.items()} if isinstance(mask, dict) else mask[0].tolist()
        )
        is_voting = observations["scalars"][0, 3].item()
        assert masks[-1] == (voting if is_voting else moving)
        rewards.append(worlds.step(torch.tensor([action])).rewards.item())
        levels.append(worlds.level.item())
    assert [mask == voting for mask in masks] == [False, False, True, False, False, False]
    assert levels == [0, 0, 0.5, 0.5, 0.5, 0.5]
    if coding != "simple":
        assert rewards[:3] == [12.5, 10, 0]  # A, B, and no bump in the turn for votes
        assert rewards[3:5] == [-1, -1]
    assert worlds.observation_space["action_mask"].contains(
        {head: part[0].numpy() for head, part in mask.items()} if isinstance(mask, dict) else mask[0].numpy()
    )


# Codings.


@pytest.mark.parametrize("num_moves", [1, 4, 5])
def test_codings_round_trip(num_moves):
    composite, simple = torch.arange(3 * num_moves + 1), torch.arange(num_moves + 3)
    moves, votes = composite_to_pair(composite, num_moves=num_moves)
    assert torch.equal(pair_to_composite(moves, votes, num_moves=num_moves), composite)
    assert list(zip(moves.tolist(), votes.tolist())) == [
        *((move, vote) for move in range(num_moves) for vote in range(3)), (num_moves, NO_VOTE)
    ]  # fmt: skip
    moves, votes = simple_to_pair(simple, num_moves=num_moves)
    assert torch.equal(pair_to_simple(moves, votes, num_moves=num_moves), simple)
    assert moves.tolist() == [*range(num_moves), *[num_moves] * 3]
    assert votes.tolist() == [*[NO_VOTE] * num_moves, VOTE_UP, VOTE_DOWN, NO_VOTE]


def test_historical_numbers():
    composite = [
        pair_to_composite(torch.tensor(m), torch.tensor(v)).item() for m, v in ((0, 0), (2, 1), (3, 2), (4, 0))
    ]
    assert composite == [0, 7, 11, 12]
    simple = [
        pair_to_simple(torch.tensor(m), torch.tensor(v)).item() for m, v in ((3, 0), (3, 1), (0, 2), (4, 1), (4, 0))
    ]
    assert simple == [3, 4, 5, 4, 6]  # a vote overrides the move
    with pytest.raises(ValueError, match="without a move"):
        pair_to_composite(torch.tensor(4), torch.tensor(1))
    assert Commons(CommonsConfig(coding="composite")).action_space.n == 13
    assert Commons(CommonsConfig(coding="simple")).action_space.n == 7
    assert Commons(CommonsConfig(coding="composite", form="bandit", menu_size=3)).action_space.n == 10


@pytest.mark.parametrize("coding", ["composite", "simple"])
def test_every_coding_plays_the_same_game(coding):
    config = {"num_agents": 3, "epoch_turns": 7}
    pairs = Commons(CommonsConfig(stay=True, **config), num_worlds=2)
    single = Commons(CommonsConfig(coding=coding, **config), num_worlds=2)
    generator = torch.Generator().manual_seed(0)
    assert_same(pairs.reset(seed=4), single.reset(seed=4))
    for _ in range(20):
        indices = torch.randint(13 if coding == "composite" else 7, (6,), generator=generator)
        moves, votes = (composite_to_pair if coding == "composite" else simple_to_pair)(indices)
        one, other = pairs.step(torch.stack([moves, votes], dim=1)), single.step(indices[:, None].numpy())
        assert torch.equal(one.rewards, other.rewards)
        assert_same(one.observations, other.observations)


def test_actions_in_all_their_forms():
    steps = []
    for wrap in (
        lambda pairs: pairs,
        lambda pairs: pairs.numpy(),
        lambda pairs: {"move": pairs[:, 0].numpy(), "vote": pairs[:, 1].numpy()},
        lambda pairs: {"vote": pairs[:, 1].to(torch.int32), "move": pairs[:, 0]},
    ):
        worlds = Commons(CommonsConfig(num_agents=2), num_worlds=3)
        worlds.reset(seed=0)
        steps.append(worlds.step(wrap(torch.tensor([[0, 1], [1, 2], [2, 0], [3, 1], [0, 0], [1, 1]]))))
    for step in steps[1:]:
        assert torch.equal(step.rewards, steps[0].rewards)
        assert_same(step.observations, steps[0].observations)


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        (torch.zeros(4, dtype=torch.int64), r"expected shape \(4, 2\), got \(4,\)"),
        (torch.zeros(3, 2, dtype=torch.int64), r"expected shape \(4, 2\), got \(3, 2\)"),
        (torch.zeros(4, 2), "integers"),
        (torch.tensor([[0, 0], [4, 0], [0, 0], [0, 0]]), "0 to 3, got 0 to 4"),
        (torch.tensor([[0, 0], [0, 3], [0, 0], [0, 0]]), "0 to 2, got 0 to 3"),
        (torch.tensor([[0, 0], [-1, 0], [0, 0], [0, 0]]), "got -1 to 0"),
        ({"move": np.zeros(4, int)}, r"\['move'\]"),
        ({"move": np.zeros(4, int), "vote": np.zeros(3, int)}, "as many moves as votes"),
    ],
)
def test_impossible_actions_are_refused(actions, message):
    worlds = Commons(CommonsConfig(num_agents=2), num_worlds=2)
    before = worlds.state()[0]
    with pytest.raises(ValueError, match=message):
        worlds.step(actions)
    assert_same(worlds.state()[0], before)


# Randomness, saving, independence.


def play(worlds: Commons, num_turns: int, seed: int) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    return [worlds.step(random_actions(worlds, generator)) for _ in range(num_turns)]


VARIED = {"num_agents": 3, "epoch_turns": 5, "stay": True, "respawn_probability": 0.1, "max_resources": 12}


@pytest.mark.parametrize("form", ["grid", "bandit"])
def test_same_seed_same_rollout(form):
    config = CommonsConfig(form=form, **VARIED)
    one, other, third = (Commons(config, num_worlds=4) for _ in range(3))
    state = torch.get_rng_state()
    assert_same(one.reset(seed=3), other.reset(seed=3))
    third.reset(seed=4)
    rollouts = [play(worlds, 12, seed=0) for worlds in (one, other, third)]
    for a, b in zip(*rollouts[:2]):
        assert torch.equal(a.rewards, b.rewards)
        assert_same(a.observations, b.observations)
    assert any(not torch.equal(a.rewards, b.rewards) for a, b in zip(rollouts[0], rollouts[2]))
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is left alone
    assert_same(one.reset(seed=3), other.reset(seed=3))
    assert one.harm_received.sum() == 0


@pytest.mark.parametrize("form", ["grid", "bandit"])
def test_worlds_do_not_touch_each_other(form):
    """What the agents of world 1 do changes nothing in worlds 0 and 2, to the bit."""
    config = CommonsConfig(form=form, **VARIED)
    one, other = Commons(config, num_worlds=3), Commons(config, num_worlds=3)
    one.reset(seed=0)
    other.reset(seed=0)
    generator = torch.Generator().manual_seed(0)
    elsewhere = torch.tensor([0, 1, 2, 6, 7, 8])
    differed = False
    for _ in range(25):
        actions = random_actions(one, generator)
        changed = actions.clone()
        changed[3:6] = random_actions(one, generator)[3:6]
        a, b = one.step(actions), other.step(changed)
        differed |= not torch.equal(a.rewards, b.rewards)
        assert torch.equal(a.rewards[elsewhere], b.rewards[elsewhere])
        for name, part in a.observations.items():
            assert torch.equal(part[elsewhere], b.observations[name][elsewhere]), name
        assert torch.equal(one.level[[0, 2]], other.level[[0, 2]])
    assert differed


@pytest.mark.parametrize("form", ["grid", "bandit"])
def test_a_restored_world_goes_on_to_the_bit(form, tmp_path):
    phases = (Phase(num_turns=6), Phase(mode="fixed", level=4, num_turns=3), Phase(mode="off"))
    config = CommonsConfig(form=form, phases=phases, **VARIED)
    worlds = Commons(config, num_worlds=2)
    worlds.reset(seed=0)
    play(worlds, 8, seed=0)
    write_tensors(tmp_path / "state", *worlds.state())
    restored = Commons(config, num_worlds=2)
    restored.restore(*read_tensors(tmp_path / "state"))
    assert_same(restored.observations(), worlds.observations())
    assert restored.frame(1).tolist() == worlds.frame(1).tolist()
    for a, b in zip(play(worlds, 14, seed=1), play(restored, 14, seed=1)):
        assert torch.equal(a.rewards, b.rewards)
        assert torch.equal(a.truncated, b.truncated)
        assert_same(a.observations, b.observations)
        if a.final_observations is not None:
            assert_same(a.final_observations, b.final_observations)
    assert worlds.statistics() == restored.statistics()
    assert worlds.turn == restored.turn == 22


def test_a_state_is_a_copy_and_must_fit():
    worlds = Commons(CommonsConfig(**VARIED), num_worlds=2)
    worlds.reset(seed=0)
    tensors, metadata = worlds.state()
    json.dumps(metadata)
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    play(worlds, 6, seed=0)
    assert_same(tensors, copies)
    for config, num_worlds in ((CommonsConfig(**{**VARIED, "punishment": 24.0}), 2), (worlds.config, 3)):
        other = Commons(config, num_worlds=num_worlds)
        before = other.state()
        with pytest.raises(CheckpointError, match="another commons"):
            other.restore(tensors, metadata)
        assert_same(other.state()[0], before[0])
    with pytest.raises(CheckpointError, match="forage/cells"):
        worlds.restore({name: tensor for name, tensor in tensors.items() if name != "forage/cells"}, metadata)


@pytest.mark.parametrize("damage", ["turn", "num_counted", "device", "rng", "short rng"])
def test_a_state_that_lacks_something_changes_nothing(damage):
    worlds = Commons(CommonsConfig(**VARIED), num_worlds=2)
    worlds.reset(seed=0)
    play(worlds, 6, seed=0)
    tensors, metadata = worlds.state()
    if damage == "short rng":
        tensors["rng"] = tensors["rng"][:16]
    else:
        (tensors if damage == "rng" else metadata).pop(damage)
    other = Commons(worlds.config, num_worlds=2)
    before = other.state()
    with pytest.raises(CheckpointError, match="lacks a part"):
        other.restore(tensors, metadata)
    assert_same(other.state()[0], before[0])
    assert other.state()[1] == before[1]


def test_a_state_from_a_gpu_goes_on_here_with_other_chance():
    """A CUDA generator's state is 16 bytes, and says nothing to one of the CPU."""
    worlds = Commons(CommonsConfig(**VARIED), num_worlds=2)
    worlds.reset(seed=0)
    play(worlds, 6, seed=0)
    tensors, metadata = worlds.state()
    rewards = []
    for last_byte in (1, 1, 2):
        other = Commons(worlds.config, num_worlds=2)
        rng = torch.tensor([0] * 15 + [last_byte], dtype=torch.uint8)
        assert_same(other.restore({**tensors, "rng": rng}, {**metadata, "device": "cuda"}), worlds.observations())
        assert other.turn == 6
        rewards.append(torch.stack([step.rewards for step in play(other, 10, seed=1)]))
    assert torch.equal(rewards[0], rewards[1])
    assert not torch.equal(rewards[0], rewards[2])


def test_kept_results_do_not_change_under_later_steps():
    worlds = Commons(CommonsConfig(**VARIED), num_worlds=2)
    observations = worlds.reset(seed=0)
    state = worlds.state()
    actions = random_actions(worlds, torch.Generator().manual_seed(0))
    step, events = worlds.step(actions), worlds.events
    kept = [observations, step.observations, {"rewards": step.rewards, "actions": actions, "punished": events.punished}]
    copies = [{name: part.clone() for name, part in group.items()} for group in kept]
    worlds.restore(*state)
    play(worlds, 10, seed=1)
    worlds.reset(seed=1)
    for group, copy in zip(kept, copies):
        assert_same(group, copy)


# Configuration.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_agents": 0}, "num_agents"),
        ({"resources": ()}, "resources"),
        ({"resources": ("A", "A")}, "resources"),
        ({"resources": tuple("ABCDEFGHI")}, "1 to 8"),
        ({"resources": ("A", "F")}, r"values.*\['F'\] missing"),
        ({"values": {"A": 1.0}}, "values"),
        ({"values": dict.fromkeys("ABCDE", math.inf)}, "values.*finite"),
        ({"harms": dict.fromkeys("ABCDE", -1.0)}, "harms"),
        ({"schedule": {**DESIGN_SCHEDULE, "B": (0.1,)}}, "same number of levels"),
        ({"schedule": {**DESIGN_SCHEDULE, "B": (1.1,) * 10}}, "schedule"),
        ({"schedule": dict.fromkeys("ABCDE", ())}, "same number of levels"),
        ({"punishment": -1.0}, "punishment"),
        ({"punishments_are": "random"}, "punishments_are"),
        ({"vote_shift": 0.0}, "vote_shift"),
        ({"vote_shift": 1.5}, "vote_shift"),
        ({"initial_level": 10}, "initial_level.*below 10, got 10"),
        ({"phases": ()}, "phases"),
        ({"phases": (Phase(level=10),)}, "phases.*below 10, got 10"),
        ({"phases": (Phase(), Phase())}, "phase 0 has no num_turns"),
        ({"phases": (Phase(),), "repeat_phases": True}, "phase 0 has no num_turns"),
        ({"voting_season": 1}, "voting_season"),
        ({"coding": "simple", "stay": True}, "stay"),
        ({"epoch_turns": 0}, "epoch_turns"),
        ({"patch_size": 2}, "patch_size"),
        ({"window_radius": 0}, "window_radius"),
        ({"bump": 1.0}, "bump"),
        ({"patch_size": 3, "initial_resources": 1}, "at most 0"),
        ({"max_resources": 3, "initial_resources": 4}, "at most 3"),
        ({"respawn_probability": 1.1}, "respawn_probability"),
        ({"form": "bandit", "menu_size": 6}, "menu_size"),
        ({"form": "maze"}, "form"),
        ({"radius": 4}, "radius"),
    ],
)
def test_impossible_rules_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        CommonsConfig(**changes)


def test_phases_and_worlds_are_checked():
    with pytest.raises(ValueError, match="num_turns"):
        Phase(num_turns=0)
    with pytest.raises(ValueError, match="num_worlds"):
        Commons(num_worlds=0)
    with pytest.raises(ValueError, match="below 2, got 2"):
        Commons(num_worlds=2).ascii(2)


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
        "phases": st.lists(
            st.builds(
                Phase,
                mode=st.sampled_from(["voted", "fixed", "off"]),
                level=st.none() | st.integers(0, 9),
                num_turns=st.none() | st.integers(1, 4),
            ),
            min_size=1,
            max_size=3,
        ).map(tuple),
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
            row = {name: part[stream].numpy()[()] for name, part in flat(observations).items()}
            heads = {name.partition("/")[2]: row.pop(name) for name in [*row] if name.startswith("action_mask/")}
            assert worlds.observation_space.contains(row | ({"action_mask": heads} if heads else {})), row
        samples = [worlds.action_space.sample() for _ in range(worlds.num_streams)]
        if config.coding == "pair":
            samples = [[sample["move"], sample["vote"]] for sample in samples]
        step = worlds.step(np.array(samples))
        assert torch.isfinite(step.rewards).all()
        assert step.truncated.all() == step.truncated.any() == (turn % config.epoch_turns == 0)
        assert (step.final_observations is None) == (not step.truncated.any())
        assert ((worlds.level >= 0) & (worlds.level <= 1)).all()
        if config.max_resources is not None and config.form == "grid":
            inside = worlds.forage.codes(slice(None))[:, 1:-1, 1:-1]
            assert (inside > 0).sum((1, 2)).max() <= config.max_resources
        observations = step.observations
    assert_same(observations, worlds.observations())


# With an agent, and with PettingZoo.


@pytest.mark.parametrize("form", ["grid", "bandit"])
@pytest.mark.parametrize("coding", ["pair", "composite"])
def test_an_agent_learns_from_it_with_norms(form, coding):
    config = CommonsConfig(
        form=form,
        coding=coding,
        num_agents=3,
        epoch_turns=5,
        respawn_probability=0.3,
        voting_season=3,
        agent_index=True,
    )
    worlds = Commons(config, num_worlds=2)
    agent = DualHeadRecurrentPPO(
        worlds.observation_space,
        worlds.action_space,
        num_streams=worlds.num_streams,
        config=PPOConfig(rollout_length=8, sequence_length=4, batch_size=24),
        network=NetworkConfig(hidden_size=16, encoder_sizes=(16,)),
        norms=NormConfig(resources=config.resources, internalization_threshold=0.0),
    )
    observations = worlds.reset(seed=0)
    collected = 0
    while not agent.rollout_is_ready:
        step = worlds.step(agent.act(observations))
        collected += int(worlds.events.collected.sum())
        agent.record(
            step.rewards,
            step.terminated,
            step.truncated,
            final_observations=step.final_observations,
            events=worlds.events,
        )
        observations = step.observations
    assert collected
    assert agent.norms.strengths.sum() > 0
    metrics = agent.learn(observations)
    assert all(math.isfinite(value) for value in metrics.values())
    assert "norms/strength/A" in metrics
    worlds.step(agent.to_env(agent.act(observations)))  # NumPy, in the form of the action space


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
    turn = env.commons.turn
    env.reset()  # in the middle of an epoch: a fresh one, the same run
    assert env.commons.turn == turn
    assert not env.step({name: {"move": 0, "vote": 0} for name in env.agents})[3]["agent_0"]


def test_parallel_env_says_what_is_wrong(monkeypatch):
    with pytest.raises(ValueError, match="render_mode"):
        parallel_env(render_mode="human")
    with pytest.raises(ValueError, match="got both"):
        parallel_env(CommonsConfig(), num_agents=2)
    monkeypatch.delitem(sys.modules, "dualhead.worlds.commons_parallel", raising=False)
    monkeypatch.setitem(sys.modules, "pettingzoo", None)
    with pytest.raises(UnavailableEnvironment, match=r"pip install 'dualhead\[pettingzoo\]'"):
        parallel_env()


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
    statistics = worlds.statistics()
    expected = {
        "taken/A": 1 / 4,
        "taken/B": 1 / 4,
        "punished/A": 1 / 4,
        "punished/B": 1 / 4,  # met at level 1 or 2, where B costs something
        "votes/up": 2 / 4,
        "votes/down": 1 / 4,
        "level": (0.2 + 0.1) / 2,
        "harm/dealt": 5 / 4,
        "harm/received": 5 / 4,
    }
    for name, value in expected.items():
        assert statistics[f"commons/{name}"] == pytest.approx(value), name
    assert statistics["commons/taken/C"] == 0
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
