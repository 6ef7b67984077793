"""ParallelEnvs as streams, against loops over the ParallelEnvs themselves and tables worked out by hand."""

import copy
import functools
import sys
from contextlib import closing
from pathlib import Path

import gymnasium as gym
import imageio.v3 as imageio
import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from pettingzoo import ParallelEnv

import dualhead
from dualhead import NetworkConfig, PPOConfig, TurnoverConfig, WorldConfig
from dualhead.cli import main
from dualhead.errors import EnvironmentFailed, RunError, UnavailableEnvironment
from dualhead.running.checkpoint import checkpoints, read_config
from dualhead.running.episodes import EpisodeTracker
from dualhead.running.parts import named_modules
from dualhead.running.video import record_video
from dualhead.storage import read_tensors
from dualhead.types import ByAgent
from dualhead.worlds.commons.config import CommonsConfig
from dualhead.worlds.commons.parallel import parallel_env
from dualhead.worlds.commons.world import Commons
from dualhead.worlds.pettingzoo import JointEnv
from dualhead.worlds.streams import GymnasiumStreams, ParallelStreams, make_env, make_streams
from dualhead.worlds.vectors import LeanSyncVectorEnv

LEAVES, CUT, VANISHES, LINGERS, COMES = "leaves", "cut", "vanishes", "lingers", "comes"
"""What happens to an agent: terminated; truncated; gone without a flag; terminated, and listed on; takes part from now
on."""


class Scripted(ParallelEnv):
    """Agents that come and go as a script says: for each step what happens to whom. Without a word they stay.

    An agent sees its number, the steps of this episode, and the episodes so far. Its reward is 10 · number + step.
    """

    metadata = {"name": "scripted"}  # noqa: RUF012

    def __init__(self, *script, agents="abc", start=None, reuses=False):
        self.script, self.possible_agents = script, list(agents)
        self.start = self.possible_agents if start is None else list(start)
        self.agents, self.episodes, self.taken = [], -1, []
        self.arrays = {agent: np.zeros(3, np.float32) for agent in agents} if reuses else None

    def observation_space(self, agent):
        return spaces.Box(-np.inf, np.inf, (3,), np.float32)

    def action_space(self, agent):
        return spaces.Discrete(3)

    def see(self, agent):
        seen = np.array([self.possible_agents.index(agent), self.t, self.episodes], np.float32)
        if self.arrays is None:
            return seen
        self.arrays[agent][:] = seen
        return self.arrays[agent]

    def reset(self, seed=None, options=None):
        self.t, self.episodes = 0, self.episodes + 1
        self.agents = list(self.start)
        return {agent: self.see(agent) for agent in self.agents}, {agent: {} for agent in self.agents}

    def step(self, actions):
        assert list(actions) == self.agents
        self.taken.append(actions)
        self.t += 1
        happens = self.script[self.t - 1]
        told = [agent for agent in self.agents if happens.get(agent) != VANISHES]
        came = [agent for agent in self.possible_agents if happens.get(agent) == COMES]
        rewards = {agent: 10.0 * self.possible_agents.index(agent) + self.t for agent in told}
        terminated = {agent: happens.get(agent) in (LEAVES, LINGERS) for agent in told}
        truncated = {agent: happens.get(agent) == CUT for agent in told}
        infos = {agent: {"score": 100.0 * self.possible_agents.index(agent) + self.t} for agent in told}
        self.agents = [agent for agent in told if happens.get(agent) not in (LEAVES, CUT)] + came
        return {agent: self.see(agent) for agent in told + came}, rewards, terminated, truncated, infos


def worlds(*makers):
    """Streams of worlds of several kinds."""
    return ParallelStreams(GymnasiumStreams(LeanSyncVectorEnv([functools.partial(make_env, make) for make in makers])))


def active_of(streams):
    return [True] * streams.num_streams if streams.active is None else streams.active.tolist()


def chosen(streams, generator):
    """Random legal actions of all streams."""
    if streams.spaces_by_agent is None:
        return generator.integers(streams.action_space.n, size=streams.num_streams)
    num_worlds = streams.num_streams // streams.num_agents
    return ByAgent(generator.integers(space.n, size=num_worlds) for _, space in streams.spaces_by_agent)


# Who takes part.


def test_numbers_of_agents_that_left_before_the_others_are_counted():
    streams = worlds(lambda: Scripted({"b": LEAVES}, {"a": CUT}, {}, {"c": CUT}))
    streams.reset(seed=0)
    tracker = EpisodeTracker(3)
    for _ in range(4):
        tracker.step(streams.step(np.zeros(3, int)))
    metrics = tracker.metrics()
    assert metrics["episode/score"] == np.mean([2, 101, 204])
    assert metrics["episode/mean_length"] == np.mean([2, 1, 4])
    assert metrics["episode/mean_return"] == np.mean([1 + 2, 11, 21 + 22 + 23 + 24])
    assert metrics["episode/count"] == 3


def test_agents_leave_one_by_one_and_wait_for_the_world():
    script = ({"b": LEAVES}, {"a": CUT}, {"c": VANISHES})
    streams = worlds(lambda: Scripted(*script), lambda: Scripted({}, dict.fromkeys("abc", CUT)))
    # Behind the constructors' own resets these are the second episodes.
    first = [[0, 0, 1], [1, 0, 1], [2, 0, 1]]
    assert streams.reset(seed=0).tolist() == first * 2
    assert streams.active is None
    step = streams.step(np.zeros(6, int))
    assert step.active is None
    assert step.rewards.tolist() == [1, 11, 21] * 2
    assert step.terminated.tolist() == [False, True, False, False, False, False]
    assert not step.truncated.any()
    assert step.final_observations.tolist() == [[0, 1, 1], [1, 1, 1], [2, 1, 1]] * 2
    assert streams.active.tolist() == [True, False, True, True, True, True]

    step = streams.step(np.zeros(6, int))
    assert step.active.tolist() == [True, False, True, True, True, True]
    assert step.rewards.tolist() == [2, 0, 22, 2, 12, 22]
    assert not step.terminated.any()
    assert step.truncated.tolist() == [True, False, False, True, True, True]
    assert step.final_observations[[0, 2, 3, 4, 5]].tolist() == [[0, 2, 1], [2, 2, 1], [0, 2, 1], [1, 2, 1], [2, 2, 1]]
    assert step.observations[3:].tolist() == [[0, 0, 2], [1, 0, 2], [2, 0, 2]]  # the second world began anew
    assert streams.active.tolist() == [False, False, True, True, True, True]
    assert streams.have_reset.tolist() == [False, True]
    assert step.numbers["score"].tolist()[3:] == [2, 102, 202]
    assert np.isnan(step.numbers["score"][:3]).all()

    step = streams.step(np.zeros(6, int))
    assert step.active.tolist() == [False, False, True, True, True, True]
    assert step.rewards.tolist() == [0, 0, 0, 1, 11, 21]  # who vanishes is told nothing
    assert step.terminated.tolist() == [False, False, True, False, False, False]
    assert step.observations[:3].tolist() == [[0, 0, 2], [1, 0, 2], [2, 0, 2]]
    assert streams.active is None
    # The numbers of everybody who left, when the world's episode ends.
    assert step.numbers["score"].tolist()[:2] == [2, 101]
    assert np.isnan(step.numbers["score"][2:]).all()


def test_agents_come_late_come_back_or_linger():
    script = (
        {"c": COMES},
        {"a": LEAVES},
        {"b": LINGERS, "a": COMES},
        {},
        dict.fromkeys("ac", LEAVES) | {"b": VANISHES},
    )
    streams = worlds(lambda: Scripted(*script, start="ab"))
    assert streams.reset(seed=0)[:2].tolist() == [[0, 0, 1], [1, 0, 1]]
    rows = []
    for _ in script:
        before = active_of(streams)
        step = streams.step(np.zeros(3, int))
        assert (before if step.active is None else step.active.tolist()) == before
        rows.append((before, step.rewards.tolist(), step.terminated.tolist()))
    t, f = True, False
    assert rows == [
        ([t, t, f], [1, 11, 0], [f, f, f]),
        ([t, t, t], [2, 12, 22], [t, f, f]),
        ([f, t, t], [0, 13, 23], [f, t, f]),  # b is listed on, and sits out all the same
        ([t, f, t], [4, 0, 24], [f, f, f]),
        ([t, f, t], [5, 0, 25], [t, f, t]),
    ]
    assert streams.have_reset.all()


def happenings(num_agents):
    """Scripts at whose end everybody has left."""
    names = "abcd"[:num_agents]
    one = st.dictionaries(st.sampled_from(names), st.sampled_from([LEAVES, CUT, VANISHES, COMES]))
    return st.lists(one, max_size=6).map(lambda steps: (*steps, dict.fromkeys(names, CUT)))


@st.composite
def scripts(draw):
    """A ParallelEnv's script that is possible: who comes is not there, and who leaves is."""
    num_agents = draw(st.integers(1, 4))
    names = "abcd"[:num_agents]
    start = draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
    present, script = set(start), []
    for wanted in draw(happenings(num_agents)):
        happens = {agent: what for agent, what in wanted.items() if (what == COMES) != (agent in present)}
        script.append(happens)
        present = {a for a in names if (a in present and a not in happens) or happens.get(a) == COMES}
        if not present:
            break
    return functools.partial(Scripted, *script, agents=names, start=sorted(start))


def by_hand(make, num_steps):
    """For each step: who acts, rewards, terminated, truncated, what was seen after it and before any reset, what next.

    A loop over one ParallelEnv. Nothing is seen where an agent is not there.
    """
    env = make()
    env.reset()  # in the constructor of a JointEnv
    seen, _ = env.reset()
    agents, rows = env.possible_agents, []
    for _ in range(num_steps):
        acts = list(env.agents)
        seen, rewards, _, truncated, _ = env.step(dict.fromkeys(acts, 0))
        row = {"active": [agent in acts for agent in agents], "rewards": [], "terminated": [], "truncated": []}
        for agent in agents:
            left = agent in acts and agent not in env.agents
            row["rewards"].append(rewards.get(agent, 0.0) if agent in acts else 0.0)
            row["truncated"].append(agent in acts and truncated.get(agent, False))
            row["terminated"].append(left and not truncated.get(agent, False))
        row["final"] = [seen.get(agent) if agent in acts else None for agent in agents]
        if not env.agents:
            seen, _ = env.reset()
        row["next"] = [seen[agent] if agent in env.agents else None for agent in agents]
        rows.append(row)
    return rows


@settings(max_examples=60, deadline=None)
@given(st.data(), scripts())
def test_streams_are_what_a_loop_over_the_worlds_gives(data, make):
    others = [functools.partial(make.func, *data.draw(happenings(len(make.keywords["agents"]))), **make.keywords)]
    others = [kind for kind in others if _is_possible(kind)]
    makers, num_steps = [make, *others], 12
    streams = worlds(*makers)
    streams.reset(seed=0)
    expected = [by_hand(maker, num_steps) for maker in makers]
    for rows in zip(*expected):
        acted = active_of(streams)
        step = streams.step(np.zeros(streams.num_streams, int))
        want = {name: [of_stream for row in rows for of_stream in row[name]] for name in rows[0]}
        assert acted == want["active"]
        assert (acted if step.active is None else step.active.tolist()) == want["active"]
        for name in ("rewards", "terminated", "truncated"):
            assert getattr(step, name).tolist() == want[name], name
        for stream, (final, seen) in enumerate(zip(want["final"], want["next"])):
            if want["truncated"][stream]:
                assert step.final_observations[stream].tolist() == final.tolist()
            assert active_of(streams)[stream] == (seen is not None)
            if seen is not None:
                assert step.observations[stream].tolist() == seen.tolist()


def _is_possible(make):
    present = set(make.keywords["start"])
    for happens in make.args:
        if any((what == COMES) == (agent in present) for agent, what in happens.items()):
            return False
        present = {agent for agent in present if agent not in happens} | {a for a, w in happens.items() if w == COMES}
    return not present


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_final_observations_survive_environments_that_reuse_their_arrays(vectorization):
    make = functools.partial(Scripted, {"b": CUT}, dict.fromkeys("ac", CUT), reuses=True)
    with closing(make_streams(make, 2, vectorization=vectorization)) as streams:
        assert streams.reset(seed=0).tolist() == [[0, 0, 1], [1, 0, 1], [2, 0, 1]] * 2
        step = streams.step(np.zeros(6, int))
        assert step.final_observations.tolist() == [[0, 1, 1], [1, 1, 1], [2, 1, 1]] * 2
        step = streams.step(np.zeros(6, int))
        assert step.final_observations[[0, 2]].tolist() == [[0, 2, 1], [2, 2, 1]]
        assert step.observations.tolist() == [[0, 0, 2], [1, 0, 2], [2, 0, 2]] * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"agents": property(lambda self: "az", lambda *_: None), "see": lambda *_: np.zeros(3)}, "possible_agents"),
        ({"agents": property(lambda self: "", lambda *_: None)}, "after reset"),
        ({"see": lambda self, agent: None}, "agent 'a'"),
        ({"see": lambda self, agent: np.zeros(2, np.float32)}, "agent 'a'"),
    ],
)
def test_worlds_that_break_the_rules_are_named(change, message):
    kind = type("Broken", (Scripted,), change)
    env = JointEnv(kind({}, {}))
    with pytest.raises(ValueError, match=message):
        env.reset(seed=0)


# Masks.


class Masked(Scripted):
    """Each agent may choose only the number of steps, modulo 3; at its end nothing. Other choices are an error."""

    def __init__(self, *script, place="observation", **kwargs):
        super().__init__(*script, **kwargs)
        self.place = place

    def observation_space(self, agent):
        own = super().observation_space(agent)
        return (
            spaces.Dict(observation=own, action_mask=spaces.Box(0, 1, (3,), np.int8)) if self.place != "info" else own
        )

    def see(self, agent):
        return super().see(agent) * np.float32([1, 1, 0])  # nothing beyond the episode

    def mask(self, agent):
        return (np.arange(3) == self.t % 3).astype(np.int8) * (agent in self.agents)

    def told(self, seen, infos):
        if self.place == "info":
            return seen, {agent: infos.get(agent, {}) | {"action_mask": self.mask(agent)} for agent in seen}
        return {agent: {"observation": own, "action_mask": self.mask(agent)} for agent, own in seen.items()}, infos

    def reset(self, seed=None, options=None):
        return self.told(*super().reset())

    def step(self, actions):
        if wrong := [agent for agent, action in actions.items() if not self.mask(agent)[action]]:
            raise RuntimeError(f"illegal actions of {wrong}")
        seen, rewards, terminated, truncated, infos = super().step(actions)
        seen, infos = self.told(seen, infos)
        return seen, rewards, terminated, truncated, infos


@pytest.mark.parametrize("place", ["observation", "info"])
def test_masks_come_in_observations_or_infos(place):
    script = ({}, {"b": CUT}, {}, dict.fromkeys("ac", CUT))
    streams = worlds(lambda: Masked(*script, place=place))
    assert streams.observation_space["action_mask"].shape == (3,)
    assert streams.resumable is None  # the trial's random actions were legal
    seen = streams.reset(seed=0)
    assert seen["action_mask"].tolist() == [[1, 0, 0]] * 3
    step = streams.step(np.array([0, 0, 0]))
    assert step.observations["action_mask"].tolist() == [[0, 1, 0]] * 3
    step = streams.step(np.array([1, 1, 1]))
    assert step.final_observations["action_mask"].tolist() == [[0, 0, 1], [0, 0, 0], [0, 0, 1]]
    # Whoever is not there may choose anything.
    assert step.observations["action_mask"].tolist() == [[0, 0, 1], [1, 1, 1], [0, 0, 1]]
    step = streams.step(np.array([2, 1, 2]))
    assert step.observations["action_mask"].tolist() == [[1, 0, 0], [1, 1, 1], [1, 0, 0]]
    assert step.observations["observation"][[0, 2]].tolist() == [[0, 3, 0], [2, 3, 0]]
    with pytest.raises(EnvironmentFailed, match=r"illegal actions of \['c'\]"):
        streams.step(np.array([0, 2, 1]))


# Agents with different spaces.


class Different(Scripted):
    """Agent n sees n + 1 numbers, the step, and has n + 2 actions, counted from n; filler of `b` must be at least 5."""

    def observation_space(self, agent):
        number = self.possible_agents.index(agent)
        return spaces.Box(5.0 if agent == "b" else -9.0, 99.0, (number + 1,), np.float32)

    def action_space(self, agent):
        number = self.possible_agents.index(agent)
        return spaces.Discrete(number + 2, start=number)

    def see(self, agent):
        number = self.possible_agents.index(agent)
        return np.full(number + 1, self.t + 10 * (agent == "b"), np.float32)


def test_agents_with_different_spaces_come_by_agent():
    streams = worlds(lambda: Different({"b": LEAVES}, {}, dict.fromkeys("ac", CUT)), lambda: Different({}, {}, {}, {}))
    assert [space.shape for space, _ in streams.spaces_by_agent] == [(1,), (2,), (3,)]
    assert streams.observation_space == streams.spaces_by_agent[0][0]
    assert streams.action_space == spaces.Discrete(2)
    seen = streams.reset(seed=0)
    assert type(seen) is ByAgent
    assert [own.tolist() for own in seen] == [[[0]] * 2, [[10, 10]] * 2, [[0, 0, 0]] * 2]
    step = streams.step(ByAgent([np.array([0, 1]), np.array([3, 2]), np.array([5, 4])]))
    assert [env.env.env.taken[0] for env in streams._worlds.envs.envs] == [
        {"a": 0, "b": 3, "c": 5},
        {"a": 1, "b": 2, "c": 4},
    ]
    assert type(step.final_observations) is ByAgent
    assert step.terminated.tolist() == [False, True, False, False, False, False]
    step = streams.step(ByAgent([np.array([0, 1]), np.array([3, 2]), np.array([5, 4])]))
    assert step.observations[1].tolist() == [[5, 5], [12, 12]]  # filler that is in the space
    assert step.rewards.tolist() == [2, 0, 22, 2, 12, 22]
    assert streams.spaces_by_agent[1][0].contains(step.observations[1][0])


# Going on.


class Random(Scripted):
    """Agents that leave, come and see at random, from a generator that reset(seed) seeds."""

    def __init__(self, *, num_actions=3, **kwargs):
        super().__init__(**kwargs)
        self.num_actions = num_actions

    def action_space(self, agent):
        return spaces.Discrete(self.num_actions + self.possible_agents.index(agent) * (self.num_actions == 2))

    def reset(self, seed=None, options=None):
        self.generator, self.episodes = np.random.default_rng(seed), 0
        return super().reset()

    def see(self, agent):
        return self.generator.normal(size=3).astype(np.float32)

    def step(self, actions):
        what = [LEAVES, CUT, VANISHES, LINGERS, None, None, None, None]
        drawn = {agent: what[self.generator.integers(8)] for agent in self.agents}
        self.script = {self.t: {agent: happens for agent, happens in drawn.items() if happens}}
        lingering = [agent for agent in self.agents if drawn[agent] != VANISHES]
        step = super().step(actions)
        assert set(step[0]) == set(lingering)
        return step


def watched(streams, num_steps, seed):
    """Everything that the streams tell in some steps."""
    generator, told = np.random.default_rng(seed), []
    for _ in range(num_steps):
        step = copy.deepcopy(streams.step(chosen(streams, generator)))
        told.append((step, active_of(streams), streams.have_reset.tolist()))
    return told


def assert_same(ours, theirs):
    for (step, *flags), (other, *others) in zip(ours, theirs, strict=True):
        assert flags == others
        np.testing.assert_equal(step._asdict(), other._asdict())


@pytest.mark.parametrize("num_actions", [3, 2])  # 2: agents have different spaces
@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_streams_go_on_to_the_bit(num_actions, vectorization):
    make = functools.partial(Random, num_actions=num_actions)
    with (
        closing(make_streams(make, 3, vectorization=vectorization)) as streams,
        closing(make_streams(make, 3, vectorization=vectorization)) as resumed,
    ):
        assert streams.resumable is None
        streams.reset(seed=4)
        watched(streams, 23, seed=0)
        seen = streams.step(chosen(streams, np.random.default_rng(1))).observations
        assert streams.active is not None  # somebody waits
        restored = resumed.restore(*streams.state())
        np.testing.assert_equal(restored, seen)
        assert active_of(resumed) == active_of(streams)
        assert_same(watched(streams, 40, seed=2), watched(resumed, 40, seed=2))


def test_processes_give_what_this_process_gives():
    make = functools.partial(Random, agents="abcd")
    with closing(make_streams(make, 2)) as here, closing(make_streams(make, 2, vectorization="async")) as there:
        np.testing.assert_array_equal(here.reset(seed=3), there.reset(seed=3))
        assert_same(watched(here, 60, seed=0), watched(there, 60, seed=0))


def test_worlds_differ_and_episodes_differ():
    streams = make_streams(Random, 2)
    first = streams.reset(seed=0).copy()
    assert len(np.unique(first[:, 0])) == 6
    starts = [first[:3]]
    while len(starts) < 4:
        step = streams.step(np.zeros(6, int))
        if streams.have_reset[0]:
            starts.append(step.observations[:3].copy())
    assert len(np.unique(np.concatenate(starts)[:, 0])) == 12


# Norms.


class Foragers(Scripted):
    """Says of each step what its agents' infos are told to say."""

    metadata = {"name": "foragers", "resources": ["wood", "fish"]}  # noqa: RUF012
    infos = ()

    def step(self, actions):
        return *super().step(actions)[:4], dict(zip(self.agents, self.infos))


@pytest.mark.parametrize(
    ("info", "punished", "collected"),
    [
        ({}, [0, 0], [0, 0]),
        ({"collected": None, "punished": False}, [0, 0], [0, 0]),
        ({"collected": "fish", "punished": True}, [0, 1], [0, 1]),
        ({"collected": "fish", "punished": np.False_}, [0, 0], [0, 1]),
        ({"collected": ["wood", "fish"], "punished": "wood"}, [1, 0], [1, 1]),
        ({"collected": [], "punished": ["fish"]}, [0, 1], [0, 0]),
        ({"collected": np.array([True, False]), "punished": np.array([0, 1])}, [0, 1], [1, 0]),
    ],
)
def test_events_come_in_infos(info, punished, collected):
    make = type("Told", (Foragers,), {"infos": ({}, info, {})})
    streams = worlds(lambda: make({"c": LEAVES}, {}, {}))
    assert streams.resources == ("wood", "fish")
    streams.reset(seed=0)
    for _ in range(2):
        events = streams.step(np.zeros(3, int)).events
        assert events.punished.tolist() == [[False] * 2, punished, [False] * 2]
        assert events.collected.tolist() == [[False] * 2, collected, [False] * 2]


@pytest.mark.parametrize(
    "info",
    [{"punished": True}, {"collected": "gold"}, {"collected": np.ones(3)}, {"punished": 7}, {"punished": [0.5, 0]}],
)
def test_impossible_events_are_refused(info):
    make = type("Told", (Foragers,), {"infos": ({}, info, {})})
    streams = worlds(lambda: make({}, {}))
    streams.reset(seed=0)
    with pytest.raises(EnvironmentFailed, match=r"punished|collected"):
        streams.step(np.zeros(3, int))


def test_with_one_resource_punished_needs_no_name():
    make = type("Told", (Foragers,), {"metadata": {}, "resources": ("wood",), "infos": ({"punished": True}, {}, {})})
    streams = worlds(lambda: make({}, {}))
    streams.reset(seed=0)
    assert streams.step(np.zeros(3, int)).events.punished.tolist() == [[True], [False], [False]]


@pytest.mark.parametrize("coding", ["pair", "composite"])
def test_the_commons_as_a_parallel_env_is_the_commons(coding):
    rules = CommonsConfig(num_agents=3, epoch_turns=15, coding=coding, respawn_probability=0.3, initial_level=9)
    streams = make_streams(lambda: parallel_env(rules), 1)
    assert streams.resources == rules.resources
    assert streams.agent_names == ("agent_0", "agent_1", "agent_2")
    seen = streams.reset(seed=7)
    (of_world,) = np.random.SeedSequence(7).generate_state(1) >> 1
    seeds, _ = gym.utils.seeding.np_random(int(of_world))
    streams.action_space.seed(0)
    num_punished = 0
    for _ in range(3):
        commons = Commons(rules)
        expected = commons.reset(seed=int(seeds.integers(2**31)))
        for turn in range(15):
            for name, part in expected.items():
                np.testing.assert_array_equal(seen[name], part)
            actions = [streams.action_space.sample() for _ in range(3)]
            if coding == "pair":
                actions = {head: np.array([action[head] for action in actions]) for head in ("move", "vote")}
            step, want = streams.step(np.array(actions) if coding != "pair" else actions), commons.step(actions)
            assert step.rewards.tolist() == want.rewards.tolist()
            assert step.truncated.tolist() == want.truncated.tolist() == [turn == 14] * 3
            np.testing.assert_array_equal(step.events.punished, want.events.punished)
            np.testing.assert_array_equal(step.events.collected, want.events.collected)
            num_punished += int(want.events.punished.sum())
            seen, expected = step.observations, want.observations
        for name, part in want.final_observations.items():
            np.testing.assert_array_equal(step.final_observations[name], part)
    assert num_punished


# Which environment.


class Told(Scripted):
    """Also sees a reward that is none of a policy's business."""

    def observation_space(self, agent):
        return spaces.Dict(own=super().observation_space(agent), COLLECTIVE_REWARD=spaces.Box(-9, 9, (), np.float64))

    def see(self, agent):
        return {"own": super().see(agent), "COLLECTIVE_REWARD": np.float64(self.t)}


def test_keys_of_observations_are_dropped():
    make = functools.partial(Told, {}, {})
    streams = ParallelStreams(
        GymnasiumStreams(LeanSyncVectorEnv([lambda: make_env(make, drop_observations=["COLLECTIVE_REWARD"])]))
    )
    assert list(streams.observation_space) == ["own"]
    assert streams.reset(seed=0).keys() == {"own"}
    assert streams.step(np.zeros(3, int)).observations["own"].tolist() == [[0, 1, 1], [1, 1, 1], [2, 1, 1]]
    with pytest.raises(UnavailableEnvironment, match="COLLECTIVE_REWARD, own, got reward"):
        make_env(make, drop_observations=["reward"])


class Uncopyable(Scripted):
    def __deepcopy__(self, memo):
        raise RuntimeError("it holds a window")


def test_an_object_is_copied_for_each_world():
    env = Scripted({}, dict.fromkeys("abc", CUT))
    streams = make_streams(env, 2)
    streams.reset(seed=0)
    streams.step(np.zeros(6, int))
    assert env.episodes == -1
    with pytest.raises(TypeError, match=r"Uncopyable cannot be copied.*it holds a window"):
        make_streams(Uncopyable({}), 1)
    with pytest.raises(TypeError, match="env_args"):
        make_env(env, {"size": 3})


@pytest.mark.filterwarnings("ignore:The old environment creation API")  # PettingZoo's own
def test_agents_that_act_at_the_same_time_may_be_written_as_turns():
    from pettingzoo.classic import rps_v2, tictactoe_v3

    streams = make_streams(rps_v2.env, 2, num_actions=3, max_cycles=2)
    assert streams.agent_names == ("player_0", "player_1")
    streams.reset(seed=0)
    assert streams.step(np.array([0, 1, 2, 2])).rewards.tolist() == [-1, 1, 0, 0]  # paper covers rock
    assert streams.step(np.array([0, 1, 2, 2])).truncated.all()
    with pytest.raises(UnavailableEnvironment, match="turns"):
        make_streams(tictactoe_v3.env, 1)


# Runs.

MODULE = """
from pathlib import Path

import numpy as np
from pettingzoo.utils import BaseParallelWrapper
from test_pettingzoo_worlds import Random

Path("it-ran").touch()


class Walkers(Random):
    metadata = {"render_modes": ["rgb_array"]}

    def __init__(self, render_mode=None, **kwargs):
        super().__init__(**kwargs)
        self.render_mode = render_mode

    def render(self):
        return np.full((8, 8, 3), self.t, np.uint8)


class Loud(BaseParallelWrapper):
    def step(self, actions):
        observations, rewards, *rest = self.env.step(actions)
        return observations, {agent: 1000.0 for agent in rewards}, *rest


def parallel_env(**kwargs):
    return Walkers(**kwargs)
"""
QUICK = {
    "num_envs": 4,
    "ppo": PPOConfig(rollout_length=10, batch_size=20, num_epochs=1),
    "network": NetworkConfig(hidden_size=8, encoder_sizes=(8,)),
    "checkpoint_every": 200,
    "eval_episodes": 6,
    "show_progress": False,
}


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The name of a module in the working directory that makes worlds of three agents."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "own_walkers.py").write_text(MODULE)
    yield "own_walkers"
    sys.modules.pop("own_walkers", None)
    named_modules.discard("own_walkers")  # processes of other tests would import it


def weights(run):
    return read_tensors(checkpoints(run)[0])[0]


@pytest.mark.parametrize("policies", ["shared", "independent"])
def test_a_run_by_id_trains_evaluates_and_resumes_to_the_bit(policies, module, tmp_path):
    how = QUICK | {"env": f"pettingzoo:{module}", "policies": policies, "env_args": {"agents": ["ann", "bob", "cat"]}}
    whole = dualhead.train(**how, total_steps=480, run_dir="whole").summary
    config = read_config(tmp_path / "whole")
    assert config.world == WorldConfig(num_agents=3)
    assert whole["metrics"]["rollout/active"] < 1
    dualhead.train(**how, total_steps=240, run_dir="parts")
    resumed = dualhead.resume("parts", total_steps=480, show_progress=False).summary
    assert resumed["metrics"]["episode/mean_return"] == whole["metrics"]["episode/mean_return"]
    for name, tensor in weights("whole").items():
        np.testing.assert_array_equal(tensor, weights("parts")[name], err_msg=name)
    played = dualhead.evaluate("whole", episodes=6)
    assert list(played.agents) == ["ann", "bob", "cat"]


def test_a_world_is_filmed_to_its_end(module):
    """The picture is the number of the step: that of the next episode is 0 again."""
    dualhead.train(f"pettingzoo:{module}", **QUICK | {"eval_episodes": 0}, total_steps=120, run_dir="run")
    levels = [int(frame.mean().round()) for frame in imageio.imiter(record_video("run", "film.gif"))]
    assert levels == list(range(len(levels)))
    assert len(levels) > 1


def test_different_agents_need_independent_policies(module):
    how = QUICK | {"env": f"pettingzoo:{module}", "env_args": {"num_actions": 2}, "total_steps": 240}
    with pytest.raises(RunError, match="--policies independent"):
        dualhead.train(**how)
    assert dualhead.train(**how, policies="independent").summary["steps"] == 240


def test_a_class_by_name_and_a_wrapper_of_pettingzoo(module):
    how = QUICK | {"env_args": {"agents": ["a", "b"]}, "wrappers": (f"{module}:Loud",), "eval_episodes": 0}
    summary = dualhead.train(f"{module}:Walkers", **how, total_steps=160, run_dir="run").summary
    assert read_config("run").world.num_agents == 2
    assert summary["metrics"]["episode/mean_return"] > 1000 * (summary["metrics"]["episode/mean_length"] - 1)
    with pytest.raises(UnavailableEnvironment, match="ParallelEnv"):
        dualhead.train(f"{module}:Walkers", **how | {"wrappers": ("builtins:id",)})


def test_a_callable_or_an_object_is_trained(tmp_path):
    for number, env in enumerate([Random, functools.partial(Random, agents="ab"), Random(agents="ab")]):
        run_dir = str(tmp_path / str(number))
        num_agents = 3 if env is Random else 2
        result = dualhead.train(env, **QUICK, total_steps=80 * num_agents, run_dir=run_dir)
        assert read_config(run_dir).world.num_agents == num_agents
        assert list(dualhead.evaluate(run_dir, env=env).agents) == ["a", "b", "c"][:num_agents]
        assert result.agent.num_steps == 80 * num_agents
        with pytest.raises(RunError, match="handed over in Python"):
            dualhead.evaluate(run_dir)
        dualhead.resume(run_dir, env=env, total_steps=160 * num_agents, show_progress=False)


def test_a_run_of_a_stranger_imports_no_world(module, tmp_path, capsys):
    dualhead.train(f"pettingzoo:{module}", **QUICK, total_steps=120, run_dir="run")
    (tmp_path / "run").rename("strange")
    del sys.modules[module]
    named_modules.discard(module)
    (tmp_path / "it-ran").unlink()
    for command in (["eval", "strange"], ["resume", "strange", "--total-steps", "1000"]):
        assert main(command) == 1
        assert f"--import {module}, or --trust" in capsys.readouterr().err
    assert not Path("it-ran").exists()
    assert module not in sys.modules
    assert main(["eval", "strange", "--episodes", "3", "--import", module]) == 0
    assert main(["eval", "strange", "--episodes", "3", "--trust"]) == 0
    assert "team" in capsys.readouterr().out


def test_norms_and_turnover_need_only_the_infos(tmp_path):
    env, rules = "pettingzoo:dualhead.worlds.commons.parallel", {"num_agents": 3, "epoch_turns": 10}
    turnover = TurnoverConfig(first_turn=10, num_agents=1)
    how = QUICK | {"env_args": rules, "enforce_norms": True, "turnover": turnover, "run_dir": str(tmp_path / "run")}
    result = dualhead.train(env, **how, total_steps=360)
    assert read_config(tmp_path / "run").world.resources == ("A", "B", "C", "D", "E")
    metrics = result.summary["metrics"]
    assert metrics["norms/strength/A"] > 0
    assert max(metrics[f"lineage/agent_{number}"] for number in range(3)) == 3  # a newcomer, after founders 0 to 2
    assert metrics["newcomers/taken/A"] + metrics["incumbents/taken/A"] > 0


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ("pettingzoo:no_such_zoo", "no_such_zoo"),
        ("pettingzoo:mpe2.no_such_world_v0", "mpe2"),
        ("pettingzoo:butterfly.no_such_world_v0", r"pettingzoo\[butterfly\]"),
        ("pettingzoo:json", "neither parallel_env nor env"),
    ],
)
def test_unknown_worlds(env, message):
    with pytest.raises((UnavailableEnvironment, RunError), match=message):
        dualhead.train(env, **QUICK)
