"""One PPO update: epochs, minibatches of segments, burn-in, state refresh, optimiser."""

from __future__ import annotations

import math
import warnings
from contextlib import nullcontext

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dualhead.config import PPOConfig
from dualhead.learning.losses import clipped_surrogate, explained_variance, normalize, value_loss
from dualhead.learning.rollout import Rollout
from dualhead.learning.segments import IntArray, Segments, cut, minibatches
from dualhead.networks.policy import RecurrentPolicy
from dualhead.types import DivergedError, RecurrentState, SegmentBatch, on_device

DRIFT_SEGMENTS = 64
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
    """Improves the policy by one rollout.

    A minibatch whose loss or gradient is not finite is skipped: weights and optimiser stay as they are. The device
    finds that out and the host tells it at the end, so that nobody waits; after a first one that was skipped, the
    second burns in.

    Args:
        policy, rollout: what learns, from what.
        advantages: [T, B], not normalised; T is the rollout's length.
        optimizer: over the policy's parameters, a fused one (see `FiniteSteps`).
        config: epochs, minibatches, clipping and the rest.
        entropy_coefs: weight of each head's entropy, K of them.
        head_names: K names for the metrics.
        generator: shuffles the segments (on the CPU).
        num_skipped: optimiser steps in a row that were skipped before this update.

    Returns:
        Metrics by name; means over minibatches unless their name says otherwise. `skipped_in_a_row` is the next
        update's `num_skipped`.

    Raises:
        DivergedError: too many steps in a row were skipped.
    """
    returns = advantages + rollout.values[: rollout.length]
    values_explained = explained_variance(rollout.values[: rollout.length], returns)
    if config.normalize_advantages == "rollout":
        advantages = normalize(advantages)
    episode_starts = rollout.episode_starts[rollout.max_tail :][: rollout.length].cpu().numpy()
    segments = cut(
        episode_starts,
        config.max_segment,
        burn_in=config.burn_in,
        tail_lengths=rollout.tail_lengths() if config.burn_in else None,
    )
    joint = config.ratio == "joint"
    weights = torch.tensor(entropy_coefs, dtype=policy.dtype, device=policy.device)
    parameters = list(policy.parameters())
    finite_steps = FiniteSteps(optimizer, num_skipped=num_skipped, limit=config.max_skipped_steps, device=policy.device)
    steps: list[Tensor] = []  # of each optimiser step what `_MEASURED` names, and the entropies
    metrics: dict[str, float] = {}
    once = {"policy/explained_variance": values_explained}
    stopped = False

    for epoch in range(config.num_epochs):
        if epoch == 1 and config.state_refresh == "epoch":
            metrics |= refresh(policy, rollout, segments, config=config)
        for chosen in minibatches(segments.length, config.batch_size, generator=generator):
            minibatch = segments.take(chosen)
            if not steps:
                # The weights are still those that acted: stored states are exact, and a burn-in through the tail,
                # whose states older weights made, would replace them by other ones.
                minibatch = minibatch._replace(burn_in=np.zeros_like(minibatch.burn_in))
            batch = gather(policy, rollout, minibatch, advantages=advantages, returns=returns)
            with torch.autocast(policy.device.type, torch.bfloat16) if config.precision == "bf16" else nullcontext():
                output = policy.evaluate(batch)
            minibatch_advantages = batch.advantages
            if config.normalize_advantages == "minibatch":
                minibatch_advantages = normalize(minibatch_advantages)
            surrogate = clipped_surrogate(
                output.distribution.log_probs(batch.actions),
                batch.log_probs,
                minibatch_advantages,
                clip_coef=config.clip_coef,
                joint=joint,
            )
            if not steps:
                # Nothing has moved yet: anything but 1 is a bug or rounding.
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
    metrics["update/optimizer_steps"] = int(taken.sum())
    metrics["update/skipped_steps"] = int((~taken).sum())
    metrics["skipped_in_a_row"] = num_skipped
    return metrics


class FiniteSteps:
    """Steps of a fused optimiser, but none where the loss or the gradient is not finite.

    The host need not wait to know: the step itself looks at `found_inf`, as it does for `torch.amp.GradScaler`.

    Args:
        optimizer: a fused one.
        num_skipped: steps in a row that were skipped before.
        limit: after so many in a row none are taken any more.
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
        del self._optimizer.found_inf  # type: ignore[attr-defined]  # somebody else's step is theirs


def _count_skipped(measured: NDArray[np.float64], *, num_skipped: int, limit: int) -> tuple[NDArray[np.bool_], int]:
    """Tells of the optimiser steps that were skipped.

    Args:
        measured: [M, ...] numbers of M steps, named by `_MEASURED`.
        num_skipped: steps in a row that were skipped before these.
        limit: so many in a row are too many.

    Returns:
        [M] which were taken, and how many in a row were skipped at the end.

    Raises:
        DivergedError: too many in a row.
    """
    losses, norms = (measured[:, _MEASURED.index(name)] for name in ("loss/total", "policy/grad_norm"))
    taken = np.isfinite(losses) & np.isfinite(norms)
    for loss, norm, was_taken in zip(losses, norms, taken):
        num_skipped = 0 if was_taken else num_skipped + 1
        if was_taken:
            continue
        what = f"loss {loss}, gradient norm {norm}"
        if num_skipped >= limit:
            raise DivergedError(
                f"{num_skipped} optimiser steps in a row had a non-finite loss or gradient ({what}): lower "
                f"learning_rate, set normalize_rewards, or look for extreme rewards and observations"
            )
        warnings.warn(f"an optimiser step was skipped: {what} ({num_skipped} in a row)", stacklevel=4)
    return taken, num_skipped


def gather(
    policy: RecurrentPolicy, rollout: Rollout, segments: Segments, *, advantages: Tensor, returns: Tensor
) -> SegmentBatch:
    """A minibatch of segments, packed, each with the state it begins from."""
    order, rows, layout = rollout.stretch(
        segments, segments.start, segments.length, block_cost=policy.block_cost, step_cost=policy.step_cost
    )
    steps = rows - rollout.max_tail * rollout.num_streams

    def pick(buffer: Tensor) -> Tensor:
        return buffer[: rollout.length].flatten(0, 1).index_select(0, steps)

    return SegmentBatch(
        observations=rollout.observations_at(rows),
        state=initial_states(policy, rollout, segments.take(order)),
        layout=layout,
        actions=pick(rollout.actions),
        log_probs=pick(rollout.log_probs),
        values=pick(rollout.values),
        advantages=pick(advantages),
        returns=pick(returns),
    )


@torch.no_grad()
def initial_states(policy: RecurrentPolicy, rollout: Rollout, segments: Segments) -> RecurrentState:
    """The state [L, S, H] each segment begins from: stored, and unrolled through its burn-in by today's weights.

    Source: Kapturowski et al. 2019 (R2D2) §3, "stored state" and "burn-in".
    """
    state = rollout.state_at(rollout.flat_rows(segments.stream, segments.start - segments.burn_in))
    (warm,) = np.nonzero(segments.burn_in)
    if len(warm) == 0:
        return state
    prefix = segments.take(warm)
    order, rows, layout = rollout.stretch(prefix, prefix.start - prefix.burn_in, prefix.burn_in, block_cost=0.0)
    which = on_device(torch.from_numpy(warm[order]), rollout.device)
    warmed = policy.advance(rollout.observations_at(rows), state.select(which), layout)
    state.write(which, warmed)
    return state


@torch.no_grad()
def refresh(
    policy: RecurrentPolicy, rollout: Rollout, segments: Segments, *, config: PPOConfig, write: bool = True
) -> dict[str, float]:
    """Recomputes the states that segments (and their burn-ins) begin from with today's weights, and measures drift.

    Every run of steps is unrolled from its own beginning, all runs side by side, a segment's length at a time.
    Drift is what R2D2 calls ΔQ, said for PPO: how far values (root mean square, in deviations of the rollout's values)
    and action distributions (KL in nats) move between stored and refreshed state, at the first and last step of
    segments.

    Args:
        write: rewrite the rollout's states; otherwise only a sample of streams is unrolled, for the drift.

    Returns:
        Metrics `state_drift/*`; none for a memoryless policy or where no segment begins inside a run.
    """
    if not policy.has_memory:
        return {}
    inside = segments.offset > 0
    if not write:
        (candidates,) = np.nonzero(inside)
        if len(candidates):
            inside &= segments.stream <= segments.stream[candidates[:DRIFT_SEGMENTS][-1]]
    if not inside.any():
        return {}
    rows, states = _unroll_runs(policy, rollout, segments, streams=segments.stream[inside], config=config)
    (measured,) = np.nonzero(inside)
    measured = measured[np.linspace(0, len(measured) - 1, min(DRIFT_SEGMENTS, len(measured))).astype(np.int64)]
    sample = segments.take(measured)
    order, packed, layout = rollout.stretch(
        sample, sample.start, sample.length, block_cost=policy.block_cost, step_cost=policy.step_cost
    )
    seen = rollout.observations_at(packed)
    sample = sample.take(order)
    begins = rollout.flat_rows(sample.stream, sample.start)
    ends = rollout.flat_rows(sample.stream, sample.start + sample.length - 1)
    old = policy.unroll(seen, rollout.state_at(begins), layout)
    stored = rollout.state_at(rows)
    rollout.write_states(rows, states)
    new = policy.unroll(seen, rollout.state_at(begins), layout)
    if not write:
        rollout.write_states(rows, stored)

    spread = rollout.values[: rollout.length].std(unbiased=False) + 1e-8
    squares, kl = (new.values - old.values).square(), new.distribution.kl_from(old.distribution)
    metrics = {}
    for place, where in (("first", begins), ("last", ends)):
        weights = torch.isin(packed, where, assume_unique=True).to(kl.dtype) / len(where)
        metrics[f"state_drift/value_{place}"] = (weights * squares).sum().sqrt() / spread
        metrics[f"state_drift/kl_{place}"] = (weights * kl).sum()
    return dict(zip(metrics, torch.stack(list(metrics.values())).tolist()))


def _unroll_runs(
    policy: RecurrentPolicy, rollout: Rollout, segments: Segments, *, streams: IntArray, config: PPOConfig
) -> tuple[Tensor, RecurrentState]:
    """Fresh states at every inner cut of the runs of some streams: flat rows [S] and states [L, S, H]."""
    of_streams = segments.take(np.flatnonzero(np.isin(segments.stream, streams)))
    first = of_streams.offset == 0
    run = np.cumsum(first) - 1
    run_length = np.bincount(run, weights=of_streams.length).astype(np.int64)
    runs = of_streams.take(np.flatnonzero(first))
    remainder = config.burn_in % config.max_segment
    pieces = [config.max_segment - remainder, remainder] if remainder else [config.max_segment]
    state = rollout.state_at(rollout.flat_rows(runs.stream, runs.start))
    rows, states = [], []
    position = turn = 0
    while True:
        piece = pieces[turn % len(pieces)]
        alive = np.flatnonzero(run_length > position + piece)
        if len(alive) == 0:
            break
        runs, run_length = runs.take(alive), run_length[alive]
        lengths = np.full(len(alive), piece)
        _, steps, layout = rollout.stretch(runs, runs.start + position, lengths, block_cost=0.0)
        state = state.select(on_device(torch.from_numpy(alive), rollout.device))
        state = policy.advance(rollout.observations_at(steps), state, layout)
        position += piece
        turn += 1
        rows.append(rollout.flat_rows(runs.stream, runs.start + position))
        states.append(state)
    return torch.cat(rows), RecurrentState.concatenate(states)
