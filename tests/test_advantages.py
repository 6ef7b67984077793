"""Advantages, their normalisation and the scale of rewards: hand numbers, slow oracles, closed forms."""

import agents
import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st

from dualhead.learning.advantages import RewardScale, generalized_advantages
from dualhead.learning.losses import normalize

quick = settings(max_examples=60, deadline=None)


def gae(rewards, values, next_values, terminated, truncated, *, gamma, gae_lambda):
    """Ours, on arrays [T, B]."""
    tensors = (torch.as_tensor(np.asarray(x)) for x in (rewards, values, next_values, terminated, truncated))
    return generalized_advantages(*tensors, gamma=gamma, gae_lambda=gae_lambda).numpy()


@st.composite
def experience(draw, max_steps=12, max_streams=3):
    """Rewards, values, next values, terminated, truncated [T, B]; next values are the next step's where it goes on."""
    shape = draw(st.integers(1, max_steps)), draw(st.integers(1, max_streams))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rate = draw(st.sampled_from([0.0, 0.2, 0.5]))
    rewards, values, next_values = rng.normal(size=(3, *shape))
    terminated, truncated = rng.random((2, *shape)) < rate
    going_on = ~(terminated | truncated)[:-1]
    next_values[:-1][going_on] = values[1:][going_on]
    return rewards, values, next_values, terminated, truncated


def slow_advantages(rewards, values, next_values, terminated, truncated, *, gamma, gae_lambda):
    """A_t = sum over k of (γλ)^k δ_{t+k}, the sum stopping after the step that ends the episode."""
    advantages = np.zeros(rewards.shape)
    num_steps, num_streams = rewards.shape
    for b in range(num_streams):
        for t in range(num_steps):
            for k in range(num_steps - t):
                i = t + k
                after = 0.0 if terminated[i, b] else next_values[i, b]
                delta = rewards[i, b] + gamma * after - values[i, b]
                advantages[t, b] += (gamma * gae_lambda) ** k * delta
                if terminated[i, b] or truncated[i, b]:
                    break
    return advantages


@quick
@given(experience(), st.floats(0, 1), st.floats(0, 1))
def test_advantages_equal_the_slow_oracle(steps, gamma, gae_lambda):
    expected = slow_advantages(*steps, gamma=gamma, gae_lambda=gae_lambda)
    np.testing.assert_allclose(gae(*steps, gamma=gamma, gae_lambda=gae_lambda), expected, rtol=1e-12, atol=1e-12)


# γ = 0.5, λ = 0.5, rewards 1, 2, 3, values 4, 5, 6, value after the last step 8, final observation worth 10.
@pytest.mark.parametrize(
    ("terminated", "truncated", "expected"),
    [
        # δ = 1+2.5−4, 2+3−5, 3+4−6 = −0.5, 0, 1;  A_2 = 1, A_1 = 0 + 0.25·1, A_0 = −0.5 + 0.25·0.25
        ([0, 0, 0], [0, 0, 0], [-0.4375, 0.25, 1.0]),
        # δ_1 = 2 − 5: nothing is worth anything after the end, and nothing flows back over it
        ([0, 1, 0], [0, 0, 0], [-1.25, -3.0, 1.0]),
        # δ_1 = 2 + 0.5·10 − 5: bootstraps from the final observation, and nothing flows back over it
        ([0, 0, 0], [0, 1, 0], [0.0, 2.0, 1.0]),
        # both at once: the task ended
        ([0, 1, 0], [0, 1, 0], [-1.25, -3.0, 1.0]),
        ([0, 0, 1], [0, 0, 0], [-0.6875, -0.75, -3.0]),
        # δ_2 = 3 + 0.5·8 − 6 either way; 8 is then the value of the final observation
        ([0, 0, 0], [0, 0, 1], [-0.4375, 0.25, 1.0]),
    ],
)
def test_a_table_of_hand_numbers(terminated, truncated, expected):
    next_values = [5.0, 10.0 if truncated[1] else 6.0, 8.0]
    columns = ([1.0, 2.0, 3.0], [4.0, 5.0, 6.0], next_values, terminated, truncated)
    rewards, values, next_values, terminated, truncated = (np.array(column)[:, None] for column in columns)
    advantages = gae(rewards, values, next_values, terminated > 0, truncated > 0, gamma=0.5, gae_lambda=0.5)
    np.testing.assert_allclose(advantages[:, 0], expected, atol=1e-15)


@quick
@given(experience(), st.floats(0, 1))
def test_lambda_zero_is_the_td_error(steps, gamma):
    rewards, values, next_values, terminated, _ = steps
    expected = rewards + gamma * np.where(terminated, 0.0, next_values) - values
    np.testing.assert_allclose(gae(*steps, gamma=gamma, gae_lambda=0.0), expected, rtol=1e-12, atol=1e-12)


@quick
@given(experience(), st.floats(0, 1))
def test_lambda_one_is_the_discounted_return_minus_the_value(steps, gamma):
    rewards, values, next_values, terminated, truncated = steps
    returns = np.zeros(rewards.shape)
    for t, b in np.ndindex(*rewards.shape):
        discount = 1.0
        for i in range(t, len(rewards)):
            returns[t, b] += discount * rewards[i, b]
            discount *= gamma
            if terminated[i, b] or truncated[i, b] or i == len(rewards) - 1:
                returns[t, b] += 0.0 if terminated[i, b] else discount * next_values[i, b]
                break
    np.testing.assert_allclose(gae(*steps, gamma=gamma, gae_lambda=1.0), returns - values, rtol=1e-10, atol=1e-10)


@quick
@given(experience(), st.randoms(use_true_random=False))
def test_permuting_streams_permutes_advantages(steps, random):
    num_streams = steps[0].shape[1]
    order = random.sample(range(num_streams), num_streams)
    plain = gae(*steps, gamma=0.9, gae_lambda=0.8)
    permuted = gae(*(x[:, order] for x in steps), gamma=0.9, gae_lambda=0.8)
    np.testing.assert_array_equal(permuted, plain[:, order])


def test_what_lies_behind_a_termination_is_not_looked_at():
    zeros = np.zeros((2, 1))
    terminated = np.array([[True], [True]])
    advantages = gae(zeros, zeros, zeros + np.inf, terminated, ~terminated, gamma=0.9, gae_lambda=0.9)
    assert (advantages == 0).all()


def test_wrong_shapes_and_coefficients_are_refused():
    flat, rollout = torch.zeros(3), torch.zeros(3, 2)
    ended = torch.zeros(3, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"\(2, 2\), \(3, 2\)"):
        generalized_advantages(rollout, rollout, rollout[:2], ended, ended, gamma=0.9, gae_lambda=0.9)
    with pytest.raises(ValueError, match=r"\[T, B\]"):
        generalized_advantages(flat, flat, flat, flat.bool(), flat.bool(), gamma=0.9, gae_lambda=0.9)
    for gamma, gae_lambda in ((1.1, 0.5), (-0.1, 0.5), (0.5, 1.1), (0.5, -0.1), (float("nan"), 0.5)):
        with pytest.raises(ValueError, match="gamma and gae_lambda"):
            generalized_advantages(rollout, rollout, rollout, ended, ended, gamma=gamma, gae_lambda=gae_lambda)


def test_normalised_advantages():
    # Mean 4, unbiased deviation 2.
    assert normalize(torch.tensor([2.0, 4.0, 6.0]).double()).numpy() == pytest.approx([-1, 0, 1], abs=1e-8)
    assert normalize(torch.tensor([[7.0]])).tolist() == [[0.0]]
    assert normalize(torch.tensor([3.0, 3.0])).tolist() == [0.0, 0.0]
    numbers = np.random.default_rng(0).normal(3, 5, size=(6, 4))
    expected = (numbers - numbers.mean()) / (numbers.std(ddof=1) + 1e-8)
    np.testing.assert_allclose(normalize(torch.from_numpy(numbers)), expected, rtol=1e-12)


def test_reward_scale_against_numpy_over_two_rollouts():
    rng = np.random.default_rng(0)
    rewards = rng.normal(1, 30, size=(90, 3))
    rewards[30, 0] = 50_000
    ended = rng.random((90, 3)) < 0.3
    returns, seen, expected = np.zeros(3), [], []
    for first, last in ((0, 5), (5, 90)):
        for t in range(first, last):
            returns = 0.8 * returns + rewards[t]
            seen += returns.tolist()
            returns = np.where(ended[t], 0.0, returns)
        expected.append(np.clip(rewards[first:last] / np.sqrt(np.var(seen) + 1e-8), -10, 10))
    # Statistics are kept in float64 whatever the rewards come in.
    scale = RewardScale(3, gamma=0.8)
    for part, wanted in zip(np.split(np.arange(90), [5]), expected):
        scaled = scale(torch.from_numpy(rewards[part]), torch.from_numpy(ended[part]))
        np.testing.assert_allclose(scaled, wanted, rtol=1e-12)
    assert scaled[25, 0] == 10.0
    assert scaled.abs().max() == 10.0
    assert scale(torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.bool)).dtype == torch.float32


def learned_value(*, record_as_terminated):
    """V after training where every step pays 1 and every fifth is the last of its episode; γ = 0.9."""
    num_streams, num_updates = 8, 50
    settings = {"rollout_length": 10, "sequence_length": 5, "batch_size": 80, "num_epochs": 5, "max_grad_norm": None}
    schedule = {"learning_rate_schedule": "linear", "learning_rate_decay_steps": num_updates * 10 * num_streams}
    settings |= {"gamma": 0.9, "gae_lambda": 0.9, "learning_rate": 0.03} | schedule
    agent = agents.make_agent("gru", action_space=spaces.Discrete(2), num_streams=num_streams, **settings)
    sight, nobody = np.ones((num_streams, 3)), np.zeros(num_streams, dtype=bool)
    for _ in range(num_updates):
        while not agent.rollout_is_ready:
            agent.act(sight)
            # Streams end at different times.
            ended = (agent.num_steps // num_streams + np.arange(num_streams)) % 5 == 4
            terminated, truncated = (ended, nobody) if record_as_terminated else (nobody, ended)
            agent.record(np.ones(num_streams), terminated, truncated, final_observations=sight)
        metrics = agent.learn(sight)
    return metrics["rollout/value"]


def test_truncation_is_no_end_of_the_world():
    """Reward 1 for ever is worth 1/(1 − γ) = 10; five steps of it are worth (1 − γ⁵)/(1 − γ) = 4.1 at most."""
    assert learned_value(record_as_terminated=False) == pytest.approx(10.0, rel=0.03)
    # Mean over the five steps of an episode: what is left is worth (1 − γⁿ)/(1 − γ), n = 5 .. 1.
    assert learned_value(record_as_terminated=True) == pytest.approx(2.629, rel=0.03)
    assert np.mean([(1 - 0.9**n) / 0.1 for n in range(1, 6)]) == pytest.approx(2.629, abs=1e-3)
