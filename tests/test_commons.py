"""The commons' rules: drawn worlds with exact outcomes, plain-Python oracles, frequencies within bounds."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import permutations

import numpy as np
import pytest
import torch
from commons_worlds import (
    DESIGN_SCHEDULE,
    DOWN,
    EXACT,
    LEFT,
    RIGHT,
    STAY,
    UP,
    act,
    assert_binomial,
    assert_same,
    bandit,
    drawn,
    random_actions,
    slots,
)

from dualhead.worlds.commons.actions import NO_VOTE, VOTE_DOWN, VOTE_UP
from dualhead.worlds.commons.config import CommonsConfig, Phase
from dualhead.worlds.commons.world import Commons, view

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
    assert view.symbols(("B", "A")) == ".BA#"
    assert view.symbols(("berry", "gem")) == ".AB#"
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
    assert_binomial((rewards[:, 1] == -5).sum(), W, 0.5)


def test_orders_are_uniform_and_differ_between_worlds():
    worlds = bandit(6000, num_agents=3)
    orders = worlds._turn_order()
    assert (orders.sort(dim=1).values == torch.arange(3)).all()
    assert_binomial([(orders == torch.tensor(order)).all(1).sum() for order in permutations(range(3))], 6000, 1 / 6)


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
        for agent, row in enumerate(DESIGN_SCHEDULE.values()):
            assert_binomial(punished[:, agent, agent].sum(), W, row[level])


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
    num_agents, probability = 3000, 0.05
    worlds = Commons(
        CommonsConfig(num_agents=num_agents, initial_resources=0, respawn_probability=probability, stay=True)
    )
    worlds.reset(seed=0)
    act(worlds, STAY)
    codes = worlds.forage.codes()
    inside = codes[:, 1:-1, 1:-1]
    num_grown = int((inside > 0).sum())
    assert_binomial(num_grown, num_agents * 63, probability)
    # An agent stands on any cell with probability 1/64, and nothing grows under it.
    assert_binomial((inside > 0).sum(0), num_agents, probability * 63 / 64)
    assert_binomial([(inside == kind).sum() for kind in range(1, 6)], num_grown, 0.2)
    rows, columns = worlds.forage.agents().unbind(1)
    assert (codes[torch.arange(num_agents), rows, columns] == 0).all()
    border = codes.clone()
    border[:, 1:-1, 1:-1] = 6
    assert (border == 6).all()
    before = codes.clone()
    act(worlds, STAY)
    after = worlds.forage.codes()
    assert torch.equal(after[before > 0], before[before > 0])  # what lies there stays what it is


@pytest.mark.parametrize("probability", [1e-17, 1e-19, 1e-25])
def test_growth_so_rare_that_it_never_happens(probability):
    """The gaps between such successes are too long for integers of 64 bits."""
    worlds = drawn("#####\n#@..#\n#...#\n#...#\n#####", respawn_probability=probability)
    for _ in range(50):
        act(worlds, STAY)
    assert not any(kind in worlds.ascii() for kind in "ABCDE")


def test_growth_with_certainty_fills_the_patch():
    worlds = drawn("#####\n#...#\n#.@.#\n#..A#\n#####", respawn_probability=1.0)
    act(worlds, STAY)
    patch = worlds.ascii()
    assert patch.count("@") == 1
    assert "." not in patch
    assert patch.splitlines()[3][3] == "A"


def test_a_cap_limits_growth_and_favours_no_place():
    num_agents, cap = 4000, 3
    rules = {"patch_size": 5, "initial_resources": 1, "respawn_probability": 0.9, "max_resources": cap, "stay": True}
    worlds = Commons(CommonsConfig(num_agents=num_agents, **rules))
    worlds.reset(seed=0)
    act(worlds, STAY)
    inside = worlds.forage.codes()[:, 1:-1, 1:-1]
    counts = (inside > 0).sum((1, 2))
    assert counts.max() == cap
    assert (counts == cap).float().mean() > 0.99  # seven cells at 0.9: two grow almost surely
    assert_binomial((inside > 0).sum(0), num_agents, cap / 9)
    for _ in range(5):
        act(worlds, torch.randint(5, (num_agents,)))
        assert (worlds.forage.codes()[:, 1:-1, 1:-1] > 0).sum((1, 2)).max() == cap


def test_fresh_patches_are_uniform():
    num_agents = 4000
    worlds = Commons(CommonsConfig(num_agents=num_agents, patch_size=5, initial_resources=3))
    worlds.reset(seed=1)
    inside = worlds.forage.codes()[:, 1:-1, 1:-1]
    assert ((inside > 0).sum((1, 2)) == 3).all()
    assert_binomial((inside > 0).sum(0), num_agents, 3 / 9)
    agents = worlds.forage.agents() - 1
    assert_binomial((agents[:, 0] * 3 + agents[:, 1]).bincount(minlength=9), num_agents, 1 / 9)
    assert_binomial([(inside == kind).sum() for kind in range(1, 6)], 3 * num_agents, 0.2)


def test_menus_are_uniform_without_repetition():
    worlds = bandit(3000, num_agents=2, resources=("A", "B", "C"))
    menus = worlds.observations()["menu"].view(-1, 2, 3).argmax(-1)
    counts = (menus[:, 0] * 3 + menus[:, 1]).bincount(minlength=9).view(3, 3)
    assert_binomial(counts[~torch.eye(3, dtype=torch.bool)], 6000, 1 / 6)
    assert (counts.diagonal() == 0).all()
    act(worlds, 0)
    again = worlds.observations()["menu"].view(-1, 2, 3).argmax(-1)
    assert_binomial((again == menus).all(1).sum(), 6000, 1 / 6)
    act(worlds, worlds.forage.num_moves)
    assert not worlds.events.collected.any()
