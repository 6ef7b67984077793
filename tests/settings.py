"""Settings that tests share."""

from dualhead import PPOConfig


def spec_segments(**changes):
    """The specification's PPO on segments of 16 steps, with refreshed states and a bootstrapped end of rollouts."""
    return PPOConfig.spec(**{"sequence_length": 16, "state_refresh": "epoch", "bootstrap_last": True} | changes)
