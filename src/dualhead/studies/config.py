"""Settings of a study."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from dualhead.config import Config, NonNegativeInt, merged
from dualhead.running.config import RunConfig
from dualhead.worlds.commons.config import COMMONS


class StudyConfig(Config):
    """A study: conditions x environments x seeds, read from a TOML file. docs/studies.md says how to write one."""

    title: str = Field(default="", description="A sentence over the tables and the figures.")
    seeds: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)] = Field(
        default=(0, 1, 2), description="Every condition is run with each of them in every environment."
    )
    environments: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="Ids of several environments: a list, or a table of those with settings of their own. Without it "
        "the study has one, `env` in `base`.",
    )
    measures: tuple[str, ...] = Field(
        default=(),
        description="Columns of metrics.csv and numbers of summary.json (`evaluation/...`: the final evaluation) to "
        "compare. Without it: returns and speed, and in the commons what only the commons has.",
    )
    harmful: str = Field(
        default="A", description="Commons: the resource whose share among those taken is the study's subject."
    )
    base: dict[str, Any] = Field(default_factory=dict, description="Settings of every run, nested as RunConfig is.")
    conditions: Annotated[dict[str, dict[str, Any]], Field(min_length=1)] = Field(
        description="Name of each condition and the settings that make it, over those of the environment and of `base`."
    )

    @property
    def worlds(self) -> dict[str, dict[str, Any]]:
        """The environments by id, with their own settings."""
        return self.environments or {self.base.get("env", COMMONS): {}}

    @property
    def is_of_the_commons(self) -> bool:
        """Whether the subject is what only the commons has: the harmful resource, phases, relapse."""
        return list(self.worlds) == [COMMONS] and not self.measures

    def run(self, condition: str, seed: int, run_dir: str, *, env: str | None = None) -> RunConfig:
        """Settings of one run: the preset < base < environment (None: the only one) < condition.

        Raises:
            ValueError: they are not possible; the message names condition and environment.
        """
        worlds = self.worlds
        if env is None:
            (env,) = worlds
        try:
            settings = merged(merged(self.base, worlds[env]), self.conditions[condition])
            for name, instead in (("seed", "`seeds` lists them"), ("run_dir", "--out says where the study goes")):
                if name in settings:
                    raise ValueError(f"{name}: not to be set in a study's settings; {instead}")
            if settings.pop("env", env) != env:
                raise ValueError("env: expected in [base] alone; `environments` lists several")
            # Runs of a study train at the same time: with more threads they would compete for the cores.
            defaults: dict[str, Any] = {"num_threads": 1} | ({"eval_episodes": 0} if self.is_of_the_commons else {})
            if ":" in env:  # it may be a world of several agents
                from dualhead.running.environment import world_of  # imports torch

                settings |= world_of(env, settings)
            return RunConfig(**defaults | settings | {"env": env, "seed": seed, "run_dir": run_dir})
        except ValueError as error:
            place = f" in {env!r}" if self.environments else ""
            raise ValueError(f"condition {condition!r}{place}: {error}") from None

    @field_validator("environments", mode="before")
    @classmethod
    def _environments_by_name(cls, given: Any) -> Any:
        """Makes a list of ids a table of ids without settings."""
        if not isinstance(given, list | tuple) or not all(isinstance(name, str) for name in given):
            return given
        if not given or len(set(given)) < len(given):
            raise ValueError("expected one id or several different ones")
        return {name: {} for name in given}

    @model_validator(mode="after")
    def _runs_are_possible(self) -> StudyConfig:
        for name, values in (("seeds", self.seeds), ("measures", self.measures)):
            if len(set(values)) < len(values):
                raise ValueError(f"{name}: expected different ones, got {values}")
        for name in self.conditions:
            if not re.fullmatch("[A-Za-z0-9_-]{1,100}", name):
                raise ValueError(
                    f"conditions: expected names of at most 100 letters, digits, '-' and '_', got {name!r}"
                )
            for env in self.worlds:
                rules = self.run(name, 0, "", env=env).world
                if self.is_of_the_commons and self.harmful not in rules.resources:
                    raise ValueError(f"harmful={self.harmful!r} is none of condition {name!r}'s {rules.resources}")
        return self
