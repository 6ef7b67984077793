"""The agent from outside: order of calls, refusals that lose nothing, schedules, saving in the middle of anything."""

import copy
import os

import agents
import numpy as np
import pytest
import torch
from gymnasium import spaces
from safetensors.torch import save_file
from settings import act_in_heads

from dualhead import (
    CheckpointError,
    DataError,
    DualHeadRecurrentPPO,
    MemoryCell,
    NormConfig,
    NormEvents,
    RecurrentState,
)
from dualhead.storage import VERSION, read_tensors, write_tensors

B = 3
SPACE = spaces.Dict(x=spaces.Box(-np.inf, np.inf, (2,)), action_mask=spaces.MultiBinary(5))
HEADS = spaces.Dict(move=spaces.Discrete(3), vote=spaces.Discrete(2))
NORMS = NormConfig(resources=("A", "B"), internalization_threshold=1.0)
NOBODY = np.zeros(B, dtype=bool)
SMALL = {"rollout_length": 4, "sequence_length": 2, "batch_size": 4, "dtype": torch.float32}
EVERYTHING = {
    "norms": NORMS,
    "normalize_observations": True,
    "normalize_rewards": True,
    "burn_in": 3,
    "entropy_coef": 0.1,
    "entropy_coef_end": 0.0,
    "entropy_decay_steps": 5,
    "learning_rate": 0.01,
    "learning_rate_schedule": "linear",
    "learning_rate_decay_steps": 1000,
}


def make_agent(memory="gru", **given):
    return agents.make_agent(memory, **{"observation_space": SPACE, "action_space": HEADS} | SMALL | given)


def masked(x):
    return {"x": x, "action_mask": np.ones((len(x), 5), dtype=np.int8)}


class World:
    """Random observations, rewards and norm events; episodes end by chance, one in five steps each way."""

    def __init__(self, seed=0):
        self.rng = np.random.default_rng(seed)
        self.now = self.look()

    def look(self):
        mask = self.rng.random((B, 5)) < 0.5
        mask[:, [0, 4]] = True
        return {"x": self.rng.normal(3, 2, size=(B, 2)), "action_mask": mask.astype(np.int8)}

    def step(self, agent):
        """One step: the actions, as head indices."""
        actions = act_in_heads(agent, self.now).tolist()
        terminated, truncated = self.rng.random((2, B)) < 0.2
        final = self.look()
        punished, collected = self.rng.random((2, B, 2)) < 0.8
        events = None if agent.norms is None else NormEvents(punished, collected)
        self.now = self.look()
        agent.record(self.rng.normal(size=B), terminated, truncated, final_observations=final, events=events)
        return actions

    def play(self, agent, num_steps):
        """So many steps, learning whenever a rollout is full: actions and metrics."""
        happened = []
        for _ in range(num_steps):
            happened.append(self.step(agent))
            if agent.rollout_is_ready:
                happened.append(agent.learn(self.now))
        return happened


def play(agent, num_steps, x=1.0, *, ended=NOBODY):
    """So many steps of one observation and reward 1, without learning."""
    observations = masked(np.full((B, 2), x)) if agent.observation_spec.space == SPACE else np.full((B, 3), x)
    for _ in range(num_steps):
        agent.act(observations)
        agent.record(np.ones(B), ended, NOBODY)
    return observations


def all_of(agent):
    tensors, metadata = agent.state()
    return tensors, copy.deepcopy(metadata)


def assert_same(one, other):
    (tensors, metadata), (other_tensors, other_metadata) = one, other
    assert metadata == other_metadata
    assert tensors.keys() == other_tensors.keys()
    for name in tensors:
        assert torch.equal(tensors[name], other_tensors[name]), name


X = np.ones((B, 2))
TRUE_1 = np.array([False, True, False])
PUNISHED = np.ones((B, 2), dtype=bool)
NO_VOTE = {"x": X, "action_mask": np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])}
BAD_X = [
    (np.ones((3, 3)), r"'x': expected shape \(3, 2\).*got \(3, 3\)"),
    (np.array([[1, 1], [np.nan, 1], [1, 1]]), "'x' of stream 1 is nan"),
    (np.array([[1, 1], [1, 1], [1, -np.inf]]), "'x' of stream 2 is -inf"),
]


def act(observations):
    return lambda agent: agent.act(observations)


def learn(*given, **by_name):
    return lambda agent: agent.learn(*given, **by_name)


def record(rewards=(1, 2, 3), terminated=NOBODY, truncated=NOBODY, final=None, events=None):
    return lambda agent: agent.record(rewards, terminated, truncated, final_observations=final, events=events)


# When (nothing done, acted, recorded once, rollout full), what, the error and what its message says.
WRONG_CALLS = [
    ("begin", record(), RuntimeError, r"call act\(observations\)"),
    ("begin", learn(masked(X)), RuntimeError, "nothing recorded"),
    ("begin", learn(masked(X), partial=True), RuntimeError, "nothing recorded"),
    *(("begin", act(masked(x)), DataError, message) for x, message in BAD_X),
    ("begin", act({**masked(X), "x": X[:2]}), DataError, r"'x': expected shape \(3, 2\).*got \(2, 2\)"),
    ("begin", act({"x": X}), DataError, "'action_mask' is missing"),
    ("begin", act(X), DataError, "'x' is missing"),
    ("begin", act(NO_VOTE), DataError, "stream 1 allows no choice for head 'vote'"),
    ("acted", act(masked(X)), RuntimeError, "call record"),
    ("acted", learn(masked(X)), RuntimeError, "call record"),
    ("acted", lambda agent: agent.reset_state(), RuntimeError, "call record"),
    ("acted", lambda agent: agent.save("never"), RuntimeError, "call record"),
    ("acted", record(np.ones(2)), DataError, r"rewards: expected shape \(3,\)"),
    ("acted", record(1.0), DataError, r"rewards: expected shape \(3,\).*got \(\)"),
    ("acted", record(np.ones((3, 1))), DataError, r"rewards.*got \(3, 1\)"),
    ("acted", record([1, 2, np.nan]), DataError, "reward of stream 2 is nan"),
    ("acted", record([1, np.inf, 2]), DataError, "reward of stream 1 is inf"),
    ("acted", record(terminated=[False]), DataError, "terminated: expected shape"),
    ("acted", record(truncated=[0, 1, 2]), DataError, "truncated: expected booleans"),
    ("acted", record(truncated=TRUE_1), ValueError, r"streams \[1\] were truncated"),
    *(("acted", record(truncated=~NOBODY, final=masked(x)), DataError, message) for x, message in BAD_X),
    ("acted", record(events=NormEvents(PUNISHED, PUNISHED)), ValueError, "events without norms"),
    ("recorded", record(), RuntimeError, r"call act\(observations\)"),
    ("recorded", learn(masked(X)), RuntimeError, "after 1 of rollout_length=4"),
    ("recorded", learn(partial=True), ValueError, "needs next_observations"),
    ("recorded", lambda agent: agent.reset_state(), RuntimeError, r"of streams \[0, 2\]"),
    ("recorded", lambda agent: agent.load("nowhere"), CheckpointError, "nowhere"),
    ("full", act(masked(X)), RuntimeError, "full rollout of 4 steps"),
    ("full", learn(), ValueError, "needs next_observations"),
    *(("full", learn(masked(x)), DataError, message) for x, message in BAD_X),
    ("full", learn(NO_VOTE), DataError, "stream 1 allows no choice for head 'vote'"),
]
ENDED = {"truncated": TRUE_1, "final": masked(X)}
WRONG_EVENTS = [
    ("acted", record(), ValueError, "no events came"),
    (
        "acted",
        record(events=NormEvents(PUNISHED[:2], PUNISHED)),
        ValueError,
        r"events.punished: expected shape \(3, 2\)",
    ),
    ("acted", record(events=NormEvents(PUNISHED)), ValueError, "events.collected is missing"),
    ("acted", record(events=NormEvents(PUNISHED, PUNISHED[0]), **ENDED), ValueError, "events.collected"),
    ("acted", record([1, np.nan, 3], events=NormEvents(PUNISHED, PUNISHED)), DataError, "reward of stream 1"),
]
LIVING = {"normalize_observations": True, "normalize_rewards": True, "burn_in": 2, "batch_size": 12, "num_epochs": 1}


def live_through(agent, moment=None, wrong=None):
    """Two rollouts by hand; at a moment somebody makes a wrong call. Stream 1 is truncated at every fourth step."""
    rng = np.random.default_rng(0)
    for t in range(8):
        if t == 4 and moment == "begin":
            wrong(agent)
        agent.act(masked(rng.normal(size=(B, 2))))
        if t == 5 and moment == "acted":
            wrong(agent)
        events = None if agent.norms is None else NormEvents(PUNISHED, rng.random((B, 2)) < 0.5)
        final = masked(rng.normal(size=(B, 2)))
        record(rng.normal(size=B), NOBODY, TRUE_1 & (t % 4 == 0), final, events)(agent)
        if t == 4 and moment == "recorded":
            wrong(agent)
        if agent.rollout_is_ready:
            next_observations = masked(rng.normal(size=(B, 2)))
            if moment == "full":
                wrong(agent)
            agent.learn(next_observations)
    return all_of(agent)


@pytest.fixture(scope="module")
def lived():
    """Everything that two rollouts without a wrong call leave behind, without and with norms."""
    return {norms is not None: live_through(make_agent(norms=norms, **LIVING)) for norms in (None, NORMS)}


@pytest.mark.parametrize("case", range(len(WRONG_CALLS) + len(WRONG_EVENTS)))
def test_a_wrong_call_says_what_was_expected_and_loses_nothing(case, lived, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    moment, call, error, message = (*WRONG_CALLS, *WRONG_EVENTS)[case]
    norms = NORMS if case >= len(WRONG_CALLS) else None
    num_refused = 0

    def wrong(agent):
        nonlocal num_refused
        with pytest.raises(error, match=message):
            call(agent)
        num_refused += 1

    after = live_through(make_agent(norms=norms, **LIVING), moment, wrong)
    assert num_refused > 0
    assert_same(after, lived[norms is not None])
    assert os.listdir() == []


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"num_streams": 0}, ValueError, "num_streams: expected at least 1, got 0"),
        ({"observation_space": spaces.Dict(a=spaces.Text(3))}, TypeError, "'a'"),
        ({"action_space": spaces.Text(3)}, TypeError, "unsupported action space"),
        ({"entropy_coef": (0.1, 0.2, 0.3)}, ValueError, "entropy_coef: expected one number or 2"),
        ({"entropy_coef_end": (0.1,), "entropy_decay_steps": 5}, ValueError, "entropy_coef_end: expected one number"),
        ({"learning_rate_schedule": "linear"}, ValueError, "learning_rate_decay_steps"),
    ],
)
def test_settings_that_cannot_work_are_refused_at_once(settings, error, message):
    with pytest.raises(error, match=message):
        make_agent(**settings)


def test_settings_of_another_class_are_refused_by_name():
    spaces_of_one = spaces.Box(-1, 1, (2,), np.float32), spaces.Discrete(2)
    for name, kind in (("config", "PPOConfig"), ("network", "NetworkConfig"), ("norms", "NormConfig")):
        with pytest.raises(TypeError, match=rf"{name}: expected {kind}\(...\), got dict"):
            DualHeadRecurrentPPO(*spaces_of_one, **{name: {"gamma": 0.5}})


def test_final_observations_are_read_only_where_an_episode_was_truncated():
    """Rows of other streams may hold anything: NaN, or masks without a legal choice."""
    both = [make_agent(), make_agent()]
    filler = {"x": np.where(TRUE_1[:, None], X, np.nan), "action_mask": np.where(TRUE_1[:, None], np.ones((B, 5)), 0)}
    for agent, final in zip(both, (masked(X), filler)):
        for t in range(4):
            agent.act(masked(X))
            record(np.arange(3.0), NOBODY, TRUE_1 & (t == 1), final)(agent)
        agent.learn(masked(X))
        agent.act(masked(X))
        record(terminated=TRUE_1, truncated=TRUE_1, final="anything")(agent)
    assert_same(*map(all_of, both))


def test_a_final_observation_is_valued_and_not_acted_in():
    """So it needs no legal action; what is wrong with it names the stream."""
    agent = make_agent()
    agent.act(masked(X))
    with pytest.raises(DataError, match="'x' of stream 1 is nan"):
        record(truncated=TRUE_1, final=masked(np.where(TRUE_1[:, None], np.nan, X)))(agent)
    record(truncated=TRUE_1, final={"x": X, "action_mask": np.zeros((B, 5))})(agent)
    assert agent.rollout_memory.final_values[0].abs().gt(0).tolist() == TRUE_1.tolist()


def test_final_observations_may_come_as_gymnasium_gives_them():
    """An array of objects, None where no episode ended: the same values as from a batch."""
    kept, final = [], masked(X + 1)
    rows = np.full(B, None, dtype=object)
    rows[1] = {name: part[1] for name, part in final.items()}
    for given in (final, rows):
        agent = make_agent(seed=1)
        agent.act(masked(X))
        record(truncated=TRUE_1, final=given)(agent)
        kept.append(agent.rollout_memory.final_values[0])
    assert kept[0].abs().sum() > 0
    assert torch.equal(*kept)
    agent.act(masked(X))
    with pytest.raises(DataError, match=r"streams \[1\] are None"):
        record(truncated=TRUE_1, final=np.full(B, None, dtype=object))(agent)


def test_read_only_arrays_are_taken():
    agent = make_agent()
    agent.act({"x": np.broadcast_to(1.0, (B, 2)), "action_mask": np.broadcast_to(1, (B, 5))})
    agent.record(np.broadcast_to(1.0, B), np.broadcast_to(False, B), np.broadcast_to(False, B))
    assert agent.rollout_memory.rewards[0].tolist() == [1, 1, 1]


def test_observations_are_copied():
    """An environment may write every observation into the same arrays."""
    reused, last = X.copy(), X.copy()
    both = [make_agent(), make_agent()]
    for t in range(8):
        reused[:], last[:] = t, -t
        for agent, now, final in zip(both, (reused, X * t), (last, X * -t)):
            agent.act(masked(now))
            record(truncated=TRUE_1, final=masked(final))(agent)
        reused[:], last[:] = 99, 99
        for agent in both:
            if agent.rollout_is_ready:
                agent.learn(masked(X))
    assert_same(*map(all_of, both))


@pytest.mark.parametrize("given", [np.bool_, np.int64, np.float64])
def test_masks_and_integers_of_other_kinds_give_the_same_rollout(given):
    """Flags may come as bools or floats, small integers as large ones: what acts is what is learned from."""
    space = spaces.Dict(pixels=spaces.Box(0, 255, (2,), np.uint8), action_mask=spaces.MultiBinary(5))
    agent = make_agent(observation_space=space, dtype=torch.float64)
    rng = np.random.default_rng(0)
    for _ in range(4):
        mask = rng.random((B, 5)) < 0.5
        mask[:, [0, 4]] = True
        observations = {"pixels": rng.integers(0, 256, size=(B, 2)), "action_mask": mask.astype(given)}
        agent.act(observations)
        record()(agent)
    assert agent.learn(observations)["policy/first_ratio_error"] < 1e-12


@pytest.mark.parametrize(
    ("kept_as", "given_as", "number"),
    [
        (np.uint8, np.int64, 256),
        (np.uint8, np.int64, -1),
        (np.uint8, np.int8, -1),
        (np.int16, np.uint16, 40_000),
        (np.bool_, np.int64, 2),
        (np.bool_, np.int8, 2),
    ],
)
def test_numbers_that_the_rollout_cannot_hold_are_refused(kept_as, given_as, number):
    """Stored they would wrap around, and what is learned from would not be what was acted upon."""
    agent = make_agent(observation_space=spaces.Box(0, 1 if kept_as is np.bool_ else 100, (2,), kept_as))
    with pytest.raises(DataError, match=f"stream 1 is {number}"):
        agent.act(np.array([[0, 1], [number, 0], [0, 0]], dtype=given_as))
    agent.act(np.array([[0, 1], [1, 0], [0, 0]], dtype=given_as))


@pytest.mark.parametrize("flag", [0.5, 256])
def test_masks_are_flags(flag):
    with pytest.raises(DataError, match=f"'action_mask' of stream 1 is {flag}"):
        make_agent().act({"x": X, "action_mask": np.where(TRUE_1[:, None], flag, np.ones((B, 5)))})


def test_tensors_give_tensors_and_arrays_arrays():
    agent = make_agent()
    assert all(isinstance(part, np.ndarray) for part in agent.act(masked(X)).values())
    record()(agent)
    actions = agent.act({name: torch.from_numpy(part) for name, part in masked(X).items()})
    assert {(type(part), part.shape, part.dtype) for part in actions.values()} == {(torch.Tensor, (B,), torch.int64)}
    record(torch.ones(B), torch.zeros(B, dtype=torch.bool), torch.zeros(B, dtype=torch.bool))(agent)
    assert torch.equal(torch.stack([actions["move"], actions["vote"]], 1), agent.rollout_memory.actions[1])


def test_acting_and_shuffling_draw_from_generators_of_their_own():
    agent = make_agent()
    generators = agent._sampling, agent._shuffling

    def drawn_from(call):
        before = [generator.get_state() for generator in generators]
        call()
        return [not torch.equal(state, generator.get_state()) for state, generator in zip(before, generators)]

    assert drawn_from(lambda: play(agent, 4)) == [True, False]
    assert drawn_from(lambda: agent.learn(masked(X))) == [False, True]


def test_actions_follow_the_seed():
    one, again, other = (World().play(make_agent(seed=seed), 3) for seed in (1, 1, 2))
    assert one == again != other


def test_the_global_random_state_is_neither_read_nor_changed():
    results = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
        agent = make_agent(**EVERYTHING)
        World().play(agent, 9)
        assert torch.equal(before[0], torch.get_rng_state())
        assert (before[1] == np.random.get_state()[1]).all()  # noqa: NPY002
        results.append(all_of(agent))
    assert_same(*results)


def test_partial_rollouts_and_the_counters():
    agent, world = make_agent(), World()
    for num_steps, expected in ((3, (9, 1)), (4, (21, 2))):
        for _ in range(num_steps):
            world.step(agent)
        metrics = agent.learn(world.now, partial=True)
        assert agent.rollout_memory.length == 0
        assert (agent.num_steps, agent.num_updates) == expected
        assert metrics["update/optimizer_steps"] == 2 * round(3 * num_steps / 4)


def test_next_observations_are_not_needed_where_nothing_is_bootstrapped_from_them():
    agent = make_agent()
    for _ in range(4):
        agent.act(masked(X))
        record(terminated=~TRUE_1, truncated=TRUE_1, final=masked(X))(agent)
    agent.learn()
    agent = make_agent(bootstrap_last=False)
    play(agent, 4)
    agent.learn()


def test_reset_state_begins_new_episodes_where_none_is_cut():
    agent = make_agent("lstm", burn_in=2)
    for _ in range(2):
        agent.learn(play(agent, 4))
    assert agent._get_hidden_state().h.all()
    agent.reset_state()
    assert not any(part.any() for part in agent._get_hidden_state())
    play(agent, 1, ended=~NOBODY)
    assert agent.rollout_memory.episode_starts[2].all()
    assert not agent.rollout_memory.h_states[:, 2].any()
    agent.reset_state()  # all episodes have just ended


def test_reset_state_begins_the_return_that_rewards_are_scaled_by():
    agent = make_agent("gru", normalize_rewards=True, gamma=0.5)
    agent.learn(play(agent, 4))
    assert agent.reward_scale.returns.tolist() == [1.875] * B
    agent.reset_state()
    assert agent.reward_scale.returns.tolist() == [0.0] * B
    play(agent, 1)
    play(agent, 1, ended=~NOBODY)
    agent.reset_state()
    # Discounted returns: 1, 1.5, 1.75, 1.875 and, after the reset, 1, 1.5.
    agent.learn(partial=True)
    assert agent.reward_scale.statistics.mean.item() == pytest.approx(np.mean([1, 1.5, 1.75, 1.875, 1, 1.5]), rel=1e-6)


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (0.4, 0.1, {"move": [0.4, 0.3, 0.2, 0.1, 0.1], "vote": [0.4, 0.3, 0.2, 0.1, 0.1]}),
        ((0.4, 0.0), (0.1, 0.3), {"move": [0.4, 0.3, 0.2, 0.1, 0.1], "vote": [0.0, 0.1, 0.2, 0.3, 0.3]}),
        ((0.4, 0.2), None, {"move": [0.4] * 5, "vote": [0.2] * 5}),
    ],
)
def test_entropy_weights_move_linearly_per_update(start, end, expected):
    agent = make_agent(entropy_coef=start, entropy_coef_end=end, entropy_decay_steps=3)
    metrics = [entry for entry in World().play(agent, 20) if isinstance(entry, dict)]
    for name, numbers in expected.items():
        assert [entry[f"update/entropy_coef/{name}"] for entry in metrics] == pytest.approx(numbers)


def test_the_learning_rate_falls_to_zero_by_environment_steps():
    agent = make_agent(learning_rate=0.3, learning_rate_schedule="linear", learning_rate_decay_steps=36)
    world = World()
    rates = []
    for _ in range(5):
        before = copy.deepcopy(agent.policy.state_dict())
        *_, metrics = world.play(agent, 4)
        rates.append(metrics["update/learning_rate"])
        assert agent.optimizer.param_groups[0]["lr"] == rates[-1]
        moved = any(not torch.equal(before[name], value) for name, value in agent.policy.state_dict().items())
        assert moved == (rates[-1] > 0)
    assert rates == pytest.approx([0.3, 0.2, 0.1, 0.0, 0.0])
    assert len({tuple(group) for group in agent.optimizer.param_groups}) == 1


def test_target_kl_stops_an_update_before_the_step_that_goes_too_far():
    """The first minibatch has moved nothing; the second has gone too far already: one step, as with one epoch."""
    weights = []
    for settings in ({"num_epochs": 6, "target_kl": 1e-9}, {"num_epochs": 1}, {"num_epochs": 6, "target_kl": 1e9}):
        agent = make_agent(batch_size=12, learning_rate=0.01, state_refresh="never", dtype=torch.float64, **settings)
        num_evaluated = []
        evaluate = agent.policy.evaluate
        agent.policy.evaluate = lambda batch, evaluate=evaluate, seen=num_evaluated: seen.append(1) or evaluate(batch)
        *_, metrics = World().play(agent, 4)
        # The minibatch that went too far is the last one that is looked at.
        assert len(num_evaluated) == metrics["update/optimizer_steps"] + (settings.get("target_kl") == 1e-9)
        assert metrics["update/optimizer_steps"] == (6 if settings.get("target_kl") == 1e9 else 1)
        assert metrics["update/stopped_by_kl"] == (settings.get("target_kl") == 1e-9)
        weights.append(list(agent.policy.parameters()))
    stopped, single, free = weights
    assert all(torch.equal(a, b) for a, b in zip(stopped, single))
    assert not all(torch.equal(a, b) for a, b in zip(stopped, free))


def test_guilt_is_added_to_the_reward_it_belongs_to():
    """By hand: no decay, threshold 0, scale −1: the n-th punishment brings the strength to n, collecting costs n."""
    norms = NormConfig(decay_rate=1.0, internalization_threshold=0.0, intrinsic_scale=-1.0)
    agent = make_agent(norms=norms, normalize_advantages="none")
    for t in range(4):
        agent.act(masked(X))
        events = NormEvents(np.array([[True], [False], [True]]), np.array([[True], [True], [t == 2]]))
        record([10, 20, 30], events=events)(agent)
    memory = agent.rollout_memory
    assert memory.guilt.tolist() == [[-1, 0, 0], [-2, 0, 0], [-3, 0, -3], [-4, 0, 0]]
    assert memory.task_rewards.tolist() == [[10, 20, 30]] * 4
    assert memory.rewards.tolist() == [[9, 20, 30], [8, 20, 30], [7, 20, 27], [6, 20, 30]]
    metrics = agent.learn(masked(X))
    assert metrics["rollout/guilt"] == pytest.approx(-13 / 12)
    assert metrics["rollout/task_reward"] == pytest.approx(20)
    assert metrics["norms/strength/resource"] == pytest.approx(8 / 3)


def test_guilt_in_action_mode_looks_at_the_action_just_taken():
    harmful = {"harmful_action": 1, "harmful_head": 1, "internalization_threshold": 0.0, "intrinsic_scale": -1.0}
    agent = make_agent(norms=NormConfig(mode="action", **harmful), rollout_length=20)
    votes = []
    for _ in range(20):
        votes.append(agent.act(masked(X))["vote"])
        record(events=NormEvents(~NOBODY))(agent)
    strengths = np.minimum(np.arange(1, 21), 10)[:, None]
    assert agent.rollout_memory.guilt.tolist() == np.where(np.stack(votes) == 1, -strengths, 0).tolist()
    assert 5 < np.sum(votes) < 55


@pytest.mark.parametrize("burn_in", [0, 3])
def test_observation_statistics_take_in_every_step_once(burn_in):
    """Not the tail, and only after the update: within it acting and learning see the same features."""
    agent, world = make_agent(normalize_observations=True, burn_in=burn_in, dtype=torch.float64), World()
    seen = []
    for _ in range(3):
        for _ in range(4):
            seen.append(world.now["x"])
            world.step(agent)
        assert agent.learn(world.now)["policy/first_ratio_error"] < 1e-10
        normalizer = agent.policy.normalizer.of_leaf[agent.policy.normalizer.names.index("x")]
        everything = np.concatenate(seen)
        assert normalizer.count.item() == len(everything)
        np.testing.assert_allclose(normalizer.mean, everything.mean(0), rtol=1e-10)
        np.testing.assert_allclose(normalizer.variance, everything.var(0), rtol=1e-10)


def test_continuous_actions():
    space = spaces.Box(np.array([-1, 5], np.float32), np.array([1, 9], np.float32))
    agent = make_agent("lstm", action_space=space, observation_space=spaces.Box(-9, 9, (2,)), dtype=torch.float64)
    rng = np.random.default_rng(0)
    before = agent.policy.heads.log_std.clone()
    for _ in range(2):
        for _ in range(4):
            actions = agent.act(rng.normal(size=(B, 2)))
            assert actions.shape == (B, 2)
            assert all(space.contains(action) for action in actions)
            agent.record(rng.normal(size=B), NOBODY, NOBODY)
        metrics = agent.learn(rng.normal(size=(B, 2)))
        assert metrics["policy/first_ratio_error"] < 1e-12
        assert metrics["policy/approx_kl"] > 0
    # The entropy of a unit normal per dimension is ln √(2πe).
    assert metrics["entropy/action"] == pytest.approx(2 * 1.41894, abs=0.05)
    assert not torch.equal(before, agent.policy.heads.log_std)


# Saving and loading.


@pytest.mark.parametrize(
    ("memory", "num_layers", "num_steps"),
    [
        ("lstm", 1, 0),
        ("lstm", 1, 6),
        ("lstm", 2, 11),
        ("lstm", 1, 8),
        ("gru", 1, 8),
        ("gru", 2, 6),
        ("mingru", 2, 8),
        ("lru", 1, 6),
        ("none", 1, 6),
    ],
)
def test_a_loaded_agent_goes_on_as_the_saved_one(memory, num_layers, num_steps, tmp_path):
    """Actions, metrics and all tensors, bit for bit, over two more rollouts; what loads had a life of its own.

    `norms/guilt/*` is the mean since it was last logged: half of that may lie before the checkpoint.
    """
    agent, world = make_agent(memory, num_layers=num_layers, **EVERYTHING), World()
    world.play(agent, num_steps)
    agent.save(tmp_path / "agent")

    other, elsewhere = make_agent(memory, num_layers=num_layers, **{**EVERYTHING, "seed": 99}), World(5)
    elsewhere.play(other, 7)
    other.act(elsewhere.now)
    other.load(tmp_path / "agent")
    assert_same(all_of(agent), all_of(other))

    world_of_other = copy.deepcopy(world)
    ours, theirs = world.play(agent, 10), world_of_other.play(other, 10)
    assert ours == theirs
    assert all(len(entry) > 15 and "norms/guilt/A" in entry for entry in ours if isinstance(entry, dict))
    assert_same(all_of(agent), all_of(other))


def test_saving_changes_nothing(tmp_path):
    """An agent that is saved in the middle of a rollout goes on to the same bits as one that never was."""
    for seed in range(5):
        results = []
        for saves in (False, True):
            agent, world = make_agent("lstm", rollout_length=12, seed=seed), World(seed)
            world.play(agent, 6)
            if saves:
                agent.save(tmp_path / "agent")
            world.play(agent, 7)
            results.append(all_of(agent))
        assert_same(*results)


def test_a_kept_state_does_not_change_with_the_agent():
    """`state()` in memory is a checkpoint like any other: `restore` goes back to it."""
    agent, world = make_agent(**EVERYTHING), World()
    world.play(agent, 6)
    kept, then = agent.state(), all_of(agent)
    world.play(agent, 6)
    agent.restore(*kept)
    assert_same(all_of(agent), then)


def refused(agent, path, message):
    """Loading fails with a CheckpointError that says so, and the agent is as it was."""
    before = all_of(agent)
    with pytest.raises(CheckpointError, match=message):
        agent.load(path)
    assert_same(all_of(agent), before)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A file saved in the middle of a rollout."""
    path = tmp_path_factory.mktemp("saved") / "agent"
    agent = make_agent(norms=NORMS)
    World().play(agent, 6)
    agent.save(path)
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"memory": "lstm"}, "network"),
        ({"hidden_size": 9}, "network"),
        ({"num_layers": 2}, "network"),
        ({"num_streams": 2}, "num_streams is 3, expected 2"),
        ({"observation_space": spaces.Box(-1, 1, (2,))}, "observation_space"),
        ({"action_space": spaces.Dict(move=spaces.Discrete(2), vote=spaces.Discrete(3))}, "action_space"),
        ({"norms": None}, "norms"),
        ({"norms": NormConfig(resources=("A", "B", "C"))}, "norms"),
        ({"burn_in": 1}, "burn_in"),
        ({"rollout_length": 5}, "rollout_length"),
        ({"normalize_observations": True}, "normalize_observations"),
        ({"normalize_rewards": True}, "normalize_rewards"),
        ({"dtype": torch.float64}, "float"),
    ],
)
def test_a_checkpoint_of_another_architecture_is_refused(changes, message, saved):
    refused(make_agent(**{"norms": NORMS, "seed": 3, **changes}), saved, message)


def test_files_that_are_no_checkpoint_are_refused(saved, tmp_path):
    agent = make_agent(norms=NORMS, seed=3)
    World(1).play(agent, 5)
    refused(agent, tmp_path / "nowhere", "nowhere")
    refused(agent, tmp_path, "cannot read")
    broken = tmp_path / "broken"
    broken.write_bytes(saved.read_bytes()[:500])
    refused(agent, broken, "not a whole dualhead checkpoint")
    for version, who in ((str(VERSION + 1), "newer"), ("1", "older")):
        save_file({"weight": torch.ones(3)}, broken, {"format": "dualhead", "version": version, "json": "{}"})
        refused(agent, broken, f"{who} dualhead")


def test_a_checkpoint_with_other_entries_is_refused(saved, tmp_path):
    tensors, metadata = read_tensors(saved)
    name = next(name for name in tensors if name.startswith("policy/"))
    changed = [
        ({key: value for key, value in tensors.items() if key != name}, metadata, f"missing .'{name}'"),
        ({**tensors, "more": torch.ones(1)}, metadata, "unexpected .'more'"),
        ({**tensors, name: torch.ones(3, 5, 7)}, metadata, r"\(3, 5, 7\)"),
    ]
    for missing in ("num_steps", "num_updates", "rollout"):
        changed.append((tensors, {key: value for key, value in metadata.items() if key != missing}, missing))
    for others, entries, message in changed:
        write_tensors(tmp_path / "agent", others, entries)
        refused(make_agent(norms=NORMS, seed=3), tmp_path / "agent", message)


def test_settings_of_learning_may_change_between_saving_and_loading(saved):
    agent = make_agent(norms=NORMS, learning_rate=0.5, num_epochs=1, sequence_length=4, entropy_coef=0.5)
    agent.load(saved)
    assert agent.num_steps == 18
    world = World(2)
    *_, metrics = world.play(agent, 2)
    assert metrics["update/learning_rate"] == 0.5


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    agent = make_agent()
    agent.save(tmp_path / "agent")
    before = (tmp_path / "agent").read_bytes()
    World().play(agent, 2)

    def no_space(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_space)
        with pytest.raises(OSError, match="No space left"):
            agent.save(tmp_path / "agent")
    assert os.listdir(tmp_path) == ["agent"]
    assert (tmp_path / "agent").read_bytes() == before
    with pytest.raises(FileNotFoundError, match=r"no such folder to write into: '.*missing'"):
        agent.save(tmp_path / "missing" / "agent")


# Parts and spaces of the user's own: what is kept, or refused when the agent is made.


class Cell(MemoryCell):
    """h' = tanh(W x + U h), with whatever else a test gives it."""

    def __init__(self, input_size, hidden_size, *, parts=("h",)):
        super().__init__(hidden_size, state_shapes=dict.fromkeys(parts, (1, hidden_size)))
        self.cell = torch.nn.RNNCell(input_size, hidden_size)

    def step(self, features, state):
        h = self.cell(features, *(part[0] for part in list(state)[:1]))
        return h, RecurrentState(**dict.fromkeys(state.parts, h[None]))


class ComplexWeights(Cell):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.rotation = torch.nn.Parameter(torch.tensor([1j]))


class ComplexState(Cell):
    kind = torch.complex64

    def initial_state(self, batch, *, device, dtype):
        zeros = super().initial_state(batch, device=device, dtype=dtype)
        return RecurrentState(h=zeros.h, z=zeros.h.to(self.kind))

    def step(self, features, state):
        h = self.cell(features, state.h[0] + state.parts["z"][0].real.to(features.dtype))
        return h, RecurrentState(h=h[None], z=(state.parts["z"] + h[None]) * 1j)


class ComplexDouble(ComplexState):
    kind = torch.complex128


class ExtraState(Cell):
    def get_extra_state(self):
        return {"calls": 3}


def cell_with(*parts):
    return lambda *sizes: Cell(*sizes, parts=parts)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"memory": ComplexWeights}, TypeError, "memory.rotation.*complex64.*two real parameters"),
        ({"memory": ComplexDouble}, TypeError, "'z' is torch.complex128"),
        ({"memory": ExtraState}, TypeError, "memory._extra_state.*buffer"),
        ({"memory": cell_with()}, ValueError, "at least one part of the state"),
        ({"memory": cell_with("h", "episode_starts")}, ValueError, "'episode_starts'"),
        ({"memory": cell_with("h", "previous/action"), "previous_action": True}, ValueError, "'previous/action'"),
        (
            {"observation_space": spaces.Dict({"a/b": spaces.Discrete(2), "a": spaces.Dict(b=spaces.Discrete(3))})},
            ValueError,
            "two parts.*'a/b'",
        ),
        (
            {"action_space": spaces.Dict(a=spaces.MultiDiscrete([2, 2]), a_0=spaces.Discrete(2))},
            ValueError,
            "two heads.*'a_0'",
        ),
    ],
)
def test_parts_that_no_checkpoint_could_hold_are_refused_at_once(given, error, message):
    with pytest.raises(error, match=message):
        agents.make_agent(**given)


def test_a_complex_state_keeps_its_imaginary_part(tmp_path):
    agent = agents.make_agent(ComplexState, dtype=torch.float32)
    live(agent, 27)
    agent.save(tmp_path / "agent")
    again = DualHeadRecurrentPPO.from_file(tmp_path / "agent", memory=ComplexState)
    assert again._get_hidden_state().parts["z"].imag.any()
    assert_same(all_of(again), all_of(agent))


def live(agent, num_steps, seed=0):
    rng = np.random.default_rng(seed)
    for _ in range(num_steps):
        agent.act(rng.normal(size=(B, 3)))
        agent.record(rng.normal(size=B), rng.random(B) < 0.2, NOBODY)
        if agent.rollout_is_ready:
            agent.learn(rng.normal(size=(B, 3)))


def frozen_cell(*sizes):
    return Cell(*sizes).requires_grad_(False)


@pytest.mark.parametrize("freeze_first", [True, False])
def test_a_part_may_be_frozen_and_unfrozen_at_any_time(freeze_first):
    agent = agents.make_agent(frozen_cell if freeze_first else Cell)
    memory, critic = agent.policy.memory, agent.policy.critic
    for frozen in (freeze_first, not freeze_first, freeze_first):
        memory.requires_grad_(not frozen)
        before = [parameter.clone() for parameter in (*memory.parameters(), *critic.parameters())]
        live(agent, 20)
        after = [*memory.parameters(), *critic.parameters()]
        moved = [not torch.equal(*pair) for pair in zip(before, after)]
        assert moved == [not frozen] * 4 + [True] * 2


@pytest.mark.parametrize(("saved", "loaded"), [(Cell, frozen_cell), (frozen_cell, Cell), (frozen_cell, frozen_cell)])
def test_pretrain_freeze_fine_tune_and_back(saved, loaded, tmp_path):
    """Weights load whether or not a part is frozen on either side; what begins to learn begins with zero moments."""
    agent = agents.make_agent(saved)
    live(agent, 20)
    agent.save(tmp_path / "agent")
    started = agents.make_agent(loaded, seed=9)
    started.warm_start(tmp_path / "agent")
    from_file = DualHeadRecurrentPPO.from_file(tmp_path / "agent", memory=loaded)
    for other in (started, from_file):
        for name, tensor in other.policy.state_dict().items():
            assert torch.equal(tensor, agent.policy.state_dict()[name])
        for name, parameter in other.policy.named_parameters():
            of_saved = agent.optimizer.state.get(agent.policy.get_parameter(name)) or {}
            for moment, value in other.optimizer.state.get(parameter, {}).items():
                assert torch.equal(value, of_saved.get(moment, torch.zeros_like(value)))
        live(other, 20)
        moved = not torch.equal(other.policy.memory.cell.weight_hh, agent.policy.memory.cell.weight_hh)
        assert moved == (loaded is Cell)


def test_a_part_frozen_after_training_keeps_its_moments(tmp_path):
    agent = agents.make_agent(Cell)
    live(agent, 20)
    agent.policy.memory.requires_grad_(False)
    agent.save(tmp_path / "agent")
    again = DualHeadRecurrentPPO.from_file(tmp_path / "agent", memory=Cell)
    again.policy.memory.requires_grad_(False)
    agent.policy.memory.requires_grad_(True)
    again.policy.memory.requires_grad_(True)
    for each in (agent, again):
        live(each, 20)
    assert_same(all_of(again), all_of(agent))


def test_the_name_of_the_class_is_what_is_compared(tmp_path):
    """A class that a function defines is found again wherever a class of its name stands."""

    class Local(Cell):
        pass

    agents.make_agent(Local).save(tmp_path / "agent")
    elsewhere = type("Local", (Cell,), {"__qualname__": "Local", "__module__": "elsewhere"})
    DualHeadRecurrentPPO.from_file(tmp_path / "agent", memory=elsewhere)
    with pytest.raises(CheckpointError, match=r"memory=Local"):
        DualHeadRecurrentPPO.from_file(tmp_path / "agent")
    with pytest.raises(CheckpointError, match="compared by the name of its class"):
        DualHeadRecurrentPPO.from_file(tmp_path / "agent", memory=Cell)


def test_integers_keep_the_dtype_of_their_space(tmp_path):
    kinds = {"a": np.int32, "b": np.int8}
    space = spaces.Dict(a=spaces.Discrete(3, dtype=np.int32), b=spaces.MultiDiscrete([2, 3], dtype=np.int8))
    agent = agents.make_agent(observation_space=space, action_space=space)
    observations = {"a": np.zeros(B, np.int32), "b": np.zeros((B, 2), np.int8)}
    for given in (observations, {name: torch.from_numpy(part) for name, part in observations.items()}):
        actions = agent.act(given)
        assert {name: np.asarray(part).dtype for name, part in actions.items()} == kinds
        agent.record(np.zeros(B), NOBODY, NOBODY)
    agent.save(tmp_path / "agent")
    again = DualHeadRecurrentPPO.from_file(tmp_path / "agent")
    assert again.observation_spec.space == again.action_spec.space == space


def test_keys_of_observations_may_have_slashes():
    space = spaces.Dict({"a": spaces.Dict({"b/c": spaces.Discrete(2)}), "d/e": spaces.Discrete(2)})
    agents.make_agent(observation_space=space).act({"a": {"b/c": np.zeros(B, int)}, "d/e": np.zeros(B, int)})
