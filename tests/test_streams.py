"""Streams: SAME_STEP only, final observations where they belong, and the lean vector environment equals Gymnasium's."""

import functools
from contextlib import closing

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorWrapper
from gymnasium.wrappers.vector import RecordEpisodeStatistics

from dualhead.errors import DataError
from dualhead.worlds.replay import leaves
from dualhead.worlds.replay_trial import legal_action
from dualhead.worlds.streams import GymnasiumStreams, UnavailableEnvironment, make_env, make_streams
from dualhead.worlds.vectors import KeepsFinalObservation, LeanSyncVectorEnv


class Counter(gym.Env):
    """Observation: the number of steps in this episode, as a number and inside a Dict; ends after `length` steps."""

    action_space = spaces.Discrete(2)

    def __init__(self, length: int, *, nested: bool = False, truncates: bool = False, reuses: bool = False) -> None:
        self.array = np.zeros(1, np.float32) if reuses else None
        box = spaces.Box(0, 100, (1,), np.float32)
        self.length, self.nested, self.truncates = length, nested, truncates
        self.observation_space = (
            spaces.Dict(count=box, pair=spaces.Tuple((box, spaces.Discrete(99)))) if nested else box
        )

    def _see(self):
        count = np.array([self.t], np.float32)
        if self.array is not None:
            self.array[:] = count
            count = self.array
        return {"count": count, "pair": (count, self.t)} if self.nested else count

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self._see(), {}

    def step(self, action):
        self.t += 1
        ended = self.t == self.length
        return self._see(), float(self.t), ended and not self.truncates, ended and self.truncates, {"noise": 1}


def test_final_observation_is_the_one_before_the_reset():
    streams = GymnasiumStreams(LeanSyncVectorEnv([lambda: Counter(2), lambda: Counter(3, truncates=True)]))
    assert streams.reset(seed=0).tolist() == [[0], [0]]
    for observations, final, terminated, truncated in (
        ([[1], [1]], None, [False, False], [False, False]),
        ([[0], [2]], [[2], [2]], [True, False], [False, False]),
        ([[1], [0]], [[1], [3]], [False, False], [False, True]),
    ):
        step = streams.step(np.zeros(2, int))
        assert step.observations.tolist() == observations
        assert (None if step.final_observations is None else step.final_observations.tolist()) == final
        assert (step.terminated.tolist(), step.truncated.tolist()) == (terminated, truncated)
    assert step.rewards.tolist() == [1.0, 3.0]


def reusing():
    return Counter(2, reuses=True)


def same_step(*envs, kind=SyncVectorEnv):
    return kind(envs, autoreset_mode=AutoresetMode.SAME_STEP)


MAKERS = {
    "ours": lambda: GymnasiumStreams(LeanSyncVectorEnv([lambda: Counter(2)] * 2)),
    "ours, reusing": lambda: make_streams(reusing, 2),
    "ours, reusing, async": lambda: make_streams(reusing, 2, vectorization="async"),
    "sync": lambda: GymnasiumStreams(same_step(reusing, reusing)),
    "sync inside a wrapper": lambda: GymnasiumStreams(RecordEpisodeStatistics(same_step(reusing, reusing))),
    "async": lambda: GymnasiumStreams(same_step(*[lambda: KeepsFinalObservation(reusing())] * 2, kind=AsyncVectorEnv)),
    "nested": lambda: make_streams(lambda: Counter(2, nested=True), 2),
    "nested, reusing": lambda: make_streams(lambda: Counter(2, nested=True, reuses=True), 2),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_final_observations_are_not_the_next_ones_in_any_vector_environment(kind):
    """An environment may write each observation to the same array; what was seen last is kept from the reset."""
    with closing(MAKERS[kind]()) as streams:
        streams.reset(seed=0)
        streams.step(np.zeros(2, int))
        step = streams.step(np.zeros(2, int))
        seen, final = step.observations, step.final_observations
        if "nested" in kind:
            assert (seen["pair"][1].tolist(), final["pair"][1].tolist()) == ([0, 0], [2, 2])
            seen, final = seen["count"], final["count"]
        assert seen.tolist() == [[0], [0]]
        assert final.tolist() == [[2], [2]]
        streams.step(np.zeros(2, int))
        assert final.tolist() == [[2], [2]]


def test_processes_whose_final_observations_would_be_overwritten_are_refused():
    with (
        closing(same_step(reusing, reusing, kind=AsyncVectorEnv)) as envs,
        pytest.raises(ValueError, match="KeepsFinalObservation"),
    ):
        GymnasiumStreams(envs)
    GymnasiumStreams(same_step(lambda: Counter(2), kind=AsyncVectorEnv)).close()


SMALL = spaces.Box(0.0, 0.5, (1,))  # integers of its numbers are 0


@pytest.mark.parametrize(
    ("space", "mask", "allowed"),
    [
        (spaces.Discrete(3, start=5), [0, 1, 0], {6}),
        (spaces.Discrete(3), {"action": [0, 0, 1]}, {2}),
        (spaces.MultiDiscrete([2, 3]), [0, 1, 0, 0, 1], {(1, 2)}),
        (spaces.Dict(go=spaces.Discrete(2), say=spaces.Discrete(2)), {"go": [1, 0], "say": [0, 1]}, {(0, 1)}),
        (spaces.Dict(go=spaces.Discrete(2), say=spaces.Discrete(2)), {"say": [0, 1]}, {(0, 1), (1, 1)}),
        (spaces.MultiBinary(2), {"head_1": [0, 1]}, {(0, 1), (1, 1)}),
        (spaces.Tuple((spaces.Discrete(2), SMALL)), {"0": [0, 1]}, {(1, 0)}),
        (spaces.Tuple((spaces.Discrete(2), SMALL)), [0, 1], {(1, 0)}),
        (spaces.Tuple((SMALL, spaces.Dict(go=spaces.Discrete(2)))), ({}, {"go": [0, 1]}), {(0, 1)}),
    ],
)
def test_legal_actions_are_those_of_the_mask(space, mask, allowed):
    space.seed(0)
    seen = set()
    for _ in range(20):
        action = legal_action(space, {"seen": 0, "action_mask": mask})
        assert space.contains(action)
        parts = np.concatenate([np.ravel(leaf) for leaf in leaves(action)])
        seen.add(tuple(map(int, parts)) if len(parts) > 1 else int(parts[0]))
    assert seen == allowed


@pytest.mark.parametrize("env", ["dualhead/CartPoleNoVel-v1", "dualhead/RecallCue-v0", "popgym-RepeatPreviousEasy-v0"])
def test_lean_vector_environment_equals_gymnasiums(env):
    ours = make_streams(env, 3)
    theirs = same_step(*[lambda: make_env(env)] * 3)
    seeds = (np.random.SeedSequence(7).generate_state(3) >> 1).tolist()
    np.testing.assert_array_equal(ours.reset(seed=7), theirs.reset(seed=seeds)[0])
    theirs.action_space.seed(1)
    ended = 0
    for _ in range(120):
        actions = theirs.action_space.sample()
        mine, other = ours.step(actions), theirs.step(actions)
        for got, expected in zip(mine[:4], other[:4]):
            np.testing.assert_array_equal(got, expected)
        finals = other[4].get("final_obs")
        for stream in np.flatnonzero(mine.terminated | mine.truncated):
            ended += 1
            np.testing.assert_array_equal(mine.final_observations[stream], finals[stream])
    assert ended > 3
    ours.close()
    theirs.close()


def test_processes_give_what_this_process_gives():
    make = functools.partial(make_streams, "dualhead/RecallCue-v0", 2, delay=1)
    with closing(make()) as here, closing(make(vectorization="async")) as there:
        np.testing.assert_array_equal(here.reset(seed=3), there.reset(seed=3))
        for _ in range(7):
            actions = {"where": np.array([0, 1]), "what": np.array([2, 3])}
            for got, expected in zip(here.step(actions), there.step(actions)):
                if expected is not None:
                    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_two_seeds_have_no_environment_in_common(vectorization):
    with closing(make_streams("CartPole-v1", 4, vectorization=vectorization)) as streams:
        seen = [tuple(row) for seed in range(4) for row in streams.reset(seed=seed)]
        assert len(set(seen)) == len(seen)
        assert [tuple(row) for row in streams.reset(seed=2)] == seen[8:12]


def test_filler_steps_are_refused():
    with pytest.raises(ValueError, match=r"^CartPole-v1: .*SAME_STEP, got AutoresetMode.NEXT_STEP") as refused:
        GymnasiumStreams(gym.make_vec("CartPole-v1", 2))
    # The remedy that the message names works as it stands there.
    remedy = str(refused.value).partition("by ")[2].partition("or by ")[2]
    envs = eval(remedy, {"gym": gym, "id": "CartPole-v1", "num_envs": 2})
    assert GymnasiumStreams(envs).reset(seed=0).shape == (2, 4)


class Forgetful(VectorWrapper):
    """Drops what Gymnasium says of final observations, as a vector environment of one's own might."""

    def step(self, actions):
        return *self.env.step(actions)[:4], {"score": 1}


@pytest.mark.parametrize("truncates", [True, False])
def test_final_observations_must_come_where_an_episode_was_truncated(truncates):
    envs = same_step(lambda: Counter(9), lambda: Counter(2, truncates=truncates))
    streams = GymnasiumStreams(Forgetful(envs))
    streams.reset(seed=0)
    streams.step(np.zeros(2, int))
    if truncates:
        message = r"SyncVectorEnv.* environments \[1\]: expected .*final_obs.*\['score'\].*use"
        with pytest.raises(DataError, match=message):
            streams.step(np.zeros(2, int))
    else:
        assert streams.step(np.zeros(2, int)).final_observations is None  # nothing bootstraps from them


@pytest.mark.parametrize("env", ["NoSuch-v0", "dualhead/NoSuch-v0", "CartPole-v99"])
def test_unknown_environment(env):
    with pytest.raises(UnavailableEnvironment, match=env):
        make_streams(env, 1)


def test_missing_extra_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "popgym", None)
    with pytest.raises(UnavailableEnvironment, match=r"pip install -e '\.\[popgym\]'"):
        make_streams("popgym-RepeatPreviousEasy-v0", 1)


def test_minigrid_comes_without_its_mission():
    streams = make_streams("MiniGrid-MemoryS7-v0", 2)
    observations = streams.reset(seed=0)
    assert observations["image"].shape == (2, 7, 7, 20)
    assert set(np.unique(observations["image"])) == {0, 1}
    assert sorted(streams.observation_space.keys()) == ["direction", "image"]
    with pytest.warns(UserWarning, match="BabyAI-GoToObj-v0 says in words what is to be done"):
        streams = make_streams("BabyAI-GoToObj-v0", 1)
    assert sorted(streams.reset(seed=0)) == ["direction", "image"]
