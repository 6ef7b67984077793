"""Worlds of the commons for tests: drawn ones with exact rules, menus, turns, and comparisons."""

from __future__ import annotations

import math
from typing import Any

import torch

from dualhead.worlds.commons.actions import NO_VOTE
from dualhead.worlds.commons.config import CommonsConfig
from dualhead.worlds.commons.world import Commons

UP, DOWN, LEFT, RIGHT, STAY = range(5)
DESIGN_SCHEDULE = {
    "A": [0.30, 0.40, 0.55, 0.70, 0.85, 0.95, 1, 1, 1, 1],
    "B": [0, 0.05, 0.10, 0.10, 0.10, 0.10, 0.10, 0.15, 0.15, 0.20],
    "C": [0, 0, 0, 0.05, 0.10, 0.10, 0.10, 0.10, 0.15, 0.15],
    "D": [0, 0, 0, 0, 0, 0.05, 0.10, 0.10, 0.10, 0.15],
    "E": [0, 0, 0, 0, 0, 0, 0, 0.05, 0.10, 0.10],
}
STILL = {"initial_resources": 0, "respawn_probability": 0.0}
"""Nothing appears by itself."""
EXACT = {**STILL, "punishments_are": "deterministic", "patch_size": 5, "stay": True}
VARIED = {"num_agents": 3, "epoch_turns": 5, "stay": True, "respawn_probability": 0.1, "max_resources": 12}


def drawn(*drawings: str, **changes: Any) -> Commons:
    """Worlds of drawings, with exact rules but for the changes."""
    num_agents = len(drawings[0].strip().splitlines()[0].split())
    return Commons.from_ascii(drawings, CommonsConfig(**{**EXACT, "num_agents": num_agents, **changes}))


def bandit(num_worlds: int = 1, **changes: Any) -> Commons:
    worlds = Commons(CommonsConfig(**{"form": "bandit", "stay": True, **changes}), num_worlds=num_worlds)
    worlds.reset(seed=0)
    return worlds


def act(worlds: Commons, moves: Any, votes: Any = NO_VOTE) -> Any:
    """One turn; a single number is for all streams."""
    columns = [torch.as_tensor(column).expand(worlds.num_streams) for column in (moves, votes)]
    return worlds.step(torch.stack(columns, dim=1))


def slots(worlds: Commons, wanted: torch.Tensor) -> torch.Tensor:
    """The slot of each stream's menu that holds the kind it wants."""
    menus = worlds.observations()["menu"].view(worlds.num_streams, -1, len(worlds.config.resources))
    assert (menus.sum(-1) == 1).all()
    return menus.gather(2, wanted.view(-1, 1, 1).expand(-1, menus.shape[1], 1))[:, :, 0].argmax(1)


def random_actions(worlds: Commons, generator: torch.Generator) -> torch.Tensor:
    """Any moves and votes [B, 2]; needs `stay`."""
    moves = torch.randint(worlds.forage.num_moves + 1, (worlds.num_streams,), generator=generator)
    return torch.stack([moves, torch.randint(3, (worlds.num_streams,), generator=generator)], dim=1)


def assert_same(one: Any, other: Any) -> None:
    """Nested tensors are equal to the bit."""
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def row(batched: Any, index: int) -> Any:
    """One stream's part of nested tensors, as NumPy has it."""
    if isinstance(batched, dict):
        return {name: row(part, index) for name, part in batched.items()}
    return batched[index].numpy()[()]


def assert_binomial(counts: Any, trials: int, probability: float) -> None:
    """Every count is within 4.5 standard deviations: one false alarm in 150,000."""
    deviation = math.sqrt(trials * probability * (1 - probability))
    assert (abs(torch.as_tensor(counts) - trials * probability) <= 4.5 * deviation).all(), (counts, trials, probability)
