"""The state-punishment commons: agents that forage apart, harm each other, and vote on how hard harm is punished.

Letters: W worlds, A agents of each, B = W · A streams (stream = world · A + agent), R resource kinds, L levels.

A turn of a world, whose agents act one after another in an order drawn anew each turn:

1. Each agent meets the punishment level as the votes before it left it, takes what its move finds, and may be punished
   for it. Its own vote counts from the agent after it on.
2. Its reward is the value of what it took (or of bumping into a wall), less the fine, less the harm that others did
   in the turn *before*. Taking a harmful resource harms every other agent of the world, in their next reward.
3. Resources grow, or a fresh menu is drawn.

All agents choose from what they saw when the turn began. An epoch ends by truncation: everybody gets a fresh patch, but
the punishment level, the harm still to be paid and the turn count of the phases go on.
"""

from __future__ import annotations

import bisect
import itertools
import json
import zlib
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from torch import Tensor

from dualhead.config import NonNegativeInt
from dualhead.norms import NormEvents
from dualhead.storage import CheckpointError, Saved, check_fit, fill, with_prefix, without_prefix
from dualhead.worlds.commons import view
from dualhead.worlds.commons.actions import NO_VOTE, NUM_VOTES, VOTE_DOWN, VOTE_UP, Actions
from dualhead.worlds.commons.config import CommonsConfig, Phase
from dualhead.worlds.commons.forage import Menus, Patches
from dualhead.worlds.streams import StreamStep

_WHOLE = 1_000_000
"""The level's probability is kept as a whole number of millionths: votes up and down cancel exactly."""


class _State(Saved):
    """What a checkpoint says of a commons, besides its tensors."""

    config: dict[str, Any]
    num_worlds: NonNegativeInt
    device: Literal["cpu", "cuda", "mps", "xpu"]
    turn: NonNegativeInt
    epoch_turn: NonNegativeInt
    num_counted: NonNegativeInt


class Commons:
    """W worlds of A agents as streams, batched on one device.

        worlds = Commons(CommonsConfig(num_agents=10), num_worlds=64)
        observations = worlds.reset(seed=0)
        step = worlds.step(agent.act(observations))
        agent.record(step.rewards, step.terminated, step.truncated, final_observations=..., events=worlds.events)

    Observations, tensors by name:
        grid [R + 1, D, D] uint8, or menu [slots · R] float32: see `forage`.
        scalars [4] float32 in [0, 1]: p of the level (0 if hidden); the harm that the next reward pays for, as a share
            of the most that others can do in a turn; whether the last turn brought a punishment; whether the next turn
            is for votes.
        agent, with `agent_index`: number within the world.
        action_mask int8, with `voting_season`: see `actions.Actions`.

    Actions: `Dict(move=Discrete(n), vote=Discrete(3))`, votes none, up, down; or `Discrete` for a single-number coding.
        On the grid n is 4 (up, down, left, right), in a bandit the number of slots; `stay` adds one.

    Args:
        config: the rules.
        num_worlds: W.
        device: where everything is kept.

    Attributes:
        events: NormEvents of the last step, [B, R] each.
        turn: turns since `reset`, over all epochs.
        harm_received: [B], harm done by others in the last turn; the next reward pays for it.
    """

    _level: Tensor
    """[W], in parts of `_WHOLE`."""

    def __init__(
        self, config: CommonsConfig | None = None, *, num_worlds: int = 1, device: torch.device | str = "cpu"
    ) -> None:
        if num_worlds < 1:
            raise ValueError(f"num_worlds: expected at least 1, got {num_worlds}")
        self.config = config = config or CommonsConfig()
        self.num_worlds, self.num_agents, self.resources = num_worlds, config.num_agents, config.resources
        self.num_streams = num_worlds * config.num_agents
        self.device = device = torch.device(device)
        self.forage = (Patches if config.form == "grid" else Menus)(self.num_streams, config, device=device)
        self._actions = Actions(config, self.num_streams, num_moves=self.forage.num_moves, device=device)
        self.action_space = self._actions.space
        seen: dict[str, spaces.Space] = {**self.forage.space, "scalars": spaces.Box(0.0, 1.0, (4,), np.float32)}
        if config.agent_index:
            seen["agent"] = spaces.Discrete(config.num_agents)
        if config.voting_season is not None:
            seen["action_mask"] = self._actions.mask_space
        self.observation_space = spaces.Dict(seen)

        # What a code (nothing, the kinds, a wall) is worth, does to others, and is punished for.
        kinds = config.resources
        self._values = torch.tensor([0.0, *(config.values[kind] for kind in kinds), config.bump], device=device)
        self._harms = torch.tensor([0.0, *(config.harms[kind] for kind in kinds), 0.0], device=device)
        never = (0.0,) * config.num_levels
        rows = [never, *(config.schedule[kind] for kind in kinds), never]
        self._schedule = torch.tensor(rows, device=device).flatten()
        self._codes = torch.arange(1, len(kinds) + 1, device=device)
        self._most_harm = max(config.harms[kind] for kind in kinds) * (config.num_agents - 1)
        self._agent = torch.arange(config.num_agents, device=device).repeat(num_worlds)
        self._phase_starts = [0, *itertools.accumulate(phase.num_turns or 0 for phase in config.phases)]
        self._generator = torch.Generator(device)
        self._generator.seed()
        self.reset()

    # Experience.

    def reset(self, *, seed: int | None = None) -> dict[str, Any]:
        """Begins a run: the first turn of the first phase, nothing owed, fresh patches, zero statistics."""
        if seed is not None:
            self._generator.manual_seed(seed)
        num_streams, num_kinds = self.num_streams, len(self.resources)
        self.turn = self._epoch_turn = self._num_counted = 0
        self.harm_received = torch.zeros(num_streams, device=self.device)
        self._was_punished = torch.zeros(num_streams, dtype=torch.bool, device=self.device)
        self._last_votes = torch.zeros(num_streams, dtype=torch.int64, device=self.device)
        self._totals = torch.zeros(2 * num_kinds + 5, dtype=torch.float64, device=self.device)
        nothing = torch.zeros(num_streams, num_kinds, dtype=torch.bool, device=self.device)
        self.events = NormEvents(nothing, nothing)
        self._begin_turn()
        self.forage.begin(self._generator)
        return self.observations()

    def step(self, actions: Any) -> StreamStep:
        """One turn of all worlds. What the season forbids is ignored.

        Args:
            actions: [B, 2] moves and votes, or a dict of arrays [B]; single-number codings [B] or [B, 1].

        Raises:
            ValueError: another shape, or (on the CPU) an index outside its range.
        """
        moves, votes = self._actions.decode(actions)
        if self._is_voting_turn:
            moves = torch.full_like(moves, self.forage.num_moves)
        elif self.config.voting_season is not None:
            votes = torch.full_like(votes, NO_VOTE)
        levels = self._cast(votes)
        codes = self.forage.take(moves)
        fines, punished = self._punish(codes, levels)
        harms = self._harms[codes]
        rewards: Any = self._values[codes] - fines - self.harm_received
        paid = self.harm_received
        by_world = harms.view(self.num_worlds, self.num_agents)
        self.harm_received = (by_world.sum(dim=1, keepdim=True) - by_world).flatten()
        self._was_punished, self._last_votes = punished, votes.clone()
        collected = codes[:, None] == self._codes
        self.events = NormEvents(collected & punished[:, None], collected)
        self._count(votes, paid)

        self.forage.grow(self._generator)
        self.turn += 1
        self._epoch_turn += 1
        self._begin_turn()
        ends = self._epoch_turn == self.config.epoch_turns
        final = self.observations() if ends else None
        if ends:
            self.next_epoch()
        # The host knows how episodes end: it need not ask an accelerator.
        terminated: Any = torch.zeros(self.num_streams, dtype=torch.bool)
        return StreamStep(self.observations(), rewards, terminated, terminated | ends, final, self.events)

    def next_epoch(self) -> None:
        """Lays out fresh patches (or menus) now, as after the last turn of an epoch; the run goes on."""
        self._epoch_turn = 0
        self.forage.begin(self._generator)

    def observations(self) -> dict[str, Any]:
        """What the next actions answer to; looking changes nothing."""
        config, voting = self.config, self._is_voting_turn
        harm = (self.harm_received / (self._most_harm or 1.0)).clamp(max=1.0)
        p = self.level.repeat_interleave(self.num_agents) if config.level_visible else torch.zeros_like(harm)
        scalars = torch.stack([p, harm, self._was_punished.float(), torch.full_like(p, float(voting))], dim=1)
        seen: dict[str, Any] = {**self.forage.observe(), "scalars": scalars}
        if config.agent_index:
            seen["agent"] = self._agent
        if config.voting_season is not None:
            seen["action_mask"] = self._actions.mask(voting=voting)
        return seen

    @property
    def level(self) -> Tensor:
        """p of each world's level, [W]."""
        return self._level.to(torch.float32) / _WHOLE

    @property
    def level_index(self) -> Tensor:
        """Each world's level, a column of the schedule, [W]."""
        return self._index(self._level)

    @property
    def phase(self) -> Phase:
        """The phase that the next turn belongs to."""
        return self._phase_now()[0]

    def statistics(self) -> dict[str, float]:
        """Numbers for the log, as means per agent and turn since the last call; 0 if there was no turn.

        `commons/taken/<resource>` and `commons/punished/<resource>` (times), `commons/votes/up` and
        `commons/votes/down` (cast in season, whether they counted or not), `commons/level` (p after the votes),
        `commons/harm/dealt` (to all others together) and `commons/harm/received` (what rewards have paid for).
        """
        names = [f"{what}/{kind}" for what in ("taken", "punished") for kind in self.resources]
        names += ["votes/up", "votes/down", "level", "harm/dealt", "harm/received"]
        means = (self._totals / (max(self._num_counted, 1) * self.num_streams)).tolist()
        self._totals.zero_()
        self._num_counted = 0
        return {f"commons/{name}": mean for name, mean in zip(names, means)}

    def close(self) -> None:
        """Nothing to free."""

    # The rules.

    @property
    def _is_voting_turn(self) -> bool:
        season = self.config.voting_season
        return season is not None and (self._epoch_turn + 1) % season == 0

    def _cast(self, votes: Tensor) -> Tensor:
        """Moves the level by the votes, one after another; gives the level each agent met [B], as an index."""
        if self.phase.mode != "voted":
            return self.level_index.repeat_interleave(self.num_agents)
        order = self._turn_order()
        shift = round(self.config.vote_shift * _WHOLE)
        shifts = shift * ((votes == VOTE_UP).long() - (votes == VOTE_DOWN).long()).view(order.shape)
        # Agents first, so that each turn's row is contiguous.
        in_order = shifts.gather(1, order).t().contiguous()
        met = torch.empty_like(in_order)
        for agent_shifts, level_met in zip(in_order, met):
            level_met.copy_(self._level)
            # Clamped after every vote: what goes over the edge is lost, and later votes start from the edge.
            self._level = (self._level + agent_shifts).clamp_(0, _WHOLE)
        return self._index(torch.empty_like(shifts).scatter_(1, order, met.t())).flatten()

    def _turn_order(self) -> Tensor:
        """[W, A], the agents in the order in which they act."""
        draws = torch.rand(self.num_worlds, self.num_agents, generator=self._generator, device=self.device)
        return draws.argsort(dim=1)

    def _index(self, level: Tensor) -> Tensor:
        """Columns of the schedule: round((L - 1) · p), ties to even as Python rounds; float64 makes the ties exact."""
        return ((self.config.num_levels - 1) * level.double() / _WHOLE).round_().long()

    def _punish(self, codes: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
        """What each agent pays, and whether it was punished, [B]."""
        if self.phase.mode == "off":
            return torch.zeros_like(self.harm_received), torch.zeros_like(self._was_punished)
        probabilities = self._schedule[codes * self.config.num_levels + levels]
        if self.config.punishments_are == "deterministic":
            return self.config.punishment * probabilities, probabilities > 0.0
        draws = torch.rand(self.num_streams, generator=self._generator, device=self.device)
        punished = draws < probabilities
        return self.config.punishment * punished, punished

    def _phase_now(self) -> tuple[Phase, int]:
        """The phase of the coming turn, and how many turns of it are over."""
        phases, starts = self.config.phases, self._phase_starts
        turn = self.turn % starts[-1] if self.config.repeat_phases else self.turn
        number = min(bisect.bisect_right(starts, turn), len(phases)) - 1
        return phases[number], turn - starts[number]

    def _begin_turn(self) -> None:
        """Sets the level if the coming turn is the first of a phase that gives one, or of the run."""
        phase, num_turns = self._phase_now()
        level = phase.level if num_turns == 0 else None
        if level is None and self.turn == 0:
            level = self.config.initial_level
        if level is not None:
            millionths = round(_WHOLE * level / max(self.config.num_levels - 1, 1))
            self._level = torch.full((self.num_worlds,), millionths, device=self.device)

    def _count(self, votes: Tensor, paid: Tensor) -> None:
        collected = self.events.collected
        assert collected is not None
        sums = [
            (votes == VOTE_UP).sum(),
            (votes == VOTE_DOWN).sum(),
            self.level.sum(dtype=torch.float64) * self.num_agents,
            self.harm_received.sum(dtype=torch.float64),
            paid.sum(dtype=torch.float64),
        ]
        self._totals += torch.cat([collected.sum(0), self.events.punished.sum(0), torch.stack(sums)])
        self._num_counted += 1

    # Scenes and pictures.

    @classmethod
    def from_ascii(
        cls, drawings: Sequence[str], config: CommonsConfig, *, device: torch.device | str = "cpu", seed: int = 0
    ) -> Commons:
        """Worlds that begin their first epoch as drawn, one drawing each; see `view`.

        Raises:
            ValueError: a drawing is not one of a world of this configuration.
        """
        worlds = cls(config, num_worlds=len(drawings), device=device)
        worlds.reset(seed=seed)
        codes, agents = zip(*(view.parse(drawing, config.resources, config.num_agents) for drawing in drawings))
        has_agents = all(part is not None for part in agents)
        worlds.forage.place(np.concatenate(codes), np.concatenate(agents) if has_agents else None)
        return worlds

    def ascii(self, world: int = 0) -> str:
        """A drawing of one world that `from_ascii` reads."""
        codes, agents = self._scene(world)
        return view.draw(codes, agents, self.config.resources)

    def frame(self, world: int = 0) -> NDArray[np.uint8]:
        """A picture of one world [height, width, 3]: patches, the last votes, punishments, and the level's bar."""
        codes, agents = self._scene(world)
        return view.frame(
            codes,
            agents,
            num_kinds=len(self.config.resources),
            votes=self._of_world(self._last_votes, world),
            punished=self._of_world(self._was_punished, world),
            level=float(self.level[world]),
            is_enforced=self.phase.mode != "off",
        )

    def _of_world(self, of_streams: Tensor, world: int) -> NDArray[Any]:
        if not 0 <= world < self.num_worlds:
            raise ValueError(f"world: expected an index from 0 to below {self.num_worlds}, got {world}")
        return of_streams.unflatten(0, (self.num_worlds, -1))[world].cpu().numpy()

    def _scene(self, world: int) -> tuple[NDArray[Any], NDArray[Any] | None]:
        codes, agents = self.forage.codes(), self.forage.agents()
        return self._of_world(codes, world), None if agents is None else self._of_world(agents, world)

    # Saving and loading.

    @property
    def resumable(self) -> None:
        """None: it can go on from `state`, always; see `streams.Streams`."""

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that the rest of the run depends on: tensors by name (copies), and JSON metadata."""
        tensors = {name: tensor.clone() for name, tensor in self._tensors().items()}
        return tensors | {"rng": self._generator.get_state()}, {
            "config": self.config.model_dump(mode="json"),
            "num_worlds": self.num_worlds,
            "device": self.device.type,
            "turn": self.turn,
            "epoch_turn": self._epoch_turn,
            "num_counted": self._num_counted,
        }

    def restore(
        self, tensors: dict[str, Tensor], metadata: dict[str, Any], *, source: str = "checkpoint"
    ) -> dict[str, Any]:
        """Takes back what `state` gave, resumes bit-identically, and returns the observations of that moment.

        On another kind of device random numbers differ from then on, as its generators have other states. `events` stay
        those of the last step made here.

        Raises:
            CheckpointError: it is of other rules or another number of worlds, or something in it is missing or
                impossible; nothing changes.
        """
        saved = _State.read(metadata, source=source)
        for name, own in (("config", self.config.model_dump(mode="json")), ("num_worlds", self.num_worlds)):
            given = getattr(saved, name)
            if json.dumps(given, sort_keys=True) != json.dumps(own, sort_keys=True):  # where 1 is not True
                raise CheckpointError(f"{source} is of another commons: its {name} is {given}, not {own}")
        if saved.epoch_turn >= self.config.epoch_turns:
            raise CheckpointError(f"{source} has no valid epoch_turn: expected less than {self.config.epoch_turns}")
        generator, ours = torch.Generator(self.device), self._tensors()
        theirs = {name: part for name, part in tensors.items() if name != "rng"}
        check_fit(ours, theirs, what=source)
        try:
            for name, most in (("level", _WHOLE), ("last_votes", NUM_VOTES - 1)):
                if ((theirs[name] < 0) | (theirs[name] > most)).any():
                    raise ValueError(f"{name}: expected whole numbers from 0 to {most}")
            of_forage = without_prefix("forage", theirs)
            self.forage.check({name: part.to(self.device) for name, part in of_forage.items()})
            if saved.device == self.device.type:
                generator.set_state(tensors["rng"].cpu())
            else:
                generator.manual_seed(zlib.crc32(tensors["rng"].numpy().tobytes()))
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{source} has no valid state of the commons: {error!r}") from error
        fill(ours, theirs, what=source)
        self._generator = generator
        self.turn, self._epoch_turn, self._num_counted = saved.turn, saved.epoch_turn, saved.num_counted
        return self.observations()

    def _tensors(self) -> dict[str, Tensor]:
        return {
            "level": self._level,
            "harm_received": self.harm_received,
            "was_punished": self._was_punished,
            "last_votes": self._last_votes,
            "totals": self._totals,
            **with_prefix("forage", self.forage.tensors()),
        }
