"""Cut a rollout at episode starts into segments, and gather minibatches of them, packed for the policy's memories.

Worked example, sequence_length 3, one stream of 8 steps whose third episode step is followed by a reset at t = 5:

    t               0  1  2  3  4 | 5  6  7        | episode start
    segments        [0  1  2][3  4][5  6  7]       every step in exactly one
    begins from     stored   stored zeros          stored = the state recorded before that step

Segments never cross an episode start, so a recurrent call over them needs no reset and the loss needs no mask. A step
that a stream sat out is in no segment.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dualhead.learning.rollout import Rollout
from dualhead.networks.policy import RecurrentPolicy
from dualhead.types import IntArray, RecurrentState, SegmentBatch, on_device


class Segments(NamedTuple):
    """Segments of a rollout, [S]: steps start .. start + length - 1 of a stream."""

    stream: IntArray
    start: IntArray
    length: IntArray
    offset: IntArray  # steps between the start of its run (an episode start or the rollout's beginning) and `start`
    burn_in: IntArray  # preceding steps of the same episode that can warm its state; may reach into the kept tail

    def take(self, chosen: IntArray) -> Segments:
        return Segments(*(field[chosen] for field in self))


def cut(
    episode_starts: NDArray[np.bool_],
    sequence_length: int,
    *,
    burn_in: int = 0,
    tail_lengths: IntArray | None = None,
    active: NDArray[np.bool_] | None = None,
) -> Segments:
    """All segments of a rollout, stream by stream in order of time.

    Args:
        episode_starts: [T, B], the step is the first of its episode.
        sequence_length, burn_in: the longest segment, and the longest warm-up before one.
        tail_lengths: [B] steps of the running episode that are kept from before the rollout; None: none are.
        active: [T, B], the stream took part in the step (the others are episode starts); None: in all of them.
    """
    num_steps = episode_starts.shape[0]
    steps = np.arange(num_steps)[:, None]
    began = np.maximum.accumulate(np.where(episode_starts, steps, 0), axis=0)
    since = steps - began
    stream, start = np.nonzero((since % sequence_length == 0).T)
    last_of_stream = np.append(stream[1:] != stream[:-1], True)
    end = np.where(last_of_stream, num_steps, np.append(start[1:], 0))
    offset = since[start, stream]
    available = offset.copy()
    if tail_lengths is not None:
        continues = (began[start, stream] == 0) & ~episode_starts[0, stream]
        available += np.where(continues, tail_lengths[stream], 0)
    segments = Segments(stream, start, end - start, offset, np.minimum(available, burn_in))
    # A step that a stream sat out is an episode start and so is the step after it: a segment of its own.
    return segments if active is None else segments.take(np.flatnonzero(active[start, stream]))


def minibatches(lengths: IntArray, batch_size: int, *, generator: torch.Generator | None = None) -> list[IntArray]:
    """A random split of segments into minibatches of about `batch_size` steps, as even as whole segments allow."""
    order = torch.randperm(len(lengths), generator=generator, device="cpu").numpy()
    ends = np.cumsum(lengths[order])
    num_minibatches = max(1, round(ends[-1] / batch_size))
    targets = ends[-1] * np.arange(1, num_minibatches) / num_minibatches
    # Each boundary goes where the number of steps so far comes closest to its target.
    right = np.minimum(np.searchsorted(ends, targets), len(ends) - 1)
    left = np.maximum(right - 1, 0)
    boundaries = np.where(targets - ends[left] < ends[right] - targets, left, right) + 1
    return [part for part in np.split(order, np.unique(boundaries)) if len(part)]


def gather(
    policy: RecurrentPolicy, rollout: Rollout, segments: Segments, *, advantages: Tensor, returns: Tensor
) -> SegmentBatch:
    """A minibatch of segments, packed, each with the state it begins from."""
    order, rows, layout = pack(policy, rollout, segments, segments.start, segments.length)
    steps = rows - rollout.max_tail * rollout.num_streams
    buffers = (rollout.actions, rollout.log_probs, rollout.values, advantages, returns)
    return SegmentBatch(
        rollout.observations_at(rows),
        _initial_states(policy, rollout, segments.take(order)),
        layout,
        *(buffer[: rollout.length].flatten(0, 1).index_select(0, steps) for buffer in buffers),
    )


def pack(
    policy: RecurrentPolicy,
    rollout: Rollout,
    segments: Segments,
    start: IntArray,
    length: IntArray,
    *,
    final_states: bool = False,
) -> tuple[IntArray, Tensor, Any]:
    """Steps start .. start + length - 1 of each segment's stream, in the order that the policy's memories want.

    Returns the order of the segments in the state's stream axis (long ones first), flat rows [N] of the steps, and the
    layout for `policy.unroll` (with `final_states` for `policy.advance`).
    """
    order = np.argsort(-length, kind="stable")
    plan = policy.plan(length[order], final_states=final_states)
    which = order[plan.segment]
    return order, rollout.flat_rows(segments.stream[which], start[which] + plan.step), plan.layout


@torch.no_grad()
def _initial_states(policy: RecurrentPolicy, rollout: Rollout, segments: Segments) -> RecurrentState:
    """The state [L, S, H] each segment begins from: stored, and unrolled through its burn-in by today's weights.

    Source: Kapturowski et al. 2019 (R2D2) §3, "stored state" and "burn-in".
    """
    state = rollout.state_at(rollout.flat_rows(segments.stream, segments.start - segments.burn_in))
    (warm,) = np.nonzero(segments.burn_in)
    if len(warm):
        prefix = segments.take(warm)
        begin = prefix.start - prefix.burn_in
        order, rows, layout = pack(policy, rollout, prefix, begin, prefix.burn_in, final_states=True)
        which = on_device(torch.from_numpy(warm[order]), rollout.device)
        state.write(which, policy.advance(rollout.observations_at(rows), state.select(which), layout))
    return state
