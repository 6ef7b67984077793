"""Your own encoder with pretrained weights: frozen features of an image."""

import numpy as np
import torch
from gymnasium import spaces
from torch import nn

from dualhead import DualHeadRecurrentPPO, NetworkConfig, PPOConfig

NUM_STREAMS = 4


class Pretrained(nn.Module):
    """Called with the observation's leaves by name; a plain space has one, `observation` [N, 3, 16, 16] here.

    An encoder needs `num_features`, the width of its output, and initialises its own weights.
    """

    num_features = 32

    def __init__(self, observation_space):
        super().__init__()
        channels = observation_space.shape[0]
        self.body = nn.Sequential(nn.Conv2d(channels, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.LazyLinear(32))
        self.body(torch.zeros(1, *observation_space.shape))
        # A real encoder loads its weights here: self.load_state_dict(torch.load("body.pt", weights_only=True))
        self.requires_grad_(False)  # frozen: leave this out to train it with the policy
        self.eval()

    def forward(self, observations):
        return self.body(observations["observation"].float() / 255)


space = spaces.Box(0, 255, (3, 16, 16), np.uint8)
agent = DualHeadRecurrentPPO(
    space,
    spaces.Discrete(4),
    num_streams=NUM_STREAMS,
    encoder=Pretrained,  # a class or function of the observation space, or a module
    config=PPOConfig(rollout_length=32, batch_size=64),
    network=NetworkConfig(hidden_size=32),
)
before = [parameter.clone() for parameter in agent.policy.encoder.parameters()]
rng = np.random.default_rng(0)
for _ in range(32):
    agent.act(rng.integers(0, 256, (NUM_STREAMS, *space.shape), np.uint8))
    agent.record(rng.normal(size=NUM_STREAMS), np.zeros(NUM_STREAMS, bool), np.zeros(NUM_STREAMS, bool))
metrics = agent.learn(rng.integers(0, 256, (NUM_STREAMS, *space.shape), np.uint8))
assert all(torch.equal(*pair) for pair in zip(before, agent.policy.encoder.parameters()))
print(f"loss {metrics['loss/total']:.3f}; the encoder's {sum(p.numel() for p in before):,} weights are unchanged")

agent.save("agent.safetensors")  # stores only the encoder's name: pass the encoder again to load the file
again = DualHeadRecurrentPPO.from_file("agent.safetensors", encoder=Pretrained)
print(again)
