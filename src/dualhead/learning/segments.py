"""Cut a rollout at episode starts into segments, and split them into minibatches.

Worked example, sequence_length 3, one stream of 8 steps whose third episode step is followed by a reset at t = 5:

    t               0  1  2  3  4 | 5  6  7        | episode start
    segments        [0  1  2][3  4][5  6  7]       every step in exactly one
    begins from     stored   stored zeros          stored = the state recorded before that step

Segments never cross an episode start, so a recurrent call over them needs no reset and the loss needs no mask.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from dualhead.types import IntArray


class Segments(NamedTuple):
    """All segments of a rollout; arrays [S].

    Fields:
        stream, start, length: steps start .. start + length - 1 of that stream.
        offset: steps between the start of its run (an episode start or the rollout's beginning) and `start`.
        burn_in: preceding steps of the same episode that can warm its state; may reach into the kept tail.
    """

    stream: IntArray
    start: IntArray
    length: IntArray
    offset: IntArray
    burn_in: IntArray

    def take(self, chosen: IntArray) -> Segments:
        return Segments(*(field[chosen] for field in self))


def run_starts(episode_starts: NDArray[np.bool_]) -> IntArray:
    """For each step [T, B] the step at which its run began: the last episode start, or 0."""
    num_steps = episode_starts.shape[0]
    begins = np.where(episode_starts, np.arange(num_steps)[:, None], 0)
    return np.maximum.accumulate(begins, axis=0)


def cut(
    episode_starts: NDArray[np.bool_],
    sequence_length: int,
    *,
    burn_in: int = 0,
    tail_lengths: IntArray | None = None,
) -> Segments:
    """Segments of a rollout, stream by stream in order of time.

    Args:
        episode_starts: [T, B], the step is the first of its episode.
        sequence_length: the longest segment.
        burn_in: the longest warm-up before a segment.
        tail_lengths: [B] steps of the running episode that are kept from before the rollout; None: none are.
    """
    num_steps = episode_starts.shape[0]
    began = run_starts(episode_starts)
    since = np.arange(num_steps)[:, None] - began
    stream, start = np.nonzero((since % sequence_length == 0).T)
    last_of_stream = np.append(stream[1:] != stream[:-1], True)
    end = np.where(last_of_stream, num_steps, np.append(start[1:], 0))
    offset = since[start, stream]
    available = offset.copy()
    if tail_lengths is not None:
        continues = (began[start, stream] == 0) & ~episode_starts[0, stream]
        available += np.where(continues, tail_lengths[stream], 0)
    return Segments(stream, start, end - start, offset, np.minimum(available, burn_in))


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
