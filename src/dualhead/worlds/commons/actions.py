"""Moves and votes of the commons, as pairs or in the two historical single-number codings.

A move is an index from 0 to `num_moves`; `num_moves`, one past the last, is to stay where one is (or to take nothing).
A vote is none, up or down. With four moves:

    pair        (move, vote), two heads
    composite   13 numbers: move · 3 + vote, and 12 for nothing
    simple      7 numbers: 0 to 3 a move, 4 vote up, 5 vote down, 6 nothing; who votes stays
"""

from __future__ import annotations

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


def composite_to_pair(indices: Tensor, *, num_moves: int = len(MOVES)) -> tuple[Tensor, Tensor]:
    """Moves and votes of `move · 3 + vote`; 3 · num_moves stays and casts no vote."""
    return indices // NUM_VOTES, indices % NUM_VOTES


def pair_to_composite(moves: Tensor, votes: Tensor, *, num_moves: int = len(MOVES)) -> Tensor:
    """`move · 3 + vote`, or 3 · num_moves for nothing.

    Raises:
        ValueError: a vote without a move, which the coding cannot say.
    """
    if ((moves == num_moves) & (votes != NO_VOTE)).any():
        raise ValueError("the composite coding has no number for a vote without a move")
    return moves * NUM_VOTES + votes


def simple_to_pair(indices: Tensor, *, num_moves: int = len(MOVES)) -> tuple[Tensor, Tensor]:
    """Moves and votes of a move, a vote up (num_moves), a vote down, or nothing."""
    votes = torch.where(indices == num_moves, VOTE_UP, torch.where(indices == num_moves + 1, VOTE_DOWN, NO_VOTE))
    return indices.clamp(max=num_moves), votes


def pair_to_simple(moves: Tensor, votes: Tensor, *, num_moves: int = len(MOVES)) -> Tensor:
    """The vote where there is one, else the move: a vote overrides the move."""
    without_vote = torch.where(moves == num_moves, num_moves + 2, moves)
    return torch.where(votes == NO_VOTE, without_vote, num_moves - 1 + votes)


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
        self.num_streams = num_streams
        self.num_moves = num_moves
        self.device = device
        self._coding = coding
        self._num_choices = {
            "pair": [num_moves + stay, NUM_VOTES],
            "composite": [num_moves * NUM_VOTES + 1],
            "simple": [num_moves + 3],
        }[coding]
        self.space: spaces.Space
        if coding == "pair":
            self.space = spaces.Dict(
                move=spaces.Discrete(self._num_choices[0]), vote=spaces.Discrete(self._num_choices[1])
            )
        else:
            self.space = spaces.Discrete(self._num_choices[0])

    def masks(self, *, voting: bool) -> dict[str, Tensor]:
        """What may be chosen in a turn for votes, or in one for moves: int8 [B, choices] for each head by name, or for
        the one head `action`. Every head keeps a choice: in a turn for votes to stay, else a move that does nothing.
        """
        n = self.num_moves
        allowed: dict[str, list[bool]]
        if self._coding == "pair":
            num_choices = self._num_choices[0]
            still = n if num_choices > n else 0
            allowed = {
                "move": [not voting or move == still for move in range(num_choices)],
                "vote": [voting or vote == NO_VOTE for vote in range(NUM_VOTES)],
            }
        elif self._coding == "simple":
            allowed = {"action": [not voting] * n + [voting, voting, True]}
        else:
            # One name for each vote is enough: those of the first move.
            pairs = [divmod(index, NUM_VOTES) for index in range(n * NUM_VOTES)]
            named = [move == 0 and vote != NO_VOTE if voting else vote == NO_VOTE for move, vote in pairs]
            allowed = {"action": [*named, True]}
        return {
            head: torch.tensor(choices, dtype=torch.int8, device=self.device).expand(self.num_streams, -1)
            for head, choices in allowed.items()
        }

    def decode(self, actions: Any) -> tuple[Tensor, Tensor]:
        """Moves and votes [B].

        Args:
            actions: integers, arrays or tensors. Pairs: [B, 2], or a mapping `move` and `vote` to [B]; else [B] or
                [B, 1].

        Raises:
            ValueError: another shape or kind, or (if they come from the CPU) a number outside its range.
        """
        given = self._columns(actions)
        expected = (self.num_streams, len(self._num_choices))
        if tuple(given.shape) != expected:
            raise ValueError(f"actions: expected shape {expected}, got {tuple(given.shape)}")
        # What comes from an accelerator would have to be waited for at every step.
        if given.device.type == "cpu":
            for column, num_choices in zip(given.unbind(dim=1), self._num_choices):
                low, high = (int(bound) for bound in column.aminmax())
                if low < 0 or high >= num_choices:
                    raise ValueError(f"actions: expected numbers from 0 to {num_choices - 1}, got {low} to {high}")
        given = on_device(given, self.device)
        if self._coding == "pair":
            return given[:, 0], given[:, 1]
        convert = composite_to_pair if self._coding == "composite" else simple_to_pair
        return convert(given[:, 0], num_moves=self.num_moves)

    def _columns(self, actions: Any) -> Tensor:
        if not isinstance(actions, Mapping):
            given = self._integers(actions)
            return given[:, None] if self._coding != "pair" and given.dim() == 1 else given
        if self._coding != "pair" or set(actions) != {"move", "vote"}:
            raise ValueError(f"actions: expected a member of {self.space}, batched, got a dict of {sorted(actions)}")
        moves, votes = self._integers(actions["move"]), self._integers(actions["vote"])
        if moves.shape != votes.shape:
            raise ValueError(
                f"actions: expected as many moves as votes, got {tuple(moves.shape)}, {tuple(votes.shape)}"
            )
        return torch.stack([moves, votes], dim=-1)

    def _integers(self, values: Any) -> Tensor:
        tensor = as_tensor(values, "actions")
        if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
            raise ValueError(f"actions: expected integers, got {tensor.dtype}")
        return tensor.to(torch.int64)
