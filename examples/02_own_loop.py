"""Drive the agent from a loop of your own: one plain Gymnasium environment, three calls."""

import gymnasium as gym

import dualhead.worlds.tasks  # noqa: F401  (registers dualhead/...)
from dualhead import DualHeadRecurrentPPO, NetworkConfig, PPOConfig

env = gym.make("dualhead/RecallCue-v0", delay=3)
agent = DualHeadRecurrentPPO(
    env.observation_space,
    env.action_space,
    config=PPOConfig(rollout_length=100, batch_size=50, sequence_length=4, learning_rate=1e-3),
    network=NetworkConfig(memory="gru", hidden_size=32, encoder_sizes=(32,)),
    seed=1,
)
observation, _ = env.reset(seed=1)
while agent.num_steps < 1_000:
    actions = agent.act(observation)
    action = {head: choice[0] for head, choice in actions.items()}  # the one stream of this environment
    next_observation, reward, terminated, truncated, _ = env.step(action)
    agent.record(reward, terminated, truncated, final_observations=next_observation)
    if terminated or truncated:
        next_observation, _ = env.reset()
    observation = next_observation
    if agent.rollout_is_ready:
        metrics = agent.learn(observation)
        print(
            f"{agent.num_steps:>5} steps  reward {metrics['rollout/task_reward']:.3f}  "
            f"entropy where {metrics['entropy/where']:.2f} what {metrics['entropy/what']:.2f}  "
            f"state drift {metrics['state_drift/value_last']:.4f}"
        )
