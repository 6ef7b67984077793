"""One PPO update: epochs, minibatches of segments, burn-in, state refresh, optimiser."""

from __future__ import annotations

import math
import warnings

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dualhead.config import PPOConfig
from dualhead.errors import DivergedError
from dualhead.learning.losses import clipped_surrogate, explained_variance, normalize, value_loss
from dualhead.learning.rollout import Rollout, of_active
from dualhead.learning.segments import cut, gather, minibatches
from dualhead.learning.staleness import refresh
from dualhead.networks.policy import RecurrentPolicy

_MEASURED = ("loss/total", "loss/policy", "loss/value", "policy/approx_kl", "policy/clip_fraction", "policy/grad_norm")


def ppo_update(
    policy: RecurrentPolicy,
    rollout: Rollout,
    *,
    advantages: Tensor,
    optimizer: torch.optim.Optimizer,
    config: PPOConfig,
    entropy_coefs: tuple[float, ...],
    head_names: tuple[str, ...],
    generator: torch.Generator,
    num_skipped: int = 0,
) -> dict[str, float]:
    """Improves the policy by one rollout, from the steps in which streams took part; there must be some.

    A minibatch whose loss or gradient is not finite is skipped: weights and optimiser stay as they are. The check runs
    on the device. The host reads the results once, after the last minibatch, so no minibatch forces a host-device sync.

    Args:
        advantages: [T, B], not normalised; T is the rollout's length.
        optimizer: over the policy's parameters, a fused one (see `FiniteSteps`).
        entropy_coefs, head_names: weight of each head's entropy, and its name for the metrics; K of them.
        generator: shuffles the segments (on the CPU).
        num_skipped: optimiser steps in a row that were skipped before this update.

    Returns:
        Metrics by name, most of them means over minibatches; `skipped_in_a_row` is the next update's `num_skipped`.

    Raises:
        DivergedError: too many steps in a row were skipped.
    """
    active = rollout.active_steps()
    old_values = rollout.values[: rollout.length]
    returns = advantages + old_values
    explained = explained_variance(of_active(old_values, active), of_active(returns, active))
    once = {"policy/explained_variance": explained}
    if config.normalize_advantages == "rollout":
        normalized = normalize(of_active(advantages, active))
        if active is None:
            advantages = normalized.view_as(advantages)
        else:
            advantages = advantages.masked_scatter(active, normalized)
    episode_starts = rollout.episode_starts[rollout.max_tail :][: rollout.length].cpu().numpy()
    tail_lengths = rollout.tail_lengths() if config.burn_in else None
    segments = cut(
        episode_starts,
        config.max_segment,
        burn_in=config.burn_in,
        tail_lengths=tail_lengths,
        active=None if active is None else active.cpu().numpy(),
    )
    weights = torch.tensor(entropy_coefs, dtype=policy.dtype, device=policy.device)
    parameters = list(policy.trainable().values())
    finite_steps = FiniteSteps(optimizer, num_skipped=num_skipped, limit=config.max_skipped_steps, device=policy.device)
    steps: list[Tensor] = []  # of each optimiser step what `_MEASURED` names, and the entropies
    metrics: dict[str, float] = {}
    stopped = False

    for epoch in range(config.num_epochs):
        if (epoch == 1 and config.state_refresh == "once") or (epoch > 0 and config.state_refresh == "every_epoch"):
            metrics |= refresh(policy, rollout, segments, config=config)
        for chosen in minibatches(segments.length, config.batch_size, generator=generator):
            minibatch = segments.take(chosen)
            if not steps:
                # The weights are still those that acted, so stored states are exact. A burn-in would begin in the tail,
                # whose states older weights made, and would replace them by less exact ones.
                minibatch = minibatch._replace(burn_in=np.zeros_like(minibatch.burn_in))
            batch = gather(policy, rollout, minibatch, advantages=advantages, returns=returns)
            with torch.autocast(policy.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                output = policy.evaluate(batch)
            surrogate = clipped_surrogate(
                output.distribution.log_probs(batch.actions),
                batch.log_probs,
                normalize(batch.advantages) if config.normalize_advantages == "minibatch" else batch.advantages,
                clip_coef=config.clip_coef,
                joint=config.ratio == "joint",
            )
            if not steps:
                # The weights have not changed yet, so a ratio other than 1 is a bug or rounding.
                once["policy/first_ratio_error"] = (surrogate.ratio.detach() - 1).abs().max()
            if config.target_kl is not None and surrogate.approx_kl.item() > config.target_kl:
                stopped = True
                break
            entropies = output.distribution.entropies().mean(0)
            squared_error = value_loss(output.values, batch.returns, batch.values, value_clip=config.value_clip)
            loss = surrogate.loss - (weights * entropies).sum() + config.value_coef * squared_error
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm or math.inf)
            finite_steps.step(loss, norm)
            with torch.no_grad():
                parts = [loss, surrogate.loss, squared_error, surrogate.approx_kl, surrogate.clip_fraction, norm]
                steps.append(torch.cat([torch.stack(parts), entropies]))
        if stopped:
            break
    if config.state_refresh == "never" or config.num_epochs == 1:
        metrics |= refresh(policy, rollout, segments, config=config, write=False)

    metrics |= dict(zip(once, torch.stack(list(once.values())).tolist()))
    names = (*_MEASURED, *(f"entropy/{name}" for name in head_names))
    measured = torch.stack(steps).cpu().numpy().astype(np.float64) if steps else np.zeros((0, len(names)))
    taken, num_skipped = _count_skipped(measured, num_skipped=num_skipped, limit=config.max_skipped_steps)
    if taken.any():
        metrics |= dict(zip(names, measured[taken].mean(0).tolist()))
    return metrics | {
        "update/stopped_by_kl": float(stopped),
        "update/optimizer_steps": int(taken.sum()),
        "update/skipped_steps": int((~taken).sum()),
        "skipped_in_a_row": num_skipped,
    }


class FiniteSteps:
    """Takes steps of a fused optimiser, except where the loss or the gradient is not finite.

    The decision stays on the device: a fused step reads `found_inf`, as it does for `torch.amp.GradScaler`. After
    `limit` skipped steps in a row, of which `num_skipped` came before, no further step is taken.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, num_skipped: int, limit: int, device: torch.device) -> None:
        self._optimizer, self._limit = optimizer, limit
        self._in_a_row = torch.full((), float(num_skipped), device=device)
        self._has_diverged = torch.zeros((), dtype=torch.bool, device=device)

    @torch.no_grad()
    def step(self, loss: Tensor, norm: Tensor) -> None:
        """A step by the gradient, of that norm, of the loss; both are scalars."""
        is_bad = ~(loss.isfinite() & norm.isfinite())
        self._in_a_row = (self._in_a_row + 1) * is_bad
        self._has_diverged = self._has_diverged | (self._in_a_row >= self._limit)
        self._optimizer.found_inf = (is_bad | self._has_diverged).to(torch.float32)  # type: ignore[attr-defined]
        self._optimizer.step()
        del self._optimizer.found_inf  # type: ignore[attr-defined]  # only this step may see it


def _count_skipped(measured: NDArray[np.float64], *, num_skipped: int, limit: int) -> tuple[NDArray[np.bool_], int]:
    """Warns of each skipped step of M, whose numbers [M, ...] are named by `_MEASURED`, after `num_skipped` in a row.

    Returns which of the M were taken, and how many in a row were skipped at the end. DivergedError: it reached `limit`.
    """
    losses, norms = (measured[:, _MEASURED.index(name)] for name in ("loss/total", "policy/grad_norm"))
    taken = np.isfinite(losses) & np.isfinite(norms)
    for loss, norm, was_taken in zip(losses, norms, taken):
        if was_taken:
            num_skipped = 0
            continue
        num_skipped += 1
        what = f"loss {loss}, gradient norm {norm}"
        if num_skipped >= limit:
            raise DivergedError(
                f"{num_skipped} optimiser steps in a row had a non-finite loss or gradient ({what}): lower "
                f"learning_rate, set normalize_rewards, or look for extreme rewards and observations"
            )
        warnings.warn(f"an optimiser step was skipped: {what} ({num_skipped} in a row)", stacklevel=4)
    return taken, num_skipped
