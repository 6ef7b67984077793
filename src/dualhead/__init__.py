"""Recurrent PPO: agents that remember, decide on several things at once and internalise norms."""

from dualhead.agent import DualHeadRecurrentPPO
from dualhead.config import NetworkConfig, NormConfig, PPOConfig
from dualhead.norms import NormEnforcer, NormEvents
from dualhead.running.config import RunConfig
from dualhead.running.playing import Player, load_policy
from dualhead.storage import CheckpointError
from dualhead.types import DataError, RecurrentState
from dualhead.worlds.commons.config import CommonsConfig, Phase

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "CommonsConfig",
    "DataError",
    "DualHeadRecurrentPPO",
    "NetworkConfig",
    "NormConfig",
    "NormEnforcer",
    "NormEvents",
    "PPOConfig",
    "Phase",
    "Player",
    "RecurrentState",
    "RunConfig",
    "load_policy",
]
