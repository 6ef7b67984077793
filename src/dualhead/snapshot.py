"""What an agent is, as named tensors and JSON: taken, checked, and put back."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError
from torch import Tensor

from dualhead.config import COUNT_LIMIT, NetworkConfig, NormConfig, PPOConfig, flat, problems
from dualhead.errors import CheckpointError
from dualhead.networks.policy import RecurrentPolicy
from dualhead.spaces import ActionSpec, ObservationSpec, check_leaf, space_from_json, space_to_json
from dualhead.storage import RUN_PREFIX, Saved, can_write, check_fit, fill, read_tensors, with_prefix, without_prefix

if TYPE_CHECKING:
    from dualhead.agent import DualHeadRecurrentPPO

_OF_THE_POLICY = ("network", "foreign_parts", "observation_space", "action_space", "dtype")
"""Entries of the metadata that must agree for weights to mean the same."""
_NOT_NEGATIVE = ("/exp_avg_sq", "/step", ".variance", ".count")
_SHAPING = ("rollout_length", "burn_in", "normalize_observations", "normalize_rewards")
_OF_THE_AGENT = (*_OF_THE_POLICY, "num_streams", *(f"config.{setting}" for setting in _SHAPING))
"""Entries that decide which tensors a checkpoint holds; the others may differ between save and load."""
_BESIDES = (RUN_PREFIX, "score")
"""Entries beside the agent's: of the run around it, and of an evaluation."""
_EPISODE_STARTS = "episode_starts"

_Space = Annotated[Any, PlainValidator(space_from_json)]
_Count = Annotated[int, Field(strict=True, ge=0, lt=COUNT_LIMIT)]


class _Metadata(BaseModel):
    """What a checkpoint says of its agent."""

    model_config = ConfigDict(extra="forbid")

    network: NetworkConfig
    foreign_parts: dict[str, str]
    config: PPOConfig
    norms: NormConfig | None
    observation_space: _Space
    action_space: _Space
    num_streams: Annotated[int, Field(strict=True, ge=1, lt=COUNT_LIMIT)]
    dtype: Literal["torch.float32", "torch.float64"]
    device: str
    num_steps: _Count
    num_updates: _Count
    num_skipped: _Count
    rollout: tuple[_Count, _Count]
    """The rollout's length and tail_length."""


class _Together(Saved):
    """What a checkpoint says of independent learners."""

    num_steps: _Count
    learners: Annotated[list[dict[str, Any]], Field(min_length=1)]


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The agent's tensors and metadata from a file; those of the run around it are left out.

    Raises:
        CheckpointError: unreadable, truncated, or of several agents.
    """
    tensors, metadata = read_tensors(path)
    learners(tensors, metadata, source=str(path))
    if "learners" in metadata:
        raise CheckpointError(f"{path} holds an agent for each of several places: expected the file of one agent")
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{RUN_PREFIX}/")}, metadata


def take(agent: DualHeadRecurrentPPO, *, copy: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Everything the agent is: tensors by name, or copies of them, and JSON metadata."""
    tensors = {name: tensor.detach() for name, tensor in live_tensors(agent).items()}
    return {name: tensor.clone() if copy else tensor for name, tensor in tensors.items()}, _metadata(agent)


def _metadata(agent: DualHeadRecurrentPPO) -> dict[str, Any]:
    return {
        "network": agent.network.model_dump(),
        "foreign_parts": agent.policy.foreign_parts,
        "config": agent.config.model_dump(),
        "norms": None if agent.norm_config is None else agent.norm_config.model_dump(),
        "observation_space": space_to_json(agent.observation_spec.space),
        "action_space": space_to_json(agent.action_spec.space),
        "num_streams": agent.num_streams,
        "dtype": str(agent.policy.dtype),
        "device": agent.device.type,
        "num_steps": agent.num_steps,
        "num_updates": agent.num_updates,
        "num_skipped": agent._num_skipped,
        "rollout": [agent.rollout_memory.length, agent.rollout_memory.tail_length],
    }


def live_tensors(agent: DualHeadRecurrentPPO, *, rollout: tuple[int, int] | None = None) -> dict[str, Tensor]:
    """Everything by name: the tensors themselves, not copies, but for the generators' states.

    Args:
        rollout: its length and tail_length, which decide what is seen of its buffers; None: as they are.
    """
    tensors = with_prefix("policy", agent.policy.state_dict(keep_vars=True))
    for name, parameter in agent.policy.named_parameters():
        moments = agent.optimizer.state[parameter]
        if not moments and parameter.requires_grad:  # Adam makes them at the first step; loading needs them now
            moments["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            moments["exp_avg"], moments["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        tensors |= with_prefix(f"optimizer/{name}", moments)
    starts = {_EPISODE_STARTS: agent._episode_starts}
    tensors |= with_prefix("state", agent._get_hidden_state().parts | agent._previous | starts)
    for prefix, module in (("norms", agent.norms), ("reward_scale", agent.reward_scale)):
        if module is not None:
            tensors |= with_prefix(prefix, module.state_dict(keep_vars=True))
    memory = agent.rollout_memory
    tensors |= with_prefix("rollout", memory.tensors(*rollout or (memory.length, memory.tail_length)))
    return tensors | {"rng/sampling": agent._sampling.get_state(), "rng/shuffling": agent._shuffling.get_state()}


def check_savable(policy: RecurrentPolicy) -> None:
    """Refuses parts of the user's own that no checkpoint could hold.

    Raises:
        TypeError: complex weights, numbers that no file can hold, or a module with `get_extra_state`.
    """
    for name, value in (*policy.state_dict(keep_vars=True).items(), *policy.named_buffers()):
        if name.endswith("_extra_state"):
            raise TypeError(f"{name}: get_extra_state is not saved: keep what it gives in a buffer")
        if value.is_complex():
            raise TypeError(
                f"{name}: expected real numbers, got {value.dtype}: keep it as two real parameters or buffers"
            )
    for name, value in policy.initial_state(1).parts.items():
        if not can_write(value.dtype):
            raise TypeError(f"memory: the state's part {name!r} is {value.dtype}, which a checkpoint cannot hold")


def learners(
    tensors: dict[str, Tensor], metadata: dict[str, Any], *, source: str
) -> list[tuple[dict[str, Tensor], dict[str, Any]]]:
    """Tensors and metadata of each learner in a file: of its one agent, or of every independent one.

    Raises:
        CheckpointError: an entry is missing or of the wrong kind, or there are fewer streams than it says.
    """
    own = [(tensors, metadata)]
    if "learners" in metadata:
        parts = _Together.read({name: metadata.get(name) for name in ("num_steps", "learners")}, source=source).learners
        own = [(without_prefix(f"agent_{number}", tensors), part) for number, part in enumerate(parts)]
    for of_learner, part in own:
        num_streams, starts = _checked(part, source=source).num_streams, of_learner.get(f"state/{_EPISODE_STARTS}")
        if starts is None or starts.shape != (num_streams,):
            raise CheckpointError(f"{source} has no valid num_streams (found {num_streams}): its states are of others")
    return own


def num_streams(metadata: dict[str, Any]) -> int:
    """Of all learners in a file that `learners` has checked."""
    return sum(part["num_streams"] for part in metadata.get("learners", [metadata]))


def arguments(metadata: dict[str, Any], *, source: str) -> dict[str, Any]:
    """Arguments of the constructor that made the agent of these metadata, but for parts of its own.

    Raises:
        CheckpointError: an entry is missing or of the wrong kind.
    """
    saved = _checked(metadata, source=source)
    names = ("observation_space", "action_space", "num_streams", "config", "network", "norms")
    dtype = torch.float32 if saved.dtype == "torch.float32" else torch.float64
    return {name: getattr(saved, name) for name in names} | {"dtype": dtype}


def make_policy(
    arguments: dict[str, Any], tensors: dict[str, Tensor], parts: dict[str, Any], *, source: str
) -> RecurrentPolicy:
    """The policy of `arguments` with weights from a file's tensors, and with `parts` of the user's own.

    Raises:
        CheckpointError: they describe no possible policy, or one that the weights do not fit.
    """
    expect_weights(arguments, tensors, parts, source=source)
    with torch.random.fork_rng(devices=[]):  # the initial weights are overwritten
        made = _make(arguments, parts, source=source)
    fill(made.state_dict(keep_vars=True), without_prefix("policy", tensors), what=source)
    checked = dict(made.named_parameters()) | with_prefix("normalizer", dict(made.normalizer.named_buffers()))
    _check_numbers({f"policy/{name}": tensor for name, tensor in checked.items()}, source=source)
    return made


def expect_weights(
    arguments: dict[str, Any], tensors: dict[str, Tensor], parts: dict[str, Any], *, source: str
) -> None:
    """Raises CheckpointError where a file lacks the weights of `arguments`, without memory for what it only claims.

    Nothing is checked of a policy with parts of the user's own: what they do outside of memory is not known.
    """
    weights = without_prefix("policy", tensors)
    if arguments["network"].num_layers > len(weights):
        raise CheckpointError(f"{source} has no valid network: its num_layers are more than its {len(weights)} weights")
    if not parts:
        with torch.device("meta"):
            check_fit(_make(arguments, parts, source=source).state_dict(keep_vars=True), weights, what=source)


def _make(arguments: dict[str, Any], parts: dict[str, Any], *, source: str) -> RecurrentPolicy:
    try:
        return RecurrentPolicy(
            ObservationSpec(arguments["observation_space"]),
            ActionSpec(arguments["action_space"]),
            config=arguments["network"],
            normalize_observations=arguments["config"].normalize_observations,
            **parts,
        ).to(arguments["dtype"])
    except (TypeError, ValueError, RuntimeError, OverflowError, MemoryError, RecursionError) as error:
        raise CheckpointError(f"{source} describes no possible policy: {error!s:.500}") from error


def _check_numbers(tensors: dict[str, Tensor], *, source: str) -> None:
    """Raises CheckpointError for weights that are not finite, and for NaN or negative numbers in what scales steps."""
    for name, tensor in tensors.items():
        wrong = tensor.isnan() if not name.startswith("policy/") else ~tensor.isfinite()
        if name.endswith(_NOT_NEGATIVE):
            wrong |= tensor < 0
        if wrong.any():
            raise CheckpointError(f"{source} has no valid {name}: it holds {tensor[wrong][0].item()}")


def _checked(metadata: dict[str, Any], *, source: str) -> _Metadata:
    try:
        saved = _Metadata(**{name: entry for name, entry in metadata.items() if name not in _BESIDES})
    except ValidationError as error:
        name, message = problems(error)[0]
        raise CheckpointError(f"{source} has no valid {name}: {message.partition(', got')[0]}") from error
    for settings in (saved.network, saved.config, saved.norms):
        missing = () if settings is None else type(settings).model_fields.keys() - settings.model_fields_set
        if missing:
            raise CheckpointError(f"{source}: {type(settings).__name__} without {', '.join(sorted(missing))}")
    return saved


def foreign_arguments(metadata: dict[str, Any], *, source: str, **given: Any) -> dict[str, Any]:
    """The parts of its own that an agent needs, as given; a part that is missing, or not wanted, is refused.

    Raises:
        CheckpointError: names the part, and says how to pass it.
    """
    saved = metadata.get("foreign_parts") or {}
    for name, part in given.items():
        if name in saved and part is None:
            how = f"{name}={_class_name(saved[name])}, or --{name} {saved[name]} on the command line"
            raise CheckpointError(
                f"{source} was saved with the {name} {saved[name]}, which is not part of dualhead and is not imported "
                f"by itself: pass it, {how}"
            )
        if name not in saved and part is not None:
            raise CheckpointError(f"{source} was saved with dualhead's own {name}: expected {name}=None, got {part!r}")
    return {name: part for name, part in given.items() if part is not None}


def _class_name(saved: Any) -> str:
    """`Cell` of `module:function.<locals>.Cell`: what stays where a class moves."""
    return str(saved).replace(":", ".").rpartition(".")[2]


def check(
    agent: DualHeadRecurrentPPO, tensors: dict[str, Tensor], metadata: dict[str, Any], *, source: str
) -> tuple[dict[str, Tensor], _Metadata]:
    """What `restore` will put back, checked; see there."""
    _expect_same(agent, metadata, _OF_THE_AGENT, source=source)
    saved = _checked(metadata, source=source)
    if (saved.norms is None) != (agent.norms is None):
        raise CheckpointError(f"{source} is of another architecture: its norms are {saved.norms!r}")
    for filled, most in zip(saved.rollout, (agent.rollout_memory.rollout_length, agent.rollout_memory.max_tail)):
        if filled > most:
            raise CheckpointError(f"{source} has no valid rollout (found {saved.rollout})")
    ours = live_tensors(agent, rollout=saved.rollout)
    if saved.device != agent.device.type and "rng/sampling" in tensors:
        # Generators of other devices have other states.
        tensors = {**tensors, "rng/sampling": ours["rng/sampling"]}
    tensors = _with_our_moments(ours, tensors)
    check_fit(ours, tensors, what=source)
    for name, generator in (("rng/sampling", agent._sampling), ("rng/shuffling", agent._shuffling)):
        try:
            torch.Generator(generator.device).set_state(tensors[name])
        except RuntimeError as error:
            raise CheckpointError(f"{source}: {name} is no state of a generator: {error}") from error
    parameters = {f"policy/{name}" for name, _ in agent.policy.named_parameters()}
    prefixes = ("optimizer/", "state/", "norms/", "reward_scale/", "policy/normalizer.")
    numbers = {name: part for name, part in tensors.items() if name in parameters or name.startswith(prefixes)}
    _check_numbers(numbers, source=source)
    try:
        _check_values(agent, tensors)
    except ValueError as error:
        raise CheckpointError(f"{source} has no valid state: {error}") from error
    return tensors, saved


def _check_values(agent: DualHeadRecurrentPPO, tensors: dict[str, Tensor]) -> None:
    """Raises ValueError for numbers that are no norm strengths, or that the recorded steps cannot have."""
    if agent.norms is not None:
        strengths, most = tensors["norms/strengths"], agent.norms.config.max_norm_strength
        if not ((strengths >= 0) & (strengths <= most)).all():
            raise ValueError(f"norms: expected strengths from 0 to {most}")
    for leaf in agent.observation_spec.leaves:
        seen = tensors[f"rollout/observations/{leaf.name}"]
        if seen.numel():
            check_leaf(leaf, seen.flatten(0, 1))
    active, starts = tensors["rollout/active"], tensors["rollout/episode_starts"]
    if not (active | starts[len(starts) - len(active) :]).all():
        raise ValueError("active: expected an episode start at every step that a stream sat out")
    nvec = agent.action_spec.nvec
    chosen = tensors["rollout/actions"][..., : len(nvec)]
    if ((chosen != chosen.long()) | (chosen < 0) | (chosen >= torch.tensor(nvec))).any():
        raise ValueError(f"actions: expected whole numbers below {nvec}")


def _expect_same(agent: DualHeadRecurrentPPO, metadata: dict[str, Any], names: tuple[str, ...], *, source: str) -> None:
    theirs, ours = flat(metadata), flat(_metadata(agent))
    there = sorted(theirs.keys() | ours.keys())
    for name in (name for wanted in names for name in there if name == wanted or name.startswith(f"{wanted}.")):
        given, mine, how = theirs.get(name), ours.get(name), ""
        if name.startswith("foreign_parts."):
            given, mine, how = _class_name(given), _class_name(mine), " (compared by the name of its class)"
        # As JSON, where a tuple is a list and 1 is not True.
        if json.dumps(given) != json.dumps(mine):
            raise CheckpointError(f"{source} is of another architecture: its {name} is {given}, expected {mine}{how}")


def _with_our_moments(ours: dict[str, Tensor], saved: dict[str, Tensor]) -> dict[str, Tensor]:
    """The saved tensors with Adam's moments of the parameters that learn here; zeros of those frozen when saved."""
    there, here = (
        {owner for owner in map(_owner, tensors) if owner.startswith("optimizer/")} for tensors in (saved, ours)
    )
    frozen = {name.replace("policy/", "optimizer/", 1) for name in ours} - here
    kept = {name: tensor for name, tensor in saved.items() if _owner(name) not in frozen}
    return kept | {name: torch.zeros_like(tensor) for name, tensor in ours.items() if _owner(name) in here - there}


def _owner(name: str) -> str:
    return name.rpartition("/")[0]


def restore(agent: DualHeadRecurrentPPO, tensors: dict[str, Tensor], metadata: dict[str, Any], *, source: str) -> None:
    """Puts back what `take` gave; nothing changes where it does not fit.

    Raises:
        CheckpointError: see `DualHeadRecurrentPPO.restore`.
    """
    tensors, saved = check(agent, tensors, metadata, source=source)
    fill(live_tensors(agent, rollout=saved.rollout), tensors, what=source)
    agent._step_is_pending = False
    agent._sampling.set_state(tensors["rng/sampling"])
    agent._shuffling.set_state(tensors["rng/shuffling"])
    agent.num_steps, agent.num_updates, agent._num_skipped = saved.num_steps, saved.num_updates, saved.num_skipped
    agent.rollout_memory.rewind(*saved.rollout)


def warm_start(
    agent: DualHeadRecurrentPPO, tensors: dict[str, Tensor], metadata: dict[str, Any], *, source: str
) -> None:
    """Puts back weights, moments and scales alone; see `DualHeadRecurrentPPO.warm_start`.

    Raises:
        CheckpointError: they do not fit.
    """
    _expect_same(agent, metadata, _OF_THE_POLICY, source=source)
    ours, saved = (
        {name: t for name, t in of.items() if name.startswith(("policy/", "optimizer/", "reward_scale/statistics."))}
        for of in (live_tensors(agent), tensors)
    )
    fill(ours, _with_our_moments(ours, saved), what=source)
