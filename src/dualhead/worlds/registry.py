"""The world that a run's settings name."""

from __future__ import annotations

import torch

from dualhead.config import COMMONS, RunConfig
from dualhead.worlds.commons import Commons
from dualhead.worlds.streams import Streams, make_streams


def open_streams(
    config: RunConfig, *, num_envs: int | None = None, vectorization: str = "sync", device: torch.device | str = "cpu"
) -> Streams:
    """The streams of a run's environment.

    Args:
        config: names it; the commons has its rules there, too.
        num_envs: environments (or worlds); None: as configured.
        vectorization: of Gymnasium environments, see `make_streams`.
        device: of a batched world.

    Raises:
        UnavailableEnvironment: it cannot be made.
    """
    num_envs = config.num_envs if num_envs is None else num_envs
    if config.env == COMMONS:
        return Commons(config.commons, num_worlds=num_envs, device=device)
    return make_streams(config.env, num_envs, vectorization=vectorization)
