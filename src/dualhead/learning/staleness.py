"""Stale states: recompute what older weights stored, and measure how far it had drifted."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import Tensor

from dualhead.config import PPOConfig
from dualhead.learning.rollout import Rollout, of_active
from dualhead.learning.segments import Segments, pack
from dualhead.networks.policy import RecurrentPolicy
from dualhead.types import IntArray, RecurrentState, on_device

DRIFT_SEGMENTS = 64


@torch.no_grad()
def refresh(
    policy: RecurrentPolicy, rollout: Rollout, segments: Segments, *, config: PPOConfig, write: bool = True
) -> dict[str, float]:
    """Recomputes the states that segments (and their burn-ins) begin from with today's weights, and measures drift.

    Every run of steps is unrolled from its own beginning, all runs side by side, a segment's length at a time.
    Drift is R2D2's ΔQ for PPO: how far values (root mean square, in deviations of the rollout's values) and action
    distributions (KL in nats) move between stored and refreshed state, at the first and last step of segments.

    Args:
        write: rewrite the rollout's states; otherwise only a sample of streams is unrolled, for the drift.

    Returns:
        Metrics `state_drift/*`; none for a memoryless policy or where no segment begins inside a run.
    """
    (inside,) = np.nonzero(segments.offset)
    has_memory = any(part.numel() for part in policy.initial_state(1))
    if not has_memory or not len(inside):
        return {}
    if not write:
        inside = inside[segments.stream[inside] <= segments.stream[inside[:DRIFT_SEGMENTS][-1]]]
    rows, states = _unroll_runs(policy, rollout, segments, streams=segments.stream[inside], config=config)
    measured = inside[np.linspace(0, len(inside) - 1, min(DRIFT_SEGMENTS, len(inside))).astype(np.int64)]
    sample = segments.take(measured)
    order, packed, layout = pack(policy, rollout, sample, sample.start, sample.length)
    seen, sample = rollout.observations_at(packed), sample.take(order)
    begins = rollout.flat_rows(sample.stream, sample.start)
    ends = rollout.flat_rows(sample.stream, sample.start + sample.length - 1)
    old = policy.unroll(seen, rollout.state_at(begins), layout)
    stored = rollout.state_at(rows)
    rollout.write_states(rows, states)
    new = policy.unroll(seen, rollout.state_at(begins), layout)
    if not write:
        rollout.write_states(rows, stored)

    spread = of_active(rollout.values[: rollout.length], rollout.active_steps()).std(unbiased=False) + 1e-8
    squares, kl = (new.values - old.values).square(), new.distribution.kl_from(old.distribution)
    metrics = {}
    for place, where in (("first", begins), ("last", ends)):
        weights = torch.isin(packed, where, assume_unique=True).to(kl.dtype) / len(where)
        metrics[f"state_drift/value_{place}"] = (weights * squares).sum().sqrt() / spread
        metrics[f"state_drift/kl_{place}"] = (weights * kl).sum()
    return dict(zip(metrics, torch.stack(list(metrics.values())).tolist()))


def _unroll_runs(
    policy: RecurrentPolicy, rollout: Rollout, segments: Segments, *, streams: IntArray, config: PPOConfig
) -> tuple[Tensor, RecurrentState]:
    """Fresh states at every inner cut of the runs of some streams: flat rows [S] and states [L, S, H]."""
    of_streams = segments.take(np.flatnonzero(np.isin(segments.stream, streams)))
    first = of_streams.offset == 0
    remaining = np.bincount(np.cumsum(first) - 1, weights=of_streams.length).astype(np.int64)
    runs = of_streams.take(np.flatnonzero(first))
    # Segments begin at every multiple of max_segment, their burn-ins so many steps before.
    remainder = config.burn_in % config.max_segment
    pieces = [config.max_segment - remainder, remainder] if remainder else [config.max_segment]
    state = rollout.state_at(rollout.flat_rows(runs.stream, runs.start))
    rows, states = [], []
    for piece in itertools.cycle(pieces):
        alive = np.flatnonzero(remaining > piece)
        if len(alive) == 0:
            break
        runs = runs.take(alive)
        _, steps, layout = pack(policy, rollout, runs, runs.start, np.full(len(alive), piece), final_states=True)
        state = state.select(on_device(torch.from_numpy(alive), rollout.device))
        state = policy.advance(rollout.observations_at(steps), state, layout)
        runs, remaining = runs._replace(start=runs.start + piece), remaining[alive] - piece
        rows.append(rollout.flat_rows(runs.stream, runs.start))
        states.append(state)
    return torch.cat(rows), RecurrentState.concatenate(states)
