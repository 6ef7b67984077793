"""Norms: hand-coded strengths that turn past punishment into guilt. Letters: B streams, R resources."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dualhead.config import NormConfig
from dualhead.types import on_device

Mode = Literal["resource", "action"]


class NormEvents(NamedTuple):
    """What happened to each stream in one step, as far as norms are concerned.

    NumPy arrays and 0/1 numbers are accepted in place of bool tensors.

    Fields:
        punished: [B, R] bool, the stream was punished for the resource; action mode: [B] or [B, 1].
        collected: [B, R] bool, the stream collected the resource; action mode does not look at it.
    """

    punished: Tensor
    collected: Tensor | None = None


class Guilt(NamedTuple):
    """What one step's guilt adds to the rewards: zero or negative, in task-reward units.

    Fields:
        total: [B], the sum over resources; add it to the rewards of the step.
        per_resource: [B, R]; action mode [B, 1].
    """

    total: Tensor
    per_resource: Tensor


class NormEnforcer(torch.nn.Module):
    """Norm strengths of B streams and the guilt they cause. Dynamics, not a network: nothing here is learned.

    Resource mode, for each stream and resource r, once per step:

        s_r ← s_r · decay_rate
        s_r ← min(max_norm_strength, s_r + 1)                         if punished for r
        guilt_r = intrinsic_scale · max(0, s_r − threshold)           if r was collected, else 0

    Action mode keeps one strength per stream, and punishment takes the place of that step's decay:

        s ← min(max_norm_strength, s + 1)  if punished, else  s · decay_rate
        guilt = intrinsic_scale · max(0, s − threshold)               if the harmful action was chosen, else 0

    Guilt looks at the strength *after* the step's update: the punishment that crosses the threshold already
    hurts. Strengths know nothing of episodes; only `reset` clears them. With threshold ≥ max_norm_strength
    nobody ever feels guilt, whatever the events (a control condition).

    Args:
        num_streams: B.
        resources: R distinct names in the column order of the events, for `metrics`; a bare string is one
            name. Action mode takes exactly one.
        mode: a strength per resource, or one for a harmful action.
        decay_rate: what is left of a strength after one step, in [0, 1].
        internalization_threshold: strength above which guilt is felt, at least 0.
        max_norm_strength: cap of a strength, above 0. Strengths count undecayed punishments.
        intrinsic_scale: task reward per unit of strength above the threshold, at most 0.
        harmful_action: index of the harmful action within its head; action mode only, and required there.
        harmful_head: column of `actions` that `harmful_action` belongs to.

    Attributes:
        strengths: [B, R] buffer (action mode [B, 1]), updated in place: clone it to keep it. Moves with
            `.to()` and travels in `state_dict`. Keep float32 or wider: bfloat16 rounds slow decays away.

    Raises:
        ValueError: a setting is outside its range, or does not belong to the mode.

    Source: dualhead design. `steps_until`, `guilt_outweighs_until` and `holding_rate` are its closed forms.
    """

    strengths: Tensor
    _guilt_sums: Tensor
    _num_steps: Tensor

    def __init__(
        self,
        num_streams: int,
        *,
        resources: Sequence[str],
        mode: Mode = "resource",
        decay_rate: float,
        internalization_threshold: float,
        max_norm_strength: float,
        intrinsic_scale: float,
        harmful_action: int | None = None,
        harmful_head: int = 0,
    ) -> None:
        super().__init__()
        if num_streams < 1:
            raise ValueError(f"num_streams must be at least 1, got {num_streams}")
        settings = NormConfig(
            mode=mode,
            resources=(resources,) if isinstance(resources, str) else tuple(resources),
            decay_rate=decay_rate,
            internalization_threshold=internalization_threshold,
            max_norm_strength=max_norm_strength,
            intrinsic_scale=intrinsic_scale,
            harmful_action=harmful_action,
            harmful_head=harmful_head,
        )
        self.num_streams = num_streams
        self.resources = names = settings.resources
        self.mode = settings.mode
        self.decay_rate = settings.decay_rate
        self.internalization_threshold = settings.internalization_threshold
        self.max_norm_strength = settings.max_norm_strength
        self.intrinsic_scale = settings.intrinsic_scale
        self.harmful_action = settings.harmful_action
        self.harmful_head = settings.harmful_head
        self.register_buffer("strengths", torch.zeros(num_streams, len(names)))
        self.register_buffer("_guilt_sums", torch.zeros(len(names)))
        self.register_buffer("_num_steps", torch.zeros((), dtype=torch.int64))

    def update(self, events: NormEvents, actions: Tensor | None = None) -> Guilt:
        """Advance all strengths by one step and return the guilt of that step.

        Args:
            events: what happened in the step. Resource mode needs both fields.
            actions: [B, K] integers, the action index of each head; only action mode needs and reads them.

        Returns:
            Guilt in the dtype and on the device of `strengths`.

        Raises:
            ValueError: an event or `actions` is missing, has another shape, or holds other values than 0 and
                1 (events) or integers (actions). Strengths are then as they were.
        """
        return self.advance(self.check(events, actions))

    def check(self, events: NormEvents, actions: Tensor | None = None) -> NormEvents:
        """The events of a step as [B, R] bool on our device, for `advance`; strengths stay as they are.

        In action mode `collected` says who chose the harmful action.

        Raises:
            ValueError: as `update` does.
        """
        shape = (self.num_streams, len(self.resources))
        if self.mode == "action":
            punished = self._flags("punished", events.punished, (self.num_streams,), shape).reshape(shape)
            return NormEvents(punished, self._harmful(actions))
        punished = self._flags("punished", events.punished, shape)
        return NormEvents(punished, self._flags("collected", events.collected, shape))

    def advance(self, checked: NormEvents) -> Guilt:
        """`update` with what `check` gave."""
        punished, transgressed = checked
        assert transgressed is not None
        if self.mode == "action":
            rises = (self.strengths + 1.0).clamp(max=self.max_norm_strength)
            self.strengths.copy_(torch.where(punished, rises, self.strengths * self.decay_rate))
        else:
            self.strengths.mul_(self.decay_rate).add_(punished).clamp_(max=self.max_norm_strength)

        excess = self.strengths - self.internalization_threshold
        per_resource = torch.where(transgressed & (excess > 0.0), self.intrinsic_scale * excess, 0.0)
        self._guilt_sums += per_resource.sum(dim=0)
        self._num_steps += 1
        return Guilt(total=per_resource.sum(dim=1), per_resource=per_resource)

    def reset(self, streams: Sequence[int] | Tensor | np.ndarray | None = None) -> None:
        """Zero the strengths of all streams, or of those that newcomers take over.

        What `metrics` has gathered since it was last read stays.

        Args:
            streams: stream indices, or a [B] bool mask; None for all.

        Raises:
            ValueError: an index outside [0, B), a mask of another length, or neither indices nor a mask.
        """
        if streams is None:
            self.strengths.zero_()
            return
        chosen = _as_tensor("streams", streams)
        if chosen.dtype == torch.bool:
            if tuple(chosen.shape) != (self.num_streams,):
                raise ValueError(f"streams as a mask must have shape ({self.num_streams},), got {tuple(chosen.shape)}")
        else:
            # An empty list arrives as floats. uint8 may be meant as a mask: as indices it is streams 0 and 1.
            integers = chosen.numel() == 0 or (_holds_integers(chosen) and chosen.dtype != torch.uint8)
            if chosen.ndim != 1 or not integers:
                raise ValueError(
                    f"streams must be a one-dimensional list of indices or a bool mask, got {chosen.dtype} "
                    f"of shape {tuple(chosen.shape)}"
                )
            chosen = chosen.long()
            if bool(((chosen < 0) | (chosen >= self.num_streams)).any()):
                raise ValueError(f"streams must be indices in [0, {self.num_streams}), got {chosen.tolist()}")
        self.strengths[chosen.to(self.strengths.device)] = 0.0

    def metrics(self) -> dict[str, float]:
        """Numbers for the log; reading them starts the next interval.

        Returns:
            `norms/strength/<resource>`: mean over streams, now.
            `norms/guilt/<resource>`: mean per stream and step since the last call; 0 if there was no step.
        """
        steps = max(int(self._num_steps), 1) * self.num_streams
        strengths, guilt = torch.stack([self.strengths.mean(dim=0), self._guilt_sums / steps]).tolist()
        self._guilt_sums.zero_()
        self._num_steps.zero_()
        return {
            **{f"norms/strength/{name}": value for name, value in zip(self.resources, strengths)},
            **{f"norms/guilt/{name}": value for name, value in zip(self.resources, guilt)},
        }

    def extra_repr(self) -> str:
        return f"{self.num_streams}, resources={self.resources}, mode={self.mode!r}"

    def _flags(self, name: str, value: Any, *shapes: tuple[int, ...]) -> Tensor:
        """`value` as bool on our device, in one of `shapes`."""
        if value is None:
            raise ValueError(f"events.{name} is missing: {self.mode} mode needs it, of shape {shapes[-1]}")
        flags = _as_tensor(f"events.{name}", value)
        if tuple(flags.shape) not in shapes:
            expected = " or ".join(map(str, shapes))
            raise ValueError(f"events.{name} must have shape {expected}, got {tuple(flags.shape)}")
        # Bool needs no look at the values, which would make a GPU wait.
        if flags.dtype != torch.bool and not bool(((flags == 0) | (flags == 1)).all()):
            raise ValueError(f"events.{name} must be bool or exactly 0 and 1, got other values in {flags.dtype}")
        return on_device(flags.to(torch.bool), self.strengths.device)

    def _harmful(self, actions: Any) -> Tensor:
        """[B, 1] bool, the stream chose the harmful action."""
        if actions is None:
            raise ValueError(f"actions are missing: action mode needs them, of shape ({self.num_streams}, K)")
        chosen = _as_tensor("actions", actions)
        if chosen.ndim != 2 or len(chosen) != self.num_streams or chosen.shape[1] <= self.harmful_head:
            raise ValueError(
                f"actions must have shape ({self.num_streams}, K) with K > harmful_head={self.harmful_head}, "
                f"got {tuple(chosen.shape)}"
            )
        if not _holds_integers(chosen):
            raise ValueError(f"actions must be integers, the index chosen by each head, got {chosen.dtype}")
        assert self.harmful_action is not None
        return chosen[:, self.harmful_head, None].eq(self.harmful_action).to(self.strengths.device)


def steps_until(strength_from: float, strength_to: float, *, decay_rate: float) -> float:
    """Steps without punishment in which a strength falls from one value to another.

        s_n = strength_from · decay_rateⁿ  ⇒  n = ln(strength_from / strength_to) / −ln decay_rate

    Args:
        strength_from, strength_to: strengths, at least 0.
        decay_rate: what is left of a strength after one step, in [0, 1].

    Returns:
        Steps, not rounded; 0 if the strength is already there, infinity if it never gets there.

    Raises:
        ValueError: an argument is outside its range.
    """
    if not (0.0 <= strength_from < math.inf and 0.0 <= strength_to < math.inf):
        raise ValueError(f"strengths must be finite and at least 0, got {strength_from} and {strength_to}")
    NormConfig(decay_rate=decay_rate)
    if strength_from <= strength_to or decay_rate == 0.0:
        return 0.0
    if strength_to == 0.0 or decay_rate == 1.0:
        return math.inf
    return math.log(strength_from / strength_to) / -math.log(decay_rate)


def guilt_outweighs_until(payoff_gap: float, *, internalization_threshold: float, intrinsic_scale: float) -> float:
    """Strength s* down to which guilt outweighs what transgressing pays: guilt > gap exactly while s > s*.

        |intrinsic_scale| · (s* − threshold) = payoff_gap  ⇒  s* = threshold + payoff_gap / |intrinsic_scale|

    When punishment stops at strength s0, the norm outlives it by `steps_until(s0, s*, decay_rate=...)` steps.

    Args:
        payoff_gap: what transgressing pays more than complying, in task-reward units, at least 0.
        internalization_threshold: strength above which guilt is felt, at least 0.
        intrinsic_scale: task reward per unit of strength above the threshold, at most 0.

    Returns:
        s*, in units of strength. At or above `max_norm_strength`: guilt never outweighs the gap. Infinity if
        guilt weighs nothing.

    Raises:
        ValueError: an argument is outside its range.
    """
    if not 0.0 <= payoff_gap < math.inf:
        raise ValueError(f"payoff_gap must be finite and at least 0, got {payoff_gap}")
    NormConfig(internalization_threshold=internalization_threshold, intrinsic_scale=intrinsic_scale)
    if intrinsic_scale == 0.0:
        return math.inf
    return internalization_threshold + payoff_gap / abs(intrinsic_scale)


def holding_rate(threshold: float, decay_rate: float, *, mode: Mode = "resource") -> float:
    """Punishments per step that just hold a strength at `threshold`, on average over streams or time.

        resource mode:  s = decay_rate · s + p                      ⇒  p = q,  q = s · (1 − decay_rate)
        action mode:    s = (1 − p) · decay_rate · s + p · (s + 1)  ⇒  p = q / (1 + q)

    Args:
        threshold: s, the strength to hold, at least 0 and far enough below the cap not to touch it.
        decay_rate: what is left of a strength after one step, in [0, 1].
        mode: whether a punished step also decays (resource) or not (action).

    Returns:
        p, punishments per step. Above 1 (resource mode): not even punishment on every step holds it.

    Raises:
        ValueError: an argument is outside its range.
    """
    NormConfig(internalization_threshold=threshold, decay_rate=decay_rate)
    if mode not in ("resource", "action"):
        raise ValueError(f"mode must be 'resource' or 'action', got {mode!r}")
    rate = threshold * (1.0 - decay_rate)
    return rate if mode == "resource" else rate / (1.0 + rate)


def _as_tensor(name: str, value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value
    try:
        # torch.tensor copies: torch.as_tensor warns about read-only arrays, which environments hand out.
        return torch.tensor(np.asarray(value))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be a tensor or array of numbers, got {type(value).__name__}: {error}") from error


def _holds_integers(values: Tensor) -> bool:
    return not (values.is_floating_point() or values.is_complex() or values.dtype == torch.bool)
