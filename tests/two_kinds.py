"""A small world of two agents with different spaces, one of whom leaves before the other."""

import numpy as np
import torch
from gymnasium import spaces

from dualhead import ByAgent, StreamStep
from dualhead.types import as_numpy


class TwoKinds:
    """W worlds of a scout and a carrier, who sees the scout's last move. An episode has 5 to 8 steps.

    The scout leaves after 2 to 4 of them; its forbidden move changes at every step. Rewards depend on actions.

    Args:
        num_worlds: W.
        first: number of the first world; each has random numbers of its own.
        length: of every episode; None: it varies.
        absent: the agent who never takes part, or None.

    Attributes:
        history: for each world, the rewards of each agent in each of its episodes: [world][episode][agent].
    """

    num_agents = 2
    agent_names = ("scout", "carrier")
    spaces_by_agent = [  # noqa: RUF012
        (
            spaces.Dict(place=spaces.Box(-1, 1, (2,), np.float32), action_mask=spaces.MultiBinary(3)),
            spaces.Discrete(3, start=1),
        ),
        (spaces.Box(-9, 9, (3,), np.float32), spaces.Box(-2, 2, (2,), np.float32)),
    ]
    observation_space, action_space = spaces_by_agent[0]
    resumable = None

    def __init__(self, num_worlds=2, *, first=0, length=None, absent=None):
        self.num_worlds, self.num_streams, self.first = num_worlds, 2 * num_worlds, first
        self.length, self.absent = length, absent

    def reset(self, *, seed=None):
        self.random = [np.random.default_rng([seed, self.first + world]) for world in range(self.num_worlds)]
        self.seed, self.played = seed, ([], [])
        self.history = [[] for _ in range(self.num_worlds)]
        self.turns, self.lengths, self.leaves = np.zeros((3, self.num_worlds), np.int64)
        self.present = np.ones((self.num_worlds, 2), bool)
        self.moves, self.places = np.zeros(self.num_worlds), np.zeros((self.num_worlds, 2))
        for world in range(self.num_worlds):
            self._begin(world)
        return self._observations()

    def _begin(self, world):
        random = self.random[world]
        self.turns[world], self.lengths[world] = 0, random.integers(5, 9) if self.length is None else self.length
        self.leaves[world], self.present[world] = random.integers(2, 5), True
        if self.absent is not None:
            self.present[world, self.absent] = False
        self.places[world] = random.uniform(-1, 1, 2)
        self.history[world].append(([], []))

    @property
    def active(self):
        return self.present.flatten()

    def _observations(self):
        """Zeros and masks of ones for who is not there."""
        scouts, carriers = self.present[:, :1], self.present[:, 1:]
        forbidden = scouts & (self.turns[:, None] % 3 == np.arange(3))
        scout = {"place": np.float32(scouts * self.places), "action_mask": np.int8(~forbidden)}
        return ByAgent([scout, np.float32(carriers * np.column_stack([self.places, self.moves]))])

    def step(self, actions):
        assert isinstance(actions, ByAgent)
        moves, pushes = map(as_numpy, actions)
        for played, part in zip(self.played, (moves, pushes)):
            played.append(torch.tensor(part))
        assert moves.shape == (self.num_worlds,)
        assert pushes.shape == (self.num_worlds, 2)
        assert (np.abs(pushes) <= 2).all()
        rewards = np.zeros((self.num_worlds, 2), np.float32)
        terminated, truncated = np.zeros((2, self.num_worlds, 2), bool)
        took_part = self.present.copy()
        for world in range(self.num_worlds):
            if took_part[world, 0]:
                assert moves[world] - 1 != self.turns[world] % 3
                self.moves[world] = moves[world]
            self.turns[world] += 1
            rewards[world] = took_part[world] * [10 * moves[world] * self.places[world, 0], pushes[world].sum()]
            for agent in np.flatnonzero(took_part[world]):
                self.history[world][-1][agent].append(float(rewards[world, agent]))
            is_over = self.turns[world] == self.lengths[world]
            terminated[world, 0] = took_part[world, 0] and (is_over or self.turns[world] == self.leaves[world])
            truncated[world, 1] = took_part[world, 1] and is_over
            self.places[world] = self.random[world].uniform(-1, 1, 2)
        final = self._observations() if truncated.any() else None
        self.present &= ~terminated
        for world in np.flatnonzero(self.turns == self.lengths):
            self._begin(world)
        return StreamStep(self._observations(), rewards.flatten(), terminated.flatten(), truncated.flatten(), final)

    def state(self):
        """The seed, and all actions since."""
        moves, pushes = map(torch.stack, self.played)
        return {"moves": moves, "pushes": pushes}, {"seed": self.seed}

    def restore(self, tensors, metadata, *, source="checkpoint"):
        self.reset(seed=metadata["seed"])
        for actions in zip(tensors["moves"], tensors["pushes"]):
            self.step(ByAgent(actions))
        return self._observations()

    def statistics(self):
        return {}

    def close(self):
        pass
