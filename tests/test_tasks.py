"""Memory tasks: physics against Gymnasium's own, RecallCue against scripted episodes and its closed form."""

import math
import warnings
from contextlib import closing

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env

from dualhead.worlds import tasks

IDS = ("dualhead/CartPoleNoVel-v1", "dualhead/PendulumNoVel-v1", "dualhead/MountainCarContinuousNoVel-v0")
IDS += ("dualhead/RecallCue-v0",)


@pytest.fixture(autouse=True)
def _no_window(monkeypatch):
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")


def cue_and_side(observation):
    """What a human reads off the cue step: index of the lit cue, and 0 for left (-1), 1 for right (+1)."""
    return int(np.flatnonzero(observation[:-3])[0]), {-1.0: 0, 1.0: 1}[float(observation[-3])]


def answer(where, what):
    return {"where": where, "what": what}


def play(env, policy=lambda _: answer(0, 0), *, seed=None):
    """One episode of `policy(observation) -> action`: observations [steps + 1, channels], rewards, ends."""
    observation, _ = env.reset(seed=seed)
    observations, rewards, ends = [observation], [], []
    while not any(ends):
        observation, reward, terminated, truncated, _ = env.step(policy(observation))
        assert not truncated
        observations.append(observation)
        rewards.append(reward)
        ends.append(terminated)
    return np.stack(observations), rewards, ends


class Rememberer:
    """The optimal scripted policy: reads the cue step, answers at every step from memory."""

    def __call__(self, observation):
        if observation[-2] == 1:
            self.what, self.where = cue_and_side(observation)
        return answer(self.where, self.what)


@pytest.mark.parametrize("env_id", IDS)
@pytest.mark.filterwarnings("ignore:.*we recommend using a symmetric and normalized space")  # Pendulum's torque
def test_gymnasium_accepts_the_environment(env_id):
    before = gym.registry[env_id]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tasks.register()
    assert gym.registry[env_id] is before
    with closing(gym.make(env_id, render_mode="rgb_array")) as env:
        check_env(env.unwrapped)
        env.reset(seed=0)
        assert np.ptp(env.render()) > 0


@pytest.mark.parametrize(
    ("env_id", "original_id", "visible", "num_steps"),
    [
        ("dualhead/CartPoleNoVel-v1", "CartPole-v1", [0, 2], 300),
        ("dualhead/PendulumNoVel-v1", "Pendulum-v1", [0, 1], 450),
        ("dualhead/MountainCarContinuousNoVel-v0", "MountainCarContinuous-v0", [0], 2100),
    ],
)
def test_physics_is_the_original_with_velocities_dropped(env_id, original_id, visible, num_steps):
    ours, original = gym.make(env_id), gym.make(original_id)
    assert ours.action_space == original.action_space
    assert ours.observation_space == gym.spaces.Box(
        original.observation_space.low[visible], original.observation_space.high[visible], dtype=np.float32
    )
    original.action_space.seed(3)
    observation, _ = ours.reset(seed=11)
    full, _ = original.reset(seed=11)
    np.testing.assert_array_equal(observation, full[visible])
    num_ends = 0
    for _ in range(num_steps):
        action = original.action_space.sample()
        observation, *rest = ours.step(action)
        full, *expected = original.step(action)
        np.testing.assert_array_equal(observation, full[visible])
        assert observation.dtype == np.float32
        assert rest == expected  # reward, terminated, truncated, info
        if expected[1] or expected[2]:
            num_ends += 1
            np.testing.assert_array_equal(ours.reset()[0], original.reset()[0][visible])
    assert num_ends >= 2


def test_cart_pole_balanced_from_positions_alone_is_truncated_at_500():
    env = gym.make("dualhead/CartPoleNoVel-v1")
    before, _ = env.reset(seed=0)
    observation, ends = before, []
    while not any(any(end) for end in ends):
        # Finite differences over 0.02 s stand in for the hidden velocities.
        velocity, angular_velocity = (observation - before) / 0.02
        push = 0.5 * observation[0] + velocity + 10 * observation[1] + 3 * angular_velocity > 0
        before = observation
        observation, reward, *end, _ = env.step(int(push))
        assert reward == 1.0
        ends.append(tuple(end))
    assert ends == [(False, False)] * 499 + [(False, True)]


def test_pendulum_is_truncated_at_200():
    env = gym.make("dualhead/PendulumNoVel-v1")
    env.reset(seed=0)
    ends = [env.step(np.zeros(1, np.float32))[2:4] for _ in range(200)]
    assert ends == [(False, False)] * 199 + [(False, True)]


@pytest.mark.parametrize(("delay", "num_cues"), [(0, 2), (1, 3), (20, 4), (50, 8)])
def test_recall_episode_has_cue_noise_go(delay, num_cues):
    env = gym.make("dualhead/RecallCue-v0", delay=delay, num_cues=num_cues)
    observations, rewards, ends = play(env, seed=5)

    assert observations.shape == (delay + 3, num_cues + 3)  # the last is the observation after the end
    assert observations.dtype == np.float32
    is_cue, is_go = observations[:, -2], observations[:, -1]
    np.testing.assert_array_equal(is_cue, [1] + [0] * (delay + 2))
    np.testing.assert_array_equal(is_go, [0] * (delay + 1) + [1, 0])
    assert sorted(observations[0, :num_cues]) == [0] * (num_cues - 1) + [1]
    assert abs(observations[0, -3]) == 1
    np.testing.assert_array_equal(observations[-1], np.zeros(num_cues + 3))
    assert all(observation in env.observation_space for observation in observations)

    noise = observations[1:-1, :-2]
    assert np.unique(noise).size == noise.size  # every value drawn afresh; no channel repeats the cue
    assert ends == [False] * (delay + 1) + [True]
    assert rewards[:-1] == [0.0] * (delay + 1)


def test_recall_noise_is_uniform_and_tells_nothing_of_the_cue():
    env = tasks.RecallCue(delay=3, num_cues=2)
    episodes = np.stack([play(env, seed=seed)[0] for seed in range(2000)])
    shown = episodes[:, 0, [0, 2]]  # whether cue 0 is lit, the side
    noise = episodes[:, 1:-1, :-2].reshape(2000, -1)
    # 24,000 draws of variance 1/3: standard error 0.0037; correlations over 2,000 episodes: 0.022.
    assert abs(noise.mean()) < 5 * 0.0037
    assert abs(noise.var() - 1 / 3) < 0.02
    correlations = np.corrcoef(np.hstack([shown, noise]), rowvar=False)[:2, 1:]
    assert abs(correlations[0, 0]) < 5 * 0.0224  # cue against side
    assert np.abs(correlations[:, 1:]).max() < 5 * 0.0224


@pytest.mark.parametrize(("where_off", "what_off", "expected"), [(0, 0, 1.0), (0, 1, 0.5), (1, 0, 0.5), (1, 1, 0.0)])
def test_recall_reward_table(where_off, what_off, expected):
    env = tasks.RecallCue(delay=2, num_cues=3)
    for seed in range(12):
        what, where = cue_and_side(env.reset(seed=seed)[0])
        for _ in range(3):  # wrong answers before go cost nothing
            assert env.step(answer(1 - where, (what + 1) % 3))[1:] == (0.0, False, False, {})
        given = answer((where + where_off) % 2, (what + what_off) % 3)
        assert env.step(given)[1:] == (expected, True, False, {})


def test_recall_same_seed_same_rollout_whatever_the_actions():
    first, second = tasks.RecallCue(delay=4), tasks.RecallCue(delay=4)
    first.reset(seed=7)
    second.reset(seed=7)
    second.action_space.seed(0)
    for _ in range(5):
        mine = play(first)[0]
        theirs = play(second, lambda _: second.action_space.sample())[0]
        np.testing.assert_array_equal(mine, theirs)
    assert not np.array_equal(mine, play(first)[0])


def test_recall_observations_may_be_kept():
    env = tasks.RecallCue(delay=2)
    kept, _, _ = play(env, seed=1)
    held = [env.reset(seed=1)[0]] + [env.step(answer(1, 1))[0] for _ in range(4)]
    held[1][:] = 9  # a reader may write into what it was given: no other step changes
    env.reset()
    np.testing.assert_array_equal(np.delete(held, 1, axis=0), np.delete(kept, 1, axis=0))


def test_recall_with_memory_earns_exactly_one():
    env = gym.make("dualhead/RecallCue-v0")
    returns = [sum(play(env, Rememberer(), seed=seed)[1]) for seed in range(50)]
    assert returns == [1.0] * 50


@pytest.mark.parametrize("num_cues", [2, 4])
def test_recall_without_memory_earns_the_closed_form(num_cues):
    env = tasks.RecallCue(delay=0, num_cues=num_cues)
    env.action_space.seed(0)
    expected = {2: 0.5, 4: 0.375}[num_cues]
    assert env.chance == expected
    num_episodes = 3000
    # Two independent coins, each worth 0.5; five standard errors.
    variance = 0.25 * (0.5 * 0.5 + (1 / num_cues) * (1 - 1 / num_cues))
    bound = 5 * math.sqrt(variance / num_episodes)
    policies = (
        lambda _: answer(1, 0),
        lambda _: env.action_space.sample(),
        lambda seen: answer(int(seen[-3] > 0), int(seen[:-3].argmax())),  # answers what go itself shows
    )
    env.reset(seed=2)
    for policy in policies:
        mean = np.mean([sum(play(env, policy)[1]) for _ in range(num_episodes)])
        assert abs(mean - expected) < bound


def test_recall_runs_vectorised():
    same_step = {"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP}
    envs = gym.make_vec("dualhead/RecallCue-v0", 3, vectorization_mode="sync", vector_kwargs=same_step, delay=2)
    assert list(envs.single_action_space.spaces) == ["where", "what"]
    observations, _ = envs.reset(seed=0)
    for _ in range(3):  # episodes: with SAME_STEP the next cue arrives with the reward
        what, where = np.array([cue_and_side(observation) for observation in observations]).T
        for step in range(4):
            observations, rewards, terminated, truncated, _ = envs.step({"where": where, "what": what})
            assert rewards.tolist() == [float(step == 3)] * 3
            assert terminated.tolist() == [step == 3] * 3
            assert not truncated.any()
    envs.close()


@pytest.mark.parametrize(
    ("name", "value"),
    [("delay", -1), ("delay", 2.5), ("num_cues", 1), ("num_cues", "four"), ("render_mode", "human")],
)
def test_recall_refuses_bad_arguments(name, value):
    with pytest.raises(ValueError, match=f"{name} must be .* got {value!r}"):
        tasks.RecallCue(**{name: value})


BAD_ACTIONS = {
    TypeError: [
        *(0, (0, 1), np.array([0, 1]), {"where": 0}, {"where": 0, "what": 1, "why": 2}),
        *({"where": 0.0, "what": 1}, {"where": np.array([0]), "what": 1}),
    ],
    ValueError: [{"where": 2, "what": 1}, {"where": 0, "what": 4}, {"where": -1, "what": 0}],
}


@pytest.mark.parametrize(
    ("error", "action"), [(error, action) for error in BAD_ACTIONS for action in BAD_ACTIONS[error]]
)
def test_recall_refuses_bad_actions_and_stays_where_it_was(error, action):
    env = tasks.RecallCue(delay=0)
    what, where = cue_and_side(env.reset(seed=0)[0])
    with pytest.raises(error, match=r"where.*got"):
        env.step(action)
    env.step(answer(np.int64(where), np.array(what)))
    assert env.step(answer(where, what))[1:3] == (1.0, True)


def test_recall_needs_a_reset_before_and_after_an_episode():
    env = tasks.RecallCue(delay=0, render_mode="ansi")
    for call in (lambda: env.step(answer(0, 0)), env.render):
        with pytest.raises(ResetNeeded, match="reset"):
            call()
    play(env)
    with pytest.raises(ResetNeeded, match="reset"):
        env.step(answer(0, 0))


def test_recall_tells_its_phases_in_text():
    env = gym.make("dualhead/RecallCue-v0", delay=2, num_cues=3, render_mode="ansi")
    what, where = cue_and_side(env.reset(seed=3)[0])
    wanted = f"{('left', 'right')[where]} {what}"
    lines = [env.render()]
    for _ in range(4):
        env.step(answer(1, 0))
        lines.append(env.render())
    assert lines == [f"cue: {wanted}", "delay 1/2", "delay 2/2", "go", f"answered right 0, wanted {wanted}"]


def test_recall_picture_shows_cue_answer_and_verdict():
    env = tasks.RecallCue(delay=0, num_cues=2, render_mode="rgb_array")
    what, where = cue_and_side(env.reset(seed=0)[0])
    cell = 16
    picture = env.render()
    assert (picture.shape, picture.dtype) == ((3 * cell, 5 * cell, 3), np.uint8)
    assert (picture[8, what * cell] == 255).all()  # the lit cue, as seen and as wanted
    assert (picture[cell + 8, what * cell] == 255).all()
    assert (picture[cell + 8, (1 - what) * cell] == 0).all()
    assert not picture[2 * cell :].any()  # no answer yet

    env.step(answer(where, what))
    env.step(answer(1 - where, what))
    picture = env.render()
    cue_verdict = picture[2 * cell + 8, what * cell]
    side_verdict = picture[2 * cell + 8, 2 * cell + (1 - where) * cell // 2]
    assert cue_verdict.argmax() == 1  # green
    assert side_verdict.argmax() == 0  # red


def test_recall_without_a_render_mode_warns_and_draws_nothing():
    env = tasks.RecallCue()
    env.reset()
    with pytest.warns(UserWarning, match="render_mode"):
        assert env.render() is None
