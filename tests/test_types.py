"""Type checkers are content with correct code, and tell of wrong code; `help` and `repr` are of use."""

import pydoc
import sys

import pytest
from processes import run_process

import dualhead
from dualhead import CommonsConfig, NetworkConfig, PPOConfig, RunConfig

CORRECT = """
import gymnasium as gym
from dualhead import CommonsConfig, DualHeadRecurrentPPO, NetworkConfig, PPOConfig, Phase, RunConfig, evaluate, train

ppo = PPOConfig(gamma=0.9, entropy_coef=(0.1, 0.2), sequence_length="rollout", target_kl=None)
network = NetworkConfig(memory="gru", encoder_sizes=(32, 32))
rules = CommonsConfig(num_agents=3, phases=(Phase(mode="off"),))
config = RunConfig(env="commons", ppo=ppo, network=network, world=rules, total_steps=1000)


def on_update(session: object, metrics: dict[str, float]) -> bool:
    return metrics["episode/mean_return"] > 400


class Prints:
    def write(self, num_steps: int, metrics: object) -> None:
        print(num_steps)

    def close(self) -> None: ...


env = gym.make("CartPole-v1")
agent = DualHeadRecurrentPPO(env.observation_space, env.action_space, config=ppo, network=network)
result = train("CartPole-v1", ppo=ppo, writers=[Prints()], on_update=on_update, learning_rate=lambda done: 1e-3 * done)
train(lambda: gym.make("CartPole-v1"), num_envs=2)
mean: float = evaluate(result.summary["run_dir"]).summary()["mean_return"]
"""
WRONG = """
from dualhead import PPOConfig, train

PPOConfig(gama=0.9)
train("CartPole-v1", writers=[3])
"""


@pytest.mark.slow
def test_mypy_likes_correct_code_and_no_other(tmp_path):
    pytest.importorskip("mypy")
    (tmp_path / "correct.py").write_text(CORRECT)
    (tmp_path / "wrong.py").write_text(WRONG)
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path), "--ignore-missing-imports"]

    def said(name):
        return run_process([*command, name], cwd=tmp_path).stdout

    assert "Success" in said("correct.py"), said("correct.py")
    wrong = said("wrong.py")
    assert "wrong.py:4" in wrong
    assert "wrong.py:5" in wrong


def test_every_public_name_is_there_and_known_to_type_checkers():
    assert {"DualHeadRecurrentPPO", "PPOConfig", "train"} < set(dualhead.__all__)
    for name in dualhead.__all__:
        assert getattr(dualhead, name).__name__ == name
    with pytest.raises(AttributeError, match="attribute trian"):
        dualhead.trian  # noqa: B018


@pytest.mark.parametrize("of", [PPOConfig, NetworkConfig, CommonsConfig, RunConfig])
def test_help_says_what_each_setting_is(of):
    shown = " ".join(pydoc.plain(pydoc.render_doc(of)).split()).replace("| ", "")
    for name, field in of.model_fields.items():
        assert f"{name}: {' '.join(field.description.split())}" in shown


def test_a_repr_shows_what_differs_from_the_defaults():
    assert repr(PPOConfig(gamma=0.9)) == "PPOConfig(gamma=0.9)"
    assert repr(RunConfig(env="CartPole-v1", network={"memory": "gru"})) == (
        "RunConfig(env='CartPole-v1', network=NetworkConfig(memory='gru'))"
    )
