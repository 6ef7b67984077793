"""Saved states of environments, and whether one goes on from its own; `object_graph` says what is saved and how."""

from __future__ import annotations

import copy
import random
import time
import types
from collections.abc import Callable, Iterable
from typing import Any

import gymnasium as gym
import numpy as np

from dualhead.storage import CheckpointError
from dualhead.worlds.object_graph import CannotSnapshot, Snapshot, capture, restore


def capture_process(**parts: Any) -> Snapshot:
    """State of several things together, and of this process's `random` and NumPy's global generator.

    Some environments draw from those.
    """
    return capture(types.SimpleNamespace(**parts, randomness=_global_randomness()))


def restore_process(snapshot: Snapshot, *, source: str = "snapshot", **parts: Any) -> types.SimpleNamespace:
    """Takes back what `capture_process` gave; see `restore`. The restored parts by name."""
    restored = restore(snapshot, types.SimpleNamespace(**parts, randomness=None), source=source)
    try:
        _set_global_randomness(restored.randomness)
        if missing := parts.keys() - vars(restored):
            raise ValueError(f"it lacks {sorted(missing)}")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{source} holds no state of this environment: {error!r}") from error
    return restored


def seed_spaces(env: gym.Env, seed: int) -> None:
    """Seeds the spaces of an environment and of the wrappers around it.

    Gymnasium seeds them by the system, at times without being asked: an environment that draws from its own spaces
    would not repeat, and no two states of the same moment would have the same bytes.
    """
    layer = env
    while True:
        layer.action_space.seed(seed)
        layer.observation_space.seed(seed)
        if not isinstance(layer, gym.Wrapper):
            return
        layer = layer.env


class SnapshotWrapper(gym.Wrapper):
    """Lets a vector environment reach the state of an environment in another process, by `call` and `set_attr`."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """With a seed, of the process's global generators too: Python seeds `random` by the system after a fork."""
        if seed is not None:
            random.seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002
            seed_spaces(self.env, seed)
        return self.env.reset(seed=seed, options=options)

    def take_snapshot(self) -> Snapshot | str:
        """State of the environment and of this process's global generators, or why there is none."""
        try:
            return capture_process(env=self.env)
        except CannotSnapshot as error:  # an error would end the process
            return str(error)

    @property
    def snapshot(self) -> None:
        """Setting it restores what `take_snapshot` gave."""

    @snapshot.setter
    def snapshot(self, given: Snapshot) -> None:
        restore_process(given, source="checkpoint", env=self.env)


def can_snapshot(
    make_env: Callable[[], gym.Env], *, min_steps: int = 20, max_steps: int = 300, seconds: float = 0.3
) -> str | None:
    """Tries whether an environment goes on from a snapshot with the same bits.

    Plays a little at random, restores a snapshot into a second environment, and plays both with the same actions,
    across a reset at least. Global generators are left as they were.

    Args:
        make_env: makes the environment.
        min_steps, max_steps: of the comparison.
        seconds: after which the comparison ends once `min_steps` are done; it takes this twice.

    Returns:
        None if every observation, reward and flag agreed, else the reason in words.
    """
    before = _global_randomness()
    made: list[gym.Env] = []
    try:
        return _try_snapshot(make_env, made, min_steps=min_steps, max_steps=max_steps, seconds=seconds)
    except (CannotSnapshot, CheckpointError) as error:
        return str(error)
    except Exception as error:  # whatever an environment may raise: it only costs the exact resume
        return f"trying it raised {type(error).__name__}: {error}"
    finally:
        for env in made:
            env.close()
        _set_global_randomness(before)


def _try_snapshot(
    make_env: Callable[[], gym.Env], made: list[gym.Env], *, min_steps: int, max_steps: int, seconds: float
) -> str | None:
    env = make_env()
    made.append(env)
    env.reset(seed=0)
    actions = copy.deepcopy(env.action_space)
    actions.seed(0)
    for _ in range(7):
        _, _, terminated, truncated, _ = env.step(actions.sample())
        if terminated or truncated:
            env.reset()
    snapshot = capture_process(env=env)

    chosen: list[Any] = []
    seen: list[Snapshot] = []
    ends_at = time.perf_counter() + seconds
    while len(chosen) < min_steps or (len(chosen) < max_steps and time.perf_counter() < ends_at):
        chosen.append(actions.sample())
        seen.extend(_play(env, chosen[-1]))
    seen.append(_seen(env.reset()[0]))
    chosen.append(actions.sample())
    seen.extend(_play(env, chosen[-1]))
    capture_process(env=env)

    other = make_env()
    made.append(other)
    other.reset(seed=1)
    restore_process(snapshot, env=other)
    compared = 0
    for number, action in enumerate(chosen, 1):
        if number == len(chosen):
            again = [_seen(other.reset()[0])]
            again.extend(_play(other, action))
        else:
            again = list(_play(other, action))
        if again != seen[compared : compared + len(again)]:
            return f"step {number} after a restored snapshot differed: it has state that was not found"
        compared += len(again)
    return None


def _play(env: gym.Env, action: Any) -> Iterable[Snapshot]:
    """One step, and the reset that it may ask for, as bits to compare."""
    observation, reward, terminated, truncated, _ = env.step(copy.deepcopy(action))
    yield _seen((observation, reward, terminated, truncated))
    if terminated or truncated:
        yield _seen(env.reset()[0])


def _seen(value: Any) -> Snapshot:
    # Of a copy: a view would bring the whole array that it is cut from.
    return capture(copy.deepcopy(value), name="observation")


def _global_randomness() -> tuple[Any, ...]:
    version, words, gauss = random.getstate()
    return (version, np.array(words, np.uint32), gauss), np.random.get_state(legacy=False)  # noqa: NPY002


def _set_global_randomness(state: Any) -> None:
    (version, words, gauss), of_numpy = state
    random.setstate((version, tuple(words.tolist()), gauss))
    np.random.set_state(of_numpy)  # noqa: NPY002
