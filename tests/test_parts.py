"""Encoders and memories of the user's own, and agents made from their files alone."""

import json

import agents
import numpy as np
import pytest
import torch
from agents import Elman
from gymnasium import spaces
from settings import act_in_heads
from torch import nn

from dualhead import CheckpointError, DualHeadRecurrentPPO, NetworkConfig, NormConfig, load_policy
from dualhead.learning.segments import cut, gather
from dualhead.networks.memory import MemoryCell
from dualhead.running.export import export
from dualhead.spaces import space_from_json, space_to_json
from dualhead.types import Plan, RecurrentState

B = 3
SPACE = spaces.Dict(x=spaces.Box(-9, 9, (4,), np.float32), kind=spaces.Discrete(3))
HEADS = agents.HEADS
SETTINGS = {"rollout_length": 8, "batch_size": 12, "sequence_length": 4, "learning_rate": 1e-2, "hidden_size": 6}


class SteppedLSTM(MemoryCell):
    """`nn.LSTMCell` under other names of its parts, with a counter of another shape and kind."""

    def __init__(self, input_size, hidden_size):
        super().__init__(
            hidden_size, state_shapes={"cell": (1, hidden_size), "output": (1, hidden_size), "age": (1, 1, 1)}
        )
        self.cell = nn.LSTMCell(input_size, hidden_size)

    def step(self, features, state):
        parts = state.parts
        h, c = self.cell(features, (parts["output"][0], parts["cell"][0]))
        return h, RecurrentState(cell=c[None], output=h[None], age=parts["age"] + 1)


class OneByOne(SteppedLSTM):
    """Unrolls segment after segment: a packing that no memory of ours uses."""

    def plan(self, lengths, *, device, final_states=False):
        step = np.concatenate([np.arange(length) for length in lengths])
        return Plan(np.repeat(np.arange(len(lengths)), lengths), step, lengths)

    def unroll(self, features, state, layout):
        outputs, finals, begin = [], [], 0
        for segment, length in enumerate(layout):
            state_now = state.select(slice(segment, segment + 1))
            for t in range(begin, begin + length):
                output, state_now = self.step(features[t : t + 1], state_now)
                outputs.append(output)
            finals.append(state_now)
            begin += length
        return torch.cat(outputs), RecurrentState.concatenate(finals)


class Squares(nn.Module):
    """Features of the vector alone, by a layer that came with weights."""

    num_features = 5

    def __init__(self, space, *, frozen=False):
        super().__init__()
        self.layer = nn.Linear(space["x"].shape[0], self.num_features)
        nn.init.constant_(self.layer.weight, 0.25)
        self.requires_grad_(not frozen)

    def forward(self, observations):
        return self.layer(observations["x"]).square()


def make_agent(memory="lstm", **given):
    return agents.make_agent(memory, preset="default", **{"observation_space": SPACE} | SETTINGS | given)


def look(rng, num_streams=B):
    return {"x": rng.normal(size=(num_streams, 4)), "kind": rng.integers(3, size=num_streams)}


def play(agent, num_steps, seed=0):
    """So many steps, learning whenever a rollout is full: head indices and metrics."""
    rng, happened = np.random.default_rng(seed), []
    now = look(rng, agent.num_streams)
    for _ in range(num_steps):
        happened.append(act_in_heads(agent, now).tolist())
        ended = rng.random((2, agent.num_streams)) < 0.15
        agent.record(rng.normal(size=agent.num_streams), *ended, final_observations=look(rng, agent.num_streams))
        now = look(rng, agent.num_streams)
        if agent.rollout_is_ready:
            happened.append(agent.learn(now))
    return happened


@pytest.mark.parametrize("memory", [SteppedLSTM, OneByOne])
@pytest.mark.parametrize("changes", [{}, {"burn_in": 3}, {"sequence_length": "rollout", "batch_size": 24}])
def test_a_cell_of_one_s_own_learns_what_ours_does(memory, changes):
    """An LSTM stepped by hand, in two packings, against `nn.LSTM`: two updates, the same weights."""
    ours = make_agent(**changes)
    theirs = make_agent(memory=memory, **changes)
    lstm, cell = ours.policy.memory.lstm, theirs.policy.memory.cell
    with torch.no_grad():
        for name, parameter in cell.named_parameters():
            parameter.copy_(getattr(lstm, f"{name}_l0"))
        for name, parameter in theirs.policy.named_parameters():
            if not name.startswith("memory."):
                parameter.copy_(ours.policy.get_parameter(name))
    updates = 0
    for one, other in zip(play(ours, 17), play(theirs, 17)):
        if isinstance(one, dict):
            updates += 1
            assert other["policy/first_ratio_error"] < 1e-12
            assert one == pytest.approx(other, rel=1e-7, abs=1e-9)
        else:
            assert one == other
    assert updates == 2
    for name, parameter in cell.named_parameters():
        torch.testing.assert_close(parameter, getattr(lstm, f"{name}_l0"), rtol=0, atol=1e-9)


@pytest.mark.parametrize(("memory", "critic"), [(OneByOne, "lstm"), (Elman, "gru"), (Elman, "none")])
def test_two_memories_may_want_two_packings(memory, critic):
    agent = make_agent(memory, critic_memory=critic, burn_in=2)
    for metrics in play(agent, 24):
        if isinstance(metrics, dict):
            assert metrics["policy/first_ratio_error"] < 1e-12
    # Values of segments, whatever their packing, are those of acting.
    play(agent, 7)
    rollout, zeros = agent.rollout_memory, torch.zeros(7, B).double()
    segments = cut(rollout.episode_starts[2:9].numpy(), 4)
    batch = gather(agent.policy, rollout, segments, advantages=zeros, returns=zeros)
    output = agent.policy.evaluate(batch)
    torch.testing.assert_close(output.values, batch.values, rtol=0, atol=1e-12)
    torch.testing.assert_close(output.distribution.log_probs(batch.actions), batch.log_probs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("frozen", [True, False])
def test_an_encoder_keeps_its_weights_until_it_learns(frozen):
    encoder = Squares(SPACE, frozen=frozen)
    agent = make_agent(encoder=encoder)
    assert agent.policy.encoder is encoder
    assert (encoder.layer.weight == 0.25).all()
    play(agent, 8)
    assert (encoder.layer.weight == 0.25).all() == frozen
    assert any("policy/encoder" in name for name in agent.state()[0])
    assert any("optimizer/encoder" in name for name in agent.state()[0]) != frozen


def test_vectors_are_scaled_for_any_encoder():
    """Running statistics come before the encoder: it sees numbers with mean 0 and deviation 1."""
    seen = []
    encoder = encodes(lambda observations: seen.append(observations["x"]) or observations["x"])
    policy = make_agent(encoder=encoder).policy
    observations = {"x": 5 + 3 * torch.randn(40, 4).double(), "kind": torch.zeros(40, dtype=torch.int64)}
    policy.normalizer.update(observations)
    policy.step(observations, policy.initial_state(40))
    torch.testing.assert_close(seen[-1].mean(0), torch.zeros(4).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(seen[-1].std(0, unbiased=False), torch.ones(4).double(), rtol=0, atol=1e-6)


def test_a_file_and_the_parts_are_enough(tmp_path):
    agent = make_agent(SteppedLSTM, encoder=Squares)
    play(agent, 13)
    agent.save(tmp_path / "agent")
    with pytest.raises(CheckpointError, match=r"encoder .*:Squares, which is not part of dualhead.*encoder=Squares"):
        DualHeadRecurrentPPO.from_file(tmp_path / "agent", memory=SteppedLSTM)
    with pytest.raises(CheckpointError, match="memory=SteppedLSTM"):
        load_policy(tmp_path / "agent", encoder=Squares)
    with pytest.raises(CheckpointError, match="foreign_parts"):
        DualHeadRecurrentPPO.from_file(tmp_path / "agent", memory=Elman, encoder=Squares)
    with pytest.raises(CheckpointError, match="foreign_parts"):
        make_agent().load(tmp_path / "agent")
    again = DualHeadRecurrentPPO.from_file(tmp_path / "agent", memory=SteppedLSTM, encoder=Squares)
    assert play(again, 20, seed=1) == play(agent, 20, seed=1)
    player = load_policy(tmp_path / "agent", memory=SteppedLSTM, encoder=Squares)
    assert player.observation_space == SPACE
    assert player.act(look(np.random.default_rng(0)), np.ones(B)).shape == (B, 2)
    make_agent().save(tmp_path / "ours")
    with pytest.raises(CheckpointError, match="dualhead's own memory"):
        load_policy(tmp_path / "ours", memory=Elman)


def test_an_agent_comes_back_from_its_file_with_everything(tmp_path):
    norms = NormConfig(mode="action", harmful_action=1, decay_rate=0.9)
    space, heads = spaces.Tuple((spaces.Box(-1, 1, (2,)), spaces.MultiBinary(2))), spaces.Discrete(3, start=2)
    agent = DualHeadRecurrentPPO(space, heads, norms=norms, network=NetworkConfig(memory="gru"), num_streams=4)
    agent.save(tmp_path / "agent")
    again = DualHeadRecurrentPPO.from_file(tmp_path / "agent")
    assert (again.config, again.network, again.norm_config) == (agent.config, agent.network, norms)
    assert (again.observation_spec.space, again.action_spec.space) == (space, heads)
    assert "num_streams=4" in repr(again)
    assert "memory='gru'" in repr(again)


def test_a_warm_start_takes_what_was_learned_to_other_shapes(tmp_path):
    taught = make_agent(normalize_rewards=True)
    play(taught, 16)
    taught.save(tmp_path / "taught")
    agent = make_agent(num_streams=5, rollout_length=6, normalize_rewards=True, seed=3)
    agent.warm_start(tmp_path / "taught")
    assert agent.num_steps == agent.num_updates == 0
    for ours, theirs in zip(agent.policy.state_dict().values(), taught.policy.state_dict().values()):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(agent.policy.parameters(), taught.policy.parameters()):
        for name, moment in taught.optimizer.state[theirs].items():
            assert torch.equal(agent.optimizer.state[ours][name], moment)
    assert torch.equal(agent.reward_scale.statistics.variance, taught.reward_scale.statistics.variance)
    play(agent, 12)
    with pytest.raises(CheckpointError, match="num_streams"):
        agent.load(tmp_path / "taught")
    play(agent, 1)
    with pytest.raises(RuntimeError, match="1 steps recorded"):
        agent.warm_start(tmp_path / "taught")
    with pytest.raises(CheckpointError, match="network"):
        make_agent("gru").warm_start(tmp_path / "taught")


def test_parts_of_one_s_own_are_exported(tmp_path):
    agent = make_agent(memory=SteppedLSTM, encoder=Squares, dtype=torch.float32)
    play(agent, 8)
    agent.save(tmp_path / "agent")
    from_agent = export(agent, tmp_path / "a.onnx")
    from_file = export(tmp_path / "agent", tmp_path / "b.onnx", memory=SteppedLSTM, encoder=Squares)
    assert from_agent["verified"]["largest_difference"] < 1e-5
    states = {part["name"]: part["shape"] for part in from_file["inputs"] if part["name"].startswith("state/")}
    assert states == {"state/cell": [1, "batch", 6], "state/output": [1, "batch", 6], "state/age": [1, "batch", 1, 1]}
    assert json.loads((tmp_path / "a.json").read_text())["memory"] == "SteppedLSTM"


class WithoutStep(MemoryCell):
    def __init__(self, input_size, hidden_size):
        super().__init__(hidden_size, state_shapes={"h": (1, hidden_size)})


class Forgets(Elman):
    """Its sequences begin from ones."""

    def sequence(self, features, state):
        return super().sequence(features, state.map(lambda part: part * 0 + 1))


class BeginsWithOnes(Elman):
    def initial_state(self, batch, **kwargs):
        return super().initial_state(batch, **kwargs).map(lambda part: part + 1)


def steps(before=lambda x, state: (x, state), after=lambda h, state: (h, state)):
    """A cell with other inputs or outputs of its steps."""

    class Steps(Elman):
        def step(self, features, state):
            return after(*super().step(*before(features, state)))

    return Steps


def names_its_state(*names):
    class Names(MemoryCell):
        def __init__(self, input_size, hidden_size):
            super().__init__(hidden_size, state_shapes=dict.fromkeys(names, (1, hidden_size)))
            self.layer = nn.Linear(input_size, hidden_size)

        def step(self, features, state):
            return self.layer(features), state

    return Names


def encodes(before=lambda seen: seen["x"], after=lambda features: features, num_features=5):
    """An encoder with other inputs or outputs of its layer."""

    class Encodes(Squares):
        def __init__(self, space):
            super().__init__(space)
            self.num_features = num_features

        def forward(self, observations):
            return after(self.layer(before(observations)))

    return Encodes


def batch_norm(x):
    return nn.functional.batch_norm(x, None, None, training=True)


WRONG_MEMORIES = [
    (WithoutStep, NotImplementedError, "WithoutStep needs a method step"),
    (Forgets, ValueError, "step and unroll disagree"),
    (steps(lambda x, state: (nn.functional.dropout(x), state)), ValueError, "memory .*Steps.* disagree.*dropout"),
    (steps(lambda x, state: (batch_norm(x), state)), ValueError, "memory .*Steps.*one stream.*BatchNorm"),
    (steps(lambda x, state: (x, state.map(lambda h: h.mul_(0.5)))), ValueError, "memory .*Steps.*in place"),
    (steps(lambda x, state: (x.relu_(), state)), ValueError, "memory .*Steps.*in place"),
    (steps(after=lambda h, state: (h.double(), state)), ValueError, "float32.*got.*float64"),
    (steps(after=lambda h, state: (torch.cat([h, h], 1), state)), ValueError, r"\(2, 6\).*got \(\(2, 12\)"),
    (steps(after=lambda h, state: (h, state.map(lambda part: part[0]))), ValueError, "the state after a step"),
    (steps(after=lambda h, state: (h, tuple(state))), TypeError, "RecurrentState.*got tuple"),
    (BeginsWithOnes, ValueError, "zeros with the stream axis second"),
    (names_its_state(), ValueError, "at least one"),
    (names_its_state("h", "critic_h"), ValueError, "'critic_h'"),
    (names_its_state("episode_starts"), ValueError, "'episode_starts'"),
    (names_its_state("previous/action"), ValueError, "'previous/action'"),
    (nn.LSTM(3, 3), TypeError, "num_features"),
    ("lstm", TypeError, "expected an nn.Module, or a class or function.*network=NetworkConfig"),
    (nn.Identity(), TypeError, "num_features"),
    (lambda: None, ValueError, r"making it with \(\d+, 6\) failed: TypeError"),
    (lambda inputs, hidden: MemoryCell(hidden, state_shapes={"h": hidden}), ValueError, r"state_shapes\['h'\].*got 6"),
    (
        lambda inputs, hidden: Elman(inputs, hidden, shape=(hidden,)),
        ValueError,
        r"step of features .*h=\(6, 2\).* failed",
    ),
    (lambda *sizes: 3, TypeError, "which made 3"),
]
WRONG_ENCODERS = [
    (lambda space: nn.Linear(2, 2), TypeError, "num_features"),
    (encodes(num_features=9), ValueError, r"\(4, 9\).*got \(\(4, 5\)"),
    (encodes(after=lambda features: features.long()), ValueError, "float32.*got.*int64"),
    (encodes(lambda seen: nn.functional.dropout(seen["x"])), ValueError, "different features .*dropout"),
    (encodes(lambda seen: batch_norm(seen["x"])), ValueError, "one observation alone.*BatchNorm"),
    (encodes(lambda seen: seen["x"] - seen["x"].mean(0)), ValueError, "depend on the other observations.*BatchNorm"),
    (encodes(lambda seen: seen["x"].relu_()), ValueError, "in place"),
    (encodes(lambda seen: seen.pop("x")), ValueError, "in place"),
    (encodes(lambda seen: seen["y"]), ValueError, r"forward of \{'x': \(4, .*failed: KeyError: 'y'"),
]


@pytest.mark.parametrize(
    ("name", "part", "error", "message"),
    [("memory", *row) for row in WRONG_MEMORIES] + [("encoder", *row) for row in WRONG_ENCODERS],
)
def test_parts_that_do_not_do_what_they_should_are_refused(name, part, error, message):
    with pytest.raises(error, match=message):
        DualHeadRecurrentPPO(SPACE, HEADS, network=NetworkConfig(hidden_size=6), **{name: part})


@pytest.mark.parametrize(
    "space",
    [
        spaces.Box(np.float32([-4.8, -np.inf]), np.float32([4.8, np.inf])),
        spaces.Box(-np.finfo(np.float64).max, np.finfo(np.float64).max, (2,), np.float64),
        spaces.Box(0, 255, (3, 4, 4), np.uint8),
        spaces.Tuple((spaces.MultiDiscrete([3, 2], start=[5, 5]), spaces.MultiBinary((2, 2)))),
    ],
)
def test_encoders_of_any_space_are_tried(space):
    class Sums(nn.Module):
        num_features = 1

        def __init__(self, space):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, observations):
            return torch.cat([x.flatten(1) for x in observations.values()], 1).sum(1, keepdim=True) * self.weight

    DualHeadRecurrentPPO(space, HEADS, encoder=Sums)
    DualHeadRecurrentPPO(space, HEADS, encoder=Sums(space).double())


def test_integers_reach_an_encoder_as_they_are():
    """At the defaults, which scale vectors: an embedding takes indices from a Box of integers."""

    class Embeds(nn.Module):
        num_features = 6

        def __init__(self, space):
            super().__init__()
            self.embedding = nn.Embedding(10, 3)

        def forward(self, observations):
            assert observations["observation"].dtype == torch.int64
            return self.embedding(observations["observation"]).flatten(1)

    agent = DualHeadRecurrentPPO(spaces.Box(0, 9, (2,), np.int64), spaces.Discrete(2), encoder=Embeds)
    assert agent.config.normalize_observations
    for t in range(agent.config.rollout_length):
        agent.act(np.array([t % 10, 9], np.uint8 if t % 2 else np.int64))
        agent.record(1.0, t % 5 == 4, False)
    assert agent.learn(np.array([3, 4]))["policy/first_ratio_error"] < 1e-5


def test_a_cell_need_not_know_of_autocast():
    """`torch.lerp` refuses a state in float32 beside gates in bf16, so steps are taken in full precision."""

    class Lerps(Elman):
        def step(self, features, state):
            assert features.dtype == torch.float32
            h = torch.lerp(state.h[0], self.cell(features, state.h[0]), torch.sigmoid(features[:, :1]))
            return h, RecurrentState(h=h[None])

    agent = make_agent(memory=Lerps, precision="bf16", dtype=torch.float32)
    losses = [metrics["loss/total"] for metrics in play(agent, 16) if isinstance(metrics, dict)]
    assert np.isfinite(losses).all()
    assert len(losses) == 2


def test_a_memory_that_is_not_ours_must_be_passed():
    with pytest.raises(ValueError, match="memory=Cell"):
        DualHeadRecurrentPPO(
            SPACE, HEADS, network=NetworkConfig.model_construct(**dict(NetworkConfig()) | {"memory": "a:Cell"})
        )


@pytest.mark.parametrize(
    "space",
    [
        spaces.Box(-1, np.inf, (2, 3), np.float64),
        spaces.Box(np.array([0, 5], np.float32), np.array([1, 9], np.float32)),
        spaces.Box(0, 255, (2, 4, 4), np.uint8),
        spaces.Discrete(4, start=-1),
        spaces.MultiDiscrete([2, 5], start=[1, 0]),
        spaces.MultiDiscrete([[2, 5], [3, 3]]),
        spaces.MultiBinary((2, 3)),
        spaces.Dict([("z", spaces.Discrete(2)), ("a", spaces.Tuple((spaces.Box(-1, 1, ()), spaces.Discrete(3))))]),
    ],
)
def test_spaces_are_read_back(space):
    again = space_from_json(json.loads(json.dumps(space_to_json(space), allow_nan=False)))
    assert again == space
    if isinstance(space, spaces.Dict):
        assert list(again) == list(space)


@pytest.mark.parametrize(
    "saved",
    [
        None,
        {"kind": "Text"},
        {"kind": "Discrete", "n": -1, "start": 0},
        {"kind": "Discrete", "n": 2.5, "start": 0},
        {"kind": "MultiDiscrete", "nvec": [0], "start": [0]},
        {"kind": "MultiBinary", "n": [10**6, 10**6]},
        {"kind": "Box", "shape": [-1], "dtype": "float32", "low": 0, "high": 1},
        {"kind": "Box", "shape": [2], "dtype": "object", "low": 0, "high": 1},
        {"kind": "Box", "shape": [2], "dtype": "float32", "low": [0, 0, 0], "high": 1},
        {"kind": "Box", "shape": [2], "dtype": "float32", "low": "one", "high": 1},
        {"kind": "Dict", "parts": {"a": 1}},
        {"kind": "Tuple", "parts": 3},
    ],
)
def test_other_descriptions_of_spaces_are_refused(saved):
    with pytest.raises(ValueError, match="expected the description of a space"):
        space_from_json(saved)
