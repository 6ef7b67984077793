"""Worlds whose agents leave one by one and begin again together: what the tests of inactive streams use."""

import numpy as np
import torch
from gymnasium import spaces

from dualhead import StreamStep
from dualhead.norms import NormEvents


class Dying:
    """Streams of W worlds with A agents. An agent sits out from its last step until its world begins again.

    An observation is (age, individual, noise, noise): which step of its episode it is, from 1 on, and a number that no
    other episode of any stream has. Those of agents that sit out have a negative age.

    Args:
        lives: lengths of the agents' episodes, [A] for each episode of each world as they begin; None: drawn.
        filler: what agents that sit out see, besides their age.
        masks: show an action mask as well.

    Attributes:
        log: of every step what was seen, who was active, and what came of it.
    """

    action_space = spaces.MultiDiscrete([3, 2])
    resources = ("A", "B")
    resumable = None

    def __init__(self, num_worlds=2, num_agents=3, *, lives=None, filler=0.5, masks=False, seed=0):
        self.num_worlds, self.num_agents, self.num_streams = num_worlds, num_agents, num_worlds * num_agents
        self.lives, self.filler, self.masks = None if lives is None else iter(lives), filler, masks
        self.rng = np.random.default_rng(seed)
        self.observation_space = spaces.Box(-np.inf, np.inf, (4,), np.float64)
        if masks:
            self.observation_space = spaces.Dict(observation=self.observation_space, action_mask=spaces.MultiBinary(5))
        self.age, self.life, self.individual = (np.zeros(self.num_streams, dtype=np.int64) for _ in range(3))
        self.alive = np.zeros(self.num_streams, dtype=bool)
        self.num_individuals = 0
        self.log = []

    @property
    def active(self):
        return None if self.alive.all() else self.alive.copy()

    def reset(self, *, seed=None):
        for world in range(self.num_worlds):
            self._begin(world)
        return self._look()

    def _begin(self, world):
        of_world = slice(world * self.num_agents, (world + 1) * self.num_agents)
        drawn = self.rng.integers(1, 9, self.num_agents)
        self.life[of_world] = drawn if self.lives is None else next(self.lives)
        self.individual[of_world] = self.num_individuals + np.arange(1, self.num_agents + 1)
        self.num_individuals += self.num_agents
        self.age[of_world], self.alive[of_world] = 1, True

    def _look(self):
        numbers = np.column_stack([self.age, self.individual, self.rng.normal(size=(self.num_streams, 2))])
        numbers[~self.alive] = [-1.0, *[self.filler] * 3]
        if not self.masks:
            self.seen = numbers
        else:
            mask = self.rng.random((self.num_streams, 5)) < 0.5
            mask[:, [1, 4]] = True  # one choice per head stays legal
            mask[~self.alive] = True
            self.seen = {"observation": numbers, "action_mask": mask.astype(np.int8)}
        return self.seen

    def step(self, actions):
        seen, active = self.seen, self.alive.copy()
        ended = active & (self.age == self.life)
        terminated = ended & (self.rng.random(self.num_streams) < 0.5)
        rewards = np.where(active, self.rng.normal(size=self.num_streams), 0.0)
        events = NormEvents(*(self.rng.random((2, self.num_streams, 2)) < [[[0.5]], [[0.7]]]))
        self.age += 1
        final = self._look()
        self.alive &= ~ended
        for world in np.flatnonzero(~self.alive.reshape(self.num_worlds, -1).any(1)):
            self._begin(world)
        step = StreamStep(
            self._look(),
            rewards,
            terminated,
            ended & ~terminated,
            final,
            events,
            active=None if active.all() else active,
        )
        self.log.append((seen, active, step))
        return step

    def statistics(self):
        return {}

    def state(self):
        numbers = {
            name: torch.from_numpy(getattr(self, name).copy()) for name in ("age", "life", "individual", "alive")
        }
        seen = {"seen": torch.from_numpy(self.seen.copy())}
        return numbers | seen, {"rng": self.rng.bit_generator.state, "num_individuals": self.num_individuals}

    def restore(self, tensors, metadata, *, source="checkpoint"):
        for name, tensor in tensors.items():
            setattr(self, name, tensor.numpy().copy())
        self.rng.bit_generator.state = metadata["rng"]
        self.num_individuals = metadata["num_individuals"]
        return self.seen

    def close(self):
        pass


def play(agent, world, num_steps=None, *, garbage=0.0, events=False):
    """Acts until the rollout is full, or `num_steps` times; inactive streams are said to get `garbage` as reward."""
    if not world.log:
        world.reset()
    while not agent.rollout_is_ready and num_steps != 0:
        inactive = ~world.alive
        step = world.step(agent.act(world.seen, active=world.active))
        rewards, terminated, truncated = step.rewards.copy(), step.terminated.copy(), step.truncated.copy()
        if garbage:
            rewards[inactive], terminated[inactive], truncated[inactive] = garbage, True, True
        agent.record(
            rewards,
            terminated,
            truncated,
            final_observations=step.final_observations,
            events=step.events if events else None,
        )
        num_steps = None if num_steps is None else num_steps - 1
