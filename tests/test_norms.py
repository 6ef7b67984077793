"""NormEnforcer against hand numbers, its closed forms and a plain Python oracle."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dualhead.config import NormConfig
from dualhead.norms import NormEnforcer, NormEvents, guilt_outweighs_until, holding_rate, steps_until

NUMBERS = {"decay_rate": 0.995, "internalization_threshold": 5.0, "max_norm_strength": 10.0, "intrinsic_scale": -0.5}
HARMFUL = 2  # action index, in head 1 of 3


def make(num_streams: int, mode: str = "resource", resources: Any = ("A",), **changes: Any) -> NormEnforcer:
    if mode == "action":
        changes = {"harmful_action": HARMFUL, "harmful_head": 1, **changes}
    enforcer = NormEnforcer(num_streams, resources=resources, mode=mode, **{**NUMBERS, **changes})
    return enforcer.to(torch.float64)


def advance(enforcer: NormEnforcer, punished: Any, transgressed: Any) -> torch.Tensor:
    """One step in either mode from [B][R] lists; to transgress is to collect, or to choose HARMFUL."""
    punished, transgressed = torch.tensor(punished), torch.tensor(transgressed)
    if enforcer.mode == "resource":
        return enforcer.update(NormEvents(punished, transgressed)).per_resource
    elsewhere = torch.full_like(transgressed, HARMFUL, dtype=torch.long)
    actions = torch.cat([elsewhere, torch.where(transgressed, HARMFUL, 0), elsewhere], dim=1)
    return enforcer.update(NormEvents(punished[:, 0]), actions).per_resource


both_modes = pytest.mark.parametrize("mode", ["resource", "action"])


@pytest.mark.parametrize(
    ("mode", "strengths", "guilt_on_crossing"),
    [
        # 1 + 0.995 + 0.995² + ...: decay first, then the increment
        ("resource", [1.0, 1.995, 2.985025, 3.970099875, 4.950249375625, 5.925498128746875], -0.4627490643734375),
        ("action", [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], -0.5),  # a punished step does not decay
    ],
)
def test_the_sixth_punishment_in_a_row_crosses_the_threshold(mode, strengths, guilt_on_crossing):
    enforcer = make(1, mode)
    guilt = []
    for expected in strengths:
        guilt.append(advance(enforcer, [[True]], [[True]]).item())
        assert enforcer.strengths.item() == pytest.approx(expected, abs=1e-12)
    assert guilt == pytest.approx([0, 0, 0, 0, 0, guilt_on_crossing], abs=1e-12)


@both_modes
def test_without_punishment_a_strength_decays_and_hurts_only_transgressors(mode):
    enforcer = make(2, mode)
    enforcer.strengths.fill_(8.0)
    guilt = advance(enforcer, [[False], [False]], [[True], [False]])
    assert enforcer.strengths[:, 0].tolist() == pytest.approx([7.96, 7.96], abs=1e-12)
    assert guilt[:, 0].tolist() == pytest.approx([-1.48, 0.0], abs=1e-12)


def test_guilt_is_per_resource_and_the_total_is_their_sum():
    enforcer = make(2, resources=("A", "B", "C"), decay_rate=0.5)
    enforcer.strengths.copy_(torch.tensor([[16.0, 16.0, 8.0], [12.0, 20.0, 0.0]]))
    punished = torch.tensor([[False, False, True], [False, True, False]])
    guilt = enforcer.update(NormEvents(punished, torch.tensor([[True, False, True], [True, True, True]])))
    assert enforcer.strengths.tolist() == [[8.0, 8.0, 5.0], [6.0, 10.0, 0.0]]
    assert guilt.per_resource.tolist() == [[-1.5, 0.0, 0.0], [-0.5, -2.5, 0.0]]
    assert guilt.total.tolist() == [-1.5, -3.0]


@both_modes
def test_the_default_configuration_reaches_a_guilt_of_2_5_and_no_more(mode):
    fields = NormConfig(mode=mode, harmful_action=HARMFUL if mode == "action" else None, harmful_head=1)
    enforcer = NormEnforcer(1, **fields.model_dump())
    guilt = [advance(enforcer, [[True]], [[True]]).item() for _ in range(50)]
    assert min(guilt) == -2.5
    assert guilt[-1] == -2.5
    assert enforcer.strengths.item() == 10.0


@both_modes
@pytest.mark.parametrize(("decay_rate", "steps"), [(0.995, 138.3), (0.99, 69.0)])
def test_from_the_cap_to_the_threshold(mode, decay_rate, steps):
    closed_form = steps_until(10.0, 5.0, decay_rate=decay_rate)
    assert closed_form == pytest.approx(steps, abs=0.05)

    enforcer = make(1, mode, decay_rate=decay_rate)
    enforcer.strengths.fill_(10.0)
    guilty = [advance(enforcer, [[False]], [[True]]).item() < 0.0 for _ in range(200)]
    assert sum(guilty) == math.floor(closed_form)
    assert guilty == sorted(guilty, reverse=True)


@both_modes
def test_guilt_outweighs_a_payoff_gap_for_the_closed_form_time(mode):
    gap, scale = 10.0, -2.5
    s_star = guilt_outweighs_until(gap, internalization_threshold=5.0, intrinsic_scale=scale)
    assert s_star == 9.0

    enforcer = make(1, mode, intrinsic_scale=scale)
    enforcer.strengths.fill_(10.0)
    outweighs = [advance(enforcer, [[False]], [[True]]).item() < -gap for _ in range(40)]
    assert sum(outweighs) == math.floor(steps_until(10.0, s_star, decay_rate=0.995)) == 21


@pytest.mark.parametrize(("mode", "one_in"), [("resource", 40), ("action", 41)])
def test_punishing_at_the_holding_rate_holds_the_threshold(mode, one_in):
    assert holding_rate(5.0, 0.995, mode=mode) == pytest.approx(1 / one_in)

    # over streams: one of them is punished, the mean does not move
    enforcer = make(one_in, mode)
    enforcer.strengths.fill_(5.0)
    advance(enforcer, [[True]] + [[False]] * (one_in - 1), [[False]] * one_in)
    assert enforcer.strengths.mean().item() == pytest.approx(5.0, abs=1e-12)


def test_punishing_at_the_holding_rate_in_time_settles_on_the_threshold():
    every, cycles = 40, 100
    enforcer = make(1)
    strengths = []
    for step in range(every * cycles):
        advance(enforcer, [[step % every == 0]], [[False]])
        strengths.append(enforcer.strengths.item())
    # 0.995^4000 = 2e-9 of the start is left
    assert np.mean(strengths[-every:]) == pytest.approx(5.0, abs=1e-6)


@pytest.mark.parametrize(
    ("strengths", "decay_rate", "steps"),
    [
        ((8.0, 1.0), 0.5, 3.0),
        ((5.0, 5.0), 0.5, 0.0),
        ((1.0, 8.0), 0.5, 0.0),
        ((8.0, 1.0), 0.0, 0.0),
        ((8.0, 1.0), 1.0, math.inf),
        ((8.0, 0.0), 0.5, math.inf),
        ((0.0, 0.0), 0.5, 0.0),
    ],
)
def test_steps_until_by_hand(strengths, decay_rate, steps):
    assert steps_until(*strengths, decay_rate=decay_rate) == pytest.approx(steps)


def test_default_guilt_never_outweighs_a_gap_of_2_5():
    assert guilt_outweighs_until(2.5, internalization_threshold=5.0, intrinsic_scale=-0.5) == 10.0
    assert guilt_outweighs_until(1.0, internalization_threshold=5.0, intrinsic_scale=0.0) == math.inf


def oracle(events: list, mode: str, decay: float, threshold: float, cap: float, scale: float) -> np.ndarray:
    """Strengths and guilts of one stream and one resource, step by step; events: (punished, transgressed)."""
    strength, history = 0.0, []
    for punished, transgressed in events:
        if mode == "resource" or not punished:
            strength = strength * decay
        if punished:
            strength = min(cap, strength + 1.0)
        history.append((strength, scale * max(0.0, strength - threshold) if transgressed else 0.0))
    return np.transpose(history)


@st.composite
def histories(draw: st.DrawFn, num_resources: st.SearchStrategy[int]) -> np.ndarray:
    """[T, B, R, 2] bool: punished and transgressed."""
    shape = (draw(st.integers(1, 30)), draw(st.integers(1, 3)), draw(num_resources), 2)
    often = draw(st.sampled_from([0.1, 0.5, 0.95]))
    return np.random.default_rng(draw(st.integers(0, 2**32 - 1))).random(shape) < often


@both_modes
@settings(max_examples=40, deadline=None)
@given(
    data=st.data(),
    decay=st.sampled_from([0.0, 0.5, 0.9, 0.995, 1.0]),
    threshold=st.sampled_from([0.0, 1.5, 5.0]),
    cap=st.sampled_from([0.75, 3.0, 10.0]),
    scale=st.sampled_from([0.0, -0.5, -3.0]),
)
def test_any_history_matches_the_oracle(mode, data, decay, threshold, cap, scale):
    history = data.draw(histories(st.just(1) if mode == "action" else st.integers(1, 3)))
    num_steps, num_streams, num_resources, _ = history.shape
    settings = {
        "decay_rate": decay,
        "internalization_threshold": threshold,
        "max_norm_strength": cap,
        "intrinsic_scale": scale,
    }
    enforcer = make(num_streams, mode, resources=tuple("ABC"[:num_resources]), **settings)
    strengths, guilts = np.zeros((2, num_steps, num_streams, num_resources))
    for t in range(num_steps):
        guilts[t] = advance(enforcer, history[t, ..., 0], history[t, ..., 1])
        strengths[t] = enforcer.strengths
    for b in range(num_streams):
        for r in range(num_resources):
            expected = oracle(history[:, b, r].tolist(), mode, decay, threshold, cap, scale)
            np.testing.assert_allclose([strengths[:, b, r], guilts[:, b, r]], expected, atol=1e-12)


@pytest.mark.parametrize(
    ("streams", "left"),
    [
        (None, [0, 0, 0, 0]),
        ([], [1, 2, 3, 4]),
        ([2], [1, 2, 0, 4]),
        ([3, 0], [0, 2, 3, 0]),
        (torch.tensor([1], dtype=torch.int32), [1, 0, 3, 4]),
        (np.array([1, 1]), [1, 0, 3, 4]),
        (torch.tensor([False, True, True, False]), [1, 0, 0, 4]),
        (np.array([True, False, False, False]), [0, 2, 3, 4]),
        ([False, False, False, True], [1, 2, 3, 0]),
    ],
)
def test_reset_clears_the_given_streams_and_no_other(streams, left):
    enforcer = make(4, resources=("A", "B"))
    enforcer.strengths.copy_(torch.tensor([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0], [4.0, 4.0]]))
    enforcer.reset(streams)
    assert enforcer.strengths.tolist() == [[value, value] for value in left]


@pytest.mark.parametrize(
    "streams",
    [
        [4],
        [-1],
        [True, False],
        [0.0, 1.0],
        torch.tensor([0, 1, 0, 1], dtype=torch.uint8),  # a mask, or indices?
        [[0, 1]],
        ["A"],
    ],
)
def test_reset_refuses_what_names_no_streams(streams):
    enforcer = make(4)
    enforcer.strengths.fill_(3.0)
    with pytest.raises(ValueError, match="streams"):
        enforcer.reset(streams)
    assert enforcer.strengths.tolist() == [[3.0]] * 4


def test_metrics_are_means_over_streams_and_over_the_steps_since_they_were_read():
    enforcer = make(2, resources=("A", "B"), decay_rate=1.0)
    enforcer.strengths.copy_(torch.tensor([[9.0, 6.0], [7.0, 0.0]]))
    nobody = [[False, False], [False, False]]
    advance(enforcer, nobody, [[True, True], [False, True]])  # guilt A −2, B −0.5
    advance(enforcer, nobody, [[True, False], [True, False]])  # guilt A −2 and −1
    strengths = {"norms/strength/A": 8.0, "norms/strength/B": 3.0}
    # two streams, two steps: A −5 / 4, B −0.5 / 4
    assert enforcer.metrics() == {**strengths, "norms/guilt/A": -1.25, "norms/guilt/B": -0.125}
    assert enforcer.metrics() == {**strengths, "norms/guilt/A": 0.0, "norms/guilt/B": 0.0}
    advance(enforcer, nobody, [[False, False], [True, False]])
    assert enforcer.metrics() == {**strengths, "norms/guilt/A": -0.5, "norms/guilt/B": 0.0}


def test_a_single_name_may_be_a_string():
    enforcer = make(1, "action", resources="littering", decay_rate=1.0)
    enforcer.strengths.fill_(7.0)
    advance(enforcer, [[True]], [[True]])
    assert enforcer.metrics() == {"norms/strength/littering": 8.0, "norms/guilt/littering": -1.5}


@both_modes
def test_a_state_dict_carries_strengths_and_what_the_log_has_not_said_yet(mode):
    saved, loaded = make(3, mode), make(3, mode)
    for _ in range(7):
        advance(saved, [[True], [False], [True]], [[True], [True], [False]])
    state = {name: tensor.clone() for name, tensor in saved.state_dict().items()}
    assert list(state) == ["strengths", "_guilt_sums", "_num_steps"]
    loaded.load_state_dict(state)
    step = ([[False], [True], [True]], [[True], [True], [True]])
    assert torch.equal(advance(saved, *step), advance(loaded, *step))
    assert torch.equal(saved.strengths, loaded.strengths)
    assert saved.metrics() == loaded.metrics()


def test_everything_moves_with_the_module():
    enforcer = NormEnforcer(2, resources=("A",), **NUMBERS)
    enforcer.strengths.fill_(8.0)
    everyone = NormEvents(torch.ones(2, 1, dtype=torch.bool), torch.ones(2, 1, dtype=torch.bool))
    for dtype in (torch.float32, torch.float64):
        guilt = enforcer.to(dtype).update(everyone)
        assert guilt.total.dtype == guilt.per_resource.dtype == dtype
    # 8.96 and 9.9152: the guilt gathered before the move is still counted
    assert enforcer.metrics()["norms/guilt/A"] == pytest.approx(-0.5 * (3.96 + 4.9152) / 2, rel=1e-6)
    assert list(enforcer.parameters()) == []
    assert [buffer.device.type for buffer in enforcer.to("meta").buffers()] == ["meta"] * 3


@pytest.mark.parametrize(
    "convert",
    [
        np.asarray,
        lambda flags: np.broadcast_to(np.array(flags), (2, 2)),  # read-only
        lambda flags: np.array(flags, np.uint8),
        lambda flags: torch.tensor(flags, dtype=torch.uint8),
        lambda flags: torch.tensor(flags, dtype=torch.float32, requires_grad=True),
        lambda flags: np.array(flags, np.int64),
        list,
    ],
)
def test_events_may_be_arrays_and_zeros_and_ones(convert):
    punished, collected = [[True, False], [False, True]], [[True, True], [False, True]]
    enforcer = make(2, resources=("A", "B"), decay_rate=1.0)
    enforcer.strengths.fill_(7.0)
    guilt = enforcer.update(NormEvents(convert(punished), convert(collected)))
    assert enforcer.strengths.tolist() == [[8.0, 7.0], [7.0, 8.0]]
    assert guilt.per_resource.tolist() == [[-1.5, -1.0], [0.0, -1.5]]
    assert not guilt.total.requires_grad


@pytest.mark.parametrize("punished", [torch.tensor([True, False]), torch.tensor([[True], [False]])])
def test_action_mode_takes_punishment_with_or_without_a_resource_axis(punished):
    enforcer = make(2, "action")
    guilt = enforcer.update(NormEvents(punished), torch.zeros(2, 2, dtype=torch.long))
    assert enforcer.strengths.tolist() == [[1.0], [0.0]]
    assert guilt.total.shape == (2,)
    assert guilt.per_resource.shape == (2, 1)


FLAGS = torch.zeros(2, 3, dtype=torch.bool)
CHOICES = torch.zeros(2, 2, dtype=torch.long)


@pytest.mark.parametrize(
    ("mode", "events", "actions", "message"),
    [
        ("resource", (None, FLAGS), None, r"events.punished is missing.*\(2, 3\)"),
        ("resource", (FLAGS, None), None, r"events.collected is missing.*\(2, 3\)"),
        ("resource", (FLAGS[0], FLAGS), None, r"events.punished.*shape \(2, 3\), got \(3,\)"),
        ("resource", (FLAGS, FLAGS[:, :1]), None, r"events.collected.*shape \(2, 3\), got \(2, 1\)"),
        ("resource", (FLAGS, FLAGS.T), None, r"events.collected.*shape \(2, 3\), got \(3, 2\)"),
        ("resource", (FLAGS + 2, FLAGS), None, "events.punished"),
        ("resource", (FLAGS, FLAGS + 0.5), None, "events.collected.*float32"),
        ("resource", (FLAGS, FLAGS * math.nan), None, "events.collected"),
        ("resource", (FLAGS, np.full((2, 3), "yes")), None, "events.collected"),
        ("resource", ([[True], [True, False]], FLAGS), None, "events.punished"),
        ("action", (None,), CHOICES, "events.punished is missing"),
        ("action", (FLAGS,), CHOICES, r"shape \(2, 1\), got \(2, 3\)"),
        ("action", (FLAGS[:, 0],), None, "actions are missing"),
        ("action", (FLAGS[:, 0],), CHOICES[:, 0], r"actions.*\(2, K\).*got \(2,\)"),
        ("action", (FLAGS[:, 0],), CHOICES[:1], r"actions.*\(2, K\).*got \(1, 2\)"),
        ("action", (FLAGS[:, 0],), CHOICES[:, :1], r"K > harmful_head=1, got \(2, 1\)"),
        ("action", (FLAGS[:, 0],), CHOICES.float(), "actions.*float32"),
        ("action", (FLAGS[:, 0],), CHOICES.bool(), "actions.*bool"),
    ],
)
def test_update_refuses_malformed_events_and_leaves_strengths_alone(mode, events, actions, message):
    enforcer = make(2, mode, resources=("A", "B", "C") if mode == "resource" else ("A",))
    enforcer.strengths.fill_(6.0)
    with pytest.raises(ValueError, match=message):
        enforcer.update(NormEvents(*events), actions)
    assert (enforcer.strengths == 6.0).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_streams": 0}, "num_streams.*got 0"),
        ({"mode": "both"}, "mode: .*got 'both'"),
        ({"resources": ()}, "resources: "),
        ({"resources": ("A", "A")}, "resources: "),
        ({"decay_rate": 1.1}, "decay_rate: .*got 1.1"),
        ({"decay_rate": math.nan}, "decay_rate: .*got nan"),
        ({"internalization_threshold": -1.0}, "internalization_threshold: .*got -1.0"),
        ({"max_norm_strength": 0.0}, "max_norm_strength: .*got 0.0"),
        ({"max_norm_strength": math.inf}, "max_norm_strength: .*got inf"),
        ({"intrinsic_scale": 0.5}, "intrinsic_scale: .*got 0.5"),
        ({"intrinsic_scale": -math.inf}, "intrinsic_scale: .*got -inf"),
        ({"harmful_action": 1}, "harmful_action=1 belongs to mode='action'"),
        ({"mode": "action"}, "harmful_action: .*got None"),
        ({"mode": "action", "harmful_action": -1}, "harmful_action: .*got -1"),
        ({"mode": "action", "harmful_action": 1, "harmful_head": -1}, "harmful_head: .*got -1"),
        ({"mode": "action", "harmful_action": 1, "resources": ("A", "B")}, "resources: .*one name"),
    ],
)
def test_settings_out_of_range_are_refused(changes, message):
    """By the enforcer, and by the configuration, whose checks these are."""
    with pytest.raises(ValueError, match=message):
        NormEnforcer(**{"num_streams": 2, "resources": ("A",), **NUMBERS, **changes})
    if "num_streams" not in changes:
        with pytest.raises(ValueError, match=message):
            NormConfig(**changes)


def test_defaults_are_those_of_the_configuration():
    assert NormEnforcer(1, resources=("A",)).config == NormConfig(resources=("A",), **NUMBERS)


OUTWEIGHS = {"internalization_threshold": 5.0, "intrinsic_scale": -0.5}


@pytest.mark.parametrize(
    ("function", "given", "settings", "message"),
    [
        (steps_until, (-1.0, 1.0), {"decay_rate": 0.9}, "strengths.*got -1.0"),
        (steps_until, (1.0, math.nan), {"decay_rate": 0.9}, "strengths"),
        (steps_until, (2.0, 1.0), {"decay_rate": 1.5}, "decay_rate: .*got 1.5"),
        (guilt_outweighs_until, (-1.0,), OUTWEIGHS, "payoff_gap.*got -1.0"),
        (guilt_outweighs_until, (1.0,), {**OUTWEIGHS, "intrinsic_scale": 0.5}, "intrinsic_scale: .*got 0.5"),
        (holding_rate, (-5.0, 0.995), {}, "threshold: .*got -5.0"),
        (holding_rate, (5.0, -0.1), {}, "decay_rate: .*got -0.1"),
        (holding_rate, (5.0, 0.995), {"mode": "both"}, "mode.*got 'both'"),
    ],
)
def test_the_closed_forms_refuse_arguments_out_of_range(function, given, settings, message):
    with pytest.raises(ValueError, match=message):
        function(*given, **settings)
