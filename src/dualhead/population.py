"""Many agents in one world: one learner for each, and newcomers who replace agents.

Letters: W worlds, A agents of each, R resources, B = W · A streams (stream = world · A + agent).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dualhead.agent import DualHeadRecurrentPPO
from dualhead.config import NonNegativeFloat, NonNegativeInt, TurnoverConfig
from dualhead.norms import NormEvents
from dualhead.spaces import as_tensor, holds_tensors
from dualhead.storage import CheckpointError, Saved, with_prefix, without_prefix
from dualhead.types import joined_rows, on_device, own_rows
from dualhead.worlds.replay import GeneratorState


def individual_seed(seed: int, individual: int) -> int:
    """The seed of one of many individuals."""
    return int(np.random.SeedSequence([seed, individual]).generate_state(1)[0])


class IndependentLearners:
    """A learner for each agent of a world: policy, optimiser, recurrent states and norm strengths of its own.

    Learner a has the W streams of agent a in all worlds. All together are used like one agent of B streams, with the
    methods of `DualHeadRecurrentPPO`. A call that one of them refuses changes none of them.

    Agents may have different spaces: observations come as `ByAgent` then, and actions are returned as `ByAgent`.

    Args:
        make: `make(agent, seed)` gives a fresh learner of the W streams of an agent.
        num_agents: A.
        seed: individuals are seeded by it and by their number; see `individual_seed`.
    """

    def __init__(self, make: Callable[[int, int], DualHeadRecurrentPPO], *, num_agents: int, seed: int) -> None:
        self._make, self._seed = make, seed
        self.learners = [make(agent, individual_seed(seed, agent)) for agent in range(num_agents)]
        self.num_steps = 0

    @property
    def rollout_is_ready(self) -> bool:
        return self.learners[0].rollout_is_ready

    def act(self, observations: Any, active: Any = None) -> Any:
        """Actions of all agents; see `DualHeadRecurrentPPO.act`."""
        own = [learner._prepare_act(*parts) for learner, parts in self._each((observations, active))]
        numpy = not holds_tensors(observations)
        actions = [learner._act(*parts, numpy=numpy) for learner, parts in zip(self.learners, own)]
        return joined_rows(actions, like=observations)

    def record(
        self,
        rewards: Any,
        terminated: Any,
        truncated: Any,
        *,
        final_observations: Any = None,
        events: NormEvents | None = None,
    ) -> None:
        """Completes the step of all agents; see `DualHeadRecurrentPPO.record`."""
        parts = (rewards, terminated, truncated, final_observations, events)
        steps = [learner._prepare_record(*own) for learner, own in self._each(parts)]
        for complete in steps:
            complete()
        self.num_steps += sum(learner.num_streams for learner in self.learners)

    def learn(
        self, next_observations: Any = None, *, partial: bool = False, learning_rate: float | None = None
    ) -> dict[str, float]:
        """An update of every learner; metrics are means over learners."""
        own = self._each(next_observations)
        if self.learners[0].rollout_memory.length:
            for learner, seen in own:
                learner._next_values(seen)  # raises what `learn` would raise for these observations
        gathered = [learner.learn(seen, partial=partial, learning_rate=learning_rate) for learner, seen in own]
        if any("rollout/active" in metrics for metrics in gathered):
            for metrics in gathered:
                metrics.setdefault("rollout/active", 1.0)
        # An update may lack a metric (no drift where no segment begins inside a run).
        names = dict.fromkeys(name for metrics in gathered for name in metrics)
        return {name: float(np.mean([metrics[name] for metrics in gathered if name in metrics])) for name in names}

    def abandon_rollout(self) -> int:
        """Drops the recorded steps that were not learned from; see `DualHeadRecurrentPPO.abandon_rollout`."""
        forgotten = sum(learner.abandon_rollout() for learner in self.learners)
        self.num_steps -= forgotten
        return forgotten

    def replace(self, agent: int, individual: int) -> None:
        """A newcomer takes an agent's place: fresh weights and optimiser, zero state and strengths.

        Raises:
            RuntimeError: recorded steps are not learned from yet (everybody learns at the same time).
        """
        length = self.learners[agent].rollout_memory.length
        if length:
            raise RuntimeError(f"replace() with {length} steps recorded: call learn(...) before it")
        self.learners[agent] = self._make(agent, individual_seed(self._seed, individual))

    def forget_actions(self) -> bool:
        """Takes back an `act` that was not recorded; see `DualHeadRecurrentPPO.forget_actions`."""
        return sum(learner.forget_actions() for learner in self.learners) > 0  # all of them

    def state(self, *, copy: bool = True) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that the learners are; see `DualHeadRecurrentPPO.state`."""
        tensors: dict[str, Tensor] = {}
        parts = []
        for agent, learner in enumerate(self.learners):
            own, metadata = learner.state(copy=copy)
            tensors |= with_prefix(f"agent_{agent}", own)
            parts.append(metadata)
        return tensors, {"num_steps": self.num_steps, "learners": parts}

    def restore(self, tensors: dict[str, Tensor], metadata: dict[str, Any], *, source: str = "checkpoint") -> None:
        """Takes back what `state` gave.

        Raises:
            CheckpointError: it is of other learners.
        """
        parts, num_steps = metadata.get("learners"), metadata.get("num_steps")
        if not isinstance(parts, list) or [type(part) for part in parts] != [dict] * len(self.learners):
            raise CheckpointError(f"{source} has no valid learners: expected {len(self.learners)} independent learners")
        if type(num_steps) is not int or num_steps < 0:
            raise CheckpointError(f"{source} has no valid num_steps (found {num_steps!r})")
        own = [without_prefix(f"agent_{agent}", tensors) for agent in range(len(parts))]
        for method in (DualHeadRecurrentPPO.check, DualHeadRecurrentPPO.restore):
            for agent, learner in enumerate(self.learners):
                method(learner, own[agent], parts[agent], source=f"{source}, agent {agent}")
        self.num_steps = num_steps

    def _each(self, tree: Any) -> list[tuple[DualHeadRecurrentPPO, Any]]:
        """Every learner with its own rows of batched arrays, nested as they come."""
        num_agents = len(self.learners)
        return [(learner, own_rows(tree, agent, num_agents)) for agent, learner in enumerate(self.learners)]


Learner = DualHeadRecurrentPPO | IndependentLearners
"""What the training loop trains."""


class TurnoverState(Saved):
    """What a checkpoint says of a turnover; the fields are those of `Turnover`."""

    individuals: list[NonNegativeInt]
    arrivals: list[NonNegativeInt]
    num_times: NonNegativeInt
    taken: list[list[NonNegativeFloat]]
    num_turns: NonNegativeInt
    random: GeneratorState


class Turnover:
    """Which individual has which place, and when newcomers replace individuals.

    Individuals are numbered in order of arrival; 0 .. A − 1 are the founders, everybody later is a newcomer. A place
    is the same agent in all worlds: they are replaced together. With one shared policy a newcomer has no weights of its
    own: only its recurrent state and norm strengths begin at zero.

    Args:
        config: the schedule.
        resources: names of the R kinds.
        num_agents, num_worlds: A, W.
        seed: of random selection.
    """

    def __init__(
        self, config: TurnoverConfig, *, resources: Sequence[str], num_agents: int, num_worlds: int, seed: int
    ) -> None:
        self.config, self.resources = config, tuple(resources)
        self.num_agents, self.num_worlds = num_agents, num_worlds
        self.individuals = np.arange(num_agents)
        self.arrivals = np.zeros(num_agents, dtype=np.int64)
        self.num_times = 0
        self._random = np.random.default_rng([seed, 1])
        self._taken = torch.zeros(num_agents, len(self.resources), dtype=torch.float64)
        self._num_turns = 0

    def count(self, events: NormEvents) -> None:
        """Counts what the agents collected in a turn."""
        collected = as_tensor(events.collected, "events.collected")
        by_agent = collected.view(self.num_worlds, self.num_agents, -1).sum(0)
        # Summed on the device of the events: no host-device sync.
        self._taken = on_device(self._taken, by_agent.device) + by_agent
        self._num_turns += 1

    def is_due(self, turn: int) -> bool:
        """Whether a replacement should have happened by now."""
        config = self.config
        if config.first_turn is None:
            return False
        limit = config.num_times or (1 if config.every_turns is None else math.inf)
        return self.num_times < limit and turn >= config.first_turn + self.num_times * (config.every_turns or 0)

    def replace(self, learner: Learner, turn: int) -> list[int]:
        """Puts newcomers where the schedule says, between two rollouts; their places."""
        chosen = self._choose()
        for agent in chosen:
            self.individuals[agent] = self.individuals.max() + 1
            self.arrivals[agent] = turn
            if isinstance(learner, IndependentLearners):
                learner.replace(agent, int(self.individuals[agent]))
        if isinstance(learner, DualHeadRecurrentPPO):
            places = np.isin(np.arange(self.num_worlds * self.num_agents) % self.num_agents, chosen)
            learner.restart_streams(torch.from_numpy(places))
        self.num_times += 1
        return chosen

    def _choose(self) -> list[int]:
        number = self.config.num_agents
        if self.config.selection == "random":
            return sorted(self._random.choice(self.num_agents, number, replace=False).tolist())
        if self.config.selection == "first_n":
            return list(range(number))
        # Of equally long tenures the lower number goes first.
        return sorted(np.argsort(self.arrivals, kind="stable")[:number].tolist())

    def metrics(self, strengths: Tensor | None) -> dict[str, float]:
        """Numbers for the log; reading them starts the next interval.

        Args:
            strengths: [A, R] of the agents' norms, or None.

        Returns:
            `lineage/agent_<n>`, the individual in each place; `<group>/taken/<resource>`, times per agent and turn
            since the last call; `<group>/strength/<resource>`, now. Groups are `newcomers` and `incumbents` (founders);
            a group without members has no numbers.
        """
        metrics = {f"lineage/agent_{agent}": float(who) for agent, who in enumerate(self.individuals)}
        by_agent = {"taken": self._taken.cpu() / max(self._num_turns * self.num_worlds, 1)}
        if strengths is not None:
            by_agent["strength"] = strengths.cpu()
        newcomers = torch.from_numpy(self.individuals >= self.num_agents)
        for group, members in (("newcomers", newcomers), ("incumbents", ~newcomers)):
            for what, numbers in by_agent.items() if members.any() else ():
                means = numbers[members].mean(0).tolist()
                metrics |= {f"{group}/{what}/{name}": mean for name, mean in zip(self.resources, means)}
        self._taken.zero_()
        self._num_turns = 0
        return metrics

    def state(self) -> dict[str, Any]:
        """JSON, which `TurnoverState` reads for `restore`."""
        random: Any = self._random.bit_generator.state
        return TurnoverState(
            individuals=self.individuals.tolist(),
            arrivals=self.arrivals.tolist(),
            num_times=self.num_times,
            taken=self._taken.tolist(),
            num_turns=self._num_turns,
            random=GeneratorState(**random),
        ).model_dump()

    def restore(self, state: TurnoverState) -> None:
        """Takes back what `state` gave; ValueError where it is of other agents."""
        individuals, arrivals = (np.array(of, dtype=np.int64) for of in (state.individuals, state.arrivals))
        taken = torch.tensor(state.taken, dtype=torch.float64)
        if not individuals.shape == arrivals.shape == (self.num_agents,) or taken.shape != self._taken.shape:
            raise ValueError(f"turnover: expected individuals, arrivals and taken of {self.num_agents} agents")
        self._random.bit_generator.state = state.random.model_dump()
        self.num_times, self._num_turns = state.num_times, state.num_turns
        self.individuals, self.arrivals, self._taken = individuals, arrivals, taken


def strengths_by_agent(learner: Learner, num_agents: int) -> Tensor | None:
    """Norm strengths [A, R], means over worlds; None where no norms are enforced."""
    learners = learner.learners if isinstance(learner, IndependentLearners) else [learner]
    own = [one.norms.strengths for one in learners if one.norms is not None]
    if not own:
        return None
    return torch.cat([strengths.unflatten(0, (-1, num_agents // len(own))).mean(0) for strengths in own])
