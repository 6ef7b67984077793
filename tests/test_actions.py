"""Action spaces that mean the same train to the same bits, and discrete and Box actions are learned together."""

import agents
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector.utils import batch_space

from dualhead import DualHeadRecurrentPPO, NetworkConfig, NormConfig, NormEvents, Player, PPOConfig
from dualhead.errors import CheckpointError
from dualhead.worlds.replay import leaves

B, T = 3, 20
NOBODY = np.zeros(B, bool)
BOX = spaces.Box(np.float32([[-2, -np.inf]]), np.float32([[4, np.inf]]))
ONE, TWO = spaces.Discrete(3, start=1), spaces.Discrete(2)
MIXED = spaces.Tuple((BOX, spaces.Dict(go=ONE, on=spaces.MultiBinary(2)), spaces.Box(0, 1, (1,), np.float64)))


def trained(action_space, **settings):
    """An agent after two updates, and all its actions, flat. Rewards and ends of episodes are random."""
    agent = agents.make_agent(action_space=action_space, previous_action=True, **settings)
    rng, acted = np.random.default_rng(0), []
    for _ in range(2):
        for _ in range(T):
            actions = agent.act(rng.normal(size=(B, 3)))
            assert batch_space(action_space, B).contains(actions)
            acted.append(np.concatenate([leaf.reshape(B, -1) for leaf in leaves(actions)], axis=1))
            final = rng.normal(size=(B, 3))
            agent.record(rng.normal(size=B), rng.random(B) < 0.05, rng.random(B) < 0.05, final_observations=final)
        metrics = agent.learn(rng.normal(size=(B, 3)))
        assert metrics["policy/first_ratio_error"] < 1e-12
    return agent, np.stack(acted)


@pytest.mark.parametrize(
    "same",
    [
        (spaces.MultiBinary(3), spaces.MultiDiscrete([2, 2, 2])),
        (spaces.MultiBinary((3, 1)), spaces.Tuple([spaces.Discrete(2)] * 3)),
        (spaces.MultiDiscrete([[3], [2]], start=[[1], [0]]), spaces.Dict(a=ONE, b=TWO), spaces.Tuple((ONE, TWO))),
        (spaces.Dict(a=ONE, b=TWO), spaces.Dict(a=spaces.Dict(a=ONE), b=spaces.Tuple((TWO,)))),
        (spaces.Box(-2, 2, (2, 2)), spaces.Box(-2, 2, (4,)), spaces.Dict(a=spaces.Box(-2, 2, (4,)))),
        (spaces.Tuple((BOX, ONE)), spaces.Dict(box=BOX, choice=ONE), spaces.Tuple((BOX, spaces.Tuple((ONE,))))),
    ],
    ids=["bits", "bits one by one", "discrete", "nested", "shapes of a box", "mixed"],
)
def test_spaces_that_mean_the_same_train_to_the_same_bits(same):
    ends = [trained(space) for space in same]
    weights = [list(agent.policy.state_dict().values()) for agent, _ in ends]
    for own, (_, acted) in zip(weights, ends):
        np.testing.assert_array_equal(acted, ends[0][1])
        assert all(torch.equal(a, b) for a, b in zip(own, weights[0], strict=True))


@pytest.mark.parametrize("ratio", ["per_head", "joint"])
def test_each_box_is_one_head(ratio):
    """Names, log-probabilities and entropy weights per head; the surrogate's ratios per head or one."""
    coefs = (0.1, 0.2, 0.3, 0.4, 0.5)
    agent, _ = trained(MIXED, entropy_coef=coefs, ratio=ratio)
    names = ("1/go", "1/on_0", "1/on_1", "0", "2")
    assert agent.action_spec.names == names
    assert agent.rollout_memory.actions.shape == (T, B, 3 + 2 + 1)
    assert agent.rollout_memory.log_probs.shape == (T, B, 5)
    for _ in range(T):
        agent.act(np.ones((B, 3)))
        agent.record(np.ones(B), NOBODY, NOBODY)
    metrics = agent.learn(np.ones((B, 3)))
    assert {name: metrics[f"update/entropy_coef/{name}"] for name in names} == dict(zip(names, coefs))
    assert all(f"entropy/{name}" in metrics for name in names)
    with pytest.raises(ValueError, match=r"expected one number or 5, one per head .*'1/on_0'"):
        agents.make_agent(action_space=MIXED, entropy_coef=(0.1, 0.2))


def test_a_saved_agent_with_mixed_actions_is_read_strictly(tmp_path):
    agent, _ = trained(MIXED)
    agent.act(np.ones((B, 3)))
    agent.record(np.ones(B), NOBODY, NOBODY)
    agent.save(tmp_path / "agent")
    again = DualHeadRecurrentPPO.from_file(tmp_path / "agent")
    assert again.action_spec.space == MIXED
    assert torch.equal(again.rollout_memory.actions[0], agent.rollout_memory.actions[0])
    tensors, metadata = agent.state()
    for wrong in (0.5, -1.0, 3.0, np.nan):
        changed = tensors["rollout/actions"].clone()
        changed[0, 1, 0] = wrong
        with pytest.raises(CheckpointError, match="expected whole numbers below"):
            again.restore(tensors | {"rollout/actions": changed}, metadata)
    metadata["action_space"] = {"kind": "MultiBinary", "n": 10**12}
    with pytest.raises(CheckpointError, match="action_space"):
        again.restore(tensors, metadata)


def test_a_player_gives_one_action_as_the_space_has_it():
    agent, _ = trained(MIXED)
    player = Player(agent.policy, agents.SPACE, MIXED)
    for start in (True, False):
        assert MIXED.contains(player.act(np.ones(3), start))


def test_norms_see_the_discrete_heads_of_mixed_actions():
    """Action mode: guilt after the harmful choice of head 0, whatever the numbers beside it are."""
    norms = NormConfig(
        mode="action", harmful_action=0, decay_rate=1.0, internalization_threshold=0.0, intrinsic_scale=-1.0
    )
    agent = agents.make_agent(action_space=spaces.Tuple((BOX, TWO)), norms=norms)
    for _ in range(5):
        agent.act(np.zeros((B, 3)))
        agent.record(np.zeros(B), NOBODY, NOBODY, events=NormEvents(punished=np.ones((B, 1), bool)))
    chosen, guilt = agent.rollout_memory.actions[:5, :, 0], agent.rollout_memory.guilt[:5]
    assert chosen.unique().tolist() == [0, 1]
    assert torch.equal(guilt, torch.where(chosen == 0, -torch.arange(1.0, 6.0)[:, None], 0.0).double())


@pytest.mark.parametrize("ratio", ["per_head", "joint"])
def test_choices_and_sizes_are_learned_together(ratio):
    """Shown a mode and a size: 1 for the mode, less the distance from the size. Chance has 0.5 at best for the mode,
    and the size 0 is 1 away on average, so either part alone stays below 0."""
    space = spaces.Dict(size=spaces.Box(-2.0, 2.0, (1,)), mode=spaces.Discrete(2, start=1))
    agent = DualHeadRecurrentPPO(
        spaces.Box(-1, 1, (2,)),
        space,
        num_streams=64,
        config=PPOConfig(rollout_length=16, batch_size=256, learning_rate=0.01, ratio=ratio),
        network=NetworkConfig(memory="none", hidden_size=32, encoder_sizes=(32,)),
    )
    player, rng, ended = (
        Player(agent.policy, agent.observation_spec.space, space),
        np.random.default_rng(0),
        np.ones(64, bool),
    )

    def see():
        return np.stack([rng.choice([-1.0, 1.0], 64), rng.uniform(-1, 1, 64)], axis=1)

    def rewards(seen, actions):
        return (actions["mode"] == (seen[:, 0] > 0) + 1) - abs(actions["size"][:, 0] - 2 * seen[:, 1])

    for _ in range(12):
        for _ in range(16):
            seen = see()
            agent.record(rewards(seen, agent.act(seen)), ended, ~ended)
        agent.learn()
    seen = see()
    assert rewards(seen, player.act(seen, ended)).mean() > 0.8
