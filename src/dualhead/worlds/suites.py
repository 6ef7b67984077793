"""Suites of environments: what each needs, which of its environments can be made here, and how they are shown."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import re
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np

import dualhead.worlds.tasks  # noqa: F401  (registers dualhead/...)


class Suite(NamedTuple):
    """Environments that are installed together.

    Fields:
        begins: how its ids begin, or the entry points of ids that Gymnasium registers itself.
        modules: what must be installed, none: it comes with dualhead. Importing the first one may register the ids.
        worlds: package whose modules are PettingZoo worlds, which are not imported to be listed.
        never: regular expression of ids that cannot be made by their name, whatever is installed.
    """

    begins: tuple[str, ...]
    modules: tuple[str, ...] = ()
    worlds: str | None = None
    never: str = "(?!)"


SUITES = {
    "dualhead": Suite(("dualhead/",)),
    "gymnasium": Suite(("gymnasium.envs.classic_control", "gymnasium.envs.toy_text")),
    "box2d": Suite(("gymnasium.envs.box2d",), ("Box2D",)),
    "mujoco": Suite(("gymnasium.envs.mujoco",), ("mujoco",), never="Pusher-v4"),  # it needs MuJoCo 2
    "atari": Suite(("ALE/",), ("ale_py", "cv2")),
    "minigrid": Suite(("MiniGrid-", "BabyAI-"), ("minigrid",)),
    "popgym": Suite(("popgym-",), ("popgym",)),
    "dm-control": Suite(("dm_control/",), ("shimmy", "dm_control"), never=".*compatibility-env.*"),
    "mpe2": Suite(("pettingzoo:mpe2.",), ("mpe2", "pettingzoo"), worlds="mpe2"),
    "butterfly": Suite(
        ("pettingzoo:pettingzoo.butterfly.",), ("pettingzoo", "pygame", "pymunk"), worlds="pettingzoo.butterfly"
    ),
    "sisl": Suite(
        ("pettingzoo:pettingzoo.sisl.",), ("pettingzoo", "pygame", "pymunk", "Box2D"), worlds="pettingzoo.sisl"
    ),
}
"""By name, which is that of the extra in pyproject.toml."""

_ELSEWHERE = ("gymnasium.envs", "shimmy.", "ale_py.")
"""Where other ids that Gymnasium or a suite's package registers lead to: JAX, older interfaces, removed versions."""


class Listed(NamedTuple):
    """Fields:
    name: of the suite; `others` for what was registered besides.
    ids: those that it has, as far as that is known here.
    missing: why they cannot be made here and how to get the suite; None: they can be made.
    """

    name: str
    ids: list[str]
    missing: str | None


def suite_of(env: str) -> str | None:
    """The suite of an environment id; None if it belongs to none."""
    for name, suite in SUITES.items():
        if env.startswith(suite.begins) or _entry_point(env).startswith(suite.begins):
            return name
    return None


def _entry_point(env: str) -> str:
    """`MODULE:NAME` of what makes an environment, or its module; nothing for an id that is not registered."""
    entry_point = getattr(gym.registry.get(env), "entry_point", None) or ""
    return entry_point if isinstance(entry_point, str) else getattr(entry_point, "__module__", "")


def missing(name: str) -> str | None:
    """Loads a suite: which module it lacks here and how to get it; None if nothing is missing."""
    suite = SUITES[name]
    lacks = next((module for module in suite.modules if importlib.util.find_spec(module) is None), None)
    if lacks is None and suite.modules and suite.worlds is None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of dm_control: there is no screen; of Box2D: it was made by SWIG
                importlib.import_module(suite.modules[0])
        except ImportError as error:
            lacks = error.name or suite.modules[0]
    return None if lacks is None else f"needs the package {lacks}: pip install -e '.[{name}]' in the checkout"


def listed(worlds: Iterable[str] = ()) -> list[Listed]:
    """Every suite, with what can be trained of it. No environment is made to find out.

    Args:
        worlds: names of registered worlds, which are listed with ours.
    """
    lacks = {name: missing(name) for name in SUITES}
    ids: dict[str, list[str]] = {name: [] for name in SUITES}
    others = []
    for env in gym.registry:
        name = suite_of(env)
        if name is None:
            if not _entry_point(env).startswith(_ELSEWHERE):
                others.append(env)
        elif not re.fullmatch(SUITES[name].never, env):
            ids[name].append(env)
    ids["dualhead"] += worlds
    for name, suite in SUITES.items():
        if suite.worlds is not None and lacks[name] is None:
            ids[name] += [f"pettingzoo:{module}" for module in _worlds_of(suite.worlds)]
    found = [Listed(name, sorted(ids[name]), lacks[name]) for name in SUITES]
    return found + ([Listed("others", sorted(others), None)] if others else [])


def known_ids(worlds: Iterable[str] = ()) -> list[str]:
    """Every id of `listed`."""
    return [env for suite in listed(worlds) for env in suite.ids]


def _worlds_of(package: str) -> Iterator[str]:
    """PettingZoo's modules end in a version. They are not imported."""
    top, *below = package.split(".")
    spec = importlib.util.find_spec(top)
    folders = [str(Path(place, *below)) for place in (spec and spec.submodule_search_locations) or ()]
    for module in pkgutil.iter_modules(folders):
        if re.search(r"_v\d+$", module.name):
            yield f"{package}.{module.name}"


def make_as_usual(env: str, *, is_plain: bool = False, **kwargs: Any) -> gym.Env:
    """`gym.make`, with what is usual around the environments of a suite: see docs/environments.md.

    Args:
        env: the id.
        is_plain: without preprocessing, which the user's own wrappers do.
        kwargs: for `gym.make`.
    """
    suite = suite_of(env)
    if suite == "atari" and not is_plain and "obs_type" not in kwargs:
        return _atari(env, **kwargs)
    # The agent checks every observation and reward itself; Gymnasium's passive checker would slow each step.
    made = gym.make(env, disable_env_checker=True, **kwargs)
    return _without_mission(made, env) if suite == "minigrid" else made


def _atari(env: str, *, frameskip: int = 4, **kwargs: Any) -> gym.Env:
    """Atari as in Machado et al. 2018: every fourth frame, the maximum of the last two, in 84x84 shades of grey; up to
    30 steps without an action at first. An episode ends with the game, not with a life.
    """
    from gymnasium.wrappers import AtariPreprocessing

    made: Any = gym.make(env, disable_env_checker=True, frameskip=1, **kwargs)
    can_wait = made.unwrapped.get_action_meanings()[0] == "NOOP"
    return AtariPreprocessing(made, frame_skip=frameskip, noop_max=30 if can_wait else 0)


def from_dm_env(env: Any) -> Any:
    """A task of dm_control as a Gymnasium environment, by Shimmy; anything else as it is."""
    dm_env = sys.modules.get("dm_env")
    if dm_env is None or not isinstance(env, dm_env.Environment):
        return env
    from shimmy.dm_control_compatibility import DmControlCompatibilityV0

    return DmControlCompatibilityV0(env)


def _without_mission(env: gym.Env, name: str) -> gym.Env:
    """MiniGrid for a network: one-hot cells and the direction; the mission text is left out.

    Where the mission differs between episodes a warning says so: part of the task cannot be seen then.
    """
    from gymnasium.wrappers import TransformObservation
    from minigrid.wrappers import OneHotPartialObsWrapper

    one_hot = OneHotPartialObsWrapper(env)
    spaces = one_hot.observation_space
    assert isinstance(spaces, gym.spaces.Dict)
    mission = env.unwrapped.observation_space["mission"]  # type: ignore[index]
    if name.startswith("BabyAI") or mission.ordered_placeholders:
        warnings.warn(f"{name} says in words what is to be done; the agent does not see them", stacklevel=2)
    shape = spaces["image"].shape
    assert shape is not None
    space = gym.spaces.Dict(image=gym.spaces.Box(0, 1, shape, np.uint8), direction=spaces["direction"])
    return TransformObservation(one_hot, lambda seen: {"image": seen["image"], "direction": seen["direction"]}, space)
