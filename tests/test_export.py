"""An exported policy answers as ours does, over whole episodes, and its JSON file is all that one needs to use it."""

import json
import os
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import onnxruntime
import pytest
import torch
from agents import make_agent
from gymnasium import spaces
from gymnasium.vector.utils import batch_space, iterate
from processes import run_process
from saved_runs import randomize, save_run

from dualhead import MemoryCell, Player, RecurrentState, load_policy
from dualhead.cli import main
from dualhead.config import NetworkConfig
from dualhead.networks.heads import Mixed
from dualhead.networks.policy import RecurrentPolicy
from dualhead.running.checkpoint import RunError
from dualhead.running.export import StepGraph, export, to_onnx, verify
from dualhead.spaces import ActionSpec, ObservationSpec
from dualhead.worlds.replay import leaves

EXAMPLE = Path(__file__).parent.parent / "examples" / "06_serve_onnx.py"
BOX = spaces.Box(-np.inf, np.inf, (5,), np.float32)
HEADS = spaces.Dict(move=spaces.Discrete(4, start=1), vote=spaces.MultiDiscrete([3, 2]))
ACTION_BOX = spaces.Box(-2.0, 2.0, (3,), np.float32)
MIXED = spaces.Tuple((ACTION_BOX, spaces.Dict(heads=HEADS, by=spaces.Box(0.0, 3.0, (2, 1))), spaces.MultiBinary(2)))
OBSERVATIONS = {
    "vector": BOX,
    "grid": spaces.Box(0, 255, (3, 6, 6), np.uint8),
    "large frame": spaces.Box(0, 255, (38, 40, 3), np.uint8),
    "flat picture": spaces.Box(0.0, 1.0, (8, 6), np.float32),
    "numbers": spaces.Box(-3, 7, (4,), np.int32),
    "depth": spaces.Box(0, 9000, (1, 6, 6), np.uint16),
    "yes or no": spaces.Box(0, 1, (3,), np.bool_),
    "double": spaces.Box(-1.0, 1.0, (2,), np.float64),
    "bits": spaces.MultiBinary(6),
    "discrete": spaces.Discrete(5, start=-2),
    "multi": spaces.MultiDiscrete([[2, 3], [4, 2]]),
    "tuple": spaces.Tuple((spaces.Discrete(3), BOX)),
    "dict": spaces.Dict(
        grid=spaces.Box(0, 1, (2, 5, 5), np.uint8),
        inner=spaces.Dict(h=BOX, kind=spaces.Discrete(4)),
        action_mask=spaces.Dict(move=spaces.MultiBinary(4), vote_1=spaces.MultiBinary(2)),
    ),
    "whole mask": spaces.Dict(x=BOX, action_mask=spaces.Box(0, 1, (9,), np.uint8)),
}


def make_policy(observation_space, action_space, memory, num_layers=2, **shape):
    config = NetworkConfig.spec(memory=memory, hidden_size=24, num_layers=num_layers, encoder_sizes=(16,), **shape)
    spec, actions = ObservationSpec(observation_space), ActionSpec(action_space)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        policy = RecurrentPolicy(spec, actions, config=config, normalize_observations=True)
    randomize(policy)
    return policy, spec, actions


def exported(policy, spec, actions):
    graph = StepGraph(policy, spec, actions)
    return to_onnx(graph), json.loads(json.dumps(graph.describe(), allow_nan=False))


class Served:
    """An exported policy that plays by its JSON file alone."""

    def __init__(self, contents, description, batch=1):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(contents, options)
        self.description, self.batch, self.state = description, batch, {}

    def step(self, observation, starts, action=None, reward=None):
        """Outputs by name; `action` in the policy's terms and `reward` are of the step before."""
        starts, inputs = np.broadcast_to(starts, self.batch), {}
        for port in self.description["inputs"]:
            name, shape = port["name"], [self.batch if n == "batch" else n for n in port["shape"]]
            if port["role"] == "state":
                inputs[name] = self.state.get(name, np.zeros(shape, port["dtype"]))
                inputs[name][:, starts] = 0
            elif port["role"] == "previous_action":
                heads = self.description["actions"]["heads"]
                blank = [b for head in heads for b in ([0] * len(head["low"]) if "low" in head else [-1])]
                inputs[name] = np.where(starts[:, None], blank, np.zeros(shape) if action is None else action)
            elif port["role"] == "previous_reward":
                inputs[name] = np.where(starts, 0, 0 if reward is None else reward)
            else:
                part = observation
                for key in port["part"].split("/") if port["part"] else []:
                    part = part[int(key) if key.isdigit() else key]
                inputs[name] = np.asarray(part).reshape(shape)
            inputs[name] = inputs[name].astype(port["dtype"])
        names = [port["name"] for port in self.description["outputs"]]
        outputs = dict(zip(names, self.session.run(names, inputs)))
        self.state = {pair["input"]: outputs[pair["output"]] for pair in self.description["state"]}
        return outputs

    def columns(self, outputs):
        """[batch, C] likeliest index of each head, or means clipped where they are bounded: what the next step sees."""
        columns = []
        for head in self.description["actions"]["heads"]:
            if head["kind"] == "categorical":
                columns.append(outputs[head["output"]].argmax(-1)[:, None])
            else:
                mean = outputs[head["mean"]]
                columns.append(np.where(head["bounded"], mean.clip(-1, 1), mean))
        return np.concatenate(columns, axis=1)

    def act(self, outputs):
        """Deterministic action of the first stream: its parts by their places."""
        columns, parts = self.columns(outputs)[0], {}
        for head in self.description["actions"]["heads"]:
            if head["kind"] == "categorical":
                part, columns = int(columns[0]) + head["start"], columns[1:]
            else:
                x, columns = np.split(columns, [len(head["scale"])])
                low = [-np.inf if n is None else n for n in head["low"]]
                high = [np.inf if n is None else n for n in head["high"]]
                part = (x * head["scale"] + head["offset"]).clip(low, high).reshape(head["shape"])
            parts[tuple(head["place"])] = part
        return parts


def at(action, place):
    for key in place:
        action = action[key]
    return action


def assert_same_actions(parts, wanted):
    """Every part is where it belongs, and nothing else is in the action."""
    for place, part in parts.items():
        np.testing.assert_allclose(part, at(wanted, place), rtol=0, atol=3e-5)
    assert sum(np.size(part) for part in parts.values()) == sum(leaf.size for leaf in leaves(wanted))


def sample(space, batch, rng):
    """A batch of observations; masks have at least one choice per head."""
    space = batch_space(space, batch)
    space.seed(int(rng.integers(2**31)))
    seen = space.sample()
    if isinstance(seen, dict) and "action_mask" in seen:
        masks = seen["action_mask"]
        parts = masks.values() if isinstance(masks, dict) else np.split(masks, [4, 7], axis=1)
        for part in parts:  # views, so this writes into the observation
            part[np.arange(batch), rng.integers(part.shape[1], size=batch)] = 1
    return seen


def largest_difference(policy, spec, contents, description, *, batch, steps):
    """Of ONNX Runtime and the policy over random observations, each with its own state, resets at random."""
    rng, served, ours = np.random.default_rng(batch), Served(contents, description, batch), policy.initial_state(batch)
    worst, starts = 0.0, np.ones(batch, bool)
    for _ in range(steps):
        seen = sample(spec.space, batch, rng)
        given = served.step(seen, starts)
        ours = ours.reset_where(torch.from_numpy(starts))
        with torch.no_grad():
            output, ours = policy.step(spec.to_tensors(seen, batch, dtype=policy.dtype), ours)
        expected = {"value": output.values}
        both = output.distribution
        categorical, gaussian = (both.categorical, both.gaussian) if isinstance(both, Mixed) else (both, both)
        heads = description["actions"]["heads"]
        expected |= {head["output"]: logits for head, logits in zip(heads, getattr(categorical, "logits", []))}
        boxes = [head for head in heads if head["kind"] == "gaussian"]
        if boxes:
            std = gaussian.log_std.detach().exp().expand(batch, -1)
            for what, numbers in (("mean", gaussian.mean), ("std", std)):
                own = numbers.split([len(head["scale"]) for head in boxes], dim=1)
                expected |= {head[what]: part for head, part in zip(boxes, own)}
        if description["state"]:
            expected |= {f"next_state/{name}": part for name, part in ours.parts.items()}
        assert expected.keys() == given.keys()
        for name, tensor in expected.items():
            legal = tensor.numpy() > -1e30
            assert given[name].shape == tensor.shape
            assert (given[name][~legal] < -1e30).all()
            worst = max(worst, np.abs(given[name] - tensor.numpy())[legal].max())
        starts = rng.random(batch) < 0.05
    return worst


@pytest.mark.parametrize("memory", ["lstm", "gru", "mingru", "lru", "none"])
@pytest.mark.parametrize("kind", [*OBSERVATIONS, "box action", "mixed action"])
def test_onnx_equals_ours_over_episodes(kind, memory):
    action_space = {"box action": ACTION_BOX, "mixed action": MIXED}.get(kind, HEADS)
    policy, spec, actions = make_policy(OBSERVATIONS.get(kind, BOX), action_space, memory)
    contents, description = exported(policy, spec, actions)
    # The scan cells' layer norm divides rounding by the features' spread, and an LRU's state is a sum over many steps.
    tolerance = 5e-5 if memory in ("mingru", "lru") else 1e-5
    for batch, steps in ((1, 50), (64, 50)):
        assert largest_difference(policy, spec, contents, description, batch=batch, steps=steps) < tolerance
    types, session = {"float32": "float"}, Served(contents, description).session
    for ports, asked in (
        (description["inputs"], session.get_inputs()),
        (description["outputs"], session.get_outputs()),
    ):
        assert [(p["name"], f"tensor({types.get(p['dtype'], p['dtype'])})", p["shape"]) for p in ports] == [
            (port.name, port.type, port.shape) for port in asked
        ]


@pytest.mark.parametrize("action_space", [HEADS, ACTION_BOX, MIXED], ids=["heads", "box", "mixed"])
@pytest.mark.parametrize(
    "shape",
    [
        {"previous_action": True, "previous_reward": True, "critic_memory": "lstm", "head_sizes": (8,)},
        {"previous_action": True, "critic_memory": "none", "activation": "tanh"},
        {"previous_reward": True, "critic_memory": "gru", "memory": "none"},
    ],
    ids=["everything", "critic without memory", "actor without memory"],
)
def test_onnx_sees_the_step_before_as_a_player_does(shape, action_space):
    """previous/action is -1 (0 of a Box) and previous/reward 0 where an episode starts."""
    policy, spec, actions = make_policy(BOX, action_space, **{"memory": "lstm", **shape})
    contents, description = exported(policy, spec, actions)
    assert verify(contents, StepGraph(policy, spec, actions))["largest_difference"] < 1e-5
    assert {port["name"] for port in description["inputs"] if port["name"].startswith("previous/")} == {
        f"previous/{what}" for what in ("action", "reward") if shape.get(f"previous_{what}")
    }
    batch, rng = 5, np.random.default_rng(0)
    player, served = Player(policy, BOX, action_space), Served(contents, description, batch)
    action, reward, starts = None, np.zeros(batch), np.ones(batch, bool)
    for _ in range(60):
        seen = rng.normal(size=(batch, 5)).astype(np.float32)
        wanted = player.act(seen, starts, rewards=reward)
        outputs = served.step(seen, starts, action, reward)
        action = served.columns(outputs)
        assert_same_actions(served.act(outputs), next(iterate(batch_space(action_space, batch), wanted)))
        reward, starts = rng.normal(size=batch).astype(np.float32), rng.random(batch) < 0.1


class Ages(MemoryCell):
    """Its output depends on whether, and on how many steps, an episode has been going on."""

    def __init__(self, input_size, hidden_size):
        super().__init__(hidden_size, state_shapes={"h": (1, hidden_size)})
        self.layer = torch.nn.Linear(input_size, hidden_size)

    def initial_state(self, batch, *, device, dtype):
        h = super().initial_state(batch, device=device, dtype=dtype).h
        return RecurrentState(
            h=h, begun=torch.zeros(1, batch, dtype=torch.bool), age=torch.zeros_like(h[..., 0]).long()
        )

    def step(self, features, state):
        begun, age = state.parts["begun"], state.parts["age"]
        h = self.layer(features) + 0.5 * state.h[0] + age[0, :, None] % 3 - 2.0 * begun[0, :, None]
        return h, RecurrentState(h=h[None], begun=torch.ones_like(begun), age=age + 1)


def test_states_of_every_dtype(tmp_path):
    description = export(make_agent(Ages, dtype=torch.float32), tmp_path / "policy.onnx")
    assert description["verified"]["largest_difference"] < 1e-5
    session = Served((tmp_path / "policy.onnx").read_bytes(), description).session
    for ports, asked in (
        (description["inputs"], session.get_inputs()),
        (description["outputs"], session.get_outputs()),
    ):
        assert [port["dtype"] for port in ports if port["role"] == "state"] == ["float32", "bool", "int64"]
        types = {port.name: port.type for port in asked if "state/" in port.name}
        assert list(types.values()) == ["tensor(float)", "tensor(bool)", "tensor(int64)"]


def test_pictures_stay_uint8():
    policy, spec, actions = make_policy(OBSERVATIONS["dict"], HEADS, "gru")
    described = {port["part"]: port["dtype"] for port in StepGraph(policy, spec, actions).inputs[:5]}
    assert described == {
        "action_mask/move": "int8",
        "action_mask/vote_1": "int8",
        "grid": "uint8",
        "inner/h": "float32",
        "inner/kind": "int64",
    }


@pytest.mark.parametrize(
    "action_space",
    [
        spaces.Discrete(7, start=3),
        spaces.MultiDiscrete([3, 4], start=[1, -1]),
        HEADS,
        spaces.Box(np.float32([[-0.1, -np.inf], [0.5, -5]]), np.float32([[0.3, np.inf], [np.inf, 0]])),
        spaces.MultiDiscrete([[2, 3], [4, 5]], start=[[0, 1], [-2, 7]]),
        MIXED,
    ],
    ids=["discrete", "multi", "dict", "box", "two axes", "mixed"],
)
def test_actions_by_the_json_file(action_space):
    policy, spec, actions = make_policy(BOX, action_space, "none", num_layers=1)
    served, player = Served(*exported(policy, spec, actions)), Player(policy, BOX, action_space)
    rng = np.random.default_rng(0)
    for _ in range(30):
        seen = 3 * rng.normal(size=(1, 5)).astype(np.float32)
        assert_same_actions(served.act(served.step(seen, True)), player.act(seen[0], True))


def test_an_exported_run_plays_its_environment(tmp_path, capsys):
    run = save_run(tmp_path / "run", "dualhead/PendulumNoVel-v1")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    out = tmp_path / "made" / "for" / "policy.onnx"
    assert main(["export", str(run), "--out", str(out)]) == 0
    said = capsys.readouterr()
    assert "lstm policy of dualhead/PendulumNoVel-v1 after 0 steps" in said.out
    assert "differ by at most" in said.out
    assert said.err == ""
    description = json.loads(out.with_suffix(".json").read_text())
    assert description["run"]["checkpoint"] == "step-000000000000.safetensors"
    assert description["verified"]["largest_difference"] < 1e-5
    served, player, env = Served(out.read_bytes(), description), load_policy(run), gym.make("dualhead/PendulumNoVel-v1")
    seen, start, played = env.reset(seed=0)[0], True, []
    for _ in range(420):  # two whole episodes and the beginning of a third
        wanted = player.act(seen, start)
        assert_same_actions(served.act(served.step(seen, start)), wanted)
        played.append(wanted)
        seen, _, _, start, _ = env.step(wanted)
        if start:
            seen, _ = env.reset()
    assert np.std(played) > 0.01
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_graph_that_differs_is_not_let_through(tmp_path, monkeypatch):
    policy, spec, actions = make_policy(BOX, HEADS, "lstm")
    graph = StepGraph(policy, spec, actions)
    contents = to_onnx(graph)
    assert verify(contents, graph)["largest_difference"] < 1e-5
    with torch.no_grad():
        policy.memory.lstm.weight_hh_l1[0, 0] += 0.01
    with pytest.raises(RunError, match="the exported graph differs from the policy"):
        verify(contents, graph)
    run = save_run(tmp_path / "run")
    monkeypatch.setattr("dualhead.running.export.to_onnx", lambda _: contents)
    with pytest.raises(RunError, match="ONNX Runtime cannot run the exported graph"):
        export(run, tmp_path / "policy.onnx")
    assert not list(tmp_path.glob("policy*"))


def test_missing_packages_are_said(tmp_path, monkeypatch, capsys):
    run, out = save_run(tmp_path / "run"), tmp_path / "policy.onnx"
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert main(["export", str(run), "--out", str(out)]) == 0
    assert "not checked: ONNX Runtime is not installed (pip install -e '.[onnx]'" in capsys.readouterr().out
    assert json.loads(out.with_suffix(".json").read_text())["verified"] is None
    out.unlink()
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert main(["export", str(run), "--out", str(out)]) == 1
    assert "error: exporting needs the package onnx: pip install -e '.[onnx]'" in capsys.readouterr().err
    assert not out.exists()


def test_what_cannot_be_exported_is_said(tmp_path):
    run = save_run(tmp_path / "run")
    with pytest.raises(RunError, match=r"policy\.pt: expected a name that ends in \.onnx"):
        export(run, tmp_path / "policy.pt")
    with pytest.raises(RunError, match="holds no run: expected"):
        export(tmp_path, tmp_path / "policy.onnx")
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(RunError, match="cannot write"):
        export(run, tmp_path / "file" / "policy.onnx")


def test_serving_needs_no_torch(tmp_path):
    run = save_run(tmp_path / "run", "dualhead/CartPoleNoVel-v1", memory="gru")
    export(run, tmp_path / "policy.onnx")
    code = f"import runpy, sys; runpy.run_path({str(EXAMPLE)!r}, run_name='__main__'); "
    code += "print([name for name in ('torch', 'dualhead') if name in sys.modules])"
    command = [sys.executable, "-c", code, str(tmp_path / "policy.onnx")]
    done = run_process(command, env=os.environ | {"PYTHONWARNINGS": "error"})
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    player, env = load_policy(run), gym.make("dualhead/CartPoleNoVel-v1")
    for episode in range(3):
        observation, _ = env.reset(seed=episode)
        score, ended = 0, True
        while not score or not ended:
            action = player.act(observation, ended)
            observation, _, terminated, truncated, _ = env.step(action)
            score, ended = score + 1, terminated or truncated
        assert lines[episode] == f"episode {episode}: return {score}"
    assert lines[3] == "[]"
