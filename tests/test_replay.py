"""Episodes in progress are played again to the same bits, or refused; their files are not trusted."""

import functools
import random
import re
from contextlib import closing
from itertools import count

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.vector.utils import batch_space
from gymnasium.wrappers import FrameStackObservation, NormalizeObservation, TimeLimit
from hypothesis import given, settings
from hypothesis import strategies as st

import dualhead
from dualhead import NetworkConfig, PPOConfig
from dualhead.storage import CheckpointError, read_tensors, write_tensors
from dualhead.worlds import replay
from dualhead.worlds.replay import CannotReplay, as_actions
from dualhead.worlds.replay_trial import why_not_replayed
from dualhead.worlds.streams import GymnasiumStreams, make_streams, restart
from dualhead.worlds.suites import missing, suite_of

# Environments.


class Walk(gym.Env):
    """A random walk pushed by every part of the actions; episodes of `length` steps."""

    observation_space = spaces.Box(-np.inf, np.inf, (1,), np.float64)
    ends_by_itself = True

    def __init__(self, action_space=None, *, length=10):
        self.action_space, self.length = action_space or spaces.Discrete(2), length

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.begin(seed)
        self.time, self.place = 0, self.noise()
        return self._see(), {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.time += 1
        push = spaces.flatten(self.action_space, action)
        self.place = 0.9 * self.place + self.noise() + float(push @ np.arange(1, len(push) + 1))
        return self._see(), self.place, self.ends_by_itself and self.time == self.length, False, {}

    def begin(self, seed):
        pass

    def noise(self):
        return self.np_random.normal()

    def _see(self):
        return np.array([self.place])


def walk(*, kind=Walk, **methods):
    return type("Variant", (kind,), methods)


def fails(env, action):
    raise OSError("the simulator has gone")


# What no copy could take apart: a running Python generator.
HoldsGenerator = walk(begin=lambda env, _: setattr(env, "numbers", count()), noise=lambda env: float(next(env.numbers)))
SamplesItsSpaces = walk(noise=lambda env: float(env.observation_space.sample()[0]) + float(env.action_space.sample()))
CountsEpisodes = walk(
    episodes=0,
    begin=lambda env, _: setattr(env, "episodes", env.episodes + 1),
    noise=lambda env: float(env.episodes),
)
OwnGenerator = walk(
    begin=lambda env, seed: None if seed is None else setattr(env, "own", np.random.default_rng(seed)),
    noise=lambda env: env.own.normal(),
)
# In a package that is known for a generator that cannot be read and that `reset(seed=...)` seeds.
LikeAtari = walk(kind=OwnGenerator, __module__="ale_py.env")
GlobalGenerators = walk(noise=lambda env: random.random() + np.random.random())  # noqa: NPY002
OtherBits = walk(begin=lambda env, _: setattr(env, "np_random", np.random.Generator(np.random.MT19937(1))))


class Masked(Walk):
    """Asserts that each action is the one that its mask allows."""

    observation_space = spaces.Dict(seen=Walk.observation_space, action_mask=spaces.MultiBinary(4))

    def __init__(self):
        super().__init__(spaces.Discrete(4), length=15)

    def step(self, action):
        assert action == self.legal
        return super().step(action)

    def _see(self):
        self.legal = self.np_random.integers(4)
        return {"seen": super()._see(), "action_mask": np.eye(4, dtype=np.int8)[self.legal]}


class Nested(Walk):
    """Observations of several parts."""

    observation_space = spaces.Dict(
        place=Walk.observation_space, also=spaces.Tuple((spaces.Discrete(99), spaces.Box(-9, 9, (2,), np.float32)))
    )

    def _see(self):
        return {"also": (self.time, np.full(2, self.time / 7, np.float32)), "place": super()._see()}


# Going on.


def bits(value):
    if isinstance(value, dict):
        return {key: bits(part) for key, part in value.items()}
    if isinstance(value, tuple):
        return tuple(map(bits, value))
    return None if value is None else (np.asarray(value).dtype.str, np.shape(value), np.asarray(value).tobytes())


def watch(streams, num_steps, seed):
    """Everything seen in so many random steps."""
    sampled = batch_space(streams.action_space, streams.num_streams)
    sampled.seed(seed)
    return [bits(tuple(streams.step(sampled.sample()))) for _ in range(num_steps)]


def begun(env, num_envs=2, *, num_steps=14):
    """Streams that have done some random steps."""
    streams = make_streams(env, num_envs)
    streams.reset(seed=0)
    watch(streams, num_steps, seed=1)
    return streams


def assert_goes_on(make, tmp_path, *, num_before=37, num_after=60):
    """Saved after some steps, through a file, streams made afresh give what the first ones give."""
    with closing(make()) as streams, closing(make()) as resumed:
        assert streams.resumable is None
        streams.reset(seed=3)
        watch(streams, num_before, seed=1)
        saved = streams.state()
        write_tensors(tmp_path / "state", *saved)
        resumed.reset(seed=11)
        watch(resumed, 5, seed=1)  # what was done before does not matter
        going_on = resumed.restore(*read_tensors(tmp_path / "state"))
        assert bits(going_on) == bits(streams._observations)
        tensors, metadata = resumed.state()
        assert metadata == saved[1]
        assert all(tensors[name].equal(saved[0][name]) for name in saved[0])
        assert watch(resumed, num_after, seed=2) == watch(streams, num_after, seed=2)


ENVS = [
    *("CartPole-v1", "Pendulum-v1", "MountainCar-v0", "MountainCarContinuous-v0", "Acrobot-v1", "FrozenLake-v1"),
    *("CliffWalking-v1", "Taxi-v4", "Blackjack-v1", "dualhead/CartPoleNoVel-v1", "dualhead/PendulumNoVel-v1"),
    *(
        "dualhead/MountainCarContinuousNoVel-v0",
        "dualhead/RecallCue-v0",
        "popgym-RepeatPreviousEasy-v0",
        "popgym-RepeatFirstMedium-v0",
    ),
    *("popgym-AutoencodeEasy-v0", "popgym-MineSweeperEasy-v0", "popgym-BattleshipEasy-v0"),
    *("popgym-CountRecallEasy-v0", "popgym-ConcentrationEasy-v0", "popgym-HigherLowerEasy-v0"),
    *("popgym-MultiarmedBanditEasy-v0", "popgym-NoisyPositionOnlyPendulumEasy-v0", "MiniGrid-DoorKey-5x5-v0"),
    *("MiniGrid-MemoryS7-v0", "MiniGrid-FourRooms-v0", "MiniGrid-Dynamic-Obstacles-6x6-v0"),
]
UNUSUAL = {
    "draws from its spaces": SamplesItsSpaces,
    "a running Python generator": HoldsGenerator,
    "seeded each episode": LikeAtari,
    "wrapped": lambda: FrameStackObservation(TimeLimit(Walk(), 7), 3),
}


@pytest.mark.parametrize("env", [*ENVS, *UNUSUAL])
def test_environments_go_on(env, tmp_path):
    assert_goes_on(lambda: make_streams(UNUSUAL.get(env, env), 2), tmp_path)


IN_C = ["LunarLander-v3", "InvertedPendulum-v5", "Hopper-v5", "ALE/Pong-v5", "dm_control/cartpole-swingup-v0"]


@pytest.mark.parametrize("name", IN_C)
@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_environments_in_c_go_on(name, vectorization, tmp_path):
    suite = suite_of(name)
    if lacks := missing(suite):
        pytest.skip(f"{suite} {lacks}")
    assert_goes_on(lambda: make_streams(name, 2, vectorization=vectorization), tmp_path, num_before=300)


ACTION_SPACES = [
    spaces.Discrete(300, start=-7),
    spaces.MultiDiscrete([3, 4], start=[2, 0]),
    spaces.MultiBinary(3),
    spaces.Box(-2, 2, (2, 2), np.float32),
    spaces.Box(-2, 2, (3,), np.float64),
    spaces.Dict(what=spaces.Discrete(3), go=spaces.Dict(b=spaces.Discrete(2), a=spaces.Box(0, 1, (2,)))),
    spaces.Tuple((spaces.Discrete(2), spaces.MultiDiscrete([[3, 2]], start=[[-1, 4]]), spaces.Box(0, 1, (2,)))),
]


@pytest.mark.parametrize("action_space", ACTION_SPACES, ids=lambda space: type(space).__name__)
@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_actions_and_observations_of_every_kind_go_on(action_space, vectorization, tmp_path):
    kind = Nested if isinstance(action_space, spaces.Dict) else Walk
    make = lambda: make_streams(lambda: kind(action_space, length=23), 2, vectorization=vectorization)  # noqa: E731
    assert_goes_on(make, tmp_path)


@pytest.mark.parametrize("num_before", [0, 10, 13])
def test_the_first_episode_and_the_first_step_go_on(num_before, tmp_path):
    def make():
        return GymnasiumStreams(SyncVectorEnv([Walk] * 2, autoreset_mode=AutoresetMode.SAME_STEP))

    assert_goes_on(make, tmp_path, num_before=num_before)  # and those of Gymnasium's vector environment


@pytest.mark.parametrize(("kind", "vectorization"), [(SamplesItsSpaces, "sync"), (GlobalGenerators, "async")])
def test_a_seed_is_for_spaces_and_for_the_generators_of_a_process(kind, vectorization):
    """A process that another one starts is seeded by the system."""
    with closing(make_streams(kind, 2, vectorization=vectorization)) as streams:
        first, again, other = ((bits(streams.reset(seed=seed)), watch(streams, 15, seed=1)) for seed in (0, 0, 1))
    assert first == again != other


def test_global_generators_go_on():
    streams = begun(Walk, 1)
    random.gauss(0, 1)
    np.random.standard_normal()  # noqa: NPY002  (each keeps the second of a pair)
    saved = streams.state()
    expected = random.gauss(0, 1), random.random(), *np.random.standard_normal(3)  # noqa: NPY002
    make_streams(Walk, 1).restore(*saved)
    assert (random.gauss(0, 1), random.random(), *np.random.standard_normal(3)) == expected  # noqa: NPY002


def test_a_restart_is_no_repetition():
    streams = make_streams("CartPole-v1", 2)
    first = bits(streams.reset(seed=0))
    again = [bits(restart(streams, seed=s, num_steps=n)) for s, n in ((0, 64), (0, 128), (1, 64), (0, 64))]
    assert again[0] == again[3]
    assert len({str(observations) for observations in (first, *again)}) == 4


# Not going on.

BEYOND = "keeps state beyond an episode, or draws from other generators"


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Masked, "None"),  # it is tried by legal actions
        (CountsEpisodes, BEYOND),
        # These differ only after a reset, which 300 steps would not bring about by themselves.
        (walk(kind=CountsEpisodes, ends_by_itself=False, noise=lambda env: float(env.episodes > 3)), BEYOND),
        (
            walk(
                kind=CountsEpisodes,
                ends_by_itself=False,
                noise=lambda env: 0.0 * env.np_random.random(max(0, env.episodes - 3)).sum(),
            ),
            "left a generator in another state",
        ),
        (OwnGenerator, BEYOND),
        (GlobalGenerators, BEYOND),
        (lambda: NormalizeObservation(Walk()), BEYOND),
        (OtherBits, "its generator is a MT19937"),
        (walk(step=fails), "trying it raised OSError: the simulator has gone"),
        (lambda: Walk(spaces.Text(5)), "actions of Text.* cannot be saved"),
    ],
)
def test_environments_that_would_not_go_on_are_found_out(make, reason):
    before = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    assert re.search(reason, str(why_not_replayed(lambda: TimeLimit(make(), 500))))
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before  # noqa: NPY002


def test_the_trial_stops_in_time():
    steps = []
    slow = walk(step=lambda env, action: steps.append(1) or Walk.step(env, action))
    assert why_not_replayed(slow, min_steps=5, max_steps=1000, seconds=0.0) is None
    assert len(steps) == 7 + 2 * (5 + 1)


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_an_episode_that_leads_elsewhere_is_refused_and_new_ones_can_begin(vectorization):
    """Whoever did not listen to `resumable`."""
    make = functools.partial(make_streams, CountsEpisodes, 2, vectorization=vectorization)
    with closing(make()) as streams, closing(make()) as resumed:
        assert BEYOND in streams.resumable
        streams.reset(seed=0)
        watch(streams, 24, seed=1)
        with pytest.raises(CannotReplay, match="environment 0: its last observation or a generator differed after 4"):
            resumed.restore(*streams.state())
        assert restart(resumed, seed=0, num_steps=28).shape == (2, 1)
        assert len(watch(resumed, 12, seed=1)) == 12


class Drifts(Walk):
    """As Box2D's world does: something small outlives an episode, and is not seen for hundreds of steps."""

    life = 0

    def noise(self):
        self.life += 1
        return super().noise() + (1e-12 if self.life > 400 else 0)


def test_what_the_trial_cannot_find_is_found_at_resume(tmp_path):
    assert why_not_replayed(Drifts) is None
    settings = {
        "num_envs": 2,
        "total_steps": 1200,
        "eval_episodes": 0,
        "run_dir": str(tmp_path / "run"),
        "network": NetworkConfig(hidden_size=4, encoder_sizes=(4,)),
        "ppo": PPOConfig(rollout_length=100, batch_size=200, num_epochs=1),
    }
    make = lambda: Drifts(length=50)  # noqa: E731
    dualhead.train(make, **settings, show_progress=False, on_update=lambda session, _: session.learner.num_steps >= 900)
    with pytest.warns(UserWarning, match="episodes of lambda begin again.*: environment 0: its last observation"):
        result = dualhead.resume(tmp_path / "run", env=make, show_progress=False)
    assert result.summary["steps"] == 1200


def test_bipedal_walker_is_found_out():
    """Box2D's world outlives its episodes there."""
    pytest.importorskip("Box2D")
    assert BEYOND in str(why_not_replayed(lambda: gym.make("BipedalWalker-v3")))


def test_an_environment_that_ends_or_fails_while_it_is_played_again_is_refused():
    saved = begun(lambda: Walk(length=20), 1).state()
    with pytest.raises(CannotReplay, match="ended after 10 of 14 steps"):
        make_streams(Walk, 1).restore(*saved)
    with pytest.raises(CannotReplay, match="raised OSError"):
        make_streams(walk(step=fails), 1).restore(*saved)


def test_streams_that_have_no_state():
    with pytest.raises(RuntimeError, match="reset"):
        make_streams(Walk, 2).state()
    envs = SyncVectorEnv([Walk] * 2, autoreset_mode=AutoresetMode.SAME_STEP)
    streams = GymnasiumStreams(gym.wrappers.vector.RecordEpisodeStatistics(envs))
    streams.reset(seed=0)
    assert "RecordEpisodeStatistics cannot be reached" in streams.resumable
    with pytest.raises(CannotReplay, match="cannot be reached"):
        streams.state()


# The actions that are kept.


class Told(Walk):
    """Ends its episode when it is told to, and changes its action in place."""

    ends = False

    def step(self, action):
        seen = super().step(action)
        action[...] = 0
        return *seen[:2], self.ends, False, {}


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3), st.integers(5, 90), st.integers(0, 150), st.integers(1, 99), st.integers(0, 2**32))
def test_the_actions_of_each_episode_are_kept_and_no_more(num_envs, max_steps, num_steps, mean_length, seed):
    """Environments end at random; a list for each says what must come out."""
    rng = np.random.default_rng(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replay, "MAX_REPLAYED_STEPS", max_steps)
        streams = begun(lambda: Told(spaces.Box(-9, 9, (1,))), num_envs, num_steps=0)
        kept = [[] for _ in range(num_envs)]
        for _ in range(num_steps):
            actions = rng.normal(size=(num_envs, 1)).astype(np.float32)
            for env, recorder in enumerate(streams.envs.envs):
                recorder.unwrapped.ends = rng.integers(mean_length) == 0
                kept[env] = [] if recorder.unwrapped.ends else [*kept[env], actions[env, 0]]
            streams.step(actions)
        assert max(len(recorder.actions) for recorder in streams.envs.envs) <= 4 * (max_steps + 1)
        too_long = [env for env in range(num_envs) if len(kept[env]) > max_steps]
        if too_long:
            with pytest.raises(CannotReplay, match=f"environment {too_long[0]}: it is more than {max_steps} steps"):
                streams.state()
        else:
            tensors, metadata = streams.state()
            assert tensors["actions/0"].ravel().tolist() == [action for part in kept for action in part]
            assert [episode["num_steps"] for episode in metadata["episodes"]] == list(map(len, kept))


def test_actions_are_given_as_they_are_recorded():
    space = batch_space(spaces.Dict(a=spaces.Box(0, 1, (1,), np.float32), b=spaces.Discrete(3)), 2)
    given_as = as_actions(space, {"a": np.full((2, 1), 0.3), "b": [1, 2]})
    assert (given_as["a"].dtype, given_as["b"].dtype) == (np.float32, np.int64)
    with pytest.raises(TypeError):
        as_actions(space, {"a": np.zeros((2, 1)), "b": np.array([0.5, 1.0])})


def test_an_action_outside_its_space_is_not_saved():
    streams = begun("Pendulum-v1", 1)  # clips its actions
    streams.step(np.full((1, 1), 2.5))
    with pytest.raises(CannotReplay, match="environment 0: it got an action outside Box"):
        streams.state()


# A file is not trusted.


@pytest.fixture
def walking():
    return begun(lambda: Walk(spaces.Dict(box=spaces.Box(-1, 1, (2,), np.float32), n=spaces.Discrete(3))))


def edit(metadata, path, value):
    *path, last = (int(key) if key.isdigit() else key for key in path.split("."))
    for key in path:
        metadata = metadata[key]
    if value is ...:
        del metadata[last]
    else:
        metadata[last] = value


def put(tensor, value):
    tensor.view(-1)[0] = value
    return tensor


TAMPERED_METADATA = {  # where: values instead; `...` for none
    "episodes": [..., {"0": 1}],
    "episodes.1": [...],
    "episodes.0": [None],
    "episodes.0.root": [..., -1, 1.0, True],
    "episodes.0.number": [2**70],
    "episodes.0.num_steps": [3, 10**9],
    "episodes.0.fingerprint": ["x"],
    "episodes.0.module": ["os"],
    "episodes.0.generators.0": [[1]],
    "episodes.0.generators.0.bit_generator": ["os.system"],
    "episodes.0.generators.0.state.inc": [2],
    "episodes.0.generators.0.state.state": ["os"],
    "randomness": [...],
    "randomness.numpy": [...],
    "randomness.numpy.position": [10**6],
    "randomness.python": ["x"],
    "randomness.python.gauss": ["x"],
    "randomness.python.key.0": [..., 2**32],
    "randomness.python.position": [625],
}
TAMPERED_ACTIONS = {  # tensor: what is put in its place
    "actions/0": [
        lambda a: None,
        torch.Tensor.double,
        torch.Tensor.bfloat16,
        lambda a: a[:, :1],
        lambda a: put(a, float("nan")),
        lambda a: put(a, 1.5),
    ],
    "actions/1": [lambda a: a[:-1], lambda a: put(a, 3)],
    "actions/2": [lambda a: torch.zeros(3)],
}


@pytest.mark.parametrize(
    ("path", "value"),
    [(path, value) for table in (TAMPERED_METADATA, TAMPERED_ACTIONS) for path in table for value in table[path]],
)
def test_a_tampered_state_is_refused_before_anything_is_used(walking, path, value):
    tensors, metadata = walking.state()
    if path in TAMPERED_METADATA:
        edit(metadata, path, value)
    else:
        tensors[path] = value(tensors.get(path))
    saved = {name: tensor for name, tensor in tensors.items() if tensor is not None}, metadata
    before = bits(walking._observations), random.getstate()
    with pytest.raises(CheckpointError, match=r"checkpoint (holds no state of these environments|has no valid)"):
        walking.restore(*saved)
    assert (bits(walking._observations), random.getstate()) == before
    walking.step({"box": np.zeros((2, 2), np.float32), "n": np.zeros(2, int)})


@pytest.mark.parametrize(
    "changes",
    [{}, {"fingerprint": "0" * 64}, {"root": 1, "number": 0, "generators.0": ...}, {"generators": []}],
    ids=str,
)
def test_a_wrong_but_well_formed_state_leads_elsewhere(walking, changes):
    tensors, metadata = walking.state()
    if not changes:
        put(tensors["actions/1"], (int(tensors["actions/1"][0]) + 1) % 3)
    for path, value in changes.items():
        edit(metadata["episodes"][0], path, value)
    with pytest.raises(CannotReplay, match="environment 0"):
        walking.restore(tensors, metadata)


def test_the_state_of_other_environments_is_refused():
    saved = begun("CartPole-v1", num_steps=9).state()
    for env, num_envs, error, message in (
        ("CartPole-v1", 3, CheckpointError, "expected num_envs=3"),
        ("Pendulum-v1", 2, CheckpointError, "actions are"),
        ("Acrobot-v1", 2, CannotReplay, "environment 0"),
    ):
        with pytest.raises(error, match=message):
            make_streams(env, num_envs).restore(*saved)
