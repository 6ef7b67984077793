"""The recurrent state: stored beside the step it belongs to, carried, reset, warmed and refreshed; acting is training.

`World` shows every stream random observations, ends episodes by chance and remembers all of it. What the agent should
have computed is then worked out step by step and stream by stream, with a state that the test keeps itself.
"""

import copy

import agents
import numpy as np
import pytest
import torch
from gymnasium import spaces

import dualhead.agent
import dualhead.learning.update
from dualhead.learning.segments import cut
from dualhead.networks.heads import FactoredCategorical
from dualhead.networks.memory import MemoryCell
from dualhead.networks.scan import Ends
from dualhead.types import RecurrentState

MASK_SPACE = spaces.Dict(observation=agents.SPACE, action_mask=spaces.MultiBinary(5))
FAST = {"learning_rate": 0.05, "sequence_length": 6}
recurrent = pytest.mark.parametrize("memory", agents.CELLS)


def make_agent(memory="lstm", **given):
    return agents.make_agent(memory, **{"learning_rate": 0.01} | given)


class World:
    """Streams whose episodes end by chance.

    Attributes:
        log: per step: observations, ended [B], terminated [B], truncated [B], final observations, rewards [B].
        now: observations of the step to come.
    """

    def __init__(self, *, masks=False, rate=0.12):
        self.rng, self.num_streams, self.masks, self.rate = np.random.default_rng(0), 3, masks, rate
        self.log = []
        self.now = self.look()

    def look(self):
        observations = {"observation": self.rng.normal(size=(self.num_streams, 3))}
        if self.masks:
            mask = self.rng.random((self.num_streams, 5)) < 0.5
            mask[:, [1, 4]] = True  # one choice per head stays legal
            observations["action_mask"] = mask.astype(np.int8)
        return observations

    def play(self, agent, num_steps=None):
        """Steps until the rollout is full, or `num_steps` of them."""
        while not agent.rollout_is_ready and num_steps != 0:
            agent.act(self.now)
            terminated, truncated = self.rng.random((2, self.num_streams)) < self.rate
            final, rewards = self.look(), self.rng.normal(size=self.num_streams)
            agent.record(rewards, terminated, truncated, final_observations=final)
            self.log.append((self.now, terminated | truncated, terminated, truncated, final, rewards))
            self.now = self.look()
            num_steps = None if num_steps is None else num_steps - 1


def one(observations, stream):
    """A stream's observations as a batch of one."""
    return {name: torch.as_tensor(part[stream : stream + 1]) for name, part in observations.items()}


@torch.no_grad()
def replay(policy, steps, states):
    """Distribution, value and the state before it of every step, one stream and one step at a time.

    Args:
        policy: what acted.
        steps: entries of `World.log`.
        states: per stream the state [L, 1, H] before the first step; replaced by the state after the last.
    """
    replayed = []
    for observations, ended, *_ in steps:
        for b in range(len(ended)):
            output, after = policy.step(one(observations, b), states[b])
            replayed.append((len(replayed) // len(ended), b, output.distribution, output.values.item(), states[b]))
            states[b] = policy.initial_state(1) if ended[b] else after
    return replayed


def evaluations(agent, monkeypatch):
    """A list of every minibatch that the policy will evaluate, and what came out."""
    seen, evaluate = [], agent.policy.evaluate

    def spy(batch):
        output = evaluate(batch)
        seen.append((batch, output))
        return output

    monkeypatch.setattr(agent.policy, "evaluate", spy)
    return seen


def find_steps(batch, rollout_steps):
    """(t, b) of each step of a minibatch, recognised by its observation."""
    where = {
        tuple(observations["observation"][b]): (t, b)
        for t, (observations, *_) in enumerate(rollout_steps)
        for b in range(len(observations["observation"]))
    }
    return [where[tuple(x)] for x in batch.observations["observation"].tolist()]


@pytest.mark.parametrize(("num_layers", "sequence_length"), [(1, 1), (1, 7), (1, 16), (1, 100), (2, 7), (2, 100)])
@recurrent
def test_acting_equals_segments_equals_a_replay(memory, num_layers, sequence_length, monkeypatch):
    """Log-probs, values and stored states of two rollouts with learning between them; 16 does not divide 20."""
    agent = make_agent(memory, num_layers=num_layers, sequence_length=sequence_length, batch_size=60, num_epochs=1)
    generator = torch.Generator().manual_seed(0)
    for parameter in agent.policy.memory.parameters():  # biases begin at zero
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    world = World()
    states = [agent.policy.initial_state(1) for _ in range(3)]
    evaluated = evaluations(agent, monkeypatch)
    num_ended = np.zeros(2)
    for i in range(2):
        world.play(agent)
        steps = world.log[20 * i :]
        num_ended += [np.sum([step[2] for step in steps[:-1]]), np.sum([step[3] for step in steps[:-1]])]
        stored = copy.deepcopy(agent.rollout_memory)
        replayed = replay(agent.policy, steps, states)
        for t, b, distribution, value, state in replayed:
            assert (stored.log_probs[t, b] - distribution.log_probs(stored.actions[t, b][None])).abs().max() < 1e-10
            assert abs(stored.values[t, b] - value) < 1e-10
            for name, part in state.parts.items():
                assert (stored.states[name][:, t, b] - part[:, 0]).abs().max() < 1e-10

        metrics = agent.learn(world.now)
        batch, output = evaluated[i]
        assert sorted(find_steps(batch, steps)) == [(t, b) for t in range(20) for b in range(3)]
        log_probs = output.distribution.log_probs(batch.actions)
        for n, (t, b) in enumerate(find_steps(batch, steps)):
            _, _, distribution, value, _ = replayed[3 * t + b]
            actions = stored.actions[t, b]
            assert torch.equal(batch.actions[n], actions)
            assert torch.equal(batch.log_probs[n], stored.log_probs[t, b])
            assert torch.equal(batch.values[n], stored.values[t, b])
            assert (log_probs[n] - distribution.log_probs(actions[None])[0]).abs().max() < 1e-10
            assert abs(output.values[n].item() - value) < 1e-10
        assert metrics["policy/first_ratio_error"] < 1e-10
    assert (num_ended > 3).all()


@pytest.mark.parametrize(
    ("masks", "sequence_length", "burn_in"),
    [(False, 7, 0), (False, 7, 3), (False, 7, 8), (True, 7, 0), (False, 1, 3), (True, 20, 3)],
)
@pytest.mark.parametrize("memory", [*agents.CELLS, "none"])
def test_the_first_ratio_is_one(memory, masks, sequence_length, burn_in, monkeypatch):
    space = MASK_SPACE if masks else agents.SPACE
    agent = make_agent(memory, burn_in=burn_in, observation_space=space, sequence_length=sequence_length)
    world = World(masks=masks)
    evaluated = evaluations(agent, monkeypatch)
    for _ in range(2):
        world.play(agent)
        metrics = agent.learn(world.now)
        batch, output = evaluated[0]
        ratio = (output.distribution.log_probs(batch.actions) - batch.log_probs).exp()
        assert (ratio - 1).abs().max() < 1e-10
        assert (output.values - batch.values).abs().max() < 1e-10
        assert metrics["policy/first_ratio_error"] < 1e-10
        # The weights moved: later ratios are not all 1.
        assert metrics["policy/approx_kl"] > 1e-5
        evaluated.clear()


@pytest.fixture
def advantages_given(monkeypatch):
    """The advantages [T, B] that the update gets, before normalisation."""
    given = []
    update = dualhead.agent.ppo_update

    def spy(policy, rollout, **settings):
        given.append(settings["advantages"].clone())
        return update(policy, rollout, **settings)

    monkeypatch.setattr(dualhead.agent, "ppo_update", spy)
    return given


def slow_advantages(rewards, values, next_values, terminated, truncated, *, gamma, gae_lambda):
    """Σ_k (γλ)^k δ_{t+k} of one stream, up to the end of the episode."""
    advantages = []
    for t in range(len(rewards)):
        total = 0.0
        for i in range(t, len(rewards)):
            after = 0.0 if terminated[i] else next_values[i]
            total += (gamma * gae_lambda) ** (i - t) * (rewards[i] + gamma * after - values[i])
            if terminated[i] or truncated[i]:
                break
        advantages.append(total)
    return advantages


@pytest.mark.parametrize("bootstrap_last", [True, False])
@pytest.mark.parametrize("memory", [*agents.CELLS, "none"])
def test_values_after_a_step_come_from_where_the_stream_went(memory, bootstrap_last, advantages_given):
    """Truncated: the final observation, seen with the state after the last step. Terminated: none. Else: the next."""
    agent = make_agent(memory, bootstrap_last=bootstrap_last)
    world = World(rate=0.15)
    states = [agent.policy.initial_state(1) for _ in range(3)]
    for i in range(2):
        world.play(agent)
        steps = world.log[20 * i :]
        policy = copy.deepcopy(agent.policy)
        replayed = replay(policy, steps, states)
        expected = np.zeros((20, 3))
        for b in range(3):
            values = [value for _, stream, _, value, _ in replayed if stream == b]
            terminated, truncated, rewards = ([step[field][b] for step in steps] for field in (2, 3, 5))
            next_values = []
            with torch.no_grad():
                for t, (observations, ended, *_, final, _) in enumerate(steps):
                    if ended[b]:
                        _, after = policy.step(one(observations, b), replayed[3 * t + b][4])
                        next_values.append(policy.step(one(final, b), after)[0].values.item())
                    elif t < 19:
                        next_values.append(values[t + 1])
                    else:
                        value = policy.step(one(world.now, b), states[b])[0].values.item()
                        next_values.append(value if bootstrap_last else 0.0)
            expected[:, b] = slow_advantages(
                rewards, values, next_values, terminated, truncated, gamma=0.99, gae_lambda=0.95
            )
        before = [part.clone() for part in agent._current_hidden]
        agent.learn(world.now)
        np.testing.assert_allclose(advantages_given[i], expected, rtol=0, atol=1e-10)
        # Looking at values does not advance the acting state.
        assert all(map(torch.equal, agent._current_hidden, before))
    assert np.sum([step[3] & ~step[2] for step in world.log]) > 5


@recurrent
def test_the_state_goes_on_and_is_reset_per_stream(memory):
    """By hand: stream 1 is terminated at step 2, stream 2 truncated at step 4, the rollout ends after steps 3 and 6."""
    agent = make_agent(memory, num_layers=2, rollout_length=3, sequence_length=3)
    rng = np.random.default_rng(0)
    for t in range(9):
        before = agent._get_hidden_state()
        observations = {"observation": rng.normal(size=(3, 3))}
        agent.act(observations)
        _, after = agent.policy.step({"observation": torch.from_numpy(observations["observation"])}, before)
        moved = agent._current_hidden
        assert all(map(torch.equal, moved, after))
        assert not any(part.requires_grad for part in moved)
        terminated, truncated = np.array([[False, t == 2, False], [False, False, t == 4]])
        ended = terminated | truncated
        agent.record(np.ones(3), terminated, truncated, final_observations=observations)
        for part, was in zip(agent._current_hidden, moved, strict=True):
            assert not part[:, ended].any()
            assert torch.equal(part[:, ~ended], was[:, ~ended])
            assert part[:, ~ended].all()
        if agent.rollout_is_ready:
            carried = list(agent._current_hidden)
            agent.learn(observations)
            assert all(map(torch.equal, agent._current_hidden, carried))


@pytest.mark.parametrize("between", ["nothing", "state", "learn"])
@recurrent
def test_setting_the_hidden_state_to_none_begins_episodes(memory, between):
    """The specification's reset, whatever is asked of the agent before the next step."""
    agent, world = make_agent(memory, burn_in=3), World(rate=0.0)
    world.play(agent, 5)
    agent._current_hidden = None
    if between == "state":
        agent.state()
    if between == "learn":
        agent.learn(world.now, partial=True)
    world.play(agent, 4)
    rollout = agent.rollout_memory
    first = 3 + rollout.length - 4
    assert rollout.episode_starts[first].all()
    assert not rollout.episode_starts[first + 1 : first + 4].any()
    assert not any(part[:, first].any() for part in rollout.states.values())
    assert agent.learn(world.now, partial=True)["policy/first_ratio_error"] < 1e-10


class CountingMemory(MemoryCell):
    """A memory that counts its steps since it was zero, and testifies.

    Attributes:
        testimony: (observation, count after it) of every step it ever took, by whichever way it was called.
    """

    def __init__(self):
        super().__init__(4, state_shapes={"h": (1, 4)})
        self.testimony = []

    def step(self, features, state):
        h = state.h + 1
        self.testimony += zip(features[:, 0].tolist(), h[0].tolist())
        return h[0], RecurrentState(h)

    def plan(self, lengths, *, device, final_states=False):
        return super().plan(lengths, device=device, final_states=True)  # without padding, which it would count


@pytest.mark.parametrize(
    ("state_refresh", "sequence_length", "burn_in"),
    [("once", 3, n) for n in (0, 2, 5, 11)]
    + [("never", 3, 0), ("never", 3, 5), ("once", 1, 0), ("once", 1, 5), ("once", 16, 2)],
)
def test_a_counting_core_always_knows_how_old_the_episode_is(burn_in, sequence_length, state_refresh):
    """Whenever the memory sees an observation, in acting, burn-in, refresh, drift, loss or bootstrap, it has counted
    exactly the steps of the episode up to it: every stored state belongs to its observation, over rollouts and resets.
    """
    num_streams, rng = 3, np.random.default_rng(0)
    agent = make_agent(
        "gru",
        observation_space=spaces.Box(-np.inf, np.inf, (1,), np.float64),
        hidden_size=4,
        encoder_sizes=(),
        rollout_length=8,
        sequence_length=sequence_length,
        burn_in=burn_in,
        batch_size=16,
        num_epochs=3,
        state_refresh=state_refresh,
    )
    counting = agent.policy.memory = CountingMemory()
    age_of = {}
    ages = np.ones(num_streams, dtype=int)

    def show(ages):
        """Observations, each a number of its own, that are the ages[b]-th of their episodes."""
        numbers = len(age_of) + np.arange(1.0, num_streams + 1)
        age_of.update(zip(numbers.tolist(), ages.tolist()))
        return numbers[:, None]

    now = show(ages)
    for _ in range(5):
        length = rng.integers(3, 9)  # also rollouts cut short, down to shorter than the tail
        for t in range(length):
            agent.act(now)
            rollout = agent.rollout_memory
            assert (rollout.h_states[0, burn_in + t, :, 0].numpy() == ages - 1).all()
            assert (rollout.episode_starts[burn_in + t].numpy() == (ages == 1)).all()
            terminated, truncated = rng.random((2, num_streams)) < 0.1
            ages += 1
            final = show(ages)
            agent.record(np.ones(num_streams), terminated, truncated, final_observations=final)
            ended = terminated | truncated
            ages[ended] = 1
            assert (agent._current_hidden.h[0, :, 0].numpy() == ages - 1).all()
            now = final if not ended.any() else show(ages)
        agent.learn(now, partial=True)
        assert (agent._current_hidden.h[0, :, 0].numpy() == ages - 1).all()
        # The tail keeps states and observations together.
        rollout = agent.rollout_memory
        assert rollout.tail_length > 0 or burn_in == 0
        for row in range(burn_in - rollout.tail_length, burn_in):
            seen = rollout.observations["observation"][row, :, 0].tolist()
            assert [age_of[number] - 1 for number in seen] == rollout.h_states[0, row, :, 0].tolist()
    for number, counts in counting.testimony:
        assert counts == [age_of[number]] * 4
    assert len(counting.testimony) > 5 * 3 * 3 * num_streams


@torch.no_grad()
def unroll_by_hand(policy, steps, state, stream):
    """The state after some steps of one stream, none of which is an episode's last but the last one."""
    for observations, *_ in steps:
        _, state = policy.step(one(observations, stream), state)
    return state


@pytest.mark.parametrize("burn_in", [2, 5, 30])
@recurrent
def test_burn_in_warms_the_state_stored_before_it_by_today_s_weights(memory, burn_in, monkeypatch):
    """After the first minibatch every segment begins where a slow unroll by the moved weights ends: from the state
    stored `burn_in` steps earlier, in the tail where that lies before the rollout; no gradient flows there."""
    agent = make_agent(memory, burn_in=burn_in, batch_size=30, num_epochs=1, **FAST)
    world = World(rate=0.06)
    evaluate = agent.policy.evaluate
    checks = []
    num_tail = 0

    def spy(batch, **settings):
        where = find_steps(batch, world.log[-20:])
        weights = copy.deepcopy(agent.policy)
        for part in batch.state:
            assert (part.requires_grad, part.grad_fn) == (False, None)
        assert batch.state.num_streams == sum((b, t) in segment_at for t, b in where)
        # States come in the order of the layout's blocks, whose first rows are the segments' first steps.
        for s, (t, b) in enumerate(firsts_in_order(batch, where)):
            checks.append((weights, segment_at[b, t], batch.state.select(torch.tensor([s]))))
        return evaluate(batch, **settings)

    def firsts_in_order(batch, where):
        if isinstance(batch.layout, Ends):
            return [where[first] for first in batch.layout.first.tolist()]
        firsts, row = [], 0
        real = list(range(len(where))) if batch.layout.real is None else batch.layout.real.tolist()
        for num_segments, num_steps in batch.layout.sizes:
            firsts += [where[real.index(row + s)] for s in range(num_segments)]
            row += num_segments * num_steps
        return firsts

    monkeypatch.setattr(agent.policy, "evaluate", spy)
    for i in range(3):
        world.play(agent)
        rollout = agent.rollout_memory
        starts = rollout.episode_starts[burn_in:].numpy()
        segments = cut(starts, 6, burn_in=burn_in, tail_lengths=rollout.tail_lengths())
        segment_at = {(b, t): s for s, (b, t) in enumerate(zip(segments.stream.tolist(), segments.start.tolist()))}
        stored = {name: part.clone() for name, part in rollout.states.items()}
        checks.clear()
        agent.learn(world.now)
        moved = [check for check in checks if not same_weights(check[0], checks[0][0])]
        assert 0 < len(moved) < len(checks) == len(segments.start)
        for weights, s, given in moved:
            b, start = segments.stream[s], segments.start[s]
            begin = start - segments.burn_in[s]
            num_tail += begin < 0
            row = burn_in + begin
            from_there = RecurrentState(**{name: part[:, row, b : b + 1] for name, part in stored.items()})
            warmed = unroll_by_hand(weights, world.log[20 * i + begin : 20 * i + start], from_there, b)
            for ours, theirs in zip(given, warmed):
                assert (ours - theirs).abs().max() < 1e-10
            if segments.burn_in[s]:
                for name, part in given.parts.items():
                    assert (part - stored[name][:, burn_in + start, b : b + 1]).abs().max() > 1e-6
    assert num_tail > 2


def same_weights(one_policy, other):
    return all(torch.equal(a, b) for a, b in zip(one_policy.parameters(), other.parameters()))


@recurrent
def test_gradients_stop_at_the_segment_s_first_step(memory, monkeypatch):
    """The loss of a minibatch does not depend on the observations of its burn-in, as far as gradients know."""
    agent = make_agent(memory, burn_in=4, sequence_length=5, num_epochs=1, batch_size=15)
    world = World(rate=0.0)
    world.play(agent)
    asked = []
    encoder = agent.policy.encoder
    forward = encoder.forward

    def spy(observations):
        x = observations["observation"].clone().requires_grad_()
        asked.append((x, torch.is_grad_enabled()))
        return forward({"observation": x})

    monkeypatch.setattr(encoder, "forward", spy)
    agent.learn(world.now)
    with_gradient = [x for x, enabled in asked if enabled]
    without = [x for x, enabled in asked if not enabled]
    assert sum(len(x) for x in with_gradient) == 60
    assert all(x.grad.abs().sum(1).all() for x in with_gradient)
    assert len(without) > 4
    assert all(x.grad is None for x in without)


def states(rollout):
    return {name: part.clone() for name, part in rollout.states.items()}


@pytest.fixture
def refreshes(monkeypatch):
    """Weights, segments, the rollout's states before and after, and metrics of every refresh."""
    seen, refresh = [], dualhead.learning.update.refresh

    def spy(policy, rollout, segments, **settings):
        weights, before = copy.deepcopy(policy), states(rollout)
        metrics = refresh(policy, rollout, segments, **settings)
        seen.append((weights, segments, before, states(rollout), metrics))
        return metrics

    monkeypatch.setattr(dualhead.learning.update, "refresh", spy)
    return seen


@pytest.mark.parametrize(
    ("num_layers", "burn_in", "sequence_length"),
    [(1, 0, 6), (1, 0, 1), (1, 4, 6), (1, 6, 6), (1, 9, 6), (1, 3, 2), (2, 4, 6)],
)
@recurrent
def test_refreshed_states_equal_a_slow_unroll(memory, num_layers, burn_in, sequence_length, refreshes):
    """Where segments and burn-ins begin, the state is what today's weights make of the run from its own beginning."""
    changes = {"num_layers": num_layers, "burn_in": burn_in, "sequence_length": sequence_length}
    agent = make_agent(memory, **FAST | changes)
    world = World(rate=0.06)
    for i in range(2):
        world.play(agent)
        starts = agent.rollout_memory.episode_starts[burn_in:].numpy().copy()
        agent.learn(world.now)
        (weights, segments, before, after, metrics) = refreshes[i]
        expected = {name: part.clone() for name, part in before.items()}
        with torch.no_grad():
            for b in range(3):
                state = RecurrentState(**{name: part[:, burn_in, b : b + 1] for name, part in before.items()})
                for t, (observations, *_) in enumerate(world.log[20 * i :]):
                    if starts[t, b]:
                        state = weights.initial_state(1)
                    for name, kept in state.parts.items():
                        expected[name][:, burn_in + t, b] = kept[:, 0]
                    _, state = weights.step(one(observations, b), state)
        for s in range(len(segments.start)):
            for t in (segments.start[s], segments.start[s] - segments.burn_in[s]):
                row, b = burn_in + t, segments.stream[s]
                for name, part in after.items():
                    assert (part[:, row, b] - expected[name][:, row, b]).abs().max() < 1e-10
        for was, now, wanted in zip(before.values(), after.values(), expected.values()):
            # Nothing else is written to, the tail least of all; and refreshing did something.
            assert torch.equal(was[:, :burn_in], now[:, :burn_in])
            untouched = (was == now).all(0).all(-1)
            refreshed = ((now - wanted).abs() < 1e-10).all(0).all(-1)
            assert (untouched | refreshed).all()
            inner = segments.offset > 0
            assert not untouched[burn_in + segments.start[inner], segments.stream[inner]].any()
        assert set(metrics) == {
            f"state_drift/{what}_{place}" for what in ("value", "kl") for place in ("first", "last")
        }
        assert all(number > 1e-6 for number in metrics.values())
    assert len(refreshes) == 2


@recurrent
def test_drift_is_how_far_values_and_distributions_move(memory, refreshes):
    """By a slow replay of every inner segment from its stored and from its refreshed state."""
    agent = make_agent(memory, **FAST)
    world = World(rate=0.06)
    world.play(agent)
    spread = agent.rollout_memory.values.std(unbiased=False).item()
    metrics = agent.learn(world.now)
    weights, segments, before, after, _ = refreshes[0]
    squares, kls = {"first": [], "last": []}, {"first": [], "last": []}
    for s in np.flatnonzero(segments.offset > 0):
        b, start, length = segments.stream[s], segments.start[s], segments.length[s]
        outputs = []
        for states in (before, after):
            state = RecurrentState(**{name: part[:, start, b : b + 1] for name, part in states.items()})
            with torch.no_grad():
                first, _ = weights.step(one(world.log[start][0], b), state)
                state = unroll_by_hand(weights, world.log[start : start + length - 1], state, b)
                last, _ = weights.step(one(world.log[start + length - 1][0], b), state)
            outputs.append({"first": first, "last": last})
        for place in ("first", "last"):
            old, new = (output[place] for output in outputs)
            squares[place].append((old.values - new.values).item() ** 2)
            kl = 0.0
            for p, q in zip(old.distribution.logits, new.distribution.logits):
                p, q = torch.distributions.Categorical(logits=p), torch.distributions.Categorical(logits=q)
                kl += torch.distributions.kl_divergence(p, q).item()
            kls[place].append(kl)
    for place in ("first", "last"):
        value_drift = np.sqrt(np.mean(squares[place])) / spread
        assert metrics[f"state_drift/value_{place}"] == pytest.approx(value_drift, rel=1e-6)
        assert metrics[f"state_drift/kl_{place}"] == pytest.approx(np.mean(kls[place]), rel=1e-6)


@pytest.mark.parametrize(("state_refresh", "num_times"), [("once", 1), ("every_epoch", 2), ("never", 0)])
def test_states_are_refreshed_as_often_as_said(state_refresh, num_times, refreshes):
    agent = make_agent(state_refresh=state_refresh, num_epochs=3, **FAST)
    world = World(rate=0.06)
    world.play(agent)
    agent.learn(world.now)
    wrote = [
        any(not torch.equal(after[name], part) for name, part in before.items()) for _, _, before, after, _ in refreshes
    ]
    assert wrote == [True] * num_times or (num_times == 0 and wrote == [False])
    if num_times == 2:  # the second has younger weights
        assert not torch.equal(refreshes[0][3]["h"], refreshes[1][3]["h"])


@pytest.mark.parametrize("burn_in", [0, 4])
@pytest.mark.parametrize(("state_refresh", "num_epochs"), [("never", 3), ("once", 1), ("every_epoch", 1)])
@recurrent
def test_without_refresh_stored_states_stay_as_they_are(memory, state_refresh, num_epochs, burn_in):
    agent = make_agent(memory, state_refresh=state_refresh, num_epochs=num_epochs, burn_in=burn_in, learning_rate=0.05)
    world = World()
    world.play(agent)
    before = states(agent.rollout_memory)
    metrics = agent.learn(world.now)
    for name, part in states(agent.rollout_memory).items():
        assert torch.equal(before[name][:, burn_in:], part[:, burn_in:])
    # Drift is measured all the same.
    assert metrics["state_drift/value_last"] > 1e-6
    assert metrics["state_drift/kl_first"] > 1e-9


@pytest.mark.parametrize("state_refresh", ["once", "every_epoch", "never"])
@recurrent
def test_there_is_no_drift_while_weights_stand_still(memory, state_refresh):
    agent = make_agent(memory, state_refresh=state_refresh, learning_rate=1e-30, burn_in=3)
    world = World()
    for _ in range(2):
        world.play(agent)
        metrics = agent.learn(world.now)
        drift = [number for name, number in metrics.items() if name.startswith("state_drift/")]
        assert len(drift) == 4
        assert max(drift) < 1e-10


def test_a_memoryless_policy_has_no_drift():
    agent, world = make_agent("none"), World()
    world.play(agent)
    assert not [name for name in agent.learn(world.now) if name.startswith("state_drift/")]


@recurrent
def test_bf16_is_near_and_touches_the_update_only(memory):
    """bf16 keeps 8 bits: ratios are 1 to a few per cent, and acting is as exact as ever."""
    rollouts = []
    for precision in ("fp32", "bf16"):
        agent, world = make_agent(memory, precision=precision, dtype=torch.float32), World()
        world.play(agent)
        rollouts.append(agent.rollout_memory)
        assert torch.equal(rollouts[0].log_probs, rollouts[-1].log_probs)
        error = agent.learn(world.now)["policy/first_ratio_error"]
        assert error < 1e-5 if precision == "fp32" else 1e-4 < error < 0.1
        assert all(p.dtype == torch.float32 and p.isfinite().all() for p in agent.policy.parameters())


@recurrent
def test_under_autocast_heads_and_critic_stay_exact(memory, monkeypatch):
    agent, world = make_agent(memory, precision="bf16", dtype=torch.float32), World()
    policy = agent.policy
    features, outputs = [], []
    unroll, evaluate = policy.memory.unroll, policy.evaluate

    def spy_unroll(*args):
        h, state = unroll(*args)
        features.append(h)
        return h, state

    def spy_evaluate(batch):
        output = evaluate(batch)
        h = features[-1].detach().float()
        with torch.no_grad(), torch.autocast("cpu", enabled=False):  # now, before the optimiser moves the weights
            logits = [linear(h) for linear in policy.heads.linears]
            outputs.append((output, policy.critic(h)[:, 0], [head.log_softmax(-1) for head in logits]))
        return output

    world.play(agent)
    monkeypatch.setattr(policy.memory, "unroll", spy_unroll)
    monkeypatch.setattr(policy, "evaluate", spy_evaluate)
    agent.learn(world.now)
    assert outputs
    for output, values, log_probs in outputs:
        assert output.values.dtype == torch.float32
        torch.testing.assert_close(output.values, values, rtol=1e-5, atol=1e-6)
        for ours, expected in zip(output.distribution.logits, log_probs):
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


@recurrent
def test_permuting_streams_permutes_what_is_stored(memory, monkeypatch):
    # Sampling goes stream by stream, so the likeliest actions are compared.
    monkeypatch.setattr(FactoredCategorical, "sample", lambda self, generator: self.mode())
    order = [2, 0, 1]
    stored = []
    for streams in ([0, 1, 2], order):
        agent = make_agent(memory)
        rng = np.random.default_rng(0)
        for _ in range(20):
            observations = {"observation": rng.normal(size=(3, 3))[streams]}
            agent.act(observations)
            ended, rewards = (rng.random(3) < 0.2)[streams], rng.normal(size=3)[streams]
            agent.record(rewards, ended, np.zeros(3, dtype=bool))
        stored.append(agent.rollout_memory)
    plain, permuted = stored
    for name in ("log_probs", "values", "actions", "rewards", "episode_starts"):
        torch.testing.assert_close(getattr(permuted, name), getattr(plain, name)[:, order], rtol=0, atol=1e-13)
    for name, part in permuted.states.items():
        torch.testing.assert_close(part, plain.states[name][:, :, order], rtol=0, atol=1e-13)
