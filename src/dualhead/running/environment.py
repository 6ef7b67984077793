"""The environment of a run: named by its settings, or handed over in Python."""

from __future__ import annotations

import functools
import importlib
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeGuard

import gymnasium as gym
import torch
from gymnasium.vector import VectorEnv
from gymnasium.wrappers import HumanRendering

from dualhead.config import WorldConfig
from dualhead.errors import EnvironmentFailed, RunError, UnavailableEnvironment, UnknownEnvironment
from dualhead.running.checkpoint import read_config, safe_name
from dualhead.running.config import RunConfig, pettingzoo_module
from dualhead.running.parts import Call, find_part, import_module, named_modules
from dualhead.running.trust import expect_trusted
from dualhead.worlds.pettingzoo import JointSpace, is_multi_agent
from dualhead.worlds.registry import WORLDS
from dualhead.worlds.streams import GymnasiumStreams, Streams, make_env, make_streams
from dualhead.worlds.suites import known_ids

Environment = Callable[[], Any] | Streams | VectorEnv
"""What Python may hand over instead of an id: a callable that makes one Gymnasium environment or ParallelEnv, streams,
or a ParallelEnv, which is copied for each world."""


def settings_of(env: str | Environment) -> dict[str, Any]:
    """The fields of `RunConfig` that describe an environment.

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
    if callable(env) or is_multi_agent(env):
        return {"env": _name(env), "env_from": "callable"}
    raise TypeError(
        f"env: expected an environment id, a callable that makes one environment, a ParallelEnv, a Gymnasium vector "
        f"environment, or Streams, got {env!r}"
        + ("; pass lambda: ... that makes it" if isinstance(env, gym.Env) else "")
    )


def world_of(env: str | Environment, settings: Mapping[str, Any]) -> dict[str, WorldConfig]:
    """The setting `world` where an environment is a world of several agents that says how many only when it is made.

    One is made for that, as the settings say: only a user who begins a run may ask for it. Nothing for other
    environments, or where `world` is given.

    Raises:
        RunError, TypeError, UnavailableEnvironment: it cannot be made.
    """
    known = is_streams(env) or (isinstance(env, type) and issubclass(env, gym.Env))
    if known or settings.get("world") or (isinstance(env, str) and ":" not in env):
        return {}
    given = {name: settings[name] for name in ("env_args", "wrappers", "drop_observations") if name in settings}
    config = RunConfig.model_construct(**settings_of(env), **given)
    made = maker_of(config, None if isinstance(env, str) else env)()  # type: ignore[arg-type]
    made.close()
    joint = made.observation_space
    if not isinstance(joint, JointSpace):
        return {}
    return {"world": WorldConfig(num_agents=len(joint.agent_names), resources=joint.resources)}


def config_to_play(run: str | os.PathLike[str]) -> RunConfig:
    """The configuration of a run whose environment is to be made; RunError if that needs trust, or no run is there."""
    config = read_config(run)
    expect_trusted(config, run)
    return config


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
    return safe_name(given).strip("-") or "environment"


def maker_of(config: RunConfig, env: str | Callable[..., gym.Env] | None = None) -> Callable[[], gym.Env]:
    """What makes one environment of a run with its wrappers, in this process or another.

    Args:
        config: of the run.
        env: in place of the environment that the settings name.

    Raises:
        RunError, UnavailableEnvironment: a module or a name is not there.
    """
    # The arguments are those of the environment that was trained in, not of another one.
    is_meant = env is None or config.env_from == "callable"
    found = _found(config.env if env is None else env) if env is None or isinstance(env, str) else env
    wrappers = [(text, _wrapper(text)) for text in config.wrappers]
    make = functools.partial(
        make_env,
        found,
        config.env_args if is_meant else {},
        wrappers=wrappers,
        drop_observations=config.drop_observations,
    )
    return functools.partial(_after_importing, sorted(named_modules & sys.modules.keys()), make)


def _after_importing(modules: Sequence[str], make: Callable[[], gym.Env]) -> gym.Env:
    """Makes an environment that these modules may register: a process that is not forked has not imported them yet."""
    for module in modules:
        importlib.import_module(module)
    return make()


def _found(env: str) -> str | Callable[..., gym.Env]:
    """What an id means: `MODULE:NAME` is a class or function, unless Gymnasium has registered NAME; a Gymnasium id."""
    given, colon, name = env.partition(":")
    if not colon:
        return env
    if (module_name := pettingzoo_module(env)) is not None:
        return _of_pettingzoo(module_name)
    module = import_module(given, what="env")
    if name in gym.registry or not name.isidentifier():
        return f"{module.__name__}:{name}"
    found = getattr(module, name, None)
    if callable(found):
        return found
    if any(known.startswith(f"{name}-v") for known in gym.registry):
        return f"{module.__name__}:{name}"
    classes = [name for name, kind in vars(module).items() if isinstance(kind, type) and issubclass(kind, gym.Env)]
    raise UnavailableEnvironment(
        f"environment {env!r}: expected the name of a class or function in {module.__file__} that makes one "
        f"gymnasium.Env, got {'none such' if found is None else repr(found)}; its classes of environments: "
        f"{', '.join(classes) or 'none'}"
    )


def _of_pettingzoo(name: str) -> Callable[..., Any]:
    """What makes the environment of a module of PettingZoo's kind."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The old environment creation API")  # by each module of PettingZoo
            module = import_module(name, what="env")
    except RunError as error:
        package, _, rest = name.partition(".")
        missing = {"pettingzoo": f"pip install 'pettingzoo[{rest.partition('.')[0]}]'", "mpe2": "pip install mpe2"}
        if package not in missing:
            raise
        raise UnavailableEnvironment(f"{error}. What may be missing: {missing[package]}") from error
    make = getattr(module, "parallel_env", None) or getattr(module, "env", None)
    if not callable(make):
        raise UnavailableEnvironment(f"environment 'pettingzoo:{name}': the module has neither parallel_env nor env")
    return make


def _wrapper(text: str) -> Callable[[gym.Env], gym.Env]:
    name, args, kwargs = Call.read(text)
    wrap = find_part(name, what="wrappers")
    if not callable(wrap):
        raise UnavailableEnvironment(f"wrappers: expected a class or function {name}, got {wrap!r}")
    return functools.partial(_wrapped, wrap, args, kwargs)


def _wrapped(wrap: Callable[..., gym.Env], args: tuple[Any, ...], kwargs: dict[str, Any], env: gym.Env) -> gym.Env:
    return wrap(env, *args, **kwargs)


def with_render_mode(config: RunConfig, *modes: str) -> RunConfig:
    """The settings with the first of these render modes that the environment has; RunError if it has none."""
    plain = maker_of(config)()
    mode, has = plain.render_mode, plain.metadata.get("render_modes") or []
    plain.close()
    if mode in modes:  # always, or by `env_args`
        return config
    for mode in modes:
        if mode in has:
            return config.model_copy(update={"env_args": config.env_args | {"render_mode": mode}})
    raise RunError(
        f"{config.env} cannot be shown: its render modes are {has}, expected {' or '.join(map(repr, modes))} among them"
    )


def has_screen() -> bool:
    """Whether a window can be opened here, as far as environment variables say."""
    return sys.platform != "linux" or any(map(os.environ.get, ("DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER")))


def open_window(config: RunConfig) -> Streams:
    """One environment of a run, which shows itself in a window at its own pace.

    Raises:
        RunError: there is no screen, or the environment has no pictures.
        UnavailableEnvironment: it cannot be made.
    """
    if config.env_from != "id" or config.env in WORLDS or config.num_streams > config.num_envs:
        raise RunError(
            f"{config.env!r} cannot be shown in a window: expected the id or MODULE:NAME of a Gymnasium environment; "
            f"--video FILE films worlds of several agents"
        )
    if not has_screen():
        raise RunError(
            "a window needs a screen, and neither DISPLAY nor WAYLAND_DISPLAY is set; --video FILE films an episode"
        )
    rendered = with_render_mode(config, "human", "rgb_array")
    return make_streams(functools.partial(_in_window, maker_of(rendered)), 1)


def _in_window(make: Callable[[], gym.Env]) -> gym.Env:
    env = make()
    return env if env.render_mode == "human" else HumanRendering(env)


def open_streams(
    config: RunConfig,
    env: Environment | None = None,
    *,
    num_envs: int | None = None,
    for_training: bool = False,
    device: torch.device | str = "cpu",
) -> Streams:
    """The streams of a run's environment. Streams that were handed over are used as they are; their owner closes them.

    Args:
        config: of the run.
        env: in place of the environment that the settings name.
        num_envs: environments (or worlds); None: as configured.
        for_training: Gymnasium environments may run in other processes, as configured.
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
    vectorization = config.vectorization if for_training else "sync"
    try:
        make = maker_of(config, env)  # type: ignore[arg-type]
        return make_streams(make, num_envs, vectorization=vectorization, num_workers=config.num_workers)
    except UnknownEnvironment as error:
        raise UnknownEnvironment(error.name, known_ids(WORLDS)) from error  # those of registered worlds too
    except EnvironmentFailed as error:  # in another process
        raise UnavailableEnvironment(f"environment {config.env!r} cannot be made: {error}") from error
    except TypeError as error:
        if config.env_from != "id":
            raise
        raise UnavailableEnvironment(f"environment {config.env!r}: {error}") from error
