"""Many agents in one world: one learner for each, and newcomers who replace agents.

Letters: W worlds, A agents of each, R resources, B = W · A streams (stream = world · A + agent).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dualhead.agent import DualHeadRecurrentPPO
from dualhead.config import TurnoverConfig
from dualhead.networks.encoders import PreviousStep
from dualhead.networks.heads import FactoredCategorical, Heads
from dualhead.networks.policy import PolicyOutput, RecurrentPolicy
from dualhead.norms import NormEvents
from dualhead.spaces import holds_tensors
from dualhead.storage import CheckpointError, with_prefix, without_prefix
from dualhead.types import Observations, RecurrentState, on_device


class Learner(Protocol):
    """What the training loop asks of an agent, or of many."""

    num_steps: int

    @property
    def policy(self) -> Any: ...

    @property
    def rollout_is_ready(self) -> bool: ...

    def act(self, observations: Any) -> Any: ...

    def record(
        self,
        rewards: Any,
        terminated: Any,
        truncated: Any,
        *,
        final_observations: Any = None,
        events: NormEvents | None = None,
    ) -> None: ...

    def learn(
        self, next_observations: Any = None, *, partial: bool = False, learning_rate: float | None = None
    ) -> dict[str, float]: ...

    def abandon_rollout(self) -> int: ...

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]: ...

    def restore(self, tensors: dict[str, Tensor], metadata: dict[str, Any], *, source: str = "checkpoint") -> None: ...


class IndependentLearners:
    """A learner for each agent of a world: policy, optimiser, recurrent states and norm strengths of its own.

    Learner a has the W streams of agent a in all worlds. It is used like one agent of B streams.

    Args:
        make: gives a fresh learner of W streams for a seed.
        num_agents: A.
        seed: individuals are seeded by it and by their number.
    """

    def __init__(self, make: Callable[[int], DualHeadRecurrentPPO], *, num_agents: int, seed: int) -> None:
        self._make, self._seed = make, seed
        self.learners = [make(self._seed_of(individual)) for individual in range(num_agents)]
        self.num_steps = 0

    def _seed_of(self, individual: int) -> int:
        return int(np.random.SeedSequence([self._seed, individual]).generate_state(1)[0])

    @property
    def policy(self) -> IndependentPolicies:
        """The learners' own policies, not copies, to be played."""
        return IndependentPolicies([learner.policy for learner in self.learners])

    @property
    def rollout_is_ready(self) -> bool:
        return self.learners[0].rollout_is_ready

    def act(self, observations: Any) -> Any:
        """Actions of all learners, which advance all or none; see `DualHeadRecurrentPPO.act`."""
        # What one of them refuses must leave all of them as they were.
        own = [learner._prepare_act(self._of(observations, agent)) for agent, learner in enumerate(self.learners)]
        numpy = not holds_tensors(observations)
        return _interleaved([learner._act(tensors, numpy=numpy) for learner, tensors in zip(self.learners, own)])

    def record(
        self,
        rewards: Any,
        terminated: Any,
        truncated: Any,
        *,
        final_observations: Any = None,
        events: NormEvents | None = None,
    ) -> None:
        """Completes the step of all learners, or of none; see `DualHeadRecurrentPPO.record`."""
        steps = [
            learner._prepare_record(
                self._of(rewards, agent),
                self._of(terminated, agent),
                self._of(truncated, agent),
                self._of(final_observations, agent),
                None if events is None else NormEvents(*(self._of(part, agent) for part in events)),
            )
            for agent, learner in enumerate(self.learners)
        ]
        for complete in steps:
            complete()
        self.num_steps += sum(learner.num_streams for learner in self.learners)

    def learn(
        self, next_observations: Any = None, *, partial: bool = False, learning_rate: float | None = None
    ) -> dict[str, float]:
        """An update of every learner; metrics are means over learners."""
        gathered = [
            learner.learn(self._of(next_observations, agent), partial=partial, learning_rate=learning_rate)
            for agent, learner in enumerate(self.learners)
        ]
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
        self.learners[agent] = self._make(self._seed_of(individual))

    def strengths(self) -> Tensor | None:
        """Norm strengths [A, R], means over worlds."""
        norms = [learner.norms for learner in self.learners]
        return torch.stack([norm.strengths.mean(0) for norm in norms if norm is not None]) if norms[0] else None

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that the learners are; see `DualHeadRecurrentPPO.state`."""
        tensors: dict[str, Tensor] = {}
        parts = []
        for agent, learner in enumerate(self.learners):
            own, metadata = learner.state()
            tensors |= with_prefix(f"agent_{agent}", own)
            parts.append(metadata)
        return tensors, {"num_steps": self.num_steps, "learners": parts}

    def restore(self, tensors: dict[str, Tensor], metadata: dict[str, Any], *, source: str = "checkpoint") -> None:
        """Takes back what `state` gave; nothing changes where it does not fit.

        Raises:
            CheckpointError: it is of other learners.
        """
        parts, num_steps = metadata.get("learners"), metadata.get("num_steps")
        if not isinstance(parts, list) or len(parts) != len(self.learners):
            raise CheckpointError(f"{source}: expected {len(self.learners)} independent learners, found another number")
        if type(num_steps) is not int or num_steps < 0:
            raise CheckpointError(f"{source} lacks its counters: num_steps cannot be {num_steps!r}")
        saved = [
            (learner, without_prefix(f"agent_{agent}", tensors), part, f"{source}, agent {agent}")
            for agent, (learner, part) in enumerate(zip(self.learners, parts))
        ]
        for learner, own, part, whose in saved:
            learner.check(own, part, source=whose)
        for learner, own, part, whose in saved:
            learner.restore(own, part, source=whose)
        self.num_steps = num_steps

    def _of(self, tree: Any, agent: int) -> Any:
        """One agent's rows of batched arrays, nested as they come."""
        if isinstance(tree, dict):
            return {name: self._of(part, agent) for name, part in tree.items()}
        if isinstance(tree, tuple):
            return tuple(self._of(part, agent) for part in tree)
        return None if tree is None else tree[agent :: len(self.learners)]


def _interleaved(parts: list[Any]) -> Any:
    """Actions [W, ...] of A agents, nested as the action space is, as those of the W · A streams."""
    if isinstance(parts[0], dict):
        return {name: _interleaved([part[name] for part in parts]) for name in parts[0]}
    stack: Any = torch.stack if isinstance(parts[0], Tensor) else np.stack
    return stack(parts, 1).reshape(-1, *parts[0].shape[1:])


class IndependentPolicies(torch.nn.Module):
    """The policies of A agents as one policy of B streams, to be played: stream b is played by policy b mod A.

    Args:
        policies: of one architecture, with discrete actions.
    """

    def __init__(self, policies: Sequence[RecurrentPolicy]) -> None:
        super().__init__()
        self.policies: Any = torch.nn.ModuleList(policies)

    @property
    def heads(self) -> Heads:
        return self.policies[0].heads

    @property
    def previous(self) -> PreviousStep:
        return self.policies[0].previous

    @property
    def device(self) -> torch.device:
        return self.policies[0].device

    @property
    def dtype(self) -> torch.dtype:
        return self.policies[0].dtype

    def initial_state(self, batch: int) -> RecurrentState:
        """Zero state [L, batch, H]."""
        return self.policies[0].initial_state(batch)

    def step(self, observations: Observations, state: RecurrentState) -> tuple[PolicyOutput, RecurrentState]:
        """One time step; see `RecurrentPolicy.step`."""
        number, batch = len(self.policies), state.num_streams
        logits, values, after = [], [], []
        for agent, policy in enumerate(self.policies):
            streams = torch.arange(agent, batch, number, device=self.device)
            output, next_state = policy.step(
                {name: leaf[agent::number] for name, leaf in observations.items()}, state.select(streams)
            )
            logits.append(torch.cat(output.distribution.logits, dim=-1))
            values.append(output.values)
            after.append(next_state)
        nvec = tuple(head.shape[-1] for head in output.distribution.logits)
        together = {
            name: torch.stack([part.parts[name] for part in after], dim=2).flatten(1, 2) for name in after[0].parts
        }
        distribution = FactoredCategorical(torch.stack(logits, dim=1).flatten(0, 1), nvec)
        return PolicyOutput(distribution, torch.stack(values, dim=1).flatten()), RecurrentState(**together)


class Turnover:
    """Which individual has which place, and when newcomers replace individuals.

    Individuals are numbered in order of arrival; 0 .. A − 1 are the founders, everybody later is a newcomer. A place
    is the same agent in all worlds: they are replaced together.

    With one shared policy a newcomer brings no weights of its own: its recurrent state and norm strengths begin
    at zero, and it acts as everybody does.

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
        assert events.collected is not None
        by_agent = events.collected.view(self.num_worlds, self.num_agents, -1).sum(0)
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
            places = torch.zeros(self.num_worlds, self.num_agents, dtype=torch.bool)
            places[:, chosen] = True
            learner.restart_streams(places.flatten())
        self.num_times += 1
        return chosen

    def _choose(self) -> list[int]:
        number = self.config.num_agents
        if self.config.selection == "random":
            return sorted(self._random.choice(self.num_agents, number, replace=False).tolist())
        # Of equally long tenures the lower number goes first.
        order = (
            np.arange(self.num_agents)
            if self.config.selection == "first_n"
            else np.argsort(self.arrivals, kind="stable")
        )
        return sorted(order[:number].tolist())

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
        newcomers = self.individuals >= self.num_agents
        rates = self._taken.cpu().numpy() / max(self._num_turns * self.num_worlds, 1)
        for group, members in (("newcomers", newcomers), ("incumbents", ~newcomers)):
            if members.any():
                metrics |= {
                    f"{group}/taken/{name}": rate for name, rate in zip(self.resources, rates[members].mean(0).tolist())
                }
                if strengths is not None:
                    means = strengths[np.flatnonzero(members)].mean(0).tolist()
                    metrics |= {f"{group}/strength/{name}": mean for name, mean in zip(self.resources, means)}
        self._taken.zero_()
        self._num_turns = 0
        return metrics

    def state(self) -> dict[str, Any]:
        """JSON that `restore` takes back."""
        return {
            "individuals": self.individuals.tolist(),
            "arrivals": self.arrivals.tolist(),
            "num_times": self.num_times,
            "taken": self._taken.tolist(),
            "num_turns": self._num_turns,
            "random": self._random.bit_generator.state,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Takes back what `state` gave."""
        self.individuals = np.array(state["individuals"], dtype=np.int64)
        self.arrivals = np.array(state["arrivals"], dtype=np.int64)
        self.num_times, self._num_turns = int(state["num_times"]), int(state["num_turns"])
        self._taken = torch.tensor(state["taken"], dtype=torch.float64)
        self._random.bit_generator.state = state["random"]


def strengths_by_agent(learner: Learner, num_agents: int) -> Tensor | None:
    """Norm strengths [A, R], means over worlds; None where no norms are enforced."""
    if isinstance(learner, IndependentLearners):
        return learner.strengths()
    assert isinstance(learner, DualHeadRecurrentPPO)
    if learner.norms is None:
        return None
    return learner.norms.strengths.view(-1, num_agents, learner.norms.strengths.shape[1]).mean(0)
