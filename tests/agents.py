"""The small agent that most tests use."""

import numpy as np
import torch
from gymnasium import spaces

from dualhead import DualHeadRecurrentPPO, NetworkConfig, PPOConfig

SPACE = spaces.Box(-9, 9, (3,), np.float64)
HEADS = spaces.MultiDiscrete([3, 2])


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
