"""Where the agents of the commons find resources: patches of a grid, or menus. Letters: B streams, R kinds.

What lies on a cell or in a slot is a code: 0 nothing, 1 to R a resource kind, R + 1 a wall. All randomness comes from
the given generator, and no draw depends on what the agents did: worlds that share a generator stay independent.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch
from gymnasium import spaces
from torch import Generator, Tensor

from dualhead.types import Observations
from dualhead.worlds.commons.actions import MOVES
from dualhead.worlds.commons.config import CommonsConfig

EMPTY = 0
_NEVER = 1e-12
"""Nothing grows at a smaller probability: no run is so long, and gaps between growth must fit into 64 bits."""


class Patches:
    """A square patch for each of B streams, walls on its border, that its agent walks on.

    A move onto a wall leaves the agent where it is. Between turns every empty cell but the agent's own grows a resource
    with probability `respawn_probability`, each kind equally likely; a patch that would exceed `max_resources` keeps a
    random choice of the new ones.

    Attributes:
        num_moves: moves that can take something; the index after the last one is to stay and take nothing.
        space: what one stream sees, by name: `grid` [R + 1, D, D] uint8, D = 2 · window_radius + 1, one-hot channels of
            the kinds and of walls around the agent, which is always in the middle. Beyond the patch all is wall.
    """

    num_moves = len(MOVES)

    def __init__(self, num_streams: int, config: CommonsConfig, *, device: torch.device) -> None:
        num_kinds, radius = len(config.resources), config.window_radius
        self.config = config
        self.wall = num_kinds + 1
        # A rim as wide as the window reaches is part of every map, so that no window needs its edges looked at.
        self._side = side = config.patch_size + 2 * radius
        width = 2 * radius + 1
        self._window_shape = (num_kinds + 1, width, width)
        self.space: dict[str, spaces.Space] = {"grid": spaces.Box(0, 1, self._window_shape, np.uint8)}

        rows = torch.arange(radius + 1, radius + config.patch_size - 1, device=device)
        reach = torch.arange(-radius, radius + 1, device=device)
        self._inside = (rows[:, None] * side + rows).flatten()
        self._window = (reach[:, None] * side + reach).flatten()
        self._offsets = torch.tensor([-side, side, -1, 1, 0], device=device)
        # One code for each place of the window: comparing equal shapes is seven times as fast as broadcasting a column.
        self._channels = torch.arange(1, num_kinds + 2, dtype=torch.int8, device=device)[:, None].repeat(1, width**2)
        self._cells = torch.full((num_streams, side * side), self.wall, dtype=torch.int8, device=device)
        self._positions = self._inside[:1].repeat(num_streams)

    def begin(self, generator: Generator) -> None:
        """Lays out a fresh place for every stream."""
        num_streams, num_inside, device = len(self._cells), len(self._inside), self._cells.device
        num_resources = self.config.initial_resources
        draws = torch.rand(num_streams, num_inside, generator=generator, device=device)
        # The largest draws are a random choice of distinct cells: one for the agent, the others for resources.
        chosen = self._inside[draws.topk(num_resources + 1, dim=1).indices]
        kinds = torch.randint(1, self.wall, (num_streams, num_resources), generator=generator, device=device)
        self._cells[:, self._inside] = EMPTY
        self._cells.scatter_(1, chosen[:, 1:], kinds.to(torch.int8))
        self._positions = chosen[:, 0].clone()

    def take(self, moves: Tensor) -> Tensor:
        """Moves [B] from 0 to `num_moves`; the codes [B] that were met. A resource that was met is gone."""
        targets = self._positions + self._offsets[moves]
        met = self._cells.gather(1, targets[:, None])[:, 0]
        self._positions = torch.where(met == self.wall, self._positions, targets)
        # The agent's cell is always empty: clearing it collects what was there, and changes nothing at a wall.
        self._cells.scatter_(1, self._positions[:, None], EMPTY)
        return met.long()

    def grow(self, generator: Generator) -> None:
        """What appears by itself between two turns."""
        probability, max_resources = self.config.respawn_probability, self.config.max_resources
        if probability < _NEVER:
            return
        num_inside = len(self._inside)
        hits = _bernoulli_hits(len(self._cells) * num_inside, probability, generator)
        shape, device = hits.shape, hits.device
        kinds = torch.randint(1, self.wall, shape, generator=generator, device=device, dtype=torch.int8)
        is_hit = hits < len(self._cells) * num_inside
        # What is no hit points at the corner of the first map: a wall, where nothing grows.
        streams = torch.where(is_hit, hits // num_inside, 0)
        cells = torch.where(is_hit, self._inside[hits % num_inside], 0)
        rows = streams * self._cells.shape[1] + cells
        before = self._cells.view(-1)[rows]
        grows = (before == EMPTY) & (self._positions[streams] != cells)
        if max_resources is not None:
            priority = torch.rand(shape, generator=generator, device=device, dtype=torch.float64)
            room = max_resources - ((self._cells > EMPTY) & (self._cells < self.wall)).sum(dim=1)
            grows &= _rank_within(streams, priority + ~grows) < room[streams]
        self._cells.view(-1)[rows] = torch.where(grows, kinds, before)

    def observe(self) -> Observations:
        """[B, ...] for each name of `space`."""
        seen = self._cells.gather(1, self._positions[:, None] + self._window)
        channels = (seen[:, None] == self._channels).view(torch.uint8)
        return {"grid": channels.view(-1, *self._window_shape)}

    def tensors(self) -> dict[str, Tensor]:
        """Live state by name, for checkpoints."""
        return {"cells": self._cells, "positions": self._positions}

    def check(self, tensors: dict[str, Tensor]) -> None:
        """Raises ValueError where tensors of the right shapes are no possible state; the message names one."""
        cells, walls = tensors["cells"], self._cells == self.wall
        if ((cells < EMPTY) | (cells > self.wall) | ((cells == self.wall) != walls)).any():
            raise ValueError("cells: expected walls all along the border of every patch, and none inside")
        if not torch.isin(tensors["positions"], self._inside).all():
            raise ValueError("positions: expected an agent on every patch")

    def codes(self) -> Tensor:
        """What lies where, [B, rows, columns], to be drawn."""
        return self._inner(self._cells)

    def agents(self) -> Tensor | None:
        """Row and column of each agent, [B, 2]; None where agents have no position."""
        rows = torch.stack([self._positions // self._side, self._positions % self._side], dim=1)
        return rows - self.config.window_radius

    def place(self, codes: np.ndarray, agents: np.ndarray | None) -> None:
        """Takes over a drawn scene: codes and agents as `codes` and `agents` give them.

        Raises:
            ValueError: it is not a possible one.
        """
        size = self.config.patch_size
        if codes.shape[1:] != (size, size):
            raise ValueError(f"expected patches of {size} x {size} cells, got {codes.shape[1:]}")
        if agents is None:
            raise ValueError("expected one agent on each patch")
        device, cells = self._cells.device, self._cells.clone()
        self._inner(cells).copy_(torch.from_numpy(codes))
        rows, columns = torch.from_numpy(agents + self.config.window_radius).to(device).unbind(dim=1)
        self.check({"cells": cells, "positions": rows * self._side + columns})
        self._cells, self._positions = cells, rows * self._side + columns

    def _inner(self, cells: Tensor) -> Tensor:
        """The patches without their rims [B, rows, columns], a view."""
        inner = slice(self.config.window_radius, self._side - self.config.window_radius)
        return cells.view(-1, self._side, self._side)[:, inner, inner]


class Menus:
    """A menu of slots for each of B streams, all of different kinds, drawn anew every turn. Methods as of `Patches`.

    Attributes:
        num_moves: slots.
        space: `menu` [slots · R] float32, the one-hot kinds of the slots side by side.
    """

    def __init__(self, num_streams: int, config: CommonsConfig, *, device: torch.device) -> None:
        num_kinds, num_slots = len(config.resources), config.menu_size
        self.num_moves = num_slots
        self.space: dict[str, spaces.Space] = {"menu": spaces.Box(0.0, 1.0, (num_slots * num_kinds,), np.float32)}
        # Every menu there can be; a draw is a row number, and what one sees and takes is looked up.
        menus = torch.tensor(list(itertools.permutations(range(1, num_kinds + 1), num_slots)), device=device)
        self._menus = torch.cat([menus, torch.zeros_like(menus[:, :1])], dim=1)
        self._seen = torch.nn.functional.one_hot(menus - 1, num_kinds).flatten(1).float()
        self._drawn = torch.zeros(num_streams, dtype=torch.int64, device=device)

    def begin(self, generator: Generator) -> None:
        self.grow(generator)

    def take(self, moves: Tensor) -> Tensor:
        return self._menus.view(-1)[self._drawn * self._menus.shape[1] + moves]

    def grow(self, generator: Generator) -> None:
        self._drawn = torch.randint(len(self._menus), self._drawn.shape, generator=generator, device=self._drawn.device)

    def observe(self) -> Observations:
        return {"menu": self._seen[self._drawn]}

    def tensors(self) -> dict[str, Tensor]:
        return {"drawn": self._drawn}

    def check(self, tensors: dict[str, Tensor]) -> None:
        if ((tensors["drawn"] < 0) | (tensors["drawn"] >= len(self._menus))).any():
            raise ValueError(f"drawn: expected numbers of menus, from 0 to {len(self._menus) - 1}")

    def codes(self) -> Tensor:
        return self._menus[self._drawn, None, :-1]

    def agents(self) -> None:
        return None

    def place(self, codes: np.ndarray, agents: np.ndarray | None) -> None:
        row_of = {tuple(menu): row for row, menu in enumerate(self._menus[:, :-1].tolist())}
        rows = [row_of.get(tuple(menu.flatten().tolist())) for menu in codes]
        if None in rows or agents is not None:
            raise ValueError(f"expected menus of {self.num_moves} different resources, and nothing else")
        self._drawn = torch.tensor(rows, device=self._drawn.device)


def _bernoulli_hits(num_trials: int, probability: float, generator: Generator) -> Tensor:
    """Which of many independent trials succeed, without drawing each: the gaps between successes are geometric.

    Returns:
        Ascending trial numbers, of a length that depends on the arguments alone; those ≥ num_trials are none. The
        length is ten standard deviations above the mean: that a success has no room is less likely than 1e-20.
    """
    spread = math.sqrt(num_trials * probability * (1.0 - probability))
    length = min(num_trials, math.ceil(num_trials * probability + 10.0 * spread + 20.0))
    gaps = torch.ones(length, dtype=torch.int64, device=generator.device)
    if probability < 1.0:
        gaps.geometric_(probability, generator=generator)
    return gaps.cumsum(dim=0) - 1


def _rank_within(groups: Tensor, priority: Tensor) -> Tensor:
    """How many of the same group come before each; the lowest priority first. Priorities are in [0, 2)."""
    order = (2.0 * groups + priority).argsort()
    in_order = groups[order]
    ranks = torch.arange(len(groups), device=groups.device) - torch.searchsorted(in_order, in_order)
    return torch.empty_like(ranks).scatter_(0, order, ranks)
