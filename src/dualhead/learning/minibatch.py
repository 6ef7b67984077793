"""Minibatches of segments: packed for the policy's memories, each segment with the state it begins from."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from dualhead.learning.rollout import Rollout
from dualhead.learning.segments import Segments
from dualhead.networks.policy import RecurrentPolicy
from dualhead.types import IntArray, RecurrentState, SegmentBatch, on_device


def gather(
    policy: RecurrentPolicy, rollout: Rollout, segments: Segments, *, advantages: Tensor, returns: Tensor
) -> SegmentBatch:
    """A minibatch of segments, packed, each with the state it begins from."""
    order, rows, layout = pack(policy, rollout, segments, segments.start, segments.length)
    steps = rows - rollout.max_tail * rollout.num_streams

    def pick(buffer: Tensor) -> Tensor:
        return buffer[: rollout.length].flatten(0, 1).index_select(0, steps)

    return SegmentBatch(
        observations=rollout.observations_at(rows),
        state=initial_states(policy, rollout, segments.take(order)),
        layout=layout,
        actions=pick(rollout.actions),
        log_probs=pick(rollout.log_probs),
        values=pick(rollout.values),
        advantages=pick(advantages),
        returns=pick(returns),
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

    Returns:
        the order of the segments in the state's stream axis (long ones first), flat rows [N] of the steps, and the
        layout for `policy.unroll` (with `final_states` for `policy.advance`).
    """
    order = np.argsort(-length, kind="stable")
    plan = policy.plan(length[order], final_states=final_states)
    which = order[plan.segment]
    return order, rollout.flat_rows(segments.stream[which], start[which] + plan.step), plan.layout


@torch.no_grad()
def initial_states(policy: RecurrentPolicy, rollout: Rollout, segments: Segments) -> RecurrentState:
    """The state [L, S, H] each segment begins from: stored, and unrolled through its burn-in by today's weights.

    Source: Kapturowski et al. 2019 (R2D2) §3, "stored state" and "burn-in".
    """
    state = rollout.state_at(rollout.flat_rows(segments.stream, segments.start - segments.burn_in))
    (warm,) = np.nonzero(segments.burn_in)
    if len(warm) == 0:
        return state
    prefix = segments.take(warm)
    begin = prefix.start - prefix.burn_in
    order, rows, layout = pack(policy, rollout, prefix, begin, prefix.burn_in, final_states=True)
    which = on_device(torch.from_numpy(warm[order]), rollout.device)
    warmed = policy.advance(rollout.observations_at(rows), state.select(which), layout)
    state.write(which, warmed)
    return state
