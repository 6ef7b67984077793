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
    from dualhead.worlds.commons.world import Commons  # takes torch, which `--help` can do without

    return Commons(settings, num_worlds=num_worlds, device=device)


_WORLDS: dict[str, World] = {COMMONS: World(CommonsConfig, _open_commons)}


def register_world(name: str, settings: type[WorldConfig], open: Callable[..., Streams]) -> None:
    """Makes a world known by name: `dualhead train NAME --import MODULE --world.SETTING ...`.

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
    if name in _WORLDS:
        raise ValueError(f"there is a world {name!r} already: choose another name")
    _WORLDS[name] = World(settings, open)


def worlds() -> dict[str, type[WorldConfig]]:
    """Worlds with settings of their own, and the classes of these."""
    return {name: world.settings for name, world in _WORLDS.items()}


def world_settings(env: str) -> type[WorldConfig]:
    """The class of a world's settings; `WorldConfig` itself for a Gymnasium id."""
    return worlds().get(env, WorldConfig)


def open_world(
    env: str, settings: WorldConfig, *, num_envs: int, vectorization: str = "sync", device: torch.device | str = "cpu"
) -> Streams:
    """The streams of an environment id.

    Args:
        env: name of a world, or a Gymnasium id.
        settings: of the world.
        num_envs: environments, or worlds.
        vectorization: of Gymnasium environments, see `make_streams`.
        device: of a batched world.

    Raises:
        UnavailableEnvironment: it cannot be made.
    """
    from dualhead.worlds.streams import make_streams

    if env in _WORLDS:
        return _WORLDS[env].open(settings, num_worlds=num_envs, device=device)
    return make_streams(env, num_envs, vectorization=vectorization)


def environment_ids() -> list[str]:
    """Every name that can be trained here: our worlds, Gymnasium's ids, and those of installed extras."""
    from dualhead.worlds.streams import gymnasium_ids

    return sorted([*_WORLDS, *gymnasium_ids()])
