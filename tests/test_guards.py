"""What is not finite: minibatches are skipped, environments are named, and a run that diverged says where to go on."""

import itertools
import math
import re

import gymnasium as gym
import numpy as np
import pytest
import torch
from agents import make_agent
from gymnasium import spaces
from saved_runs import rows_of

from dualhead import DataError
from dualhead.cli import main
from dualhead.errors import DivergedError
from dualhead.learning import update
from dualhead.running.checkpoint import checkpoints

NOBODY = np.zeros(2, bool)


def agent_with_rollout(agent=None, **settings):
    """An agent of two streams with a full rollout of 8 steps; a minibatch takes 8 of the 16."""
    settings = {"rollout_length": 8, "sequence_length": 4, "batch_size": 8, "dtype": torch.float32, **settings}
    agent = agent or make_agent(num_streams=2, **settings)
    numbers = np.random.default_rng(agent.num_steps)
    while not agent.rollout_is_ready:
        agent.act(numbers.uniform(-1, 1, (2, 3)))
        agent.record(numbers.normal(size=2), NOBODY, NOBODY)
    return agent


def learn(agent):
    return agent.learn(np.zeros((2, 3)))


def weights_and_moments(agent):
    tensors = agent.state()[0]
    return {name: t.numpy().tobytes() for name, t in tensors.items() if name.split("/")[0] in ("policy", "optimizer")}


def spoil(monkeypatch, agent, what, *, calls):
    """Makes the loss or one gradient of some minibatches (counted from 1 over all updates from now on) not finite."""
    numbers, real = itertools.count(1), update.value_loss
    if what == "loss":

        def value_loss(*args, **kwargs):
            return real(*args, **kwargs) * (math.nan if next(numbers) in calls else 1.0)

        monkeypatch.setattr(update, "value_loss", value_loss)
        return

    def spoiled(gradient):
        return torch.where(torch.arange(len(gradient)) == 2, math.inf, gradient) if next(numbers) in calls else gradient

    agent.policy.memory.lstm.bias_hh_l0.register_hook(spoiled)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_skipped_minibatch_changes_neither_weights_nor_optimiser(monkeypatch, what):
    agent = agent_with_rollout()
    learn(agent)  # the optimiser has moments to be changed
    agent_with_rollout(agent)
    before = weights_and_moments(agent)
    spoil(monkeypatch, agent, what, calls=range(1, 100))
    with pytest.warns(UserWarning, match=r"an optimiser step was skipped: loss .*\([1-4] in a row\)"):
        metrics = learn(agent)
    assert weights_and_moments(agent) == before
    assert (metrics["update/skipped_steps"], metrics["update/optimizer_steps"]) == (4, 0)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_the_others_are_learned_from_as_if_the_skipped_one_had_not_been_there(monkeypatch, what):
    skipping, leaving_out = agent_with_rollout(), agent_with_rollout()
    with monkeypatch.context() as patched:
        spoil(patched, skipping, what, calls=[3])
        with pytest.warns(UserWarning, match=r"\(1 in a row\)"):
            metrics = learn(skipping)
    assert (metrics["update/skipped_steps"], metrics["update/optimizer_steps"]) == (1, 3)
    assert all(math.isfinite(value) for value in metrics.values())

    numbers, real = itertools.count(1), update.minibatches

    def minibatches(*args, **kwargs):
        yield from (chosen for chosen in real(*args, **kwargs) if next(numbers) != 3)

    monkeypatch.setattr(update, "minibatches", minibatches)
    expected = learn(leaving_out)
    assert weights_and_moments(skipping) == weights_and_moments(leaving_out)
    assert metrics == expected | {"update/skipped_steps": 1}


def test_skipped_steps_are_counted_in_a_row_over_updates_and_checkpoints(monkeypatch, tmp_path):
    settings = {"batch_size": 16, "num_epochs": 3, "max_skipped_steps": 5}  # three minibatches each update
    agent = agent_with_rollout(**settings)
    spoil(monkeypatch, agent, "loss", calls=[1, 3, 4, 5, 7, 8, 9, 10, 11])

    def learn_and_count(agent):
        with pytest.warns(UserWarning, match="in a row") as told:
            metrics = learn(agent)
        in_a_row = [int(re.search(r"\((\d+) in a row\)", str(warning.message))[1]) for warning in told]
        assert metrics["update/skipped_steps"] == len(in_a_row)
        agent_with_rollout(agent)
        return in_a_row

    assert [learn_and_count(agent) for _ in range(3)] == [[1, 1], [2, 3], [1, 2, 3]]
    agent.save(tmp_path / "agent.safetensors")
    again = agent_with_rollout(**settings)
    again.load(tmp_path / "agent.safetensors")
    before = weights_and_moments(again)
    with (
        pytest.warns(UserWarning, match=r"\(4 in a row\)"),
        pytest.raises(DivergedError, match=r"^5 optimiser steps in a row had a non-finite loss or gradient \(loss nan"),
    ):
        learn(again)
    assert weights_and_moments(again) == before


def test_the_optimiser_and_the_count_agree_on_what_is_skipped():
    numbers = (1.0, 3e38, math.inf, -math.inf, math.nan)
    weight = torch.nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.Adam([weight], fused=True)
    every, moved = list(itertools.product(numbers, numbers)), []
    pairs = [every[7 * place % 25] for place in range(25)]  # so that the good ones lie scattered
    # More are skipped in total, and fewer in a row.
    settings = {"num_skipped": 0, "limit": 10}
    steps = update.FiniteSteps(optimizer, **settings, device=torch.device("cpu"))
    for loss, norm in pairs:
        before, weight.grad = weight.item(), torch.ones(())
        steps.step(torch.tensor(loss), torch.tensor(norm))
        moved.append(weight.item() != before)
    measured = np.zeros((len(pairs), 6))
    measured[:, 0], measured[:, 5] = zip(*pairs)
    with pytest.warns(UserWarning, match="was skipped"):
        taken, in_a_row = update._count_skipped(measured, **settings)
    assert len(pairs) - sum(moved) > settings["limit"]
    assert taken.tolist() == moved == [abs(loss) <= 3e38 and abs(norm) <= 3e38 for loss, norm in pairs]
    assert in_a_row == len(pairs) - 1 - max(np.flatnonzero(moved))


# Runs.


TRAINING_SEEDS = (np.random.SeedSequence(0).generate_state(2) >> 1).tolist()
"""Of a run's two environments, by its seed 0."""


class Bad(gym.Env):
    """Episodes of 9 steps. The 20th step of every environment gives something bad; or every fifth of an evaluation."""

    action_space = spaces.Discrete(2)
    observation_space = spaces.Dict(near=spaces.Box(-9, 9, (2,)), far=spaces.Box(-9, 9, (3, 2)))

    def __init__(self, how):
        self.how, self.steps, self.is_evaluated = how, 0, False

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.is_evaluated = seed >= 10_000 and seed not in TRAINING_SEEDS
        self.t = 0
        return self._see(), {}

    def step(self, action):
        self.t += 1
        self.steps += 1
        is_bad = self.steps % 5 == 0 and self.is_evaluated if self.how == "evaluation" else self.steps == 20
        is_cut_off = self.t == (2 if self.how == "final" else 9)
        observation = self._see()
        if is_bad and self.how in ("observation", "final", "evaluation"):
            observation["far"][1, 0] = -math.inf
        rewards = {"reward": math.nan, "huge": 3e38}
        return observation, rewards.get(self.how, 0.0) if is_bad else 0.0, False, is_cut_off, {}

    def _see(self):
        return {"near": np.zeros(2, np.float32), "far": np.zeros((3, 2), np.float32)}


for how in ("reward", "observation", "final", "evaluation", "huge"):
    gym.register(f"test/Bad-{how}-v0", lambda how=how: Bad(how), disable_env_checker=True)

OPTIONS = ["--total-steps", "96", "--num-envs", "2", "--rollout-length", "8", "--sequence-length", "4"]
OPTIONS += ["--batch-size", "16", "--num-epochs", "3", "--hidden-size", "4", "--encoder-sizes", "4"]
OPTIONS += ["--checkpoint-every", "16", "--num-threads", "1", "--eval-episodes", "2", "--max-skipped-steps", "3"]


@pytest.mark.parametrize(
    ("how", "options", "message", "newest"),
    [
        # Two streams: 38 recorded steps when the 20th of a stream is being taken, 40 when its observation is acted on.
        ("reward", [], "38 steps (19 of each stream): reward of stream 0 is nan: expected finite numbers", 38),
        ("observation", [], "40 steps (20 of each stream): observation 'far' of stream 0 is -inf: expected finite", 40),
        ("final", [], "38 steps (19 of each stream): final observation 'far' of stream 0 is -inf: expected finite", 38),
        ("reward", ["--checkpoint-every", "64"], "38 steps (19 of each stream): reward of stream 0 is nan", 38),
        (
            "huge",
            ["--no-normalize-rewards"],
            "48 steps (24 of each stream): 3 optimiser steps in a row had a non-finite loss or gradient",
            32,
        ),
        (
            "evaluation",
            ["--eval-every", "48"],
            "48 steps (24 of each stream): in an evaluation, observation 'far' of stream 0 is -inf: expected finite",
            48,
        ),
        (
            "evaluation",
            [],
            "96 steps (48 of each stream): in an evaluation, observation 'far' of stream 0 is -inf: expected finite",
            96,
        ),
    ],
)
def test_a_run_that_cannot_go_on_names_environment_step_field_and_checkpoint(
    tmp_path, capsys, how, options, message, newest
):
    run = tmp_path / "run"
    assert main(["train", f"test/Bad-{how}-v0", *OPTIONS, "--run-dir", str(run), *options]) == 1
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert error.startswith(f"error: test/Bad-{how}-v0 after {message}")
    path = run / "checkpoints" / f"step-{newest:012d}.safetensors"
    assert error.endswith(f"; the newest checkpoint is {path}; go on with: dualhead resume {run}")
    assert checkpoints(run)[0] == path
    assert {row["update/skipped_steps"] for row in rows_of(run)} <= {"0"}


def test_on_an_accelerator_the_step_of_the_rollout_is_named():
    """There nobody waits for the device at each step: `learn` looks at the whole rollout, here called by hand."""
    agent = agent_with_rollout()
    agent._check_finite()
    agent.rollout_memory.rewards[6, 1] = math.inf
    with pytest.raises(DataError, match="step 7 of this rollout of 8: reward of stream 1 is inf"):
        agent._check_finite()
    agent.rollout_memory.observations["observation"][3, 0, 2] = math.nan
    with pytest.raises(DataError, match="step 4 of this rollout of 8: observation 'observation' of stream 0 is nan"):
        agent._check_finite()
