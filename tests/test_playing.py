"""A saved policy acts as the agent that was saved, remembers what is its own, and is scored by whole episodes."""

import gymnasium as gym
import numpy as np
import pytest
import scipy.stats
import torch
from agents import make_agent
from gymnasium import spaces
from saved_runs import randomize, save_run
from torch import nn

from dualhead import DataError, MemoryCell, Player, RecurrentState, load_policy
from dualhead.config import NetworkConfig
from dualhead.networks.policy import RecurrentPolicy
from dualhead.population import IndependentLearners
from dualhead.running.checkpoint import RunError, checkpoints, read_config
from dualhead.running.evaluation import Evaluation, play_episodes
from dualhead.running.session import make_learner
from dualhead.running.video import _frames
from dualhead.spaces import ActionSpec, ObservationSpec
from dualhead.storage import CheckpointError, write_tensors
from dualhead.types import as_numpy
from dualhead.worlds.commons.config import CommonsConfig
from dualhead.worlds.commons.world import Commons
from dualhead.worlds.streams import make_streams


class Ticking(gym.Env):
    """Episodes of 3, 4, 5, 3, ... steps; pays what the action was."""

    observation_space = spaces.Box(-1, 1, (2,), np.float32)
    action_space = spaces.Discrete(3, start=4)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.count = 0
        self.left = 3 + self.count % 3
        self.count += 1
        return self.observation_space.low * self.np_random.random(2, np.float32), {}

    def step(self, action):
        assert action in (4, 5, 6)
        self.left -= 1
        seen = self.observation_space.low * self.np_random.random(2, np.float32)
        return seen, float(action), self.left == 0, False, {}


gym.register("test/Ticking-v0", Ticking)

ACTION_SPACES = {
    "discrete": spaces.Discrete(3, start=-1),
    "multi": spaces.MultiDiscrete([2, 3]),
    "dict": spaces.Dict(move=spaces.Discrete(4, start=1), vote=spaces.MultiDiscrete([2, 2])),
    "box": spaces.Box(np.float32([-2, -np.inf, 0]), np.float32([4, np.inf, np.inf])),
}


class Elman(MemoryCell):
    def __init__(self, input_size, hidden_size):
        super().__init__(hidden_size, state_shapes={"h": (1, hidden_size)})
        self.cell = nn.RNNCell(input_size, hidden_size)

    def step(self, features, state):
        h = self.cell(features, state.h[0])
        return h, RecurrentState(h=h[None])


class Reversed(Elman):
    """The same weights by the same names, and another function."""

    def step(self, features, state):
        h = self.cell(-features, state.h[0])
        return h, RecurrentState(h=h[None])


def make_player(action_space, *, memory="lstm", seed=0, observation_space=None, **shape):
    observation_space = observation_space or spaces.Box(-1, 1, (3,), np.float32)
    config = NetworkConfig.spec(memory=memory, hidden_size=8, encoder_sizes=(8,), **shape)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        policy = RecurrentPolicy(ObservationSpec(observation_space), ActionSpec(action_space), config=config)
    randomize(policy)
    return Player(policy, observation_space, action_space, seed=seed)


@pytest.mark.parametrize("memory", ["lstm", "gru", "mingru", "lru", "none"])
def test_a_loaded_policy_acts_as_the_agent_that_was_saved(tmp_path, memory):
    run = save_run(tmp_path / "run", memory=memory, num_layers=2, num_envs=3)
    streams = make_streams("dualhead/RecallCue-v0", 3)
    agent = make_learner(read_config(run), streams)
    agent.load(checkpoints(run)[0])
    player = load_policy(run, seed=0)  # samples with the numbers that the agent's seed gives
    observations, starts = streams.reset(seed=5), np.ones(3, bool)
    for _ in range(50):  # two episodes of 22 steps and a part of the third
        wanted = agent.act(observations)
        actions = player.act(observations, starts, deterministic=False)
        for head in ("where", "what"):
            np.testing.assert_array_equal(actions[head], wanted[head])
        step = streams.step(actions)
        agent.record(step.rewards, step.terminated, step.truncated, final_observations=step.final_observations)
        observations, starts = step.observations, step.terminated | step.truncated
    assert load_policy(checkpoints(run)[0]).act(observations, starts).keys() == {"where", "what"}


def test_an_episode_start_forgets_its_own_stream_only():
    rng = np.random.default_rng(0)
    seen = rng.uniform(-1, 1, (12, 2, 3)).astype(np.float32)
    box = spaces.Box(-np.inf, np.inf, (1,), np.float32)
    whole, first, second = (make_player(box) for _ in range(3))
    for t in range(12):
        got = whole.act(seen[t], [False, t == 7])
        np.testing.assert_allclose(got[0], first.act(seen[t, 0], False), atol=1e-6)
        if t == 7:
            second.reset()
        np.testing.assert_allclose(got[1], second.act(seen[t, 1], False), atol=1e-6)
    remembering = make_player(box)
    for t in range(12):
        kept = remembering.act(seen[t], [False, False])
    assert abs(kept[1] - got[1]) > 1e-3
    assert abs(kept[0] - got[0]) < 1e-6


@pytest.mark.parametrize("kind", ACTION_SPACES)
@pytest.mark.parametrize("deterministic", [True, False])
def test_actions_are_in_the_action_space(kind, deterministic):
    space = ACTION_SPACES[kind]
    player = make_player(space)
    batched = gym.vector.utils.batch_space(space, 5)
    rng = np.random.default_rng(1)
    for _ in range(20):
        actions = player.act(rng.uniform(-1, 1, (5, 3)), np.zeros(5, bool), deterministic=deterministic)
        assert batched.contains(actions)
    player.reset()
    for start in (True, False, np.False_):
        assert space.contains(player.act(rng.uniform(-1, 1, 3), start, deterministic=deterministic))


def test_sampling_is_repeatable_and_leaves_the_global_generator_alone():
    seen = np.zeros((64, 3), np.float32)
    before = torch.random.get_rng_state()

    def play(seed, deterministic):
        player = make_player(spaces.Discrete(3), seed=seed)
        return np.stack([player.act(seen, np.zeros(64, bool), deterministic=deterministic) for _ in range(5)])

    sampled, likeliest = play(1, False), play(1, True)
    np.testing.assert_array_equal(play(1, False), sampled)
    assert (play(2, False) != sampled).any()
    assert (likeliest == likeliest[:, :1]).all()
    assert (sampled != sampled[:, :1]).any()
    assert torch.equal(torch.random.get_rng_state(), before)


def test_wrong_calls_are_refused_and_change_nothing():
    player = make_player(spaces.Box(-np.inf, np.inf, (1,), np.float32))
    seen = np.full((2, 3), 0.5, np.float32)
    player.act(seen, [True, True])
    with pytest.raises(ValueError, match=r"3 streams after calls with 2: reset\(\) comes before"):
        player.act(np.zeros((3, 3), np.float32), [False] * 3)
    with pytest.raises(DataError, match=r"expected shape \(2, 3\)"):
        player.act(seen[:, :2], [False, False])
    with pytest.raises(DataError, match="stream 1 is nan"):
        player.act(np.array([[0, 0, 0], [0, np.nan, 0]], np.float32), [False, False])
    for starts in ([[False, False]], [0, 2], None):
        with pytest.raises(DataError, match="episode_starts: expected a bool for each stream"):
            player.act(seen, starts)
    other = make_player(spaces.Box(-np.inf, np.inf, (1,), np.float32))
    other.act(seen, [True, True])
    np.testing.assert_array_equal(player.act(seen, [False, False]), other.act(seen, [False, False]))
    player.reset()
    assert player.act(np.zeros((3, 3), np.float32), [False] * 3).shape == (3, 1)


def test_masks_are_obeyed():
    observation_space = spaces.Dict(x=spaces.Box(-1, 1, (2,), np.float32), action_mask=spaces.MultiBinary(4))
    player = make_player(spaces.Discrete(4), observation_space=observation_space)
    for only in range(4):
        mask = np.eye(4, dtype=np.int8)[only]
        for deterministic in (True, False):
            seen = {"x": np.ones(2, np.float32), "action_mask": mask}
            assert player.act(seen, False, deterministic=deterministic) == only
    with pytest.raises(DataError, match="allows no choice"):
        player.act({"x": np.ones(2, np.float32), "action_mask": np.zeros(4, np.int8)}, False)


def test_what_cannot_be_loaded_is_said(tmp_path):
    with pytest.raises(RunError, match="holds no run"):
        load_policy(tmp_path / "nowhere")
    run = save_run(tmp_path / "run")
    broken = checkpoints(run)[0]
    broken.write_bytes(broken.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="not a whole dualhead checkpoint"):
        load_policy(broken)


def test_parts_are_those_that_the_file_names(tmp_path):
    make_agent(Elman).save(tmp_path / "agent")
    before = torch.random.get_rng_state()
    load_policy(tmp_path / "agent", memory=lambda *sizes: Elman(*sizes))
    assert torch.equal(torch.random.get_rng_state(), before)
    with pytest.raises(CheckpointError, match=r"memory.*Elman.*Reversed"):
        load_policy(tmp_path / "agent", memory=Reversed)


def test_independent_policies_need_a_memory_each(tmp_path):
    agents = IndependentLearners(lambda agent, seed: make_agent(Elman, num_streams=1, seed=seed), num_agents=2, seed=0)
    write_tensors(tmp_path / "agents", *agents.state())
    one, other = (player.policy for player in load_policy(tmp_path / "agents", memory=Elman).players)
    assert not torch.equal(one.memory.cell.weight_hh, other.memory.cell.weight_hh)
    with pytest.raises(CheckpointError, match=r"memory: .*expected a class or factory"):
        load_policy(tmp_path / "agents", memory=one.memory)


def test_returned_actions_are_the_caller_s_to_change():
    changed, kept = (make_player(spaces.MultiDiscrete([4, 3]), previous_action=True) for _ in range(2))
    seen = np.random.default_rng(0).uniform(-1, 1, (2, 3, 3)).astype(np.float32)
    actions, _ = (player.act(seen[0], np.ones(3, bool)) for player in (changed, kept))
    actions[:] = (actions + 1) % 3
    for player in (changed, kept):
        player.act(seen[1], np.zeros(3, bool))
    assert torch.equal(changed._state.h, kept._state.h)


def test_evaluation_repeats_on_the_same_streams():
    streams = make_streams("test/Ticking-v0", 4)
    player = make_player(streams.action_space, observation_space=streams.observation_space)
    before = {name: tensor.clone() for name, tensor in player.policy.state_dict().items()}
    other = make_player(streams.action_space, observation_space=streams.observation_space, memory="gru")
    first = play_episodes(player, streams, episodes=6, deterministic=False)
    play_episodes(other, streams, episodes=9, seed=3)
    assert play_episodes(player, streams, episodes=6, deterministic=False) == first
    assert play_episodes(player, streams, episodes=6, deterministic=True) != first
    # Six episodes in four streams: two play a second one, which is a step longer here.
    assert first.lengths == [3, 4, 3, 4, 3, 3]
    assert all(4 * n <= score <= 6 * n for score, n in zip(first.returns, first.lengths))
    assert all(torch.equal(before[name], tensor) for name, tensor in player.policy.state_dict().items())


def test_who_evaluates_or_films_shows_the_policy_what_was_paid(monkeypatch):
    """Each call of `act` after the first is given the rewards of the step before it."""
    paid, shown = [], []
    act = Player.act

    def spy_on_act(self, *given, rewards=None, **how):
        shown.append(None if rewards is None else as_numpy(rewards).tolist())
        return act(self, *given, rewards=rewards, **how)

    monkeypatch.setattr(Player, "act", spy_on_act)
    commons = Commons(CommonsConfig(form="bandit", num_agents=2))
    for env in (make_streams("test/Ticking-v0", 3), Ticking(), commons):
        paid.clear()
        shown.clear()
        player = make_player(env.action_space, observation_space=env.observation_space, previous_reward=True)

        def spy_on_step(actions, step=env.step):
            result = step(actions)
            paid.append(as_numpy(result[1]).tolist())
            return result

        env.step, env.spec = spy_on_step, None
        env.frame = env.render = lambda: np.zeros((2, 2, 3), np.uint8)
        if isinstance(env, Ticking | Commons):
            list(_frames(env, player, 20, seed=0, deterministic=False))
        else:
            play_episodes(player, env, episodes=6, deterministic=False)
        assert len(paid) > 2
        assert np.any(paid)
        assert shown[1:] == paid[:-1]


def test_summary_has_the_t_interval_of_the_mean():
    returns = [3.0, 5.0, 4.0, 8.0, -1.0]
    summary = Evaluation(returns, [1, 2, 3, 4, 5]).summary()
    low, high = scipy.stats.t.interval(0.95, 4, loc=np.mean(returns), scale=scipy.stats.sem(returns))
    assert summary["ci95_low"] == pytest.approx(low)
    assert summary["ci95_high"] == pytest.approx(high)
    assert (summary["mean_return"], summary["mean_length"], summary["episodes"]) == (3.8, 3.0, 5)
    assert summary["std_return"] == pytest.approx(2.9257477676655586)  # sqrt((0.64 + 1.44 + 0.04 + 17.64 + 23.04) / 5)
    single = Evaluation([2.0], [7]).summary()
    assert np.isnan([single["ci95_low"], single["ci95_high"]]).all()
    assert (single["mean_return"], single["std_return"]) == (2.0, 0.0)
