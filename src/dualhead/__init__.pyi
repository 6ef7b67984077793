__version__: str

from .agent import DualHeadRecurrentPPO as DualHeadRecurrentPPO
from .config import (
    NetworkConfig as NetworkConfig,
    NormConfig as NormConfig,
    PPOConfig as PPOConfig,
    TurnoverConfig as TurnoverConfig,
    WorldConfig as WorldConfig,
)
from .errors import (
    CheckpointError as CheckpointError,
    DataError as DataError,
    DivergedError as DivergedError,
    RunError as RunError,
    RunInUseError as RunInUseError,
    SettingsError as SettingsError,
    UnavailableEnvironment as UnavailableEnvironment,
)
from .networks.encoders import Encoder as Encoder
from .networks.memory import Memory as Memory, MemoryCell as MemoryCell
from .norms import NormEnforcer as NormEnforcer, NormEvents as NormEvents
from .running.config import RunConfig as RunConfig
from .running.evaluation import evaluate as evaluate
from .running.export import export as export
from .running.playing import Player as Player, Players as Players, load_policy as load_policy
from .running.trainer import TrainingResult as TrainingResult, resume as resume, train as train
from .running.trust import trust as trust
from .running.writers import Writer as Writer
from .sorrel import SorrelDualHeadPPO as SorrelDualHeadPPO
from .types import ByAgent as ByAgent, RecurrentState as RecurrentState
from .worlds.commons.config import CommonsConfig as CommonsConfig, Phase as Phase
from .worlds.commons.world import Commons as Commons
from .worlds.registry import register_world as register_world
from .worlds.streams import GymnasiumStreams as GymnasiumStreams, Streams as Streams, StreamStep as StreamStep
