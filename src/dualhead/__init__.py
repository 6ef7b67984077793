"""Recurrent PPO: agents that remember, decide on several things at once and internalise norms."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dualhead.agent import DualHeadRecurrentPPO
    from dualhead.config import NetworkConfig, NormConfig, PPOConfig, TurnoverConfig, WorldConfig
    from dualhead.errors import (
        CheckpointError,
        DataError,
        DivergedError,
        RunError,
        RunInUseError,
        SettingsError,
        UnavailableEnvironment,
    )
    from dualhead.networks.encoders import Encoder
    from dualhead.networks.memory import Memory, MemoryCell
    from dualhead.norms import NormEnforcer, NormEvents
    from dualhead.running.config import RunConfig
    from dualhead.running.evaluation import evaluate
    from dualhead.running.export import export
    from dualhead.running.playing import Player, load_policy
    from dualhead.running.trainer import TrainingResult, resume, train
    from dualhead.running.writers import Writer
    from dualhead.types import RecurrentState
    from dualhead.worlds.commons.config import CommonsConfig, Phase
    from dualhead.worlds.commons.world import Commons
    from dualhead.worlds.registry import register_world
    from dualhead.worlds.streams import GymnasiumStreams, Streams, StreamStep

_HOMES = {
    "agent": ("DualHeadRecurrentPPO",),
    "config": ("NetworkConfig", "NormConfig", "PPOConfig", "TurnoverConfig", "WorldConfig"),
    "errors": (
        "CheckpointError",
        "DataError",
        "DivergedError",
        "RunError",
        "RunInUseError",
        "SettingsError",
        "UnavailableEnvironment",
    ),
    "networks.encoders": ("Encoder",),
    "networks.memory": ("Memory", "MemoryCell"),
    "norms": ("NormEnforcer", "NormEvents"),
    "running.config": ("RunConfig",),
    "running.evaluation": ("evaluate",),
    "running.export": ("export",),
    "running.playing": ("Player", "load_policy"),
    "running.trainer": ("TrainingResult", "resume", "train"),
    "running.writers": ("Writer",),
    "types": ("RecurrentState",),
    "worlds.commons.config": ("CommonsConfig", "Phase"),
    "worlds.commons.world": ("Commons",),
    "worlds.registry": ("register_world",),
    "worlds.streams": ("GymnasiumStreams", "StreamStep", "Streams"),
}
_HOME = {name: f"dualhead.{home}" for home, names in _HOMES.items() for name in names}
"""Where each public name lives: torch is imported when the first of them is used, not with `import dualhead`."""


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("dualhead")
    if name not in _HOME:
        raise AttributeError(f"module 'dualhead' has no attribute {name!r}")
    found = globals()[name] = getattr(importlib.import_module(_HOME[name]), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})


__all__ = [
    "CheckpointError",
    "Commons",
    "CommonsConfig",
    "DataError",
    "DivergedError",
    "DualHeadRecurrentPPO",
    "Encoder",
    "GymnasiumStreams",
    "Memory",
    "MemoryCell",
    "NetworkConfig",
    "NormConfig",
    "NormEnforcer",
    "NormEvents",
    "PPOConfig",
    "Phase",
    "Player",
    "RecurrentState",
    "RunConfig",
    "RunError",
    "RunInUseError",
    "SettingsError",
    "StreamStep",
    "Streams",
    "TrainingResult",
    "TurnoverConfig",
    "UnavailableEnvironment",
    "WorldConfig",
    "Writer",
    "evaluate",
    "export",
    "load_policy",
    "register_world",
    "resume",
    "train",
]
