"""A policy as an ONNX file, recurrent state in and recurrent state out, and a JSON file that says how to use it."""

from __future__ import annotations

import copy
import importlib.util
import io
import os
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from dualhead.agent import DualHeadRecurrentPPO
from dualhead.networks.encoders import EncoderFactory
from dualhead.networks.heads import DiagonalGaussian, FactoredCategorical
from dualhead.networks.memory import MemoryFactory
from dualhead.networks.policy import RecurrentPolicy
from dualhead.running.checkpoint import RunError, read_json, write_json
from dualhead.running.playing import Policy, load_weights
from dualhead.spaces import ACTION_MASK, WHOLE, ActionSpec, Leaf, ObservationSpec, torch_dtype
from dualhead.storage import write_bytes
from dualhead.types import RecurrentState

FORMAT, FORMAT_VERSION = "dualhead-onnx-policy", 1
OPSET = 17
TOLERANCE = 1e-5
VERIFIED_STEPS = 20

_RESET = (
    "Every state input is zeros in a stream's first step and at every later episode start; in all other steps it is "
    "the state output of the step before. Other streams are not touched when one is reset."
)
_PREVIOUS = (
    "previous/action [batch, heads]: the index of each head chosen in the step before, without its start; -1 in an "
    "episode's first step. Of a continuous action: x of the step before, clipped as below and not scaled; 0 in an "
    "episode's first step. previous/reward [batch]: what the environment paid for it; 0 in an episode's first step."
)
_DISCRETE = (
    "Each head's output holds log-probabilities [batch, size], masked choices near -3.4e38. Deterministic: argmax. "
    "Sampled: draw an index with probability exp(output). The action of a head is that index plus its start; `place` "
    "says where it belongs in the environment's action: keys and positions from the outside in; [] is the whole action."
)
_CONTINUOUS = (
    "Deterministic: x = mean. Sampled: x = mean + std * standard normal noise. Then, number by number: where bounded, "
    "clip x to [-1, 1]; action = x * scale + offset; clip to [low, high], null being no limit."
)


def export(
    source: str | os.PathLike[str] | DualHeadRecurrentPPO,
    out: str | os.PathLike[str],
    *,
    encoder: nn.Module | EncoderFactory | None = None,
    memory: nn.Module | MemoryFactory | None = None,
) -> dict[str, Any]:
    """Writes `out` and, beside it, the JSON file of the same name, once ONNX Runtime agrees with the policy.

    The graph is one step of any number of streams. In: observations (in their own dtypes, images as uint8), action
    masks, what the policy sees of the step before, and the recurrent state. Out: masked log-probabilities of each head
    (or mean and deviation), value and next state. Statistics of normalised observations are part of it.

    Args:
        source: an agent, a run directory (its newest whole checkpoint is taken), one of its checkpoint files, or a
            file that an agent saved.
        out: a name that ends in .onnx; folders are made, files that are there are replaced.
        encoder, memory: the parts of its own that a saved policy was trained with.

    Returns:
        What the JSON file says. Its `verified` is None where ONNX Runtime is not installed; else its version and the
        largest difference seen.

    Raises:
        RunError: a missing package, something that ONNX cannot say, a graph that disagrees with the policy, a file
            that cannot be written, or no run.
        CheckpointError: as for `load_policy`.
    """
    out = Path(out)
    if out.suffix != ".onnx":
        raise RunError(f"export to {out}: expected a name that ends in .onnx")
    if importlib.util.find_spec("onnx") is None:
        raise RunError("exporting needs the package onnx: pip install -e '.[onnx]' in the checkout")
    if isinstance(source, DualHeadRecurrentPPO):
        policy: Policy = copy.deepcopy(source.policy).cpu()
        spec, actions = source.observation_spec, source.action_spec
        run: dict[str, Any] = {
            "directory": None,
            "checkpoint": None,
            "env": None,
            "seed": None,
            "steps": source.num_steps,
        }
    else:
        loaded = load_weights(source, encoder=encoder, memory=memory)
        policy, spec, actions = (
            loaded.policy,
            ObservationSpec(loaded.observation_space),
            ActionSpec(loaded.action_space),
        )
        folder = loaded.path.absolute().parent.parent
        config = read_json(folder / "config.json") or {}
        run = {
            "directory": folder.name if config else None,
            "checkpoint": loaded.path.name,
            "env": config.get("env"),
            "seed": config.get("seed"),
            "steps": loaded.metadata["num_steps"],
        }
    if not isinstance(policy, RecurrentPolicy):
        raise RunError(f"{source} holds a policy for each agent: only a run with --policies shared can be exported")
    graph = StepGraph(policy, spec, actions)
    contents = to_onnx(graph)
    read = input_names(contents)
    described = graph.describe()
    described["inputs"] = [part for part in described["inputs"] if part["name"] in read]
    description = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "dualhead_version": version("dualhead"),
        "model": out.name,
        "run": run,
        "memory": type(policy.memory).__name__ if "memory" in policy.foreign_parts else policy.config.memory,
        **described,
        "verified": verify(contents, graph),
    }
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(out, contents)
        write_json(out.with_suffix(".json"), description)
    except OSError as error:
        raise RunError(f"cannot write {out}: {error.strerror or error}") from error
    return description


class StepGraph(nn.Module):
    """One step of a policy with a flat list of tensors in and out, as ONNX has it."""

    def __init__(self, policy: RecurrentPolicy, spec: ObservationSpec, actions: ActionSpec) -> None:
        super().__init__()
        self.policy = policy
        self.spec = spec
        self.actions = actions
        parts = policy.initial_state(1).parts
        self.state_shapes = {
            name: (part.shape[0], "batch", *part.shape[2:]) for name, part in parts.items() if part.numel()
        }
        self.state_inputs = [f"state/{name}" for name in self.state_shapes]
        self.state_outputs = [f"next_state/{name}" for name in self.state_shapes]
        self.previous_inputs = list(policy.previous.shapes(policy.dtype))
        nested = isinstance(spec.space, spaces.Dict | spaces.Tuple)
        self.observation_inputs = [f"{WHOLE}/{leaf.name}" if nested else WHOLE for leaf in spec.leaves]
        names = ["mean", "std"] if actions.is_continuous else [f"logits/{name}" for name in actions.names]
        self.input_names = [*self.observation_inputs, *self.previous_inputs, *self.state_inputs]
        self.output_names = [*names, "value", *self.state_outputs]

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Leaves [B, ...] and state parts [L, B, H] -> [B, n_k] per head (or mean and std [B, D]), value [B], state."""
        names = [*(leaf.name for leaf in self.spec.leaves), *self.previous_inputs]
        observations = dict(zip(names, tensors))
        given = dict(zip(self.state_shapes, tensors[len(names) :]))
        state = RecurrentState(**self.policy.initial_state(1).parts | given)  # parts without units stay
        output, next_state = self.policy.step(observations, state)
        distribution = output.distribution
        if isinstance(distribution, DiagonalGaussian):
            chosen = [distribution.mean, distribution.log_std.exp().expand_as(distribution.mean)]
        else:
            assert isinstance(distribution, FactoredCategorical)
            chosen = distribution.logits
        return (*chosen, output.values, *(next_state.parts[name] for name in self.state_shapes))

    def input_dtype(self, leaf: Leaf) -> torch.dtype:
        """Its own; floats as the policy's, and wide unsigned integers, which the exporter does not know, as int64."""
        own = torch_dtype(leaf.space.dtype)
        if own.is_floating_point:
            return self.policy.dtype
        return torch.int64 if own in (torch.uint16, torch.uint32, torch.uint64) else own

    def zero_state(self, batch: int) -> list[Tensor]:
        """The state inputs at the beginning of an episode."""
        parts = self.policy.initial_state(batch).parts
        return [parts[name] for name in self.state_shapes]

    def describe(self) -> dict[str, Any]:
        """Inputs, outputs, reset and actions for the JSON file."""
        dtype = _name(self.policy.dtype)
        nested = isinstance(self.spec.space, spaces.Dict | spaces.Tuple)
        inputs: list[dict[str, Any]] = [
            {
                "name": name,
                "role": "action_mask" if leaf.is_mask else "observation",
                "part": leaf.name if nested else None,
                "space": str(leaf.space),
                "dtype": _name(self.input_dtype(leaf)),
                "shape": ["batch", *(leaf.space.shape or ())],
            }
            for name, leaf in zip(self.observation_inputs, self.spec.leaves)
        ]
        inputs += [
            {
                "name": name,
                "role": name.replace("/", "_"),
                "dtype": _name(leaf_dtype),
                "shape": ["batch", *shape],
            }
            for name, (shape, leaf_dtype) in self.policy.previous.shapes(self.policy.dtype).items()
        ]
        dtypes = [_name(part.dtype) for part in self.zero_state(1)]
        states = [
            {"role": "state", "dtype": dtype, "shape": list(shape)}
            for dtype, shape in zip(dtypes, self.state_shapes.values())
        ]
        sizes = self.actions.nvec or (self.actions.num_columns,) * 2
        outputs: list[dict[str, Any]] = [
            {"name": name, "role": name.partition("/")[0], "dtype": dtype, "shape": ["batch", size]}
            for name, size in zip(self.output_names, sizes)
        ]
        outputs.append({"name": "value", "role": "value", "dtype": dtype, "shape": ["batch"]})
        return {
            "inputs": inputs + [{"name": name, **state} for name, state in zip(self.state_inputs, states)],
            "outputs": outputs + [{"name": name, **state} for name, state in zip(self.state_outputs, states)],
            "state": [{"input": a, "output": b} for a, b in zip(self.state_inputs, self.state_outputs)],
            "reset": _RESET if self.state_inputs else "There is no recurrent state.",
            "previous": _PREVIOUS if self.previous_inputs else "The policy does not see the step before.",
            "actions": self._describe_actions(),
        }

    def _describe_actions(self) -> dict[str, Any]:
        actions = self.actions
        if not isinstance(actions.space, spaces.Box):
            heads = [
                {"name": name, "output": output, "size": size, "start": int(start), "place": place}
                for name, output, size, start, place in zip(
                    actions.names, self.output_names, actions.nvec, actions.starts, _places(actions.space)
                )
            ]
            return {"kind": "categorical", "space": str(actions.space), "how": _DISCRETE, "heads": heads}
        return {
            "kind": "gaussian",
            "space": str(actions.space),
            "how": _CONTINUOUS,
            "dtype": str(actions.space.dtype),
            "bounded": actions.bounded.tolist(),
            "scale": actions.half.tolist(),
            "offset": actions.centre.tolist(),
            "low": [float(x) if np.isfinite(x) else None for x in actions.space.low],
            "high": [float(x) if np.isfinite(x) else None for x in actions.space.high],
        }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _places(space: Any) -> list[list[str | int]]:
    """Where each head's index belongs in an action: keys and positions from the outside in."""
    if isinstance(space, spaces.Dict):
        return [[key, *place] for key, part in space.items() for place in _places(part)]
    return [[i] for i in range(len(space.nvec))] if isinstance(space, spaces.MultiDiscrete) else [[]]


def to_onnx(graph: StepGraph) -> bytes:
    """The graph as an ONNX model with a free batch axis.

    Raises:
        RunError: a part of it is not exportable.
    """
    examples = [*random_observations(graph, 2, np.random.default_rng(0)), *graph.zero_state(2)]
    axes = {name: {0: "batch"} for name in graph.input_names + graph.output_names}
    axes |= {name: {1: "batch"} for name in graph.state_inputs + graph.state_outputs}
    file = io.BytesIO()
    with warnings.catch_warnings():
        # The tracing exporter works in every torch from 2.5 on and takes a tenth of a second. Its successor needs a
        # further package of a matching version and several seconds. It warns of its age and of branches on the batch
        # size; `verify` checks the results for two batch sizes.
        warnings.simplefilter("ignore")
        try:
            torch.onnx.export(
                graph,
                tuple(examples),
                file,  # type: ignore[arg-type]
                input_names=graph.input_names,
                output_names=graph.output_names,
                dynamic_axes=axes,
                opset_version=OPSET,
                dynamo=False,
            )
        except Exception as error:  # of many kinds
            raise RunError(f"this policy cannot be exported to ONNX: {error}") from error
    return file.getvalue()


def input_names(contents: bytes) -> set[str]:
    """The inputs that a model has: an encoder of the user's own need not look at every part of an observation."""
    import onnx

    return {given.name for given in onnx.load_model_from_string(contents).graph.input}


def verify(contents: bytes, graph: StepGraph) -> dict[str, Any] | None:
    """Plays random observations with resets through ONNX Runtime and through the policy, each with its own state.

    Returns:
        Version of ONNX Runtime and the largest difference, relative to 1 + |expected|; None where it is not installed.

    Raises:
        RunError: it differs by more than 1e-5, or ONNX Runtime cannot run it.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    rng = np.random.default_rng(1)
    worst, read = 0.0, input_names(contents)
    try:
        session = onnxruntime.InferenceSession(contents, options, providers=["CPUExecutionProvider"])
        for batch in (1, 5):
            ours, theirs = graph.zero_state(batch), [part.numpy() for part in graph.zero_state(batch)]
            for _ in range(VERIFIED_STEPS):
                observations = random_observations(graph, batch, rng)
                with torch.no_grad():
                    expected = graph(*observations, *ours)
                inputs = [*(tensor.numpy() for tensor in observations), *theirs]
                given = {name: part for name, part in zip(graph.input_names, inputs) if name in read}
                outputs = session.run(graph.output_names, given)
                for name, a, b in zip(graph.output_names, outputs, expected):
                    wanted = b.double().numpy()
                    difference = np.max(np.abs(a - wanted) / (1.0 + np.abs(wanted)))
                    if a.shape != b.shape or not difference <= TOLERANCE:
                        raise RunError(f"the exported graph differs from the policy: {name} by {difference:.2g}")
                    worst = max(worst, float(difference))
                ended, first = rng.random(batch) < 0.1, len(expected) - len(ours)
                ours, theirs = list(expected[first:]), outputs[first:]
                for part in ours:
                    part[:, torch.from_numpy(ended)] = 0
                for state in theirs:
                    state[:, ended] = 0
    except RunError:
        raise
    except Exception as error:  # of many kinds
        raise RunError(f"ONNX Runtime cannot run the exported graph: {error}") from error
    return {"onnxruntime": onnxruntime.__version__, "largest_difference": worst}


def random_observations(graph: StepGraph, batch: int, rng: np.random.Generator) -> list[Tensor]:
    """Observations [batch, ...] from all over their spaces, previous actions and rewards likewise; masks that leave
    every head a choice."""
    previous = graph.policy.previous
    n = graph.actions.num_columns
    actions = (
        rng.normal(size=(batch, n)) if graph.actions.is_continuous else rng.integers(-1, graph.actions.nvec, (batch, n))
    )
    leaves = previous.after(torch.from_numpy(actions), torch.from_numpy(rng.normal(size=batch)))
    dtypes = {name: dtype for name, (_, dtype) in previous.shapes(graph.policy.dtype).items()}
    return [
        *(_random_leaf(leaf, graph, batch, rng) for leaf in graph.spec.leaves),
        *(leaf.to(dtypes[name]) for name, leaf in leaves.items()),
    ]


def _random_leaf(leaf: Leaf, graph: StepGraph, batch: int, rng: np.random.Generator) -> Tensor:
    space = leaf.space
    shape = (batch, *(space.shape or ()))
    if leaf.is_mask:
        size = int(np.prod(shape[1:]))
        drawn = rng.random((batch, size)) < 0.5
        start = 0
        for n in graph.actions.nvec if leaf.name.rpartition("/")[2] == ACTION_MASK else (size,):
            drawn[np.arange(batch), start + rng.integers(n, size=batch)] = True
            start += n
        drawn = drawn.reshape(shape)
    elif isinstance(space, spaces.Box) and np.issubdtype(space.dtype, np.floating):
        near_zero = np.clip(0.0, space.low, space.high)
        drawn = np.clip(near_zero + 3.0 * rng.normal(size=shape), space.low, space.high)
    else:
        low, high = _integer_bounds(space)
        drawn = np.asarray(rng.integers(low, high, size=shape, dtype=space.dtype, endpoint=True))
    return torch.from_numpy(drawn).to(graph.input_dtype(leaf))


def _integer_bounds(space: Any) -> tuple[Any, Any]:
    """Lowest and highest numbers of a space of integers."""
    if isinstance(space, spaces.Box):
        return space.low, space.high
    if isinstance(space, spaces.MultiBinary):
        return 0, 1
    size = space.n if isinstance(space, spaces.Discrete) else space.nvec
    return space.start, space.start + size - 1
