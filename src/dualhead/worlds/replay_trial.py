"""Whether an environment can be replayed, found by trying; see `replay`."""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable, Mapping
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from dualhead.worlds.replay import Beginnings, CannotReplay, as_row, leaf_spaces, leaves
from dualhead.worlds.replay_files import global_randomness, set_global_randomness


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
    before = global_randomness()
    made: list[gym.Env] = []
    try:
        return _compare(make_env, made, min_steps=min_steps, max_steps=max_steps, seconds=seconds)
    except CannotReplay as error:
        return str(error)
    except Exception as error:  # whatever an environment may raise: it only costs the exact resume
        return f"trying it raised {type(error).__name__}: {error}"
    finally:
        for env in made:
            env.close()
        set_global_randomness(before)


def _compare(
    make_env: Callable[[], gym.Env], made: list[gym.Env], *, min_steps: int, max_steps: int, seconds: float
) -> str | None:
    env, other = make_env(), make_env()
    made += [env, other]
    if not leaf_spaces(env.action_space):
        return f"actions of {env.action_space} cannot be saved"
    action_space = copy.deepcopy(env.action_space)
    action_space.seed(0)
    _seed_globally(0)
    beginnings = Beginnings(env)
    observation = beginnings.reset(seed=0)
    for _ in range(7):
        observation, _, terminated, truncated, _ = env.step(legal_action(action_space, observation))
        if terminated or truncated:
            observation = beginnings.reset()

    beginnings.reset()  # `again` resets twice: not the same number of times
    observation = beginnings.reset()
    start = beginnings.start()
    actions: list[Any] = []
    seen: list[Any] = [_bits(observation)]
    ends_at = time.perf_counter() + seconds
    while len(actions) < min_steps or (len(actions) < max_steps and time.perf_counter() < ends_at):
        actions.append(legal_action(action_space, observation))
        observation = _step(beginnings, actions[-1], seen)
    observation = beginnings.reset()
    actions.append(legal_action(action_space, observation))
    seen.append(_bits(observation))
    observation = _step(beginnings, actions[-1], seen)
    seen.append(beginnings.fingerprint(as_row(env.observation_space, observation)))

    _seed_globally(1)  # what an environment draws from there must not agree
    beginnings = Beginnings(other)
    again: list[Any] = [_bits(beginnings.again(start))]
    for number, action in enumerate(actions, 1):
        if number == len(actions):
            again.append(_bits(beginnings.reset()))
        observation = _step(beginnings, action, again)
        if again != seen[: len(again)]:
            return (
                f"an episode that was played again differed at step {number}: it keeps state beyond an episode, or "
                f"draws from other generators than its np_random"
            )
    again.append(beginnings.fingerprint(as_row(other.observation_space, observation)))
    return None if again == seen else "an episode that was played again left a generator in another state"


def _step(beginnings: Beginnings, action: Any, seen: list[Any]) -> Any:
    """One step, and the reset that it may ask for; appends what is to be compared."""
    observation, reward, terminated, truncated, _ = beginnings.env.step(copy.deepcopy(action))
    seen.append((_bits(observation), _bits(reward), bool(terminated), bool(truncated)))
    if terminated or truncated:
        observation = beginnings.reset()
        seen.append(_bits(observation))
    return observation


def _bits(value: Any) -> list[Any]:
    return [(leaf.dtype.str, leaf.shape, leaf.tobytes()) for leaf in leaves(value)]


def _seed_globally(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002


def legal_action(space: gym.Space, observation: Any) -> Any:
    """A random action of the space that the observation's `action_mask` allows, where it has one.

    Args:
        space: of the actions; its generator is drawn from.
        observation: of one environment. Its mask is one array with an entry for each choice of each head, or a Dict of
            one array per head.
    """
    mask = observation.get("action_mask") if isinstance(observation, Mapping) else None
    if mask is None:
        return space.sample()
    by_name = {name: np.asarray(part, np.int8) for name, part in mask.items()} if isinstance(mask, Mapping) else None
    flat = np.zeros(0, np.int8) if by_name is not None else np.asarray(mask, np.int8).ravel()

    def take(name: str, n: int) -> NDArray[np.int8]:
        nonlocal flat
        if by_name is not None:
            return by_name.get(name, np.ones(n, np.int8))
        head, flat = flat[:n], flat[n:]
        return head

    def masks(part: gym.Space, name: str) -> Any:
        if isinstance(part, spaces.Discrete):
            return take(name, int(part.n))
        if isinstance(part, spaces.MultiDiscrete):
            return tuple(take(f"{name}_{i}", int(n)) for i, n in enumerate(part.nvec))
        if isinstance(part, spaces.Dict):
            return {key: masks(inner, key) for key, inner in part.items()}
        return None

    return space.sample(mask=masks(space, "head" if isinstance(space, spaces.MultiDiscrete) else "action"))
