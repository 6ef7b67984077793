"""Agents with different spaces, some of whom leave early: learned by learners of their own, played, and scored."""

import copy
import json

import numpy as np
import pytest
import torch
from saved_runs import randomize
from settings import spec_segments
from two_kinds import TwoKinds

import dualhead
from dualhead import ByAgent, CheckpointError, DataError, DualHeadRecurrentPPO, NetworkConfig, Player, Players, RunError
from dualhead.cli import main
from dualhead.config import TurnoverConfig, WorldConfig
from dualhead.population import IndependentLearners, Turnover, individual_seed
from dualhead.running.evaluation import play_episodes
from dualhead.running.playing import load_policy, player_of
from dualhead.storage import write_tensors
from dualhead.types import own_rows
from dualhead.worlds.registry import WORLDS, World

NETWORK = NetworkConfig.spec(hidden_size=8, encoder_sizes=(8,), previous_action=True, previous_reward=True)
PPO = spec_segments(rollout_length=10, batch_size=10, num_epochs=2, normalize_observations=True, normalize_rewards=True)


def make(agent, seed, num_streams=2):
    spaces = TwoKinds.spaces_by_agent[agent]
    return DualHeadRecurrentPPO(*spaces, num_streams=num_streams, config=PPO, network=NETWORK, seed=seed)


def make_learners(seed=5):
    return IndependentLearners(make, num_agents=2, seed=seed)


def random_players():
    """With weights that let their actions depend much on what they remember."""
    learners = make_learners()
    for number, learner in enumerate(learners.learners):
        randomize(learner.policy, seed=number)
    return player_of(learners)


def advance(learners, worlds, observations, num_steps):
    metrics = None
    for _ in range(num_steps):
        step = worlds.step(learners.act(observations))
        learners.record(*step[1:4], final_observations=step.final_observations)
        observations = step.observations
        if learners.rollout_is_ready:
            metrics = learners.learn(observations)
    return observations, metrics


def assert_same_state(one, other):
    (tensors, metadata), (others, their_metadata) = one.state(), other.state()
    assert metadata == their_metadata
    torch.testing.assert_close(tensors, others, rtol=0, atol=0)


def test_learners_of_different_spaces_are_single_agents_on_their_own_streams():
    """The reference: two agents driven by hand, each with what is its own, over two updates."""
    learners, worlds = make_learners(), TwoKinds()
    singles = [make(number, individual_seed(5, number)) for number in range(2)]
    observations = worlds.reset(seed=1)
    for _ in range(20):
        actions = learners.act(observations)
        assert isinstance(actions, ByAgent)
        for number, single in enumerate(singles):
            np.testing.assert_array_equal(actions[number], single.act(observations[number]))
        step = worlds.step(actions)
        final, observations = step.final_observations, step.observations
        learners.record(*step[1:4], final_observations=final)
        for number, single in enumerate(singles):
            own = None if final is None else final[number]
            single.record(*(part[number::2] for part in step[1:4]), final_observations=own)
        if learners.rollout_is_ready:
            together = learners.learn(observations)
            alone = [single.learn(observations[number]) for number, single in enumerate(singles)]
            assert together["loss/total"] == pytest.approx(np.mean([metrics["loss/total"] for metrics in alone]))
    for learner, single in zip(learners.learners, singles):
        assert_same_state(learner, single)
    assert learners.num_steps == 80


def test_learners_of_different_spaces_go_on_where_they_were_saved():
    learners, worlds = make_learners(), TwoKinds()
    observations, _ = advance(learners, worlds, worlds.reset(seed=1), 13)
    other, same = make_learners(seed=8), copy.deepcopy(worlds)
    other.restore(*learners.state())
    assert advance(learners, worlds, observations, 17)[1] == advance(other, same, observations, 17)[1]
    assert_same_state(learners, other)
    swapped = IndependentLearners(lambda agent, seed: make(1 - agent, seed), num_agents=2, seed=5)
    with pytest.raises(CheckpointError, match="agent 0 is of another architecture: its observation_space"):
        swapped.restore(*learners.state())


def test_what_one_learner_refuses_changes_none():
    learners, worlds = make_learners(), TwoKinds()
    scouts, carriers = worlds.reset(seed=1)
    wrong = [ByAgent([scouts, carriers * np.nan]), ByAgent([scouts, carriers[:1]]), ByAgent([scouts])]
    player, fresh = (player_of(learners, seed=3) for _ in range(2))
    for observations in wrong:
        for act in (learners.act, lambda seen: player.act(seen, np.ones(4, bool))):
            with pytest.raises(DataError, match=r"stream 0 is nan|expected shape|one part for each of 2 agents"):
                act(observations)
    assert_same_state(learners, make_learners())
    starts = np.ones(4, bool)
    for given in (starts[:3], True):
        with pytest.raises(DataError, match="episode_starts: expected a bool for each of 2 agents in every world"):
            player.act(ByAgent([scouts, carriers]), given)
    ours, expected = (one.act(ByAgent([scouts, carriers]), starts, deterministic=False) for one in (player, fresh))
    np.testing.assert_array_equal(ours[1], expected[1])


def test_newcomers_have_the_spaces_of_their_place():
    learners = make_learners()
    config = TurnoverConfig(first_turn=1, selection="random", num_agents=2)
    Turnover(config, resources=(), num_agents=2, num_worlds=2, seed=0).replace(learners, turn=1)
    for agent, learner in enumerate(learners.learners):
        assert_same_state(learner, make(agent, individual_seed(5, 2 + agent)))
    advance(learners, (worlds := TwoKinds()), worlds.reset(seed=1), 10)


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_saved_population_plays_as_its_learners(tmp_path, deterministic):
    learners, worlds = make_learners(), TwoKinds()
    write_tensors(tmp_path / "agents", *learners.state())
    loaded = load_policy(tmp_path / "agents", seed=5)  # samples with the numbers that the learners' seed gives
    ours = player_of(learners, seed=5)
    observations, rewards, starts = worlds.reset(seed=2), None, np.ones(4, bool)
    for _ in range(30):
        expected = ours.act(observations, starts, rewards=rewards, deterministic=deterministic)
        actions = loaded.act(observations, starts, rewards=rewards, deterministic=deterministic)
        drawn = expected if deterministic or learners.rollout_is_ready else learners.act(observations)
        for kind in range(2):
            np.testing.assert_array_equal(actions[kind], expected[kind])
            np.testing.assert_array_equal(actions[kind], drawn[kind])
        step = worlds.step(actions)
        observations, rewards, starts = step.observations, step.rewards, step.terminated | step.truncated
        if not (deterministic or learners.rollout_is_ready):
            learners.record(*step[1:4], final_observations=step.final_observations)


def played_by_hand(player, seed, world, num_episodes):
    """Returns [episode][agent] of one world: each agent is asked only while it is there, and begins anew each time."""
    env = TwoKinds(1, first=world)
    alone = [Player(one.policy, one.observation_space, one.action_space) for one in player.players]
    observations = env.reset(seed=seed)
    starts, rewards, returns = [True, True], np.zeros(2), []
    while len(returns) < num_episodes:
        if all(starts):
            sums = [0.0, 0.0]
        actions, present = [np.ones(1, np.int64), np.zeros((1, 2), np.float32)], env.active
        for agent in np.flatnonzero(present):
            shown = rewards[agent : agent + 1]
            actions[agent] = alone[agent].act(observations[agent], [starts[agent]], rewards=shown)
        step = env.step(ByAgent(actions))
        observations, rewards = step.observations, step.rewards
        for agent in np.flatnonzero(present):
            sums[agent] += float(rewards[agent])
            starts[agent] = bool(step.terminated[agent] | step.truncated[agent])
        if all(starts):
            returns.append(sums)
    return returns


def test_an_evaluation_is_what_is_played_by_hand():
    """Seven episodes of each agent in three worlds: the scout waits while the carrier goes on, and then begins anew."""
    player, worlds = random_players(), TwoKinds(3)
    played = play_episodes(player, worlds, episodes=14, seed=4)
    by_world = [played_by_hand(player, 4, world, 3 - (world > 0)) for world in range(3)]
    expected = {
        name: [returns[agent] for world in by_world for returns in world]
        for agent, name in enumerate(worlds.agent_names)
    }
    assert list(played.agents) == ["scout", "carrier"]
    for name, returns in expected.items():
        np.testing.assert_allclose(played.agents[name], returns, rtol=1e-5)
        assert len(set(returns)) > 4
    np.testing.assert_allclose(played.team, np.add(*expected.values()), rtol=1e-5)
    assert played.summary()["mean_return"] == pytest.approx(np.mean([*expected.values()]), rel=1e-5)
    assert played.num_cut == 0
    assert played.lengths[:3] == [len(scout) for scout, _ in worlds.history[0][:3]]
    assert play_episodes(player, worlds, episodes=14, seed=4) == played


def sums(worlds, num_steps=None):
    return np.array([[sum(part[:num_steps]) for part in episodes[0]] for episodes in worlds.history])


def test_a_world_that_is_cut_is_cut_for_those_who_wait_too():
    player, worlds = random_players(), TwoKinds(2, length=10**6)
    with pytest.warns(UserWarning, match="2 of 4 episodes of this evaluation were cut after 6 steps"):
        played = play_episodes(player, worlds, episodes=4, seed=4, max_steps=6)
    np.testing.assert_allclose(played.agents["scout"], sums(worlds)[:, 0])
    np.testing.assert_allclose(played.agents["carrier"], sums(worlds, 6)[:, 1])
    np.testing.assert_allclose(played.team, sums(worlds, 6).sum(1))
    with pytest.warns(UserWarning, match="4 of 8 episodes"):  # a second round: nobody's world has ended by itself
        again = play_episodes(player, worlds, episodes=8, seed=4, max_steps=6)
    assert again.agents["scout"][::2] == played.agents["scout"]
    np.testing.assert_allclose(again.agents["scout"][1::2], sums(worlds)[:, 0])
    np.testing.assert_allclose(again.team[1::2], sums(worlds, 6).sum(1))


@pytest.mark.parametrize("absent", [0, 1])
def test_who_never_takes_part_is_not_waited_for(absent):
    worlds = TwoKinds(2, absent=absent)
    played = play_episodes(random_players(), worlds, episodes=8, seed=4, max_steps=30)
    present = worlds.agent_names[1 - absent]
    expected = [sum(episode[1 - absent]) for world in worlds.history for episode in world[:2]]
    assert played.agents[worlds.agent_names[absent]] == []
    np.testing.assert_allclose(played.agents[present], expected)
    np.testing.assert_allclose(played.team, expected)


TRAINING = {"ppo": PPO, "network": NETWORK, "total_steps": 80, "eval_episodes": 4, "show_progress": False}


def test_a_run_with_different_agents_is_trained_played_and_resumed(tmp_path):
    settings = {**TRAINING, "policies": "independent", "eval_every": 40}
    result = dualhead.train(TwoKinds(), eval_env=TwoKinds(), run_dir=str(tmp_path / "run"), **settings)
    assert [type(learner.action_spec.space) for learner in result.agent.learners] == [
        type(space) for _, space in TwoKinds.spaces_by_agent
    ]
    played = dualhead.evaluate(tmp_path / "run", env=TwoKinds(), episodes=4)
    assert result.summary["evaluation"] == played.summary()
    assert played == play_episodes(player_of(result.agent), TwoKinds(), episodes=4)
    assert played.summary()["mean_return"] == pytest.approx(np.mean(list(played.agents.values())))
    loaded = load_policy(tmp_path / "run")
    assert isinstance(loaded, Players)
    for player, learner in zip(loaded.players, result.agent.learners):
        torch.testing.assert_close(player.policy.state_dict(), learner.policy.state_dict(), rtol=0, atol=0)
    streams = {"env": TwoKinds(), "eval_env": TwoKinds()}
    resumed = dualhead.resume(tmp_path / "run", **streams, total_steps=120, show_progress=False)
    assert resumed.summary["steps"] == 120
    whole = dualhead.train(
        TwoKinds(), eval_env=TwoKinds(), run_dir=str(tmp_path / "b"), **settings | {"total_steps": 120}
    )
    assert_same_state(resumed.agent, whole.agent)
    with pytest.raises(RunError, match="holds a policy for each agent"):
        dualhead.export(tmp_path / "run", tmp_path / "policy.onnx")


class Swapped(TwoKinds):
    spaces_by_agent = TwoKinds.spaces_by_agent[::-1]


class OneSpace(TwoKinds):
    spaces_by_agent = None


def test_spaces_that_do_not_fit_are_refused(tmp_path):
    settings = {**TRAINING, "run_dir": str(tmp_path / "run")}
    with pytest.raises(RunError, match=r"scout: Dict\(.*; carrier: Box\(.*--policies independent"):
        dualhead.train(TwoKinds(), eval_env=TwoKinds(), **settings)
    settings["policies"] = "independent"
    for other in (Swapped(), OneSpace()):
        with pytest.raises(RunError, match="eval_env: the training has the spaces"):
            dualhead.train(TwoKinds(), eval_env=other, **settings)
    dualhead.train(TwoKinds(), eval_env=TwoKinds(), **settings)
    for other in (Swapped(), OneSpace()):
        with pytest.raises(CheckpointError, match="has the spaces"):
            dualhead.evaluate(tmp_path / "run", env=other)


class TwoKindsConfig(WorldConfig):
    num_agents: int = 2


def test_the_command_line_shows_agents_and_team(tmp_path, monkeypatch, capsys):
    open_world = lambda settings, *, num_worlds, device: TwoKinds(num_worlds)  # noqa: E731
    monkeypatch.setitem(WORLDS, "two-kinds", World(TwoKindsConfig, open_world))
    run = str(tmp_path / "run")
    settings = {**TRAINING, "policies": "independent", "num_envs": 2, "run_dir": run}
    dualhead.train("two-kinds", **settings)
    capsys.readouterr()
    assert main(["eval", run, "--episodes", "6", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    played = dualhead.evaluate(run, episodes=6)
    assert result["agents"].keys() == {"scout", "carrier"}
    for name, of in (*result["agents"].items(), ("team", result["team"])):
        returns = played.team if name == "team" else played.agents[name]
        assert of["returns"] == returns
        assert of["mean_return"] == pytest.approx(np.mean(returns))
    assert main(["eval", run, "--episodes", "6"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines[-4:]] == ["agent", "scout", "carrier", "team"]
    for line, returns in zip(lines[-3:], [*played.agents.values(), played.team]):
        assert float(line[1]) == pytest.approx(np.mean(returns), abs=0.006)
        assert line[-1] == "3"


def test_rows_of_agents_are_taken_from_trees_of_all_kinds():
    numbers = np.arange(6)
    tree = {"a": (numbers, {"b": numbers[:, None]}), "c": None}
    own = own_rows(tree, 1, 3)
    assert own["a"][0].tolist() == [1, 4]
    assert own["a"][1]["b"].tolist() == [[1], [4]]
    assert own["c"] is None
