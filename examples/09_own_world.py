"""Your own world of batched tensors: 64 points must move to a goal that they see only in the first step.

All streams step at once, on any device. Actions are values of the action space: those of a Box are clipped and scaled.
"""

import gymnasium as gym
import torch

import dualhead

NUM_STREAMS, LENGTH = 64, 16


class Points:
    """Observation [B, 2]: position, and the goal in an episode's first step (0 later). Action: a move up to 0.5."""

    num_streams = NUM_STREAMS
    observation_space = gym.spaces.Box(-torch.inf, torch.inf, (2,))
    action_space = gym.spaces.Box(-0.5, 0.5, (1,))
    resumable = "this world saves no state"  # or None, with methods `state` and `restore`

    def reset(self, *, seed=None):
        self.random = torch.Generator().manual_seed(seed or 0)
        self.turn = 0
        return self._begin()

    def _begin(self):
        self.goal = torch.rand(NUM_STREAMS, generator=self.random) * 2 - 1
        self.place = torch.zeros(NUM_STREAMS)
        return torch.stack([self.place, self.goal], dim=1)

    def step(self, actions):
        assert actions.abs().max() <= 0.5
        self.place, self.turn = self.place + actions[:, 0], self.turn + 1
        rewards = -(self.place - self.goal).abs()
        seen = torch.stack([self.place, torch.zeros(NUM_STREAMS)], dim=1)
        ends = self.turn % LENGTH == 0
        cut_off = torch.full((NUM_STREAMS,), ends)
        observations = self._begin() if ends else seen
        return dualhead.StreamStep(observations, rewards, torch.zeros_like(cut_off), cut_off, seen if ends else None)

    def statistics(self):
        return {"points/distance": (self.place - self.goal).abs().mean().item()}

    def close(self):
        pass


if __name__ == "__main__":
    result = dualhead.train(
        Points(), eval_env=Points(), total_steps=200_000, eval_episodes=64, checkpoint_every=200_000
    )
    print(f"mean return {result.summary['evaluation']['mean_return']:.2f}; staying at 0 gives about {-LENGTH / 2:.0f}")
