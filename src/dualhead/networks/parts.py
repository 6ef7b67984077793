"""Encoders and memories that users bring: made, named, and tried before anything is learned with them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dualhead.networks.memory import Memory
from dualhead.spaces import ObservationSpec, torch_dtype
from dualhead.types import RecurrentState

_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}
"""How far outputs of `step` and `unroll` may lie apart, relative to the largest; other types get float32's."""


def part_name(part: nn.Module) -> str:
    """`module:Class` of a part, as the command line and checkpoints name it."""
    return f"{type(part).__module__}:{type(part).__qualname__}"


def make_part(given: Any, what: str, *arguments: Any) -> Any:
    """A module that was given as such, or what a factory makes of the arguments.

    Raises:
        TypeError: it is neither, or the factory made something else.
    """
    made = given if isinstance(given, nn.Module) else given(*arguments) if callable(given) else None
    if isinstance(made, nn.Module):
        return made
    got = f"{given!r}" if made is None else f"{given!r}, which made {made!r}"
    raise TypeError(f"{what}: expected an nn.Module, or a class or function that makes one, got {got}")


@torch.no_grad()
def check_encoder(encoder: nn.Module, spec: ObservationSpec) -> None:
    """Tries an encoder on two blank observations.

    Raises:
        TypeError: it has no `num_features`.
        ValueError: it gives other shapes than it says, or two answers to one question.
    """
    name = part_name(encoder)
    num_features = _num_features(encoder, "encoder")
    device, dtype = _home(encoder)
    blank = {}
    for leaf in spec.leaves:
        own = torch_dtype(leaf.space.dtype)
        shape = (2, *(leaf.space.shape or ()))
        blank[leaf.name] = torch.zeros(shape, dtype=dtype if own.is_floating_point else own, device=device)
    given, again = (encoder(blank) for _ in range(2))
    if not isinstance(given, Tensor) or tuple(given.shape) != (2, num_features):
        got = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
        raise ValueError(
            f"encoder {name}: expected features of shape (2, {num_features}) for 2 observations, got {got}"
        )
    if not torch.equal(given, again):
        raise ValueError(
            f"encoder {name} gives different features for the same observation: the policy that acts would not be the "
            f"one that learns (dropout? put the module into eval() and switch its training mode off)"
        )


@torch.no_grad()
def check_memory(memory: nn.Module, num_inputs: int) -> None:
    """Tries a memory on two short segments: stepping through each alone must give what unrolling both gives.

    Raises:
        TypeError: a method or attribute of `Memory` is missing.
        ValueError: states or outputs have other shapes than expected, or the two ways disagree.
    """
    name = part_name(memory)
    num_features = _num_features(memory, "memory")
    if not isinstance(memory, Memory):
        missing = [method for method in ("initial_state", "step", "plan", "unroll") if not hasattr(memory, method)]
        raise TypeError(
            f"memory {name} lacks {', '.join(missing)}: derive it from dualhead.MemoryCell, which has all but step"
        )
    device, dtype = _home(memory)
    zero = memory.initial_state(2, device=device, dtype=dtype)
    if not isinstance(zero, RecurrentState):
        raise TypeError(f"memory {name}: expected initial_state to return a RecurrentState, got {type(zero).__name__}")
    for part, tensor in zero.parts.items():
        if tensor.dim() < 2 or tensor.shape[1] != 2 or tensor.any():
            raise ValueError(
                f"memory {name}: expected the initial state's part {part!r} to be zeros with the stream axis second, "
                f"[L, 2, ...] for 2 streams, got shape {tuple(tensor.shape)}"
                + (", not all zero" if tensor.any() else "")
            )
    lengths = np.array([3, 1])
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(len(lengths), int(lengths.max()), num_inputs, generator=generator).to(device, dtype)
    stepped = {}
    for segment, length in enumerate(lengths):
        state = memory.initial_state(1, device=device, dtype=dtype)
        for step in range(length):
            output, after = memory.step(inputs[segment, step][None], state)
            _expect_like(after, state, output, name, num_features)
            stepped[segment, step], state = output[0], after
    plan = memory.plan(lengths, device=device)
    unrolled, _ = memory.unroll(inputs[torch.from_numpy(plan.segment), torch.from_numpy(plan.step)], zero, plan.layout)
    if tuple(unrolled.shape) != (len(stepped), num_features):
        raise ValueError(
            f"memory {name}: expected unroll to give outputs of shape ({len(stepped)}, {num_features}) for "
            f"{len(stepped)} steps, got {tuple(unrolled.shape)}"
        )
    expected = torch.stack([stepped[place] for place in zip(plan.segment.tolist(), plan.step.tolist())])
    worst = (unrolled - expected).abs().max().item()
    if not worst <= _TOLERANCE.get(dtype, _TOLERANCE[torch.float32]) * max(1.0, expected.abs().max().item()):
        raise ValueError(
            f"memory {name}: step and unroll disagree by up to {worst:.2g}: the policy that acts would not be the one "
            f"that learns (dropout, statistics over the batch, or steps in another order than the plan's?)"
        )


def _expect_like(after: Any, before: RecurrentState, output: Tensor, name: str, num_features: int) -> None:
    """Refuses what one step of one stream should not return."""
    if not isinstance(after, RecurrentState):
        raise TypeError(f"memory {name}: expected step to return (outputs, RecurrentState), got {type(after).__name__}")
    if tuple(output.shape) != (1, num_features):
        raise ValueError(
            f"memory {name}: expected step to give outputs of shape (1, {num_features}) for 1 stream, "
            f"got {tuple(output.shape)}"
        )
    shapes = [{part: (tuple(x.shape), x.dtype) for part, x in state.parts.items()} for state in (after, before)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"memory {name}: expected the state after a step to have {shapes[1]}, got {shapes[0]}")


def _num_features(part: nn.Module, what: str) -> int:
    num_features = getattr(part, "num_features", None)
    if not isinstance(num_features, int) or num_features < 1:
        raise TypeError(
            f"{what} {part_name(part)}: expected an attribute num_features, the width of what it returns, "
            f"got {num_features!r}"
        )
    return num_features


def _home(part: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where a part's numbers are, and their type."""
    for tensor in (*part.parameters(), *part.buffers()):
        if tensor.is_floating_point():
            return tensor.device, tensor.dtype
    return torch.device("cpu"), torch.get_default_dtype()
