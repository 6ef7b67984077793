"""The small agent that most tests use."""

import numpy as np
import torch
from gymnasium import spaces
from torch import nn

from dualhead import DualHeadRecurrentPPO, MemoryCell, NetworkConfig, PPOConfig, RecurrentState

SPACE = spaces.Box(-9, 9, (3,), np.float64)
HEADS = spaces.MultiDiscrete([3, 2])


class Elman(MemoryCell):
    """h' = tanh(W x + U h + b), written as its only method."""

    def __init__(self, input_size, hidden_size, shape=None):
        super().__init__(hidden_size, state_shapes={"h": shape or (1, hidden_size)})
        self.cell = nn.RNNCell(input_size, hidden_size)

    def step(self, features, state):
        h = self.cell(features, state.h[0])
        return h, RecurrentState(h=h[None])


CELLS = ["lstm", "gru", "mingru", "lru", Elman]
"""Every recurrent core that the tests of states run over, a user's own among them."""


def make_agent(memory="lstm", *, preset="spec", **given):
    """An agent in float64 with three streams and rollouts of 20 steps in segments of 7.

    Args:
        memory: a kind of ours, or a part of one's own.
        preset: `spec` or `default`, for what is not given.
        given: fields of PPOConfig, fields of NetworkConfig, and arguments of DualHeadRecurrentPPO, all by their names.
    """

    def fields_of(config):
        return {name: given.pop(name) for name in list(given) if name in config.model_fields}

    ppo = {
        "rollout_length": 20,
        "sequence_length": 7,
        "batch_size": 20,
        "num_epochs": 2,
        "state_refresh": "once",
        "bootstrap_last": True,
    } | fields_of(PPOConfig)
    network = {"hidden_size": 8, "encoder_sizes": (8,)} | fields_of(NetworkConfig)
    if isinstance(memory, str):
        network["memory"] = memory
    else:
        given["memory"] = memory
    make_ppo, make_network = (PPOConfig.spec, NetworkConfig.spec) if preset == "spec" else (PPOConfig, NetworkConfig)
    arguments = {"observation_space": SPACE, "action_space": HEADS, "num_streams": 3, "dtype": torch.float64} | given
    return DualHeadRecurrentPPO(config=make_ppo(**ppo), network=make_network(**network), **arguments)
