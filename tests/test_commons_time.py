"""The commons over time: epochs, phases and seasons, codings of actions, randomness, and what is saved."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from commons_worlds import RIGHT, STAY, VARIED, act, assert_same, bandit, drawn, random_actions, row, slots

from dualhead.storage import CheckpointError, read_tensors, write_tensors
from dualhead.worlds.commons.actions import NO_VOTE, VOTE_DOWN, VOTE_UP, number_of, pairs_of
from dualhead.worlds.commons.config import CommonsConfig, Phase
from dualhead.worlds.commons.world import Commons

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
        masks.append({head: part[0].tolist() for head, part in mask.items()} if coding == "pair" else mask[0].tolist())
        is_voting = observations["scalars"][0, 3].item()
        assert masks[-1] == (voting if is_voting else moving)
        rewards.append(worlds.step(torch.tensor([action])).rewards.item())
        levels.append(worlds.level.item())
    assert [mask == voting for mask in masks] == [False, False, True, False, False, False]
    assert levels == [0, 0, 0.5, 0.5, 0.5, 0.5]
    if coding != "simple":
        assert rewards[:3] == [12.5, 10, 0]  # A, B, and no bump in the turn for votes
        assert rewards[3:5] == [-1, -1]
    assert worlds.observation_space["action_mask"].contains(row(mask, 0))


# Codings.


@pytest.mark.parametrize("num_moves", [1, 4, 5])
def test_codings_round_trip(num_moves):
    moves = range(num_moves)
    composite, simple = pairs_of("composite", num_moves), pairs_of("simple", num_moves)
    assert composite == [*((move, vote) for move in moves for vote in range(3)), (num_moves, NO_VOTE)]
    stays = [(num_moves, VOTE_UP), (num_moves, VOTE_DOWN), (num_moves, NO_VOTE)]
    assert simple == [*((move, NO_VOTE) for move in moves), *stays]
    for coding, pairs in (("composite", composite), ("simple", simple)):
        assert [number_of(coding, *pair, num_moves) for pair in pairs] == [*range(len(pairs))]


def test_historical_numbers():
    assert [number_of("composite", *pair) for pair in ((0, 0), (2, 1), (3, 2), (4, 0))] == [0, 7, 11, 12]
    # A vote overrides the move.
    assert [number_of("simple", *pair) for pair in ((3, 0), (3, 1), (0, 2), (4, 1), (4, 0))] == [3, 4, 5, 4, 6]
    with pytest.raises(ValueError, match="composite"):
        number_of("composite", 4, VOTE_UP)
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
        indices = torch.randint(single.action_space.n, (6,), generator=generator)
        one, other = pairs.step(torch.tensor(pairs_of(coding))[indices]), single.step(indices[:, None].numpy())
        assert_same_rollouts([one], [other])


def test_actions_in_all_their_forms():
    pairs, steps = torch.tensor([[0, 1], [1, 2], [2, 0], [3, 1], [0, 0], [1, 1]]), []
    moves, votes = pairs.unbind(1)
    for actions in (
        pairs,
        pairs.numpy(),
        {"move": moves.numpy(), "vote": votes.numpy()},
        {"vote": votes.to(torch.int32), "move": moves},
    ):
        worlds = Commons(CommonsConfig(num_agents=2), num_worlds=3)
        worlds.reset(seed=0)
        steps.append(worlds.step(actions))
        assert_same_rollouts(steps[-1:], steps[:1])


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        (torch.zeros(4, dtype=torch.int64), r"actions.*got .*\(4,\)"),
        (torch.zeros(3, 2, dtype=torch.int64), r"actions.*got .*\(3,\)"),
        (torch.zeros(4, 2), "integers"),
        (torch.tensor([[0, 0], [4, 0], [0, 0], [0, 0]]), "0 to 3, got 0 to 4"),
        (torch.tensor([[0, 0], [0, 3], [0, 0], [0, 0]]), "0 to 2, got 0 to 3"),
        (torch.tensor([[0, 0], [-1, 0], [0, 0], [0, 0]]), "got -1 to 0"),
        ({"move": np.zeros(4, int)}, r"\['move'\]"),
        ([None] * 4, "actions"),
        ({"move": np.zeros(4, int), "vote": np.zeros(3, int)}, r"actions.*got .*\(3,\)"),
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


def assert_same_rollouts(one: list[Any], other: list[Any]) -> None:
    for a, b in zip(one, other, strict=True):
        assert_same([a.rewards, a.observations, a.truncated], [b.rewards, b.observations, b.truncated])
        assert (a.final_observations is None) == (b.final_observations is None)
        assert_same(a.final_observations or {}, b.final_observations or {})


def varied(**changes: Any) -> Commons:
    """Two worlds after six turns."""
    worlds = Commons(CommonsConfig(**VARIED | changes), num_worlds=2)
    worlds.reset(seed=0)
    play(worlds, 6, seed=0)
    return worlds


@pytest.mark.parametrize("form", ["grid", "bandit"])
def test_same_seed_same_rollout(form):
    config = CommonsConfig(form=form, **VARIED)
    one, other, third = (Commons(config, num_worlds=4) for _ in range(3))
    state = torch.get_rng_state()
    assert_same(one.reset(seed=3), other.reset(seed=3))
    third.reset(seed=4)
    rollouts = [play(worlds, 12, seed=0) for worlds in (one, other, third)]
    assert_same_rollouts(*rollouts[:2])
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
    assert_same(restored.restore(*read_tensors(tmp_path / "state")), worlds.observations())
    assert restored.frame(1).tolist() == worlds.frame(1).tolist()
    assert_same_rollouts(play(worlds, 14, seed=1), play(restored, 14, seed=1))
    assert worlds.statistics() == restored.statistics()
    assert worlds.turn == restored.turn == 22


def test_a_state_is_a_copy_and_must_fit():
    worlds = varied()
    tensors, metadata = worlds.state()
    json.dumps(metadata)
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    play(worlds, 6, seed=0)
    assert_same(tensors, copies)
    for config, num_worlds in ((CommonsConfig(**{**VARIED, "punishment": 24.0}), 2), (worlds.config, 3)):
        other = Commons(config, num_worlds=num_worlds)
        before = other.state()[0]
        with pytest.raises(CheckpointError, match="another commons"):
            other.restore(tensors, metadata)
        assert_same(other.state()[0], before)
    truths = {name: value == 1 if value in (0, 1) else value for name, value in metadata["config"].items()}
    assert truths == metadata["config"]  # to Python, where 1 is True
    with pytest.raises(CheckpointError, match="another commons"):
        worlds.restore(tensors, metadata | {"config": truths})
    with pytest.raises(CheckpointError, match="forage/cells"):
        worlds.restore({name: tensor for name, tensor in tensors.items() if name != "forage/cells"}, metadata)


@pytest.mark.parametrize(
    ("form", "name", "value"),
    [
        *(("grid", name, None) for name in ("turn", "num_counted", "device", "rng")),
        ("grid", "rng", 16),
        ("grid", "turn", -1),
        ("grid", "turn", 6.5),
        ("grid", "epoch_turn", 5),
        ("grid", "num_counted", -1),
        ("grid", "level", 1_000_001),
        ("grid", "last_votes", 3),
        ("grid", "forage/positions", 0),  # in a wall
        ("grid", "forage/positions", 10**9),
        ("grid", "forage/cells", 6),  # walls everywhere
        ("grid", "forage/cells", -1),
        ("bandit", "forage/drawn", 20),
    ],
)
def test_a_state_that_no_world_can_be_in_changes_nothing(form, name, value):
    """Missing (None), cut off, or with an impossible number."""
    worlds, other = varied(form=form), Commons(CommonsConfig(form=form, **VARIED), num_worlds=2)
    tensors, metadata = worlds.state()
    part = tensors if name in tensors else metadata
    if value is None:
        del part[name]
    elif name == "rng":
        tensors[name] = tensors[name][:value]
    else:
        part[name] = torch.full_like(tensors[name], value) if part is tensors else value
    before = other.state()
    with pytest.raises(CheckpointError, match="commons" if name == "rng" else name.rpartition("/")[2]):
        other.restore(tensors, metadata)
    assert_same(other.state()[0], before[0])
    assert other.state()[1] == before[1]


def test_a_state_from_a_gpu_goes_on_here_with_other_chance():
    """A CUDA generator's state is 16 bytes, and says nothing to one of the CPU."""
    worlds = varied()
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
