"""The run directory: configuration, summary, and checkpoints of which the newest whole one counts."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from dualhead.config import RunConfig, explain
from dualhead.storage import CheckpointError, read_tensors, write_bytes, write_tensors

KEPT_CHECKPOINTS = 2


class RunError(RuntimeError):
    """A run that cannot go on or be read; the message says why and what to do."""


def new_run_dir(config: RunConfig) -> Path:
    """Makes the directory of a run, and writes and removes a file in it to see that it can be written.

    Raises:
        RunError: the asked-for directory holds a run already, or cannot be written.
    """
    if config.run_dir is not None:
        path = Path(config.run_dir)
        if (path / "config.json").exists():
            raise RunError(f"{path} holds a run already: choose another --run-dir, or remove it")
    else:
        base = Path("runs") / config.env.replace("/", "-") / f"{config.network.memory}-seed{config.seed}"
        path, number = base, 2
        while (path / "config.json").exists():
            path, number = base.with_name(f"{base.name}-{number}"), number + 1
    try:
        (path / "checkpoints").mkdir(parents=True, exist_ok=True)
        write_json(path / "config.json", config.model_dump())
    except OSError as error:
        raise RunError(f"cannot write the run directory {path}: {error.strerror or error}") from error
    return path


def write_json(path: Path, contents: Any) -> None:
    """Replaces a JSON file atomically."""
    write_bytes(path, (json.dumps(contents, indent=2) + "\n").encode())


def read_config(run_dir: str | os.PathLike[str]) -> RunConfig:
    """The configuration of a run.

    Raises:
        RunError: no run is there.
    """
    path = Path(run_dir) / "config.json"
    try:
        return RunConfig.model_validate_json(path.read_text())
    except OSError as error:
        raise RunError(f"{run_dir} holds no run: cannot read {path.name} ({error.strerror})") from error
    except ValidationError as error:
        raise RunError(f"{path} is no configuration of this version of dualhead: {explain(error)}") from error


def save_checkpoint(run_dir: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> Path:
    """Writes the checkpoint of `metadata["num_steps"]` and removes all but the newest few.

    Raises:
        RunError: it cannot be written; the checkpoints that were there still are.
    """
    path = run_dir / "checkpoints" / f"step-{metadata['num_steps']:012d}.safetensors"
    try:
        write_tensors(path, tensors, metadata)
    except OSError as error:
        raise RunError(
            f"cannot write checkpoint {path}: {error.strerror or error}; the newest whole one is "
            f"{next(iter(checkpoints(run_dir)), 'none')}"
        ) from error
    for old in checkpoints(run_dir)[KEPT_CHECKPOINTS:]:
        old.unlink(missing_ok=True)
    return path


def checkpoints(run_dir: str | os.PathLike[str]) -> list[Path]:
    """Checkpoint files of a run, newest first."""
    return sorted((Path(run_dir) / "checkpoints").glob("step-*.safetensors"), reverse=True)


def read_newest(run_dir: str | os.PathLike[str]) -> tuple[Path, dict[str, Tensor], dict[str, Any]]:
    """The newest checkpoint that is whole; broken ones are warned of and passed over.

    Raises:
        RunError: there is none.
    """
    for path in checkpoints(run_dir):
        try:
            return path, *read_tensors(path)
        except CheckpointError as error:
            warnings.warn(f"{error}; trying the one before it", stacklevel=2)
    raise RunError(f"{run_dir} holds no whole checkpoint")
