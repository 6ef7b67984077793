"""Atomic files of named tensors plus JSON: what checkpoints are made of. Nothing executable is ever loaded."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

FORMAT = "dualhead"
VERSION = 1


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read, or does not fit what it is loaded into."""


def write_tensors(path: str | os.PathLike[str], tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Writes a safetensors file whole or not at all: temporary file, fsync, rename.

    Raises:
        OSError: the folder cannot be written or the disk is full; a file that was there before is untouched.
    """
    header = {"format": FORMAT, "version": str(VERSION), "json": json.dumps(metadata)}
    contents = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, header)
    write_bytes(path, contents)


def write_bytes(path: str | os.PathLike[str], contents: bytes) -> None:
    """Replaces a file atomically."""
    path = Path(path)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(contents)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors (on the CPU) and metadata of a file made by `write_tensors`.

    Raises:
        CheckpointError: not such a file, truncated, or of a newer version.
    """
    try:
        contents = Path(path).read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read checkpoint {path}: {error.strerror}") from error
    try:
        tensors = load(contents)
        size = int.from_bytes(contents[:8], "little")
        header = json.loads(contents[8 : 8 + size]).get("__metadata__", {})
        version = int(header["version"])
        metadata = json.loads(header["json"])
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a whole dualhead checkpoint: {error}") from error
    if header.get("format") != FORMAT or not 1 <= version <= VERSION:
        raise CheckpointError(
            f"{path} has format {header.get('format')!r} version {version}: expected {FORMAT!r} up to {VERSION}; "
            f"a newer dualhead wrote it, upgrade to read it"
        )
    return tensors, metadata


def with_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def without_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name[len(prefix) + 1 :]: tensor for name, tensor in tensors.items() if name.startswith(f"{prefix}/")}


def fill(targets: dict[str, Tensor], sources: dict[str, Tensor], *, what: str) -> None:
    """Copies tensors into those of the same names, all or none.

    Raises:
        CheckpointError: names or shapes differ; the message names the first few.
    """
    missing, unknown = sorted(targets.keys() - sources.keys()), sorted(sources.keys() - targets.keys())
    if missing or unknown:
        raise CheckpointError(f"{what} is of another architecture: missing {missing[:3]}, unexpected {unknown[:3]}")
    for name, target in targets.items():
        if target.shape != sources[name].shape:
            raise CheckpointError(
                f"{what} is of another architecture: {name} is {tuple(sources[name].shape)} there, "
                f"expected {tuple(target.shape)}"
            )
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(sources[name])
