"""The specification, section by section: `DualHeadRecurrentPPO` against the plainly written agent of `reference.py`."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from reference import ReferenceAgent
from settings import act_in_heads

import dualhead.agent
from dualhead.agent import DualHeadRecurrentPPO
from dualhead.config import NetworkConfig, PPOConfig
from dualhead.learning.segments import minibatches
from dualhead.types import RecurrentState

SHAPE = (5, 11, 11)
IMAGES = spaces.Box(-np.inf, np.inf, SHAPE, np.float32)
ACTIONS = {(4, 3): spaces.MultiDiscrete([4, 3]), (5,): spaces.Discrete(5)}
AS_SPECIFIED = PPOConfig.spec()
# Steps that end an episode: 7 is an episode of one step. Rollouts of 100 steps are cut inside an episode; of rollouts
# of 30 steps the first is, the second ends with its episode, and an episode of one step begins the third.
ENDS = {6, 7, 38, 59, 60, 83}


def make_agent(memory="lstm", heads=(4, 3), *, config=AS_SPECIFIED, **network):
    network = NetworkConfig.spec(memory=memory, **network)
    return DualHeadRecurrentPPO(IMAGES, ACTIONS[heads], config=config, network=network, dtype=torch.float64, seed=3)


def weights_by_reference_name(agent, memory, heads):
    """Copies of our weights under the reference's names; the parameters inside a layer have the same names."""
    layers = {
        "encoder.parts.0.convolutions.0": "conv1",
        "encoder.parts.0.convolutions.2": "conv2",
        "encoder.joined.0": "fc",
        f"memory.{memory}": memory,
        "critic": "critic",
    }
    layers |= {f"heads.linears.{k}": f"heads.{k}" for k in range(len(heads))}
    named = {}
    for name, parameter in agent.policy.named_parameters():
        layer, _, rest = name.rpartition(".")
        named[f"{layers[layer]}.{rest}"] = parameter.detach().clone()
    return named


def make_reference(agent, memory, heads):
    """A reference that begins with our weights: all of them, and nothing else."""
    reference = ReferenceAgent(memory, SHAPE, heads)
    reference.load_state_dict(weights_by_reference_name(agent, memory, heads), strict=True)
    return reference


def collect(agent, reference, rng):
    """Both live through the steps of one rollout; the actions are those our agent draws."""
    while not agent.rollout_is_ready:
        t = agent.num_steps
        observation = rng.normal(size=SHAPE).astype(np.float32)
        reward, done = rng.normal(), t in ENDS
        (actions,) = act_in_heads(agent, observation[None])
        agent.record([reward], [done], [False])
        reference.step(observation, actions, reward, done)


def minibatch_order(agent):
    """The minibatches of the update to come, from a copy of our agent's generator; every epoch sees every step once."""
    generator = torch.Generator()
    generator.set_state(agent._shuffling.get_state())
    lengths = np.ones(agent.config.rollout_length, dtype=np.int64)
    epochs = [minibatches(lengths, agent.config.batch_size, generator=generator) for _ in range(4)]
    for epoch in epochs:
        assert len(epoch) > 1
        assert sorted(np.concatenate(epoch)) == list(range(len(lengths)))
    return [[torch.from_numpy(part) for part in epoch] for epoch in epochs]


def greatest(ours, theirs):
    """Greatest difference of two tensors of one shape, or of two dicts of them."""
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        return max(greatest(ours[name], theirs[name]) for name in ours)
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype == torch.float64
    return (ours - theirs).abs().max().item()


def assert_same_rollout(agent, reference, *, tolerance):
    """States, log-probs and values that acting stored."""
    ours, theirs = agent.rollout_memory, reference.rollout_memory
    assert ours.length == len(theirs["values"])
    states = reference._prepare_hidden()
    states = states if reference.cell == "lstm" else (states,)
    assert list(ours.states) == ["h", "c"][: len(states)]
    for buffer, state in zip(ours.states.values(), states):
        assert greatest(buffer[:, :, 0], state) < tolerance
    for name in ("log_probs", "values"):
        assert greatest(getattr(ours, name)[:, 0], torch.tensor(theirs[name], dtype=torch.float64)) < tolerance


@pytest.fixture
def advantages_seen(monkeypatch):
    """The advantages [T, B] that updates were given, before normalisation."""
    seen = []
    update = dualhead.agent.ppo_update

    def spy(policy, rollout, **settings):
        seen.append(settings["advantages"].clone())
        return update(policy, rollout, **settings)

    monkeypatch.setattr(dualhead.agent, "ppo_update", spy)
    return seen


@pytest.mark.parametrize("heads", list(ACTIONS), ids=["two_heads", "one_head"])
@pytest.mark.parametrize("memory", ["lstm", "gru"])
def test_one_update_equals_the_reference(memory, heads, advantages_seen):
    agent = make_agent(memory, heads)
    reference = make_reference(agent, memory, heads)
    before = weights_by_reference_name(agent, memory, heads)

    collect(agent, reference, np.random.default_rng(0))
    assert_same_rollout(agent, reference, tolerance=1e-9)

    order = minibatch_order(agent)
    advantages = torch.tensor(reference.advantages(), dtype=torch.float64)
    metrics = agent.learn()
    reference.learn(order)
    assert greatest(advantages_seen[0][:, 0], advantages) < 1e-9
    after = weights_by_reference_name(agent, memory, heads)
    assert greatest(after, reference.state_dict()) < 1e-9

    # Agreement means something: every weight tensor moved, and both kinds of clipping were at work.
    assert greatest(after, before) > 1e-4
    for name in after:
        assert greatest(after[name], before[name]) > 1e-6, name
    assert metrics["policy/clip_fraction"] > 0.01
    assert metrics["policy/grad_norm"] > 0.5
    assert metrics["policy/first_ratio_error"] < 1e-9


@pytest.mark.parametrize(("memory", "heads"), [("lstm", (4, 3)), ("gru", (5,))], ids=["lstm", "gru"])
def test_three_rollouts_and_updates_equal_the_reference(memory, heads):
    """The state is carried from rollout to rollout, and so are Adam's moments."""
    agent = make_agent(memory, heads, config=AS_SPECIFIED.model_copy(update={"rollout_length": 30, "batch_size": 10}))
    reference = make_reference(agent, memory, heads)
    rng = np.random.default_rng(1)
    for i in range(3):
        collect(agent, reference, rng)
        assert_same_rollout(agent, reference, tolerance=1e-8)
        assert agent.rollout_memory.h_states[:, 0].any() == (i == 1)  # the second rollout begins inside an episode
        order = minibatch_order(agent)
        agent.learn()
        reference.learn(order)
        assert greatest(weights_by_reference_name(agent, memory, heads), reference.state_dict()) < 1e-8


# §2, §3, §8: the state.


def observations(rng):
    return rng.normal(size=(1, *SHAPE)).astype(np.float32)


def check_hidden_state(memory, num_parts):
    agent = make_agent(memory)
    assert agent._current_hidden is None
    before = tuple(agent._get_hidden_state())
    agent.act(observations(np.random.default_rng(0)))
    after = tuple(agent._current_hidden)
    assert [part.shape for part in (*before, *after)] == [(1, 1, 256)] * 2 * num_parts
    assert not any(part.any() for part in before)
    assert all(part.all() for part in after)


def test_hidden_state_of_an_lstm_is_the_pair_h_c():
    check_hidden_state("lstm", 2)
    h, c = make_agent("lstm")._get_hidden_state()
    assert h is not c


def test_hidden_state_of_a_gru_is_h():
    check_hidden_state("gru", 1)


@pytest.mark.parametrize("memory", ["lstm", "gru"])
def test_update_hidden_state_is_what_the_next_step_begins_from(memory):
    agent = make_agent(memory)
    rng = np.random.default_rng(0)
    given = agent._get_hidden_state().map(torch.rand_like)
    agent._update_hidden_state(given)
    assert agent._get_hidden_state() is agent._current_hidden is given
    agent.act(observations(rng))
    for name, part in given.parts.items():
        assert torch.equal(agent.rollout_memory.states[name][:, 0], part)
    assert torch.equal(agent.rollout_memory.h_states[:, 0], given.h)
    if memory == "lstm":
        assert torch.equal(agent.rollout_memory.c_states[:, 0], given.c)


@pytest.mark.parametrize("memory", ["lstm", "gru"])
@pytest.mark.parametrize("how", ["terminated", "truncated", "reset_state", "none"])
def test_episode_reset_zeroes_every_part_of_the_state(memory, how):
    agent = make_agent(memory)
    rng = np.random.default_rng(0)
    agent.act(observations(rng))
    if how == "truncated":
        agent.record([0.0], [False], [True], final_observations=observations(rng))
    else:
        agent.record([0.0], [how == "terminated"], [False])
    if how == "reset_state":
        agent.learn(partial=True)
        agent.reset_state()
    elif how == "none":
        agent._current_hidden = None  # §8, letter by letter
    assert not any(part.any() for part in agent._get_hidden_state())


# §5: what is stored.


@pytest.mark.parametrize("memory", ["lstm", "gru"])
def test_stored_states_are_those_before_the_step_and_detached(memory):
    agent = make_agent(memory)
    rng = np.random.default_rng(0)
    before, after = [], []
    for t in range(12):
        before.append([part.clone() for part in agent._get_hidden_state()])
        agent.act(observations(rng))
        after.append([part.clone() for part in agent._current_hidden])
        agent.record([0.0], [t in ENDS], [False])
    stored = list(agent.rollout_memory.states.values())
    assert len(stored) == len(before[0]) == (2 if memory == "lstm" else 1)
    for i, buffer in enumerate(stored):
        assert not buffer.requires_grad
        assert buffer.grad_fn is None
        for t in range(12):
            assert torch.equal(buffer[:, t], before[t][i])
            assert not torch.equal(buffer[:, t], after[t][i])
            begins = t == 0 or t - 1 in ENDS
            assert torch.equal(buffer[:, t], torch.zeros_like(buffer[:, t]) if begins else after[t - 1][i])
    assert all(part.grad_fn is None for part in agent._current_hidden)


# §11: only h reaches heads and critic.


def test_heads_and_critic_see_h_alone(monkeypatch):
    policy = make_agent("lstm").policy
    rng = np.random.default_rng(0)
    seen = []
    for layer in (*policy.heads.linears, policy.critic):
        layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    leaves = {"observation": torch.from_numpy(observations(rng))}
    h, c = torch.randn(2, 1, 1, 256, dtype=torch.float64).unbind(0)
    output, (new_h, new_c) = policy.step(leaves, RecurrentState(h, c))
    assert len(seen) == 3
    assert all(torch.equal(features, new_h[-1]) for features in seen)

    # Another cell state beside the same h, handed over where encoder and memory meet.
    forward_base = policy._forward_base

    def with_another_cell_state(*args):
        features, state = forward_base(*args)
        return features, RecurrentState(state.h, torch.randn_like(state.c))

    monkeypatch.setattr(policy, "_forward_base", with_another_cell_state)
    other, (same_h, another_c) = policy.step(leaves, RecurrentState(h, c))
    assert torch.equal(same_h, new_h)
    assert not torch.equal(another_c, new_c)
    assert torch.equal(other.values, output.values)
    for logits, as_before in zip(other.distribution.logits, output.distribution.logits):
        assert torch.equal(logits, as_before)


def test_the_cell_state_matters_to_the_next_step():
    """What only h reaches must still depend on the c before: the reason why both are stored."""
    policy = make_agent("lstm").policy
    leaves = {"observation": torch.from_numpy(observations(np.random.default_rng(0)))}
    state = RecurrentState(*torch.randn(2, 1, 1, 256, dtype=torch.float64).unbind(0))
    output, _ = policy.step(leaves, state)
    without, _ = policy.step(leaves, RecurrentState(state.h, torch.zeros_like(state.h)))
    assert (output.values - without.values).abs().item() > 1e-3


# §1, §9, §10: shapes, initialisation, defaults.


@pytest.mark.parametrize(("memory", "kind"), [("lstm", torch.nn.LSTM), ("gru", torch.nn.GRU)])
def test_the_specification_s_network_has_the_specified_layers(memory, kind):
    policy = make_agent(memory).policy
    cell = getattr(policy.memory, memory)
    assert type(cell) is kind
    assert (cell.input_size, cell.hidden_size, cell.num_layers, cell.batch_first) == (256, 256, 1, True)
    assert not hasattr(policy.memory, "gru" if memory == "lstm" else "lstm")
    shapes = {name: tuple(p.shape) for name, p in make_reference(make_agent(memory), memory, (4, 3)).named_parameters()}
    gates = 4 if memory == "lstm" else 3
    assert shapes["conv1.weight"] == (32, 5, 3, 3)
    assert shapes["conv2.weight"] == (64, 32, 3, 3)
    assert shapes["fc.weight"] == (256, 64 * 11 * 11)
    assert shapes[f"{memory}.weight_ih_l0"] == shapes[f"{memory}.weight_hh_l0"] == (gates * 256, 256)
    for name, num_outputs in (("heads.0", 4), ("heads.1", 3), ("critic", 1)):
        assert shapes[f"{name}.weight"] == (num_outputs, 256)


def assert_orthogonal(weight, gain):
    """W Wᵀ = gain² I, or Wᵀ W where W is taller than wide; a convolution's filters are its rows."""
    matrix = weight.flatten(1).double()
    matrix = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    expected = gain**2 * torch.eye(matrix.shape[0], dtype=torch.float64)
    assert (matrix @ matrix.T - expected).abs().max() < 1e-5


@pytest.mark.parametrize("memory", ["lstm", "gru"])
def test_weights_begin_orthogonal_and_biases_zero(memory):
    for name, parameter in weights_by_reference_name(make_agent(memory), memory, (4, 3)).items():
        if "bias" in name:
            assert not parameter.any(), name
        else:
            assert_orthogonal(parameter, 1.0 if name.startswith(memory) else 2**0.5)


@pytest.mark.parametrize("memory", ["lstm", "gru"])
def test_gates_can_begin_orthogonal_one_by_one(memory):
    stacked = getattr(make_agent(memory).policy.memory, memory)
    per_gate = getattr(make_agent(memory, orthogonal_per_gate=True, num_layers=2).policy.memory, memory)
    for name in ("weight_ih_l0", "weight_hh_l0", "weight_ih_l1", "weight_hh_l1"):
        for gate in getattr(per_gate, name).split(256):
            assert_orthogonal(gate, 1.0)
    first_gate = stacked.weight_hh_l0[:256]
    assert (first_gate @ first_gate.T - torch.eye(256)).abs().max() > 0.1


def test_forget_bias_fills_the_forget_gate_alone_and_once():
    lstm = make_agent(forget_bias=1.5, num_layers=2).policy.memory.lstm
    for layer in range(2):
        total = getattr(lstm, f"bias_ih_l{layer}") + getattr(lstm, f"bias_hh_l{layer}")
        _, forget, _, _ = total.split(256)  # input, forget, cell, output
        assert (forget == 1.5).all()
        assert total.sum() == 1.5 * 256


def test_the_specification_s_settings_are_those_of_the_existing_class():
    expected = {
        "learning_rate": 3e-4,
        "learning_rate_schedule": "constant",
        "adam_eps": 1e-5,
        "gamma": 0.99,
        "gae_lambda": 0.95,
        "clip_coef": 0.2,
        "value_clip": None,
        "num_epochs": 4,
        "batch_size": 64,
        "entropy_coef": 0.01,
        "max_grad_norm": 0.5,
        "value_coef": 0.5,
        "ratio": "per_head",
        "normalize_advantages": "rollout",
        "normalize_observations": False,
        "normalize_rewards": False,
        "rollout_length": 100,
        # One-step slices with the states as stored, and nothing after the rollout.
        "sequence_length": 1,
        "burn_in": 0,
        "state_refresh": "never",
        "bootstrap_last": False,
    }
    ppo = PPOConfig.spec().model_dump()
    assert {name: ppo[name] for name in expected} == expected
    assert PPOConfig.spec().entropy_coef_end in (None, 0.01)
    network = NetworkConfig.spec().model_dump()
    expected = {"memory": "lstm", "hidden_size": 256, "num_layers": 1, "encoder_sizes": (256,)}
    expected |= {"head_gain": 2**0.5, "forget_bias": 0.0, "orthogonal_per_gate": False}
    assert {name: network[name] for name in expected} == expected


def test_an_agent_without_settings_uses_the_defaults():
    agent = DualHeadRecurrentPPO(IMAGES, gym.spaces.Discrete(2))
    assert agent.config == PPOConfig()
    assert agent.network == NetworkConfig()
    assert agent.rollout_memory.rollout_length == PPOConfig().rollout_length
    expected = {"lr": PPOConfig().learning_rate, "eps": PPOConfig().adam_eps, "betas": (0.9, 0.999), "weight_decay": 0}
    assert expected.items() <= agent.optimizer.defaults.items()
