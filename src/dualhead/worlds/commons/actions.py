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

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from dualhead.spaces import as_tensor
from dualhead.types import on_device
from dualhead.worlds.commons.config import CommonsConfig

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
    """The actions of B streams in the coding of a configuration.

    Args:
        num_moves: moves that there are, not counting to stay.

    Attributes:
        space, mask_space: of one stream.
    """

    def __init__(self, config: CommonsConfig, num_streams: int, *, num_moves: int, device: torch.device) -> None:
        self._num_streams, self._device, self._is_pair = num_streams, device, config.coding == "pair"
        heads: dict[str, list[Any]]  # what each choice says about move and vote; None: nothing
        if config.coding == "pair":
            moves = [(move, None) for move in range(num_moves + config.stay)]
            heads = {"move": moves, "vote": [(None, vote) for vote in range(NUM_VOTES)]}
        else:
            heads = {"action": pairs_of(config.coding, num_moves)}
            self._table = torch.tensor(heads["action"], device=device)
        still = 0 if config.coding == "pair" and not config.stay else num_moves

        def is_allowed(move: int | None, vote: int | None, *, voting: bool) -> bool:
            if not voting:
                return vote in (None, NO_VOTE)
            # Nobody moves in a turn for votes: one number for each vote is enough, that of the first move or of none.
            return move in (None, still) or (move == 0 and vote not in (None, NO_VOTE))

        self._num_choices = [len(choices) for choices in heads.values()]
        nvec = dict(zip(heads, self._num_choices))
        self.space = self._of_heads({head: spaces.Discrete(n) for head, n in nvec.items()})
        self.mask_space = self._of_heads({head: spaces.Box(0, 1, (n,), np.int8) for head, n in nvec.items()})
        self._masks: list[dict[str, Tensor]] = [{}, {}]
        for voting, head in itertools.product((False, True), heads):
            allowed = [is_allowed(*choice, voting=voting) for choice in heads[head]]
            self._masks[voting][head] = torch.tensor(allowed, dtype=torch.int8, device=device)

    def _of_heads(self, parts: dict[str, Any]) -> Any:
        return parts["action"] if not self._is_pair else spaces.Dict(parts)

    def mask(self, *, voting: bool) -> Any:
        """What may be chosen in a turn for votes, or in one for moves: int8 [B, choices], for pairs a dict by head.

        In a turn for votes the move head has one choice left: to stay, else the first move, which does nothing then.
        """
        masks = {head: mask.expand(self._num_streams, -1) for head, mask in self._masks[voting].items()}
        return masks if self._is_pair else masks["action"]

    def decode(self, actions: Any) -> tuple[Tensor, Tensor]:
        """Moves and votes [B].

        Args:
            actions: integers, arrays or tensors. Pairs: [B, 2], or a mapping `move` and `vote` to [B]; else [B] or
                [B, 1].

        Raises:
            ValueError: another shape or kind, or (if they come from the CPU) a number outside its range.
        """
        if isinstance(actions, Mapping):
            if not self._is_pair or set(actions) != {"move", "vote"}:
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
        if not self._is_pair:
            columns = list(self._table[columns[0]].unbind(dim=1))
        return columns[0], columns[1]
