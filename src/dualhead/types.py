"""The records that travel between rooms. Letters as in the docs: T time, B streams, S segments, N steps, K heads.

C is the number of columns of an action: one for each categorical head, and for each number of a Box.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dualhead.errors import DataError

IntArray = NDArray[np.int64]
Observations = dict[str, Tensor]
"""One tensor per leaf of the observation space, batch axes first; a plain space has the single leaf `observation`."""


def as_numpy(values: Any) -> NDArray[Any]:
    """An array of what came as an array, or as a tensor on any device."""
    return values.numpy(force=True) if isinstance(values, Tensor) else np.asarray(values)


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on a device, without a host-device sync where that is safe.

    A copy from ordinary memory has read it all when this returns, so its owner may overwrite it. A copy from pinned
    memory might still be reading, so that one blocks.
    """
    to_accelerator = tensor.device.type == "cpu" and device.type != "cpu"
    return tensor.to(device, non_blocking=to_accelerator and not tensor.is_pinned())


class ByAgent(tuple[Any, ...]):
    """One batched tree [W, ...] for each agent of W worlds whose agents have different spaces.

    Agents with the same spaces share one batched tree [B, ...] instead: stream = world · num_agents + agent.
    """


def own_rows(tree: Any, agent: int, num_agents: int) -> Any:
    """The rows [W, ...] of one agent in batched arrays [B, ...] of all agents, nested as they come.

    Raises:
        DataError: a `ByAgent` of another number of agents.
    """
    if isinstance(tree, ByAgent):
        if len(tree) != num_agents:
            raise DataError(f"expected one part for each of {num_agents} agents, got ByAgent of {len(tree)} parts")
        return tree[agent]
    if isinstance(tree, dict):
        return {name: own_rows(part, agent, num_agents) for name, part in tree.items()}
    if isinstance(tree, tuple):
        parts = [own_rows(part, agent, num_agents) for part in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
    return None if tree is None else tree[agent::num_agents]


def joined_rows(parts: Sequence[Any], *, like: Any) -> Any:
    """The inverse of `own_rows`: `ByAgent` where `like` is one, else batched arrays [B, ...] of all agents."""
    if isinstance(like, ByAgent):
        return ByAgent(parts)
    if isinstance(parts[0], dict):
        return {name: joined_rows([part[name] for part in parts], like=None) for name in parts[0]}
    if isinstance(parts[0], tuple):
        return tuple(joined_rows(column, like=None) for column in zip(*parts))
    if isinstance(parts[0], Tensor):
        return torch.stack(list(parts), 1).flatten(0, 1)
    return np.stack(parts, 1).reshape(-1, *parts[0].shape[1:])


class RecurrentState:
    """State of a policy's memories: named parts [L, B, ...], the stream axis second. `h, c = state` for an LSTM.

    A GRU has the part `h` alone. The memoryless control has an `h` without units. Your own memory names its parts as it
    likes. The parts of a critic's own memory have names that begin with `critic_`.

    Args:
        unnamed: the parts `h` and `c`, in this order, as `nn.LSTM` returns them.
        named: parts by name.

    Attributes:
        parts: every part by name.
    """

    __slots__ = ("parts",)

    def __init__(self, *unnamed: Tensor, **named: Tensor) -> None:
        self.parts = dict(zip(("h", "c"), unnamed, strict=False)) | named
        assert len(self.parts) == len(unnamed) + len(named), "expected at most h and c without a name"

    @property
    def h(self) -> Tensor:
        return self.parts["h"]

    @property
    def c(self) -> Tensor:
        return self.parts["c"]

    @property
    def num_streams(self) -> int:
        return next(iter(self)).shape[1]

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.parts.values())

    def __repr__(self) -> str:
        return f"RecurrentState({', '.join(f'{name}={tuple(part.shape)}' for name, part in self.parts.items())})"

    def map(self, function: Callable[[Tensor], Tensor]) -> RecurrentState:
        """The state whose parts are `function(part)`."""
        return RecurrentState(**{name: function(part) for name, part in self.parts.items()})

    def detach(self) -> RecurrentState:
        return self.map(Tensor.detach)

    def to(self, device: torch.device | str) -> RecurrentState:
        return self.map(lambda part: part.to(device))

    def select(self, indices: Tensor | slice) -> RecurrentState:
        """Streams `indices` ([S] integers, [B] bool, or a slice), as `mb_h = h_states[:, idx, :]`."""
        return self.map(lambda part: part[:, indices])

    def reset_where(self, mask: Tensor) -> RecurrentState:
        """Zero every part of the streams where `mask` [B] is true."""
        return self.map(lambda part: part.masked_fill(mask.view(1, -1, *[1] * (part.dim() - 2)), 0))

    def write(self, indices: Tensor, other: RecurrentState) -> None:
        """Replaces streams `indices` [S] in place by the S streams of `other`."""
        for name, part in self.parts.items():
            part[:, indices] = other.parts[name]

    @staticmethod
    def concatenate(states: Sequence[RecurrentState]) -> RecurrentState:
        """Several groups of streams as one."""
        if len(states) == 1:
            return states[0]
        return RecurrentState(**{name: torch.cat([s.parts[name] for s in states], dim=1) for name in states[0].parts})


class Plan(NamedTuple):
    """The order in which a memory wants the N steps of S segments packed.

    Fields:
        segment, step: [N] of each packed step, its segment and its number in that segment.
        layout: whatever else the memory's `unroll` needs to find them; only that memory reads it.
    """

    segment: IntArray
    step: IntArray
    layout: Any


class SegmentBatch(NamedTuple):
    """A minibatch: N steps of S segments, packed without padding, and the state each segment begins from."""

    observations: Observations  # leaves [N, ...]
    state: RecurrentState  # [L, S, H] before each segment's first step
    layout: Any  # how the policy's memories find the N steps, from `RecurrentPolicy.plan`
    actions: Tensor  # [N, C] head indices, then the numbers of Boxes
    log_probs: Tensor  # [N, K] per head, of the behaviour policy
    values: Tensor  # [N] of the behaviour policy
    advantages: Tensor  # [N]
    returns: Tensor  # [N]


class ActionSample(NamedTuple):
    """What acting produced, before the environment answered."""

    actions: Tensor  # [B, C] head indices, then the numbers of Boxes in the policy's units
    log_probs: Tensor  # [B, K] per head
    values: Tensor  # [B]
