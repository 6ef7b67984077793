"""Steps of all streams and the recurrent states stored beside them, in buffers allocated once."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from dualhead.types import ActionSample, IntArray, Observations, RecurrentState, on_device


class Rollout:
    """The rollout memory: time-major, T steps of B streams, after a tail of the steps that came before.

    The tail (the last `burn_in` steps of the previous rollout) lets a rollout's first segments burn in. Arrays with a
    tail have P + T rows, step t in row P + t; the others T rows.

    Attributes:
        observations: leaves [P + T, B, ...] in their own dtype.
        states: by part of the recurrent state [L, P + T, B, ...], the state *before* each step. `h_states` and
            `c_states` (None for a GRU) are the specification's names for the parts `h` and `c`.
        episode_starts: [P + T, B] bool; terminated, truncated: [T, B] bool.
        active: [T, B] bool, the stream took part in the step; True from row `length` on. Every step that a stream sat
            out is an episode start, and its other entries mean nothing.
        actions [T, B, C], log_probs [T, B, K], values, rewards, task_rewards, guilt, final_values [T, B]:
            rewards are task reward plus guilt; final_values hold V(final observation) at truncations.
        length, max_tail, tail_length: steps recorded so far, P, and how many of the tail's rows hold steps.
    """

    def __init__(
        self,
        rollout_length: int,
        num_streams: int,
        *,
        burn_in: int,
        observations: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
        state: RecurrentState,
        num_action_columns: int,
        action_dtype: torch.dtype,
        num_heads: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.rollout_length, self.num_streams, self.max_tail = rollout_length, num_streams, burn_in
        self.device = device
        self.length = self.tail_length = 0

        def zeros(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        rows, steps = burn_in + rollout_length, (rollout_length, num_streams)
        self.observations: Observations = {
            name: zeros(rows, num_streams, *shape, dtype=leaf_dtype)
            for name, (shape, leaf_dtype) in observations.items()
        }
        self.states = {
            name: zeros(part.shape[0], rows, num_streams, *part.shape[2:], dtype=part.dtype)
            for name, part in state.parts.items()
        }
        self.episode_starts = zeros(rows, num_streams, dtype=torch.bool)
        self.actions = zeros(*steps, num_action_columns, dtype=action_dtype)
        self.log_probs = zeros(*steps, num_heads)
        self.values = zeros(*steps)
        self.rewards, self.task_rewards, self.guilt, self.final_values = (zeros(*steps) for _ in range(4))
        self.terminated, self.truncated = (zeros(*steps, dtype=torch.bool) for _ in range(2))
        self.active = ~zeros(*steps, dtype=torch.bool)
        self._somebody_sat_out = False  # known on the host, so that no update waits to hear of it

    @property
    def h_states(self) -> Tensor:
        return self.states["h"]

    @property
    def c_states(self) -> Tensor | None:
        return self.states.get("c")

    @property
    def is_full(self) -> bool:
        return self.length == self.rollout_length

    def tensors(self, length: int, tail_length: int) -> dict[str, Tensor]:
        """Views, by name, of the rows that so many steps after so many of the tail fill: what checkpoints hold."""
        rows = slice(self.max_tail - tail_length, self.max_tail + length)
        named = {f"observations/{name}": buffer[rows] for name, buffer in self.observations.items()}
        named |= {f"states/{name}": buffer[:, rows] for name, buffer in self.states.items()}
        of_steps = {name: value[:length] for name, value in vars(self).items() if isinstance(value, Tensor)}
        return named | of_steps | {"episode_starts": self.episode_starts[rows]}

    def put_step(
        self, observations: Observations, state: RecurrentState, sample: ActionSample, episode_starts: Tensor
    ) -> None:
        """Writes what is known before the environment answers."""
        t = self.length
        row = self.max_tail + t
        for name, buffer in self.observations.items():
            buffer[row] = observations[name]
        for name, buffer in self.states.items():
            buffer[:, row] = state.parts[name]
        self.episode_starts[row] = episode_starts
        self.actions[t] = sample.actions
        self.log_probs[t] = sample.log_probs
        self.values[t] = sample.values
        self.final_values[t] = 0.0  # written only where an episode is truncated

    def complete_step(
        self,
        task_rewards: Tensor,
        guilt: Tensor,
        terminated: Tensor,
        truncated: Tensor,
        active: Tensor | None = None,
    ) -> None:
        """Writes the environment's answer, [B] each, and counts the step; `active` None: all streams took part."""
        t = self.length
        self.task_rewards[t] = task_rewards
        self.guilt[t] = guilt
        self.rewards[t] = task_rewards + guilt
        self.terminated[t] = terminated
        self.truncated[t] = truncated
        if active is not None:
            self.active[t] = active
            self._somebody_sat_out = True
        self.length += 1

    def active_steps(self) -> Tensor | None:
        """[T, B] bool, in which of the recorded steps streams took part; None: in all of them."""
        return self.active[: self.length] if self._somebody_sat_out else None

    def state_at(self, rows: Tensor) -> RecurrentState:
        """States [L, S, H] before the steps at flat rows [S] (row * B + stream, the tail counted)."""
        return self._all_states().select(rows)

    def write_states(self, rows: Tensor, state: RecurrentState) -> None:
        """Replaces the states before the steps at flat rows [S]."""
        self._all_states().write(rows, state)

    def _all_states(self) -> RecurrentState:
        """Views of all stored states, rows times streams on the stream axis."""
        return RecurrentState(**{name: buffer.flatten(1, 2) for name, buffer in self.states.items()})

    def observations_at(self, rows: Tensor) -> Observations:
        """Leaves [N, ...] at flat rows [N]."""
        return {name: buffer.flatten(0, 1).index_select(0, rows) for name, buffer in self.observations.items()}

    def flat_rows(self, stream: IntArray, step: IntArray) -> Tensor:
        """Flat rows of steps (negative: in the tail) of streams."""
        return on_device(torch.from_numpy((step + self.max_tail) * self.num_streams + stream), self.device)

    def tail_lengths(self) -> IntArray:
        """[B] kept steps of the episode that was running when this rollout began."""
        starts = self.episode_starts[self.max_tail - self.tail_length : self.max_tail].flip(0).cpu().numpy()
        since_start = np.vstack([starts, np.ones((1, self.num_streams), bool)]).argmax(axis=0) + 1
        return np.minimum(since_start, self.tail_length)

    def clear(self) -> None:
        """Starts the next rollout; the last steps become its tail."""
        kept = min(self.max_tail, self.tail_length + self.length)
        end = self.max_tail + self.length
        time_major = (states.transpose(0, 1) for states in self.states.values())
        for buffer in (*self.observations.values(), self.episode_starts, *time_major):
            buffer[self.max_tail - kept : self.max_tail] = buffer[end - kept : end].clone()
        self.rewind(0, kept)

    def rewind(self, length: int, tail_length: int) -> None:
        """Goes on after so many recorded steps, with so many in the tail."""
        self.length, self.tail_length = length, tail_length
        self.active[length:] = True
        self._somebody_sat_out = length > 0 and not self.active.all()


def of_active(values: Tensor, active: Tensor | None) -> Tensor:
    """`values` [T, B, ...] of the steps in which streams took part [T, B], all of them where None: [N, ...]."""
    return values.flatten(0, 1) if active is None else values[active]
