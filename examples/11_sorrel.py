"""Sorrel's treasurehunt, played and learned by this agent. Python 3.12; in the checkout `pip install -e .[sorrel]`."""

import tempfile
from pathlib import Path

import numpy as np
from sorrel.examples.treasurehunt.entities import EmptyEntity
from sorrel.examples.treasurehunt.env import TreasurehuntEnv
from sorrel.examples.treasurehunt.world import TreasurehuntWorld
from sorrel.utils.logging import Logger

from dualhead import PPOConfig, SorrelDualHeadPPO

EPOCHS = 60
CONFIG = {
    "experiment": {"epochs": EPOCHS, "max_turns": 100, "record_period": EPOCHS},
    "model": {"agent_vision_radius": 2, "num_agents": 2, "save_weights": True},
    "world": {"height": 11, "width": 11, "gem_value": 10, "food_value": 5, "bone_value": -10, "spawn_prob": 0.02},
}


class Env(TreasurehuntEnv):
    def setup_agents(self):
        super().setup_agents()
        for number, agent in enumerate(self.agents):  # a model for each: a shared one is refused
            agent.model = SorrelDualHeadPPO(
                agent.observation_spec.input_size,
                agent.action_spec.n_actions,
                layer_size=64,
                seed=number,
                grid=(6, 5, 5),  # one-hot: kinds of entities, and two fields to each side
                config=PPOConfig(rollout_length=100),  # the turns of an epoch
            )


np.random.seed(0)  # noqa: NPY002  (Sorrel's worlds draw from it)
env, logger = Env(TreasurehuntWorld(config=CONFIG, default_entity=EmptyEntity()), CONFIG), Logger(EPOCHS)
with tempfile.TemporaryDirectory() as folder:
    env.run_experiment(animate=False, logger=logger, output_dir=Path(folder))
    saved = sorted(Path(folder).glob("checkpoints/*.pkl"))
    env.agents[0].model.load(saved[-2])  # of agent 0 at the last epoch
for first in range(0, EPOCHS, 20):
    rewards = logger.rewards[first : first + 20]
    print(f"epochs {first:>2} to {first + len(rewards) - 1}: the world's reward is {np.mean(rewards):6.1f}")
print("of the last update:", {name: round(value, 3) for name, value in env.agents[0].model.metrics.items()})
