"""Your own memory cell in one method, `step`. It learns to remember a cue, as the built-in cells do."""

import torch
from torch import nn

from dualhead import DualHeadRecurrentPPO, MemoryCell, NetworkConfig, PPOConfig, RecurrentState
from dualhead.worlds.streams import make_streams


class MinimalGRU(MemoryCell):
    """h' = (1 - z) h + z (W x + b) with z = sigmoid(V x + c): a GRU whose gate does not depend on h."""

    def __init__(self, input_size, hidden_size):
        # The state has one part, h, of one layer: [1, B, hidden_size], zeros where an episode begins.
        super().__init__(hidden_size, state_shapes={"h": (1, hidden_size)})
        self.gate = nn.Linear(input_size, hidden_size)
        self.candidate = nn.Linear(input_size, hidden_size)
        nn.init.constant_(self.gate.bias, -2.0)  # at first the cell keeps most of its state

    def step(self, features, state):
        """One time step of B streams: features [B, F] -> (outputs [B, H], next state)."""
        z = torch.sigmoid(self.gate(features))
        h = torch.lerp(state.h[0], self.candidate(features), z)
        return h, RecurrentState(h=h[None])


streams = make_streams("dualhead/RecallCue-v0", 16, delay=3)
agent = DualHeadRecurrentPPO(
    streams.observation_space,
    streams.action_space,
    num_streams=streams.num_streams,
    memory=MinimalGRU,  # the agent checks that stepping and unrolling agree
    config=PPOConfig(rollout_length=64, batch_size=256),
    network=NetworkConfig(hidden_size=64),
)
observations = streams.reset(seed=0)
while agent.num_steps < 20_000:
    step = streams.step(agent.act(observations))
    agent.record(step.rewards, step.terminated, step.truncated, final_observations=step.final_observations)
    observations = step.observations
    if agent.rollout_is_ready:
        metrics = agent.learn(observations)
        if agent.num_updates % 4 == 0:
            print(f"{agent.num_steps:>6} steps  reward per step {metrics['rollout/task_reward']:.3f}")
