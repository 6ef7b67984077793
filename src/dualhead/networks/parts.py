"""Encoders and memories that users bring: made, named, and tried before anything is learned with them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from dualhead.networks.memory import Memory
from dualhead.spaces import ObservationSpec, torch_dtype
from dualhead.types import RecurrentState

CRITIC = "critic_"
"""How the names of the state's parts begin that belong to the critic's own memory."""
_BATCH_NORM = "(BatchNorm? put it into eval(), or use LayerNorm or GroupNorm)"
_TWO_POLICIES = "the policy that acts would not be the one that learns"


def part_name(part: nn.Module) -> str:
    """`module:Class` of a part, as the command line and checkpoints name it."""
    return f"{type(part).__module__}:{type(part).__qualname__}"


def make_part(given: Any, what: str, *arguments: Any) -> Any:
    """A module that was given as such, or what a factory makes of the arguments; it must have `num_features`."""
    made = given
    if callable(given) and not isinstance(given, nn.Module):
        shown = ", ".join(repr(x) if isinstance(x, int) else type(x).__name__ for x in arguments)
        with _blamed(f"{what} {getattr(given, '__name__', given)}: making it with ({shown})"):
            made = given(*arguments)
    if not isinstance(made, nn.Module):
        got = repr(given) if made is given else f"{given!r}, which made {made!r}"
        hint = f"; one of dualhead's own: network=NetworkConfig({what}={given!r})" if isinstance(given, str) else ""
        raise TypeError(f"{what}: expected an nn.Module, or a class or function that makes one, got {got}{hint}")
    num_features = getattr(made, "num_features", None)
    if not isinstance(num_features, int) or num_features < 1:
        raise TypeError(
            f"{what} {part_name(made)}: expected an attribute num_features, the width of what it returns, "
            f"got {num_features!r}"
        )
    return made


@torch.no_grad()
def check_encoder(encoder: Any, spec: ObservationSpec) -> None:
    """Tries an encoder on random observations, together and one by one.

    Refuses features of another shape or dtype than expected, features that change from call to call or depend on the
    other observations of the batch, and writing into its inputs.
    """
    name = f"encoder {part_name(encoder)}"
    device, dtype = _device_and_dtype(encoder)
    seen = {}
    for leaf in spec.leaves:
        own = torch_dtype(leaf.space.dtype)
        seen[leaf.name] = _samples(leaf.space, 4).to(device, dtype if own.is_floating_point else own)
    given = dict(seen)
    shapes = ", ".join(f"{leaf!r}: {tuple(x.shape)} {x.dtype}" for leaf, x in seen.items())
    with _unchanged(name, seen.values()), _blamed(f"{name}: forward of {{{shapes}}}"):
        features = encoder(given)
    if given.keys() != seen.keys():
        raise ValueError(f"{name} changes its dictionary of inputs in place: expected it to work on a copy")
    _expect(features, (4, encoder.num_features), dtype, f"{name}: expected features of 4 observations")
    if not torch.equal(features, encoder(dict(seen))):
        raise ValueError(
            f"{name} gives different features for the same observation: {_TWO_POLICIES} (dropout? put it into eval())"
        )
    try:
        alone = torch.cat([encoder({leaf: x[n : n + 1] for leaf, x in seen.items()}) for n in range(4)])
    except Exception as error:
        raise ValueError(f"{name} takes 4 observations, not one observation alone: {error} {_BATCH_NORM}") from error
    if worst := _difference(alone, features):
        raise ValueError(
            f"{name}: an observation's features depend on the other observations of the batch (they change by up to "
            f"{worst:.2g}): {_TWO_POLICIES} {_BATCH_NORM}"
        )


@torch.no_grad()
def check_memory(memory: Any, num_inputs: int) -> None:
    """Tries a memory on two short segments: stepping through each alone must give what unrolling both gives.

    Refuses missing methods, unexpected shapes, dtypes or names of states and outputs, and writing into its inputs.
    """
    name = f"memory {part_name(memory)}"
    device, dtype = _device_and_dtype(memory)
    if not isinstance(memory, Memory):
        missing = [method for method in ("initial_state", "step", "plan", "unroll") if not hasattr(memory, method)]
        raise TypeError(
            f"{name} lacks {', '.join(missing)}: derive it from dualhead.MemoryCell, which has all but step"
        )
    zero = memory.initial_state(2, device=device, dtype=dtype)
    _check_initial_state(zero, name)
    lengths = np.array([3, 1])
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(4, len(lengths), num_inputs, generator=generator).to(device, dtype)
    _, begin = _try_step(memory, inputs[3], zero, name)
    # Once more, as zeros do not show that a step multiplies its state in place.
    _try_step(memory, inputs[0], begin, name)
    stepped = {}
    for segment, length in enumerate(lengths):
        state = begin.select(slice(segment, segment + 1))
        for step in range(length):
            try:
                output, state = _try_step(memory, inputs[step, segment][None], state, name)
            except Exception as error:
                raise ValueError(
                    f"{name} takes a step of two streams, but not of one stream alone: {error} {_BATCH_NORM}"
                ) from error
            stepped[segment, step] = output[0]
    plan = memory.plan(lengths, device=device)
    packed = inputs[torch.from_numpy(plan.step), torch.from_numpy(plan.segment)]
    with _unchanged(name, [packed, *begin]):
        unrolled, _ = memory.unroll(packed, begin, plan.layout)
    _expect(unrolled, (4, memory.num_features), dtype, f"{name}: expected unroll to give outputs of 4 steps")
    expected = torch.stack([stepped[at] for at in zip(plan.segment.tolist(), plan.step.tolist())])
    if worst := _difference(unrolled, expected):
        raise ValueError(
            f"{name}: step and unroll disagree by up to {worst:.2g}: {_TWO_POLICIES} (dropout, statistics over the "
            f"batch, or steps in another order than the plan's?)"
        )


def _check_initial_state(zero: Any, name: str) -> None:
    """Refuses what `initial_state` should not return for two streams."""
    if not isinstance(zero, RecurrentState):
        raise TypeError(f"{name}: expected initial_state to return a RecurrentState, got {type(zero).__name__}")
    if not zero.parts:
        raise ValueError(f"{name}: expected at least one part of the state; without memory, h of shape (1, 0)")
    for part, tensor in zero.parts.items():
        if not part.isidentifier() or part.startswith(CRITIC) or part == "episode_starts":
            raise ValueError(
                f"{name}: a part of the state is named {part!r}: expected an identifier that is not episode_starts and "
                f"does not begin with {CRITIC}, which the agent uses itself"
            )
        if tensor.dim() < 2 or tensor.shape[1] != 2 or tensor.any():
            raise ValueError(
                f"{name}: expected the initial state's part {part!r} to be zeros with the stream axis second, "
                f"[L, 2, ...] for 2 streams, got shape {tuple(tensor.shape)}"
                + (", not all zero" if tensor.any() else "")
            )


def _try_step(memory: Any, features: Tensor, state: RecurrentState, name: str) -> tuple[Tensor, RecurrentState]:
    """One step, and what it returned, checked."""
    shapes = f"features {tuple(features.shape)} and {state}"
    with _unchanged(name, [features, *state]), _blamed(f"{name}: step of {shapes}"):
        output, after = memory.step(features, state)
    if not isinstance(after, RecurrentState):
        raise TypeError(f"{name}: expected step to return (outputs, RecurrentState), got {type(after).__name__}")
    what = f"{name}: expected step to give outputs of {len(features)} streams"
    _expect(output, (len(features), memory.num_features), features.dtype, what)
    got, wanted = ({part: (tuple(x.shape), x.dtype) for part, x in each.parts.items()} for each in (after, state))
    if got != wanted:
        raise ValueError(f"{name}: expected the state after a step to have {wanted}, got {got}")
    return output, after


@contextmanager
def _blamed(call: str) -> Iterator[None]:
    """Says which call of a user's own part failed, and with what."""
    try:
        yield
    except NotImplementedError:  # MemoryCell says what is missing
        raise
    except Exception as error:
        raise ValueError(f"{call} failed: {type(error).__name__}: {error}") from error


@contextmanager
def _unchanged(name: str, tensors: Iterable[Tensor]) -> Iterator[None]:
    """Refuses writing into tensors that the rollout and other parts of the policy read after the call."""
    tensors = list(tensors)
    before = [tensor.clone() for tensor in tensors]
    yield
    if not all(map(torch.equal, before, tensors)):
        raise ValueError(
            f"{name} writes into its inputs in place: expected it to make new tensors (x = x + 1, not x += 1)"
        )


def _expect(given: Any, shape: tuple[int, ...], dtype: torch.dtype, what: str) -> None:
    got = (tuple(given.shape), given.dtype) if isinstance(given, Tensor) else type(given).__name__
    if got != (shape, dtype):
        raise ValueError(f"{what} of shape {shape} and {dtype}, got {got}")


def _difference(given: Tensor, expected: Tensor) -> float:
    """The greatest difference, or 0 where it is rounding: small beside the largest number."""
    worst = (given - expected).abs().max().item()
    tolerance = 1e-8 if expected.dtype == torch.float64 else 1e-3
    return 0.0 if worst <= tolerance * max(1.0, expected.abs().max().item()) else worst


def _samples(space: gym.Space, number: int) -> Tensor:
    """Random members of a leaf's space, whose own generator stays as it is."""
    if isinstance(space, spaces.Box) and space.dtype.kind == "f":  # Gymnasium cannot sample between float64's bounds
        low, high = (np.where(np.isfinite(x), np.clip(x, -1e6, 1e6), x) for x in (space.low, space.high))
        space = spaces.Box(low.astype(space.dtype), high.astype(space.dtype), dtype=space.dtype.type)
    space = copy.deepcopy(space)
    space.seed(0)
    return torch.from_numpy(np.stack([space.sample() for _ in range(number)]))


def _device_and_dtype(part: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where a part's numbers are, and their type."""
    for tensor in (*part.parameters(), *part.buffers()):
        if tensor.is_floating_point():
            return tensor.device, tensor.dtype
    return torch.device("cpu"), torch.get_default_dtype()
