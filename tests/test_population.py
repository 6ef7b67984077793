"""Independent learners, newcomers, and norms at work in the training loop."""

import csv
import json
import math

import numpy as np
import pytest
import torch
from settings import spec_segments, take_step

from dualhead import (
    CheckpointError,
    CommonsConfig,
    DualHeadRecurrentPPO,
    NetworkConfig,
    NormConfig,
    NormEvents,
)
from dualhead.config import TurnoverConfig
from dualhead.networks.heads import FactoredCategorical
from dualhead.population import IndependentLearners, Turnover, TurnoverState, individual_seed, strengths_by_agent
from dualhead.running.config import RunConfig
from dualhead.running.evaluation import evaluation_size, play_episodes
from dualhead.running.playing import player_of
from dualhead.running.session import Session, make_learner
from dualhead.running.trainer import train
from dualhead.worlds.commons.world import Commons
from dualhead.worlds.streams import StreamStep

RULES = CommonsConfig(form="bandit", num_agents=3, resources=("A", "B"), epoch_turns=7)
NETWORK = NetworkConfig.spec(memory="gru", hidden_size=8, encoder_sizes=(8,))
PPO = spec_segments(rollout_length=10, batch_size=20, num_epochs=2, burn_in=2)
NORMS = NormConfig(resources=("A", "B"))
NUM_WORLDS = 4


def make(agent, seed, num_streams=NUM_WORLDS):
    spaces = Commons(RULES).observation_space, Commons(RULES).action_space
    settings = {"config": PPO, "network": NETWORK, "norms": NORMS}
    return DualHeadRecurrentPPO(*spaces, num_streams=num_streams, seed=seed, **settings)


def make_learners():
    return IndependentLearners(make, num_agents=3, seed=5)


def make_worlds():
    worlds = Commons(RULES, num_worlds=NUM_WORLDS)
    return worlds, worlds.reset(seed=1)


def record(learner, step, **wrong):
    given = {
        name: getattr(step, name) for name in ("rewards", "terminated", "truncated", "final_observations", "events")
    }
    learner.record(**given | wrong)
    return step.observations


def play(learner, worlds, observations, num_turns):
    metrics = None
    for _ in range(num_turns):
        observations = record(learner, worlds.step(learner.act(observations)))
        if learner.rollout_is_ready:
            metrics = learner.learn(observations)
    return observations, metrics


def rows(tree, agent):
    if isinstance(tree, dict):
        return {name: part[agent::3] for name, part in tree.items()}
    if isinstance(tree, NormEvents):
        return NormEvents(*(part[agent::3] for part in tree))
    return None if tree is None else tree[agent::3]


def assert_same_state(one, other):
    (tensors, metadata), (others, their_metadata) = one.state(), other.state()
    assert metadata == their_metadata
    torch.testing.assert_close(tensors, others, rtol=0, atol=0)


def test_independent_learners_are_single_agents_on_their_own_streams():
    """The reference: three agents driven by hand, each with the rows of its own number."""
    learners, (worlds, observations) = make_learners(), make_worlds()
    singles = [make(number, individual_seed(5, number)) for number in range(3)]
    for _ in range(20):
        actions = learners.act(observations)
        for number, single in enumerate(singles):
            for name, part in single.act(rows(observations, number)).items():
                assert torch.equal(part, actions[name][number::3])
        step = worlds.step(actions)
        observations = record(learners, step)
        for number, single in enumerate(singles):
            record(single, StreamStep(*(rows(part, number) for part in step)))
        if learners.rollout_is_ready:
            together = learners.learn(observations)
            alone = [single.learn(rows(observations, number)) for number, single in enumerate(singles)]
            for name in ("loss/total", "norms/strength/A", "rollout/guilt"):
                assert together[name] == pytest.approx(np.mean([metrics[name] for metrics in alone]))
    for learner, single in zip(learners.learners, singles):
        for ours, theirs in zip(learner.policy.parameters(), single.policy.parameters()):
            assert torch.equal(ours, theirs)
    assert learners.num_steps == 20 * NUM_WORLDS * 3
    assert not torch.equal(learners.learners[0].policy.critic.weight, learners.learners[1].policy.critic.weight)


def spoiled(tensor, value):
    """A bad number in the last row, which belongs to the last agent."""
    tensor = tensor + 0.0
    tensor[-1:].fill_(value)
    return tensor


def test_what_the_last_agent_refuses_leaves_all_agents_as_they_were():
    learners, (worlds, observations) = make_learners(), make_worlds()
    observations, _ = play(learners, worlds, observations, 6)
    fewer = {name: leaf[:-1] for name, leaf in observations.items()}
    for wrong in (fewer, {**observations, "scalars": spoiled(observations["scalars"], math.nan)}):
        with pytest.raises(ValueError, match=r"scalars|expected"):
            learners.act(wrong)
    step = worlds.step(learners.act(observations))  # the seventh turn ends the epoch
    final = step.final_observations
    for wrong in (
        {"rewards": spoiled(step.rewards, math.nan)},
        {"final_observations": {**final, "scalars": spoiled(final["scalars"], math.inf)}},
        {"events": NormEvents(step.events.punished, spoiled(step.events.collected, 0.5))},
    ):
        with pytest.raises(ValueError, match=r"reward|scalars|collected"):
            record(learners, step, **wrong)
    observations = record(learners, step)
    expected = make_learners()
    play(expected, *make_worlds(), 7)
    assert_same_state(learners, expected)

    for _ in range(3):
        step = worlds.step(learners.act(observations))
        observations = record(learners, step)
    before, twin = learners.state(), make_learners()
    twin.restore(*before)
    for wrong in ({**observations, "scalars": spoiled(observations["scalars"], math.nan)}, None):
        with pytest.raises(ValueError, match=r"scalars|next_observations"):
            learners.learn(wrong)
        assert_same_state(learners, twin)
    assert learners.learn(observations) == twin.learn(observations)


def test_a_player_of_many_policies_shows_each_its_own_step_before(monkeypatch):
    """Against the learners that they are of, over ends of episodes."""
    network = NETWORK.model_copy(update={"previous_action": True, "previous_reward": True, "critic_memory": "gru"})
    spaces = Commons(RULES).observation_space, Commons(RULES).action_space
    learners = IndependentLearners(
        lambda agent, seed: DualHeadRecurrentPPO(*spaces, num_streams=2, network=network, seed=seed),
        num_agents=3,
        seed=0,
    )
    worlds = Commons(RULES, num_worlds=2)
    player = player_of(learners)
    monkeypatch.setattr(FactoredCategorical, "sample", lambda self, generator: self.mode())
    rng = np.random.default_rng(0)
    observations, rewards, starts = worlds.reset(seed=1), None, np.ones(6, bool)
    for _ in range(30):
        actions = learners.act(observations)
        played = player.act(observations, starts, rewards=rewards)
        for name, part in actions.items():
            np.testing.assert_array_equal(played[name], part)
        observations = worlds.step(actions).observations
        rewards, starts = 9 * rng.normal(size=6).astype(np.float32), rng.random(6) < 0.2
        learners.record(rewards, starts, np.zeros(6, bool))


def test_a_newcomer_is_new_and_the_others_stay():
    learners, (worlds, observations) = make_learners(), make_worlds()
    play(learners, worlds, observations, 10)
    before = [learner.policy.critic.weight.clone() for learner in learners.learners]
    strengths = strengths_by_agent(learners, 3)
    assert strengths.shape == (3, 2)
    assert (strengths[:, 0] > 0).all()
    learners.replace(1, individual=7)
    assert torch.equal(learners.learners[0].policy.critic.weight, before[0])
    assert not torch.equal(learners.learners[1].policy.critic.weight, before[1])
    assert strengths_by_agent(learners, 3)[1].tolist() == [0.0, 0.0]
    assert torch.equal(strengths_by_agent(learners, 3)[[0, 2]], strengths[[0, 2]])
    same = make(1, individual_seed(5, 7))
    assert torch.equal(learners.learners[1].policy.critic.weight, same.policy.critic.weight)
    founders = make_learners().learners
    assert all(not torch.equal(same.policy.critic.weight, one.policy.critic.weight) for one in founders)


def test_learners_go_on_where_they_were_saved():
    learners, (worlds, observations) = make_learners(), make_worlds()
    observations, _ = play(learners, worlds, observations, 13)
    other, (same_world, _) = make_learners(), make_worlds()
    other.restore(*learners.state())
    same_world.restore(*worlds.state())
    _, metrics = play(learners, worlds, observations, 17)
    _, again = play(other, same_world, same_world.observations(), 17)
    assert metrics == again
    assert other.num_steps == learners.num_steps
    few = IndependentLearners(make, num_agents=2, seed=5)
    with pytest.raises(CheckpointError, match="expected 2 independent learners"):
        few.restore(*learners.state())


@pytest.mark.parametrize(
    ("num_agents", "asked", "played"), [(3, 4, [2, 2, 2]), (30, 20, [1] * 30), (2, 30, [15, 15]), (1, 7, [7])]
)
def test_every_agent_counts_the_same_in_an_evaluation(monkeypatch, num_agents, asked, played):
    """Agent n gets reward n each turn: the mean return over agents is known."""
    rules = RULES.model_copy(update={"num_agents": num_agents})
    config = RunConfig(env="commons", world=rules, policies="independent", num_envs=4, ppo=PPO)
    num_worlds, episodes = evaluation_size(config, asked)
    worlds = Commons(rules, num_worlds=num_worlds)
    step = Commons.step

    def number_as_reward(self, actions):
        return step(self, actions)._replace(rewards=torch.arange(num_agents).repeat(num_worlds))

    monkeypatch.setattr(Commons, "step", number_as_reward)
    evaluation = play_episodes(player_of(make_learner(config, worlds)), worlds, episodes=episodes)
    returns = np.array(evaluation.returns)
    assert np.bincount((returns / rules.epoch_turns).astype(int)).tolist() == played
    if num_agents == 1:
        assert (dict(evaluation.agents), evaluation.team) == ({}, [])
        return
    for number, (name, own) in enumerate(evaluation.agents.items()):
        assert name == f"agent_{number}"
        assert own == [number * rules.epoch_turns] * played[number]
    assert evaluation.team == [sum(range(num_agents)) * rules.epoch_turns] * played[0]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda tensors, _: tensors.pop("agent_2/state/h"), "agent 2 is of another architecture: missing"),
        (lambda tensors, _: tensors["agent_2/rng/shuffling"].zero_(), "agent 2: rng/shuffling is no state"),
        (lambda _, metadata: metadata["learners"][2].pop("rollout"), "agent 2 has no valid rollout"),
        (lambda _, metadata: metadata.pop("num_steps"), "no valid num_steps"),
        (lambda _, metadata: metadata["learners"].__setitem__(2, None), "learners"),
    ],
)
def test_learners_are_restored_all_or_none(damage, message):
    learners, (worlds, observations) = make_learners(), make_worlds()
    play(learners, worlds, observations, 13)
    other, fresh = make_learners(), make_learners()
    tensors, metadata = learners.state()
    damage(tensors, metadata)
    with pytest.raises(CheckpointError, match=message):
        other.restore(tensors, metadata)
    assert_same_state(other, fresh)


def turnover(num_agents=4, newcomers=1, seed=0, **settings):
    config = TurnoverConfig(num_agents=newcomers, **settings)
    return Turnover(config, resources=("A", "B"), num_agents=num_agents, num_worlds=2, seed=seed)


@pytest.mark.parametrize(
    ("settings", "turns", "due"),
    [
        ({}, range(1, 16), []),
        ({"first_turn": 5}, range(1, 16), [5]),
        ({"first_turn": 5, "every_turns": 3}, range(1, 16), [5, 8, 11, 14]),
        ({"first_turn": 5, "every_turns": 3, "num_times": 2}, range(1, 16), [5, 8]),
        ({"first_turn": 2, "every_turns": 1}, [4], [4, 4, 4]),  # a rollout that ends late makes up for what it missed
    ],
)
def test_replacements_happen_on_schedule(settings, turns, due):
    schedule, happened, learners = turnover(num_agents=3, **settings), [], make_learners()
    for turn in turns:
        while schedule.is_due(turn):
            schedule.replace(learners, turn)
            happened.append(turn)
    assert happened == due


def test_whom_newcomers_replace():
    """first_n takes the lowest numbers; tenure those who came first, ties by number; random differs by seed."""
    learners = make_learners()
    first = turnover(num_agents=3, first_turn=1, every_turns=1, selection="first_n")
    assert [first.replace(learners, turn) for turn in (1, 2)] == [[0], [0]]
    longest = turnover(num_agents=3, newcomers=2, first_turn=1, every_turns=1, selection="tenure")
    assert [longest.replace(learners, turn) for turn in (1, 2, 3)] == [[0, 1], [0, 2], [0, 1]]
    assert longest.individuals.tolist() == [7, 8, 6]
    assert longest.arrivals.tolist() == [3, 3, 2]
    draws = [turnover(num_agents=3, first_turn=1, seed=seed).replace(learners, 1) for seed in range(20)]
    assert {place for (place,) in draws} == {0, 1, 2}


def test_groups_are_counted_apart():
    """Two worlds of three agents; agent 1 is a newcomer who takes A every turn, the others B in half of them."""
    schedule, learners = turnover(num_agents=3, first_turn=1, selection="first_n"), make_learners()
    schedule._choose = lambda: [1]
    schedule.replace(learners, 1)
    a, b, nothing = [True, False], [False, True], [False, False]
    schedule.count(NormEvents(np.zeros((6, 2), bool), np.array([b, a, b, b, a, b])))  # worlds may give arrays
    schedule.count(NormEvents(torch.zeros(6, 2, dtype=torch.bool), torch.tensor([nothing, a, nothing] * 2)))
    metrics = schedule.metrics(torch.tensor([[1.0, 2.0], [9.0, 9.0], [3.0, 4.0]]))
    assert [metrics.pop(f"lineage/agent_{agent}") for agent in range(3)] == [0.0, 3.0, 2.0]
    names = [
        f"{group}/{what}/{kind}"
        for group in ("newcomers", "incumbents")
        for what in ("taken", "strength")
        for kind in "AB"
    ]
    assert metrics == dict(zip(names, [1.0, 0.0, 9.0, 9.0, 0.0, 0.5, 2.0, 3.0]))
    assert schedule.metrics(None)["incumbents/taken/B"] == 0.0  # reading began the next interval


def test_turnover_goes_on_where_it_was_saved():
    settings = {"num_agents": 3, "first_turn": 1, "every_turns": 1, "seed": 3}
    one, learners = turnover(**settings), make_learners()
    for turn in range(1, 6):
        one.replace(learners, turn)
    other = turnover(**settings)
    other.restore(TurnoverState.read(json.loads(json.dumps(one.state())), source="test"))
    assert [one.replace(learners, t) for t in range(6, 20)] == [other.replace(learners, t) for t in range(6, 20)]
    assert one.metrics(None) == other.metrics(None)
    for name in ("individuals", "arrivals", "taken"):
        state = one.state()
        state[name] = state[name][:2]
        with pytest.raises(ValueError, match=name):
            other.restore(TurnoverState.read(state, source="test"))


def test_with_a_shared_policy_a_newcomer_has_no_memory_and_no_norms():
    """And nobody's steps may be half another's: places change hands between rollouts."""
    agent, (worlds, observations) = make(0, seed=0, num_streams=12), make_worlds()
    observations, _ = play(agent, worlds, observations, 10)
    before = agent._get_hidden_state()
    weights = agent.policy.critic.weight.clone()
    config = TurnoverConfig(first_turn=1, selection="first_n")
    Turnover(config, resources=("A", "B"), num_agents=3, num_worlds=4, seed=0).replace(agent, 10)
    after = agent._get_hidden_state()
    newcomers = torch.arange(12) % 3 == 0
    assert (after.h[:, newcomers] == 0).all()
    assert torch.equal(after.h[:, ~newcomers], before.h[:, ~newcomers])
    assert agent._episode_starts[newcomers].all()
    assert strengths_by_agent(agent, 3)[0].tolist() == [0.0, 0.0]
    assert strengths_by_agent(agent, 3)[1, 0] > 0
    assert torch.equal(agent.policy.critic.weight, weights)
    step = worlds.step(agent.act(observations))
    with pytest.raises(RuntimeError, match="record"):
        agent.restart_streams(newcomers)
    record(agent, step)
    with pytest.raises(RuntimeError, match="1 steps recorded"):
        agent.restart_streams(newcomers)
    learners = make_learners()
    play(learners, worlds, observations, 3)
    with pytest.raises(RuntimeError, match="3 steps recorded"):
        learners.replace(1, individual=7)


@pytest.mark.parametrize("policies", ["shared", "independent"])
def test_a_newcomers_return_is_its_own(policies):
    """Epochs of 7 turns, rollouts of 10: in the middle of the second epoch agent 0 of both worlds is replaced."""
    settings = {"policies": policies, "num_envs": 2, "network": NETWORK, "ppo": PPO}
    turnover = TurnoverConfig(first_turn=10, selection="first_n")
    session = Session(RunConfig(env="commons", world=RULES, turnover=turnover, **settings))
    session.begin()
    for _ in range(10):
        take_step(session)
    before = session.tracker.running_returns.copy()
    session.learn()
    assert session.tracker.running_lengths.tolist() == [0, 3, 3, 0, 3, 3]
    assert session.tracker.running_returns.tolist() == (before * [0, 1, 1, 0, 1, 1]).tolist()


def train_commons(tmp_path, **settings):
    """Trains and gives the rows of metrics.csv as numbers."""
    settings = {"env": "commons", "network": NETWORK, "eval_episodes": 0} | settings
    train(RunConfig(**settings, run_dir=str(tmp_path / "run")), show_progress=False)
    with (tmp_path / "run" / "metrics.csv").open() as file:
        return [{name: float(value or "nan") for name, value in row.items()} for row in csv.DictReader(file)]


@pytest.mark.parametrize(("decay_rate", "outlasts"), [(0.995, 138.28), (0.99, 68.97)])
@pytest.mark.parametrize("policies", ["shared", "independent"])
def test_the_closed_forms_hold_in_the_training_loop(tmp_path, decay_rate, outlasts, policies):
    """One resource, taken and punished every turn: guilt from the sixth on, until ln 2 / -ln decay after the last."""
    punished, free = 40, 160
    world = CommonsConfig(
        form="bandit",
        num_agents=2,
        resources=("A",),
        schedule={"A": (1.0,)},
        menu_size=1,
        phases=({"mode": "fixed", "num_turns": punished}, {"mode": "off"}),
    )
    norms = {"enforce_norms": True, "norms": NormConfig(decay_rate=decay_rate)}
    ppo = spec_segments(rollout_length=1, batch_size=1, num_epochs=1)
    sizes = {"num_envs": 1, "total_steps": 2 * (punished + free)}
    turns = train_commons(tmp_path, policies=policies, world=world, ppo=ppo, **norms, **sizes)
    assert len(turns) == punished + free
    guilt = np.array([row["rollout/guilt"] for row in turns])
    assert np.flatnonzero(guilt)[0] == 5  # the sixth turn
    assert turns[punished - 1]["norms/strength/A"] == pytest.approx(10.0)
    assert np.flatnonzero(guilt)[-1] + 1 - punished == int(outlasts)
    assert guilt[punished - 1] == pytest.approx(-2.5)


def test_a_run_with_newcomers_logs_who_is_there(tmp_path):
    turnover = TurnoverConfig(first_turn=15, num_agents=2, selection="first_n")
    settings = {"policies": "independent", "enforce_norms": True, "num_envs": 2, "total_steps": 240}
    rows = train_commons(tmp_path, ppo=PPO, world=RULES, turnover=turnover, **settings)
    assert [row["steps"] for row in rows] == [60, 120, 180, 240]
    # Due in turn 15; carried out at the end of that rollout, after its metrics.
    assert [[row[f"lineage/agent_{n}"] for n in range(3)] for row in rows] == [[0, 1, 2]] * 2 + [[3, 4, 2]] * 2
    assert np.isnan(rows[1]["newcomers/taken/A"])
    late = rows[-1]
    by_group = (2 * late["newcomers/taken/A"] + late["incumbents/taken/A"]) / 3
    assert by_group == pytest.approx(late["commons/taken/A"])


OTHER_NORMS = {"mode": "action", "harmful_action": 0}
SPEC = {"preset": "spec", "num_envs": 1}


@pytest.mark.parametrize(
    ("env", "settings", "message"),
    [
        ("CartPole-v1", {"enforce_norms": True}, "enforce_norms: expected a world that says"),
        ("CartPole-v1", {"policies": "independent"}, "policies: expected a world of several agents"),
        ("CartPole-v1", {"world": {"form": "bandit"}}, "world.form: no such setting"),
        ("commons", {"turnover": {"every_turns": 5}}, "need first_turn"),
        ("commons", {"turnover": {"first_turn": 5, "num_times": 2}}, "num_times=2 needs every_turns"),
        ("commons", {"turnover": {"first_turn": 5, "num_agents": 11}}, "at most the 10 agents"),
        (
            "commons",
            {"total_steps": 80_000, "num_envs": 8, "turnover": {"first_turn": 1001}},
            "1000 turns of 80 agents",
        ),
        ("commons", {"enforce_norms": True, "norms": OTHER_NORMS}, "expected norms.mode='resource'"),
        ("commons", {"enforce_norms": True, "norms": {"resources": ("X",)}}, "norms.resources: 'commons' has"),
        ("commons", {**SPEC, "policies": "independent", "ppo": {"batch_size": 200}}, "of 1 streams"),
        ("commons", {**SPEC, "total_steps": 500}, "one rollout is 10 streams"),
    ],
)
def test_impossible_settings_of_the_commons_are_refused(env, settings, message):
    with pytest.raises(ValueError, match=message):
        RunConfig(env=env, **settings)
