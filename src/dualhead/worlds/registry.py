"""Worlds that bring settings of their own, by name; every other environment id is Gymnasium's."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from dualhead.config import WorldConfig
from dualhead.worlds.commons.config import COMMONS, CommonsConfig

if TYPE_CHECKING:
    import torch

    from dualhead.worlds.streams import Streams


class World(NamedTuple):
    """Fields:
    settings: class of its settings.
    open: makes its streams: `open(settings, num_worlds=..., device=...)`.
    """

    settings: type[WorldConfig]
    open: Callable[..., Streams]


def _open_commons(settings: CommonsConfig, *, num_worlds: int, device: torch.device | str) -> Streams:
    from dualhead.worlds.commons.world import Commons  # imports torch, which `--help` does not need

    return Commons(settings, num_worlds=num_worlds, device=device)


WORLDS: dict[str, World] = {COMMONS: World(CommonsConfig, _open_commons)}


def register_world(name: str, settings: type[WorldConfig], open: Callable[..., Streams]) -> None:
    """Registers a world by name: `dualhead train NAME --import MODULE --world.SETTING ...`.

    Args:
        name: instead of an environment id.
        settings: class of its settings, a `WorldConfig`.
        open: makes its streams, `open(settings, num_worlds=..., device=...)`.

    Raises:
        TypeError: `settings` is no such class.
        ValueError: the name is taken.
    """
    if not (isinstance(settings, type) and issubclass(settings, WorldConfig)):
        raise TypeError(f"settings of world {name!r}: expected a class derived from WorldConfig, got {settings!r}")
    if name in WORLDS:
        raise ValueError(f"there is a world {name!r} already: choose another name")
    WORLDS[name] = World(settings, open)
