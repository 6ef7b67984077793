"""What an agent is, as named tensors and JSON: taken, checked, and put back."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dualhead.config import Config, NetworkConfig, NormConfig, PPOConfig
from dualhead.learning.rollout import Rollout
from dualhead.spaces import space_from_json, space_to_json
from dualhead.storage import (
    RUN_PREFIX,
    CheckpointError,
    check_fit,
    fill,
    read_tensors,
    with_prefix,
)

if TYPE_CHECKING:
    from dualhead.agent import DualHeadRecurrentPPO

_SHAPING_SETTINGS = ("rollout_length", "burn_in", "normalize_observations", "normalize_rewards")
"""Settings that decide which tensors a checkpoint holds; the others may differ between save and load."""
_OF_THE_POLICY = ("network", "foreign_parts", "observation_space", "action_space", "dtype")
"""Entries of the metadata that must agree for weights to mean the same."""


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The agent's tensors and metadata from a file; those of the run around it are left out.

    Raises:
        CheckpointError: unreadable, truncated, or of several agents.
    """
    tensors, metadata = read_tensors(path)
    if "learners" in metadata:
        raise CheckpointError(f"{path} holds an agent for each of several places: expected the file of one agent")
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{RUN_PREFIX}/")}, metadata


def take(agent: DualHeadRecurrentPPO) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Copies of everything the agent is: tensors by name, and JSON metadata."""
    rollout = agent.rollout_memory
    tensors = {name: tensor.detach().clone() for name, tensor in live_tensors(agent).items()}
    return tensors, _description(agent) | {
        "device": agent.device.type,
        "num_steps": agent.num_steps,
        "num_updates": agent.num_updates,
        "rollout": [rollout.length, rollout.tail_length],
        "num_skipped": agent._num_skipped,
    }


def _description(agent: DualHeadRecurrentPPO) -> dict[str, Any]:
    """What the agent was made of, as its constructor takes it."""
    return {
        "network": agent.network.model_dump(),
        "foreign_parts": agent.policy.foreign_parts,
        "config": agent.config.model_dump(),
        "norms": None if agent.norm_config is None else agent.norm_config.model_dump(),
        "observation_space": space_to_json(agent.observation_spec.space),
        "action_space": space_to_json(agent.action_spec.space),
        "num_streams": agent.num_streams,
        "dtype": str(agent.policy.dtype),
    }


def arguments(metadata: dict[str, Any], *, source: str) -> dict[str, Any]:
    """Arguments of the constructor that made the agent of these metadata, but for parts of its own.

    Raises:
        CheckpointError: an entry is missing or of the wrong kind.
    """
    try:
        norms = metadata["norms"]
        dtype = getattr(torch, str(metadata["dtype"]).removeprefix("torch."), None)
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype: expected torch.float32 or torch.float64, got {metadata['dtype']!r}")
        return {
            "observation_space": space_from_json(metadata["observation_space"]),
            "action_space": space_from_json(metadata["action_space"]),
            "num_streams": int(metadata["num_streams"]),
            "config": _settings(PPOConfig, metadata["config"]),
            "network": _settings(NetworkConfig, metadata["network"]),
            "norms": None if norms is None else _settings(NormConfig, norms),
            "dtype": dtype,
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{source} does not describe its agent: {error}") from error


def _settings(kind: type[Config], saved: dict[str, Any]) -> Config:
    missing = kind.model_fields.keys() - saved.keys()
    if missing:
        raise ValueError(f"{kind.__name__} without {', '.join(sorted(missing))}")
    return kind(**saved)


def foreign_arguments(metadata: dict[str, Any], *, source: str, **given: Any) -> dict[str, Any]:
    """The parts of its own that an agent needs, as given; a part that is missing, or not wanted, is refused.

    Raises:
        CheckpointError: names the part, and says how to pass it.
    """
    saved = metadata.get("foreign_parts") or {}
    for name, part in given.items():
        if name in saved and part is None:
            how = f"{name}={str(saved[name]).rpartition(':')[2]}, or --{name} {saved[name]} on the command line"
            raise CheckpointError(
                f"{source} was saved with the {name} {saved[name]}, which is not part of dualhead and is not imported "
                f"by itself: pass it, {how}"
            )
        if name not in saved and part is not None:
            raise CheckpointError(f"{source} was saved with dualhead's own {name}: expected {name}=None, got {part!r}")
    return {name: part for name, part in given.items() if part is not None}


def check(agent: DualHeadRecurrentPPO, tensors: dict[str, Tensor], metadata: dict[str, Any], *, source: str) -> None:
    """Whether `restore` would take this.

    Raises:
        CheckpointError: see `DualHeadRecurrentPPO.check`.
    """
    _expect_same(agent, metadata, (*_OF_THE_POLICY, "num_streams"), source=source)
    if (arguments(metadata, source=source)["norms"] is None) != (agent.norms is None):
        raise CheckpointError(f"{source} is of another architecture: its norms are {metadata['norms']}")
    saved = metadata.get("config")
    for name in _SHAPING_SETTINGS:
        given, ours = (saved.get(name) if isinstance(saved, dict) else None), getattr(agent.config, name)
        if given != ours:
            raise CheckpointError(f"{source} is of another architecture: its {name} is {given}, expected {ours}")
    _counters(metadata, agent.rollout_memory, source=source)
    if not isinstance(metadata.get("device"), str):
        raise CheckpointError(f"{source} does not say which device it is from: {metadata.get('device')!r}")
    ours_now = live_tensors(agent)
    if metadata["device"] != agent.device.type and "rng/sampling" in tensors:
        # Generators of other devices have other states.
        tensors = {**tensors, "rng/sampling": ours_now["rng/sampling"]}
    check_fit(ours_now, tensors, what=source)
    for name, generator in (("rng/sampling", agent._sampling), ("rng/shuffling", agent._shuffling)):
        try:
            torch.Generator(generator.device).set_state(tensors[name])
        except RuntimeError as error:
            raise CheckpointError(f"{source}: {name} is no state of a generator: {error}") from error


def _expect_same(agent: DualHeadRecurrentPPO, metadata: dict[str, Any], names: tuple[str, ...], *, source: str) -> None:
    ours = _description(agent)
    for name in names:
        given, mine = metadata.get(name), ours[name]
        if name == "foreign_parts" and isinstance(given, dict):
            # The module is where a class was found that day; a script's is __main__.
            given, mine = ({part: str(of).rpartition(":")[2] for part, of in parts.items()} for parts in (given, mine))
        # As JSON, where a tuple is a list and 1 is not True.
        if json.dumps(given, sort_keys=True) != json.dumps(mine, sort_keys=True):
            raise CheckpointError(f"{source} is of another architecture: its {name} is {given}, expected {mine}")


def restore(agent: DualHeadRecurrentPPO, tensors: dict[str, Tensor], metadata: dict[str, Any], *, source: str) -> None:
    """Puts back what `take` gave; nothing changes where it does not fit.

    Raises:
        CheckpointError: see `DualHeadRecurrentPPO.check`.
    """
    check(agent, tensors, metadata, source=source)
    if metadata["device"] != agent.device.type:
        tensors = {**tensors, "rng/sampling": agent._sampling.get_state()}
    fill(live_tensors(agent), tensors, what=source)
    agent._sampling.set_state(tensors["rng/sampling"])
    agent._shuffling.set_state(tensors["rng/shuffling"])
    rollout = agent.rollout_memory
    agent.num_steps, agent.num_updates, agent._num_skipped, rollout.length, rollout.tail_length = _counters(
        metadata, rollout, source=source
    )


def warm_start(
    agent: DualHeadRecurrentPPO, tensors: dict[str, Tensor], metadata: dict[str, Any], *, source: str
) -> None:
    """Puts back weights, moments and scales alone; see `DualHeadRecurrentPPO.warm_start`.

    Raises:
        CheckpointError: they do not fit.
    """
    _expect_same(agent, metadata, _OF_THE_POLICY, source=source)
    fill(*(_learned(named) for named in (live_tensors(agent), tensors)), what=source)


def _learned(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    kept = ("policy/", "optimizer/", "reward_scale/statistics.")
    return {name: tensor for name, tensor in tensors.items() if name.startswith(kept)}


def live_tensors(agent: DualHeadRecurrentPPO) -> dict[str, Tensor]:
    """Everything by name: the tensors themselves, not copies, but for the generators' states."""
    tensors = with_prefix("policy", agent.policy.state_dict(keep_vars=True))
    for name, parameter in agent.policy.trainable().items():
        moments = agent.optimizer.state[parameter]
        if not moments:  # Adam makes its zero moments at the first step; there must be something to load into
            moments["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            moments["exp_avg"], moments["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        tensors |= with_prefix(f"optimizer/{name}", moments)
    tensors |= with_prefix("state", agent._get_hidden_state().parts | agent._previous)
    tensors["state/episode_starts"] = agent._episode_starts
    for prefix, module in (("norms", agent.norms), ("reward_scale", agent.reward_scale)):
        if module is not None:
            tensors |= with_prefix(prefix, module.state_dict(keep_vars=True))
    tensors |= with_prefix("rollout", agent.rollout_memory.tensors())
    return tensors | {"rng/sampling": agent._sampling.get_state(), "rng/shuffling": agent._shuffling.get_state()}


def _counters(metadata: dict[str, Any], memory: Rollout, *, source: str) -> tuple[int, ...]:
    """num_steps, num_updates, num_skipped, and the rollout's length and tail_length."""
    rollout = metadata.get("rollout")
    filled: list[Any] = rollout if isinstance(rollout, list) and len(rollout) == 2 else [None, None]
    counters = (
        ("num_steps", metadata.get("num_steps"), None),
        ("num_updates", metadata.get("num_updates"), None),
        ("num_skipped", metadata.get("num_skipped"), None),
        ("rollout", filled[0], memory.rollout_length),
        ("rollout", filled[1], memory.max_tail),
    )
    for name, count, most in counters:
        if type(count) is not int or count < 0 or (most is not None and count > most):
            raise CheckpointError(f"{source} has no valid {name} (found {metadata.get(name)!r})")
    return tuple(int(count or 0) for _, count, _ in counters)
