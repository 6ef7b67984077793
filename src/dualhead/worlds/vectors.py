"""Several Gymnasium environments as one, in SAME_STEP mode, whose episodes in progress can be saved."""

from __future__ import annotations

import copy
import ctypes
import functools
import multiprocessing.util
import os
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.process import BaseProcess
from numbers import Real
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.vector.async_vector_env import AsyncState
from gymnasium.vector.utils import batch_space, concatenate, iterate
from numpy.typing import NDArray

from dualhead.errors import EnvironmentFailed
from dualhead.worlds.replay import Recorder, action_bytes, layers_of, leaves
from dualhead.worlds.replay_trial import legal_action

_OURS = ("r", "l", "t")
"""What `RecordEpisodeStatistics` says of an episode is counted here anyway."""
_OF_THE_RUN = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
"""Signals that a whole process group gets and that only the run answers to: its environments finish the step."""
_SECONDS_TO_CLOSE, _SECONDS_IF_BUSY = 5.0, 0.5
"""Until a process is killed: one that waits for a command, and one that has not answered the last."""


class LeanSyncVectorEnv(SyncVectorEnv):
    """Gymnasium's SyncVectorEnv in SAME_STEP mode, of `Recorder`s, without what learning does not use.

    Infos carry only `final_obs` and the numbers of episodes that ended, and returned arrays are overwritten by the next
    step: on small environments those two cost more than the environments themselves.

    Args:
        first_number: of the first environment, in messages.

    Attributes:
        makers: of the environments without their recorders.
    """

    envs: list[Recorder]  # type: ignore[assignment]

    def __init__(
        self, env_fns: Sequence[Callable[[], gym.Env]], *, observation_mode: Any = "same", first_number: int = 0
    ) -> None:
        recorders = [functools.partial(_recorded, env_fn) for env_fn in env_fns]
        super().__init__(
            recorders, copy=False, observation_mode=observation_mode, autoreset_mode=AutoresetMode.SAME_STEP
        )
        self.makers, self._first_number = env_fns, first_number
        self._plain = isinstance(self.single_observation_space, gym.spaces.Box | gym.spaces.Discrete)
        self._size = self._observations[0].size if self._plain else 0

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        infos: dict[str, Any] = {}
        rows, plain, size = self._observations, self._plain, self._size
        # Lists are filled faster than arrays.
        rewards, terminations, truncations = [], [], []
        in_bytes = action_bytes(self.envs[0].row, actions, self.num_envs)
        i = 0
        try:
            for i, (recorder, action, row) in enumerate(zip(self.envs, iterate(self.action_space, actions), in_bytes)):
                # As `Recorder.step` does, without the time that a call takes.
                recorded = recorder.actions
                if len(recorded) <= recorder.max_bytes:
                    recorded += row
                observation, reward, terminated, truncated, info = recorder.env.step(action)
                rewards.append(reward)
                terminations.append(terminated)
                truncations.append(truncated)
                if terminated or truncated:
                    if not infos:
                        infos["final_obs"] = np.full(self.num_envs, None, dtype=object)
                    # reset() may write to the same arrays.
                    is_array = type(observation) is np.ndarray
                    infos["final_obs"][i] = observation.copy() if is_array else copy.deepcopy(observation)
                    if numbers := _numbers(info):
                        infos = self._add_info(infos, {"final_info": numbers}, i)
                    observation, _ = recorder.reset()
                recorder.observation = observation
                if not plain:
                    self._env_obs[i] = observation
                elif type(observation) is np.ndarray and observation.size != size:  # one number would fill the row
                    raise ValueError(f"observation: expected shape {rows[i].shape}, got {observation.shape}")
                else:
                    rows[i] = observation
        except (Exception, SystemExit) as error:
            raise EnvironmentFailed(f"environment {self._first_number + i} {_described(error)}") from error
        if not plain:
            self._concatenate(rows)
        self._rewards[:], self._terminations[:], self._truncations[:] = rewards, terminations, truncations
        return rows, self._rewards, self._terminations, self._truncations, infos

    def _concatenate(self, rows: Any) -> None:
        space = self.single_observation_space
        try:
            concatenate(space, self._env_obs, rows)
        except Exception as error:
            first = self._first_number
            wrong = [i for i, observation in enumerate(self._env_obs, first) if not space.contains(observation)]
            who = f"environment {wrong[0]}" if wrong else "an environment"
            raise EnvironmentFailed(f"{who}: expected an observation of {space}: {error}") from error


class RecordedAsyncVectorEnv(VectorEnv):
    """Environments in other processes: each process steps an equal share of them, in a `LeanSyncVectorEnv`.

    Args:
        num_workers: processes; None: one for each environment.

    Attributes:
        makers: of the environments without their recorders.

    Raises:
        ValueError: the shares would not be equal.
        EnvironmentFailed: by any call: an environment raised an error, or its process ended.
    """

    def __init__(self, env_fns: Sequence[Callable[[], gym.Env]], *, num_workers: int | None = None) -> None:
        self.num_envs, self.makers = len(env_fns), env_fns
        num_workers = num_workers or self.num_envs
        if self.num_envs % num_workers:
            raise ValueError(f"num_workers: expected a divisor of num_envs={self.num_envs}, got {num_workers}")
        env = env_fns[0]()  # its errors are clearer from this process
        self.metadata = {**env.metadata, "autoreset_mode": AutoresetMode.SAME_STEP}
        self.single_observation_space, self.single_action_space = env.observation_space, env.action_space
        env.close()
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self._size = self.num_envs // num_workers
        self._shares = _Processes(env_fns, self._size)
        self.processes = self._shares.processes

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begins an episode in each environment.

        Args:
            seed: one for each environment, or None.
            options: not used.
        """
        seeds = None if seed is None else self._of_shares(seed)
        return self._joined(self._shares.reset(seed=seeds)[0]), {}

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        num_shares, size = self._shares.num_envs, self._size
        of_shares = _mapped(lambda leaf: leaf.reshape(num_shares, size, *leaf.shape[1:]), actions)
        observations, *outcome, of_ended = self._shares.step(of_shares)
        infos: dict[str, Any] = {}
        for number, ended in enumerate(of_ended.get("ended", ())):
            for i, info in ended or ():
                infos = self._add_info(infos, info, number * size + i)
        rewards, terminated, truncated = (values.reshape(self.num_envs) for values in outcome)
        return self._joined(observations), rewards, terminated, truncated, infos

    def call(self, name: str, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """What the recorders' method gives, of each environment."""
        return tuple(
            of_env for of_share in self._shares.call("call_each", name, *args, **kwargs) for of_env in of_share
        )

    def set_attr(self, name: str, values: Any) -> None:
        """Sets an attribute of the recorders, to one of the values each."""
        self._shares.set_attr("each", [(name, part) for part in self._of_shares(values)])

    def close_extras(self, **how: Any) -> None:
        if hasattr(self, "_shares"):  # they could be made
            self._shares.close(**how)

    def _of_shares(self, values: Sequence[Any]) -> list[Sequence[Any]]:
        return [values[i : i + self._size] for i in range(0, self.num_envs, self._size)]

    def _joined(self, observations: Any) -> Any:
        return _mapped(lambda leaf: leaf.reshape(self.num_envs, *leaf.shape[2:]), observations)


class _Processes(AsyncVectorEnv):
    """Gymnasium's AsyncVectorEnv, of `_Share`s, which says whose environments failed and lets no process linger."""

    def __init__(self, env_fns: Sequence[Callable[[], gym.Env]], size: int) -> None:
        # Linux counts the thread that made a process as its parent: only the main one lives as long as the process.
        ends_with_thread = threading.current_thread() is threading.main_thread()
        make = functools.partial(_Share, parent=os.getpid(), ends_with_thread=ends_with_thread)
        firsts = range(0, len(env_fns), size)
        self._names = [f"environment {i}" if size == 1 else f"environments {i} to {i + size - 1}" for i in firsts]
        shares = [functools.partial(make, env_fns[i : i + size], i, name) for i, name in zip(firsts, self._names)]
        with self._naming_the_dead():
            super().__init__(shares, autoreset_mode=AutoresetMode.DISABLED)
        # At its exit Python waits for processes that it only sent a SIGTERM.
        multiprocessing.util.Finalize(self, _kill, args=(self.processes,), exitpriority=0)

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        with self._naming_the_dead():
            return super().step(actions)

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        with self._naming_the_dead():
            return super().reset(seed=seed, options=options)

    def call(self, name: str, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        with self._naming_the_dead():
            return super().call(name, *args, **kwargs)

    def set_attr(self, name: str, values: Any) -> None:
        with self._naming_the_dead():
            super().set_attr(name, values)

    def close_extras(self, timeout: float | None = None, terminate: bool = False) -> None:
        """Lets the environments close, and kills the processes that do not end in time."""
        seconds = _SECONDS_TO_CLOSE if self._state is AsyncState.DEFAULT else _SECONDS_IF_BUSY
        ends_at = time.perf_counter() + (0.0 if terminate else seconds)
        try:
            for pipe in self.parent_pipes:
                with suppress(OSError):  # of a process that has ended
                    pipe.send(("close", None))
            for process in self.processes:
                process.join(max(0.0, ends_at - time.perf_counter()))
        finally:
            _kill(self.processes)
            for pipe in self.parent_pipes:
                pipe.close()

    @contextmanager
    def _naming_the_dead(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, ConnectionError) as error:
            time.sleep(0.1)  # its pipe closes a moment before it ends
            ended = [(who, process.exitcode) for who, process in zip(self._names, self.processes)]
            who = ", ".join(
                f"{who} (killed by {signal.Signals(-code).name})" if code < 0 else f"{who} (exit status {code})"
                for who, code in ended
                if code is not None
            )
            raise EnvironmentFailed(f"the process of {who or 'an environment'} ended") from error

    def _raise_if_errors(self, successes: Iterable[bool]) -> None:
        """Gymnasium raises the first error of a process, too, but does not say whose it was."""
        if not all(successes):
            number, kind, error, _ = self.error_queue.get()
            of = self._names[number]
            raise EnvironmentFailed(
                str(error) if kind is EnvironmentFailed else f"{of} raised {kind.__name__}: {error}"
            )


class KeepsFinalObservation(gym.Wrapper):
    """Copies the observation that ends an episode, so that a reset which writes to the same arrays leaves it alone."""

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        if terminated or truncated:
            observation = copy.deepcopy(observation)
        return observation, reward, terminated, truncated, info


class _Share(gym.Env):
    """Some environments in a process of their own, stepped together: a seed is for its global generators, too.

    Python seeds `random` by the system after a fork. Errors leave it as text: others may not fit through a pipe.

    Attributes:
        each: name of an attribute and its values, of each environment.
    """

    def __init__(
        self, env_fns: Sequence[Callable[[], gym.Env]], first: int, name: str, *, parent: int, ends_with_thread: bool
    ) -> None:
        if os.getpid() != parent:  # an AsyncVectorEnv makes one here, too, to see its spaces
            for number in _OF_THE_RUN:
                if hasattr(signal, number):
                    signal.signal(getattr(signal, number), signal.SIG_IGN)
            _end_with_parent(by_system=ends_with_thread)
        self._name = name
        self._envs = LeanSyncVectorEnv(env_fns, first_number=first)
        self.observation_space, self.action_space = self._envs.observation_space, self._envs.action_space

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        if seed is not None:
            random.seed(seed[0])
            np.random.seed(seed[0] % 2**32)  # noqa: NPY002
        try:
            return self._envs.reset(seed=seed)[0], {}
        except (Exception, SystemExit) as error:
            raise EnvironmentFailed(f"{self._name} {_described(error)}") from None

    def step(self, action: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        try:
            *outcome, infos = self._envs.step(action)
        except EnvironmentFailed as error:
            raise EnvironmentFailed(str(error)) from None
        if not infos:
            return (*outcome, {})
        numbers = infos.get("final_info", {})
        ended = []
        for i, observation in enumerate(infos["final_obs"]):
            if observation is not None:
                own = {name: values[i] for name, values in numbers.items() if f"_{name}" in numbers}
                own = {name: value for name, value in own.items() if numbers[f"_{name}"][i]}
                ended.append((i, {"final_obs": observation} | ({"final_info": own} if own else {})))
        return (*outcome, {"ended": tuple(ended)})

    def call_each(self, name: str, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        return self._envs.call(name, *args, **kwargs)

    @property
    def each(self) -> tuple[str, Any]:
        raise NotImplementedError

    @each.setter
    def each(self, given: tuple[str, Any]) -> None:
        self._envs.set_attr(*given)

    def close(self) -> None:
        self._envs.close()


def _mapped(change: Callable[[NDArray[Any]], Any], value: Any) -> Any:
    """Batched observations or actions with every array changed."""
    if isinstance(value, dict):
        return {key: _mapped(change, part) for key, part in value.items()}
    return tuple(_mapped(change, part) for part in value) if isinstance(value, tuple) else change(np.asarray(value))


def _recorded(env_fn: Callable[[], gym.Env]) -> Recorder:
    return Recorder(env_fn())


def _end_with_parent(*, by_system: bool) -> None:
    """Ends this process when its parent ends, on Linux `by_system` even while it is stopped or hangs in C."""
    if by_system and sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _kill(processes: Sequence[BaseProcess]) -> None:
    for process in processes:
        if process.is_alive():
            process.kill()
            process.join()


def _described(error: BaseException) -> str:
    """What an environment raised, and where."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"raised {type(error).__name__}: {error} ({where.filename}, line {where.lineno})"


def with_final_observations(envs: VectorEnv) -> VectorEnv:
    """A vector environment in SAME_STEP mode whose `final_obs` no reset overwrites: see `GymnasiumStreams`."""
    inner = envs.unwrapped
    if type(envs) is SyncVectorEnv:
        made = [functools.partial(envs.envs.__getitem__, i) for i in range(envs.num_envs)]
        lean = LeanSyncVectorEnv(made, observation_mode=envs.observation_mode)
        lean.makers = envs.env_fns
        return lean
    if isinstance(inner, SyncVectorEnv) and not isinstance(inner, LeanSyncVectorEnv):
        inner.envs = [KeepsFinalObservation(env) for env in inner.envs]
    elif isinstance(inner, AsyncVectorEnv) and not isinstance(inner, RecordedAsyncVectorEnv):
        _refuse_overwritten(inner.env_fns[0])
    return envs


def _numbers(info: dict[str, Any]) -> dict[str, float]:
    """The numbers in the `info` of an episode's last step: at its top, and under `episode`."""
    of_episode = info.get("episode")
    inner = {n: v for n, v in of_episode.items() if n not in _OURS} if isinstance(of_episode, dict) else {}
    return {name: float(v) for name, v in (info | inner).items() if isinstance(v, Real | np.bool_)}


def episode_numbers(final_info: Any) -> dict[str, NDArray[np.float64]] | None:
    """The same by name [B], NaN where an episode goes on, from `infos["final_info"]` of a vector environment."""
    if not isinstance(final_info, dict):
        return None
    found = {}
    of_episode = final_info.get("episode")
    for infos, left_out in ((final_info, ()), (of_episode if isinstance(of_episode, dict) else {}, _OURS)):
        for name, values in infos.items():
            mask = infos.get(f"_{name}")  # who has one
            is_numbers = isinstance(values, np.ndarray) and values.ndim == 1 and values.dtype.kind in "biuf"
            if is_numbers and isinstance(mask, np.ndarray) and name not in left_out:
                found[name] = np.where(mask, values, np.nan)
    return found or None


def _refuse_overwritten(env_fn: Callable[[], gym.Env]) -> None:
    """Refuses environments whose reset returns arrays in the memory of those that the step before it returned."""
    env = env_fn()
    try:
        if any(isinstance(layer, KeepsFinalObservation) for layer in layers_of(env)):
            return
        action_space = copy.deepcopy(env.action_space)
        action_space.seed(0)
        before, _ = env.reset(seed=0)
        before = env.step(legal_action(action_space, before))[0]
        after, _ = env.reset()
    finally:
        env.close()
    if any(np.shares_memory(a, b) for a, b in zip(leaves(before), leaves(after))):
        raise ValueError(
            "the reset of these environments overwrites the observation that their last step returned, and "
            "AsyncVectorEnv copies it too late: wrap each environment in dualhead.worlds.vectors."
            "KeepsFinalObservation, or use make_streams(make_env, num_envs, vectorization='async')"
        )
