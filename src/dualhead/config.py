"""Frozen, validated settings: the only home of defaults. Help texts and docs are read from here."""

from __future__ import annotations

import fnmatch
from contextvars import ContextVar
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from tyro.conf import Positional

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]


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
    hidden_size: PositiveInt = Field(256, description="Units of the memory, H.")
    num_layers: PositiveInt = Field(1, description="Stacked recurrent layers, L.")
    encoder_sizes: tuple[PositiveInt, ...] = Field(
        (256,), description="Widths of the ReLU layers between the flattened observation and the memory."
    )
    image_encoder: Literal["auto", "small", "nature"] = Field(
        "auto",
        description="Convolutions for images: `small` (two 3x3), `nature` (8x8, 4x4, 3x3 with strides); "
        "`auto` takes `nature` from 36 pixels on.",
    )
    image_layout: Literal["auto", "chw", "hwc"] = Field(
        "auto",
        description="Which axis of an image holds the channels; `auto`: two equal neighbours are the pixels.",
    )
    head_gain: PositiveFloat = Field(2**0.5, description="Gain of the action heads' orthogonal initialisation.")
    forget_bias: float = Field(
        0.0, description="Initial bias of the gate that keeps the past: LSTM's forget gate, GRU's update gate."
    )
    orthogonal_per_gate: bool = Field(
        False, description="Orthogonal initialisation of each gate's matrix instead of the stacked one."
    )


class PPOConfig(Config):
    """Everything the update needs to know."""

    learning_rate: PositiveFloat = Field(3e-4, description="Adam step size.")
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
    num_epochs: PositiveInt = Field(4, description="Passes over each rollout.")
    batch_size: PositiveInt = Field(64, description="Time steps per minibatch (whole segments, so about).")
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
    value_coef: NonNegativeFloat = Field(0.5, description="Weight of the value loss.")
    ratio: Literal["per_head", "joint"] = Field(
        "per_head", description="Clip each head's ratio and sum the surrogates, or clip the product."
    )
    target_kl: PositiveFloat | None = Field(
        None, description="Stop an update when approx_kl of a minibatch exceeds this."
    )
    normalize_advantages: Literal["rollout", "minibatch", "none"] = Field(
        "rollout", description="Over which steps advantages are brought to mean 0 and deviation 1."
    )
    normalize_observations: bool = Field(False, description="Scale vector observations by running mean and deviation.")
    normalize_rewards: bool = Field(
        False, description="Divide rewards by the running deviation of the discounted return."
    )
    rollout_length: PositiveInt = Field(100, description="Steps per stream between updates, T.")
    sequence_length: PositiveInt = Field(
        16, description="Longest run of steps that gradients flow through; 1 is the specification's slicing."
    )
    burn_in: NonNegativeInt = Field(
        0, description="Preceding steps unrolled without gradient to warm a segment's state (R2D2)."
    )
    state_refresh: Literal["epoch", "never"] = Field(
        "epoch", description="Recompute stored states once after the first epoch, or leave them stale."
    )
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="Encoder and memory of the update in bf16; acting, losses and optimiser stay as they are."
    )
    bootstrap_last: bool = Field(
        True,
        description="Value of the observation after the rollout; off: zero, as the specification's class.",
    )

    @model_validator(mode="after")
    def _settings_fit(self) -> PPOConfig:
        if self.entropy_coef_end is not None and self.entropy_decay_steps == 0:
            raise ValueError("entropy_coef_end needs entropy_decay_steps: over how many updates to get there")
        if min(self.sequence_length, self.rollout_length) > self.batch_size:
            raise ValueError(
                f"batch_size={self.batch_size} cannot hold one segment of "
                f"{min(self.sequence_length, self.rollout_length)} steps "
                f"(sequence_length={self.sequence_length}, rollout_length={self.rollout_length}): "
                f"raise batch_size or lower sequence_length"
            )
        return self


class NormConfig(Config):
    """NormEnforcer: how fast norms form, fade and weigh."""

    mode: Literal["resource", "action"] = Field(
        "resource", description="A strength per resource kind, or one for a harmful action."
    )
    resources: tuple[str, ...] = Field(("resource",), description="Names of the resource kinds.")
    harmful_action: NonNegativeInt | None = Field(
        None, description="Action index that guilt attaches to (action mode)."
    )
    harmful_head: NonNegativeInt = Field(0, description="Head that `harmful_action` belongs to.")
    decay_rate: Fraction = Field(0.995, description="What is left of a strength after one step.")
    internalization_threshold: NonNegativeFloat = Field(5.0, description="Strength above which guilt is felt.")
    max_norm_strength: PositiveFloat = Field(10.0, description="Cap of a strength.")
    intrinsic_scale: Annotated[float, Field(le=0.0)] = Field(
        -0.5, description="Reward per unit of strength above the threshold."
    )


class RunConfig(Config):
    """A training run: which environment, for how long, where."""

    env: Positional[str] = Field(description="Gymnasium id, as `dualhead envs` lists them.")
    total_steps: PositiveInt = Field(100_000, description="Environment steps over all streams.")
    num_envs: PositiveInt = Field(8, description="Environments stepped side by side.")
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
    eval_episodes: NonNegativeInt = Field(20, description="Evaluation episodes at the end; 0: none.")
    network: NetworkConfig = Field(default_factory=NetworkConfig)
    ppo: PPOConfig = Field(default_factory=PPOConfig)

    @model_validator(mode="after")
    def _minibatch_fits(self) -> RunConfig:
        rollout_steps = self.num_envs * self.ppo.rollout_length
        if self.ppo.batch_size > rollout_steps:
            raise ValueError(
                f"a rollout of {self.num_envs} environments x {self.ppo.rollout_length} steps = {rollout_steps} "
                f"steps does not fill one minibatch of batch_size={self.ppo.batch_size}: raise rollout_length "
                f"or num_envs, or lower batch_size"
            )
        if self.total_steps < rollout_steps:
            raise ValueError(
                f"total_steps={self.total_steps} ends before the first update: one rollout is {self.num_envs} "
                f"environments x {self.ppo.rollout_length} steps = {rollout_steps}"
            )
        return self


# Settings found by experiment (docs/log.md says how). First matching pattern wins; a field lies in RunConfig, or under
# `network` / `ppo`.
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
    """Settings of `TUNED` for an environment id, nested as RunConfig is; empty where nothing was tuned."""
    for pattern, settings in TUNED.items():
        if fnmatch.fnmatchcase(env, pattern):
            return settings
    return {}


def explain(error: ValidationError) -> str:
    """One line per wrong setting: which, what is wrong, what was given."""
    lines = []
    for problem in error.errors():
        name = ".".join(
            str(part) for part in problem["loc"] if not str(part).startswith(("function", "tuple", "constrained"))
        )
        message = problem["msg"].removeprefix("Value error, ")
        given = "" if problem["type"] == "value_error" else f", got {problem['input']!r}"
        lines.append(f"{name}: {message}{given}" if name else f"{message}{given}")
    return "\n".join(dict.fromkeys(lines))
