"""Suites of environments: what is listed can be made, and what is missing is said."""

import sys
from contextlib import closing
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

from dualhead.cli import main
from dualhead.errors import UnavailableEnvironment
from dualhead.worlds.registry import WORLDS
from dualhead.worlds.streams import make_env, make_streams
from dualhead.worlds.suites import SUITES, listed, missing, suite_of

ONE_OF_EACH = {
    "dualhead": "dualhead/MountainCarContinuousNoVel-v0",
    "gymnasium": "Taxi-v4",
    "box2d": "LunarLander-v3",
    "mujoco": "Hopper-v5",
    "atari": "ALE/Pong-v5",
    "minigrid": "MiniGrid-MemoryS7-v0",
    "popgym": "popgym-RepeatFirstEasy-v0",
    "dm-control": "dm_control/cartpole-swingup-v0",
    "mpe2": "pettingzoo:mpe2.simple_spread_v3",
    "butterfly": "pettingzoo:pettingzoo.butterfly.knights_archers_zombies_v11",
    "sisl": "pettingzoo:pettingzoo.sisl.pursuit_v5",
}


def needs(suite):
    if lacks := missing(suite):
        pytest.skip(f"{suite} {lacks}")


def by_name():
    return {suite.name: suite for suite in listed()}


@pytest.mark.parametrize("name", SUITES)
def test_one_of_each_suite_is_listed_and_can_be_made(name):
    needs(name)
    env = ONE_OF_EACH[name]
    assert suite_of(env) == name
    found = by_name()[name]
    assert found.missing is None
    assert env in found.ids
    if not env.startswith("pettingzoo:"):
        with closing(make_env(env)) as made:
            observation, _ = made.reset(seed=0)
            assert observation in made.observation_space


def test_a_missing_suite_is_one_line_and_none_of_its_environments(monkeypatch, capsys):
    for module in ("mujoco", "popgym", "mpe2"):
        monkeypatch.setitem(sys.modules, module, None)
    assert main(["envs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, module in {"mujoco": "mujoco", "popgym": "popgym", "mpe2": "mpe2"}.items():
        assert f"{name}: needs the package {module}: pip install -e '.[{name}]' in the checkout" in lines
    assert not [line for line in lines if any(word in line for word in ("Hopper-v", "popgym-", "simple_spread"))]
    assert main(["envs", "Hopper-v5"]) == 0  # known to Gymnasium
    assert capsys.readouterr().out == "mujoco: needs the package mujoco: pip install -e '.[mujoco]' in the checkout\n"
    with pytest.raises(UnavailableEnvironment, match=r"Hopper-v5.*mujoco.*pip install -e '\.\[mujoco\]'"):
        make_streams("Hopper-v5", 1)


def test_a_package_that_cannot_be_imported_is_missing(monkeypatch, tmp_path):
    (tmp_path / "ale_py.py").write_text("import no_such_library")
    (tmp_path / "cv2.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    for module in ("ale_py", "cv2"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    assert missing("atari").startswith("needs the package no_such_library")


def test_what_gymnasium_cannot_make_is_not_listed():
    ids = {env for suite in listed(WORLDS) for env in suite.ids}
    assert {"CartPole-v1", "commons", "dualhead/RecallCue-v0"} <= ids
    assert not ids & {"Hopper-v3", "Ant-v2", "Pusher-v4", "phys2d/CartPole-v0", "GymV26Environment-v0"}


def test_envs_filters_by_id_and_by_suite(capsys):
    assert main(["envs", "CartPole"]) == 0
    out = capsys.readouterr().out
    assert "dualhead: 1\n  dualhead/CartPoleNoVel-v1  (tuned settings)\n" in out
    assert "  CartPole-v1\n" in out
    assert "Taxi" not in out
    assert main(["envs", "gymnasium"]) == 0
    assert "  Taxi-v4\n" in capsys.readouterr().out
    assert main(["envs", "no such thing"]) == 0
    assert capsys.readouterr().out == ""


def test_other_registered_environments_are_listed(monkeypatch):
    spec = gym.envs.registration.EnvSpec("mine/Door-v0", entry_point="my_envs:Door")
    monkeypatch.setitem(gym.registry, "mine/Door-v0", spec)
    assert "mine/Door-v0" in by_name()["others"].ids


def test_every_suite_has_its_extra():
    if sys.version_info < (3, 11):
        pytest.skip("tomllib comes with Python 3.11")
    import tomllib

    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    with_packages = {name for name, suite in SUITES.items() if suite.modules}
    assert with_packages <= set(project["optional-dependencies"])


# Atari.


def test_atari_comes_preprocessed():
    needs("atari")
    with closing(make_env("ALE/Pong-v5")) as env:
        assert env.observation_space == gym.spaces.Box(0, 255, (84, 84), np.uint8)
        assert env.unwrapped._frameskip == 1
        env.reset(seed=0)
        frames = env.unwrapped.ale.getEpisodeFrameNumber
        before = frames()
        assert before <= 31  # a reset and up to 30 frames without an action
        env.step(0)
        assert frames() - before == 4
        starts = [env.reset(seed=seed) and frames() for seed in range(8)]
        assert len(set(starts)) > 2


def test_a_lost_life_does_not_end_an_atari_episode():
    needs("atari")
    with closing(make_env("ALE/Breakout-v5")) as env:
        _, info = env.reset(seed=0)
        lives = info["lives"]
        while info["lives"] == lives:
            _, _, terminated, _, info = env.step(1)  # FIRE serves; the paddle stands still
        assert (terminated, info["lives"]) == (False, lives - 1)


@pytest.mark.parametrize(("settings", "shape"), [({"obs_type": "ram"}, (128,)), ({"frameskip": 2}, (84, 84))])
def test_atari_settings_of_ones_own(settings, shape):
    needs("atari")
    with closing(make_env("ALE/Pong-v5", settings)) as env:
        assert env.reset(seed=0)[0].shape == shape
        before = env.unwrapped.ale.getEpisodeFrameNumber()
        env.step(0)
        skipped = env.unwrapped.ale.getEpisodeFrameNumber() - before
        assert skipped == settings.get("frameskip", skipped)


def test_a_game_whose_first_action_acts_starts_at_once():
    needs("atari")
    with closing(make_env("ALE/Backgammon-v5")) as env:
        assert env.reset(seed=0)[0].shape == (84, 84)


def test_wrappers_of_ones_own_take_the_place_of_preprocessing():
    needs("atari")
    wrap = lambda env: gym.wrappers.ResizeObservation(env, (21, 16))  # noqa: E731
    with closing(make_env("ALE/Pong-v5", wrappers=[("mine", wrap)])) as env:
        assert env.reset(seed=0)[0].shape == (21, 16, 3)
        assert env.unwrapped._frameskip == 4


# dm_control.


def test_a_task_of_dm_control_may_be_handed_over():
    needs("dm-control")
    from dm_control import suite

    make = lambda: suite.load("cartpole", "balance", task_kwargs={"time_limit": 0.5})  # noqa: E731
    with closing(make_streams(make, 2)) as streams:
        assert streams.resumable is None
        assert set(streams.reset(seed=0)) == {"position", "velocity"}
        ends = [streams.step(np.zeros((2, 1))).truncated.tolist() for _ in range(50)]
        assert ends == [[False] * 2] * 49 + [[True] * 2]
