"""A policy in NumPy, one stream and one step at a time: the independent reference for what a policy computes."""

import numpy as np


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def slow_cell(kind, x, h, c, w_ih, w_hh, b_ih, b_hh):
    """One step of one layer: x [..., F], h and c [..., H]; the formulas of the torch documentation in NumPy."""
    given, kept = x @ w_ih.T + b_ih, h @ w_hh.T + b_hh
    if kind == "lstm":
        i, f, g, o = np.split(given + kept, 4, axis=-1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        return sigmoid(o) * np.tanh(c), c
    (r_x, z_x, n_x), (r_h, z_h, n_h) = np.split(given, 3, axis=-1), np.split(kept, 3, axis=-1)
    r, z = sigmoid(r_x + r_h), sigmoid(z_x + z_h)
    n = np.tanh(n_x + r * n_h)
    return (1 - z) * n + z * h, c


class SlowPolicy:
    """One stream of a policy with vector observations, played from its weights.

    Attributes:
        state: {"actor": (h, c) per layer, "critic": likewise}; both may stay unused.
        previous: (action [C], reward) of the step before, or None at an episode's first step.
    """

    def __init__(self, policy, network, nvec, *, bounded):
        self.weights = {name: tensor.detach().numpy() for name, tensor in policy.state_dict().items()}
        self.network, self.nvec, self.bounded = network, nvec, bounded
        self.reset()

    def reset(self):
        zeros = [(np.zeros(self.network.hidden_size),) * 2] * self.network.num_layers
        self.state = {"memory": list(zeros), "critic_memory": list(zeros)}
        self.previous = None

    def _linears(self, prefix, x):
        """All Linear layers under a prefix, each followed by the activation."""
        numbers = sorted(
            {int(name[len(prefix) + 1 :].split(".")[0]) for name in self.weights if name.startswith(prefix + ".")}
        )
        for n in numbers:
            x = self.weights[f"{prefix}.{n}.weight"] @ x + self.weights[f"{prefix}.{n}.bias"]
            x = np.tanh(x) if self.network.activation == "tanh" else np.maximum(x, 0)
        return x

    def _remember(self, where, kind, x):
        if kind == "none":
            return np.maximum(self.weights[f"{where}.linear.weight"] @ x + self.weights[f"{where}.linear.bias"], 0)
        for layer, (h, c) in enumerate(self.state[where]):
            names = (f"{where}.{kind}.{name}_l{layer}" for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
            h, c = slow_cell(kind, x, h, c, *(self.weights[name] for name in names))
            self.state[where][layer] = (h, c)
            x = h
        return x

    def _inputs(self, x):
        """Encoder features and what is seen of the step before."""
        parts = [self._linears("encoder.joined", x)]
        if self.network.previous_action:
            for k, n in enumerate(self.nvec):
                code = np.zeros(n)
                if self.previous is not None:
                    code[int(self.previous[0][k])] = 1.0
                parts.append(code)
            numbers = np.zeros(len(self.bounded)) if self.previous is None else self.previous[0][len(self.nvec) :]
            parts.append(np.where(self.bounded, np.clip(numbers, -1, 1), numbers))
        if self.network.previous_reward:
            parts.append(np.array([0.0 if self.previous is None else self.previous[1]]))
        return np.concatenate(parts)

    def step(self, x):
        """Observation [F] -> logits, or means, per head, and the value; advances the state."""
        inputs = self._inputs(x)
        h = self._remember("memory", self.network.memory, inputs)
        v = h
        if self.network.critic_memory != "shared":
            v = self._remember("critic_memory", self.network.critic_memory, inputs)
        actor, critic = self._linears("actor_layers", h), self._linears("critic_layers", v)
        heads = sorted({int(name.split(".")[2]) for name in self.weights if name.startswith("heads.linears.")})
        outputs = [
            self.weights[f"heads.linears.{k}.weight"] @ actor + self.weights[f"heads.linears.{k}.bias"] for k in heads
        ]
        value = self.weights["critic.weight"] @ critic + self.weights["critic.bias"]
        return outputs, float(value[0])

    def value_of(self, x):
        """V of an observation; the state stays as it is."""
        kept = {name: list(layers) for name, layers in self.state.items()}
        _, value = self.step(x)
        self.state = kept
        return value


def log_softmax(logits):
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())
