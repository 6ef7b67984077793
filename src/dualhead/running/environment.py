"""The environment of a run: named by its settings, or handed over in Python."""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeGuard

import gymnasium as gym
import torch
from gymnasium.vector import VectorEnv

from dualhead.config import WorldConfig
from dualhead.errors import RunError
from dualhead.running.checkpoint import read_config
from dualhead.running.config import RunConfig, found_world, pettingzoo_module
from dualhead.worlds.pettingzoo import is_multi_agent, make_parallel_env
from dualhead.worlds.registry import WORLDS
from dualhead.worlds.streams import GymnasiumStreams, Streams, make_streams

Environment = Callable[[], Any] | Streams | VectorEnv
"""What Python may hand over instead of an id: a callable that makes one Gymnasium environment or ParallelEnv, streams,
or a ParallelEnv, which is copied for each world."""


def settings_of(
    env: str | Environment, env_args: Mapping[str, Any] | None = None, *, drop_observations: Sequence[str] = ()
) -> dict[str, Any]:
    """The fields of `RunConfig` that describe an environment. What a callable makes is found by calling it.

    Raises:
        TypeError: it is none.
        ValueError: it is a vector environment that fills in steps (see `GymnasiumStreams`).
    """
    if isinstance(env, str):
        return {"env": env}
    if is_streams(env):
        streams = as_streams(env)
        num_agents = getattr(streams, "num_agents", 1)
        return {
            "env": _name(getattr(getattr(streams, "envs", streams), "spec", None) or type(env)),
            "env_from": "streams",
            "num_envs": streams.num_streams // num_agents,
            "world": WorldConfig(num_agents=num_agents, resources=tuple(getattr(streams, "resources", ()))),
        }
    if is_multi_agent(env) or (callable(env) and not (isinstance(env, type) and issubclass(env, gym.Env))):
        found = found_world(env, env_args or {}, drop_observations=drop_observations)
        return {"env": _name(env), "env_from": "callable"} | ({} if found == WorldConfig() else {"world": found})
    if callable(env):
        return {"env": _name(env), "env_from": "callable"}
    raise TypeError(
        f"env: expected an environment id, a callable that makes one environment, a ParallelEnv, a Gymnasium vector "
        f"environment, or Streams, got {env!r}"
        + ("; pass lambda: ... that makes it" if isinstance(env, gym.Env) else "")
    )


def module_of(env: str) -> str | None:
    """The module that is imported to make an environment with this id, `MODULE:ID` or `pettingzoo:MODULE`; None for a
    plain id."""
    if (module := pettingzoo_module(env)) is not None:
        return module
    module, colon, _ = env.partition(":")
    return module if colon else None


def config_to_play(run: str | os.PathLike[str]) -> RunConfig:
    """The configuration of a run whose environment is to be made. A run may come from a stranger, so its files import
    nothing: a module that the environment's id names must be imported already.

    Raises:
        RunError: it is not, or no run is there.
    """
    config = read_config(run)
    module = module_of(config.env)
    if config.env_from == "id" and module is not None and module not in sys.modules:
        raise RunError(
            f"the environment {config.env!r} of {run} needs the module {module!r}, which the run's files name and "
            f"which is not imported by itself. If you trust it: --import {module}, or --trust; in Python, import it "
            f"first"
        )
    return config


def found_env(env: str) -> Any:
    """A Gymnasium id, or what makes the environment of PettingZoo that an id names."""
    module = pettingzoo_module(env)
    return env if module is None else functools.partial(make_parallel_env, module)


def is_streams(env: Any) -> TypeGuard[Streams | VectorEnv]:
    """Whether these are streams, or a vector environment, rather than what makes an environment."""
    is_like_streams = not isinstance(env, type) and all(hasattr(env, name) for name in ("num_streams", "reset", "step"))
    return is_like_streams or isinstance(env, VectorEnv)


def as_streams(env: Streams | VectorEnv) -> Streams:
    """The same as `Streams`.

    Raises:
        TypeError: an attribute of `Streams` is missing.
        ValueError: a vector environment that fills in steps.
    """
    if isinstance(env, VectorEnv):
        return GymnasiumStreams(env)
    needed = ("observation_space", "action_space", "resumable", "statistics", "close")
    if missing := [name for name in needed if not hasattr(env, name)]:
        raise TypeError(f"{type(env).__name__} lacks {', '.join(missing)} of dualhead.Streams")
    return env


def _name(of: Any) -> str:
    """What an environment is called in messages and in the name of its run's directory."""
    given = getattr(of, "id", None) or getattr(of, "__name__", None) or type(of).__name__
    return re.sub(r"[^\w.-]+", "-", given).strip("-.") or "environment"


def open_streams(
    config: RunConfig,
    env: Environment | None = None,
    *,
    num_envs: int | None = None,
    vectorization: str = "sync",
    device: torch.device | str = "cpu",
) -> Streams:
    """The streams of a run's environment. Streams that were handed over are used as they are; their owner closes them.

    Args:
        config: of the run.
        env: in place of the environment that the settings name.
        num_envs: environments (or worlds); None: as configured.
        vectorization: of Gymnasium environments, see `make_streams`.
        device: of a world that is registered by name.

    Raises:
        UnavailableEnvironment: it cannot be made.
        RunError: the settings name none that could be made.
    """
    num_envs = config.num_envs if num_envs is None else num_envs
    if env is None and config.env_from != "id":
        raise RunError(
            f"the environment {config.env!r} of this run was handed over in Python, as {config.env_from}: its files "
            f"cannot make it; pass it in Python, such as dualhead.resume(run, env=...)"
        )
    if is_streams(env):
        return as_streams(env)
    if env is None and config.env in WORLDS:
        return WORLDS[config.env].open(config.world, num_worlds=num_envs, device=device)
    return make_streams(
        found_env(config.env) if env is None else env,
        num_envs,
        vectorization=vectorization,
        drop_observations=config.drop_observations,
        **config.env_args,
    )
