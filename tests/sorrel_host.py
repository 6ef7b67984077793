"""Sorrel's side, for Pythons that Sorrel does not run on: what its `Environment` calls on a model, in its order."""

import numpy as np

NUM_NUMBERS, NUM_ACTIONS = 5, 4


class World:
    """Observations are random numbers and the last action; rewards depend on the action, as int or float.

    Args:
        done_at: turns of an epoch whose step says `done`; the epoch goes on.
        resources: kinds that actions collect; every third collection is punished.
    """

    def __init__(self, seed, *, done_at=(), resources=()):
        self.random, self.done_at, self.resources = np.random.default_rng(seed), done_at, resources
        self.reset()

    def reset(self):
        self.turn = self.last = 0

    def observe(self):
        return np.append(self.random.normal(size=NUM_NUMBERS - 1), self.last).reshape(1, -1)

    def step(self, action):
        """Reward, done and [(resource, punished)]."""
        self.turn, self.last = self.turn + 1, action
        reward = action if self.turn % 2 else action / 4 - 0.5
        events = [(name, self.turn % 3 == 0) for number, name in enumerate(self.resources) if action == number]
        return reward, self.turn in self.done_at, events


class Host:
    """`sorrel.environment.Environment` of Sorrel 1.6.0 with one agent, as treasurehunt's: the same calls."""

    def __init__(self, world, model, *, max_turns):
        self.world, self.model, self.max_turns = world, model, max_turns
        self.log, self.saved_games = [], []
        model.memory.extra_data["positions"] = np.zeros((model.memory.capacity, 2), dtype=np.int64)

    def take_turn(self, *, logs):
        memory = self.model.memory
        state = self.world.observe()
        earlier = memory.current_state()
        assert (earlier.shape, earlier.dtype) == ((0, NUM_NUMBERS), np.float32)
        action = self.model.take_action(np.vstack((earlier, state)).reshape(1, -1))
        assert type(action) is int
        reward, done, events = self.world.step(action)
        for resource, punished in events:
            self.model.note(resource, punished)
        memory.add(state, action, reward, done, positions=(self.world.turn, action))
        if logs:
            last = memory.last_transition(0)
            assert last == (action, reward, done)
            assert list(map(type, last)) == [int, float, bool]

    def _epoch(self, number, *, logs):
        self.world.reset()
        self.model.reset()
        self.model.start_epoch_action(epoch=number)
        while self.world.turn < self.max_turns:
            self.take_turn(logs=logs)
        self.model.end_epoch_action(epoch=number)

    def run_experiment(self, epochs):
        for epoch in range(epochs + 1):
            self._epoch(epoch, logs=True)
            loss = 0 + self.model.train_step()
            self.log.append((epoch, loss, self.model.epsilon))
            self.model.epsilon_decay(0.1)

    def generate_memories(self, num_games):
        if hasattr(self.model, "eval"):
            self.model.eval()
        for game in range(num_games):
            self._epoch(game, logs=False)
            memory = self.model.memory
            arrays = (memory.states, memory.actions, memory.rewards, memory.dones, memory.extra_data["positions"])
            self.saved_games.append([array[: memory.size].copy() for array in arrays])
