"""Segments, minibatches, blocks and the kept tail: hand-drawn examples, and properties against loops over steps."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dualhead.learning.rollout import Rollout
from dualhead.learning.segments import cut, minibatches
from dualhead.networks.memory import lay_out
from dualhead.types import ActionSample, RecurrentState

quick = settings(max_examples=60, deadline=None)


@st.composite
def rollouts(draw, max_steps=24, max_streams=4):
    """Episode starts [T, B], from none to one at every step."""
    num_steps, num_streams = draw(st.integers(1, max_steps)), draw(st.integers(1, max_streams))
    rate = draw(st.sampled_from([0.0, 0.1, 0.4, 1.0]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return rng.random((num_steps, num_streams)) < rate


def as_rows(segments):
    return list(zip(*(field.tolist() for field in segments)))


def test_the_worked_example():
    starts = np.arange(8)[:, None] == 5
    #                                  stream, start, length, offset, burn_in
    assert as_rows(cut(starts, 3)) == [(0, 0, 3, 0, 0), (0, 3, 2, 3, 0), (0, 5, 3, 0, 0)]
    every_step = np.ones((3, 1), bool)
    assert as_rows(cut(every_step, 16, burn_in=5)) == [(0, t, 1, 0, 0) for t in range(3)]


def test_an_example_with_burn_in_and_tail():
    # Stream 0 goes on with an episode of which 2 steps are kept; stream 1 begins one at 0 although 3 steps are kept;
    # both begin another at 4.
    starts = np.zeros((7, 2), bool)
    starts[4] = starts[0, 1] = True
    segments = cut(starts, 3, burn_in=4, tail_lengths=np.array([2, 3]))
    assert as_rows(segments) == [
        (0, 0, 3, 0, 2),
        (0, 3, 1, 3, 4),  # 3 steps of the rollout and 2 of the tail are there, 4 are wanted
        (0, 4, 3, 0, 0),
        (1, 0, 3, 0, 0),
        (1, 3, 1, 3, 3),
        (1, 4, 3, 0, 0),
    ]


@quick
@given(rollouts(), st.integers(1, 30), st.sampled_from([0.0, 0.3, 1.0]))
def test_every_active_step_is_in_exactly_one_segment_and_none_crosses_an_episode_start(starts, sequence_length, rate):
    active = np.random.default_rng(0).random(starts.shape) >= rate
    starts = starts | ~active
    starts[1:] |= ~active[:-1]
    segments = cut(starts, sequence_length, active=active)
    times_seen = np.zeros(starts.shape, dtype=int)
    for stream, start, length, offset, _ in as_rows(segments):
        assert 1 <= length <= sequence_length
        times_seen[start : start + length, stream] += 1
        assert not starts[start + 1 : start + length, stream].any()
        # It begins a run, or full segments of the same run lie before it.
        assert offset % sequence_length == 0
        begin = start - offset
        assert begin == 0 or starts[begin, stream]
        assert not starts[begin + 1 : start + 1, stream].any()
    np.testing.assert_array_equal(times_seen, active)


@quick
@given(rollouts(), st.integers(1, 8), st.integers(0, 9), st.integers(0, 2**32 - 1))
def test_burn_in_is_as_long_as_the_episode_and_the_tail_allow(starts, sequence_length, burn_in, seed):
    tail_lengths = np.random.default_rng(seed).integers(0, burn_in + 1, size=starts.shape[1])
    for stream, start, _, _, given_burn_in in as_rows(
        cut(starts, sequence_length, burn_in=burn_in, tail_lengths=tail_lengths)
    ):
        # Walk back one step at a time; the step walked away from must not be the first of its episode.
        step, walked = start, 0
        while walked < burn_in and step > -tail_lengths[stream] and not (step >= 0 and starts[step, stream]):
            step, walked = step - 1, walked + 1
        assert given_burn_in == walked


@quick
@given(rollouts(), st.integers(1, 8), st.integers(0, 5), st.randoms(use_true_random=False))
def test_permuting_streams_permutes_segments(starts, sequence_length, burn_in, random):
    num_streams = starts.shape[1]
    order = random.sample(range(num_streams), num_streams)
    tails = np.arange(num_streams) % (burn_in + 1)
    plain = as_rows(cut(starts, sequence_length, burn_in=burn_in, tail_lengths=tails))
    permuted = as_rows(cut(starts[:, order], sequence_length, burn_in=burn_in, tail_lengths=tails[order]))
    assert sorted((order[stream], *rest) for stream, *rest in permuted) == sorted(plain)


@quick
@given(st.lists(st.integers(1, 9), min_size=1, max_size=60), st.integers(9, 40), st.integers(0, 2**31))
def test_minibatches_partition_the_segments_evenly(lengths, batch_size, seed):
    lengths = np.array(lengths)
    parts = minibatches(lengths, batch_size, generator=torch.Generator().manual_seed(seed))
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(lengths)))
    total = lengths.sum()
    num_wanted = max(1, round(total / batch_size))
    share = total / num_wanted
    # Each boundary is off by half a segment at most, so only segments as long as a share can swallow one.
    assert len(parts) == num_wanted or (len(parts) < num_wanted and lengths.max() >= share)
    for part in parts:
        assert abs(lengths[part].sum() - share) <= lengths.max()


def test_minibatches_of_equal_segments_have_exactly_batch_size_steps():
    parts = minibatches(np.full(12, 4), 16, generator=torch.Generator().manual_seed(0))
    assert [4 * len(part) for part in parts] == [16, 16, 16]


def test_minibatches_are_shuffled_by_the_generator_alone():
    lengths = np.ones(50, dtype=np.int64)

    def order(seed):
        return np.concatenate(minibatches(lengths, 7, generator=torch.Generator().manual_seed(seed))).tolist()

    assert order(1) == order(1)
    assert order(1) != order(2)
    # A generator goes on: the next epoch has another order.
    generator = torch.Generator().manual_seed(1)
    first, second = (np.concatenate(minibatches(lengths, 7, generator=generator)).tolist() for _ in range(2))
    assert first != second
    assert first != list(range(50))


def fill_blocks(segment, step, layout):
    """Reads a layout as `Blocks` describes it: for each block row (segment, step in segment, is it real)."""
    rows, first = [], 0
    for num_segments, num_steps in layout.sizes:
        rows += [(first + s, t) for t in range(num_steps) for s in range(num_segments)]
        first += num_segments
    filled_by = range(len(rows)) if layout.padding is None else layout.padding.tolist()
    real = list(range(len(rows)) if layout.real is None else layout.real.tolist())
    assert [rows[row] for row in real] == list(zip(segment, step))
    assert [filled_by[row] for row in real] == list(range(len(segment)))
    return [(*place, row in real) for row, place in enumerate(rows)]


@quick
@given(st.lists(st.integers(1, 20), min_size=1, max_size=40), st.sampled_from([0.0, 1.0, 10.0, 1e6]))
def test_a_layout_places_every_step(lengths, block_cost):
    lengths = np.array(sorted(lengths, reverse=True))
    segment, step, layout = lay_out(lengths, block_cost=block_cost)
    assert sorted(zip(segment.tolist(), step.tolist())) == [(s, t) for s, n in enumerate(lengths) for t in range(n)]
    assert sum(num_segments for num_segments, _ in layout.sizes) == len(lengths)
    rows = fill_blocks(segment, step, layout)
    for s, t, is_real in rows:
        assert is_real == (t < lengths[s])
    num_padded = len(rows) - lengths.sum()
    assert (layout.padding is None) == (layout.real is None) == (num_padded == 0)
    if block_cost == 0.0:
        assert [num_steps for _, num_steps in layout.sizes] == sorted(set(lengths.tolist()), reverse=True)
    if block_cost == 1e6:
        assert len(layout.sizes) == 1


@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=9), st.sampled_from([0.5, 3.0, 9.0]), st.sampled_from([0.0, 1.5])
)
def test_no_other_layout_is_cheaper(lengths, block_cost, step_cost):
    lengths = sorted(lengths, reverse=True)
    _, _, layout = lay_out(np.array(lengths), block_cost=block_cost, step_cost=step_cost)

    def price(cuts):
        edges = [0, *cuts, len(lengths)]
        return sum(block_cost + lengths[i] * (step_cost + j - i) for i, j in itertools.pairwise(edges))

    inner = range(1, len(lengths))
    cheapest = min(price(cuts) for n in range(len(lengths)) for cuts in itertools.combinations(inner, n))
    ours = sum(block_cost + num_steps * (step_cost + num_segments) for num_segments, num_steps in layout.sizes)
    assert ours == cheapest


def test_a_layout_drawn_by_hand():
    # Segments of 3, 3, 2 and 1 steps: one block takes 3 rows of padding, three take none and two calls more.
    segment, step, layout = lay_out(np.array([3, 3, 2, 1]), block_cost=0.9)
    assert layout.sizes == ((2, 3), (1, 2), (1, 1))
    assert list(zip(segment, step)) == [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2), (2, 0), (2, 1), (3, 0)]
    segment, step, layout = lay_out(np.array([3, 3, 2, 1]), block_cost=4.0)
    assert layout.sizes == ((4, 3),)
    assert list(zip(segment, step)) == [(0, 0), (1, 0), (2, 0), (3, 0), (0, 1), (1, 1), (2, 1), (0, 2), (1, 2)]
    assert layout.real.tolist() == [0, 1, 2, 3, 4, 5, 6, 8, 9]
    assert [layout.padding[row].item() for row in layout.real] == list(range(9))


def empty_rollout(rollout_length, burn_in):
    return Rollout(
        rollout_length,
        3,
        burn_in=burn_in,
        observations={"observation": ((), torch.float64)},
        state=RecurrentState(*torch.zeros(2, 1, 1, 2, dtype=torch.float64)),
        num_action_columns=1,
        action_dtype=torch.int64,
        num_heads=1,
        device=torch.device("cpu"),
        dtype=torch.float64,
    )


def put(rollout, number, starts=(False,) * 3):
    """A step whose observation and states are recognised by `number` [B]."""
    number = torch.as_tensor(number, dtype=torch.float64)
    h = number.expand(2, -1).T[None]
    sample = ActionSample(torch.zeros(3, 1, dtype=torch.int64), number[:, None], number)
    rollout.put_step({"observation": number}, RecurrentState(h, -h), sample, torch.as_tensor(starts))
    rollout.complete_step(number, 0 * number, *torch.zeros(2, 3, dtype=torch.bool))


@quick
@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=6),
    st.integers(0, 9),
    st.sampled_from([0.0, 0.2, 0.6]),
    st.integers(0, 2**32 - 1),
)
def test_the_tail_keeps_the_last_steps_of_the_rollouts_before(rollout_lengths, burn_in, rate, seed):
    rng = np.random.default_rng(seed)
    rollout, history = empty_rollout(6, burn_in), []
    for length in rollout_lengths:
        for _ in range(length):
            history.append((len(history) * 3 + np.arange(3), rng.random(3) < rate))
            put(rollout, *history[-1])
        rollout.clear()
        kept = history[max(0, len(history) - burn_in) :][::-1]
        assert (rollout.length, rollout.tail_length) == (0, len(kept))
        for b, tail_length in enumerate(rollout.tail_lengths()):
            began = [back for back, (_, starts) in enumerate(kept, start=1) if starts[b]]
            assert tail_length == min(began, default=len(kept))
        for back, (number, starts) in enumerate(kept, start=1):
            rows = rollout.flat_rows(np.arange(3), np.full(3, -back))
            np.testing.assert_array_equal(rollout.observations_at(rows)["observation"], number)
            h, c = rollout.state_at(rows)
            np.testing.assert_array_equal(h[0, :, 0], number)
            np.testing.assert_array_equal(c[0, :, 1], -number)
            np.testing.assert_array_equal(rollout.episode_starts[burn_in - back], starts)


def test_a_full_rollout_reads_back_every_step_where_it_was_put():
    rollout = empty_rollout(4, 2)
    for t in range(4):
        assert not rollout.is_full
        put(rollout, [10 * t, 10 * t + 1, 10 * t + 2])
    assert rollout.is_full
    rows = rollout.flat_rows(np.array([2, 0, 1]), np.array([3, 1, 0]))
    assert rollout.observations_at(rows)["observation"].tolist() == [32, 10, 1]
    assert rollout.state_at(rows).h[0, :, 0].tolist() == [32, 10, 1]
    ones = torch.ones(1, 1, 2).double()
    rollout.write_states(rows[:1], RecurrentState(5 * ones, 6 * ones))
    assert rollout.state_at(rows).h[0, :, 0].tolist() == [5, 10, 1]
    assert rollout.state_at(rows).c[0, :, 0].tolist() == [6, -10, -1]


def test_segments_out_of_order_are_refused():
    with pytest.raises(AssertionError, match="long to short"):
        lay_out(np.array([1, 2]), block_cost=0.0)
