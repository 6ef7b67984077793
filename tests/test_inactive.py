"""Streams that sit out: no loss, no statistic, no norm, no state and no metric sees those steps.

`Dying` is the world: its agents leave one by one. What should come of it is worked out step by step in NumPy.
"""

import functools

import agents
import numpy as np
import pytest
import torch
from dying import Dying, play
from hypothesis import given, settings
from hypothesis import strategies as st

import dualhead
import dualhead.agent
import dualhead.learning.update
from dualhead import (
    CheckpointError,
    DataError,
    MemoryCell,
    NetworkConfig,
    NormConfig,
    PPOConfig,
    RecurrentState,
    StreamStep,
)
from dualhead.networks.heads import FactoredCategorical
from dualhead.norms import NormEnforcer, NormEvents
from dualhead.population import IndependentLearners, individual_seed
from dualhead.running.episodes import EpisodeTracker

LIVES = [[3, 5, 2], [4, 1, 6], [2, 2, 7], [6, 3, 1], [1, 4, 4], [5, 2, 3], [3, 6, 6], [2, 9, 4]] * 3
"""Worlds of three agents begin with these; in most of them somebody waits for the others."""


def make_agent(memory="gru", *, world, **changes):
    return agents.make_agent(
        memory, observation_space=world.observation_space, num_streams=world.num_streams, **changes
    )


class ByHand:
    """What an Elman agent should compute over rollouts of a `Dying`, in NumPy and stream by stream.

    Args:
        agent: read before each rollout, while its weights are those that act.
    """

    def __init__(self, agent):
        self.agent, self.seen, self.discounted = agent, [], []
        self.state, self.running = np.zeros((agent.num_streams, 8)), np.zeros(agent.num_streams)

    def read_weights(self):
        self.weights = {name: value.numpy().copy() for name, value in self.agent.policy.state_dict().items()}

    def forward(self, x, h):
        """Value, log-probabilities of each head, and next state."""
        w = self.weights
        if self.seen:
            x = np.clip((x - np.mean(self.seen, 0)) / np.sqrt(np.var(self.seen, 0) + 1e-8), -10, 10)
        else:
            x = np.clip(x / np.sqrt(1 + 1e-8), -10, 10)
        ((weight, bias),) = self.linears("encoder")
        features = np.maximum(weight @ x + bias, 0)
        cell = "memory.cell.{}_{}h".format
        h = np.tanh(
            w[cell("weight", "i")] @ features + w[cell("bias", "i")] + w[cell("weight", "h")] @ h + w[cell("bias", "h")]
        )
        log_probs = []
        for weight, bias in self.linears("heads"):
            logits = weight @ h + bias
            log_probs.append(logits - np.log(np.exp(logits).sum()))
        ((weight, bias),) = self.linears("critic")
        return (weight @ h + bias).item(), log_probs, h

    def linears(self, part):
        names = [name for name in self.weights if name.startswith(f"{part}.") and name.endswith("weight")]
        return [(self.weights[name], self.weights[name.replace("weight", "bias")]) for name in names]

    def rollout(self, log, after, *, gamma=0.99, gae_lambda=0.95):
        """What follows from the steps in `log` and the observations after them, [T, B] each, NaN where inactive."""
        T, B = len(log), len(log[0][1])
        values, next_values, advantages, entropies = (np.full((T, B), np.nan) for _ in range(4))
        for t, (seen, active, step) in enumerate(log):
            for b in np.flatnonzero(active):
                values[t, b], log_probs, self.state[b] = self.forward(seen[b], self.state[b])
                entropies[t, b] = -sum((np.exp(head) * head).sum() for head in log_probs)
                if step.truncated[b]:
                    next_values[t, b] = self.forward(step.final_observations[b], self.state[b])[0]
                elif t == T - 1 and not step.terminated[b]:
                    next_values[t, b] = self.forward(after[b], self.state[b])[0]
                if step.truncated[b] or step.terminated[b]:
                    self.state[b] = 0.0
        for t, (_, active, step) in enumerate(log):
            for b in np.flatnonzero(active):
                if np.isnan(next_values[t, b]):
                    next_values[t, b] = 0.0 if step.terminated[b] else values[t + 1, b]
        for seen, active, step in log:
            for b in np.flatnonzero(active):
                self.running[b] = gamma * self.running[b] + step.rewards[b]
                self.discounted.append(self.running[b])
                if step.terminated[b] or step.truncated[b]:
                    self.running[b] = 0.0
                self.seen.append(seen[b])
        scale = np.sqrt(np.var(self.discounted) + 1e-8)
        for b in range(B):
            for t in range(T):
                if not log[t][1][b]:
                    continue
                total = 0.0
                for i in range(t, T):
                    step = log[i][2]
                    delta = np.clip(step.rewards[b] / scale, -10, 10) + gamma * next_values[i, b] - values[i, b]
                    total += (gamma * gae_lambda) ** (i - t) * delta
                    if step.terminated[b] or step.truncated[b]:
                        break
                advantages[t, b] = total
        return values, advantages, entropies


def expected_segments(log, sequence_length, burn_in, kept):
    """(stream, start, length, offset, burn_in), by following each stream; `kept` are the steps before the rollout."""
    segments = []
    for b in range(len(log[0][1])):
        since = 0
        for t, (seen, active, _) in enumerate(log):
            if not active[b]:
                continue
            age = int(seen[b, 0])
            begins_run = t == 0 or age == 1
            since = 0 if begins_run else since + 1
            if since % sequence_length == 0:
                reach = min(age - 1, since + (kept if age > since + 1 else 0))
                segments.append([b, t, 0, since, min(burn_in, reach)])
            segments[-1][2] += 1
    return [tuple(segment) for segment in segments]


@pytest.mark.parametrize("sequence_length", [1, 4, 40])
@pytest.mark.parametrize("over", ["rollout", "minibatch", "none"])
def test_scripted_deaths_agree_with_a_rollout_by_hand(over, sequence_length, monkeypatch):
    """Values, advantages, normalised ones, segments, running statistics and metrics of three rollouts."""
    world = Dying(lives=LIVES)
    agent = make_agent(
        agents.Elman,
        world=world,
        sequence_length=sequence_length,
        burn_in=2,
        batch_size=1000,
        num_epochs=1,
        normalize_advantages=over,
        normalize_observations=True,
        normalize_rewards=True,
    )
    by_hand, spied = ByHand(agent), {}
    for module, name in ((dualhead.agent, "ppo_update"), (dualhead.learning.update, "clipped_surrogate")):
        _keep_arguments(monkeypatch, module, name, spied)
    cut = dualhead.learning.update.cut

    def spy_cut(*given, **by_name):
        spied["segments"] = cut(*given, **by_name)
        return spied["segments"]

    monkeypatch.setattr(dualhead.learning.update, "cut", spy_cut)
    for number in range(3):
        by_hand.read_weights()
        play(agent, world)
        log = world.log[20 * number :]
        active = np.array([active for _, active, _ in log])
        assert 0.5 < active.mean() < 0.9
        stored = agent.rollout_memory.values.numpy().copy()
        values, advantages, entropies = by_hand.rollout(log, world.seen)
        metrics = agent.learn(world.seen)

        close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-10)
        close(stored[active], values[active])
        close(spied["ppo_update"][1]["advantages"].numpy()[active], advantages[active])
        wanted = advantages[active]
        if over != "none":
            wanted = (wanted - wanted.mean()) / (wanted.std(ddof=1) + 1e-8)
        given = spied["clipped_surrogate"][0][2].numpy()
        close(np.sort(given), np.sort(wanted))
        rows = list(zip(*(field.tolist() for field in spied["segments"])))
        assert rows == expected_segments(log, sequence_length, 2, kept=2 if number else 0)

        normalizer = agent.policy.normalizer.of_leaf[0]
        close(normalizer.mean, np.mean(by_hand.seen, 0))
        np.testing.assert_allclose(normalizer.variance, np.var(by_hand.seen, 0), rtol=1e-10)
        scale = agent.reward_scale
        assert normalizer.count == scale.statistics.count == len(by_hand.discounted)
        close(scale.statistics.variance, np.var(by_hand.discounted))
        close(scale.returns, by_hand.running)

        rewards = np.array([step.rewards for _, _, step in log])
        returns = advantages[active] + values[active]
        entropy = sum(metrics[f"entropy/{name}"] for name in agent.action_spec.names)
        assert metrics["rollout/active"] == pytest.approx(active.mean())
        assert metrics["rollout/task_reward"] == pytest.approx(rewards[active].mean())
        assert metrics["rollout/value"] == pytest.approx(values[active].mean())
        assert metrics["policy/explained_variance"] == pytest.approx(1 - advantages[active].var() / returns.var())
        assert entropy == pytest.approx(entropies[active].mean())
        assert metrics["policy/first_ratio_error"] < 1e-10
        assert agent.num_steps == 20 * 6 * (number + 1)


def _keep_arguments(monkeypatch, module, name, kept):
    function = getattr(module, name)

    def spy(*given, **by_name):
        kept[name] = given, by_name
        return function(*given, **by_name)

    monkeypatch.setattr(module, name, spy)


class Witness(MemoryCell):
    """A memory that counts its steps since it was zero and sums up whom it saw, and remembers all it was shown.

    Attributes:
        testimony: (age, individual, count, sum of individuals) after every step.
    """

    def __init__(self):
        super().__init__(4, state_shapes={"h": (1, 4)})
        self.testimony = []

    def step(self, features, state):
        h = state.h.clone()
        h[0, :, 0] += 1
        h[0, :, 1] += features[:, 1]
        self.testimony.append(torch.cat([features[:, :2], h[0, :, :2]], dim=1))
        return h[0], RecurrentState(h)

    def unroll(self, features, state, layout):
        assert (features[:, 0] > 0).all(), "a step that a stream sat out is learned from"
        return super().unroll(features, state, layout)

    def plan(self, lengths, *, device, final_states=False):
        return super().plan(lengths, device=device, final_states=True)  # without padding, which it would count


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    num_worlds=st.integers(1, 3),
    num_agents=st.integers(1, 4),
    masks=st.booleans(),
    sequence_length=st.sampled_from([1, 3, 7, "rollout"]),
    burn_in=st.sampled_from([0, 2, 9]),
    state_refresh=st.sampled_from(["once", "every_epoch", "never"]),
)
def test_no_stream_sees_a_state_of_another_agent_or_episode(
    seed, num_worlds, num_agents, masks, sequence_length, burn_in, state_refresh
):
    """In acting, burn-in, refresh, drift, loss and bootstrap alike, over rollouts, deaths and resets."""
    world = Dying(num_worlds, num_agents, masks=masks, seed=seed)
    agent = make_agent(
        world=world,
        hidden_size=4,
        encoder_sizes=(),
        sequence_length=sequence_length,
        burn_in=burn_in,
        num_epochs=3,
        state_refresh=state_refresh,
    )
    witness = agent.policy.memory = Witness()
    rng = np.random.default_rng(seed)
    for _ in range(4):
        for _ in range(rng.integers(1, 21)):
            play(agent, world, 1)
            state = agent._current_hidden.h[0].numpy()
            ages = np.where(world.alive, world.age - 1, 0)
            np.testing.assert_array_equal(state[:, :2], np.column_stack([ages, ages * world.individual]))
        agent.learn(world.seen, partial=True)
    age, individual, count, total = torch.cat(witness.testimony).T
    shown = age > 0
    assert torch.equal(count[shown], age[shown])
    assert torch.equal(total[shown], (age * individual)[shown])
    assert (count[~shown] == 1).all()


@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), masks=st.booleans(), num_layers=st.integers(1, 2))
@pytest.mark.parametrize(
    ("sequence_length", "burn_in", "state_refresh"),
    [(1, 0, "never"), (7, 0, "once"), (7, 3, "every_epoch"), ("rollout", 0, "once"), ("rollout", 5, "once")],
)
@pytest.mark.parametrize("memory", agents.CELLS)
def test_acting_equals_segments_equals_each_episode_alone(
    memory, sequence_length, burn_in, state_refresh, seed, masks, num_layers
):
    """Every stored state and value is that of an unroll of its own episode; the first ratio is 1."""
    world = Dying(masks=masks, seed=seed)
    changes = {"sequence_length": sequence_length, "burn_in": burn_in, "state_refresh": state_refresh}
    agent = make_agent(memory, world=world, num_layers=num_layers, **changes)
    going_on = {}
    for number in range(2):
        play(agent, world)
        rollout, log = agent.rollout_memory, world.log[20 * number :]
        for t, (seen, active, _) in enumerate(log):
            seen = seen if masks else {"observation": seen}
            for b in np.flatnonzero(active):
                one = {name: torch.from_numpy(part[b : b + 1]) for name, part in seen.items()}
                age, individual = one["observation"][0, :2].tolist()
                state = agent.policy.initial_state(1) if age == 1 else going_on[individual]
                with torch.no_grad():
                    output, going_on[individual] = agent.policy.step(one, state)
                assert abs(output.values.item() - rollout.values[t, b].item()) < 1e-10
                for name, part in state.parts.items():
                    assert (rollout.states[name][:, burn_in + t, b] - part[:, 0]).abs().max() < 1e-10
        assert agent.learn(world.seen)["policy/first_ratio_error"] < 1e-10


def learned(agent):
    """All that an agent has learned and counted, and its recurrent state."""
    tensors, metadata = agent.state()
    prefixes = ("policy/", "optimizer/", "norms/", "reward_scale/", "rng/", "state/h", "state/c")
    kept = {name: tensor for name, tensor in tensors.items() if name.startswith(prefixes)}
    return kept, {name: value for name, value in metadata.items() if name.startswith("num_")}


def assert_same(one, other, **tolerance):
    assert one[1] == other[1]
    torch.testing.assert_close(one[0], other[0], **{"rtol": 0, "atol": 0} | tolerance)


NORMS = NormConfig(resources=("A", "B"), internalization_threshold=1.0)


@pytest.mark.parametrize("sequence_length", [1, 7, "rollout"])
@pytest.mark.parametrize("memory", [*agents.CELLS, "none"])
def test_what_inactive_streams_see_and_get_changes_no_bit(memory, sequence_length):
    """Other observations, rewards and flags of the steps that streams sit out give the same agent."""
    lived = []
    for filler, garbage in ((0.0, 0.0), (3.7, np.nan)):
        world = Dying(filler=filler)
        agent = make_agent(
            memory,
            world=world,
            sequence_length=sequence_length,
            burn_in=3,
            norms=NORMS,
            critic_memory="gru",
            previous_action=True,
            previous_reward=True,
            normalize_observations=True,
            normalize_rewards=True,
            normalize_advantages="minibatch",
        )
        metrics = []
        for _ in range(3):
            play(agent, world, garbage=garbage, events=True)
            metrics.append(agent.learn(world.seen))
        lived.append((*learned(agent), metrics))
    assert_same(*[one[:2] for one in lived])
    assert lived[0][2] == lived[1][2]
    assert all(row["rollout/active"] < 1 for row in lived[0][2])


@pytest.mark.parametrize("sequence_length", [1, 4, "rollout"])
@pytest.mark.parametrize("memory", agents.CELLS)
def test_steps_that_are_missing_and_steps_that_are_sat_out_are_the_same(memory, sequence_length, monkeypatch):
    """Two streams that live by turns learn what one stream learns that lives all of it."""
    # Sampling goes stream by stream, so the likeliest actions are taken.
    monkeypatch.setattr(FactoredCategorical, "sample", lambda self, generator: self.mode())
    changes = {
        "sequence_length": sequence_length,
        "batch_size": 20,
        "num_epochs": 3,
        "state_refresh": "every_epoch",
        "normalize_observations": True,
        "normalize_rewards": True,
        "normalize_advantages": "rollout",
    }
    alone = agents.make_agent(memory, num_streams=1, **changes)
    by_turns = agents.make_agent(memory, num_streams=2, **changes)
    rng = np.random.default_rng(0)
    ends = {3, 9, 12, 19}
    for _ in range(3):
        for t in range(20):
            seen, final, reward = rng.normal(size=(1, 3)), rng.normal(size=(1, 3)), rng.normal(size=1)
            terminated, truncated = np.array([t in ends and t % 2 == 0]), np.array([t in ends and t % 2 == 1])
            alone.act(seen)
            alone.record(reward, terminated, truncated, final_observations=final)
            active = np.arange(2) == t // 10

            def of_two(part, active=active):
                return np.where(active.reshape(2, *[1] * (part.ndim - 1)), part, 0).astype(part.dtype)

            by_turns.act(of_two(seen), active=active)
            told = (of_two(part) for part in (reward, terminated, truncated))
            by_turns.record(*told, final_observations=of_two(final))
        metrics = alone.learn(), by_turns.learn()
    for name in ("policy/", "optimizer/", "reward_scale/statistics"):
        ours, theirs = (
            {k: v for k, v in agent.state()[0].items() if k.startswith(name)} for agent in (by_turns, alone)
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    assert metrics[1].pop("rollout/active") == 0.5
    assert metrics[1] == pytest.approx(metrics[0])


@pytest.mark.parametrize("burn_in", [0, 3])
def test_a_loaded_agent_goes_on_as_the_saved_one(burn_in, tmp_path):
    """Saved in the middle of a rollout, and loaded into an agent whose streams sat out at other steps."""
    world, other_world = Dying(), Dying(seed=5)
    agent, other = (
        make_agent("lstm", world=world, burn_in=burn_in, norms=NORMS, normalize_rewards=True) for _ in range(2)
    )
    play(agent, world, events=True)
    agent.learn(world.seen)
    play(agent, world, 13, events=True)
    assert not agent.rollout_memory.active[:13].all()
    agent.save(tmp_path / "agent")
    tensors, metadata = world.state()
    play(other, other_world, events=True)
    assert not other.rollout_memory.active[13:].all()
    other.load(tmp_path / "agent")
    resumed = Dying(seed=9)
    resumed.restore(tensors, metadata)
    resumed.log = [None]  # it has begun
    told = []
    for one, its in ((agent, world), (other, resumed)):
        play(one, its, events=True)
        told.append([one.learn(its.seen)])
        play(one, its, 5, events=True)
        told[-1] += list(learned(one))
    assert told[0][0] == told[1][0]
    assert_same(told[0][1:], told[1][1:])


def test_a_file_with_a_step_sat_out_inside_an_episode_is_refused(tmp_path):
    world = Dying(lives=[[8, 8, 8]] * 9)
    agent = make_agent(world=world)
    play(agent, world, 5)
    tensors, metadata = agent.state()
    tensors["rollout/active"][3, 1] = False
    with pytest.raises(CheckpointError, match="active"):
        agent.restore(tensors, metadata)


@pytest.mark.parametrize("policies", ["shared", "independent"])
def test_a_run_resumes_bit_identically(policies, tmp_path):
    """Stopped in the middle of a rollout in which somebody sits out."""

    class Village(Dying):
        def __init__(self):
            super().__init__()
            self.play_on = self.reset()

    def run(name, total_steps, **more):
        return dualhead.train(
            Village(),
            total_steps=total_steps,
            run_dir=str(tmp_path / name),
            policies=policies,
            eval_episodes=0,
            show_progress=False,
            network=NetworkConfig(hidden_size=8, encoder_sizes=(8,)),
            ppo=PPOConfig(rollout_length=20, batch_size=40, num_epochs=2, sequence_length=5),
            **more,
        )

    whole = run("whole", 6 * 73)
    run("parts", 6 * 31)
    parts = dualhead.resume(tmp_path / "parts", total_steps=6 * 73, env=Village(), show_progress=False)
    assert "rollout/active" in whole.summary["metrics"]
    timeless = [
        {name: value for name, value in of.summary["metrics"].items() if not name.startswith("time/")}
        for of in (whole, parts)
    ]
    assert timeless[0] == timeless[1]
    torch.testing.assert_close(whole.agent.state()[0], parts.agent.state()[0], rtol=0, atol=0)


@pytest.mark.parametrize("mode", ["resource", "action"])
def test_strengths_of_inactive_streams_stay_and_they_feel_no_guilt(mode):
    resources = ("A", "B") if mode == "resource" else ("A",)
    enforcer = NormEnforcer(
        3,
        mode=mode,
        resources=resources,
        internalization_threshold=0.4,
        decay_rate=0.9,
        max_norm_strength=3.0,
        harmful_action=1 if mode == "action" else None,
    )
    rng = np.random.default_rng(0)
    strengths, guilts, num_active = np.zeros((3, len(resources))), np.zeros(len(resources)), 0
    for _ in range(50):
        active = rng.random(3) < 0.6
        punished, collected = rng.random((2, 3, len(resources))) < 0.4
        actions = torch.from_numpy(collected.astype(np.int64)) if mode == "action" else None
        guilt = enforcer.advance(enforcer.check(NormEvents(punished, collected), actions), torch.from_numpy(active))
        for b in range(3):
            expected = np.zeros(len(resources))
            for r in range(len(resources)) if active[b] else ():
                keeps = mode == "action" and punished[b, r]
                strengths[b, r] = min(3.0, strengths[b, r] * (1 if keeps else 0.9) + punished[b, r])
                if collected[b, r] and strengths[b, r] > 0.4:
                    expected[r] = -0.5 * (strengths[b, r] - 0.4)
            np.testing.assert_allclose(guilt.per_resource[b], expected, rtol=0, atol=1e-5)
            guilts += expected
        np.testing.assert_allclose(enforcer.strengths, strengths, rtol=0, atol=1e-5)
        num_active += active.sum()
    metrics = enforcer.metrics()
    for name, guilt in zip(resources, guilts):
        assert metrics[f"norms/guilt/{name}"] == pytest.approx(guilt / num_active, rel=1e-5)


def test_guilt_of_active_steps_alone_is_recorded_and_logged():
    world = Dying(lives=LIVES)
    agent = make_agent(world=world, norms=NORMS)
    strengths = np.zeros((6, 2))
    guilt = np.zeros((20, 6))
    play(agent, world, events=True)
    for t, (_, active, step) in enumerate(world.log):
        for b in np.flatnonzero(active):
            strengths[b] = np.minimum(10.0, 0.995 * strengths[b] + step.events.punished[b])
            guilt[t, b] = -0.5 * (step.events.collected[b] * np.maximum(0.0, strengths[b] - 1.0)).sum()
    rollout = agent.rollout_memory
    np.testing.assert_allclose(rollout.guilt, guilt, rtol=0, atol=1e-5)
    active = np.array([active for _, active, _ in world.log])
    metrics = agent.learn(world.seen)
    np.testing.assert_allclose(agent.norms.strengths, strengths, rtol=0, atol=1e-5)
    assert metrics["rollout/guilt"] == pytest.approx(guilt[active].mean(), rel=1e-5)


def step_all(agent, active, *, rewards=0.0, ended=False):
    B = agent.num_streams
    seen = np.full((B, 3), 0.3)
    agent.act(seen, active=active)
    agent.record(np.full(B, rewards), np.full(B, ended), np.zeros(B, dtype=bool))
    return seen


@pytest.mark.parametrize("sequence_length", [1, "rollout"])
@pytest.mark.parametrize("over", ["rollout", "minibatch"])
def test_a_rollout_in_which_everybody_sits_out_teaches_nothing(over, sequence_length):
    agent = agents.make_agent(
        sequence_length=sequence_length,
        burn_in=2,
        norms=NormConfig(resources=("A",)),
        normalize_advantages=over,
        normalize_observations=True,
        normalize_rewards=True,
    )
    events = NormEvents(np.ones((3, 1), dtype=bool), np.ones((3, 1), dtype=bool))

    def live(active):
        while not agent.rollout_is_ready:
            agent.act(np.full((3, 3), 0.3), active=active)
            agent.record(np.ones(3), np.ones(3, dtype=bool), np.zeros(3, dtype=bool), events=events)
        return agent.learn()

    live(None)
    before = learned(agent)[0]
    metrics = live(np.zeros(3, dtype=bool))
    after = {name: tensor for name, tensor in learned(agent)[0].items() if not name.startswith("rng/")}
    torch.testing.assert_close(after, {name: before[name] for name in after}, rtol=0, atol=0)
    assert metrics["rollout/active"] == 0.0
    assert np.isfinite(list(metrics.values())).all()
    assert not any(name.startswith(("loss/", "entropy/")) for name in metrics)
    # One step of one stream, and then everybody again.
    step = functools.partial(agent.record, np.ones(3), np.ones(3, dtype=bool), np.zeros(3, dtype=bool), events=events)
    agent.act(np.zeros((3, 3)), active=np.array([False, True, False]))
    step()
    assert agent.learn(partial=True)["rollout/active"] == pytest.approx(1 / 3)
    assert "rollout/active" not in live(None)
    assert (agent.num_steps, agent.num_updates) == (3 * 61, 4)


def test_nobody_sits_out_in_the_middle_of_an_episode():
    agent = agents.make_agent()
    seen = step_all(agent, None)
    before = agent.state()
    with pytest.raises(DataError, match=r"active: streams \[1\] sit out"):
        agent.act(seen, active=[True, False, True])
    with pytest.raises(DataError, match="active: expected shape"):
        agent.act(seen, active=[True, False])
    torch.testing.assert_close(agent.state()[0], before[0], rtol=0, atol=0)


def test_actions_taken_back_leave_no_trace_of_who_sat_out():
    lived = []
    for taken_back in (False, True):
        agent = agents.make_agent()
        if taken_back:
            drawn = agent._sampling.get_state()
            agent.act(np.zeros((3, 3)), active=[False, True, True])
            agent.forget_actions()
            agent._sampling.set_state(drawn)
        while not agent.rollout_is_ready:
            seen = step_all(agent, np.ones(3, dtype=bool), rewards=1.0)
        assert "rollout/active" not in agent.learn(seen)
        lived.append(learned(agent))
    assert_same(*lived)


def test_an_agent_restarted_while_it_waits_begins_with_nothing():
    world = Dying(lives=[[1, 8, 8], [8, 8, 8]] * 9, num_worlds=1)
    agent = make_agent(world=world, norms=NORMS, normalize_rewards=True, rollout_length=5)
    play(agent, world, events=True)
    agent.learn(world.seen)
    strengths = agent.norms.strengths.clone()
    assert (~world.alive).tolist() == [True, False, False]
    agent.restart_streams(torch.tensor([True, False, False]))
    assert not agent.norms.strengths[0].any()
    assert torch.equal(agent.norms.strengths[1:], strengths[1:])
    play(agent, world, events=True)
    assert agent.learn(world.seen)["policy/first_ratio_error"] < 1e-10


def test_independent_learners_are_single_agents_that_sit_out():
    """One of them does so for a whole rollout, and the means over learners stay numbers."""
    world = Dying(num_worlds=2, num_agents=2, lives=[[2, 25], [1, 30]] * 9)

    def make(seed):
        return agents.make_agent(observation_space=world.observation_space, num_streams=2, seed=seed)

    together = IndependentLearners(lambda agent, seed: make(seed), num_agents=2, seed=0)
    alone = [make(individual_seed(0, number)) for number in range(2)]
    world.reset()
    for _ in range(2):
        for _ in range(20):
            seen, active = world.seen, world.active
            actions = together.act(seen, active=active)
            for a, agent in enumerate(alone):
                own = agent.act(seen[a::2], active=None if active is None else active[a::2])
                np.testing.assert_array_equal(actions[a::2], own)
            step = world.step(actions)
            told = (step.rewards, step.terminated, step.truncated, step.final_observations)
            together.record(*told[:3], final_observations=told[3])
            for a, agent in enumerate(alone):
                agent.record(*(part[a::2] for part in told[:3]), final_observations=told[3][a::2])
        metrics = together.learn(world.seen)
        apart = [agent.learn(world.seen[a::2]) for a, agent in enumerate(alone)]
        assert metrics["rollout/active"] == np.mean([one.get("rollout/active", 1.0) for one in apart])
    for learner, agent in zip(together.learners, alone):
        assert_same(learned(learner), learned(agent))


def test_episodes_are_counted_over_active_steps():
    tracker = EpisodeTracker(2)
    nobody = np.zeros(2, dtype=bool)
    for rewards, terminated, active in (
        ([1.0, 2.0], [False, True], None),
        ([1.0, 99.0], [False, True], [True, False]),
        ([1.0, 99.0], [True, True], [True, False]),
        ([1.0, 5.0], [False, False], None),
        ([1.0, 5.0], [False, True], [True, True]),
    ):
        active = None if active is None else np.array(active)
        of_episode = {"age": np.where(True if active is None else active, [7.0, 8.0], np.nan)}
        step = StreamStep(
            None, np.array(rewards), np.array(terminated), nobody, None, numbers=of_episode, active=active
        )
        tracker.step(step)
    assert tracker.metrics() == {
        "episode/age": (8 + 7 + 8) / 3,
        "episode/mean_return": (2 + 3 + 10) / 3,
        "episode/mean_length": (1 + 3 + 2) / 3,
        "episode/count": 3,
    }
    assert tracker.running_lengths.tolist() == [2, 0]
