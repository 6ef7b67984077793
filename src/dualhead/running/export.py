"""A policy as an ONNX file, recurrent state in and recurrent state out, and a JSON file that says how to use it."""

from __future__ import annotations

import copy
import io
import itertools
import os
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector.utils import batch_space
from torch import Tensor, nn

from dualhead.agent import DualHeadRecurrentPPO
from dualhead.networks.encoders import EncoderFactory
from dualhead.networks.heads import FactoredCategorical, Mixed
from dualhead.networks.memory import MemoryFactory
from dualhead.networks.policy import RecurrentPolicy
from dualhead.running.checkpoint import RunError, read_config, write_json
from dualhead.running.playing import Players, load_player
from dualhead.spaces import ACTION_MASK, WHOLE, ActionSpec, ObservationSpec, torch_dtype
from dualhead.storage import write_bytes
from dualhead.types import RecurrentState

FORMAT, FORMAT_VERSION = "dualhead-onnx-policy", 2
OPSET = 17
TOLERANCE = 1e-5
VERIFIED_STEPS = 20

_RESET = (
    "Every state input is zeros in a stream's first step and at every later episode start. In all other steps it is "
    "the state output of the step before. Resetting one stream does not change the others."
)
_PREVIOUS = (
    "previous/action [batch, columns]: what each head chose in the step before, in the order of the heads. Of a "
    "categorical head: the index, without its start; -1 in an episode's first step. Of a gaussian head: x of the step "
    "before, clipped as below and not scaled; 0 in an episode's first step. previous/reward [batch]: the reward of the "
    "step before; 0 in an episode's first step."
)
_HOW = (
    "Every head makes one part of the environment's action. `place` says where it belongs: keys and positions from the "
    "outside in; [] is the whole action. A categorical head's `output` holds log-probabilities [batch, size], masked "
    "choices near -3.4e38. Deterministic: argmax. Sampled: draw an index with probability exp(output). Its part is "
    "that index plus `start`. A gaussian head's `mean` and `std` are [batch, numbers]. Deterministic: x = mean. "
    "Sampled: x = mean + std * standard normal noise. Then, number by number: where bounded, clip x to [-1, 1]; "
    "y = x * scale + offset; clip y to [low, high], where null means no limit. Its part is y in the form of `shape`."
)


def export(
    source: str | os.PathLike[str] | DualHeadRecurrentPPO,
    out: str | os.PathLike[str],
    *,
    encoder: nn.Module | EncoderFactory | None = None,
    memory: nn.Module | MemoryFactory | None = None,
) -> dict[str, Any]:
    """Writes `out` and a JSON file of the same name beside it, after ONNX Runtime has agreed with the policy.

    The graph is one step of any number of streams. In: observations (in their own dtypes, images as uint8), action
    masks, what the policy sees of the step before, and the recurrent state. Out: masked log-probabilities of each head
    (or mean and deviation), value and next state. It contains the statistics of normalised observations.

    Args:
        source: an agent, a run directory (its newest whole checkpoint is taken), one of its checkpoint files, or a
            file that an agent saved.
        out: a name that ends in .onnx; missing folders are made, files are replaced.
        encoder, memory: the parts of its own that a saved policy was trained with.

    Returns:
        The contents of the JSON file. `verified` has the version of ONNX Runtime and the largest difference, or is None
        where ONNX Runtime is not installed.

    Raises:
        RunError: a missing package, something that ONNX cannot express, a graph that disagrees with the policy, a file
            that cannot be written, or no run.
        CheckpointError: as for `load_policy`.
    """
    out = Path(out)
    if out.suffix != ".onnx":
        raise RunError(f"export to {out}: expected a name that ends in .onnx")
    try:
        import onnx
    except ImportError as error:
        raise RunError("exporting needs the package onnx: pip install -e '.[onnx]' in the checkout") from error
    run: dict[str, Any] = dict.fromkeys(("directory", "checkpoint", "env", "seed"))
    if isinstance(source, DualHeadRecurrentPPO):
        policy = copy.deepcopy(source.policy).cpu()
        spec, actions = source.observation_spec, source.action_spec
        run["steps"] = source.num_steps
    else:
        player, path, metadata = load_player(source, encoder=encoder, memory=memory)
        if isinstance(player, Players):
            raise RunError(f"{source} holds a policy for each agent: only a run with --policies shared can be exported")
        policy = player.policy
        spec, actions = ObservationSpec(player.observation_space), ActionSpec(player.action_space)
        folder = path.absolute().parent.parent
        if (folder / "config.json").exists():
            config = read_config(folder)
            run |= {"directory": folder.name, "env": config.env, "seed": config.seed}
        run |= {"checkpoint": path.name, "steps": metadata["num_steps"]}
    graph = StepGraph(policy, spec, actions)
    contents = to_onnx(graph)
    described = graph.describe()
    # A user's encoder may ignore parts of an observation, and a graph has no inputs that it does not read.
    read = {given.name for given in onnx.load_model_from_string(contents).graph.input}
    described["inputs"] = [port for port in described["inputs"] if port["name"] in read]
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
    """One step of a policy with a flat list of tensors in and out, as ONNX has it.

    Attributes:
        inputs, outputs: name, role, dtype and shape (with the word "batch") of each tensor, as in the JSON file.
    """

    def __init__(self, policy: RecurrentPolicy, spec: ObservationSpec, actions: ActionSpec) -> None:
        super().__init__()
        self.policy, self.spec, self.actions = policy, spec, actions
        nested = isinstance(spec.space, spaces.Dict | spaces.Tuple)
        self.inputs = []
        for leaf in spec.leaves:
            name = f"{WHOLE}/{leaf.name}" if nested else WHOLE
            dtype, shape = torch_dtype(leaf.space.dtype), ["batch", *(leaf.space.shape or ())]
            if dtype.is_floating_point:
                dtype = policy.dtype
            elif dtype in (torch.uint16, torch.uint32, torch.uint64):  # the exporter lacks them
                dtype = torch.int64
            role = "action_mask" if leaf.is_mask else "observation"
            self.inputs.append(
                _port(name, role, dtype, shape, part=leaf.name if nested else None, space=str(leaf.space))
            )
        previous = policy.previous.shapes(policy.dtype)
        self.inputs += [
            _port(name, name.replace("/", "_"), dtype, ["batch", *shape]) for name, (shape, dtype) in previous.items()
        ]
        self.tensor_names = [leaf.name for leaf in spec.leaves] + list(previous)
        sizes = {f"logits/{name}": n for name, n in zip(actions.names, actions.nvec)}
        for leaf, size in zip(actions.boxes, actions.box_sizes):
            sizes |= {f"{what}/{leaf.name}": size for what in ("mean", "std")}
        self.outputs = [
            _port(name, name.partition("/")[0], policy.dtype, ["batch", size]) for name, size in sizes.items()
        ]
        self.outputs.append(_port("value", "value", policy.dtype, ["batch"]))
        # A part without units has nothing to pass on.
        self.state = {name: part for name, part in policy.initial_state(1).parts.items() if part.numel()}
        for prefix, ports in (("state", self.inputs), ("next_state", self.outputs)):
            for name, part in self.state.items():
                shape = [part.shape[0], "batch", *part.shape[2:]]
                ports.append(_port(f"{prefix}/{name}", "state", part.dtype, shape))

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Leaves [B, ...] and state parts [L, B, H] -> logits [B, n_k], or mean and std, per head; value [B]; state."""
        observations = dict(zip(self.tensor_names, tensors))
        given = dict(zip(self.state, tensors[len(observations) :]))
        state = RecurrentState(**self.policy.initial_state(1).parts | given)
        output, next_state = self.policy.step(observations, state)
        both = output.distribution
        chosen: list[Tensor] = []
        for one in (both.categorical, both.gaussian) if isinstance(both, Mixed) else (both,):
            if isinstance(one, FactoredCategorical):
                chosen += one.logits
            else:
                std = one.log_std.exp().expand_as(one.mean)
                chosen += itertools.chain(*zip(one.mean.split(one.sizes, dim=1), std.split(one.sizes, dim=1)))
        return (*chosen, output.values, *(next_state.parts[name] for name in self.state))

    def zero_state(self, batch: int) -> list[Tensor]:
        """The state inputs at the beginning of an episode."""
        parts = self.policy.initial_state(batch).parts
        return [parts[name] for name in self.state]

    def random_observations(self, batch: int, rng: np.random.Generator) -> list[Tensor]:
        """Observations [batch, ...] from their spaces, masks that leave every head a choice, and a step before."""
        given: list[Any] = []
        for leaf in self.spec.leaves:
            space, shape = leaf.space, (batch, *(leaf.space.shape or ()))
            if leaf.is_mask:
                firsts = np.cumsum([0, *self.actions.nvec[:-1]]) if leaf.head == ACTION_MASK else [0]
                given.append(rng.integers(2, size=shape))
                given[-1].reshape(batch, -1)[:, firsts] = 1
            elif isinstance(space, spaces.Box) and np.issubdtype(space.dtype, np.floating):  # bounds may be huge
                near_zero = np.clip(0.0, space.low, space.high)
                given.append(np.clip(rng.normal(near_zero, 3.0, shape), space.low, space.high))
            else:
                batched = batch_space(space, batch)
                batched.seed(int(rng.integers(2**31)))
                given.append(batched.sample())
        indices = rng.integers(-1, self.actions.nvec, (batch, len(self.actions.nvec)))
        before = np.concatenate([indices, rng.normal(size=(batch, sum(self.actions.box_sizes)))], axis=1)
        previous = self.policy.previous.after(torch.from_numpy(before), torch.from_numpy(rng.normal(size=batch)))
        tensors = zip(self.inputs, [*given, *previous.values()])
        return [torch.as_tensor(tensor).to(getattr(torch, port["dtype"])) for port, tensor in tensors]

    def describe(self) -> dict[str, Any]:
        """Inputs, outputs, reset and actions for the JSON file."""
        return {
            "inputs": self.inputs,
            "outputs": self.outputs,
            "state": [{"input": f"state/{name}", "output": f"next_state/{name}"} for name in self.state],
            "reset": _RESET if self.state else "There is no recurrent state.",
            "previous": _PREVIOUS if self.policy.previous.num_features else "The policy does not see the step before.",
            "actions": self._describe_actions(),
        }

    def _describe_actions(self) -> dict[str, Any]:
        actions, heads, first = self.actions, [], 0
        places = [(*leaf.path, *index) for leaf in actions.discrete for index in np.ndindex(leaf.space.shape or ())]
        for name, size, start, place in zip(actions.names, actions.nvec, actions.starts, places):
            output = {"output": f"logits/{name}", "size": size, "start": int(start)}
            heads.append({"name": name, "kind": "categorical", **output, "place": list(place)})
        for leaf, size in zip(actions.boxes, actions.box_sizes):
            box: Any = leaf.space
            own, first = slice(first, first + size), first + size
            numbers = {
                "bounded": actions.bounded[own].tolist(),
                "scale": actions.half[own].tolist(),
                "offset": actions.centre[own].tolist(),
                "low": [float(x) if np.isfinite(x) else None for x in box.low.flat],
                "high": [float(x) if np.isfinite(x) else None for x in box.high.flat],
                "shape": list(box.shape),
                "dtype": str(box.dtype),
            }
            outputs = {what: f"{what}/{leaf.name}" for what in ("mean", "std")}
            heads.append({"name": leaf.name, "kind": "gaussian", **outputs, **numbers, "place": list(leaf.path)})
        return {"space": str(actions.space), "how": _HOW, "heads": heads}


def _port(name: str, role: str, dtype: torch.dtype, shape: list[Any], **more: Any) -> dict[str, Any]:
    return {"name": name, "role": role, **more, "dtype": str(dtype).removeprefix("torch."), "shape": shape}


def to_onnx(graph: StepGraph) -> bytes:
    """The graph as an ONNX model with a free batch axis.

    Raises:
        RunError: a part of it cannot be exported.
    """
    file = io.BytesIO()
    with warnings.catch_warnings():
        # The tracing exporter works in every torch from 2.5 on and takes a tenth of a second. Its successor needs a
        # further package of a matching version and several seconds. The tracing one warns that it is old, and of
        # branches on the batch size; `verify` checks two batch sizes.
        warnings.simplefilter("ignore")
        try:
            torch.onnx.export(
                graph,
                (*graph.random_observations(2, np.random.default_rng(0)), *graph.zero_state(2)),
                file,  # type: ignore[arg-type]
                input_names=[port["name"] for port in graph.inputs],
                output_names=[port["name"] for port in graph.outputs],
                dynamic_axes={
                    port["name"]: {port["shape"].index("batch"): "batch"} for port in graph.inputs + graph.outputs
                },
                opset_version=OPSET,
                dynamo=False,
            )
        except Exception as error:  # of many kinds
            raise RunError(f"this policy cannot be exported to ONNX: {error}") from error
    return file.getvalue()


def verify(contents: bytes, graph: StepGraph) -> dict[str, Any] | None:
    """Plays random observations with resets through ONNX Runtime and through the policy, each with its own state.

    Returns:
        Version of ONNX Runtime and the largest difference, relative to 1 + |expected|; None where it is not installed.

    Raises:
        RunError: it differs by more than 1e-5, or ONNX Runtime cannot run it.
    """
    try:
        import onnxruntime
    except ImportError:
        return None
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    rng = np.random.default_rng(1)
    worst = 0.0
    names = [port["name"] for port in graph.outputs]
    try:
        session = onnxruntime.InferenceSession(contents, options, providers=["CPUExecutionProvider"])
        read = {given.name for given in session.get_inputs()}
        for batch in (1, 5):
            ours, theirs = graph.zero_state(batch), [part.numpy() for part in graph.zero_state(batch)]
            for _ in range(VERIFIED_STEPS):
                observations = graph.random_observations(batch, rng)
                with torch.no_grad():
                    expected = graph(*observations, *ours)
                inputs = zip(graph.inputs, [*(tensor.numpy() for tensor in observations), *theirs])
                outputs = session.run(names, {port["name"]: x for port, x in inputs if port["name"] in read})
                for name, a, b in zip(names, outputs, expected):
                    wanted = b.double().numpy()
                    difference = np.max(np.abs(a - wanted) / (1.0 + np.abs(wanted)))
                    if a.shape != b.shape or not difference <= TOLERANCE:
                        raise RunError(f"the exported graph differs from the policy: {name} by {difference:.2g}")
                    worst = max(worst, float(difference))
                first = len(expected) - len(ours)
                ours, theirs = [part.clone() for part in expected[first:]], outputs[first:]
                ended = rng.random(batch) < 0.1
                for part in (*(tensor.numpy() for tensor in ours), *theirs):
                    part[:, ended] = 0
    except RunError:
        raise
    except Exception as error:  # of many kinds
        raise RunError(f"ONNX Runtime cannot run the exported graph: {error}") from error
    return {"onnxruntime": onnxruntime.__version__, "largest_difference": worst}
