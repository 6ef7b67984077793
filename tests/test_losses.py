"""Losses by hand numbers, and a whole update against plain autograd over undivided sequences."""

import copy
import math

import agents
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch.distributions import Categorical, Independent, Normal

import dualhead.learning.update
from dualhead.learning.losses import clipped_surrogate, explained_variance, value_loss

# Three steps, two heads, ε = 0.2. Heads clipped on their own:
#   A =  1: min(1.5, 1.2) + min(0.5, 0.8)   = 1.2 + 0.5  =  1.7
#   A = −2: min(−3, −2.4) + min(−1, −1.6)   = −3 − 1.6   = −4.6
#   A =  3: 3.3 + 3                                      =  6.3
# The product of both:  min(0.75, 0.8) = 0.75;  min(−1.5, −1.6) = −1.6;  3.3.
RATIOS = torch.tensor([[1.5, 0.5], [1.5, 0.5], [1.1, 1.0]], dtype=torch.float64)
ADVANTAGES = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
NOBODY = np.zeros((6, 3), bool)


@pytest.mark.parametrize(
    ("joint", "loss", "clip_fraction"), [(False, -(1.7 - 4.6 + 6.3) / 3, 4 / 6), (True, -(0.75 - 1.6 + 3.3) / 3, 2 / 3)]
)
def test_surrogate_by_hand(joint, loss, clip_fraction):
    old = torch.tensor([[-1.0, -2.0], [-0.5, -0.1], [-3.0, -0.7]], dtype=torch.float64)
    surrogate = clipped_surrogate(old + RATIOS.log(), old, ADVANTAGES, clip_coef=0.2, joint=joint)
    assert surrogate.loss.item() == pytest.approx(loss, rel=1e-12)
    assert surrogate.clip_fraction.item() == pytest.approx(clip_fraction)
    # r − 1 − ln r of the joint ratios 0.75, 0.75, 1.1, whichever way heads are clipped
    approx_kl = (2 * (0.75 - 1 - math.log(0.75)) + (1.1 - 1 - math.log(1.1))) / 3
    assert surrogate.approx_kl.item() == pytest.approx(approx_kl, rel=1e-12)
    expected = RATIOS.prod(1, keepdim=True) if joint else RATIOS
    torch.testing.assert_close(surrogate.ratio, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("joint", [False, True])
def test_ratio_one_gives_the_plain_policy_gradient(joint):
    """∇ −mean_n A_n Σ_k log π_k: every head's log-probability is pulled by −A_n / N."""
    old = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    advantages = torch.tensor([1.0, -2.0, 0.0, 4.0, 0.5], dtype=torch.float64)
    log_probs = old.clone().requires_grad_()
    surrogate = clipped_surrogate(log_probs, old, advantages, clip_coef=0.2, joint=joint)
    surrogate.loss.backward()
    expected = (-advantages / 5)[:, None].expand(5, 3)
    torch.testing.assert_close(log_probs.grad, expected, rtol=1e-12, atol=1e-15)
    assert surrogate.approx_kl.item() == 0
    assert surrogate.clip_fraction.item() == 0
    assert surrogate.loss.item() == pytest.approx(-(1 if joint else 3) * advantages.mean().item())


def test_only_moves_that_went_too_far_stop_pulling():
    """Per head: clipped where the advantage asks for more of what was overdone, and nowhere else."""
    log_probs = RATIOS.log().requires_grad_()
    clipped_surrogate(log_probs, torch.zeros_like(log_probs), ADVANTAGES, clip_coef=0.2, joint=False).loss.backward()
    # d(r A)/d log r = r A
    expected = -torch.tensor([[0.0, 0.5], [-3.0, 0.0], [3.3, 3.0]], dtype=torch.float64) / 3
    torch.testing.assert_close(log_probs.grad, expected, rtol=1e-12, atol=1e-15)


def test_value_loss_by_hand():
    values, returns = torch.tensor([1.0, 2.0, 5.0]), torch.tensor([0.0, 4.0, 4.0])
    old_values = torch.tensor([1.0, 0.0, 0.0])
    assert value_loss(values, returns, old_values, value_clip=None).item() == pytest.approx((1 + 4 + 1) / 3)
    # Clipped changes: 1 -> 1, 0 -> 0.5, 0 -> 0.5; the worse of both errors: 1, 3.5², 3.5²
    clipped = value_loss(values, returns, old_values, value_clip=0.5)
    assert clipped.item() == pytest.approx((1 + 12.25 + 12.25) / 3)
    # Downwards, and a clipped value that is nearer to the return than the free one: the free error counts.
    down = value_loss(torch.tensor([-3.0]), torch.tensor([-1.0]), torch.tensor([0.0]), value_clip=0.5)
    assert down.item() == pytest.approx(4.0)


def test_explained_variance():
    returns = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert explained_variance(returns, returns).item() == 1
    assert explained_variance(torch.full((2, 2), 9.0), returns).item() == 0
    # Residuals 1, 0, 0, −1 of returns with variance 1.25: 1 − 0.5 / 1.25
    assert explained_variance(torch.tensor([[0.0, 2.0], [3.0, 5.0]]), returns).item() == pytest.approx(0.6)
    assert explained_variance(-returns, returns).item() == pytest.approx(1 - 4)
    assert math.isnan(explained_variance(returns, torch.ones(2, 2)).item())


def make_agent(memory="lstm", **changes):
    settings = {
        "action_space": spaces.Dict(move=spaces.Discrete(3), vote=spaces.Discrete(2)),
        "rollout_length": 6,
        "sequence_length": 6,
        "batch_size": 18,
        "num_epochs": 3,
        "learning_rate": 0.02,
        "clip_coef": 0.05,
        "entropy_coef": (0.1, 0.02),
    }
    return agents.make_agent(memory, **settings | changes)


def play(agent, rng, ended=NOBODY):
    """A full rollout in which episodes end as `ended` [T, B] says, and the observation after it."""
    for t in range(6):
        agent.act(rng.normal(size=(3, 3)))
        agent.record(rng.normal(size=3), ended[t], NOBODY[t])
    return rng.normal(size=(3, 3))


def forward(policy, observations, kind):
    """Distributions of both heads and values [T, B], the sequences undivided and from zero states."""
    features = torch.relu(policy.encoder.joined[0](observations)).transpose(0, 1)
    h = getattr(policy.memory, kind)(features)[0].transpose(0, 1)
    logits, other = (linear(h) for linear in policy.heads.linears)
    if policy.heads.box_sizes:
        second = Independent(Normal(other, policy.heads.log_std.exp()), 1)
    else:
        second = Categorical(logits=other)
    return [Categorical(logits=logits), second], policy.critic(h)[..., 0]


MOVE_AND_PUSH = spaces.Tuple((spaces.Box(-1, 1, (1, 2)), spaces.Discrete(3)))


@pytest.mark.parametrize(
    ("memory", "changes"),
    [
        ("lstm", {}),
        ("gru", {"ratio": "joint", "max_grad_norm": None}),
        ("gru", {"value_clip": 0.02, "max_grad_norm": 0.05}),
        ("lstm", {"normalize_advantages": "none", "value_coef": 2.0, "entropy_coef": 0.3}),
        # With one minibatch per epoch both ways of normalising are the same.
        ("lstm", {"ratio": "joint", "normalize_advantages": "minibatch", "value_clip": 0.02}),
        ("lstm", {"action_space": MOVE_AND_PUSH}),
        ("gru", {"action_space": MOVE_AND_PUSH, "ratio": "joint"}),
    ],
)
def test_an_update_equals_plain_autograd(memory, changes):
    agent = make_agent(memory, **changes)
    config = agent.config
    rng = np.random.default_rng(0)
    next_observations = play(agent, rng)
    policy = copy.deepcopy(agent.policy)
    rollout = agent.rollout_memory
    stored = rollout.observations["observation"], rollout.actions, rollout.rewards
    observations, actions, rewards = (part.clone() for part in stored)
    second = actions[..., 1:] if policy.heads.box_sizes else actions[..., 1]
    of_heads = [actions[..., 0], second]
    last_head = agent.action_spec.names[1]

    optimizer = torch.optim.Adam(policy.parameters(), lr=0.02, eps=1e-5)
    everything = torch.cat([observations, torch.from_numpy(next_observations)[None]])
    with torch.no_grad():
        distributions, values = forward(policy, everything, memory)
        old_log_probs = [d.log_prob(torch.cat([own, own[:1]]))[:6] for d, own in zip(distributions, of_heads)]
    deltas = rewards + 0.99 * values[1:] - values[:-1]
    advantages = sum((0.99 * 0.95) ** k * torch.cat([deltas[k:], torch.zeros(k, 3)]) for k in range(6))
    old_values = values[:-1]
    returns = advantages + old_values
    if config.normalize_advantages != "none":
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    coefs = (0.3, 0.3) if config.entropy_coef == 0.3 else (0.1, 0.02)
    names = "loss/total", "loss/policy", "loss/value", f"entropy/{last_head}", "policy/grad_norm"
    expected = {name: [] for name in names}
    num_clipped = 0
    for _ in range(3):
        distributions, values = forward(policy, observations, memory)
        ratios = [
            (d.log_prob(own) - old).exp() for d, own, old in zip(distributions, of_heads, old_log_probs, strict=True)
        ]
        if config.ratio == "joint":
            ratios = [ratios[0] * ratios[1]]
        policy_loss = sum(
            -torch.min(ratio * advantages, ratio.clamp(0.95, 1.05) * advantages).mean() for ratio in ratios
        )
        num_clipped += sum(((ratio < 0.95) | (ratio > 1.05)).sum().item() for ratio in ratios)
        error = (values - returns) ** 2
        if config.value_clip is not None:
            change = torch.clamp(values - old_values, -config.value_clip, config.value_clip)
            error = torch.max(error, (old_values + change - returns) ** 2)
        entropies = [d.entropy().mean() for d in distributions]
        loss = policy_loss + config.value_coef * error.mean() - sum(c * e for c, e in zip(coefs, entropies))
        optimizer.zero_grad()
        loss.backward()
        norm = torch.stack([p.grad.norm() for p in policy.parameters()]).norm()
        if config.max_grad_norm is not None and norm > config.max_grad_norm:
            for parameter in policy.parameters():
                parameter.grad *= config.max_grad_norm / (norm + 1e-6)
        optimizer.step()
        for name, number in zip(expected, (loss, policy_loss, error.mean(), entropies[1], norm)):
            expected[name].append(number.item())

    metrics = agent.learn(next_observations)
    for (name, ours), theirs in zip(agent.policy.named_parameters(), policy.parameters()):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10, msg=name)
    for name, numbers in expected.items():
        assert metrics[name] == pytest.approx(np.mean(numbers), rel=1e-9), name
    assert num_clipped > 5
    assert metrics["update/optimizer_steps"] == 3


@pytest.fixture
def advantages_used(monkeypatch):
    """The advantages [N] of each minibatch, as the surrogate gets them."""
    used = []
    original = clipped_surrogate

    def spy(log_probs, old_log_probs, advantages, **settings):
        used.append(advantages.clone())
        return original(log_probs, old_log_probs, advantages, **settings)

    monkeypatch.setattr(dualhead.learning.update, "clipped_surrogate", spy)
    return used


@pytest.mark.parametrize("over", ["rollout", "minibatch", "none"])
def test_advantages_are_normalised_over_what_the_setting_says(over, advantages_used):
    agent = make_agent(normalize_advantages=over, sequence_length=2, batch_size=6, num_epochs=1)
    agent.learn(play(agent, np.random.default_rng(0)))
    assert [len(part) for part in advantages_used] == [6, 6, 6]
    whole = torch.cat(advantages_used)
    minibatch_means = torch.stack([part.mean() for part in advantages_used])
    if over == "minibatch":
        assert minibatch_means.abs().max() < 1e-12
        assert all(part.std().item() == pytest.approx(1) for part in advantages_used)
    else:
        assert minibatch_means.abs().max() > 0.05
        assert (abs(whole.mean()) < 1e-12) == (over == "rollout")
        assert (whole.std().item() == pytest.approx(1)) == (over == "rollout")


@pytest.mark.parametrize("over", ["rollout", "minibatch"])
@pytest.mark.parametrize("memory", ["lstm", "gru", "mingru", "lru", "none"])
def test_a_rollout_of_one_step_trains_without_nan(memory, over):
    settings = {"rollout_length": 1, "batch_size": 1, "normalize_rewards": True, "burn_in": 2, "num_streams": 1}
    agent = agents.make_agent(memory, normalize_advantages=over, **settings)
    for reward in (1.0, -2.0, 0.0):
        agent.act(np.ones(3))
        agent.record(reward, False, False)
        metrics = agent.learn(np.ones(3))
        for name, number in metrics.items():
            # One return has no variance to explain.
            assert math.isfinite(number) != (name == "policy/explained_variance"), name
    assert all(parameter.isfinite().all() for parameter in agent.policy.parameters())


@pytest.mark.parametrize("memory", ["lstm", "gru", "mingru", "lru", "none"])
def test_padding_never_reaches_the_loss(memory, advantages_used, monkeypatch):
    """Runs of 6, 1 + 5 and 4 + 2 steps, in a block per length and in one block of 5 x 6 rows: the same update."""
    weights = []
    for block_cost in (0.0, 1e6):
        agent = make_agent(memory, num_epochs=2)
        monkeypatch.setattr(agent.policy.memory, "block_cost", block_cost)
        ended = NOBODY.copy()
        ended[0, 1] = ended[3, 2] = True
        agent.learn(play(agent, np.random.default_rng(0), ended))
        weights.append(list(agent.policy.parameters()))
    for part in advantages_used:
        assert len(part) == 18
        assert len(part.unique()) == 18
    for unpadded, padded in zip(*weights):
        torch.testing.assert_close(padded, unpadded, rtol=0, atol=1e-10)
