"""The rules of the commons, and their defaults."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dualhead.config import Config, FiniteFloat, Fraction, NonNegativeFloat, NonNegativeInt, PositiveInt, WorldConfig

COMMONS = "commons"
"""Name of the commons as an environment."""
MAX_RESOURCES = 8
"""Kinds that a commons can have: as many as its pictures have colours for."""


class Phase(Config):
    """What the votes and the punishment do for some turns; see `CommonsConfig.phases`."""

    mode: Literal["voted", "fixed", "off"] = Field(
        default="voted",
        description="`voted`: votes move the level; `fixed`: votes do nothing; `off`: nor is anybody punished.",
    )
    level: NonNegativeInt | None = Field(
        default=None, description="Level when the phase begins, an index into the schedule; None: as it was before."
    )
    num_turns: PositiveInt | None = Field(default=None, description="Turns; None: to the end (last phase only).")


class CommonsConfig(WorldConfig):
    """The rules of the commons."""

    form: Literal["grid", "bandit"] = Field(default="grid", description="Patches to walk on, or a menu to choose from.")
    num_agents: PositiveInt = Field(default=10, description="Agents of one world, A.")
    resources: tuple[str, ...] = Field(default=("A", "B", "C", "D", "E"), description="Names of the resource kinds.")
    values: dict[str, FiniteFloat] = Field(
        default={"A": 20.0, "B": 10.0, "C": 10.0, "D": 10.0, "E": 10.0}, description="Reward for taking one, by kind."
    )
    harms: dict[str, NonNegativeFloat] = Field(
        default={"A": 5.0, "B": 0.0, "C": 0.0, "D": 0.0, "E": 0.0},
        description="What taking one costs every other agent of the world, by kind.",
    )
    schedule: dict[str, tuple[Fraction, ...]] = Field(
        default={
            "A": (0.30, 0.40, 0.55, 0.70, 0.85, 0.95, 1.0, 1.0, 1.0, 1.0),
            "B": (0.0, 0.05, 0.10, 0.10, 0.10, 0.10, 0.10, 0.15, 0.15, 0.20),
            "C": (0.0, 0.0, 0.0, 0.05, 0.10, 0.10, 0.10, 0.10, 0.15, 0.15),
            "D": (0.0, 0.0, 0.0, 0.0, 0.0, 0.05, 0.10, 0.10, 0.10, 0.15),
            "E": (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.05, 0.10, 0.10),
        },
        description="Probability of punishment at each level, by kind.",
    )
    punishment: NonNegativeFloat = Field(default=25.0, description="What a punishment costs.")
    punishments_are: Literal["probabilistic", "deterministic"] = Field(
        default="probabilistic", description="`deterministic`: taking one always costs punishment · probability."
    )
    vote_shift: Annotated[float, Field(ge=1e-6, le=1.0)] = Field(
        default=0.1, description="By how much a vote moves the level's probability p; level = round((L - 1) · p)."
    )
    initial_level: NonNegativeInt = Field(default=0, description="Level that a run begins with.")
    level_visible: bool = Field(default=True, description="Show p to the agents; otherwise they see 0.")
    phases: tuple[Phase, ...] = Field(
        default=(Phase(),), min_length=1, description="One after another, in turns of the run; the last one stays."
    )
    repeat_phases: bool = Field(default=False, description="Begin again with the first phase after the last one.")
    voting_season: Annotated[int, Field(ge=2)] | None = Field(
        default=None, description="Every X-th turn of an epoch is for votes only, the others for moves; None: never."
    )
    coding: Literal["pair", "composite", "simple"] = Field(
        default="pair", description="Actions as (move, vote), or as one of the historical single numbers."
    )
    stay: bool = Field(default=False, description="Give the move head a choice to stay (bandit: to take nothing).")
    agent_index: bool = Field(default=False, description="Show each agent its number.")
    epoch_turns: PositiveInt = Field(default=100, description="Turns until everything is laid out afresh.")
    patch_size: Annotated[int, Field(ge=3)] = Field(default=10, description="Cells on a side, walls included.")
    window_radius: PositiveInt = Field(default=4, description="Cells an agent sees in each direction.")
    bump: Annotated[float, Field(le=0.0, allow_inf_nan=False)] = Field(
        default=-1.0, description="Reward for hitting a wall."
    )
    initial_resources: NonNegativeInt = Field(default=8, description="Resources on a fresh patch.")
    respawn_probability: Fraction = Field(
        default=0.005, description="Probability of a resource on each empty cell and turn, every kind equally likely."
    )
    max_resources: PositiveInt | None = Field(default=None, description="Cap of growth on a patch; None: no cap.")
    menu_size: PositiveInt = Field(default=2, description="Slots of a menu (bandit), all of different kinds.")

    @property
    def num_levels(self) -> int:
        return len(self.schedule[self.resources[0]])

    @model_validator(mode="after")
    def _rules_fit(self) -> CommonsConfig:
        if not 1 <= len(self.resources) <= MAX_RESOURCES or len(set(self.resources)) < len(self.resources):
            raise ValueError(f"resources: expected 1 to {MAX_RESOURCES} different names, got {self.resources}")
        for name in ("values", "harms", "schedule"):
            missing = [kind for kind in self.resources if kind not in getattr(self, name)]
            if missing:
                raise ValueError(f"{name}: expected an entry for every resource, {missing} missing")
        lengths = {kind: len(self.schedule[kind]) for kind in self.resources}
        if len(set(lengths.values())) > 1 or 0 in lengths.values():
            raise ValueError(f"schedule: expected the same number of levels for every resource, got {lengths}")
        for name, level in [("initial_level", self.initial_level), *(("phases: level", p.level) for p in self.phases)]:
            if level is not None and level >= self.num_levels:
                raise ValueError(f"{name}: expected a level below {self.num_levels}, got {level}")
        for number, phase in enumerate(self.phases):
            is_last = number == len(self.phases) - 1 and not self.repeat_phases
            if phase.num_turns is None and not is_last:
                raise ValueError(f"phases: phase {number} has no num_turns, and another phase is to follow")
        if self.stay and self.coding != "pair":
            raise ValueError(f"stay: expected False with coding={self.coding!r}, which has a no-op of its own")
        num_kinds, room = len(self.resources), (self.patch_size - 2) ** 2 - 1  # one cell is the agent's
        if self.max_resources is not None:
            room = min(room, self.max_resources)
        if self.form == "bandit" and self.menu_size > num_kinds:
            raise ValueError(f"menu_size: expected at most {num_kinds}, a slot for each resource, got {self.menu_size}")
        if self.form == "grid" and self.initial_resources > room:
            raise ValueError(
                f"initial_resources: expected at most {room} (patch_size={self.patch_size}, "
                f"max_resources={self.max_resources}), got {self.initial_resources}"
            )
        return self
