"""Dense blocks: how segments of several lengths are packed for recurrent calls on [segments, steps] at once."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dualhead.types import IntArray, Plan, on_device


class Blocks(NamedTuple):
    """Where the N packed steps of S segments lie in dense blocks.

    Steps lie block after block, inside a block time-major: step t of all its segments, then step t + 1. A block of S
    segments and T steps takes S*T rows; where its segments are not equally long, the rows past a segment's end are
    padding that only the recurrent call sees.

    Fields:
        sizes: (S, T) of each block; their segments follow one another in the state's stream axis.
        padding: [rows] indices into the N steps that fill each block row (a padded row repeats a real one), or
            None where no block is padded and rows are the steps themselves.
        real: [N] rows that are real steps, or None likewise.
    """

    sizes: tuple[tuple[int, int], ...]
    padding: Tensor | None = None
    real: Tensor | None = None


def lay_out(
    lengths: IntArray, *, block_cost: float, step_cost: float = 0.0, device: torch.device | str = "cpu"
) -> Plan:
    """A plan whose layout is dense blocks, for segments of given lengths, sorted from long to short.

    Args:
        lengths: [S], not increasing.
        block_cost: what one more recurrent call costs, in steps: padding is bought up to that price. 0 buys none and
            gives one block per distinct length.
        step_cost: what one more time step of a block costs beside its segments' steps, in steps: with it few long
            blocks are cheaper than several short ones.
    """
    assert (lengths[1:] <= lengths[:-1]).all(), "segments must come from long to short"
    total = int(lengths.sum())
    blocks = _cheapest_blocks(lengths, block_cost, step_cost)

    segment_parts, step_parts, real_parts = [], [], []
    row = segment = 0
    for num_segments, num_steps in blocks:
        steps = np.arange(num_steps)[:, None]
        real = steps < lengths[None, segment : segment + num_segments]
        step, which = np.nonzero(real)
        segment_parts.append(which + segment)
        step_parts.append(step)
        real_parts.append(np.flatnonzero(real) + row)
        row += num_segments * num_steps
        segment += num_segments
    segment_of, step_of = np.concatenate(segment_parts), np.concatenate(step_parts)
    if row == total:
        return Plan(segment_of, step_of, Blocks(tuple(blocks)))
    real_rows = np.concatenate(real_parts)
    padding = np.zeros(row, dtype=np.int64)
    padding[real_rows] = np.arange(total)
    rows = (on_device(torch.from_numpy(rows), torch.device(device)) for rows in (padding, real_rows))
    return Plan(segment_of, step_of, Blocks(tuple(blocks), *rows))


def _cheapest_blocks(lengths: IntArray, block_cost: float, step_cost: float) -> list[tuple[int, int]]:
    """Blocks (segments, steps) over lengths from long to short that cost the fewest steps, calls and padding counted.

    The cheapest way to lay out the first j groups of equal length ends with one block over groups i + 1 .. j:

        cost(j) = min_i cost(i) + block_cost + longest(i + 1) · (step_cost + segments(i + 1 .. j))
    """
    first = np.flatnonzero(np.diff(lengths, prepend=lengths[0] + 1))
    longest, ends = lengths[first], np.append(first, len(lengths))
    cost = np.zeros(len(ends))
    chosen = np.zeros(len(ends), dtype=np.int64)
    for j in range(1, len(ends)):
        candidates = cost[:j] + block_cost + longest[:j] * (step_cost + ends[j] - ends[:j])
        chosen[j] = candidates.argmin()
        cost[j] = candidates[chosen[j]]
    blocks = []
    j = len(ends) - 1
    while j > 0:
        i = chosen[j]
        blocks.append((int(ends[j] - ends[i]), int(longest[i])))
        j = i
    return blocks[::-1]
