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


def parse(drawing: str, resources: Sequence[str], num_agents: int) -> tuple[NDArray[Any], NDArray[Any] | None]:
    """Reads a drawing: codes [A, rows, columns], and where the agents are [A, 2], or None where there are none.

    Raises:
        ValueError: it has another number of patches, an unknown character, ragged rows, or an agent too many.
    """
    rows = [line.split() for line in drawing.strip().splitlines()]
    if any(len(row) != num_agents for row in rows):
        raise ValueError(f"drawing: expected {num_agents} patches on every line, got {[len(row) for row in rows]}")
    known, widths = symbols(resources), {len(row) for line in rows for row in line}
    if not set("".join(drawing.split())) <= {*known, "@"} or len(widths) != 1:
        raise ValueError(f"drawing: expected rows of one length, in the characters {known + '@'}, got {drawing}")
    scene = np.array([[list(row) for row in line] for line in rows]).swapaxes(0, 1)
    agents = np.argwhere(scene == "@")  # [.., 3], patch, row and column
    if len(agents) and agents[:, 0].tolist() != [*range(num_agents)]:
        raise ValueError(f"drawing: expected one agent on every patch, or none at all, got {drawing}")
    codes = sum(code * (scene == character) for code, character in enumerate(known))
    return np.asarray(codes, np.int8), agents[:, 1:] if len(agents) else None


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
    """One world as a picture [height, width, 3] uint8, both sides a multiple of 16.

    Args:
        codes, agents: as in `draw`.
        num_kinds: R.
        votes: [A], the last ones: 1 up (green), 2 down (red). Left half of the strip under a patch.
        punished: [A] bool, in the last turn (orange). Right half of the strip.
        level: p in [0, 1], the bar at the bottom; grey if not `is_enforced`.
    """
    num_agents, height, width = codes.shape
    palette = np.array([_EMPTY, *_KINDS[:num_kinds], _WALL], np.uint8)
    cells = palette[codes]
    if agents is not None:
        cells[np.arange(num_agents), agents[:, 0], agents[:, 1]] = _AGENT
    columns = min(num_agents, PATCHES_PER_ROW)
    # In cells: every patch has its strip and a gap below, and a gap to its right; the bar comes last.
    rows_used, columns_used = -(-num_agents // columns) * (height + 2) + 3, columns * (width + 1) + 1
    pixels = np.empty([-(-side * CELL // _BLOCK) * _BLOCK for side in (rows_used, columns_used)] + [3], np.uint8)
    pixels[:] = _NOTHING
    half = width * CELL // 2
    for agent in range(num_agents):
        y, x = (1 + agent // columns * (height + 2)) * CELL, (1 + agent % columns * (width + 1)) * CELL
        patch = pixels[y : y + height * CELL, x : x + width * CELL]
        patch[:] = cells[agent].repeat(CELL, axis=0).repeat(CELL, axis=1)
        strip = pixels[y + height * CELL + CELL // 4 :][: CELL // 2, x : x + 2 * half]
        strip[:, :half] = (_EMPTY, _UP, _DOWN)[votes[agent]]
        strip[:, half:] = _PUNISHED if punished[agent] else _EMPTY
    bar = pixels[(rows_used - 2) * CELL : (rows_used - 1) * CELL, CELL : (columns_used - 1) * CELL]
    bar[:] = _EMPTY
    bar[:, : round(level * bar.shape[1])] = _PUNISHED if is_enforced else _WALL
    return pixels
