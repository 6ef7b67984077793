"""Learning, by tasks that cannot be solved without memory; each with its memoryless control."""

import pytest

from dualhead.running.config import RunConfig
from dualhead.running.trainer import train

pytestmark = pytest.mark.slow


def score(tmp_path, env, *, memory="lstm", seed=0, total_steps=None, **ppo):
    settings = {"network": {"memory": memory}, "ppo": ppo} | ({"total_steps": total_steps} if total_steps else {})
    run_dir = tmp_path / f"{memory}-{seed}-{len(list(tmp_path.iterdir()))}"
    config = RunConfig(env=env, preset="tuned", seed=seed, run_dir=str(run_dir), **settings)
    return train(config).summary["evaluation"]["mean_return"]


@pytest.mark.parametrize("memory", ["lstm", "gru"])
def test_balances_a_pole_without_velocities(tmp_path, memory):
    assert score(tmp_path, "dualhead/CartPoleNoVel-v1", memory=memory) >= 450


def test_memoryless_control_cannot_balance(tmp_path):
    assert score(tmp_path, "dualhead/CartPoleNoVel-v1", memory="none") < 100


def test_repeats_what_it_saw_four_steps_ago(tmp_path):
    env = "popgym-RepeatPreviousEasy-v0"
    assert score(tmp_path, env, total_steps=500_000) >= 0.95
    assert score(tmp_path, env, total_steps=100_000, memory="none") < 0.0
