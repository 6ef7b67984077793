"""Frozen, validated settings: the only home of defaults. Help texts and docs are read from here."""

from __future__ import annotations

import fnmatch
import string
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from tyro.conf import Positional, arg

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
FiniteFloat = Annotated[float, Field(allow_inf_nan=False)]

COMMONS = "commons"
"""Name of the commons as an environment."""
_NAME_CHARACTERS = string.ascii_letters + string.digits + "-_"
_WITHOUT_PREFIX = arg(name="")
"""On the command line `--hidden-size`, not `--network.hidden-size`."""
EVAL_EPISODES = 20
"""Episodes of an evaluation."""
MAX_RESOURCES = 8
"""Kinds that a commons can have: as many as its pictures have colours for."""


SPEC: dict[str, dict[str, Any]] = {
    "network": {
        "memory": "lstm",
        "hidden_size": 256,
        "num_layers": 1,
        "encoder_sizes": (256,),
        "activation": "relu",
        "previous_action": False,
        "previous_reward": False,
        "critic_memory": "shared",
        "head_sizes": (),
        "head_gain": 2**0.5,
        "forget_bias": 0.0,
        "orthogonal_per_gate": False,
    },
    "ppo": {
        "learning_rate": 3e-4,
        "learning_rate_schedule": "constant",
        "adam_eps": 1e-5,
        "gamma": 0.99,
        "gae_lambda": 0.95,
        "clip_coef": 0.2,
        "value_clip": None,
        "num_epochs": 4,
        "batch_size": 64,
        "entropy_coef": 0.01,
        "max_grad_norm": 0.5,
        "value_coef": 0.5,
        "ratio": "per_head",
        "target_kl": None,
        "normalize_advantages": "rollout",
        "normalize_observations": False,
        "normalize_rewards": False,
        "rollout_length": 100,
        "sequence_length": 1,
        "burn_in": 0,
        "state_refresh": "never",
        "bootstrap_last": False,
    },
}
"""The specification's class, for `NetworkConfig.spec()`, `PPOConfig.spec()` and `--preset spec`. docs/spec.md."""

settings_error: ContextVar[type[Exception]] = ContextVar("settings_error", default=ValueError)
"""What refused settings raise. The command line sets another: its parser would wrap a ValueError in its own words."""


class Config(BaseModel):
    """Base of every settings class: frozen, unknown names refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def __init__(self, **settings: Any) -> None:
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise settings_error.get()(explain(error)) from None


class NetworkConfig(Config):
    """Shape of the policy: encoder, memory, heads."""

    memory: Literal["lstm", "gru", "none"] = Field(
        "lstm", description="Recurrent core; `none` is the memoryless control."
    )
    hidden_size: PositiveInt = Field(128, description="Units of the memory, H.")
    num_layers: PositiveInt = Field(1, description="Stacked recurrent layers, L.")
    encoder_sizes: tuple[PositiveInt, ...] = Field(
        (64,), description="Widths of the layers between the flattened observation and the memory."
    )
    image_encoder: Literal["auto", "small", "nature", "flat"] = Field(
        "auto",
        description="Convolutions for images (Boxes of three axes, or of two as uint8): `small` (two 3x3), `nature` "
        "(8x8, 4x4, 3x3 with strides); `auto` takes `nature` from 36 pixels on. `flat`: none, images are vectors.",
    )
    image_layout: Literal["auto", "chw", "hwc"] = Field(
        "auto",
        description="Which axis of an image holds the channels; `auto`: two equal neighbours are the pixels.",
    )
    activation: Literal["relu", "tanh"] = Field(
        "relu", description="After the layers of `encoder_sizes` and `head_sizes`; convolutions keep ReLU."
    )
    previous_action: bool = Field(
        False, description="Show the policy its action of the step before (R2D2): one-hot per head, zero at a start."
    )
    previous_reward: bool = Field(
        False, description="Show the policy the reward of the step before (R2D2), zero at an episode's start."
    )
    critic_memory: Literal["shared", "lstm", "gru", "none"] = Field(
        "shared",
        description="Memory of the critic: the policy's, an own one of the same size, or none (a layer in its place).",
    )
    head_sizes: tuple[PositiveInt, ...] = Field(
        (), description="Widths of the layers between memory and action heads, and between memory and critic."
    )
    head_gain: PositiveFloat = Field(1.0, description="Gain of the action heads' orthogonal initialisation.")
    forget_bias: float = Field(
        0.0, description="Initial bias of the gate that keeps the past: LSTM's forget gate, GRU's update gate."
    )
    orthogonal_per_gate: bool = Field(
        False, description="Orthogonal initialisation of each gate's matrix instead of the stacked one."
    )

    @classmethod
    def spec(cls, **changes: Any) -> NetworkConfig:
        """The specification's network: convolutions 3x3, one layer of 256, an LSTM of 256; `changes` over it."""
        return cls(**SPEC["network"] | changes)


class PPOConfig(Config):
    """Everything the update needs to know."""

    learning_rate: PositiveFloat = Field(1e-3, description="Adam step size.")
    learning_rate_schedule: Literal["constant", "linear"] = Field(
        "constant", description="`linear` falls to zero over `learning_rate_decay_steps`."
    )
    learning_rate_decay_steps: PositiveInt | None = Field(
        None, description="Environment steps of the linear schedule; None: the run's total steps."
    )
    adam_eps: PositiveFloat = Field(1e-5, description="Adam's epsilon.")
    gamma: Fraction = Field(0.99, description="Discount per step.")
    gae_lambda: Fraction = Field(0.95, description="Trace decay per step of GAE.")
    clip_coef: PositiveFloat = Field(0.2, description="Clip range of the probability ratio.")
    value_clip: PositiveFloat | None = Field(
        None, description="Clip range of the value change in the value loss; None: no clipping."
    )
    num_epochs: PositiveInt = Field(6, description="Passes over each rollout.")
    batch_size: PositiveInt = Field(256, description="Time steps per minibatch (whole segments, so about).")
    entropy_coef: NonNegativeFloat | tuple[NonNegativeFloat, ...] = Field(
        0.01, description="Weight of the entropy bonus: one number, or one per head."
    )
    entropy_coef_end: NonNegativeFloat | tuple[NonNegativeFloat, ...] | None = Field(
        None, description="Weight after `entropy_decay_steps`; None: it stays."
    )
    entropy_decay_steps: NonNegativeInt = Field(
        0, description="Number of learn() calls over which the entropy weight moves linearly to its end."
    )
    max_grad_norm: PositiveFloat | None = Field(0.5, description="Gradient norm is clipped to this.")
    max_skipped_steps: PositiveInt = Field(
        20, description="Optimiser steps in a row that may be skipped for a non-finite loss or gradient."
    )
    value_coef: NonNegativeFloat = Field(0.5, description="Weight of the value loss.")
    ratio: Literal["per_head", "joint"] = Field(
        "per_head", description="Clip each head's ratio and sum the surrogates, or clip the product."
    )
    target_kl: PositiveFloat | None = Field(
        None, description="Stop an update when approx_kl of a minibatch exceeds this."
    )
    normalize_advantages: Literal["rollout", "minibatch", "none"] = Field(
        "minibatch", description="Over which steps advantages are brought to mean 0 and deviation 1."
    )
    normalize_observations: bool = Field(True, description="Scale vector observations by running mean and deviation.")
    normalize_rewards: bool = Field(
        True, description="Divide rewards by the running deviation of the discounted return."
    )
    rollout_length: PositiveInt = Field(128, description="Steps per stream between updates, T.")
    sequence_length: PositiveInt | Literal["rollout"] = Field(
        "rollout",
        description="Longest run of steps that gradients flow through: a number, or `rollout` for whole episodes, as "
        "far as the rollout holds them; 1 is the specification's slicing.",
    )
    burn_in: NonNegativeInt = Field(
        0, description="Preceding steps unrolled without gradient to warm a segment's state (R2D2)."
    )
    state_refresh: Literal["once", "every_epoch", "never"] = Field(
        "once",
        description="Recompute stored states with today's weights before the second epoch, before every epoch but the "
        "first, or never.",
    )
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="Encoder and memory of the update in bf16; acting, losses and optimiser stay as they are."
    )
    bootstrap_last: bool = Field(
        True,
        description="Value of the observation after the rollout; off: zero, as the specification's class.",
    )

    @classmethod
    def spec(cls, **changes: Any) -> PPOConfig:
        """The specification's PPO, one-step slices included; `changes` over it."""
        return cls(**SPEC["ppo"] | changes)

    @property
    def max_segment(self) -> int:
        """Steps of the longest possible segment."""
        return self.rollout_length if self.sequence_length == "rollout" else self.sequence_length

    @model_validator(mode="after")
    def _settings_fit(self) -> PPOConfig:
        if self.entropy_coef_end is not None and self.entropy_decay_steps == 0:
            raise ValueError("entropy_coef_end needs entropy_decay_steps: over how many updates to get there")
        longest = min(self.max_segment, self.rollout_length)
        if longest > self.batch_size:
            raise ValueError(
                f"batch_size={self.batch_size} cannot hold one segment of {longest} steps "
                f"(sequence_length={self.sequence_length}, rollout_length={self.rollout_length}): "
                f"raise batch_size or lower sequence_length"
            )
        return self


class NormConfig(Config):
    """NormEnforcer: how fast norms form, fade and weigh."""

    mode: Literal["resource", "action"] = Field(
        "resource", description="A strength per resource kind, or one for a harmful action."
    )
    resources: tuple[str, ...] = Field(
        ("resource",), description="Names of the resource kinds; in the commons always its own."
    )
    harmful_action: NonNegativeInt | None = Field(
        None, description="Action index that guilt attaches to (action mode)."
    )
    harmful_head: NonNegativeInt = Field(0, description="Head that `harmful_action` belongs to.")
    decay_rate: Fraction = Field(0.995, description="What is left of a strength after one step.")
    internalization_threshold: NonNegativeFloat = Field(5.0, description="Strength above which guilt is felt.")
    max_norm_strength: PositiveFloat = Field(10.0, description="Cap of a strength.")
    intrinsic_scale: Annotated[float, Field(le=0.0, allow_inf_nan=False)] = Field(
        -0.5, description="Reward per unit of strength above the threshold."
    )

    @model_validator(mode="after")
    def _settings_fit(self) -> NormConfig:
        if not self.resources or len(set(self.resources)) < len(self.resources):
            raise ValueError(f"resources: expected one or more different names, got {self.resources}")
        if self.mode == "resource" and self.harmful_action is not None:
            raise ValueError(f"harmful_action={self.harmful_action} belongs to mode='action', got mode='resource'")
        if self.mode == "action" and self.harmful_action is None:
            raise ValueError("harmful_action: mode='action' needs one, an action index from 0, got None")
        if self.mode == "action" and len(self.resources) != 1:
            raise ValueError(f"resources: mode='action' has one strength and needs one name, got {self.resources}")
        return self


class Phase(Config):
    """What the votes and the punishment do for some turns; see `CommonsConfig.phases`."""

    mode: Literal["voted", "fixed", "off"] = Field(
        "voted",
        description="`voted`: votes move the level; `fixed`: votes do nothing; `off`: they do nothing, and nobody "
        "is punished at any level.",
    )
    level: NonNegativeInt | None = Field(
        None, description="Level when the phase begins, an index into the schedule; None: as it was before."
    )
    num_turns: PositiveInt | None = Field(None, description="How long it lasts; None: to the end (last phase only).")


class CommonsConfig(Config):
    """The rules of the commons."""

    form: Literal["grid", "bandit"] = Field("grid", description="Patches to walk on, or a menu to choose from.")
    num_agents: PositiveInt = Field(10, description="Agents of one world, A.")
    resources: tuple[str, ...] = Field(("A", "B", "C", "D", "E"), description="Names of the resource kinds.")
    values: dict[str, FiniteFloat] = Field(
        {"A": 20.0, "B": 10.0, "C": 10.0, "D": 10.0, "E": 10.0}, description="Reward for taking one, by kind."
    )
    harms: dict[str, NonNegativeFloat] = Field(
        {"A": 5.0, "B": 0.0, "C": 0.0, "D": 0.0, "E": 0.0},
        description="What taking one costs every other agent of the world, by kind.",
    )
    schedule: dict[str, tuple[Fraction, ...]] = Field(
        {
            "A": (0.30, 0.40, 0.55, 0.70, 0.85, 0.95, 1.0, 1.0, 1.0, 1.0),
            "B": (0.0, 0.05, 0.10, 0.10, 0.10, 0.10, 0.10, 0.15, 0.15, 0.20),
            "C": (0.0, 0.0, 0.0, 0.05, 0.10, 0.10, 0.10, 0.10, 0.15, 0.15),
            "D": (0.0, 0.0, 0.0, 0.0, 0.0, 0.05, 0.10, 0.10, 0.10, 0.15),
            "E": (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.05, 0.10, 0.10),
        },
        description="Probability of punishment at each level, by kind.",
    )
    punishment: NonNegativeFloat = Field(25.0, description="What a punishment costs.")
    punishments_are: Literal["probabilistic", "deterministic"] = Field(
        "probabilistic",
        description="`deterministic`: whoever takes one pays punishment · probability, every time.",
    )
    vote_shift: Annotated[float, Field(ge=1e-6, le=1.0)] = Field(
        0.1, description="By how much a vote moves the level's probability p; level = round((L - 1) · p)."
    )
    initial_level: NonNegativeInt = Field(0, description="Level that a run begins with.")
    level_visible: bool = Field(True, description="Show p to the agents; otherwise they see 0.")
    phases: tuple[Phase, ...] = Field(
        (Phase(),), min_length=1, description="One after another, in turns over the whole run; the last one stays."
    )
    repeat_phases: bool = Field(False, description="Begin again with the first phase after the last one.")
    voting_season: Annotated[int, Field(ge=2)] | None = Field(
        None, description="Every so many turns of an epoch is for votes only, the others for moves only; None: never."
    )
    coding: Literal["pair", "composite", "simple"] = Field(
        "pair", description="Actions as (move, vote), or as one of the historical single numbers."
    )
    stay: bool = Field(False, description="Give the move head a choice to stay (bandit: to take nothing).")
    agent_index: bool = Field(False, description="Show each agent its number.")
    epoch_turns: PositiveInt = Field(100, description="Turns until everything is laid out afresh.")
    patch_size: Annotated[int, Field(ge=3)] = Field(10, description="Cells on a side of a patch, walls included.")
    window_radius: PositiveInt = Field(4, description="Cells an agent sees in each direction.")
    bump: Annotated[float, Field(le=0.0, allow_inf_nan=False)] = Field(-1.0, description="Reward for hitting a wall.")
    initial_resources: NonNegativeInt = Field(8, description="Resources on a fresh patch.")
    respawn_probability: Fraction = Field(
        0.005, description="Probability of a resource on each empty cell and turn, every kind equally likely."
    )
    max_resources: PositiveInt | None = Field(None, description="Most resources that grow on a patch; None: no cap.")
    menu_size: PositiveInt = Field(2, description="Slots of a menu (bandit), all of different kinds.")

    @property
    def num_levels(self) -> int:
        return len(self.schedule[self.resources[0]])

    @model_validator(mode="after")
    def _resources_fit(self) -> CommonsConfig:
        if not 1 <= len(self.resources) <= MAX_RESOURCES or len(set(self.resources)) < len(self.resources):
            raise ValueError(f"resources: expected 1 to {MAX_RESOURCES} different names, got {self.resources}")
        for name in ("values", "harms", "schedule"):
            missing = [kind for kind in self.resources if kind not in getattr(self, name)]
            if missing:
                raise ValueError(f"{name}: expected an entry for every resource, {missing} missing")
        lengths = {kind: len(self.schedule[kind]) for kind in self.resources}
        if len(set(lengths.values())) > 1 or 0 in lengths.values():
            raise ValueError(f"schedule: expected the same number of levels for every resource, got {lengths}")
        return self

    @model_validator(mode="after")
    def _phases_fit(self) -> CommonsConfig:
        for name, level in [("initial_level", self.initial_level), *(("phases: level", p.level) for p in self.phases)]:
            if level is not None and level >= self.num_levels:
                raise ValueError(f"{name}: expected a level below {self.num_levels}, got {level}")
        endless = [number for number, phase in enumerate(self.phases) if phase.num_turns is None]
        if endless and (self.repeat_phases or endless[0] < len(self.phases) - 1):
            raise ValueError(
                f"phases: phase {endless[0]} has no num_turns, which only the last one may lack, and none of those "
                f"that repeat"
            )
        return self

    @model_validator(mode="after")
    def _form_fits(self) -> CommonsConfig:
        if self.stay and self.coding != "pair":
            raise ValueError(f"stay: expected False with coding={self.coding!r}, which has a no-op of its own")
        if self.form == "bandit":
            if self.menu_size > len(self.resources):
                raise ValueError(
                    f"menu_size: expected at most one slot for each of the {len(self.resources)} resources, "
                    f"got {self.menu_size}"
                )
            return self
        room = (self.patch_size - 2) ** 2 - 1  # one cell is the agent's
        if self.max_resources is not None:
            room = min(room, self.max_resources)
        if self.initial_resources > room:
            raise ValueError(
                f"initial_resources: expected at most {room} (patch_size={self.patch_size}, "
                f"max_resources={self.max_resources}), got {self.initial_resources}"
            )
        return self


class TurnoverConfig(Config):
    """Newcomers who take the places of agents in the commons: when, and whose."""

    first_turn: PositiveInt | None = Field(
        None, description="Turn of the first replacement (at the end of the rollout that is running then); None: never."
    )
    every_turns: PositiveInt | None = Field(None, description="Turns between replacements; None: there is only one.")
    num_times: PositiveInt | None = Field(None, description="How often; None: to the end of the run.")
    num_agents: PositiveInt = Field(1, description="Agents replaced each time.")
    selection: Literal["first_n", "random", "tenure"] = Field(
        "random", description="Whom: those with the lowest numbers, anybody, or those who have been there longest."
    )

    @model_validator(mode="after")
    def _schedule_fits(self) -> TurnoverConfig:
        if self.first_turn is None and (self.every_turns or self.num_times):
            raise ValueError("every_turns and num_times need first_turn: when the first replacement is")
        if self.every_turns is None and (self.num_times or 1) > 1:
            raise ValueError(f"num_times={self.num_times} needs every_turns: how far apart")
        return self


class RunConfig(Config):
    """A training run: which environment, for how long, where."""

    env: Positional[str] = Field(description="`commons`, or a Gymnasium id: `dualhead envs` lists them.")
    preset: Literal["default", "tuned", "spec"] = Field(
        "default",
        description="Where settings come from that are not given: our defaults for any environment, the settings that "
        "were tuned for this one (`dualhead train` takes them where there are any), or the specification's class.",
    )
    total_steps: PositiveInt = Field(100_000, description="Environment steps over all streams.")
    num_envs: PositiveInt = Field(16, description="Environments (worlds of the commons) stepped side by side.")
    vectorization: Literal["sync", "async"] = Field(
        "sync", description="Environments in this process, or one process each (slow environments)."
    )
    seed: NonNegativeInt = Field(0, description="Seed of everything random; same seed, same run on CPU.")
    run_dir: str | None = Field(None, description="Where results go; default runs/ENV/MEMORY-seedN.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where networks and rollouts live.")
    num_threads: PositiveInt | None = Field(None, description="Threads of torch; default: as torch decides.")
    checkpoint_every: PositiveInt = Field(50_000, description="Environment steps between checkpoints.")
    keep_checkpoints: PositiveInt = Field(2, description="How many of the newest checkpoints stay; the best one does.")
    log_to: tuple[Literal["wandb", "mlflow"], ...] = Field(
        (), description="Also log to Weights & Biases or MLflow, beside TensorBoard and metrics.csv."
    )
    eval_episodes: NonNegativeInt = Field(
        EVAL_EPISODES,
        description="Episodes of an evaluation (commons: the same number for each agent); 0: none at the end.",
    )
    eval_every: NonNegativeInt = Field(
        0, description="Environment steps between evaluations during training, the best of which is kept; 0: none."
    )
    policies: Literal["shared", "independent"] = Field(
        "shared", description="Commons: one policy for all agents, or a policy and optimiser for each."
    )
    enforce_norms: bool = Field(False, description="Commons: add the guilt of internalised norms to the rewards.")
    network: Annotated[NetworkConfig, _WITHOUT_PREFIX] = Field(default_factory=NetworkConfig)
    ppo: Annotated[PPOConfig, _WITHOUT_PREFIX] = Field(default_factory=PPOConfig)
    commons: CommonsConfig = Field(default_factory=CommonsConfig)
    norms: NormConfig = Field(default_factory=NormConfig)
    turnover: TurnoverConfig = Field(default_factory=TurnoverConfig)

    @model_validator(mode="before")
    @classmethod
    def _begin_with_the_preset(cls, given: Any) -> Any:
        if not isinstance(given, dict) or given.get("preset", "default") not in ("tuned", "spec"):
            return given
        preset, env = given["preset"], str(given.get("env"))
        if preset == "tuned" and not tuned_settings(env):
            raise ValueError(
                f"preset='tuned': nothing was tuned for {env!r}, only for {', '.join(TUNED)}; expected 'default'"
            )
        return merged(preset_settings(preset, env), given)

    @property
    def num_streams(self) -> int:
        """Streams of experience, over all learners."""
        return self.num_envs * (self.commons.num_agents if self.env == COMMONS else 1)

    @model_validator(mode="after")
    def _minibatch_fits(self) -> RunConfig:
        per_learner = self.num_envs if self.policies == "independent" else self.num_streams
        rollout_steps = per_learner * self.ppo.rollout_length
        if self.ppo.batch_size > rollout_steps:
            raise ValueError(
                f"a rollout of {per_learner} streams x {self.ppo.rollout_length} steps = {rollout_steps} "
                f"steps does not fill one minibatch of batch_size={self.ppo.batch_size}: raise rollout_length "
                f"or num_envs, or lower batch_size to at most {rollout_steps}"
            )
        rollout_steps = self.num_streams * self.ppo.rollout_length
        if self.total_steps < rollout_steps:
            raise ValueError(
                f"total_steps={self.total_steps} ends before the first update: one rollout is {self.num_streams} "
                f"streams x {self.ppo.rollout_length} steps = {rollout_steps}; raise total_steps, or lower num_envs or "
                f"rollout_length"
            )
        return self

    @model_validator(mode="after")
    def _commons_settings_fit(self) -> RunConfig:
        if self.env == COMMONS:
            if self.turnover.num_agents > self.commons.num_agents:
                raise ValueError(
                    f"turnover.num_agents={self.turnover.num_agents}: expected at most the "
                    f"{self.commons.num_agents} agents of a world"
                )
            num_turns = self.total_steps // self.num_streams
            if (self.turnover.first_turn or 0) > num_turns:
                raise ValueError(
                    f"turnover.first_turn={self.turnover.first_turn} comes after the run: total_steps="
                    f"{self.total_steps} are {num_turns} turns of {self.num_streams} agents"
                )
            if self.enforce_norms and self.norms.mode != "resource":
                raise ValueError(
                    f"norms.mode={self.norms.mode!r}: the commons tells who took and was punished for which resource; "
                    f"expected norms.mode='resource'"
                )
            names = self.norms.resources
            if names not in (NormConfig().resources, self.commons.resources):
                raise ValueError(f"norms.resources: the commons has {self.commons.resources}, got {names}")
            return self
        for name in ("policies", "enforce_norms", "commons", "turnover"):
            if getattr(self, name) != type(self).model_fields[name].get_default(call_default_factory=True):
                raise ValueError(f"{name}: only the environment {COMMONS!r} has it, and this is {self.env!r}")
        return self


class StudyConfig(Config):
    """A study: conditions x environments x seeds, read from a TOML file. docs/studies.md says how to write one."""

    title: str = Field("", description="A sentence over the tables and the figures.")
    seeds: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)] = Field(
        (0, 1, 2), description="Every condition is run with each of them in every environment."
    )
    environments: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="Ids of several environments: a list, or a table of those with settings of their own. Without it "
        "the study has one, `env` in `base`.",
    )
    measures: tuple[str, ...] = Field(
        (),
        description="Columns of metrics.csv and numbers of summary.json (`evaluation/...`: the final evaluation) to "
        "compare. Without it: returns and speed, and in the commons what only the commons has.",
    )
    harmful: str = Field("A", description="Commons: the resource whose share among those taken is the study's subject.")
    base: dict[str, Any] = Field(default_factory=dict, description="Settings of every run, nested as RunConfig is.")
    conditions: Annotated[dict[str, dict[str, Any]], Field(min_length=1)] = Field(
        description="Name of each condition and the settings that make it, over those of the environment and of `base`."
    )

    @property
    def worlds(self) -> dict[str, dict[str, Any]]:
        """The environments by id, with their own settings."""
        return self.environments or {self.base.get("env", COMMONS): {}}

    @property
    def is_of_the_commons(self) -> bool:
        """Whether the subject is what only the commons has: the harmful resource, phases, relapse."""
        return list(self.worlds) == [COMMONS] and not self.measures

    def run(self, condition: str, seed: int, run_dir: str, *, env: str | None = None) -> RunConfig:
        """Settings of one run: the preset < base < environment < condition.

        Args:
            condition, seed, run_dir: which run, and where it goes.
            env: one of the study's environments; None: its only one.

        Raises:
            ValueError: they are not possible; the message names condition and environment.
        """
        worlds = self.worlds
        if env is None:
            (env,) = worlds
        try:
            settings = merged(merged(self.base, worlds[env]), self.conditions[condition])
            for name, instead in (("seed", "`seeds` lists them"), ("run_dir", "--out says where the study goes")):
                if name in settings:
                    raise ValueError(f"{name}: not to be set in a study's settings; {instead}")
            if settings.pop("env", env) != env:
                raise ValueError("env: expected in [base] alone; `environments` lists several")
            # Runs of a study stand side by side: more threads each would fight for the cores.
            defaults: dict[str, Any] = {"num_threads": 1} | ({"eval_episodes": 0} if self.is_of_the_commons else {})
            return RunConfig(**defaults | settings | {"env": env, "seed": seed, "run_dir": run_dir})
        except ValueError as error:
            place = f" in {env!r}" if self.environments else ""
            raise ValueError(f"condition {condition!r}{place}: {error}") from None

    @field_validator("environments", mode="before")
    @classmethod
    def _environments_by_name(cls, given: Any) -> Any:
        """A list of ids stands for a table of them without settings."""
        if not isinstance(given, list | tuple) or not all(isinstance(name, str) for name in given):
            return given
        if not given or len(set(given)) < len(given):
            raise ValueError("expected one id or several different ones")
        return {name: {} for name in given}

    @model_validator(mode="after")
    def _runs_are_possible(self) -> StudyConfig:
        for name, values in (("seeds", self.seeds), ("measures", self.measures)):
            if len(set(values)) < len(values):
                raise ValueError(f"{name}: expected different ones, got {values}")
        for name in self.conditions:
            if not name or not set(name) <= set(_NAME_CHARACTERS):
                raise ValueError(f"conditions: expected names of letters, digits, '-' and '_', got {name!r}")
            configs = [self.run(name, 0, "", env=env) for env in self.worlds]
            if self.is_of_the_commons and self.harmful not in configs[0].commons.resources:
                raise ValueError(
                    f"harmful={self.harmful!r} is none of condition {name!r}'s {configs[0].commons.resources}"
                )
        return self


def merged(settings: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Nested settings with those of `over` in their place; lists and schedules of resources are replaced whole."""
    result = dict(settings)
    for name, value in over.items():
        nested = name in ("network", "ppo", "commons", "norms", "turnover") and isinstance(result.get(name), dict)
        result[name] = merged(result[name], value) if nested and isinstance(value, dict) else value
    return result


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


def preset_settings(preset: str, env: str) -> dict[str, Any]:
    """Every setting that a preset has for an environment id, nested as RunConfig is; none where that is our default."""
    if preset == "spec":
        return SPEC
    tuned = tuned_settings(env) if preset == "tuned" else {}
    return merged(merged(SPEC, _SEGMENTS), tuned) if tuned else {}


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name."""
    result: dict[str, Any] = {}
    for name, value in settings.items():
        result |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return result


def explain(error: ValidationError) -> str:
    """One line per wrong setting: which, what is wrong, what was given."""
    lines, problems = [], error.errors()
    around = {problem["loc"][:depth] for problem in problems for depth in range(len(problem["loc"]))}
    for problem in problems:
        if problem["loc"] and problem["loc"] in around:
            continue  # a list is called too short when what is in it is wrong
        name = ".".join(
            str(part) for part in problem["loc"] if not str(part).startswith(("function", "tuple", "constrained"))
        )
        message = problem["msg"].removeprefix("Value error, ")
        given = "" if problem["type"] == "value_error" else f", got {problem['input']!r}"
        lines.append(f"{name}: {message}{given}" if name else f"{message}{given}")
    return "\n".join(dict.fromkeys(lines))
