"""Settings and small helpers that tests share."""

from dualhead import PPOConfig


def take_step(session):
    """One step of a session, as the training loop takes it."""
    session.record(session.streams.step(session.learner.act(session.observations)))


def spec_segments(**changes):
    """The specification's PPO on segments of 16 steps, with refreshed states and a bootstrapped end of rollouts."""
    return PPOConfig.spec(**{"sequence_length": 16, "state_refresh": "once", "bootstrap_last": True} | changes)


def act_in_heads(agent, observations):
    """Acts, and returns what the policy chose in its own terms [B, C]: head indices, then numbers before scaling."""
    agent.act(observations)
    return agent.rollout_memory.actions[agent.rollout_memory.length].numpy().copy()
