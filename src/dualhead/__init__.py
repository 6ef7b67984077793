"""Recurrent PPO: agents that remember, decide on several things at once and internalise norms."""

from dualhead.agent import DualHeadRecurrentPPO
from dualhead.config import CommonsConfig, NetworkConfig, NormConfig, Phase, PPOConfig, RunConfig
from dualhead.networks.encoders import Encoder
from dualhead.networks.memory import Memory, MemoryCell
from dualhead.norms import NormEnforcer, NormEvents
from dualhead.running.playing import Player, load_policy
from dualhead.storage import CheckpointError
from dualhead.types import DataError, RecurrentState

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "CommonsConfig",
    "DataError",
    "DualHeadRecurrentPPO",
    "Encoder",
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
    "load_policy",
]
