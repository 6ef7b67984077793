"""Settings of a run, their defaults, and those that were tuned for single environments."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, SerializeAsAny, ValidationInfo, field_validator, model_validator

from dualhead.config import (
    SPEC,
    Config,
    NetworkConfig,
    NonNegativeInt,
    NormConfig,
    PositiveInt,
    PPOConfig,
    Seed,
    TurnoverConfig,
    WorldConfig,
    merged,
)
from dualhead.errors import SettingsError
from dualhead.running.parts import Call
from dualhead.worlds.commons.config import COMMONS
from dualhead.worlds.registry import WORLDS

EVAL_EPISODES = 20
"""Episodes of an evaluation."""
EVAL_MAX_STEPS = 30_000
"""Of an episode in an evaluation; an Atari game has at most 27,000."""
EVALUATION_SEED = 10_000
"""Of an evaluation's environments and of sampled actions."""


MAY_CHANGE = {
    *(
        "total_steps",
        "vectorization",
        "num_workers",
        "run_dir",
        "device",
        "num_threads",
        "checkpoint_every",
        "keep_checkpoints",
    ),
    *("log_to", "eval_episodes", "eval_every", "eval_max_steps", "save_on"),
}
"""Settings that may be edited before a run is resumed. Checkpoints hold the others, which say what run it is."""


class RunConfig(Config):
    """A training run: which environment, for how long, where."""

    env: str
    """`commons`, or a Gymnasium id: `dualhead envs` lists them. Or MODULE:NAME of your own: a class, or a function that
    makes one environment."""
    env_args: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the environment's constructor: numbers, true or false, text, lists."""
    wrappers: tuple[str, ...] = ()
    """Wrappers around each environment, the innermost first: MODULE:NAME, or with arguments
    `gymnasium.wrappers:FrameStackObservation(stack_size=4)`."""
    drop_observations: tuple[str, ...] = ()
    """Keys of a Dict observation that agents do not see. They are dropped before wrappers are applied."""
    encoder: str | None = None
    """An encoder of your own, MODULE:NAME; None: the one that `network` describes."""
    memory: str | None = None
    """A recurrent core of your own, MODULE:NAME; None: `network.memory`."""
    env_from: Literal["id", "callable", "streams"] = "id"
    """Whether `env` is an id, or the name of a callable or of streams that Python handed over: only who hands them over
    again can resume or play the run."""
    learning_rate_from: Literal["config", "callable"] = "config"
    """Whether `ppo.learning_rate` holds, or a schedule that Python handed over."""
    preset: Literal["default", "tuned", "spec"] = "default"
    """Where settings come from that are not given: our defaults for any environment, the settings that were tuned for
    this one (`dualhead train` takes them where there are any), or the specification's class."""
    total_steps: PositiveInt = 100_000
    """Environment steps over all streams."""
    num_envs: PositiveInt = 16
    """Environments, or worlds of several agents, stepped side by side."""
    vectorization: Literal["sync", "async"] = "sync"
    """Environments in this process, or in others (slow environments)."""
    num_workers: PositiveInt | None = None
    """Processes of `async`, which get an equal share of the environments each; None: one for each environment."""
    seed: Seed = 0
    """Seed of everything random; same seed, same run on CPU."""
    run_dir: str | None = None
    """Where results go; default runs/ENV/MEMORY-seedN."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where networks and rollouts live."""
    num_threads: PositiveInt | None = None
    """Threads of torch; default: as torch decides."""
    checkpoint_every: PositiveInt = 50_000
    """Environment steps between checkpoints."""
    keep_checkpoints: PositiveInt = 2
    """How many of the newest checkpoints stay; the best one does."""
    save_on: Literal["SIGUSR1", "SIGUSR2"] | None = None
    """A signal that asks for a checkpoint after the current step, such as before a deadline of the cluster."""
    log_to: tuple[Literal["wandb", "mlflow"], ...] = ()
    """Also log to Weights & Biases or MLflow, beside TensorBoard and metrics.csv."""
    eval_episodes: NonNegativeInt = EVAL_EPISODES
    """Episodes of an evaluation (the same number for each agent of a world); 0: none at the end."""
    eval_max_steps: PositiveInt = EVAL_MAX_STEPS
    """Steps after which an evaluation cuts an episode; its return counts as it is then."""
    eval_every: NonNegativeInt = 0
    """Environment steps between evaluations during training, the best of which is kept; 0: none."""
    policies: Literal["shared", "independent"] = "shared"
    """Of several agents: one policy for all, or a policy and optimiser for each."""
    enforce_norms: bool = False
    """Add the guilt of internalised norms to the rewards, in a world that tells of punishments."""
    network: NetworkConfig = NetworkConfig()
    """Shape of the policy."""
    ppo: PPOConfig = PPOConfig()
    """The update."""
    world: SerializeAsAny[WorldConfig] = Field(default_factory=WorldConfig, validate_default=True)
    """Settings of the world's own class; `CommonsConfig` of the commons."""
    norms: NormConfig = NormConfig()
    """How fast norms form, fade and weigh."""
    turnover: TurnoverConfig = TurnoverConfig()
    """When newcomers take whose place."""

    @model_validator(mode="before")
    @classmethod
    def _begin_with_the_preset(cls, given: Any) -> Any:
        if not isinstance(given, dict) or given.get("preset", "default") not in ("tuned", "spec"):
            return given
        preset, env = given["preset"], str(given.get("env"))
        is_id = given.get("env_from", "id") == "id"
        if preset == "tuned" and not (is_id and tuned_settings(env)):
            raise ValueError(
                f"preset='tuned': nothing was tuned for {env!r}, only for {', '.join(TUNED)}; expected 'default'"
            )
        # Of a settings object those fields count that its maker named: PPOConfig(gamma=0.9) is one setting.
        given = {
            name: value.model_dump(exclude_unset=True) if isinstance(value, Config) else value
            for name, value in given.items()
        }
        return merged(preset_settings(preset, env, independent=given.get("policies") == "independent"), given)

    @field_validator("world", mode="before")
    @classmethod
    def _of_the_world_s_own_class(cls, given: Any, info: ValidationInfo) -> Any:
        env, is_id = info.data.get("env", ""), info.data.get("env_from") == "id"
        settings = WORLDS[env].settings if is_id and env in WORLDS else WorldConfig
        if type(given) is WorldConfig and given == WorldConfig():
            given = {}
        unregistered = f"no world {env!r} is registered here: import the module that registers it (--import MODULE)"
        if isinstance(given, Mapping):
            try:
                given = settings(**given)
            except SettingsError as error:
                hint = [("", unregistered)] if settings is WorldConfig else []
                raise SettingsError([*hint, *error.problems]) from None
        if not isinstance(given, settings):
            raise ValueError(f"expected {settings.__name__}(...) for {env!r}, got {given!r}")
        if is_id and settings is WorldConfig and given != WorldConfig():
            raise ValueError(f"{unregistered}; environments of Gymnasium have no settings, got {given!r}")
        return given

    @field_validator("env_args")
    @classmethod
    def _are_what_json_can_hold(cls, given: dict[str, Any]) -> dict[str, Any]:
        try:
            return json.loads(json.dumps(given, allow_nan=False))  # tuples become lists at once, not on resume
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"expected finite numbers, True, False, None, text, and lists and dictionaries of these ({error}); "
                f"give others in Python, by a function that makes the environment"
            ) from None

    @field_validator("wrappers")
    @classmethod
    def _can_be_read(cls, given: tuple[str, ...]) -> tuple[str, ...]:
        for text in given:
            Call.read(text)
        return given

    @field_validator("run_dir")
    @classmethod
    def _is_a_name_that_json_can_hold(cls, given: str | None) -> str | None:
        try:
            (given or "").encode()
        except UnicodeEncodeError as error:
            raise ValueError("expected a name in UTF-8") from error
        return given

    def identity(self) -> dict[str, Any]:
        """What stays the same from a run's beginning to its end; the rest says where, how long, and what it writes."""
        return self.model_dump(exclude=MAY_CHANGE)

    @property
    def memory_name(self) -> str:
        """What the recurrent core is called."""
        return self.network.memory if self.memory is None else self.memory.rpartition(":")[2]

    @property
    def num_streams(self) -> int:
        """Streams of experience, over all learners."""
        return self.num_envs * self.world.num_agents

    @model_validator(mode="after")
    def _environments_are_made(self) -> RunConfig:
        given = [name for name in ("env_args", "wrappers", "drop_observations") if getattr(self, name)]
        if given and self.env_from == "streams":
            raise ValueError(
                f"{', '.join(given)}: expected none, because streams that Python hands over are made already"
            )
        if given and self.env_from == "id" and self.env in WORLDS:
            raise ValueError(f"{', '.join(given)}: expected none, the settings of {self.env!r} are in `world`")
        if self.num_workers is not None and (self.vectorization != "async" or self.num_envs % self.num_workers):
            raise ValueError(
                f"num_workers: expected vectorization='async' and a divisor of num_envs={self.num_envs}, got "
                f"vectorization={self.vectorization!r}, num_workers={self.num_workers}"
            )
        return self

    @model_validator(mode="after")
    def _rollouts_fit(self) -> RunConfig:
        length, batch_size, num_streams = self.ppo.rollout_length, self.ppo.batch_size, self.num_streams
        per_learner = self.num_envs if self.policies == "independent" else num_streams
        if batch_size > per_learner * length:
            raise ValueError(
                f"a rollout of {per_learner} streams x {length} steps = {per_learner * length} steps does not fill one "
                f"minibatch of {batch_size=}: raise rollout_length or num_envs, or lower batch_size"
            )
        if self.total_steps < num_streams * length:
            raise ValueError(
                f"total_steps={self.total_steps} ends before the first update: one rollout is {num_streams} streams x "
                f"{length} steps = {num_streams * length}; raise total_steps, or lower num_envs or rollout_length"
            )
        return self

    @model_validator(mode="after")
    def _agents_and_events_fit(self) -> RunConfig:
        env, world, turnover, norms = self.env, self.world, self.turnover, self.norms
        if type(world) is WorldConfig and world.num_agents == 1:
            of_several = {"policies": self.policies == "independent", "turnover": turnover.first_turn is not None}
            for name in [name for name, is_asked in of_several.items() if is_asked]:
                raise ValueError(f"{name}: expected a world of several agents, and {env!r} has one")
        if turnover.num_agents > world.num_agents:
            raise ValueError(f"turnover: expected at most the {world.num_agents} agents of a world, got {turnover}")
        num_turns = self.total_steps // self.num_streams
        if (turnover.first_turn or 0) > num_turns:
            raise ValueError(
                f"turnover.first_turn={turnover.first_turn} comes after the run: total_steps={self.total_steps} are "
                f"{num_turns} turns of {self.num_streams} agents"
            )
        if self.enforce_norms and not (world.resources and norms.mode == "resource"):
            raise ValueError(
                f"enforce_norms: expected a world that says who took and was punished for which resource, got {env!r}; "
                f"expected norms.mode='resource', got {norms.mode!r}"
            )
        if norms.resources not in (NormConfig().resources, world.resources):
            raise ValueError(f"norms.resources: {env!r} has {world.resources}, got {norms.resources}")
        return self


# Settings found by experiment for single environments (docs/log.md says how), over those of the specification's class
# on segments of 16. First matching pattern wins; a field lies in RunConfig, or under `network` / `ppo`.
_SEGMENTS = {"ppo": {"sequence_length": 16, "state_refresh": "once", "bootstrap_last": True}}
TUNED: dict[str, dict[str, Any]] = {
    "dualhead/CartPoleNoVel-v1": {
        "total_steps": 50_000,
        "num_envs": 8,
        "network": {"hidden_size": 64, "encoder_sizes": (64,)},
        "ppo": {
            "rollout_length": 128,
            "batch_size": 256,
            "num_epochs": 10,
            "learning_rate": 1e-3,
            "learning_rate_schedule": "linear",
            "gae_lambda": 0.98,
            "entropy_coef": 0.0,
            "normalize_advantages": "minibatch",
            "normalize_observations": True,
            "normalize_rewards": True,
        },
    },
    "dualhead/RecallCue-v0": {
        "total_steps": 200_000,
        "num_envs": 32,
        "network": {"hidden_size": 128, "encoder_sizes": (64,), "forget_bias": 2.0},
        "ppo": {
            "rollout_length": 64,
            "sequence_length": 32,
            "batch_size": 512,
            "num_epochs": 8,
            "gae_lambda": 0.5,
            "normalize_advantages": "minibatch",
            "learning_rate": 1e-3,
            "learning_rate_schedule": "linear",
        },
    },
    COMMONS: {
        "total_steps": 300_000,
        "num_envs": 4,
        "network": {"hidden_size": 64, "encoder_sizes": (64,)},
        "ppo": {
            "rollout_length": 50,
            "batch_size": 500,
            "learning_rate": 1e-3,
            "gamma": 0.95,
            "normalize_rewards": True,
        },
    },
    "popgym-RepeatPrevious*": {
        "total_steps": 1_500_000,
        "num_envs": 64,
        "network": {"hidden_size": 128, "encoder_sizes": (64,)},
        "ppo": {
            "rollout_length": 64,
            "batch_size": 1024,
            "num_epochs": 4,
            "learning_rate": 1e-3,
            "learning_rate_schedule": "linear",
            "gamma": 0.95,
        },
    },
}


def tuned_settings(env: str) -> dict[str, Any]:
    """What `TUNED` has for an environment id, nested as RunConfig is; empty where nothing was tuned."""
    for pattern, settings in TUNED.items():
        if fnmatch.fnmatchcase(env, pattern):
            return settings
    return {}


def preset_settings(preset: str, env: str, *, independent: bool = False) -> dict[str, Any]:
    """Every setting that a preset has for an environment id, nested as RunConfig is; none where that is our default.

    Args:
        preset, env: which.
        independent: each agent has a policy of its own. The tuned minibatch is of all agents together, more than a
            rollout of one: it gets the specification's.
    """
    if preset == "spec":
        return SPEC
    tuned = tuned_settings(env) if preset == "tuned" else {}
    if not tuned:
        return {}
    settings = merged(merged(SPEC, _SEGMENTS), tuned)
    return merged(settings, {"ppo": {"batch_size": SPEC["ppo"]["batch_size"]}}) if independent else settings


def usual_preset(env: str) -> str:
    """The preset of an environment id where none is asked for."""
    return "tuned" if tuned_settings(env) else "default"


def default_settings(env: str) -> dict[str, Any]:
    """Every default of a run, nested as RunConfig is, unchecked: together they may be impossible for this world."""
    world = WORLDS[env].settings if env in WORLDS else WorldConfig
    return RunConfig.model_construct(env=env, world=world.model_construct()).model_dump()


def planned(env: str, **settings: Any) -> RunConfig:
    """Settings of a run: where no preset is asked for those that were tuned for this environment, if there are any.

    Raises:
        SettingsError: they are not possible.
    """
    preset = usual_preset(env) if settings.get("env_from", "id") == "id" else "default"
    return RunConfig(**{"env": env, "preset": preset} | settings)
