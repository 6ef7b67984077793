"""Serve an exported policy with ONNX Runtime and NumPy, without importing torch or dualhead.

Usage: python examples/06_serve_onnx.py [policy.onnx]    without a file, trains a policy for some seconds and exports it
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import gymnasium as gym
import numpy as np
import onnxruntime


def train_and_export(folder: str) -> str:
    run, out = f"{folder}/run", f"{folder}/policy.onnx"
    train = ["train", "dualhead/CartPoleNoVel-v1", "--total-steps", "10240", "--eval-episodes", "0", "--run-dir", run]
    for command in ([*train, "--num-threads", "1"], ["export", run, "--out", out]):
        subprocess.run([sys.executable, "-m", "dualhead", *command], check=True)
    return out


with tempfile.TemporaryDirectory() as folder:
    path = Path(sys.argv[1] if len(sys.argv) > 1 else train_and_export(folder))
    policy = onnxruntime.InferenceSession(path.read_bytes())
    about = json.loads(path.with_suffix(".json").read_text())

shapes = {port["name"]: [1 if n == "batch" else n for n in port["shape"]] for port in about["inputs"]}
zeros = {part["input"]: np.zeros(shapes[part["input"]], np.float32) for part in about["state"]}
names = [port["name"] for port in about["outputs"]]
(head,) = about["actions"]["heads"]
env = gym.make("CartPole-v1")  # the policy was trained on every second number: no velocities
for episode in range(3):
    observation, _ = env.reset(seed=episode)
    state, score, running = zeros, 0.0, True
    while running:
        outputs = dict(zip(names, policy.run(names, {"observation": observation[None, ::2], **state})))
        state = {part["input"]: outputs[part["output"]] for part in about["state"]}
        action = head["start"] + outputs[head["output"]][0].argmax()
        observation, reward, terminated, truncated, _ = env.step(action)
        score += reward
        running = not (terminated or truncated)
    print(f"episode {episode}: return {score:.0f}")
