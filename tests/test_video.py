"""Videos show the episode that the policy plays, at its pace, in a size that fits; what cannot be filmed is said."""

import json
import re
import sys

import gymnasium as gym
import imageio.v3 as imageio
import imageio_ffmpeg
import numpy as np
import pytest
from gymnasium import spaces
from processes import run_process
from saved_runs import save_run
from settings import spec_segments

from dualhead import CommonsConfig, NetworkConfig, RunConfig, load_policy
from dualhead.cli import main
from dualhead.running.checkpoint import RunError
from dualhead.running.trainer import train
from dualhead.running.video import record_video
from dualhead.worlds.commons.world import Commons


class Counting(gym.Env):
    """Shows the number of the step as a grey level, in a picture of any size; never ends."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 100}  # noqa: RUF012
    observation_space = spaces.Box(-1, 1, (2,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, width=8, height=8, render_mode=None):
        self.picture = np.zeros((height, width, 3), np.uint8)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.picture[:] = 0
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.picture += 1
        return np.zeros(2, np.float32), 0.0, False, False, {}

    def render(self):
        return self.picture


class Unseen(Counting):
    metadata = {"render_modes": ["human"]}  # noqa: RUF012


gym.register("test/Counting-v0", Counting)
gym.register("test/CountingOdd-v0", Counting, kwargs={"width": 607, "height": 35})
gym.register("test/Unseen-v0", Unseen)


def gif_frames(path):
    """Grey level and milliseconds of each picture of a GIF."""
    levels = [int(frame.mean().round()) for frame in imageio.imiter(path)]
    return [(level, imageio.immeta(path, index=i)["duration"]) for i, level in enumerate(levels)]


def mp4(path):
    """Width, height, frames per second, and the frames of a video, read by ffmpeg itself."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-i", str(path), "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    done = run_process(command, text=False)
    assert done.returncode == 0, done.stderr
    width, height, fps = map(int, re.search(rb"Video: h264.*yuv420p.* (\d+)x(\d+).* (\d+) fps", done.stderr).groups())
    return width, height, fps, np.frombuffer(done.stdout, np.uint8).reshape(-1, height, width, 3)


def pictures(run, seed, deterministic=True):
    """RecallCue's own pictures of an episode that the run's policy plays."""
    player, env = load_policy(run, seed=seed), gym.make("dualhead/RecallCue-v0", render_mode="rgb_array")
    observation, _ = env.reset(seed=seed)
    yield env.render()
    start = ended = False
    while not ended:
        observation, _, ended, _, _ = env.step(player.act(observation, start, deterministic=deterministic))
        yield env.render()


@pytest.mark.parametrize("deterministic", [True, False])
def test_gif_shows_the_episode(tmp_path, deterministic):
    run = save_run(tmp_path / "run")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    out = record_video(run, tmp_path / "made" / "cue.gif", seed=3, deterministic=deterministic)
    assert out == tmp_path / "made" / "cue.gif"
    assert [path.name for path in out.parent.iterdir()] == ["cue.gif"]
    shown = [frame.astype(int) for frame in imageio.imiter(out)]
    wanted = list(pictures(run, 3, deterministic))
    assert len(shown) == len(wanted) == 23  # the reset, the cue, 20 of noise, go
    # A GIF has a palette of 256 colours a picture: enough for these.
    assert all(np.abs(a - b).max() <= 1 for a, b in zip(shown, wanted))
    assert {duration for _, duration in gif_frames(out)} == {250}  # render_fps is 4
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_mp4_shows_the_episode(tmp_path):
    run = save_run(tmp_path / "run")
    width, height, fps, frames = mp4(record_video(run, tmp_path / "cue.mp4", seed=3))
    assert (width, height, fps, len(frames)) == (112, 48, 4, 23)
    for shown, wanted in zip(frames, pictures(run, 3)):
        assert np.abs(shown.astype(int) - wanted).mean() < 12  # compressed


def test_long_and_fast_episodes_are_thinned_evenly(tmp_path):
    run = save_run(tmp_path / "run", "test/Counting-v0")
    # 100 frames a second are halved for browsers.
    frames = gif_frames(record_video(run, tmp_path / "short.gif", max_steps=20))
    assert frames == [(n, 20) for n in range(0, 21, 2)]
    # 1201 of them are still 601, and halved once more; the grey level counts modulo 256.
    frames = gif_frames(record_video(run, tmp_path / "long.gif", max_steps=1200))
    assert frames == [(n % 256, 40) for n in range(0, 1201, 4)]


def test_sizes_fit(tmp_path):
    run = save_run(tmp_path / "run", "test/CountingOdd-v0")
    gif = imageio.imread(record_video(run, tmp_path / "wide.gif", max_steps=2))
    assert gif.shape == (2, 17, 300, 3)  # 35 * 300 / 607 = 17.3
    width, height, fps, frames = mp4(record_video(run, tmp_path / "odd.MP4", max_steps=2))
    assert (width, height, fps, len(frames)) == (608, 36, 100, 3)


@pytest.mark.parametrize(("env", "fps"), [("dualhead/CartPoleNoVel-v1", 50), ("dualhead/PendulumNoVel-v1", 30)])
def test_our_gymnasium_environments_render(tmp_path, env, fps):
    run = save_run(tmp_path / "run", env)
    out = record_video(run, tmp_path / "play.gif", max_steps=5)
    gif = imageio.imread(out)
    assert gif.shape[2] == 300
    # Pictures that are equal become one that stays longer; a GIF counts hundredths of a second.
    assert sum(duration for _, duration in gif_frames(out)) == 6 * (100 // fps) * 10
    assert (gif[0] != gif[-1]).any()


def test_an_epoch_of_the_commons(tmp_path):
    """Eight turns, from the layout that the seed gives; five pictures a second."""
    rules = CommonsConfig(num_agents=2, epoch_turns=8)
    ppo = spec_segments(rollout_length=10, batch_size=20, num_epochs=1)
    settings = {"network": NetworkConfig.spec(hidden_size=4, encoder_sizes=(4,)), "ppo": ppo, "world": rules}
    run = tmp_path / "run"
    train(RunConfig(env="commons", num_envs=1, total_steps=20, eval_episodes=0, run_dir=str(run), **settings))
    out = record_video(run, tmp_path / "epoch.gif", seed=3)
    assert sum(duration for _, duration in gif_frames(out)) == 9 * 200
    worlds = Commons(rules)
    worlds.reset(seed=3)
    assert np.abs(imageio.imread(out)[0].astype(int) - worlds.frame()).max() <= 1


@pytest.mark.parametrize(
    ("name", "out", "steps", "missing", "message"),
    [
        ("run", "video.avi", 9, None, r"ends in \.mp4 or \.gif, got '\.avi'"),
        ("unseen", "video.gif", 9, None, r"test/Unseen-v0 cannot be shown: its render modes are \['human'\]"),
        ("run", "video.gif", 0, None, "max_steps: expected at least 1, got 0"),
        ("nowhere", "video.gif", 9, None, "holds no run"),
        ("run", "file/video.gif", 9, None, "cannot write video"),
        ("run", "video.mp4", 9, "imageio_ffmpeg", r"needs the package imageio_ffmpeg: pip install -e '\.\[video\]'"),
        ("run", "video.gif", 9, "imageio.v3", r"a \.gif video needs the package imageio"),
    ],
)
def test_what_cannot_be_filmed_is_said(tmp_path, monkeypatch, name, out, steps, missing, message):
    save_run(tmp_path / "run")
    save_run(tmp_path / "unseen", "test/Unseen-v0")
    (tmp_path / "file").write_text("not a folder")
    if missing is not None:
        monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(RunError, match=message):
        record_video(tmp_path / name, tmp_path / out, max_steps=steps)
    assert not list(tmp_path.glob("*video*"))


def test_eval_prints_returns_and_films(tmp_path, capsys):
    run, out = save_run(tmp_path / "run"), tmp_path / "cue.gif"
    assert main(["eval", str(run), "--episodes", "3", "--video", str(out), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert len(result["returns"]) == 3
    assert result["mean_return"] == pytest.approx(np.mean(result["returns"]))
    assert result["lengths"] == [22, 22, 22]
    assert result["video"] == str(out)
    assert out.exists()
    assert main(["eval", str(run), "--episodes", "3", "--video", str(out)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "returns " + " ".join(f"{value:g}" for value in result["returns"])
    assert "over 3 episodes (95% interval" in said[1]
    assert said[2] == f"video: {out}"
    assert main(["eval", str(run), "--video", str(tmp_path / "cue.avi")]) == 1
    assert "expected a name that ends in .mp4 or .gif" in capsys.readouterr().err
    assert main(["eval", str(run), "--episodes", "1", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["ci95_low"], result["ci95_high"], result["episodes"]) == (None, None, 1)
