"""Videos and animated pictures of a policy that plays."""

from __future__ import annotations

import importlib
import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from dualhead.errors import DataError
from dualhead.running.checkpoint import RunError
from dualhead.running.config import EVALUATION_SEED, RunConfig
from dualhead.running.environment import config_to_play, has_screen, maker_of, with_render_mode
from dualhead.running.playing import Player, Players, expect_spaces, load_player, run_directory
from dualhead.worlds.commons.config import CommonsConfig
from dualhead.worlds.commons.world import Commons
from dualhead.worlds.pettingzoo import JointSpace
from dualhead.worlds.streams import ParallelStreams, make_streams

DEFAULT_FPS = 30
COMMONS_FPS = 5.0
GIF_MAX_FRAMES, GIF_MAX_WIDTH, GIF_MAX_FPS = 500, 300, 50
"""Frames, pixels, frames per second. Larger pictures do not fit a page, and browsers slow down faster ones."""


def record_video(
    run_dir: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    max_steps: int = 1000,
    seed: int = EVALUATION_SEED,
    deterministic: bool = True,
    encoder: Any = None,
    memory: Any = None,
) -> Path:
    """Films one episode (in the commons one epoch of one world), with the environment's `render_fps`.

    Args:
        run_dir: a run directory (its newest whole checkpoint plays), or one of its checkpoint files.
        out: a file that ends in .mp4 or .gif; missing folders are created. A GIF is scaled down to a width of at most
            300 pixels, and frames are left out evenly if there are more than 500, or more than 50 a second.
        max_steps: a longer episode is cut off after this many steps.
        seed: of the environment and of sampling.
        deterministic: the likeliest actions, or sampled ones.
        encoder, memory: the parts of its own that the policy was trained with.

    Returns:
        The file.

    Raises:
        RunError: another suffix, an environment that cannot be rendered, a missing package, a file that cannot be
            written, or no run.
        CheckpointError, UnavailableEnvironment: as for `load_policy`.
    """
    out = Path(out)
    suffix = out.suffix.lower()
    if suffix not in (".mp4", ".gif"):
        raise RunError(f"video {out}: expected a name that ends in .mp4 or .gif, got {out.suffix!r}")
    if max_steps < 1:
        raise RunError(f"max_steps: expected at least 1, got {max_steps}")
    try:
        for package in ("imageio.v3", "imageio_ffmpeg")[: 1 + (suffix == ".mp4")]:
            importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise RunError(
            f"a {suffix} video needs the package {error.name}: pip install -e '.[video]' in the checkout"
        ) from error
    config = config_to_play(run_directory(run_dir))
    if config.env_from != "id":
        raise RunError(f"{config.env!r} was handed over in Python: its files cannot make it to be filmed")
    player, path, _ = load_player(run_dir, seed=seed, encoder=encoder, memory=memory)
    env = Commons(config.world) if isinstance(config.world, CommonsConfig) else _renderable(config)
    try:
        fps = COMMONS_FPS if isinstance(env, Commons) else float(env.metadata.get("render_fps") or DEFAULT_FPS)
        if isinstance(env, gym.Env) and isinstance(env.observation_space, JointSpace):
            env = cast(Any, make_streams(lambda of_one=env: of_one, 1))
        expect_spaces(player, env, path)
        frames = _frames(env, player, max_steps, seed=seed, deterministic=deterministic)
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
            unfinished = Path(folder) / f"video{suffix}"
            _write(unfinished, frames, fps)
            os.replace(unfinished, out)
    except DataError as error:
        raise RunError(f"{config.env}: {error}") from error
    except gym.error.DependencyNotInstalled as error:
        raise RunError(f"{config.env} cannot be rendered, a package is missing: {error}") from error
    except OSError as error:
        raise RunError(f"cannot write video {out}: {error.strerror or error}") from error
    finally:
        env.close()
    return out


def _renderable(config: RunConfig) -> gym.Env:
    rendered = with_render_mode(config, "rgb_array")
    if not has_screen():
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # else pygame warns that there is no screen
    return maker_of(rendered)()


def _frames(
    env: Any, player: Player | Players, max_steps: int, *, seed: int, deterministic: bool
) -> Iterator[NDArray[np.uint8]]:
    """Pictures [height, width, 3] of the reset and of every step, to the end of the episode or epoch.

    `env` is a Gymnasium environment, or streams of one world. The world begins anew in the step that ends its episode:
    that is not shown.
    """
    is_world = isinstance(env, Commons | ParallelStreams)
    observation: Any = env.reset(seed=seed)
    if not is_world:
        observation, _ = observation
    reward, ended, start = None, False, np.ones(env.num_streams, dtype=bool) if is_world else np.array(True)
    if isinstance(env, Commons):
        max_steps = min(max_steps, env.config.epoch_turns)
    yield _frame(env)
    while max_steps and not ended:
        action = player.act(observation, start, rewards=reward, deterministic=deterministic)
        step = env.step(action)
        observation, reward, terminated, truncated = step[:4]
        start, max_steps = np.zeros_like(start), max_steps - 1
        if isinstance(env, ParallelStreams):
            start = terminated | truncated | (False if step.active is None else ~step.active)
            ended = bool(env.have_reset[0])
        elif not is_world:
            ended = terminated or truncated
        if not (is_world and ended):
            yield _frame(env)


def _frame(env: Any) -> NDArray[np.uint8]:
    """The picture as a copy: an environment may draw into the same array again."""
    frame = np.array(env.frame() if isinstance(env, Commons | ParallelStreams) else env.render())
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
        raise RunError(f"{env} renders {frame.dtype} {frame.shape}: expected uint8 pictures [height, width, 3]")
    return frame


def _write(path: Path, frames: Iterator[NDArray[np.uint8]], fps: float) -> None:
    import imageio.v3
    from PIL import Image

    if path.suffix == ".mp4":
        # Most players want H.264 with halved colour planes, which need even sides.
        even: Any = (np.pad(frame, [(0, size % 2) for size in frame.shape[:2]] + [(0, 0)], "edge") for frame in frames)
        imageio.v3.imwrite(path, even, plugin="FFMPEG", is_batch=True, fps=fps, macro_block_size=1)
        return
    every = math.ceil(fps / GIF_MAX_FPS)
    kept = []
    for number, frame in enumerate(frames):
        if number % every == 0:
            height, width, _ = frame.shape
            size = GIF_MAX_WIDTH, max(1, round(height * GIF_MAX_WIDTH / width))
            resized = Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS) if width > size[0] else frame
            kept.append(np.asarray(resized))
        if len(kept) > GIF_MAX_FRAMES:
            kept, every = kept[::2], 2 * every
    imageio.v3.imwrite(path, kept, extension=".gif", plugin="pillow", duration=1000 * every / fps, loop=0)
