"""The run directory, written by one process at a time: configuration, summary and checkpoints, newest whole first."""

from __future__ import annotations

import errno
import json
import math
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from dualhead.config import SettingsError, problems
from dualhead.errors import RunError, RunInUseError
from dualhead.running.config import RunConfig
from dualhead.storage import CheckpointError, read_tensors, remove_temporaries, write_bytes, write_tensors

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

BEST = "best.safetensors"
_LOCK = ".lock"
_held: set[int] = set()
"""Descriptors of the locks this process holds."""


@contextmanager
def locked(run_dir: str | os.PathLike[str]) -> Iterator[None]:
    """Holds a run directory for writing, after removing what killed processes left unfinished in it.

    The lock is the system's (`flock` on the file `.lock`), so it ends with its process, however that dies; the file
    stays. Where the file system or Windows knows no such locks a warning says so, and nothing is refused.

    Raises:
        RunInUseError: another process, or this one already, holds it.
        RunError: it cannot be written.
    """
    path = Path(run_dir)
    try:
        descriptor = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise RunError(f"cannot write the run directory {path}: {error.strerror or error}") from error
    _held.add(descriptor)
    try:
        _lock(descriptor, path)
        for folder in (path, path / "checkpoints"):
            remove_temporaries(folder)
        yield
    finally:
        if descriptor in _held:
            _held.remove(descriptor)
            os.close(descriptor)


def _lock(descriptor: int, run_dir: Path) -> None:
    try:
        if fcntl is None:
            raise OSError(errno.ENOTSUP, "this system has no flock")
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(descriptor, 1000).decode(errors="replace").strip() or "another process"
        raise RunInUseError(
            f"{run_dir} is being written by {holder}: wait until that has ended or stop it, or choose another --run-dir"
        ) from None
    except OSError as error:
        warnings.warn(
            f"{run_dir} cannot be locked ({error.strerror}): see to it that no second process writes there",
            stacklevel=4,
        )
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    except OSError as error:
        raise RunError(f"cannot write the run directory {run_dir}: {error.strerror or error}") from error


def _release_in_child() -> None:
    """A forked child shares its parent's locks and would hold them on after the parent was killed."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_release_in_child)


def new_run_dir(config: RunConfig) -> Path:
    """Makes the directory of a run, and writes its configuration to see that it can be written.

    Raises:
        RunError: the asked-for directory holds a run already, or cannot be written.
    """
    base = Path("runs") / config.env.replace("/", "-") / f"{config.memory_name}-seed{config.seed}"
    path, number = base if config.run_dir is None else Path(config.run_dir), 1
    while not _began(path, config):
        if config.run_dir is not None:
            raise RunError(f"{path} holds a run already: choose another --run-dir, or remove it")
        number += 1
        path = base.with_name(f"{base.name}-{number}")
    return path


def _began(path: Path, config: RunConfig) -> bool:
    """Begins a run in a directory, unless one is there; of two processes that try at once one does."""
    if (path / "config.json").exists():
        return False
    try:
        (path / "checkpoints").mkdir(parents=True, exist_ok=True)
        with locked(path):
            if (path / "config.json").exists():
                return False
            write_json(path / "config.json", config.model_dump())
    except RunInUseError:
        if config.run_dir is not None:
            raise
        return False  # another process begins its run here at this moment
    except OSError as error:
        raise RunError(f"cannot write the run directory {path}: {error.strerror or error}") from error
    return True


def write_json(path: Path, contents: Any) -> None:
    """Replaces a JSON file atomically.

    Raises:
        RunError: it cannot be written; a file that was there before is untouched.
    """
    try:
        write_bytes(path, (json.dumps(contents, indent=2) + "\n").encode())
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}") from error


def read_json(path: Path) -> dict[str, Any] | None:
    """What a JSON file says; None where there is none, or no whole one."""
    try:
        contents = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return contents if isinstance(contents, dict) else None


def read_config(run_dir: str | os.PathLike[str]) -> RunConfig:
    """The configuration of a run.

    Raises:
        RunError: no run is there.
    """
    path = Path(run_dir) / "config.json"
    try:
        return RunConfig.model_validate_json(path.read_text())
    except OSError as error:
        raise RunError(
            f"{run_dir} holds no run: cannot read {path.name} ({error.strerror}); expected the directory of one"
        ) from error
    except ValidationError as error:
        raise RunError(
            f"{path} is no configuration of this version of dualhead: {SettingsError(problems(error))}"
        ) from error


def save_checkpoint(run_dir: Path, tensors: dict[str, Tensor], metadata: dict[str, Any], *, keep: int) -> Path:
    """Writes the checkpoint of `metadata["num_steps"]` and removes all but the newest `keep`.

    Checkpoints of later steps, which a resumed run passed over because they were broken, are renamed: they are kept,
    and count no more.

    Raises:
        RunError: it cannot be written; the checkpoints that were there still are.
    """
    path = run_dir / "checkpoints" / f"step-{metadata['num_steps']:012d}.safetensors"
    try:
        write_tensors(path, tensors, metadata)
        for other in checkpoints(run_dir):
            if other.name > path.name:
                other.replace(other.with_suffix(".passed-over"))
        for old in checkpoints(run_dir)[keep:]:
            old.unlink(missing_ok=True)
    except OSError as error:
        raise _cannot_write(path, error) from error
    return path


def save_best(run_dir: Path, tensors: dict[str, Tensor], metadata: dict[str, Any], *, score: float) -> bool:
    """Writes `checkpoints/best.safetensors` if no whole one of at least this score is there; says whether it did.

    Args:
        run_dir: of the run.
        tensors, metadata: the agent's state; the metadata get an entry `score`.
        score: mean return of an evaluation, say; NaN is never the best.

    Raises:
        RunError: it cannot be written; the best one before is still there.
    """
    path = run_dir / "checkpoints" / BEST
    if math.isnan(score):
        return False
    if path.exists():
        try:
            if read_best(run_dir)[2]["score"] >= score:
                return False
        except RunError as error:
            warnings.warn(f"{error}; replacing it", stacklevel=2)
    try:
        write_tensors(path, tensors, {**metadata, "score": score})
    except OSError as error:
        raise _cannot_write(path, error) from error
    return True


def _cannot_write(path: Path, error: OSError) -> RunError:
    newest = next(iter(checkpoints(path.parent.parent)), "none")
    return RunError(f"cannot write checkpoint {path}: {error.strerror or error}; the newest whole one is {newest}")


def checkpoints(run_dir: str | os.PathLike[str]) -> list[Path]:
    """Checkpoint files of a run by steps, newest first; the best one is not among them."""
    return sorted((Path(run_dir) / "checkpoints").glob("step-*.safetensors"), reverse=True)


def read_best(run_dir: str | os.PathLike[str]) -> tuple[Path, dict[str, Tensor], dict[str, Any]]:
    """The checkpoint with the best evaluation; `metadata["score"]` is what it reached.

    Raises:
        RunError: there is none, or it is broken.
    """
    path = Path(run_dir) / "checkpoints" / BEST
    if not path.exists():
        raise RunError(f"{run_dir} holds no best checkpoint: no evaluation during training has saved one")
    try:
        tensors, metadata = read_tensors(path)
    except CheckpointError as error:
        raise RunError(str(error)) from error
    if type(metadata.get("score")) not in (int, float):
        raise RunError(f"{path} says no score: {metadata.get('score')!r}")
    return path, tensors, metadata


def read_newest(run_dir: str | os.PathLike[str]) -> tuple[Path, dict[str, Tensor], dict[str, Any]]:
    """The newest checkpoint that is whole; broken ones are warned of and passed over.

    Raises:
        RunError: there is none.
    """
    paths = checkpoints(run_dir)
    if not paths:
        raise RunError(f"{run_dir} has no checkpoint yet: `dualhead resume` goes on with a run that was stopped before")
    for path in paths:
        try:
            return path, *read_tensors(path)
        except CheckpointError as error:
            warnings.warn(f"{error}; trying the one before it", stacklevel=2)
    raise RunError(f"{run_dir} holds no whole checkpoint, and only with one can it be resumed or played: train it anew")
