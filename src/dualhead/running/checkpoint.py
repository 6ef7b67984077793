"""The run directory, written by one process at a time: configuration, summary, and checkpoints.

Every function raises RunError for what it cannot read or write; what was there before stays as it was.
"""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import re
import socket
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from torch import Tensor

from dualhead.config import SettingsError, flat, problems
from dualhead.errors import CheckpointError, RunError, RunInUseError
from dualhead.running.config import MAY_CHANGE, RunConfig
from dualhead.storage import RUN_PREFIX, read_bytes, read_tensors, remove_temporaries, write_bytes, write_tensors

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

Used = TypeVar("Used")
Checkpoint = tuple[Path, dict[str, Tensor], dict[str, Any]]
"""Its file, its tensors, and its metadata."""
_BEST = "best.safetensors"
_MAX_JSON = 100_000_000
"""Bytes; what a run writes has some thousands."""
_held: set[int] = set()
"""Descriptors of the locks this process holds."""


@contextmanager
def writing(what: object) -> Iterator[None]:
    """Raises RunError in place of OSError: it says what cannot be written."""
    try:
        yield
    except OSError as error:
        raise RunError(f"cannot write {what}: {error.strerror or error}") from error


@contextmanager
def locked(run_dir: str | os.PathLike[str]) -> Iterator[None]:
    """Holds a run directory for writing, after removing what killed processes left unfinished in it.

    The operating system holds the lock (`flock` on the file `.lock`, and on the folder itself in case that somebody
    deletes the file) and releases it when the process ends, however it ends. Where the file system or Windows has no
    such locks a warning says so, and nothing is refused.

    Raises:
        RunInUseError: another process, or this one already, holds it.
    """
    path = Path(run_dir)
    refuse_links(path)
    with writing(f"the run directory {path}"):
        descriptor = os.open(path / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        folder = descriptor if fcntl is None else os.open(path, os.O_RDONLY)
    _held.update((descriptor, folder))
    try:
        try:
            if fcntl is None:
                raise OSError(errno.ENOTSUP, "this system has no flock")
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if isinstance(error, BlockingIOError):
                    raise
                # NFS locks files alone.
        except BlockingIOError:
            holder = os.read(descriptor, 1000).decode(errors="replace").strip() or "another process"
            raise RunInUseError(
                f"{path} is being written by {holder}: wait until it has ended or stop it, or choose another --run-dir"
            ) from None
        except OSError as error:
            warnings.warn(
                f"{path} cannot be locked ({error.strerror}): make sure that no second process writes there",
                stacklevel=3,
            )
        with writing(f"the run directory {path}"):
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        for place in (path, path / "checkpoints"):
            remove_temporaries(place)
        yield
    finally:
        for number in {descriptor, folder} & _held:
            _held.remove(number)
            os.close(number)


def _release_in_child() -> None:
    """A forked child shares its parent's locks, and would keep them after the parent was killed."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_release_in_child)


def new_run_dir(config: RunConfig) -> Path:
    """Makes the directory of a run and writes its configuration; two that begin at once get two directories."""
    for path in usual_run_dirs(config) if config.run_dir is None else [Path(config.run_dir)]:
        with writing(f"the run directory {path}"):
            path.mkdir(parents=True, exist_ok=True)
        if not (path / "config.json").exists():
            try:
                with locked(path):
                    if not (path / "config.json").exists():
                        write_json(path / "config.json", config.model_dump())
                        return path
            except RunInUseError:  # another process begins its run here at this moment
                if config.run_dir is not None:
                    raise
    raise RunError(f"{path} holds a run already: choose another --run-dir, or remove it")


def usual_run_dirs(config: RunConfig) -> Iterator[Path]:
    """Where a run may lie that has no `run_dir`: runs/ENV/MEMORY-seedN, and the same with -2, -3, ..."""
    base = Path("runs") / safe_name(config.env) / f"{config.memory_name}-seed{config.seed}"
    yield base
    for number in itertools.count(2):
        yield base.with_name(f"{base.name}-{number}")


def safe_name(env: str) -> str:
    """An environment id as the name of a folder: letters, digits, `-`, `_` and inner dots."""
    return re.sub(r"[^A-Za-z0-9_.-]", "-", env).strip(".") or "-"


def write_json(path: Path, contents: Any) -> None:
    """Replaces a JSON file atomically."""
    with writing(path):
        write_bytes(path, (json.dumps(contents, indent=2) + "\n").encode())


def refuse_links(run_dir: Path) -> None:
    """Refuses a run directory in which a symbolic link stands for a file or folder of the run.

    A run may come from a stranger. Through a link, a command would read, overwrite or delete files elsewhere. Only
    what a service such as W&B keeps in its own folder is not looked at.
    """
    for folder in (run_dir, run_dir / "checkpoints", run_dir / "tensorboard"):
        try:
            links = [entry.path for entry in os.scandir(folder) if entry.is_symlink()]
        except OSError:  # missing, or no folder: who reads or writes it says so
            continue
        if links:
            raise RunError(
                f"{links[0]} is a symbolic link, and commands would read or write where it points: expected a run "
                f"directory without links; replace it by a copy, or remove it"
            )


def read_json(path: Path) -> dict[str, Any] | None:
    """The contents of a JSON file; None if there is none, or no whole one."""
    try:
        contents = json.loads(read_bytes(path, at_most=_MAX_JSON))
    except (OSError, ValueError, RecursionError):
        return None
    return contents if isinstance(contents, dict) else None


def read_config(run_dir: str | os.PathLike[str]) -> RunConfig:
    """The configuration of a run."""
    path = Path(run_dir) / "config.json"
    refuse_links(path.parent)
    try:
        return RunConfig.model_validate_json(read_bytes(path, at_most=_MAX_JSON))
    except OSError as error:
        raise RunError(
            f"{run_dir} holds no run: cannot read {path.name} ({error.strerror}); expected the directory of one"
        ) from error
    except ValidationError as error:
        raise RunError(f"{path} cannot be read as a run's settings: {SettingsError(problems(error))}") from error


def save_checkpoint(run_dir: Path, tensors: dict[str, Tensor], metadata: dict[str, Any], *, keep: int) -> Path:
    """Writes the checkpoint of `metadata["num_steps"]` and removes all but the newest `keep`.

    Checkpoints of later steps are broken ones that a resumed run passed over. They are renamed, and count no more.
    """
    path = run_dir / "checkpoints" / f"step-{metadata['num_steps']:012d}.safetensors"
    with writing(f"checkpoint {path}"):
        path.parent.mkdir(exist_ok=True)  # copies of runs often lack empty folders
        write_tensors(path, tensors, metadata)
        for other in checkpoints(run_dir):
            if other.name > path.name or not other.is_file():
                other.replace(other.with_suffix(".passed-over"))
        for old in checkpoints(run_dir)[keep:]:
            old.unlink(missing_ok=True)
    return path


def save_best(run_dir: Path, tensors: dict[str, Tensor], metadata: dict[str, Any], *, score: float) -> bool:
    """Writes `checkpoints/best.safetensors` unless a whole one of at least this score is there; whether it did.

    `score`, such as the mean return of an evaluation, is added to the metadata; NaN is never the best.
    """
    if math.isnan(score):
        return False
    path = run_dir / "checkpoints" / _BEST
    if path.exists():
        try:
            if read_best(run_dir)[2]["score"] >= score:
                return False
        except RunError as error:
            warnings.warn(f"{error}; replacing it", stacklevel=2)
    with writing(f"checkpoint {path}"):
        path.parent.mkdir(exist_ok=True)
        write_tensors(path, tensors, {**metadata, "score": score})
    return True


def checkpoints(run_dir: str | os.PathLike[str]) -> list[Path]:
    """Checkpoint files of a run by steps, newest first, without the best one."""
    return sorted((Path(run_dir) / "checkpoints").glob("step-*.safetensors"), reverse=True)


def read_best(run_dir: str | os.PathLike[str]) -> Checkpoint:
    """The checkpoint with the best evaluation, whose mean return is `metadata["score"]`."""
    refuse_links(Path(run_dir))
    path = Path(run_dir) / "checkpoints" / _BEST
    if not path.exists():
        raise RunError(f"{run_dir} holds no best checkpoint: no evaluation during training has saved one")
    try:
        tensors, metadata = read_tensors(path)
    except CheckpointError as error:
        raise RunError(str(error)) from error
    if type(metadata.get("score")) not in (int, float):
        raise RunError(f"{path} says no score: {metadata.get('score')!r}")
    expect_own(path, metadata)
    return path, tensors, metadata


def read_newest(run_dir: str | os.PathLike[str]) -> Checkpoint:
    """The newest whole checkpoint; warns of broken ones and passes over them."""
    return use_newest(run_dir, lambda *checkpoint: checkpoint)


def use_newest(
    run_dir: str | os.PathLike[str],
    use: Callable[[Path, dict[str, Tensor], dict[str, Any]], Used],
    *,
    first: Checkpoint | None = None,
) -> Used:
    """What `use` makes of the newest whole checkpoint that it accepts; warns of those before, which are passed over.

    `use` gets the file, its tensors and its metadata, and raises CheckpointError for what it does not accept. If it
    accepts none, the error about the newest is raised. `first`: a checkpoint that was read already; newer ones do not
    count.
    """
    refuse_links(Path(run_dir))
    paths = checkpoints(run_dir)
    if not paths:
        raise RunError(f"{run_dir} has no checkpoint yet: `dualhead resume` continues a run that was stopped before")
    broken: list[CheckpointError] = []
    refused: list[CheckpointError] = []
    for path in paths if first is None else paths[paths.index(first[0]) :]:
        try:
            checkpoint = first if first is not None and path == first[0] else (path, *read_tensors(path))
        except CheckpointError as error:
            broken.append(error)
            continue
        expect_own(path, checkpoint[2])
        try:
            used = use(*checkpoint)
        except CheckpointError as error:
            refused.append(error)
            continue
        for problem in broken + refused:
            warnings.warn(f"{problem}; trying the one before it", stacklevel=2)
        return used
    if refused:
        raise refused[0]
    for problem in broken:
        warnings.warn(str(problem), stacklevel=2)
    raise RunError(f"{run_dir} holds no whole checkpoint, so it can be neither resumed nor played: train again")


def expect_own(path: Path, metadata: dict[str, Any]) -> None:
    """CheckpointError if a checkpoint is of another run than the directory that it lies in."""
    folder, run = path.absolute().parent.parent, metadata.get(RUN_PREFIX)
    settings = read_json(folder / "config.json")
    if settings is None or not isinstance(run, dict) or not isinstance(run.get("config"), dict):
        return  # an agent's own file, or away from its run
    theirs, ours = (flat(of) for of in (run["config"], {n: v for n, v in settings.items() if n not in MAY_CHANGE}))
    for name in sorted(theirs.keys() | ours.keys()):
        given, expected = (json.dumps(of[name]) if name in of else "nothing" for of in (theirs, ours))
        if given != expected:
            raise CheckpointError(
                f"{path} is of another run: expected {name}={expected} as in {folder / 'config.json'}, got {given}; "
                f"remove it, or move it to the run that it belongs to"
            )
