"""Moves and votes of the commons, as pairs or in the two historical single-number codings.

A move is an index from 0 to `num_moves`; `num_moves`, one past the last, is to stay where one is (or to take nothing).
A vote is none, up or down. With four moves:

    pair        (move, vote), two heads
    composite   13 numbers: move · 3 + vote, and 12 for nothing
    simple      7 numbers: 0 to 3 a move, 4 vote up, 5 vote down, 6 nothing; who votes stays
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, Literal

import torch
from gymnasium import spaces
from torch import Tensor

from dualhead.spaces import as_tensor
from dualhead.types import on_device

MOVES = ("up", "down", "left", "right")
NO_VOTE, VOTE_UP, VOTE_DOWN = range(3)
NUM_VOTES = 3
Coding = Literal["pair", "composite", "simple"]


def pairs_of(coding: Coding, num_moves: int = len(MOVES)) -> list[tuple[int, int]]:
    """Move and vote of each number of a single-number coding."""
    nothing = (num_moves, NO_VOTE)
    if coding == "composite":
        return [*itertools.product(range(num_moves), range(NUM_VOTES)), nothing]
    return [*((move, NO_VOTE) for move in range(num_moves)), (num_moves, VOTE_UP), (num_moves, VOTE_DOWN), nothing]


def number_of(coding: Coding, move: int, vote: int, num_moves: int = len(MOVES)) -> int:
    """The number of a move and a vote in a single-number coding. In `simple` a vote overrides the move.

    Raises:
        ValueError: a vote without a move, which `composite` has no number for.
    """
    pairs = pairs_of(coding, num_moves)
    pair = (num_moves if coding == "simple" and vote != NO_VOTE else move, vote)
    if pair not in pairs:
        raise ValueError(f"the {coding} coding has no number for move {move} with vote {vote}")
    return pairs.index(pair)


class Actions:
    """The actions of B streams in one coding.

    Args:
        coding: see the module.
        num_streams: B.
        num_moves: moves that there are, not counting to stay.
        stay: whether the move head of a pair may choose to stay.

    Attributes:
        space: of one stream.
    """

    def __init__(self, coding: Coding, *, num_streams: int, num_moves: int, stay: bool, device: torch.device) -> None:
        self._num_streams, self._device = num_streams, device
        self._pairs = None if coding == "pair" else pairs_of(coding, num_moves)
        if self._pairs is None:
            self._num_choices, self._still = [num_moves + stay, NUM_VOTES], num_moves if stay else 0
            self.space: spaces.Space = spaces.Dict(
                move=spaces.Discrete(num_moves + stay), vote=spaces.Discrete(NUM_VOTES)
            )
        else:
            self._num_choices, self._still = [len(self._pairs)], num_moves
            self.space = spaces.Discrete(len(self._pairs))
            self._table = torch.tensor(self._pairs, device=device)

    def masks(self, *, voting: bool) -> Any:
        """What may be chosen in a turn for votes, or in one for moves: int8 [B, choices], for pairs a dict by head.

        A head always has a choice: in a turn for votes to stay, else a move that does nothing.
        """
        if self._pairs is None:
            num_moves, num_votes = self._num_choices
            return {
                "move": self._mask([not voting or move == self._still for move in range(num_moves)]),
                "vote": self._mask([voting or vote == NO_VOTE for vote in range(num_votes)]),
            }
        # Votes do not move anybody in a turn for votes: one number for each is enough, that of the first move.
        named = (0, self._still)
        return self._mask(
            [(move in named and vote != NO_VOTE) or move == self._still if voting else vote == NO_VOTE
             for move, vote in self._pairs]
        )  # fmt: skip

    def _mask(self, allowed: list[bool]) -> Tensor:
        return torch.tensor(allowed, dtype=torch.int8, device=self._device).expand(self._num_streams, -1)

    def decode(self, actions: Any) -> tuple[Tensor, Tensor]:
        """Moves and votes [B].

        Args:
            actions: integers, arrays or tensors. Pairs: [B, 2], or a mapping `move` and `vote` to [B]; else [B] or
                [B, 1].

        Raises:
            ValueError: another shape or kind, or (if they come from the CPU) a number outside its range.
        """
        if isinstance(actions, Mapping):
            if self._pairs is not None or set(actions) != {"move", "vote"}:
                raise ValueError(f"actions: expected a member of {self.space}, batched, got a dict of {[*actions]}")
            columns = [as_tensor(actions[head], "actions") for head in ("move", "vote")]
        else:
            given = as_tensor(actions, "actions")
            columns = list(given.unbind(dim=1)) if given.dim() == 2 else [given]
        expected = [(self._num_streams,)] * len(self._num_choices)
        shapes = [tuple(column.shape) for column in columns]
        if shapes != expected:
            raise ValueError(f"actions: expected columns of shapes {expected}, got {shapes}")
        for column, num_choices in zip(columns, self._num_choices):
            if column.is_floating_point() or column.is_complex() or column.dtype == torch.bool:
                raise ValueError(f"actions: expected integers, got {column.dtype}")
            # Reading numbers from an accelerator would force a host-device sync at every step.
            if column.device.type == "cpu":
                low, high = (int(bound) for bound in column.aminmax())
                if low < 0 or high >= num_choices:
                    raise ValueError(f"actions: expected numbers from 0 to {num_choices - 1}, got {low} to {high}")
        columns = [on_device(column.to(torch.int64), self._device) for column in columns]
        if self._pairs is not None:
            columns = list(self._table[columns[0]].unbind(dim=1))
        return columns[0], columns[1]
