"""The environment that a run's settings name."""

from __future__ import annotations

import torch

from dualhead.running.config import RunConfig
from dualhead.worlds.registry import open_world
from dualhead.worlds.streams import Streams


def open_streams(
    config: RunConfig, *, num_envs: int | None = None, vectorization: str = "sync", device: torch.device | str = "cpu"
) -> Streams:
    """The streams of a run's environment.

    Args:
        config: of the run.
        num_envs: environments (or worlds); None: as configured.
        vectorization: of Gymnasium environments, see `make_streams`.
        device: of a batched world.

    Raises:
        UnavailableEnvironment: it cannot be made.
    """
    num_envs = config.num_envs if num_envs is None else num_envs
    return open_world(config.env, config.world, num_envs=num_envs, vectorization=vectorization, device=device)
