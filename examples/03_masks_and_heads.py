"""Two named heads, a grid and scalars as observations, and masks: on some turns only votes are allowed."""

import numpy as np
from gymnasium import spaces

from dualhead import DualHeadRecurrentPPO, NetworkConfig, PPOConfig

NUM_STREAMS = 4
observation_space = spaces.Dict(
    grid=spaces.Box(0, 1, (5, 9, 9), np.float32),
    scalars=spaces.Box(-np.inf, np.inf, (3,), np.float32),
    action_mask=spaces.Dict(move=spaces.MultiBinary(5), vote=spaces.MultiBinary(3)),
)
action_space = spaces.Dict(move=spaces.Discrete(5), vote=spaces.Discrete(3))
agent = DualHeadRecurrentPPO(
    observation_space,
    action_space,
    num_streams=NUM_STREAMS,
    config=PPOConfig(rollout_length=40, entropy_coef=(0.01, 0.02)),  # one weight per head
    network=NetworkConfig(hidden_size=64, encoder_sizes=(64,)),
)
rng = np.random.default_rng(0)


def observe(turn: int) -> dict:
    """Every tenth turn is for voting: the only legal move is then to stay (4), else the only legal vote is none (0)."""
    voting = turn % 10 == 9
    move, vote = np.ones((NUM_STREAMS, 5)), np.ones((NUM_STREAMS, 3))
    (move if voting else vote)[:, : 4 if voting else None] = 0
    vote[:, 0] = 1
    grid = rng.integers(0, 2, (NUM_STREAMS, 5, 9, 9)).astype(np.float32)
    return {"grid": grid, "scalars": rng.normal(size=(NUM_STREAMS, 3)), "action_mask": {"move": move, "vote": vote}}


for turn in range(40):
    actions = agent.act(observe(turn))
    if turn % 10 == 9:
        assert (actions["move"] == 4).all()
    else:
        assert (actions["vote"] == 0).all()
    agent.record(rng.normal(size=NUM_STREAMS), np.zeros(NUM_STREAMS, bool), np.zeros(NUM_STREAMS, bool))
metrics = agent.learn(observe(40))
print({name: round(value, 4) for name, value in metrics.items() if name.startswith(("entropy", "loss"))})
