"""`DualHeadRecurrentPPO`: act, record, learn."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn

from dualhead import snapshot
from dualhead.config import NetworkConfig, NormConfig, PPOConfig
from dualhead.errors import CheckpointError, DataError
from dualhead.learning.advantages import RewardScale, generalized_advantages
from dualhead.learning.rollout import Rollout, of_active
from dualhead.learning.update import ppo_update
from dualhead.networks.encoders import EncoderFactory
from dualhead.networks.memory import MemoryFactory
from dualhead.networks.policy import RecurrentPolicy
from dualhead.norms import NormEnforcer, NormEvents
from dualhead.spaces import ActionSpec, ObservationSpec, as_tensor, check_finite, check_leaf, holds_tensors, torch_dtype
from dualhead.storage import write_tensors
from dualhead.types import ActionSample, Observations, RecurrentState, on_device


class DualHeadRecurrentPPO:
    """PPO with an LSTM or GRU memory over B streams of experience.

        agent = DualHeadRecurrentPPO(envs.single_observation_space, envs.single_action_space, num_streams=8)
        observations, _ = envs.reset()
        while True:
            actions = agent.act(observations)
            observations, rewards, terminated, truncated, infos = envs.step(actions)
            agent.record(rewards, terminated, truncated, final_observations=...)
            if agent.rollout_is_ready:
                metrics = agent.learn(observations)

    Args:
        observation_space, action_space: of one stream.
        num_streams: B, sequences of experience that step together, each with its own recurrent state.
        config: PPO settings.
        network: shape of the policy.
        norms: add NormEnforcer's guilt to recorded rewards.
        encoder: your own module in place of the one that `network` describes, or a function of the observation space
            that makes one; see `Encoder`.
        memory: likewise a recurrent core, or a function of its input size and `network.hidden_size`; see `Memory` and
            `MemoryCell`. Both become part of the policy: they are moved to `device` and `dtype`, and whatever of them
            requires gradients learns.
        seed: of weights, sampling and shuffling; the global random state is neither read nor changed.
        device, dtype: where and as what everything is kept.

    Raises:
        TypeError: an unsupported space, settings of another class, or a part that lacks what it needs.
        ValueError: settings that do not fit each other, or a part that does not do what it should.
    """

    def __init__(
        self,
        observation_space: gym.Space,
        action_space: gym.Space,
        *,
        num_streams: int = 1,
        config: PPOConfig | None = None,
        network: NetworkConfig | None = None,
        norms: NormConfig | None = None,
        encoder: nn.Module | EncoderFactory | None = None,
        memory: nn.Module | MemoryFactory | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if num_streams < 1:
            raise ValueError(f"num_streams: expected at least 1, got {num_streams}")
        settings = {"config": config, "network": network, "norms": norms}
        for (name, given), kind in zip(settings.items(), (PPOConfig, NetworkConfig, NormConfig)):
            if given is not None and not isinstance(given, kind):
                raise TypeError(f"{name}: expected {kind.__name__}(...), got {type(given).__name__} {given!r}")
        self.config, self.network, self.norm_config = config or PPOConfig(), network or NetworkConfig(), norms
        self.num_streams = num_streams
        self.device = torch.device(device)
        self.observation_spec, self.action_spec = ObservationSpec(observation_space), ActionSpec(action_space)
        if self.config.learning_rate_schedule == "linear" and self.config.learning_rate_decay_steps is None:
            raise ValueError("learning_rate_schedule='linear' needs learning_rate_decay_steps")
        self._coefs(0)  # refuses a wrong number of entropy coefficients now, not at the first update

        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed every GPU's, too
            self.policy = RecurrentPolicy(
                self.observation_spec,
                self.action_spec,
                config=self.network,
                normalize_observations=self.config.normalize_observations,
                encoder=encoder,
                memory=memory,
            )
        snapshot.check_savable(self.policy)
        self.policy.to(self.device, dtype)
        # All parameters, whether they learn now or later: Adam skips those without a gradient.
        self.optimizer = torch.optim.Adam(
            self.policy.parameters(), lr=self.config.learning_rate, eps=self.config.adam_eps, fused=True
        )
        self.reward_scale = self.norms = None
        if self.config.normalize_rewards:
            self.reward_scale = RewardScale(num_streams, gamma=self.config.gamma).to(self.device)
        if norms is not None:
            self.norms = NormEnforcer(num_streams, **norms.model_dump()).to(self.device)
        self._sampling = torch.Generator(self.device).manual_seed(seed)
        self._shuffling = torch.Generator("cpu").manual_seed(seed)

        self.num_steps = self.num_updates = 0
        self._num_skipped = 0  # optimiser steps in a row, up to now
        self._current_hidden: RecurrentState | None = None
        self._step_is_pending = False
        self._inactive: Tensor | None = None  # [B] who sits out the pending step; None: nobody
        self._episode_starts = torch.ones(num_streams, dtype=torch.bool, device=self.device)
        # What the policy is shown of the step before; blanked where an episode starts, when it is shown.
        self._previous = self.policy.previous.nothing(num_streams, device=self.device, dtype=dtype)
        # Observations are kept in their own dtype, floats in the policy's.
        dtypes = [torch_dtype(leaf.space.dtype) for leaf in self.observation_spec.leaves]
        observations = {
            leaf.name: (leaf.space.shape or (), dtype if own.is_floating_point else own)
            for leaf, own in zip(self.observation_spec.leaves, dtypes)
        }
        self.rollout_memory = Rollout(
            self.config.rollout_length,
            num_streams,
            burn_in=self.config.burn_in,
            observations=observations | self.policy.previous.shapes(dtype),
            state=self.policy.initial_state(1),
            num_action_columns=self.action_spec.num_columns,
            action_dtype=self.action_spec.dtype(dtype),
            num_heads=len(self.action_spec.names),
            device=self.device,
            dtype=dtype,
        )

    def _get_hidden_state(self) -> RecurrentState:
        if self._current_hidden is None:
            # The specification's reset sets it to None: the next step begins an episode.
            self._current_hidden = self.policy.initial_state(self.num_streams)
            self._episode_starts = torch.ones_like(self._episode_starts)
        return self._current_hidden

    def _update_hidden_state(self, new_hidden: RecurrentState | tuple[Tensor, Tensor] | Tensor) -> None:
        """Takes what `nn.LSTM` or `nn.GRU` returns as its state, or ours."""
        if isinstance(new_hidden, Tensor):
            new_hidden = RecurrentState(new_hidden)
        self._current_hidden = new_hidden if isinstance(new_hidden, RecurrentState) else RecurrentState(*new_hidden)

    def reset_state(self) -> None:
        """Zeroes the recurrent state of all streams: their next step begins an episode.

        Raises:
            RuntimeError: a step is not recorded yet, or recorded steps of a running episode are not learned from yet
                (their value would be bootstrapped across the reset).
        """
        self._expect_no_pending("reset_state()")
        if self.rollout_memory.length and not self._episode_starts.all():
            running = (~self._episode_starts).nonzero()[:, 0].tolist()
            raise RuntimeError(
                f"reset_state() in the middle of an episode of streams {running[:8]}: record their last step with "
                f"truncated=True and its final_observations (which resets them), or learn(..., partial=True) first"
            )
        self._current_hidden = None
        self._episode_starts.fill_(True)
        if self.reward_scale is not None and not self.rollout_memory.length:  # recorded episodes end by themselves
            self.reward_scale.returns.zero_()

    def restart_streams(self, streams: Tensor) -> None:
        """Gives some streams [B] bool to new individuals: sets their recurrent states and norm strengths to zero.

        Raises:
            RuntimeError: the rollout holds steps of the individuals that leave.
        """
        self._expect_all_learned("restart_streams()")
        streams = on_device(self._stream_tensor(streams, "streams", torch.bool), self.device)
        self._update_hidden_state(self._get_hidden_state().reset_where(streams))
        self._episode_starts = self._episode_starts | streams
        if self.reward_scale is not None:
            self.reward_scale.returns.masked_fill_(streams, 0.0)
        if self.norms is not None:
            self.norms.reset(streams)

    def abandon_rollout(self) -> int:
        """Drops the recorded steps, and begins an episode in every stream. Returns the number of dropped steps.

        For a resumed run whose environments could not be restored.
        """
        self._expect_no_pending("abandon_rollout()")
        dropped = self.rollout_memory.length * self.num_streams
        self.num_steps -= dropped
        self.rollout_memory.rewind(0, 0)
        self.reset_state()
        return dropped

    def act(self, observations: Any, active: Any = None) -> Any:
        """Samples actions for all streams and advances the recurrent state. To play without learning: `Player`.

        Args:
            observations: [B, ...] arrays or tensors, nested as the observation space is.
            active: [B] bool, who takes part in this step; None: all streams. A stream that sits out is shown any legal
                observation, its action means nothing, and neither does what `record` gets for it: nothing learns from
                the step. It must have ended its episode before, and begins another when it takes part again.

        Returns:
            Actions [B, ...] in the form of the batched action space, Boxes clipped and scaled: NumPy arrays, or tensors
            where tensors came in.

        Raises:
            RuntimeError: the step before is not recorded, or the rollout is full.
            ValueError: wrong shapes, missing parts, non-finite numbers, a mask without a legal choice, or a stream that
                sits out in the middle of an episode.
        """
        return self._act(*self._prepare_act(observations, active), numpy=not holds_tensors(observations))

    def _prepare_act(self, observations: Any, active: Any = None) -> tuple[Observations, Tensor | None]:
        """Everything that `act` may refuse; the checked observations and who sits out. Nothing has changed yet."""
        self._expect_no_pending("act()")
        if self.rollout_is_ready:
            raise RuntimeError(
                f"act() on a full rollout of {self.config.rollout_length} steps: call learn(next_observations) first"
            )
        return self._tensors(observations), None if active is None else self._who_sits_out(active)

    def _who_sits_out(self, active: Any) -> Tensor | None:
        """[B] bool on the device that `active` came from; None: nobody."""
        inactive = ~self._stream_tensor(active, "active", torch.bool)
        if not inactive.any():
            return None
        running = on_device(inactive, self.device) & ~self._episode_starts
        if self._current_hidden is not None and running.any():
            raise DataError(
                f"active: streams {running.nonzero()[:8, 0].tolist()} sit out in the middle of an episode: expected "
                f"terminated or truncated in the last step that they took part in"
            )
        return inactive

    @torch.no_grad()
    def _act(self, tensors: Observations, inactive: Tensor | None, *, numpy: bool) -> Any:
        state = self._get_hidden_state()
        tensors = tensors | self._previous_inputs()
        output, next_state = self.policy.step(tensors, state)
        actions = output.distribution.sample(self._sampling)
        sample = ActionSample(actions, output.distribution.log_probs(actions), output.values)
        self.rollout_memory.put_step(tensors, state, sample, self._episode_starts)
        self._step_is_pending, self._inactive = True, inactive
        if inactive is not None:
            next_state = next_state.reset_where(on_device(inactive, self.device))
        self._update_hidden_state(next_state)
        return self.action_spec.to_env(actions, numpy=numpy)

    def record(
        self,
        rewards: Any,
        terminated: Any,
        truncated: Any,
        *,
        final_observations: Any = None,
        events: NormEvents | None = None,
    ) -> None:
        """Completes the step that `act` began, and resets the state of streams whose episode ended.

        Args:
            rewards: [B] task rewards.
            terminated, truncated: [B] bool, the episode ended by the task's rules, or was cut off.
            final_observations: [B, ...] what was seen after the step and before any reset; read only where an
                episode was truncated, to bootstrap from. Gymnasium's `infos["final_obs"]` fits as it is.
            events: punishments and collected resources, where norms are enforced.

        Raises:
            RuntimeError: nothing to complete.
            ValueError: wrong shapes, a non-finite reward, a truncation without final observations, missing events.
        """
        self._prepare_record(rewards, terminated, truncated, final_observations, events)()

    @torch.no_grad()
    def _prepare_record(
        self, rewards: Any, terminated: Any, truncated: Any, final_observations: Any, events: NormEvents | None
    ) -> Callable[[], None]:
        """Everything that `record` may refuse; nothing has changed until the function it returns is called."""
        if not self._step_is_pending:
            raise RuntimeError("record() without a step: call act(observations) before it")
        memory = self.rollout_memory
        task_rewards = self._stream_tensor(rewards, "rewards", self.policy.dtype)
        terminated = self._stream_tensor(terminated, "terminated", torch.bool)
        truncated = self._stream_tensor(truncated, "truncated", torch.bool)
        inactive = self._inactive
        if inactive is not None:
            task_rewards, terminated, truncated = (
                told.masked_fill(on_device(inactive, told.device), 0) for told in (task_rewards, terminated, truncated)
            )
            inactive = on_device(inactive, self.device)
        # Evaluated on the device that the data came from: data from the host causes no host-device sync.
        some_ended = bool((terminated | truncated).any())
        cut_off = (truncated & ~terminated).nonzero()[:, 0] if some_ended else None
        if task_rewards.device.type == "cpu":
            check_finite(task_rewards, "reward")
        task_rewards, terminated, truncated = (
            on_device(tensor, self.device) for tensor in (task_rewards, terminated, truncated)
        )
        if self.norms is None and events is not None:
            raise ValueError("events without norms: construct the agent with norms=NormConfig(...)")
        if self.norms is not None and events is None:
            raise ValueError("norms are enforced but no events came: record(..., events=NormEvents(...))")
        previous = self.policy.previous.after(memory.actions[memory.length], task_rewards)
        final_values = None
        if cut_off is not None and len(cut_off):
            final_values = self._final_values(cut_off, final_observations, previous)
            cut_off = on_device(cut_off, self.device)
        if self.norms is not None and events is not None:
            events = self.norms.check(events, self.action_spec.indices(memory.actions[memory.length]))

        @torch.no_grad()
        def complete() -> None:
            guilt = torch.zeros_like(task_rewards)
            active = None if inactive is None else ~inactive
            if self.norms is not None and events is not None:
                guilt = self.norms.advance(events, active).total.to(task_rewards.dtype)
            if final_values is not None:
                memory.final_values[memory.length, cut_off] = final_values
            memory.complete_step(task_rewards, guilt, terminated, truncated, active)
            self._previous = previous
            self._step_is_pending = False
            self.num_steps += self.num_streams
            self._episode_starts = terminated | truncated
            if inactive is not None:
                self._episode_starts |= inactive
            if self._current_hidden is not None and some_ended:
                self._update_hidden_state(self._current_hidden.reset_where(self._episode_starts))

        return complete

    @property
    def rollout_is_ready(self) -> bool:
        """`rollout_length` steps are recorded: an update is due."""
        return self.rollout_memory.is_full

    def learn(
        self, next_observations: Any = None, *, partial: bool = False, learning_rate: float | None = None
    ) -> dict[str, float]:
        """One PPO update on the recorded steps. The recurrent state stays as it is.

        Args:
            next_observations: [B, ...] what the next `act` will see, to bootstrap from; not needed where
                `bootstrap_last` is off or no stream's episode goes on.
            partial: allow an update before `rollout_length` steps are there.
            learning_rate: step size of this update; None: what the settings say.

        Returns:
            Metrics by name, over the steps in which streams took part. `rollout/active` is the share of those, where
            somebody sat out. Where everybody did, nothing is learned.

        Raises:
            RuntimeError: the last step is not recorded, nothing is, or too little is.
            ValueError: missing next_observations, or non-finite numbers in the rollout.
            DivergedError: losses or gradients stayed non-finite.
        """
        self._expect_no_pending("learn()")
        memory = self.rollout_memory
        T = memory.length
        if T == 0:
            raise RuntimeError("learn() with nothing recorded: act() and record() come first")
        if not self.rollout_is_ready and not partial:
            raise RuntimeError(
                f"learn() after {T} of rollout_length={memory.rollout_length} steps: record more, or call "
                f"learn(..., partial=True)"
            )
        if self.device.type != "cpu":
            self._check_finite()
        rewards, terminated, truncated = memory.rewards[:T], memory.terminated[:T], memory.truncated[:T]
        active = memory.active_steps()
        next_values = self._next_values(next_observations)
        if self.reward_scale is not None:
            rewards = self.reward_scale(rewards, terminated | truncated, active)
        advantages = generalized_advantages(
            rewards,
            memory.values[:T],
            next_values,
            terminated,
            truncated,
            gamma=self.config.gamma,
            gae_lambda=self.config.gae_lambda,
        )
        coefs = self._coefs(self.num_updates)
        rate = self._learning_rate() if learning_rate is None else learning_rate
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        metrics: dict[str, float] = {}
        share = 1.0 if active is None else active.to(torch.float64).mean().item()
        if share > 0.0:
            metrics = ppo_update(
                self.policy,
                memory,
                advantages=advantages,
                optimizer=self.optimizer,
                config=self.config,
                entropy_coefs=coefs,
                head_names=self.action_spec.names,
                generator=self._shuffling,
                num_skipped=self._num_skipped,
            )
            self._num_skipped = int(metrics.pop("skipped_in_a_row"))
            metrics["rollout/task_reward"] = of_active(memory.task_rewards[:T], active).mean().item()
            metrics["rollout/value"] = of_active(memory.values[:T], active).mean().item()
            if self.norms is not None:
                metrics["rollout/guilt"] = of_active(memory.guilt[:T], active).mean().item()
            if self.config.normalize_observations:
                normalizer = self.policy.normalizer
                seen = {name: memory.observations[name][memory.max_tail :][:T] for name in normalizer.names}
                normalizer.update({name: of_active(leaf, active) for name, leaf in seen.items()})
        if active is not None:
            metrics["rollout/active"] = share
        metrics["update/learning_rate"] = rate
        metrics |= {f"update/entropy_coef/{name}": coef for name, coef in zip(self.action_spec.names, coefs)}
        if self.norms is not None:
            metrics |= self.norms.metrics()
        memory.clear()
        self.num_updates += 1
        return metrics

    @torch.no_grad()
    def _next_values(self, next_observations: Any) -> Tensor:
        """V(s_{t+1}) [T, B]: the next step's value, the final observation's at truncations, 0 after terminations."""
        memory = self.rollout_memory
        T = memory.length
        terminated, truncated = memory.terminated[:T], memory.truncated[:T]
        next_values = torch.zeros_like(memory.values[:T])
        next_values[:-1] = memory.values[1:T]
        if self.config.bootstrap_last and (memory.active[T - 1] & ~(terminated[-1] | truncated[-1])).any():
            if next_observations is None:
                raise ValueError(
                    "learn() needs next_observations: the last step ended no episode, and its value is bootstrapped "
                    "from them (or set bootstrap_last=False)"
                )
            state = self._get_hidden_state()  # begins episodes where it was set to None, so before the previous inputs
            tensors = self._tensors(next_observations) | self._previous_inputs()
            next_values[-1] = self.policy.values(tensors, state)
        return torch.where(truncated & ~terminated, memory.final_values[:T], next_values)

    def _previous_inputs(self) -> Observations:
        """What the policy is shown of the step before, [B, ...]: nothing where an episode starts."""
        return self.policy.previous.reset_where(self._previous, self._episode_starts)

    def _final_values(self, streams: Tensor, final_observations: Any, previous: Observations) -> Tensor:
        """V [n] of what the n truncated streams saw last, with the state that followed their last step.

        `previous` [B, ...] is that last step, as the policy's input.
        """
        if final_observations is None:
            raise DataError(
                f"streams {streams.tolist()[:8]} were truncated: expected final_observations, what they saw before "
                f"their reset, got None; pass record(..., final_observations=...), or StreamStep(final_observations=)"
            )
        assert self._current_hidden is not None
        if isinstance(final_observations, np.ndarray) and final_observations.dtype == object:
            final_observations = self.observation_spec.stack(final_observations, streams)
        try:
            tensors = self._tensors(final_observations, streams)
        except DataError as error:
            raise DataError(f"final {error}") from None
        streams = on_device(streams, self.device)
        tensors |= {name: leaf[streams] for name, leaf in previous.items()}
        return self.policy.values(tensors, self._current_hidden.select(streams))

    def _coefs(self, num_updates: int) -> tuple[float, ...]:
        """Entropy weight per head after a number of updates: linear from start to end, then constant."""
        config, heads = self.config, self.action_spec.names

        def per_head(name: str) -> tuple[float, ...]:
            coef = getattr(config, name)
            coef = coef if isinstance(coef, tuple) else (coef,) * len(heads)
            if len(coef) != len(heads):
                raise ValueError(f"{name}: expected one number or {len(heads)}, one per head {heads}, got {coef}")
            return coef

        start = per_head("entropy_coef")
        if config.entropy_coef_end is None:
            return start
        done = min(1.0, num_updates / config.entropy_decay_steps)
        return tuple(a + (b - a) * done for a, b in zip(start, per_head("entropy_coef_end")))

    def _learning_rate(self) -> float:
        """Step size of this update, by the environment steps taken before its rollout."""
        decay_steps = self.config.learning_rate_decay_steps
        if self.config.learning_rate_schedule == "constant" or decay_steps is None:
            return self.config.learning_rate
        before = self.num_steps - self.rollout_memory.length * self.num_streams
        return self.config.learning_rate * max(0.0, 1 - before / decay_steps)

    def _tensors(self, observations: Any, streams: Tensor | None = None) -> Observations:
        """Checked observations of all streams, or of the chosen ones."""
        tensors = self.observation_spec.to_tensors(
            observations, self.num_streams, streams=streams, dtype=self.policy.dtype
        )
        # Chosen streams are valued and not acted in, so their masks do not matter.
        if streams is None and all(tensor.device.type == "cpu" for tensor in tensors.values()):
            self.policy.heads.check_mask(tensors)
        return {name: on_device(tensor, self.device) for name, tensor in tensors.items()}

    def _stream_tensor(self, values: Any, name: str, dtype: torch.dtype) -> Tensor:
        """One number or flag per stream, checked, on the device that it came from."""
        tensor = as_tensor(values, name)
        if tensor.dim() == 0 and self.num_streams == 1:
            tensor = tensor[None]
        if tuple(tensor.shape) != (self.num_streams,):
            raise DataError(f"{name}: expected shape ({self.num_streams},), one per stream, got {tuple(tensor.shape)}")
        if dtype == torch.bool and tensor.dtype != torch.bool and not ((tensor == 0) | (tensor == 1)).all():
            raise DataError(f"{name}: expected booleans, got {tensor.dtype} with other values than 0 and 1")
        return tensor.to(dtype)

    def _check_finite(self) -> None:
        """Refuses bad numbers and masks that came from an accelerator: checking those at every step would sync."""
        memory, leaves = self.rollout_memory, self.observation_spec.leaves

        def check(steps: slice) -> None:
            seen = {
                leaf.name: memory.observations[leaf.name][memory.max_tail :][steps].flatten(0, 1) for leaf in leaves
            }
            for leaf in leaves:
                check_leaf(leaf, seen[leaf.name])
            self.policy.heads.check_mask(seen)
            check_finite(memory.rewards[steps].flatten(), "reward")

        try:
            check(slice(memory.length))
        except DataError:
            for t in range(memory.length):
                try:
                    check(slice(t, t + 1))
                except DataError as error:
                    raise DataError(f"step {t + 1} of this rollout of {memory.length}: {error}") from None

    def _expect_no_pending(self, call: str) -> None:
        if self._step_is_pending:
            raise RuntimeError(f"{call} before the last step is complete: call record(rewards, terminated, truncated)")

    def _expect_all_learned(self, call: str) -> None:
        self._expect_no_pending(call)
        if self.rollout_memory.length:
            raise RuntimeError(f"{call} with {self.rollout_memory.length} steps recorded: call learn(...) before it")

    def forget_actions(self) -> bool:
        """Takes back an `act` that no `record` has followed, and says whether there was one.

        For an environment that failed in its step. Random numbers that were drawn stay drawn.
        """
        was_pending, self._step_is_pending = self._step_is_pending, False
        if was_pending:
            memory = self.rollout_memory
            before = {name: states[:, memory.max_tail + memory.length] for name, states in memory.states.items()}
            self._update_hidden_state(RecurrentState(**before).map(Tensor.clone))
        return was_pending

    def state(self, *, copy: bool = True) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything the agent is: tensors by name, and JSON metadata. `restore` takes them back.

        Args:
            copy: without it tensors are the agent's own, which its next step changes.

        Raises:
            RuntimeError: a step is not recorded yet.
        """
        self._expect_no_pending("save()")
        return snapshot.take(self, copy=copy)

    def check(self, tensors: dict[str, Tensor], metadata: dict[str, Any], *, source: str = "checkpoint") -> None:
        """Raises what `restore` would raise; the agent stays as it is."""
        snapshot.check(self, tensors, metadata, source=source)

    def restore(self, tensors: dict[str, Tensor], metadata: dict[str, Any], *, source: str = "checkpoint") -> None:
        """Takes back what `state` gave; nothing changes where it does not fit.

        On another kind of device than it was saved on, actions are sampled from this agent's own generator.

        Raises:
            CheckpointError: it was made by another architecture, for other spaces or another number of streams, or
                something is missing in it or of the wrong kind.
        """
        snapshot.restore(self, tensors, metadata, source=source)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one checkpoint file, whole or not at all.

        Raises:
            RuntimeError: a step is not recorded yet.
            OSError: it cannot be written.
        """
        write_tensors(path, *self.state(copy=False))

    def load(self, path: str | os.PathLike[str]) -> None:
        """Continues exactly where the agent that saved this file was; a run's checkpoint serves as well.

        Raises:
            CheckpointError: unreadable, truncated, or of another architecture; the agent is unchanged.
        """
        self.restore(*snapshot.read(path), source=str(path))

    def warm_start(self, path: str | os.PathLike[str]) -> None:
        """Takes over what a saved agent has learned: weights, the optimiser's moments, and the scales of observations
        and rewards.

        Numbers of streams, rollout lengths and other settings may differ. Counters, random numbers, recurrent states,
        norm strengths and the rollout stay as they are here.

        Raises:
            CheckpointError: unreadable, truncated, or of another network or other spaces; the agent is unchanged.
            RuntimeError: steps are recorded and not learned from yet: other weights chose their actions.
        """
        self._expect_all_learned("warm_start()")
        snapshot.warm_start(self, *snapshot.read(path), source=str(path))

    @classmethod
    def from_file(
        cls,
        path: str | os.PathLike[str],
        *,
        encoder: nn.Module | EncoderFactory | None = None,
        memory: nn.Module | MemoryFactory | None = None,
        device: torch.device | str = "cpu",
    ) -> DualHeadRecurrentPPO:
        """The agent that a file was saved from: spaces, settings and everything else are in the file.

        Args:
            path: of `save`, or a checkpoint of a run with one agent.
            encoder, memory: your own parts that the agent was made with. A file names them; it holds no code.
            device: where it lives now.

        Raises:
            CheckpointError: unreadable, truncated, or a part is missing.
        """
        tensors, metadata = snapshot.read(path)
        arguments = snapshot.arguments(metadata, source=str(path))
        parts = snapshot.foreign_arguments(metadata, encoder=encoder, memory=memory, source=str(path))
        snapshot.expect_weights(arguments, tensors, parts, source=str(path))
        try:
            made = cls(**arguments, **parts, device=device)
        except (TypeError, ValueError, RuntimeError, MemoryError) as error:
            raise CheckpointError(f"{path} describes no possible agent: {error}") from error
        made.restore(tensors, metadata, source=str(path))
        return made

    def __repr__(self) -> str:
        parts = {"memory": self.network.memory} | self.policy.foreign_parts
        return (
            f"{type(self).__name__}({self.observation_spec.space}, {self.action_spec.space}, "
            f"num_streams={self.num_streams}, {', '.join(f'{name}={part!r}' for name, part in parts.items())}, "
            f"num_steps={self.num_steps})"
        )
