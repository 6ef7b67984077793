"""Frozen, validated settings of the agent, norms and newcomers, with their defaults.

Help texts and docs are read from the fields. Those of a run are in `running/config.py`, of a study in
`studies/config.py`, and of a world in its own folder.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dualhead.errors import SettingsError, did_you_mean

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
COUNT_LIMIT = 2**53
"""Of every count: a float holds smaller ones exactly."""
PositiveInt = Annotated[int, Field(gt=0, lt=COUNT_LIMIT)]
NonNegativeInt = Annotated[int, Field(ge=0, lt=COUNT_LIMIT)]
PositiveFloat = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
SEED_LIMIT = 2**64
Seed = Annotated[int, Field(ge=0, lt=SEED_LIMIT)]
FiniteFloat = Annotated[float, Field(allow_inf_nan=False)]

SPEC: dict[str, dict[str, Any]] = {
    "network": {"hidden_size": 256, "encoder_sizes": (256,), "head_gain": 2**0.5},
    "ppo": {
        "learning_rate": 3e-4,
        "num_epochs": 4,
        "batch_size": 64,
        "normalize_advantages": "rollout",
        "normalize_observations": False,
        "normalize_rewards": False,
        "rollout_length": 100,
        "sequence_length": 1,
        "state_refresh": "never",
        "bootstrap_last": False,
    },
}
"""What the specification's class (docs/spec.md) sets differently from our defaults: `--preset spec` and the methods
`NetworkConfig.spec()` and `PPOConfig.spec()`."""


class Config(BaseModel):
    """Base of every settings class: frozen, unknown names refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    def __init__(self, **settings: Any) -> None:
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise SettingsError(problems(error, of=type(self))) from None

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        """Lists the fields in the docstring, for `help`."""
        lines = [inspect.cleandoc(cls.__doc__ or ""), "", "Args:"]
        for name, field in cls.model_fields.items():
            field.description = " ".join((field.description or "").split())
            default = "" if field.is_required() else f" Default: {field.get_default(call_default_factory=True)!r}."
            lines.append(f"    {name}: {field.description}{default}")
        cls.__doc__ = "\n".join(lines)

    def __repr_args__(self) -> Iterable[tuple[str | None, Any]]:
        """Only what differs from the defaults."""
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if field.is_required() or value != field.get_default(call_default_factory=True):
                yield name, value


class WorldConfig(Config):
    """What a run must know of its world. A world with settings of its own, such as its rules, derives a class."""

    num_agents: PositiveInt = 1
    """Agents of one world; each is a stream."""
    resources: tuple[str, ...] = ()
    """Resource kinds that the events of its steps are about; none: it gives no events."""


class NetworkConfig(Config):
    """Shape of the policy: encoder, memory, heads."""

    memory: Literal["lstm", "gru", "mingru", "lru", "none"] = "lstm"
    """Recurrent core: LSTM, GRU, minGRU or LRU (docs/memories.md); `none` is the memoryless control. `dualhead train`
    also takes MODULE:NAME of one of yours."""
    hidden_size: PositiveInt = 128
    """Units of the memory, H."""
    num_layers: PositiveInt = 1
    """Stacked recurrent layers, L."""
    encoder_sizes: tuple[PositiveInt, ...] = (64,)
    """Widths of the layers between the flattened observation and the memory."""
    image_encoder: Literal["auto", "small", "nature", "flat"] = "auto"
    """Convolutions for images (Boxes of three axes, or of two as uint8): `small` (two 3x3), `nature` (8x8, 4x4, 3x3
    with strides); `auto` takes `nature` from 36 pixels on. `flat`: none, images are vectors."""
    image_layout: Literal["auto", "chw", "hwc"] = "auto"
    """Which axis of an image holds the channels; `auto`: two equal neighbours are the pixels."""
    activation: Literal["relu", "tanh"] = "relu"
    """After the layers of `encoder_sizes` and `head_sizes`; convolutions keep ReLU."""
    previous_action: bool = False
    """Show the policy its action of the step before (R2D2): one-hot per head, zero at a start."""
    previous_reward: bool = False
    """Show the policy the reward of the step before (R2D2), zero at an episode's start."""
    critic_memory: Literal["shared", "lstm", "gru", "mingru", "lru", "none"] = "shared"
    """Memory of the critic: the policy's, an own one of the same size, or none (a layer in its place)."""
    head_sizes: tuple[PositiveInt, ...] = ()
    """Widths of the layers between memory and action heads, and between memory and critic."""
    head_gain: PositiveFloat = 1.0
    """Gain of the action heads' orthogonal initialisation."""
    log_std_init: FiniteFloat = 0.0
    """Of actions in a Box: the initial logarithm of their deviation, in halves of the Box's width. From 1.5 on most
    sampled actions lie at a bound, which explores farther."""
    forget_bias: float = 0.0
    """Added to the initial bias of the gate that keeps the past: LSTM's forget, GRU's update gate, minGRU's 1 - z."""
    orthogonal_per_gate: bool = False
    """Orthogonal initialisation of each gate's matrix instead of the stacked one."""

    @classmethod
    def spec(cls, **changes: Any) -> NetworkConfig:
        """The specification's network: convolutions 3x3, one layer of 256, an LSTM of 256; `changes` over it."""
        return cls(**SPEC["network"] | changes)


class PPOConfig(Config):
    """Everything the update needs to know."""

    learning_rate: PositiveFloat = 1e-3
    """Adam step size."""
    learning_rate_schedule: Literal["constant", "linear"] = "constant"
    """`linear` falls to zero over `learning_rate_decay_steps`."""
    learning_rate_decay_steps: PositiveInt | None = None
    """Environment steps of the linear schedule; None: the run's total steps."""
    adam_eps: PositiveFloat = 1e-5
    """Adam's epsilon."""
    gamma: Fraction = 0.99
    """Discount per step."""
    gae_lambda: Fraction = 0.95
    """Trace decay per step of GAE."""
    clip_coef: PositiveFloat = 0.2
    """Clip range of the probability ratio."""
    value_clip: PositiveFloat | None = None
    """Clip range of the value change in the value loss; None: no clipping."""
    num_epochs: PositiveInt = 6
    """Passes over each rollout."""
    batch_size: PositiveInt = 256
    """Time steps per minibatch (whole segments, so about)."""
    entropy_coef: NonNegativeFloat | tuple[NonNegativeFloat, ...] = 0.01
    """Weight of the entropy bonus: one number, or one per head."""
    entropy_coef_end: NonNegativeFloat | tuple[NonNegativeFloat, ...] | None = None
    """Weight after `entropy_decay_steps`; None: it stays."""
    entropy_decay_steps: NonNegativeInt = 0
    """Number of learn() calls over which the entropy weight moves linearly to its end."""
    max_grad_norm: PositiveFloat | None = 0.5
    """Gradient norm is clipped to this."""
    max_skipped_steps: PositiveInt = 20
    """Optimiser steps in a row that may be skipped for a non-finite loss or gradient."""
    value_coef: NonNegativeFloat = 0.5
    """Weight of the value loss."""
    ratio: Literal["per_head", "joint"] = "per_head"
    """Clip each head's ratio and sum the surrogates, or clip the product."""
    target_kl: PositiveFloat | None = None
    """Stop an update when approx_kl of a minibatch exceeds this."""
    normalize_advantages: Literal["rollout", "minibatch", "none"] = "minibatch"
    """Over which steps advantages are brought to mean 0 and deviation 1."""
    normalize_observations: bool = True
    """Scale vector observations by running mean and deviation."""
    normalize_rewards: bool = True
    """Divide rewards by the running deviation of the discounted return."""
    rollout_length: PositiveInt = 128
    """Steps per stream between updates, T."""
    sequence_length: PositiveInt | Literal["rollout"] = "rollout"
    """Longest run of steps that gradients flow through: a number, or `rollout` for whole episodes, as far as the
    rollout holds them; 1 is the specification's slicing."""
    burn_in: NonNegativeInt = 0
    """Preceding steps unrolled without gradient to warm a segment's state (R2D2)."""
    state_refresh: Literal["once", "every_epoch", "never"] = "once"
    """When to recompute stored states with the current weights: before the second epoch, before every epoch but the
    first, or never."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Encoder and memory of the update in bf16; acting, losses and optimiser stay as they are."""
    bootstrap_last: bool = True
    """Value of the observation after the rollout; off: zero, as the specification's class."""

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

    mode: Literal["resource", "action"] = "resource"
    """A strength per resource kind, or one for a harmful action."""
    resources: tuple[str, ...] = ("resource",)
    """Names of the resource kinds; in a run always its world's."""
    harmful_action: NonNegativeInt | None = None
    """Action index that guilt attaches to (action mode)."""
    harmful_head: NonNegativeInt = 0
    """Head that `harmful_action` belongs to."""
    decay_rate: Fraction = 0.995
    """What is left of a strength after one step."""
    internalization_threshold: NonNegativeFloat = 5.0
    """Strength above which guilt is felt."""
    max_norm_strength: PositiveFloat = 10.0
    """Cap of a strength."""
    intrinsic_scale: Annotated[float, Field(le=0.0, allow_inf_nan=False)] = -0.5
    """Reward per unit of strength above the threshold."""

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


class TurnoverConfig(Config):
    """Newcomers who take the places of agents: when, and whose."""

    first_turn: PositiveInt | None = None
    """Turn of the first replacement (at the end of the rollout that is running then); None: never."""
    every_turns: PositiveInt | None = None
    """Turns between replacements; None: there is only one."""
    num_times: PositiveInt | None = None
    """How often; None: to the end of the run."""
    num_agents: PositiveInt = 1
    """Agents replaced each time."""
    selection: Literal["first_n", "random", "tenure"] = "random"
    """Whom: those with the lowest numbers, anybody, or those who have been there longest."""

    @model_validator(mode="after")
    def _schedule_fits(self) -> TurnoverConfig:
        if self.first_turn is None and (self.every_turns or self.num_times):
            raise ValueError("every_turns and num_times need first_turn: when the first replacement is")
        if self.every_turns is None and (self.num_times or 1) > 1:
            raise ValueError(f"num_times={self.num_times} needs every_turns: how far apart")
        return self


def merged(settings: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Nested settings with those of `over` in their place; lists and schedules of resources are replaced whole."""
    result = dict(settings)
    for name, value in over.items():
        nested = name in ("network", "ppo", "world", "norms", "turnover") and isinstance(result.get(name), dict)
        result[name] = merged(result[name], value) if nested and isinstance(value, dict) else value
    return result


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name. The arguments of an environment stay together: their names are not ours."""
    result: dict[str, Any] = {}
    for name, value in settings.items():
        result |= (
            flat(value, f"{prefix}{name}.")
            if isinstance(value, dict) and name != "env_args"
            else {f"{prefix}{name}": value}
        )
    return result


def problems(error: ValidationError, *, of: type[BaseModel] | None = None) -> list[tuple[str, str]]:
    """Wrong settings: which, what is wrong with it, and what was given.

    Args:
        error: from pydantic.
        of: the settings class, whose fields are suggested for unknown names.
    """
    found, errors = [], error.errors()
    around = {problem["loc"][:depth] for problem in errors for depth in range(len(problem["loc"]))}
    for problem in errors:
        if problem["loc"] and problem["loc"] in around:
            continue  # a list is called too short when what is in it is wrong
        name = ".".join(
            str(part) for part in problem["loc"] if not str(part).startswith(("function", "tuple", "constrained"))
        )
        inner = problem.get("ctx", {}).get("error")
        if isinstance(inner, SettingsError):  # of settings within settings
            found += [(f"{name}.{below}".strip("."), message) for below, message in inner.problems]
            continue
        given = "" if problem["type"] == "value_error" else f", got {problem['input']!r}"
        meant = did_you_mean(name, names_of(of)) if problem["type"] == "extra_forbidden" and of else ""
        message = "no such setting" if problem["type"] == "extra_forbidden" else problem["msg"]
        found.append((name, message.removeprefix("Value error, ") + given + meant))
    return found


def names_of(settings: type[BaseModel]) -> list[str]:
    """Of all fields; those of settings within settings have the prefix that is needed there."""
    names = list(settings.model_fields)
    for name, field in settings.model_fields.items():
        names += [f"{name}.{below}" for below in getattr(field.annotation, "model_fields", ())]
    return names
