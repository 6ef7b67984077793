"""Train an agent in your own loop: with one Gymnasium environment, then with a vector of them."""

import gymnasium as gym

import dualhead.worlds.tasks  # noqa: F401  (registers dualhead/...)
from dualhead import DualHeadRecurrentPPO, NetworkConfig, PPOConfig


def make_agent(envs, num_streams):
    return DualHeadRecurrentPPO(
        getattr(envs, "single_observation_space", envs.observation_space),
        getattr(envs, "single_action_space", envs.action_space),
        num_streams=num_streams,
        config=PPOConfig(rollout_length=100, batch_size=100, learning_rate=1e-3),
        network=NetworkConfig(memory="gru", hidden_size=32, encoder_sizes=(32,)),
    )


def report(agent, metrics):
    print(f"{agent.num_steps:>5} steps  reward {metrics['rollout/task_reward']:.3f}  loss {metrics['loss/total']:.3f}")


env = gym.make("dualhead/RecallCue-v0", delay=3)
agent = make_agent(env, 1)
observation, _ = env.reset(seed=1)
while agent.num_steps < 500:
    action = agent.act(observation)
    action = {head: choice[0] for head, choice in action.items()}  # the one stream of this environment
    next_observation, reward, terminated, truncated, _ = env.step(action)
    agent.record(reward, terminated, truncated, final_observations=next_observation)
    if terminated or truncated:
        next_observation, _ = env.reset()
    observation = next_observation
    if agent.rollout_is_ready:
        report(agent, agent.learn(observation))

# gym.make_vec's default mode, NEXT_STEP, adds a filler step after each episode; the agent would learn from it.
same_step = {"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP}
envs = gym.make_vec("dualhead/RecallCue-v0", 4, vectorization_mode="sync", vector_kwargs=same_step, delay=3)
agent = make_agent(envs, 4)
observations, _ = envs.reset(seed=1)
while agent.num_steps < 2_000:
    observations, rewards, terminated, truncated, infos = envs.step(agent.act(observations))
    agent.record(rewards, terminated, truncated, final_observations=infos.get("final_obs"))
    if agent.rollout_is_ready:
        report(agent, agent.learn(observations))
