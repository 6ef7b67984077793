"""The state-punishment commons: how often agents take the harmful resource A after punishment stops.

Compares agents with and without internalised norms: bandit form, one policy shared by all agents, your own loop.

Usage: python examples/05_commons.py [--turns N]
"""

import argparse

from dualhead import CommonsConfig, DualHeadRecurrentPPO, NetworkConfig, NormConfig, Phase, PPOConfig
from dualhead.worlds.commons.world import Commons

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--turns", type=int, default=500, help="turns with punishment, and as many without")
turns = parser.parse_args().turns

rules = CommonsConfig(
    form="bandit",
    resources=("A", "B"),
    # The default schedule sometimes punishes B as well, so B would get a norm too.
    schedule={"A": (1.0,), "B": (0.0,)},
    phases=(Phase(mode="fixed", level=0, num_turns=turns), Phase(mode="off")),
)
ppo = PPOConfig(
    rollout_length=20, batch_size=200, num_epochs=4, learning_rate=2e-3, entropy_coef=0.05, normalize_rewards=True
)
# Guilt outweighs the gain of 10 from taking A while the strength is above 5 + 10 / 10 = 6. A strength stays high only
# if some agents still take A and are punished. The entropy bonus keeps them exploring, and the decay is slow.
norms = NormConfig(resources=("A", "B"), intrinsic_scale=-10.0, decay_rate=0.999)
print("share of A among resources taken, per 100 turns (| marks where punishment stops)")
for name, enforced in (("without norms", None), ("with norms", norms)):
    worlds = Commons(rules, num_worlds=4)
    agent = DualHeadRecurrentPPO(
        worlds.observation_space,
        worlds.action_space,
        num_streams=worlds.num_streams,
        config=ppo,
        network=NetworkConfig(memory="gru", hidden_size=32, encoder_sizes=(32,)),
        norms=enforced,
    )
    observations = worlds.reset(seed=0)
    shares, strength = [], 0.0
    taken = worlds.events.collected.sum(0) * 0.0
    while worlds.turn < 2 * turns:
        step = worlds.step(agent.act(observations))
        events = worlds.events if enforced else None
        agent.record(
            step.rewards, step.terminated, step.truncated, final_observations=step.final_observations, events=events
        )
        observations = step.observations
        taken += worlds.events.collected.sum(0)
        if agent.rollout_is_ready:
            metrics = agent.learn(observations)
        if worlds.turn == turns:
            strength = metrics.get("norms/strength/A", 0.0)
        if worlds.turn % 100 == 0:
            shares.append(f"{taken[0] / taken.sum():.2f}" + (" |" if worlds.turn == turns else ""))
            taken.zero_()
    print(f"{name:>14}: {' '.join(shares)}   strength of the norm when punishment stopped: {strength:.1f}")
