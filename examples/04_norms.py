"""A norm forms under punishment, lasts longer than it, and decays: NormEnforcer without an agent."""

import torch

from dualhead import NormConfig, NormEnforcer, NormEvents
from dualhead.norms import steps_until

config = NormConfig(resources=("A", "B"), intrinsic_scale=-5.0)
norms = NormEnforcer(1, **config.model_dump())
takes_a = torch.tensor([[True, False]])
for step in range(1, 201):
    punished = takes_a & (step <= 20)  # punishment of taking A stops after 20 steps
    guilt = norms.update(NormEvents(punished=punished, collected=takes_a))
    if step in (1, 5, 6, 20, 100, 200):
        print(f"step {step:>3}: strength {norms.strengths[0, 0]:.2f}  guilt for taking A {guilt.total.item():.2f}")
half_life = steps_until(config.max_norm_strength, config.internalization_threshold, decay_rate=config.decay_rate)
print(f"from the cap to the threshold without punishment: {half_life:.1f} steps")
