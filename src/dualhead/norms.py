"""Norms: hand-coded strengths that turn past punishment into guilt. Letters: B streams, R resources."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dualhead.config import NormConfig
from dualhead.spaces import as_tensor
from dualhead.types import on_device

Mode = Literal["resource", "action"]


class NormEvents(NamedTuple):
    """What happened to each stream in one step. Arrays and numbers 0 and 1 are accepted in place of bool tensors.

    Fields:
        punished: [B, R] bool, the stream was punished for the resource; action mode: [B] or [B, 1].
        collected: [B, R] bool, the stream collected the resource; action mode ignores it.
    """

    punished: Tensor
    collected: Tensor | None = None


class Guilt(NamedTuple):
    """What one step's guilt adds to the rewards: zero or negative, in task-reward units.

    Fields:
        total: [B], the sum over resources.
        per_resource: [B, R]; action mode [B, 1].
    """

    total: Tensor
    per_resource: Tensor


class NormEnforcer(torch.nn.Module):
    """Norm strengths of B streams and the guilt they cause. Nothing is learned. Closed forms: docs/norms.md.

        s ← min(max_norm_strength, s · decay_rate + punished)
        guilt = intrinsic_scale · max(0, s − internalization_threshold)      if the resource was collected, else 0

    Guilt uses the strength *after* the step's update. Resource mode has one strength s per stream and resource. Action
    mode has one per stream: it does not decay in a step with a punishment, and the harmful action takes the place of
    collecting. Strengths persist across episodes; only `reset` clears them.

    Args:
        num_streams: B.
        settings: fields of `NormConfig`; `resources` are in the column order of the events, a string is one name.

    Attributes:
        config: all settings.
        strengths: [B, R] buffer, updated in place: clone it to keep it. Keep float32 or wider: bfloat16 rounds slow
            decays away.

    Raises:
        ValueError: a setting is outside its range, or does not belong to the mode.
    """

    strengths: Tensor
    _guilt_sums: Tensor
    _num_steps: Tensor

    def __init__(self, num_streams: int, **settings: Any) -> None:
        super().__init__()
        if num_streams < 1:
            raise ValueError(f"num_streams: expected at least 1, got {num_streams}")
        if isinstance(settings.get("resources"), str):
            settings["resources"] = (settings["resources"],)
        self.config = NormConfig(**settings)
        self.mode, self.resources = self.config.mode, self.config.resources
        self.register_buffer("strengths", torch.zeros(num_streams, len(self.resources)))
        self.register_buffer("_guilt_sums", torch.zeros(len(self.resources)))
        self.register_buffer("_num_steps", torch.zeros((), dtype=torch.int64))

    def update(self, events: NormEvents, actions: Tensor | None = None) -> Guilt:
        """Advances all strengths by one step, and returns the step's guilt.

        Args:
            events: what happened in the step. Resource mode needs both fields.
            actions: [B, K] integers, the action index of each head; only action mode needs them.

        Raises:
            ValueError: events or actions are missing, or have another shape or kind. Strengths are then unchanged.
        """
        return self.advance(self.check(events, actions))

    def check(self, events: NormEvents, actions: Tensor | None = None) -> NormEvents:
        """The events as [B, R] bool on our device, for `advance`; `collected` says who collected, or chose the harmful
        action. Raises as `update`, and changes nothing."""
        punished = self._flags("punished", events.punished)
        if self.mode == "resource":
            return NormEvents(punished, self._flags("collected", events.collected))
        if actions is None:
            raise ValueError("actions are missing: action mode needs them")
        chosen, head = as_tensor(actions, "actions"), self.config.harmful_head
        if chosen.ndim != 2 or len(chosen) != len(self.strengths) or chosen.shape[1] <= head:
            raise ValueError(
                f"actions: expected shape ({len(self.strengths)}, K) with K > harmful_head={head}, "
                f"got {tuple(chosen.shape)}"
            )
        if not _holds_integers(chosen):
            raise ValueError(f"actions: expected integers, the index chosen by each head, got {chosen.dtype}")
        assert self.config.harmful_action is not None
        return NormEvents(punished, (chosen[:, head, None] == self.config.harmful_action).to(self.strengths.device))

    def advance(self, checked: NormEvents, active: Tensor | None = None) -> Guilt:
        """`update` with what `check` gave. Where `active` [B] bool is false the stream sat the step out: its strengths
        stay as they are, and it feels no guilt."""
        punished, transgressed = checked
        assert transgressed is not None
        decayed = self.strengths * self.config.decay_rate
        if self.mode == "action":
            decayed = torch.where(punished, self.strengths, decayed)
        strengths = (decayed + punished).clamp_(max=self.config.max_norm_strength)
        num_active: Tensor | int = len(strengths)
        if active is not None:
            strengths = torch.where(active[:, None], strengths, self.strengths)
            transgressed, num_active = transgressed & active[:, None], active.sum()
        self.strengths.copy_(strengths)
        excess = self.strengths - self.config.internalization_threshold
        per_resource = torch.where(transgressed & (excess > 0.0), self.config.intrinsic_scale * excess, 0.0)
        self._guilt_sums += per_resource.sum(dim=0)
        self._num_steps += num_active  # of all streams
        return Guilt(total=per_resource.sum(dim=1), per_resource=per_resource)

    def reset(self, streams: Sequence[int] | Tensor | np.ndarray | None = None) -> None:
        """Zeroes the strengths of all streams, or of those that newcomers take over. Sums for `metrics` stay.

        Args:
            streams: stream indices, or a [B] bool mask; None for all.

        Raises:
            ValueError: an index outside [0, B), a mask of another length, or neither indices nor a mask.
        """
        num_streams = len(self.strengths)
        mask = torch.ones(num_streams, dtype=torch.bool) if streams is None else as_tensor(streams, "streams")
        # uint8 may be meant as a mask: as indices it is streams 0 and 1. An empty list arrives as floats.
        if (_holds_integers(mask) and mask.dtype != torch.uint8 and mask.ndim == 1) or not mask.numel():
            indices, mask = mask.long(), torch.zeros(num_streams, dtype=torch.bool, device=mask.device)
            if ((indices < 0) | (indices >= num_streams)).any():
                raise ValueError(f"streams: expected indices in [0, {num_streams}), got {indices.tolist()}")
            mask[indices] = True
        if mask.dtype != torch.bool or mask.shape != (num_streams,):
            raise ValueError(f"streams: expected a list of indices or {num_streams} bools, got {mask}")
        self.strengths.masked_fill_(on_device(mask, self.strengths.device)[:, None], 0.0)

    def metrics(self) -> dict[str, float]:
        """Numbers for the log; reading them starts the next interval.

        Returns:
            `norms/strength/<resource>`: mean over streams, now.
            `norms/guilt/<resource>`: mean over the steps of all streams since the last call; 0 if there was no step.
        """
        means = torch.stack([self.strengths.mean(dim=0), self._guilt_sums / self._num_steps.clamp(min=1)]).tolist()
        self._guilt_sums.zero_()
        self._num_steps.zero_()
        return {
            f"norms/{what}/{name}": value
            for what, values in zip(("strength", "guilt"), means)
            for name, value in zip(self.resources, values)
        }

    def extra_repr(self) -> str:
        return f"{len(self.strengths)}, resources={self.resources}, mode={self.mode!r}"

    def _flags(self, field: str, value: Any) -> Tensor:
        shape, name = tuple(self.strengths.shape), f"events.{field}"
        if value is None:
            raise ValueError(f"{name} is missing: {self.mode} mode needs it, of shape {shape}")
        flags = as_tensor(value, name)
        if self.mode == "action" and flags.ndim == 1:
            flags = flags[:, None]
        if flags.shape != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {tuple(flags.shape)}")
        # The values of bools need no check, which would force a host-device sync.
        if flags.dtype != torch.bool and not bool(((flags == 0) | (flags == 1)).all()):
            raise ValueError(f"{name}: expected bools, or numbers 0 and 1, got other values in {flags.dtype}")
        return on_device(flags.to(torch.bool), self.strengths.device)


def steps_until(strength_from: float, strength_to: float, *, decay_rate: float) -> float:
    """Steps without punishment in which a strength falls: ln(strength_from / strength_to) / −ln decay_rate.

    They are not rounded; 0 if the strength is already there, infinity if it never gets there.

    Raises:
        ValueError: a strength below 0 or not finite, or a decay outside [0, 1].
    """
    if not (0.0 <= strength_from < math.inf and 0.0 <= strength_to < math.inf):
        raise ValueError(f"strengths: expected finite numbers of at least 0, got {strength_from} and {strength_to}")
    NormConfig(decay_rate=decay_rate)
    if strength_from <= strength_to or decay_rate == 0.0:
        return 0.0
    if strength_to == 0.0 or decay_rate == 1.0:
        return math.inf
    return math.log(strength_from / strength_to) / -math.log(decay_rate)


def guilt_outweighs_until(payoff_gap: float, *, internalization_threshold: float, intrinsic_scale: float) -> float:
    """Strength s* = threshold + payoff_gap / |intrinsic_scale|: guilt outweighs the gap exactly while s > s*.

    The gap is what transgressing pays more than complying, in task-reward units. Guilt never outweighs it if s* is at
    or above `max_norm_strength`; s* is infinite if the scale is 0.

    Raises:
        ValueError: an argument is outside its range.
    """
    if not 0.0 <= payoff_gap < math.inf:
        raise ValueError(f"payoff_gap: expected a finite number of at least 0, got {payoff_gap}")
    NormConfig(internalization_threshold=internalization_threshold, intrinsic_scale=intrinsic_scale)
    return internalization_threshold + payoff_gap / abs(intrinsic_scale) if intrinsic_scale else math.inf


def holding_rate(threshold: float, decay_rate: float, *, mode: Mode = "resource") -> float:
    """Punishments per step that hold a strength at `threshold`, on average and far from the cap.

    That is q = threshold · (1 − decay_rate) in resource mode, and q / (1 + q) in action mode. Above 1 not even a
    punishment in every step holds it.

    Raises:
        ValueError: an argument is outside its range.
    """
    NormConfig(internalization_threshold=threshold, decay_rate=decay_rate)
    if mode not in ("resource", "action"):
        raise ValueError(f"mode: expected 'resource' or 'action', got {mode!r}")
    rate = threshold * (1.0 - decay_rate)
    return rate if mode == "resource" else rate / (1.0 + rate)


def _holds_integers(values: Tensor) -> bool:
    return not (values.is_floating_point() or values.is_complex() or values.dtype == torch.bool)
