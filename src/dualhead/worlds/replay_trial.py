"""Whether an environment can be replayed, found by trying; see `replay`."""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable, Mapping
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector.utils import batch_space, iterate

from dualhead.spaces import ActionSpec
from dualhead.worlds.replay import Randomness, Recorder, leaves

_BEYOND = "it keeps state beyond an episode, or draws from other generators than its np_random"


def why_not_replayed(
    make_env: Callable[[], gym.Env], *, min_steps: int = 20, max_steps: int = 300, seconds: float = 0.1
) -> str | None:
    """Tries whether an episode that is played again in a fresh environment is the same to the bit.

    Plays a little with random legal actions, begins another episode and plays that in a fresh environment as well,
    across a reset at least. Global generators are left as they were.

    Args:
        make_env: makes the environment.
        min_steps, max_steps: of the comparison.
        seconds: after which it ends once `min_steps` are done; it takes this twice.

    Returns:
        None if every observation, reward and flag agreed, else the reason in words.
    """
    before = Randomness.now()
    made: list[Recorder] = []
    try:
        made += [Recorder(make_env()), Recorder(make_env())]
        return _compare(*made, min_steps=min_steps, max_steps=max_steps, seconds=seconds)
    except Exception as error:  # whatever an environment may raise: it only costs the exact resume
        return f"trying it raised {type(error).__name__}: {error}"
    finally:
        for env in made:
            env.close()
        before.set()


def _compare(env: Recorder, other: Recorder, *, min_steps: int, max_steps: int, seconds: float) -> str | None:
    action_space = copy.deepcopy(env.action_space)
    action_space.seed(0)
    legal = getattr(env.unwrapped, "legal_action", legal_action)  # of a world whose agents have masks each

    def choose() -> Any:
        return legal(action_space, env.observation)

    _seed_globally(0)
    env.reset(seed=0)
    if isinstance(cannot := env.saved(), str):
        return cannot
    for _ in range(7):
        _do(env, choose())
    env.reset()  # `replay` resets twice: not the same number of times
    env.reset()
    start = env.saved()
    if isinstance(start, str):
        return start
    actions: list[Any] = []
    seen: list[Any] = []
    ends_at = time.perf_counter() + seconds
    while len(actions) < min_steps or (len(actions) < max_steps and time.perf_counter() < ends_at):
        actions.append(choose())
        seen.append(_do(env, actions[-1]))
    actions.append(None)  # a reset, which the episode may not reach by itself
    seen.append(_do(env, None))
    actions.append(choose())
    seen.append(_do(env, actions[-1]))

    _seed_globally(1)  # what an environment draws from there must not agree
    other.episode = start
    why_not, _ = other.replay()
    if why_not is not None:
        return f"{why_not}: {_BEYOND}"
    for number, (action, expected) in enumerate(zip(actions, seen), 1):
        if _do(other, action) != expected:
            return f"an episode that was played again differed at step {number}: {_BEYOND}"
    same = env.fingerprint() == other.fingerprint()
    return None if same else "an episode that was played again left a generator in another state"


def _do(env: Recorder, action: Any) -> Any:
    """Everything seen in a step, and in the reset that it asks for; without an action, in a reset."""
    if action is None:
        return _bits(env.reset()[0])
    observation, reward, terminated, truncated, _ = env.step(copy.deepcopy(action))
    seen = _bits(observation), _bits(reward), bool(terminated), bool(truncated)
    return seen + ((_bits(env.reset()[0]),) if terminated or truncated else ())


def _bits(value: Any) -> list[Any]:
    return [(leaf.dtype.str, leaf.shape, leaf.tobytes()) for leaf in leaves(value)]


def _seed_globally(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002


def legal_action(space: gym.Space, observation: Any) -> Any:
    """A random action of the space that the observation's `action_mask` allows, where it has one.

    The mask of one environment has an entry for each choice of each head, in one array or one per head.
    """
    mask = observation.get("action_mask") if isinstance(observation, Mapping) else None
    if mask is None:
        return space.sample()
    spec = ActionSpec(space)
    if isinstance(mask, Mapping | tuple):
        masks = _by_name(mask)
    else:
        masks = dict(zip(spec.names, np.split(np.ravel(mask), np.cumsum(spec.nvec)[:-1])))
    allowed = [np.flatnonzero(masks.get(name, np.ones(n))) for name, n in zip(spec.names, spec.nvec)]
    choices = [space.np_random.choice(indices) for indices in allowed]
    numbers = space.np_random.uniform(-1.0, 1.0, sum(spec.box_sizes))
    actions = torch.from_numpy(np.concatenate([choices, numbers])[None])
    return next(iterate(batch_space(space, 1), spec.to_env(actions, numpy=True)))


def _by_name(mask: Any, path: tuple[str, ...] = ()) -> dict[str, Any]:
    """Arrays by the name of their head, out of a mask that is nested as the actions are."""
    if isinstance(mask, Mapping | tuple):
        parts = mask.items() if isinstance(mask, Mapping) else enumerate(mask)
        return {name: own for key, part in parts for name, own in _by_name(part, (*path, str(key))).items()}
    return {"/".join(path): mask}
