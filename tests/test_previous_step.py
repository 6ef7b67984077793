"""Inputs from the step before, a critic's own memory and layers after the memories, against NumPy in float64.

A world of random observations ends episodes by chance. `SlowPolicy` plays every stream beside the agent, one step at a
time, and must agree wherever the policy is asked: acting, truncation, the end of a rollout, minibatches, a `Player`.
"""

import agents
import numpy as np
import pytest
import torch
from gymnasium import spaces
from settings import act_in_heads
from slow_policy import SlowPolicy, log_softmax

import dualhead.learning.update
import dualhead.networks.memory
from dualhead import DataError, NormConfig, NormEvents, Player, PPOConfig
from dualhead.learning.segments import cut, gather
from dualhead.worlds.replay import leaves

B, T = 3, 20
HEADS = spaces.MultiDiscrete([3, 2], start=[5, 0])
BOX = spaces.Box(np.float64([-2, -np.inf]), np.float64([4, np.inf]), dtype=np.float64)
NOBODY = np.zeros(B, bool)
BOTH = {"previous_action": True, "previous_reward": True}
SHAPES = {
    "previous step": BOTH | {"encoder_sizes": (8, 5)},
    "previous action of a GRU": {"previous_action": True, "memory": "gru"},
    "previous reward without memory": {"previous_reward": True, "memory": "none"},
    "critic with an LSTM": {"critic_memory": "lstm", "previous_action": True},
    "critic with a GRU of two layers": {"critic_memory": "gru", "num_layers": 2},
    "critic without memory": {"critic_memory": "none", "memory": "gru"},
    "actor without memory": {"critic_memory": "lstm", "memory": "none"},
    "layers": {"head_sizes": (6, 5), "activation": "tanh"},
    "everything": BOTH | {"critic_memory": "lstm", "head_sizes": (6, 5), "activation": "tanh"},
}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
MIXED = spaces.Tuple((BOX, spaces.Dict(power=spaces.Box(-1, 1, (2, 1)), move=HEADS), spaces.MultiBinary(1)))
every_space = pytest.mark.parametrize("action_space", [HEADS, BOX, MIXED], ids=["heads", "box", "mixed"])


def make_agent(shape, action_space=HEADS, **settings):
    settings = {"action_space": action_space, "learning_rate": 0.01, "head_gain": 1.0} | shape | settings
    agent = agents.make_agent(**settings)
    with torch.no_grad():
        for parameter in agent.policy.parameters():  # biases and deviations are zero by default
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)).double()
    return agent


def play_rollout(shape, **settings):
    """An agent with a full rollout in which episodes end, and its play."""
    agent = make_agent(shape, **settings)
    play = Play(agent)
    play.rollout()
    return agent, play


def whole_runs(agent, weights):
    """All steps of a rollout as one minibatch of undivided runs, with advantages `weights` [T, B]."""
    rollout = agent.rollout_memory
    runs = cut(rollout.episode_starts.numpy(), T)
    return gather(agent.policy, rollout, runs, advantages=weights, returns=weights)


def values_asked(agent):
    """What `policy.values` will have returned, call after call."""
    asked, values = [], agent.policy.values
    agent.policy.values = lambda *given: asked.append(values(*given)) or asked[-1]
    return asked


class Play:
    """Steps an agent through rollouts, and a slow policy for every stream beside it.

    Attributes:
        log_probs [T, B, K], values, final_values [T, B]: of the rollout at hand, by the slow policies.
    """

    def __init__(self, agent, *, seed=0, rate=0.12):
        self.agent, self.rng, self.rate = agent, np.random.default_rng(seed), rate
        spec = agent.action_spec
        self.slow = [SlowPolicy(agent.policy, agent.network, spec.nvec, bounded=spec.bounded) for _ in range(B)]
        self.now = self.rng.normal(size=(B, 3))
        self.num_truncated = 0

    def rollout(self, num_steps=T):
        agent = self.agent
        shape = (num_steps, B)
        self.values, self.final_values = np.zeros(shape), np.zeros(shape)
        self.log_probs = np.zeros((*shape, len(agent.action_spec.names)))
        self.truncated = np.zeros(shape, bool)
        for t in range(num_steps):
            actions = act_in_heads(agent, self.now)
            for b, slow in enumerate(self.slow):
                outputs, self.values[t, b] = slow.step(self.now[b])
                self.log_probs[t, b] = self.of_actions(outputs, actions[b])
            terminated, truncated = self.rng.random((2, B)) < self.rate
            final, rewards = self.rng.normal(size=(B, 3)), 3 * self.rng.normal(size=B)
            agent.record(rewards, terminated, truncated, final_observations=final)
            for b, slow in enumerate(self.slow):
                slow.previous = actions[b], rewards[b]
                if truncated[b] and not terminated[b]:
                    self.truncated[t, b] = True
                    self.final_values[t, b] = slow.value_of(final[b])
                if truncated[b] or terminated[b]:
                    slow.reset()
            self.now = self.rng.normal(size=(B, 3))
        self.num_truncated += self.truncated.sum()
        self.next_values = np.array([slow.value_of(x) for slow, x in zip(self.slow, self.now)])

    def of_actions(self, outputs, action):
        """[K] log-probabilities of an action [C]."""
        num_indices = len(self.agent.action_spec.nvec)
        log_probs = [log_softmax(logits)[int(k)] for logits, k in zip(outputs[:num_indices], action)]
        first = 0
        for mean in outputs[num_indices:]:
            own = slice(first, first := first + len(mean))
            log_std = self.agent.policy.heads.log_std.detach().numpy()[own]
            z = (action[num_indices:][own] - mean) / np.exp(log_std)
            log_probs.append(-(0.5 * z**2 + log_std + 0.5 * np.log(2 * np.pi)).sum())
        return log_probs

    def take_weights(self):
        """After learning: the slow policies go on with the agent's new weights and their own states."""
        for slow in self.slow:
            slow.weights = {name: tensor.detach().numpy() for name, tensor in self.agent.policy.state_dict().items()}


@every_space
@every_shape
def test_the_agent_computes_what_numpy_does(shape, action_space):
    """Log-probs, values and values of final and next observations, over two rollouts with an update between them."""
    agent = make_agent(shape, action_space)
    play = Play(agent)
    asked = values_asked(agent)
    for _ in range(2):
        play.rollout()
        rollout = agent.rollout_memory
        np.testing.assert_allclose(rollout.log_probs, play.log_probs, rtol=0, atol=1e-12)
        np.testing.assert_allclose(rollout.values, play.values, rtol=0, atol=1e-12)
        final = np.where(play.truncated, rollout.final_values, 0.0)
        np.testing.assert_allclose(final, play.final_values, rtol=0, atol=1e-12)
        metrics = agent.learn(play.now)
        np.testing.assert_allclose(asked[-1], play.next_values, rtol=0, atol=1e-12)
        assert metrics["policy/first_ratio_error"] < 1e-12
        play.take_weights()
    assert play.num_truncated > 3


@pytest.mark.parametrize(("sequence_length", "burn_in"), [("rollout", 0), (7, 3), (1, 5)])
@every_shape
def test_minibatches_begin_where_acting_was(shape, sequence_length, burn_in):
    """In every update the first ratio is 1, and segments have the values that acting had, from their stored states."""
    agent = make_agent(shape, sequence_length=sequence_length, burn_in=burn_in, batch_size=60)
    play = Play(agent, rate=0.06)
    for _ in range(3):
        play.rollout()
        segments = cut(agent.rollout_memory.episode_starts[burn_in:].numpy(), agent.config.max_segment)
        ones = torch.ones(T, B).double()
        batch = gather(agent.policy, agent.rollout_memory, segments, advantages=ones, returns=ones)
        with torch.no_grad():
            output = agent.policy.evaluate(batch)
        np.testing.assert_allclose(output.values, batch.values, rtol=0, atol=1e-12)
        np.testing.assert_allclose(output.distribution.log_probs(batch.actions), batch.log_probs, rtol=0, atol=1e-12)
        assert agent.learn(play.now)["policy/first_ratio_error"] < 1e-12


def test_the_tail_keeps_everything_that_a_burn_in_reads():
    """After `clear` its rows are the rollout's last ones: observations, the step before and states of both memories."""
    agent, _ = play_rollout(SHAPES["everything"], burn_in=3)
    rollout = agent.rollout_memory
    buffers = {**rollout.observations, **{f"states/{name}": part[0] for name, part in rollout.states.items()}}
    last = {name: buffer[T:].clone() for name, buffer in buffers.items()}
    assert {"previous/action", "previous/reward", "states/c", "states/critic_h", "states/critic_c"} < last.keys()
    rollout.clear()
    for name, buffer in buffers.items():
        assert last[name].any(), name
        assert torch.equal(buffer[:3], last[name]), name


@every_shape
def test_gradients_equal_those_of_a_loop_over_steps(shape):
    """All steps in one minibatch of whole spans, against `policy.step` one step at a time with autograd through it."""
    agent, _ = play_rollout(shape)
    policy, rollout = agent.policy, agent.rollout_memory
    weights = torch.randn(T, B, generator=torch.Generator().manual_seed(0)).double()
    batch = whole_runs(agent, weights)
    output = policy.evaluate(batch)
    loss = (batch.advantages * (output.distribution.log_probs(batch.actions).sum(-1) + output.values.square())).sum()
    ours = torch.autograd.grad(loss, list(policy.parameters()))

    slow_loss = 0.0
    for b in range(B):
        state = rollout.state_at(torch.tensor([b]))
        for t in range(T):
            if rollout.episode_starts[t, b]:
                state = policy.initial_state(1)
            seen = {name: leaf[t, b : b + 1] for name, leaf in rollout.observations.items()}
            output, state = policy.step(seen, state)
            log_probs = output.distribution.log_probs(rollout.actions[t, b : b + 1])
            slow_loss = slow_loss + weights[t, b] * (log_probs.sum() + output.values.square().sum())
    slow = torch.autograd.grad(slow_loss, list(policy.parameters()))
    for one, other in zip(ours, slow):
        assert (one - other).abs().max() < 1e-9 * (1 + other.abs().max())


@pytest.mark.parametrize("name", ["critic with an LSTM", "everything", "layers"])
def test_a_critic_leaves_what_is_the_policy_s_alone(name):
    """The value loss reaches only the critic's memory and layers, the surrogate only the policy's; the encoder sees
    both, and so does a shared memory."""
    shape = SHAPES[name]
    agent, _ = play_rollout(shape)
    batch = whole_runs(agent, torch.ones(T, B).double())
    output = agent.policy.evaluate(batch)
    reached = []
    for loss in (output.values, output.distribution.log_probs(batch.actions)):
        agent.policy.zero_grad()
        loss.sum().backward(retain_graph=True)
        gradients = {name: p.grad for name, p in agent.policy.named_parameters() if p.grad is not None}
        reached.append({name.partition(".")[0] for name, gradient in gradients.items() if gradient.any()})
    layers = "head_sizes" in shape
    own = "critic_memory" if "critic_memory" in shape else "memory"
    assert reached[0] == {"encoder", own, "critic"} | ({"critic_layers"} if layers else set())
    assert reached[1] == {"encoder", "memory", "heads"} | ({"actor_layers"} if layers else set())


def test_the_first_step_of_an_episode_sees_nothing_before_it():
    """By hand: rewards 5, 6 and 7, in an array that the environment reuses; stream 1 ends at its second step."""
    agent = make_agent(SHAPES["previous step"])
    rewards = np.zeros(B)
    for t in range(3):
        agent.act(np.zeros((B, 3)))
        rewards[:] = 5.0 + t
        agent.record(rewards, np.array([False, t == 1, False]), NOBODY)
        rewards[:] = -1.0
    actions = agent.rollout_memory.actions.tolist()
    seen = {name: leaf[:3].tolist() for name, leaf in agent.rollout_memory.observations.items()}
    blank = [-1, -1]
    assert seen["previous/reward"] == [[0, 0, 0], [5, 5, 5], [6, 0, 6]]
    assert seen["previous/action"] == [[blank] * B, actions[0], [actions[1][0], blank, actions[1][2]]]


@pytest.mark.parametrize("how", ["reset_state", "restart_streams", "none"])
def test_whatever_begins_an_episode_hides_the_step_before(how):
    agent = make_agent(SHAPES["previous step"])
    play = Play(agent, rate=0.0)
    play.rollout()
    agent.learn(play.now)
    if how == "reset_state":
        agent.reset_state()
    elif how == "restart_streams":
        agent.restart_streams(np.array([True, False, True]))
    else:
        agent._current_hidden = None
    agent.act(play.now)
    hidden = (agent.rollout_memory.observations["previous/action"][0] == -1).all(-1)
    assert hidden.tolist() == ([True, False, True] if how == "restart_streams" else [True] * 3)
    assert ((agent.rollout_memory.observations["previous/reward"][0] == 0) == hidden).all()


def test_a_state_that_was_set_to_none_is_valued_as_a_beginning():
    """`learn` after the specification's reset: the next observation is an episode's first, with nothing before it."""
    agent = make_agent(SHAPES["everything"])
    play = Play(agent, rate=0.0)
    play.rollout()
    agent._current_hidden = None
    asked = values_asked(agent)
    for slow in play.slow:
        slow.reset()
    wanted = [slow.value_of(x) for slow, x in zip(play.slow, play.now)]
    agent.learn(play.now)
    np.testing.assert_allclose(asked[-1], wanted, rtol=0, atol=1e-12)


def test_guilt_is_no_part_of_the_previous_reward():
    """Every stream feels guilt from its first step on; the policy is shown the task's reward alone."""
    norms = NormConfig(
        mode="action", harmful_action=0, decay_rate=1.0, internalization_threshold=0.0, intrinsic_scale=-1.0
    )
    agent = agents.make_agent(action_space=spaces.Discrete(1), previous_reward=True, norms=norms)
    for _ in range(2):
        agent.act(np.zeros((B, 3)))
        agent.record(np.full(B, 5.0), NOBODY, NOBODY, events=NormEvents(punished=np.ones((B, 1), bool)))
    agent.act(np.zeros((B, 3)))
    memory = agent.rollout_memory
    assert memory.guilt[:2, 0].tolist() == [-1, -2]
    assert memory.observations["previous/reward"][:3, 0].tolist() == [0, 5, 5]


@pytest.mark.parametrize("at", [0, 7, T], ids=["after an update", "within a rollout", "before an update"])
@every_space
def test_a_saved_agent_goes_on_to_the_same_bits(action_space, at, tmp_path):
    agent, play = play_rollout(SHAPES["everything"], action_space=action_space, burn_in=3)
    agent.learn(play.now)
    play.rollout(at)
    agent.save(tmp_path / "agent")
    other = make_agent(SHAPES["everything"], action_space, burn_in=3, seed=9)
    other.load(tmp_path / "agent")
    ends = []
    for one in (agent, other):
        goes_on = Play(one, seed=5)
        goes_on.rollout(T - at)
        one.learn(goes_on.now)
        ends.append(one.state()[0])
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@every_space
def test_a_player_sees_what_the_agent_saw(action_space):
    agent = make_agent(SHAPES["everything"], action_space, rollout_length=60)
    player = Player(agent.policy, agent.observation_spec.space, action_space, seed=0)
    rng = np.random.default_rng(0)
    rewards, starts = None, np.ones(B, bool)
    for _ in range(60):
        seen = rng.normal(size=(B, 3))
        wanted = agent.act(seen)
        actions = player.act(seen, starts, rewards=rewards, deterministic=False)
        for ours, theirs in zip(leaves(actions), leaves(wanted), strict=True):
            np.testing.assert_array_equal(ours, theirs)
        rewards, starts = rng.normal(size=B), rng.random(B) < 0.1
        agent.record(rewards, starts, NOBODY)


def test_a_player_says_that_it_needs_rewards():
    agent = make_agent(SHAPES["previous step"])
    player = Player(agent.policy, agent.observation_spec.space, HEADS)
    player.act(np.zeros((B, 3)), ~NOBODY)
    wrong = [np.zeros(2), np.zeros((B, 1)), np.full(B, np.nan), ["a"] * B, [1j] * B, [[1], [2, 3], [4]], 0.0]
    for rewards in (None, *wrong):
        with pytest.raises(DataError, match="rewards"):
            player.act(np.zeros((B, 3)), NOBODY, rewards=rewards)
    player.act(np.zeros((B, 3)), NOBODY, rewards=np.zeros(B))


def test_a_player_needs_no_rewards_where_every_episode_begins():
    """Then nothing is shown of the step before: the same as after `reset`."""
    agent = make_agent(SHAPES["previous step"])
    player = Player(agent.policy, agent.observation_spec.space, HEADS)
    seen = np.random.default_rng(0).normal(size=(2, B, 3))
    first, second = ([player.act(seen[0], ~NOBODY), player.act(seen[1], NOBODY, rewards=np.ones(B))] for _ in range(2))
    np.testing.assert_array_equal(first, second)
    for reward in (1.0, np.float32(1), [1.0], torch.ones(())):
        player.reset()
        player.act(seen[0, 0], True)
        player.act(seen[1, 0], False, rewards=reward)


def test_an_observation_part_may_not_take_the_name_of_an_input():
    part = spaces.Dict(x=spaces.Box(-1, 1, (2,)), previous=spaces.Dict(action=spaces.Discrete(2)))
    with pytest.raises(ValueError, match="previous/action"):
        agents.make_agent(observation_space=part, previous_action=True)
    agents.make_agent(observation_space=part, previous_reward=True)


@pytest.mark.parametrize("memory", ["lstm", "gru"])
def test_whole_rollouts_are_segments_as_long_as_a_rollout(memory):
    weights = []
    for sequence_length in ("rollout", T):
        agent, play = play_rollout({"memory": memory}, sequence_length=sequence_length)
        agent.learn(play.now)
        play.rollout()
        agent.learn(play.now)
        weights.append(agent.policy.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    with pytest.raises(ValueError, match="batch_size=19"):
        PPOConfig(rollout_length=20, batch_size=19, sequence_length="rollout")


@pytest.mark.parametrize("shape", [shape for shape in SHAPES.values() if set(shape.values()) != {True, "none"}])
def test_refreshed_states_of_both_memories_equal_a_slow_replay(shape, monkeypatch):
    """Where segments begin, the state is what today's weights make of the span from its own beginning."""
    agent = make_agent(shape, sequence_length=6, num_epochs=2)
    play = Play(agent, rate=0.04)
    seen = []
    refresh = dualhead.learning.update.refresh

    def spy(policy, rollout, segments, **settings):
        begins = rollout.state_at(torch.arange(B))
        result = refresh(policy, rollout, segments, **settings)
        with torch.no_grad():
            for s in np.flatnonzero(segments.offset > 0):
                b, start, offset = (int(field[s]) for field in (segments.stream, segments.start, segments.offset))
                first = start - offset
                state = policy.initial_state(1)
                if not rollout.episode_starts[first, b]:
                    state = begins.select(torch.tensor([b]))
                for t in range(first, start):
                    leaves = {name: leaf[t, b : b + 1] for name, leaf in rollout.observations.items()}
                    _, state = policy.step(leaves, state)
                ours = rollout.state_at(torch.tensor([start * B + b]))
                seen.append(max((a - c).abs().max().item() for a, c in zip(ours, state) if a.numel()))
        return result

    monkeypatch.setattr(dualhead.learning.update, "refresh", spy)
    play.rollout()
    agent.learn(play.now)
    assert len(seen) > 3
    assert max(seen) < 1e-12


@pytest.mark.parametrize(("memory", "critic_memory"), [("lstm", "shared"), ("gru", "shared"), ("lstm", "gru")])
def test_minibatches_are_laid_out_at_the_price_of_their_memories(memory, critic_memory, monkeypatch):
    """A time step of a GRU costs something by itself, also where only the critic has one; one of an LSTM does not."""
    agent, play = play_rollout({"memory": memory, "critic_memory": critic_memory}, num_epochs=1)
    asked = []
    lay_out = dualhead.networks.memory.lay_out
    monkeypatch.setattr(
        dualhead.networks.memory, "lay_out", lambda *given, **prices: asked.append(prices) or lay_out(*given, **prices)
    )
    agent.learn(play.now)
    paid = [prices["step_cost"] > 0 for prices in asked if prices["block_cost"] > 0]
    assert len(paid) >= 3
    kinds = [memory] if critic_memory == "shared" else [memory, critic_memory]
    assert paid == [kind == "gru" for kind in kinds] * (len(paid) // len(kinds))
