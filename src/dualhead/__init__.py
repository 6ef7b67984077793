"""Recurrent PPO: agents that remember, decide on several things at once and internalise norms."""

from dualhead.agent import DualHeadRecurrentPPO
from dualhead.config import NetworkConfig, NormConfig, PPOConfig, RunConfig
from dualhead.norms import NormEnforcer, NormEvents
from dualhead.running.playing import Player, load_policy
from dualhead.storage import CheckpointError
from dualhead.types import DataError, RecurrentState

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "DataError",
    "DualHeadRecurrentPPO",
    "NetworkConfig",
    "NormConfig",
    "NormEnforcer",
    "NormEvents",
    "PPOConfig",
    "Player",
    "RecurrentState",
    "RunConfig",
    "load_policy",
]
