"""The commons drawn: characters for tests, pixels for people. Codes: 0 nothing, 1 to R a resource kind, R + 1 a wall.

A world in characters is its patches side by side: `@` an agent, `#` a wall, `.` nothing, and a letter for each
resource: its name where all names are single letters, else A, B, C... in their order. A bandit's menus are words on one
line.

    ######  ######
    #@A..#  #...B#
    #....#  #..@.#
    #....#  #....#
    #.B..#  #....#
    ######  ######
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

CELL = 8
"""Pixels on a side of a cell."""
PATCHES_PER_ROW = 5
_BLOCK = 16
"""Pictures are a multiple of this on each side: video encoders want it."""

_EMPTY, _WALL, _AGENT, _NOTHING = (58, 62, 68), (120, 124, 130), (255, 255, 255), (24, 26, 30)
_UP, _DOWN, _PUNISHED = (70, 190, 100), (220, 70, 70), (255, 140, 0)
_KINDS = (
    (232, 76, 61),
    (65, 145, 225),
    (245, 205, 70),
    (155, 95, 205),
    (80, 200, 190),
    (240, 150, 190),
    (170, 215, 80),
    (175, 125, 80),
)


def symbols(resources: Sequence[str]) -> str:
    """One character for each code."""
    if all(len(name) == 1 and name not in ".#@" and not name.isspace() for name in resources):
        return "." + "".join(resources) + "#"
    return "." + "ABCDEFGH"[: len(resources)] + "#"


def draw(codes: NDArray[Any], agents: NDArray[Any] | None, resources: Sequence[str]) -> str:
    """Patches [A, rows, columns] and positions [A, 2] in characters."""
    characters = np.array(list(symbols(resources)))[codes]
    if agents is not None:
        characters[np.arange(len(agents)), agents[:, 0], agents[:, 1]] = "@"
    # A bandit's menus have one row, and no need of wide gaps.
    gap = "  " if codes.shape[1] > 1 else " "
    return "\n".join(gap.join("".join(row) for row in patches) for patches in characters.swapaxes(0, 1))


def parse(
    drawing: str, resources: Sequence[str], num_agents: int
) -> tuple[list[NDArray[np.int8]], list[tuple[int, int]] | None]:
    """Reads a drawing: codes of each patch, and where the agents are, or None where there are none.

    Raises:
        ValueError: it has another number of patches, an unknown character, ragged rows, or an agent too many.
    """
    rows = [line.split() for line in drawing.strip().splitlines()]
    if any(len(row) != num_agents for row in rows):
        raise ValueError(f"drawing: expected {num_agents} patches on every line, got {[len(row) for row in rows]}")
    code_of = {character: code for code, character in enumerate(symbols(resources))} | {"@": 0}
    patches, agents = [], []
    for patch in zip(*rows):
        unknown = sorted(set("".join(patch)) - code_of.keys())
        if unknown or len({len(row) for row in patch}) > 1:
            raise ValueError(f"drawing: expected rows of one length from the characters {[*code_of]}, got {patch}")
        patches.append(np.array([[code_of[character] for character in row] for row in patch], np.int8))
        here = [(y, row.index("@")) for y, row in enumerate(patch) if "@" in row]
        if "".join(patch).count("@") > 1:
            raise ValueError(f"drawing: expected one agent on a patch, got {patch}")
        agents += here
    if len(agents) not in (0, num_agents):
        raise ValueError(f"drawing: expected an agent on every patch or on none, got {len(agents)}")
    return patches, agents or None


def frame(
    codes: NDArray[Any],
    agents: NDArray[Any] | None,
    *,
    num_kinds: int,
    votes: NDArray[Any],
    punished: NDArray[Any],
    level: float,
    is_enforced: bool,
) -> NDArray[np.uint8]:
    """One world as a picture.

    Args:
        codes: [A, rows, columns].
        agents: [A, 2] row and column, or None.
        num_kinds: R.
        votes: [A], the last ones: 1 up (green), 2 down (red). Left half of the strip under a patch.
        punished: [A] bool, in the last turn (orange). Right half of the strip.
        level: p in [0, 1], the bar at the bottom; grey where `is_enforced` is false and nobody is punished.

    Returns:
        [height, width, 3] uint8, both sides a multiple of 16.
    """
    num_agents, height, width = codes.shape
    palette = np.array([_EMPTY, *_KINDS[:num_kinds], _WALL], np.uint8)
    cells = palette[codes]
    if agents is not None:
        cells[np.arange(num_agents), agents[:, 0], agents[:, 1]] = _AGENT
    columns = min(num_agents, PATCHES_PER_ROW)
    rows = -(-num_agents // columns)
    # In cells: every patch has its strip and a gap below, and a gap to its right.
    picture = np.empty((rows * (height + 2) + 3, columns * (width + 1) + 1, 3), np.uint8)
    picture[:] = _NOTHING
    for agent in range(num_agents):
        y, x = 1 + agent // columns * (height + 2), 1 + agent % columns * (width + 1)
        picture[y : y + height, x : x + width] = cells[agent]
    pixels = picture.repeat(CELL, axis=0).repeat(CELL, axis=1)
    half = width * CELL // 2
    for agent in range(num_agents):
        y = (1 + agent // columns * (height + 2) + height) * CELL + CELL // 4
        x = (1 + agent % columns * (width + 1)) * CELL
        strip = pixels[y : y + CELL // 2]
        strip[:, x : x + half] = (_EMPTY, _UP, _DOWN)[votes[agent]]
        strip[:, x + half : x + 2 * half] = _PUNISHED if punished[agent] else _EMPTY
    bar = pixels[-2 * CELL : -CELL, CELL:-CELL]
    bar[:] = _EMPTY
    bar[:, : round(level * bar.shape[1])] = _PUNISHED if is_enforced else _WALL
    missing = [-side % _BLOCK for side in pixels.shape[:2]]
    return np.stack(
        [np.pad(pixels[..., c], ((0, missing[0]), (0, missing[1])), constant_values=_NOTHING[c]) for c in range(3)], -1
    )
