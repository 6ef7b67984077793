"""Videos and animated pictures of a policy that plays."""

from __future__ import annotations

import importlib
import math
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from dualhead.errors import DataError
from dualhead.running.checkpoint import RunError, read_config
from dualhead.running.config import EVALUATION_SEED
from dualhead.running.playing import Player, load_weights, run_directory
from dualhead.worlds.commons.config import CommonsConfig
from dualhead.worlds.commons.world import Commons
from dualhead.worlds.streams import make_env

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
    write = {".mp4": _write_mp4, ".gif": _write_gif}.get(out.suffix.lower())
    if write is None:
        raise RunError(f"video {out}: expected a name that ends in .mp4 or .gif, got {out.suffix!r}")
    if max_steps < 1:
        raise RunError(f"max_steps: expected at least 1, got {max_steps}")
    _imageio(out)
    config = read_config(run_directory(run_dir))
    if config.env_from != "id":
        raise RunError(f"{config.env!r} was handed over in Python: its files cannot make it to be filmed")
    env: gym.Env | Commons = (
        Commons(config.world) if isinstance(config.world, CommonsConfig) else _renderable(config.env)
    )
    try:
        loaded = load_weights(run_dir, encoder=encoder, memory=memory)
        loaded.expect_spaces(env.observation_space, env.action_space, of=config.env)
        player = Player(loaded.policy, env.observation_space, env.action_space, seed=seed)
        fps = COMMONS_FPS if isinstance(env, Commons) else float(env.metadata.get("render_fps") or DEFAULT_FPS)
        frames = _frames(env, player, max_steps, seed=seed, deterministic=deterministic)
        with _replacing(out) as unfinished:
            write(unfinished, frames, fps)
    except DataError as error:
        raise RunError(f"{config.env}: {error}") from error
    except gym.error.DependencyNotInstalled as error:
        raise RunError(f"{config.env} cannot be rendered, a package is missing: {error}") from error
    except OSError as error:
        raise RunError(f"cannot write video {out}: {error.strerror or error}") from error
    finally:
        env.close()
    return out


def _renderable(name: str) -> gym.Env:
    """The environment in a form whose `render` gives pictures."""
    plain = make_env(name)
    modes = plain.metadata.get("render_modes") or []
    plain.close()
    if "rgb_array" not in modes:
        raise RunError(f"{name} cannot be filmed: its render modes are {modes}, expected 'rgb_array' among them")
    if sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # else pygame complains of the screen that it does not need
    return make_env(name, render_mode="rgb_array")


def _frames(
    env: gym.Env | Commons, player: Player, max_steps: int, *, seed: int, deterministic: bool
) -> Iterator[NDArray[np.uint8]]:
    """Pictures [height, width, 3] of the reset and of every step, to the end of the episode or epoch."""
    observation: Any
    reward: Any = None
    if isinstance(env, Commons):
        observation, start = env.reset(seed=seed), np.ones(env.num_streams, dtype=bool)
        max_steps = min(max_steps, env.config.epoch_turns)
    else:
        (observation, _), start = env.reset(seed=seed), np.array(True)
    ended = False
    yield _frame(env)
    while max_steps and not ended:
        action = player.act(observation, start, rewards=reward, deterministic=deterministic)
        if isinstance(env, Commons):
            observation, reward, *_ = env.step(action)
        else:
            observation, reward, terminated, truncated, _ = env.step(action)
            ended = terminated or truncated
        start, max_steps = np.zeros_like(start), max_steps - 1
        yield _frame(env)


def _frame(env: gym.Env | Commons) -> NDArray[np.uint8]:
    if isinstance(env, Commons):
        return env.frame()
    frame = np.asarray(env.render())
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
        raise RunError(
            f"{env.spec.id if env.spec else env} renders {frame.dtype} {frame.shape}: expected uint8 pictures "
            f"[height, width, 3]"
        )
    return frame


def _write_mp4(path: Path, frames: Iterator[NDArray[np.uint8]], fps: float) -> None:
    imageio = _imageio(path)
    with imageio.v2.get_writer(path, format="FFMPEG", fps=fps, macro_block_size=1) as writer:
        for frame in frames:
            # Most players want H.264 with halved colour planes, which need even sides.
            height, width, _ = frame.shape
            writer.append_data(np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge"))


def _write_gif(path: Path, frames: Iterator[NDArray[np.uint8]], fps: float) -> None:
    imageio = _imageio(path)
    every = math.ceil(fps / GIF_MAX_FPS)
    kept = []
    for number, frame in enumerate(frames):
        if number % every == 0:
            kept.append(_scaled_down(frame))
        if len(kept) > GIF_MAX_FRAMES:
            kept, every = kept[::2], 2 * every
    imageio.v3.imwrite(path, kept, extension=".gif", plugin="pillow", duration=1000 * every / fps, loop=0)


def _scaled_down(frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
    from PIL import Image

    height, width, _ = frame.shape
    if width <= GIF_MAX_WIDTH:
        return frame.copy()  # an environment may draw into the same array again
    size = GIF_MAX_WIDTH, max(1, round(height * GIF_MAX_WIDTH / width))
    return np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS))


def _imageio(path: Path) -> Any:
    """The package, with what it needs for this kind of file."""
    needed = ["imageio.v3", *(["imageio_ffmpeg"] if path.suffix.lower() == ".mp4" else [])]
    try:
        for name in needed:
            importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise RunError(
            f"a {path.suffix} video needs the package {error.name}: pip install -e '.[video]' in the checkout"
        ) from error
    import imageio

    return imageio


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that replaces it if no error occurs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        yield Path(folder) / f"video{path.suffix.lower()}"
        os.replace(Path(folder) / f"video{path.suffix.lower()}", path)
