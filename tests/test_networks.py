"""Encoders, memories, heads and masks against NumPy, `torch.distributions` and hand numbers."""

import itertools
import math

import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector.utils import batch_space
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_policy import slow_cell
from torch.distributions import Categorical, Normal, kl_divergence

import dualhead.networks.linear
from dualhead import DataError, DualHeadRecurrentPPO, NetworkConfig
from dualhead.networks.encoders import JoinedEncoder, ObservationNormalizer, RunningNormalizer, vectors
from dualhead.networks.heads import DiagonalGaussian, FactoredCategorical, Heads, Mixed
from dualhead.networks.memory import RecurrentMemory, lay_out
from dualhead.networks.policy import RecurrentPolicy
from dualhead.spaces import ActionSpec, ObservationSpec, all_finite
from dualhead.types import RecurrentState, SegmentBatch

CPU = torch.device("cpu")
quick = settings(max_examples=40, deadline=None)


def make_encoder(space, *, image_encoder="auto", image_layout="auto"):
    """Without joining layers what comes out are the parts' features side by side."""
    spec = ObservationSpec(space)
    config = NetworkConfig(encoder_sizes=(), image_encoder=image_encoder, image_layout=image_layout)
    return JoinedEncoder(spec, config).double()


@torch.no_grad()
def encode(encoder, space, observations):
    """Features of observations, one batch of them."""
    batch = len(next(iter(observations.values())) if isinstance(observations, dict) else observations)
    features = encoder(tensors_of(space, observations, batch))
    assert features.shape == (batch, encoder.num_features)
    return features


def tensors_of(space, observations, batch=2, dtype=torch.float64):
    return ObservationSpec(space).to_tensors(observations, batch, device=CPU, dtype=dtype)


BOX = spaces.Box(-9, 9, (2,), np.float32)


@pytest.mark.parametrize(
    ("space", "observations", "features"),
    [
        (BOX, np.array([[1.5, -2.0], [3.0, 4.0]]), [[1.5, -2], [3, 4]]),
        (spaces.Box(0, 9, (), np.float32), np.array([5.0, 7.0]), [[5], [7]]),
        (spaces.Box(0, 200, (2,), np.uint8), np.array([[1, 200], [7, 0]], np.uint8), [[1, 200], [7, 0]]),
        (spaces.Discrete(3), np.array([0, 2]), [[1, 0, 0], [0, 0, 1]]),
        (spaces.Discrete(3, start=5), np.array([6, 5]), [[0, 1, 0], [1, 0, 0]]),
        (spaces.Discrete(2, start=-1), np.array([-1, 0]), [[1, 0], [0, 1]]),
        (spaces.MultiDiscrete([2, 3]), np.array([[1, 0], [0, 2]]), [[0, 1, 1, 0, 0], [1, 0, 0, 0, 1]]),
        (spaces.MultiDiscrete([2, 2], start=[4, -1]), np.array([[5, -1], [4, 0]]), [[0, 1, 1, 0], [1, 0, 0, 1]]),
        (spaces.MultiDiscrete([[2, 2], [2, 2]]), np.array([[[0, 1], [1, 0]]] * 2), [[1, 0, 0, 1, 0, 1, 1, 0]] * 2),
        (spaces.MultiBinary(3), np.array([[1, 0, 1], [0, 0, 1]], np.int8), [[1, 0, 1], [0, 0, 1]]),
        (spaces.MultiBinary([2, 2]), np.array([[[1, 0], [0, 1]]] * 2, bool), [[1, 0, 0, 1]] * 2),
        (
            spaces.Dict(a=spaces.Discrete(2), b=BOX, inner=spaces.Dict(x=spaces.Discrete(2))),
            {"b": np.array([[1.0, 2], [3, 4]]), "a": np.array([1, 0]), "inner": {"x": np.array([0, 1])}},
            [[0, 1, 1, 2, 1, 0], [1, 0, 3, 4, 0, 1]],
        ),
        (
            spaces.Tuple((BOX, spaces.Tuple((spaces.Discrete(2),)))),
            (np.array([[1.0, 2], [3, 4]]), (np.array([1, 0]),)),
            [[1, 2, 0, 1], [3, 4, 1, 0]],
        ),
        (
            spaces.Dict(x=BOX, action_mask=spaces.MultiBinary(4)),
            {"x": np.array([[1.0, 2], [3, 4]]), "action_mask": np.ones((2, 4), np.int8)},
            [[1, 2], [3, 4]],  # masks are for the heads alone
        ),
    ],
)
def test_features_of_every_kind_of_space(space, observations, features):
    assert encode(make_encoder(space), space, observations).tolist() == features


def test_a_sampled_nested_observation_fits_its_own_space():
    space = spaces.Dict(
        image=spaces.Box(0, 255, (6, 6, 3), np.uint8),
        inner=spaces.Tuple((spaces.Discrete(3, start=1), spaces.MultiBinary(2))),
        number=spaces.Box(-1, 1, (), np.float64),
    )
    space.seed(0)
    assert make_encoder(space)(tensors_of(space, space.sample(), 1)).shape == (1, 64 * 6 * 6 + 3 + 2 + 1)


@pytest.mark.parametrize("layout", ["auto", "chw", "hwc"])
def test_image_layouts_give_the_same_features(layout):
    """A uint8 image with channels first and last, by one set of convolutions, equals them applied to pixels / 255."""
    pixels = np.random.default_rng(0).integers(0, 256, size=(2, 3, 8, 7), dtype=np.uint8)
    layouts = {"chw": pixels, "hwc": pixels.transpose(0, 2, 3, 1)}
    kept = None
    for name, images in layouts.items():
        if layout not in ("auto", name):
            continue
        space = spaces.Box(0, 255, images.shape[1:], np.uint8)
        encoder = make_encoder(space, image_layout=layout)
        if kept is not None:
            encoder.load_state_dict(kept)
        kept = encoder.state_dict()
        features = encode(encoder, space, images)
        expected = encoder.parts[0].convolutions(torch.from_numpy(pixels / 255)).flatten(1)
        torch.testing.assert_close(features, expected, rtol=0, atol=1e-12)
    assert expected.shape == (2, 64 * 8 * 7)


@pytest.mark.parametrize(
    ("shape", "dtype", "channels", "num_features"),
    [
        # Mnih et al. 2015: (84 − 8)/4 + 1 = 20, (20 − 4)/2 + 1 = 9, 9 − 2 = 7; 64 · 7 · 7
        ((84, 84, 4), np.uint8, 4, 3136),
        ((4, 84, 84), np.uint8, 4, 3136),
        ((84, 84), np.uint8, 1, 3136),
        ((3, 36, 36), np.uint8, 3, 64),
        # 3x3 with padding 1 keeps the pixels
        ((5, 11, 11), np.float32, 5, 64 * 121),
        ((11, 11, 5), np.float32, 5, 64 * 121),
        ((4, 5), np.uint8, 1, 64 * 20),
    ],
)
def test_sizes_of_image_encoders(shape, dtype, channels, num_features):
    encoder = make_encoder(spaces.Box(0, 255, shape, dtype))
    assert encoder.parts[0].convolutions[0].in_channels == channels
    assert encoder.num_features == num_features


def test_nature_refuses_images_too_small_for_it():
    with pytest.raises(ValueError, match="at least 36 pixels"):
        make_encoder(spaces.Box(0, 255, (3, 20, 40), np.uint8), image_encoder="nature")


@pytest.mark.parametrize(
    ("low", "high", "divisor"),
    [(0, 255, 255.0), (0, 1, 1.0), (-255, 255, 1.0), (0, np.inf, 1.0), (0, np.finfo(np.float32).max, 1.0)],
)
def test_float_images_of_pixels_are_scaled(low, high, divisor):
    """From 0 to a bound they are pixels; other bounds say nothing about brightness."""
    image = np.full((1, 1, 3, 3), 200.0, np.float32)
    space = spaces.Box(low, high, (1, 3, 3), np.float32)
    encoder = make_encoder(space)
    features = encode(encoder, space, image)
    expected = encoder.parts[0].convolutions(torch.full((1, 1, 3, 3), 200.0 / divisor).double()).flatten(1)
    torch.testing.assert_close(features, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("space", "image_encoder"),
    [
        (spaces.Box(-1, 1, (4, 5), np.float32), "auto"),  # a stack of vectors
        (spaces.Box(0, 255, (10, 1), np.int64), "auto"),
        (spaces.Box(0, 255, (4, 5), np.uint8), "flat"),
        (spaces.Box(0, 255, (3, 2, 2), np.uint8), "flat"),
    ],
)
def test_two_axes_are_an_image_only_as_uint8(space, image_encoder):
    encoder = make_encoder(space, image_encoder=image_encoder)
    assert [leaf.name for leaf in vectors(ObservationSpec(space), image_encoder)] == ["observation"]
    x = space.sample()[None]
    np.testing.assert_array_equal(encode(encoder, space, x), x.reshape(1, -1))


@pytest.mark.parametrize(
    ("space", "named"),
    [
        (spaces.Text(5), "Text"),
        (spaces.Sequence(BOX), "Sequence"),
        (spaces.Graph(BOX, None), "Graph"),
        (spaces.Dict(a=BOX, word=spaces.Text(5)), "'word'"),
        (spaces.Dict(a=spaces.Dict(b=spaces.Sequence(BOX))), "'a/b'"),
        (spaces.Tuple((BOX, spaces.Graph(BOX, None))), "'1'"),
        (spaces.Dict(action_mask=spaces.MultiBinary(3)), "no part that a policy could look at"),
    ],
)
def test_unsupported_observation_spaces_are_named(space, named):
    with pytest.raises(TypeError, match=named):
        ObservationSpec(space)


@pytest.mark.parametrize(
    ("space", "observations", "message"),
    [
        (BOX, np.zeros((3, 2)), r"expected shape \(2, 2\).*got \(3, 2\)"),
        (BOX, np.zeros((2, 3)), r"expected shape \(2, 2\).*got \(2, 3\)"),
        (BOX, np.array([[0.0, 0], [0, np.nan]]), "'observation' of stream 1 is nan"),
        (BOX, np.array([[-np.inf, 0], [0, 0]]), "'observation' of stream 0 is -inf"),
        (BOX, torch.tensor([[0.0, 0], [np.inf, 0]]), "'observation' of stream 1 is inf"),
        (BOX, np.array([[None, 1], [0, 1]]), "array of objects"),
        (spaces.Discrete(3), np.array([0, 3]), "of stream 1 is 3"),
        (spaces.Discrete(3, start=1), np.array([0, 3]), "of stream 0 is 0"),
        (spaces.MultiDiscrete([2, 3]), np.array([[0, 0], [1, 3]]), "of stream 1 is 3"),
        (spaces.Discrete(3), np.array([0.0, 1.0]), "expected int64, got torch.float64"),
        (BOX, np.array([[0.0, 0], [1e39, 0]]), "'observation' of stream 1 is inf|of stream 1 is 1e\\+39"),
        (spaces.Dict(a=BOX, b=BOX), {"a": np.zeros((2, 2))}, r"'b' is missing: got a dict with keys \['a'\]"),
        (spaces.Dict(a=BOX), np.zeros((2, 2)), "'a' is missing: got a ndarray"),
        (spaces.Dict(a=spaces.Dict(b=BOX)), {"a": {"c": 1}}, r"'a/b' is missing: got a dict with keys \['c'\]"),
        (spaces.Tuple((BOX, BOX)), (np.zeros((2, 2)),), "'1' is missing: got a tuple of 1"),
        (spaces.Dict(a=BOX, b=BOX), {"a": np.zeros((2, 2)), "b": np.full((2, 2), np.nan)}, "'b' of stream 0 is nan"),
    ],
)
def test_observations_that_do_not_fit_are_refused(space, observations, message):
    with pytest.raises(DataError, match=message):
        tensors_of(space, observations, dtype=torch.float32)


def test_finite_is_said_of_numbers_and_not_of_their_sum():
    for numbers in ([3e38, 3e38, math.inf], [math.nan, 0.0]):
        assert not all_finite(torch.tensor(numbers))
    x = np.full((2, 2), 3e38, np.float32)
    space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    assert tensors_of(space, x, dtype=torch.float32)["observation"].tolist() == x.tolist()


def test_one_stream_may_come_without_its_batch_axis():
    for observations in ({"x": np.ones(2), "n": 2}, {"x": np.ones((1, 2)), "n": np.array([2])}):
        tensors = tensors_of(spaces.Dict(x=BOX, n=spaces.Discrete(3)), observations, 1, torch.float32)
        assert (tensors["x"].shape, tensors["n"].tolist()) == ((1, 2), [2])
        assert tensors["x"].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_running_normaliser_against_numpy(dtype):
    """Statistics stay in float64 in a float32 policy: a float32 count no longer grows after 2²⁴ steps."""
    rng = np.random.default_rng(0)
    spec = ObservationSpec(spaces.Box(-np.inf, np.inf, (3,), np.float64))
    policy = RecurrentPolicy(
        spec, ActionSpec(spaces.Discrete(2)), config=NetworkConfig.spec(hidden_size=4), normalize_observations=True
    ).to(dtype)
    # Far from zero and narrow: what cancels catastrophically in float32, or in E[x²] − E[x]².
    batches = [rng.normal([1000, 0, -5], [0.1, 1, 30], size=(n, 3)) for n in (1, 50, 7, 200)]
    for batch in batches:
        policy.normalizer.update({"observation": torch.from_numpy(batch)})
    everything = np.concatenate(batches)
    (normalizer,) = policy.normalizer.of_leaf
    np.testing.assert_allclose(normalizer.mean, everything.mean(0), rtol=1e-12)
    np.testing.assert_allclose(normalizer.variance, everything.var(0), rtol=1e-9)
    assert normalizer.count.item() == 258
    expected = np.clip((batches[1] - everything.mean(0)) / np.sqrt(everything.var(0) + 1e-8), -10, 10)
    np.testing.assert_allclose(normalizer(torch.from_numpy(batches[1])), expected, rtol=1e-7)
    far = normalizer(torch.tensor([[2000.0, 50.0, -5000.0]]).double())
    assert far.tolist() == [[10, 10, -10]]
    x = torch.tensor([[1.0, -2.0]]).double()  # without statistics nothing is scaled
    torch.testing.assert_close(RunningNormalizer((2,)).double()(x), x, rtol=1e-7, atol=0)


def test_vectors_of_floats_and_integers_are_normalised():
    space = spaces.Dict(
        flags=spaces.MultiBinary(2),
        image=spaces.Box(0, 1, (1, 5, 5), np.float32),
        index=spaces.Discrete(3),
        ints=spaces.Box(0, 9, (2,), np.int64),
        stack=spaces.Box(-1, 1, (3, 2), np.float32),
        vector=BOX,
        number=spaces.Box(-1, 1, (), np.float32),
    )
    normalizer = ObservationNormalizer(vectors(ObservationSpec(space)))
    assert normalizer.names == ("ints", "stack", "vector", "number")
    space.seed(0)
    samples = [space.sample() for _ in range(50)]
    seen = tensors_of(space, {name: np.stack([sample[name] for sample in samples]) for name in space.spaces}, 50)
    normalizer.update(seen)
    scaled = normalizer(seen, torch.float64)
    for name, leaf in seen.items():
        x = leaf.numpy().astype(np.float64)
        expected = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-8) if name in normalizer.names else x
        np.testing.assert_allclose(scaled[name], expected, rtol=1e-9, atol=1e-12, err_msg=name)
        assert scaled[name].shape == leaf.shape


def slow_unroll(memory, x, state):
    """Steps x [T, B, F] from a state: top-layer h [T, B, H] and the final h and c, [L, B, H]."""
    cell = getattr(memory, memory.kind)
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    layers = range(memory.num_layers)
    weights = [[getattr(cell, f"{name}_l{layer}").detach().numpy() for name in names] for layer in layers]
    h = state.h.numpy().copy()
    c = np.zeros_like(h) if "c" not in state.parts else state.c.numpy().copy()
    outputs = []
    for inputs in x:
        for layer, layer_weights in enumerate(weights):
            h[layer], c[layer] = slow_cell(memory.kind, inputs, h[layer], c[layer], *layer_weights)
            inputs = h[layer]
        outputs.append(inputs.copy())
    return np.stack(outputs), h, c


def make_memory(kind, num_layers, seed=0):
    torch.manual_seed(seed)
    memory = RecurrentMemory(kind, 3, hidden_size=4, num_layers=num_layers).double()
    for name, parameter in memory.named_parameters():
        if "bias" in name:
            torch.nn.init.normal_(parameter)
    return memory


def random_state(memory, batch, seed=0):
    generator = torch.Generator().manual_seed(seed)
    zeros = memory.initial_state(batch, device=CPU, dtype=torch.float64)
    return zeros.map(lambda part: torch.randn(part.shape, generator=generator, dtype=torch.float64))


every_memory = pytest.mark.parametrize(("kind", "num_layers"), [("lstm", 1), ("lstm", 2), ("gru", 1), ("gru", 2)])


@pytest.mark.parametrize("num_streams", [1, 5, 80], ids=["one stream", "few", "many"])
@every_memory
def test_steps_of_a_memory_equal_numpy(kind, num_layers, num_streams):
    memory = make_memory(kind, num_layers)
    state = random_state(memory, num_streams)
    x = np.random.default_rng(1).normal(size=(6, num_streams, 3))
    outputs, h, c = slow_unroll(memory, x, state)
    for t in range(6):
        with torch.no_grad():
            output, state = memory.step(torch.from_numpy(x[t]), state)
        np.testing.assert_allclose(output, outputs[t], rtol=0, atol=1e-12)
    np.testing.assert_allclose(state.h, h, rtol=0, atol=1e-12)
    if kind == "lstm":
        np.testing.assert_allclose(state.c, c, rtol=0, atol=1e-12)
    else:
        assert list(state.parts) == ["h"]


@every_memory
@pytest.mark.parametrize("block_cost", [0.0, 1e6])
def test_unrolled_segments_equal_numpy_one_by_one(kind, num_layers, block_cost):
    memory = make_memory(kind, num_layers)
    lengths = np.array([7, 7, 5, 2, 1, 1])
    state = random_state(memory, len(lengths))
    rng = np.random.default_rng(1)
    sequences = [rng.normal(size=(n, 1, 3)) for n in lengths]
    segment, step, layout = lay_out(lengths, block_cost=block_cost)
    assert (layout.padding is None) == (block_cost == 0)
    features = torch.from_numpy(np.stack([sequences[s][t, 0] for s, t in zip(segment, step)])).requires_grad_()
    outputs, final = memory.unroll(features, state, layout)
    for s, x in enumerate(sequences):
        expected, h, c = slow_unroll(memory, x, state.select(torch.tensor([s])))
        ours = outputs.detach()[torch.from_numpy(np.flatnonzero(segment == s))]
        np.testing.assert_allclose(ours, expected[:, 0], rtol=0, atol=1e-12)
        if block_cost == 0:
            np.testing.assert_allclose(final.h[:, s].detach(), h[:, 0], rtol=0, atol=1e-12)
            if kind == "lstm":
                np.testing.assert_allclose(final.c[:, s].detach(), c[:, 0], rtol=0, atol=1e-12)
    # Nothing leaks from one segment into another, backwards either.
    (gradient,) = torch.autograd.grad(outputs[torch.from_numpy(segment == 2)].sum(), features)
    touched = gradient.abs().sum(1) > 0
    assert touched.tolist() == (segment == 2).tolist()


def make_policy(kind="lstm", observation_space=BOX, action_space=None, **settings):
    torch.manual_seed(0)
    return RecurrentPolicy(
        ObservationSpec(observation_space),
        ActionSpec(action_space or spaces.MultiDiscrete([3, 2])),
        config=NetworkConfig.spec(memory=kind, hidden_size=6, encoder_sizes=(5,), **settings),
    )


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_initial_weights_are_orthogonal_and_biases_zero(kind):
    policy = make_policy(kind, num_layers=2)
    gains = {"heads": math.sqrt(2), "critic": math.sqrt(2), "encoder": math.sqrt(2), "memory": 1.0}
    for name, parameter in policy.named_parameters():
        if "bias" in name:
            assert not parameter.any(), name
            continue
        matrix = parameter.detach().flatten(1)
        gram = matrix @ matrix.T if matrix.shape[0] < matrix.shape[1] else matrix.T @ matrix
        expected = torch.eye(len(gram)) * gains[name.split(".")[0]] ** 2
        torch.testing.assert_close(gram, expected, rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_options_of_the_initialisation(kind):
    policy = make_policy(kind, forget_bias=1.0, orthogonal_per_gate=True, head_gain=0.01, num_layers=2)
    for layer in (0, 1):
        cell = policy.memory.cell
        biases = getattr(cell, f"bias_ih_l{layer}") + getattr(cell, f"bias_hh_l{layer}")
        # Gates are input, forget, cell, output; or reset, update, new. The second keeps the past.
        expected = [[0.0] * 6, [1.0] * 6, [0.0] * 6, [0.0] * 6]
        assert biases.view(-1, 6).tolist() == expected[: 4 if kind == "lstm" else 3]
        for gate in getattr(cell, f"weight_hh_l{layer}").split(6):
            torch.testing.assert_close(gate @ gate.T, torch.eye(6), rtol=0, atol=1e-5)
    for head in policy.heads.linears:
        torch.testing.assert_close(head.weight @ head.weight.T, torch.eye(len(head.weight)) * 1e-4, rtol=0, atol=1e-8)
    critic = policy.critic.weight
    assert critic.square().sum().item() == pytest.approx(2.0, rel=1e-5)


def test_the_initial_deviation_of_actions_in_a_box():
    box = spaces.Box(np.float32(-2), np.float32(2), (3,))
    network = NetworkConfig(hidden_size=4, log_std_init=-1.5)
    agent = DualHeadRecurrentPPO(spaces.Box(-1, 1, (2,)), box, num_streams=4000, network=network)
    actions = agent.act(np.zeros((4000, 2), np.float32))
    # Half the box's width is 2; the error of a deviation over 4000 draws is 1.1%.
    np.testing.assert_allclose(actions.std(0), 2 * math.exp(-1.5), rtol=5 * 0.0112)


@pytest.mark.parametrize("num_steps", [1, 40])
@pytest.mark.parametrize("kind", ["lstm", "gru", "none"])
def test_single_precision_is_double_precision_to_rounding(kind, num_steps, monkeypatch):
    """Outputs and gradients: large float32 layers have ways of their own, taken here by small ones too."""
    monkeypatch.setattr(dualhead.networks.linear, "MIN_PRODUCTS", 0)
    outputs, gradients = [], []
    for dtype in (torch.float32, torch.float64):
        policy = make_policy(kind, observation_space=spaces.Dict(x=BOX, image=spaces.Box(0, 1, (2, 5, 5))))
        generator = torch.Generator().manual_seed(0)
        for name, parameter in policy.named_parameters():
            if "bias" in name:
                parameter.data.normal_(generator=generator)
        policy.to(dtype)
        observations = {
            "image": torch.rand(num_steps, 2, 5, 5, generator=generator).to(dtype),
            "x": torch.randn(num_steps, 2, generator=generator).to(dtype),
        }
        _, _, layout = lay_out(np.array([num_steps]), block_cost=0.0)
        output = policy.evaluate(SegmentBatch(observations, policy.initial_state(1), layout, *[None] * 5))
        outputs.append(torch.cat([*output.distribution.logits, output.values[:, None]], dim=1))
        outputs[-1].square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in policy.named_parameters()})
        assert outputs[-1].dtype == dtype
    torch.testing.assert_close(outputs[0].double(), outputs[1], rtol=1e-4, atol=1e-5)
    for name, gradient in gradients[0].items():
        scale = gradients[1][name].abs().max().item()
        torch.testing.assert_close(gradient.double(), gradients[1][name], rtol=1e-3, atol=1e-4 * scale, msg=name)


def test_recurrent_state():
    h = torch.arange(12.0).view(2, 3, 2)
    state = RecurrentState(h, -h)
    unpacked_h, unpacked_c = state
    assert unpacked_h is h
    assert torch.equal(unpacked_c, -h)
    reset = state.reset_where(torch.tensor([False, True, False]))
    assert reset.h.tolist() == [[[0, 1], [0, 0], [4, 5]], [[6, 7], [0, 0], [10, 11]]]
    assert torch.equal(reset.c, -reset.h)
    assert torch.equal(h, torch.arange(12.0).view(2, 3, 2))
    assert state.select(torch.tensor([2, 0])).c.tolist() == [[[-4, -5], [0, -1]], [[-10, -11], [-6, -7]]]
    assert state.select(torch.tensor([False, True, False])).h.tolist() == [[[2, 3]], [[8, 9]]]
    assert list(RecurrentState(h).reset_where(torch.tensor([True] * 3)).parts) == ["h"]
    assert not RecurrentState(h.requires_grad_()).detach().h.requires_grad
    matrices = RecurrentState(matrix=torch.ones(1, 3, 2, 2), count=torch.ones(1, 3, dtype=torch.int64))
    halved = matrices.reset_where(torch.tensor([False, True, True])).select(slice(0, 2))
    assert halved.parts["matrix"].sum((0, 2, 3)).tolist() == [4, 0]
    assert halved.parts["count"].tolist() == [[1, 0]]
    assert RecurrentState(h, -h).to("cpu").c is not None


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_boxes_as_wide_as_numbers_go_have_finite_actions(dtype):
    """high - low would overflow."""
    largest = np.finfo(dtype).max
    space = spaces.Box(-largest, largest, (2,), dtype)
    actions = ActionSpec(space).to_env(torch.tensor([[-1.0, 0.5], [9.0, 0.0]]), numpy=True)
    np.testing.assert_array_equal(actions, np.array([[-largest, largest / 2], [largest, 0.0]], dtype))


@pytest.mark.parametrize(
    ("space", "heads", "indices", "expected"),
    [
        (spaces.Discrete(3), {"action": 3}, [[0], [2]], [0, 2]),
        (spaces.Discrete(3, start=5), {"action": 3}, [[0], [2]], [5, 7]),
        (spaces.MultiDiscrete([3, 2]), {"head_0": 3, "head_1": 2}, [[2, 0], [1, 1]], [[2, 0], [1, 1]]),
        (spaces.MultiDiscrete([3, 2], start=[1, -1]), {"head_0": 3, "head_1": 2}, [[2, 0], [0, 1]], [[3, -1], [1, 0]]),
        (
            spaces.Dict(vote=spaces.Discrete(2, start=1), move=spaces.MultiDiscrete([4, 3])),
            {"move_0": 4, "move_1": 3, "vote": 2},
            [[3, 2, 1], [0, 1, 0]],
            {"move": [[3, 2], [0, 1]], "vote": [2, 1]},
        ),
        (
            spaces.MultiDiscrete([[2, 3], [4, 5]], start=[[0, 1], [-2, 7]]),
            {"head_0_0": 2, "head_0_1": 3, "head_1_0": 4, "head_1_1": 5},
            [[1, 2, 3, 4], [0, 1, 0, 0]],
            [[[1, 3], [1, 11]], [[0, 2], [-2, 7]]],
        ),
        (spaces.MultiBinary(2), {"head_0": 2, "head_1": 2}, [[1, 0], [1, 1]], [[1, 0], [1, 1]]),
        (
            spaces.Tuple((spaces.Discrete(2, start=1), spaces.Dict(on=spaces.MultiBinary((1, 2))), spaces.Tuple(()))),
            {"0": 2, "1/on_0_0": 2, "1/on_0_1": 2},
            [[1, 0, 1], [0, 1, 0]],
            ([2, 1], {"on": [[[0, 1]], [[1, 0]]]}, ()),
        ),
    ],
)
def test_heads_and_their_actions_in_the_environment_s_form(space, heads, indices, expected):
    spec = ActionSpec(space)
    assert dict(zip(spec.names, spec.nvec)) == heads
    columns = [list(heads).index(name) for name in spec.names]
    given = spec.to_env(torch.tensor(indices)[:, columns], numpy=True)
    assert as_lists(given) == expected
    assert batch_space(space, 2).contains(given)


def as_lists(actions):
    if isinstance(actions, dict):
        return {key: as_lists(part) for key, part in actions.items()}
    return tuple(map(as_lists, actions)) if isinstance(actions, tuple) else actions.tolist()


MIXED = spaces.Dict(
    by=spaces.Tuple((spaces.Box(-2, 2, (2, 2)), spaces.Discrete(300, start=-5))),
    force=spaces.Box(0.0, 4.0, (), np.float64),
    on=spaces.MultiBinary(2),
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_discrete_and_box_actions_together(dtype):
    """Columns: the indices of by/1, on_0 and on_1, then four numbers of by/0 and one of force."""
    spec = ActionSpec(MIXED)
    assert spec.names == ("by/1", "on_0", "on_1", "by/0", "force")
    assert (spec.nvec, spec.box_sizes, spec.num_columns) == ((300, 2, 2), (4, 1), 8)
    assert spec.dtype(dtype) == dtype
    chosen = torch.tensor([[299, 0, 1, 0.5, -0.5, 9, 0, 0.25], [0, 1, 1, 0, 0, 0, -1, -3]], dtype=dtype)
    given = spec.to_env(chosen, numpy=True)
    boxes = [[[1, -1], [2, 0]], [[0, 0], [0, -2]]]
    assert as_lists(given) == {"by": (boxes, [294, -5]), "force": [2.5, 0], "on": [[0, 1], [1, 1]]}
    assert batch_space(MIXED, 2).contains(given)
    assert as_lists(spec.to_env(chosen, numpy=False)) == as_lists(given)


def test_box_actions_are_scaled_where_bounded():
    low, high = np.array([-2, 0, -np.inf], np.float32), np.array([2, 10, np.inf], np.float32)
    space = spaces.Box(low, high)
    spec = ActionSpec(space)
    assert (spec.names, spec.num_columns, spec.nvec, spec.box_sizes) == (("action",), 3, (), (3,))
    actions = spec.to_env(torch.tensor([[0.5, 0.5, 0.5], [-9.0, 9.0, 9.0], [0.0, -1.0, -7.5]]), numpy=True)
    assert actions.tolist() == [[1, 7.5, 0.5], [-2, 10, 9], [0, 0, -7.5]]
    assert actions.dtype == np.float32
    assert all(space.contains(action) for action in actions)
    half_bounded = spaces.Box(np.array([0.0, -np.inf], np.float32), np.array([np.inf, 2.0], np.float32))
    assert half_bounded.contains(ActionSpec(half_bounded).to_env(torch.tensor([[-5.0, 5.0]]), numpy=True)[0])


@quick
@given(
    st.floats(-1e6, 1e6, width=32),
    st.floats(2**-10, 1e6, width=32),
    st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=5),
)
def test_scaled_actions_never_leave_a_bounded_box(low, span, actions):
    space = spaces.Box(np.float32(low), np.float32(low) + np.float32(span), (1,), np.float32)
    for action in [*actions, 1.0, -1.0]:
        assert space.contains(ActionSpec(space).to_env(torch.tensor([[action]], dtype=torch.float32), numpy=True)[0])


@pytest.mark.parametrize(
    "space",
    [
        spaces.Text(3),
        spaces.Box(0, 5, (2,), np.int64),
        spaces.Dict(a=spaces.Discrete(2), b=spaces.Sequence(BOX)),
        spaces.Dict(a=spaces.Discrete(2), b=spaces.Box(0, 5, (0,))),
        spaces.Tuple(()),
    ],
)
def test_unsupported_action_spaces(space):
    with pytest.raises(TypeError, match="unsupported action space"):
        ActionSpec(space)


@pytest.mark.parametrize("space", [spaces.MultiBinary(10**12), spaces.Tuple([spaces.MultiBinary(2000)] * 6)])
def test_too_many_heads_are_refused_before_they_are_made(space):
    with pytest.raises(ValueError, match="more than 10,000 heads"):
        ActionSpec(space)


def test_two_heads_of_one_name_are_refused():
    with pytest.raises(ValueError, match="'a/b'"):
        ActionSpec(spaces.Dict({"a/b": spaces.Discrete(2), "a": spaces.Dict(b=BOX)}))


NVEC = (4, 3)
LOGITS = torch.tensor([[0.3, -1.0, 2.0, 0.5, 1.0, -2.0, 0.0], [5.0, 5.0, -5.0, 0.0, 0.1, 0.2, 0.3]]).double()
MASK = torch.tensor([[1, 0, 1, 1, 0, 1, 0], [0, 0, 1, 0, 1, 1, 1]]).bool()


def independent(logits=LOGITS, mask=None):
    """The same heads by torch.distributions."""
    if mask is not None:
        logits = logits.masked_fill(~mask, -1e30)
    return [Categorical(logits=part) for part in logits.split(NVEC, dim=-1)]


@pytest.mark.parametrize("mask", [None, MASK], ids=["free", "masked"])
def test_categorical_heads_against_torch_distributions(mask):
    ours, theirs = FactoredCategorical(LOGITS, NVEC, mask), independent(mask=mask)
    assert ours.mode().tolist() == [[2, 0], [0, 2]] if mask is None else [[2, 1], [2, 2]]
    for actions in itertools.product(range(4), range(3)):
        actions = torch.tensor([actions, actions])
        expected = torch.stack([d.log_prob(actions[:, k]) for k, d in enumerate(theirs)], dim=1)
        found = ours.log_probs(actions)
        possible = expected > -1e20
        torch.testing.assert_close(found[possible], expected[possible], rtol=0, atol=1e-12)
        assert (found[~possible].exp() == 0).all()
    expected = torch.stack([d.entropy() for d in theirs], dim=1)
    torch.testing.assert_close(ours.entropies(), expected, rtol=0, atol=1e-12)
    others = LOGITS.flip(0) * 0.5
    kl = sum(kl_divergence(p, q) for p, q in zip(independent(others, mask), theirs))
    found = ours.kl_from(FactoredCategorical(others, NVEC, mask))
    torch.testing.assert_close(found, kl, rtol=0, atol=1e-12)
    assert (ours.kl_from(ours) == 0).all()


def test_entropy_and_gradients_ignore_masked_choices():
    """Two of three choices, equally likely: ln 2, whatever the third one's logit is; one choice: 0."""
    logits = torch.tensor([[1.0, 1.0, 70.0]], dtype=torch.float64, requires_grad=True)
    masked = FactoredCategorical(logits, (3,), torch.tensor([[True, True, False]]))
    assert masked.entropies().item() == pytest.approx(math.log(2))
    (gradient,) = torch.autograd.grad(masked.entropies().sum() + masked.log_probs(torch.tensor([[0]])).sum(), logits)
    assert gradient.tolist() == pytest.approx(np.array([[0.5, -0.5, 0.0]]))
    single = FactoredCategorical(logits, (3,), torch.tensor([[False, True, False]]))
    assert single.entropies().item() == 0
    assert single.log_probs(torch.tensor([[1]])).item() == 0
    (gradient,) = torch.autograd.grad(single.entropies().sum(), logits)
    assert gradient.tolist() == [[0, 0, 0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samples_are_as_frequent_as_they_are_likely(dtype):
    """20,000 draws: each choice within five binomial deviations, masked choices never."""
    num_draws = 20_000
    logits, mask = (part[:1].expand(num_draws, -1) for part in (LOGITS.to(dtype), MASK))
    generator = torch.Generator().manual_seed(0)
    for masked in (False, True):
        actions = FactoredCategorical(logits, NVEC, mask if masked else None).sample(generator)
        assert actions.shape == (num_draws, 2)
        for k, head in enumerate(independent(mask=MASK if masked else None)):
            p = head.probs[0].numpy()
            frequency = np.bincount(actions[:, k], minlength=NVEC[k]) / num_draws
            assert (abs(frequency - p) <= 5 * np.sqrt(p * (1 - p) / num_draws)).all()
            assert (frequency[p == 0] == 0).all()
    # Heads are drawn independently of each other.
    together = np.histogram2d(actions[:, 0], actions[:, 1], bins=(range(5), range(4)))[0] / num_draws
    expected = np.outer(*(head.probs[0].numpy() for head in independent(mask=MASK)))
    assert abs(together - expected).max() < 5 * 0.5 / math.sqrt(num_draws)


def test_samples_come_from_the_generator_alone():
    distribution = FactoredCategorical(torch.zeros(100, 7), NVEC)
    gaussian = DiagonalGaussian(torch.zeros(100, 2), torch.zeros(2))
    for each in (distribution, gaussian):
        torch.manual_seed(0)
        first = each.sample(torch.Generator().manual_seed(3))
        torch.manual_seed(1)
        assert torch.equal(first, each.sample(torch.Generator().manual_seed(3)))
        assert not torch.equal(first, each.sample(torch.Generator().manual_seed(4)))


def test_gaussian_against_torch_distributions():
    generator = torch.Generator().manual_seed(0)
    mean, other_mean, actions = torch.randn(3, 6, 2, generator=generator).double().unbind(0)
    log_std, other_log_std = torch.tensor([[-0.7, 0.4], [0.2, -0.1]]).double().unbind(0)
    ours, theirs = DiagonalGaussian(mean, log_std), Normal(mean, log_std.exp())
    other = Normal(other_mean, other_log_std.exp())
    torch.testing.assert_close(ours.log_probs(actions)[:, 0], theirs.log_prob(actions).sum(1), rtol=0, atol=1e-12)
    torch.testing.assert_close(ours.entropies()[:, 0], theirs.entropy().sum(1), rtol=0, atol=1e-12)
    kl = ours.kl_from(DiagonalGaussian(other_mean, other_log_std))
    torch.testing.assert_close(kl, kl_divergence(other, theirs).sum(1), rtol=0, atol=1e-12)
    assert torch.equal(ours.mode(), mean)
    draws = DiagonalGaussian(mean[:1].expand(20_000, 2), log_std).sample(generator)
    # Means of 20,000 deviate by σ/141, deviations by σ/200.
    assert ((draws.mean(0) - mean[0]).abs() < 5 * log_std.exp() / 141).all()
    assert ((draws.std(0) / log_std.exp() - 1).abs() < 5 / 200).all()


def test_mixed_heads_against_torch_distributions():
    """Two masked categorical heads, then a Gaussian head of two numbers and one of a single number."""
    generator = torch.Generator().manual_seed(0)
    mean, other_mean, numbers = torch.randn(3, 2, 3, generator=generator).double().unbind(0)
    log_std, other_log_std = torch.tensor([[-0.7, 0.4, 0.1], [0.2, -0.1, -1.0]]).double().unbind(0)

    def mixed(logits, mean, log_std):
        ours = Mixed(FactoredCategorical(logits, NVEC, MASK), DiagonalGaussian(mean, log_std, (2, 1)))
        return ours, independent(logits, MASK), Normal(mean, log_std.exp())

    def all_heads(of_categorical, of_numbers):
        return torch.stack([*of_categorical, of_numbers[:, :2].sum(1), of_numbers[:, 2]], dim=1)

    ours, categorical, normal = mixed(LOGITS, mean, log_std)
    indices = torch.tensor([[3, 1], [2, 1]])
    found = ours.log_probs(torch.cat([indices, numbers], dim=1))
    expected = all_heads([d.log_prob(i) for d, i in zip(categorical, indices.T)], normal.log_prob(numbers))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    expected = all_heads([d.entropy() for d in categorical], normal.entropy())
    torch.testing.assert_close(ours.entropies(), expected, rtol=0, atol=1e-12)
    others, other_categorical, other_normal = mixed(LOGITS.flip(0) * 0.5, other_mean, other_log_std)
    kl = all_heads(
        [kl_divergence(p, q) for p, q in zip(other_categorical, categorical)], kl_divergence(other_normal, normal)
    )
    torch.testing.assert_close(ours.kl_from(others), kl.sum(1), rtol=0, atol=1e-12)
    assert torch.equal(ours.mode(), torch.cat([torch.tensor([[2, 1], [2, 2]]), mean], dim=1))

    num_draws = 20_000
    logits, means, mask = (part[:1].expand(num_draws, -1) for part in (LOGITS, mean, MASK))
    draws = Mixed(FactoredCategorical(logits, NVEC, mask), DiagonalGaussian(means, log_std, (2, 1))).sample(generator)
    for k, head in enumerate(categorical):
        frequency = np.bincount(draws[:, k].long(), minlength=NVEC[k]) / num_draws
        p = head.probs[0].numpy()
        assert (abs(frequency - p) <= 5 * np.sqrt(p * (1 - p) / num_draws)).all()
    assert ((draws[:, 2:].mean(0) - mean[0]).abs() < 5 * log_std.exp() / 141).all()
    # Independent of each other: correlations of 20,000 deviate by 1/141. The second head has one choice.
    correlations = torch.corrcoef(draws[:, [0, 2, 3, 4]].T) - torch.eye(4)
    assert correlations.abs().max() < 5 / 141


def test_indices_stay_exact_beside_numbers_under_autocast():
    """bfloat16 has no integers from 257 on, except even ones."""
    policy = make_policy(action_space=spaces.Tuple((spaces.Discrete(3000), BOX)))
    with torch.no_grad():
        policy.heads.linears[0].bias[2999] = 50.0
        with torch.autocast("cpu", torch.bfloat16):
            output, _ = policy.step({"observation": torch.ones(4, 2)}, policy.initial_state(4))
            drawn = [output.distribution.mode(), output.distribution.sample(torch.Generator().manual_seed(0))]
            assert output.distribution.gaussian.mean.dtype == torch.bfloat16
            assert output.distribution.log_probs(drawn[1]).isfinite().all()
    for actions in drawn:
        assert actions.dtype == torch.float32
        assert (actions[:, 0] == 2999).all()


DUAL = spaces.Dict(move=spaces.Discrete(4), vote=spaces.Discrete(3))
MASKS = {
    "whole": spaces.MultiBinary(7),
    "per head": spaces.Dict(vote=spaces.MultiBinary(3), move=spaces.MultiBinary(4)),  # heads come as move, vote
    "of one head": spaces.Dict(vote=spaces.MultiBinary(3)),
}


def with_mask(form, mask):
    """A space with masks of this form, and an observation of `mask` [N, 7]."""
    space = spaces.Dict(x=BOX, action_mask=MASKS[form])
    given = mask if form == "whole" else {"vote": mask[:, 4:], "move": mask[:, :4]}
    observations = {"x": np.ones((len(mask), 2)), "action_mask": given}
    return space, tensors_of(space, observations, len(mask), torch.float32)


@pytest.mark.parametrize("form", ["whole", "per head"])
def test_masks_reach_their_heads(form):
    space, tensors = with_mask(form, MASK.numpy().astype(np.int8))
    policy = make_policy(observation_space=space, action_space=DUAL)
    output, _ = policy.step(tensors, policy.initial_state(2))
    assert torch.cat([head.exp() > 0 for head in output.distribution.logits], dim=1).tolist() == MASK.tolist()
    free, _ = make_policy(action_space=DUAL).step({"observation": tensors["x"]}, policy.initial_state(2))
    for masked, unmasked, allowed in zip(
        output.distribution.logits, free.distribution.logits, MASK.split((4, 3), dim=1)
    ):
        expected = torch.where(allowed, unmasked.exp(), 0.0)
        torch.testing.assert_close(masked.exp(), expected / expected.sum(1, keepdim=True), rtol=1e-5, atol=1e-7)


def test_masks_of_a_mixed_space_are_nested_as_its_actions():
    """A mask for two of the three categorical heads; Boxes have none."""
    parts = spaces.Dict(by=BOX, kind=spaces.Discrete(3)), spaces.Dict(on=spaces.MultiBinary(2))
    mask = spaces.Tuple((spaces.Dict(kind=spaces.MultiBinary(3)), spaces.Dict(on_1=spaces.MultiBinary(2))))
    space = spaces.Dict(x=BOX, action_mask=mask)
    policy = make_policy(observation_space=space, action_space=spaces.Tuple(parts))
    allowed = ({"kind": np.array([[0, 1, 1], [1, 0, 0]])}, {"on_1": np.array([[1, 0], [1, 1]])})
    seen = tensors_of(space, {"x": np.ones((2, 2)), "action_mask": allowed}, 2, torch.float32)
    kind, on_0, on_1 = [[0, 1, 1], [1, 0, 0]], [[1, 1], [1, 1]], [[1, 0], [1, 1]]
    assert policy.heads.mask(seen).int().tolist() == [[*a, *b, *c] for a, b, c in zip(kind, on_0, on_1)]
    output, _ = policy.step(seen, policy.initial_state(2))
    drawn = torch.stack([output.distribution.sample() for _ in range(50)])
    assert [set(column.tolist()) for column in drawn[:, 0, :3].T] == [{1, 2}, {0, 1}, {0}]
    assert set(drawn[:, 1, 0].tolist()) == {0}
    of_a_box = spaces.Dict(x=BOX, action_mask=spaces.Tuple((spaces.Dict(by=spaces.MultiBinary(2)),)))
    with pytest.raises(ValueError, match="'0/by': 2"):
        make_policy(observation_space=of_a_box, action_space=spaces.Tuple(parts))


def test_a_mask_for_one_of_two_heads_leaves_the_other_free():
    space, tensors = with_mask("of one head", np.array([[0, 0, 0, 0, 0, 1, 0]]))
    heads = Heads(6, ActionSpec(DUAL), ObservationSpec(space).masks)
    assert heads.mask(tensors).tolist() == [[True] * 4 + [False, True, False]]


@pytest.mark.parametrize(
    ("mask", "action_space", "message"),
    [
        (spaces.MultiBinary(6), DUAL, "expected one array of 7 entries"),
        (spaces.Dict(move=spaces.MultiBinary(3)), DUAL, "'move': 3"),
        (spaces.Dict(jump=spaces.MultiBinary(4)), DUAL, "'jump': 4"),
        (spaces.Tuple((spaces.MultiBinary(4), spaces.MultiBinary(3))), DUAL, "does not fit the heads"),
        (spaces.MultiBinary(2), BOX, "needs discrete heads"),
    ],
)
def test_masks_that_fit_no_head_are_refused(mask, action_space, message):
    with pytest.raises(ValueError, match=message):
        make_policy(observation_space=spaces.Dict(x=BOX, action_mask=mask), action_space=action_space)


@pytest.mark.parametrize("form", ["whole", "per head"])
def test_a_head_without_a_legal_choice_is_named(form):
    space, tensors = with_mask(form, np.array([[1, 1, 1, 1, 0, 1, 0], [1, 0, 0, 0, 0, 0, 0]], np.int8))
    heads = Heads(6, ActionSpec(DUAL), ObservationSpec(space).masks)
    with pytest.raises(DataError, match="stream 1 allows no choice for head 'vote'"):
        heads.check_mask(tensors)
