"""Atomic files of named tensors plus JSON: what checkpoints are made of. Nothing executable is ever loaded."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from dualhead.errors import CheckpointError

FORMAT = "dualhead"
VERSION = 3
TEMPORARY = ".tmp"
"""How the names of unfinished files end; those of a process that was killed stay behind."""
RUN_PREFIX = "run"
"""Tensors and metadata of a run's checkpoint that belong to the run and not to its agent."""

_MAX_HEADER = 100_000_000
"""Bytes; safetensors itself refuses longer ones."""
_BLANK = b"0" * 64
_CHECKSUM = b'"checksum":"'
"""Nothing else in a header can read like this: quotes inside of names and metadata are escaped there."""


def write_tensors(path: str | os.PathLike[str], tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Writes a safetensors file whole or not at all, with a checksum over every byte of it.

    The checksum is the SHA-256 of the whole file with 64 zeros where the checksum itself stands. It lies in the
    header's metadata, so that other readers see an ordinary safetensors file.

    Raises:
        OSError: as `write_bytes`.
    """
    header = {"format": FORMAT, "version": str(VERSION), "json": json.dumps(metadata), "checksum": _BLANK.decode()}
    contents = bytearray(save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, header))
    begin = contents.index(_CHECKSUM) + len(_CHECKSUM)
    contents[begin : begin + len(_BLANK)] = hashlib.sha256(contents).hexdigest().encode()
    write_bytes(path, contents)


def write_bytes(path: str | os.PathLike[str], contents: bytes | bytearray) -> None:
    """Replaces a file atomically: temporary file beside it, fsync, rename, fsync of the folder.

    Raises:
        OSError: the folder cannot be written or the disk is full; a file that was there before is untouched.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "no such folder to write into", str(path.parent))
    temporary = path.with_name(f".{path.name[:50]}.{secrets.token_hex(4)}{TEMPORARY}")
    try:
        with temporary.open("xb") as file:
            file.write(contents)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":
        _sync_folder(path.parent)


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # the file system cannot sync folders
            raise
    finally:
        os.close(descriptor)


def remove_temporaries(folder: Path) -> None:
    """Removes unfinished files of killed processes. Nobody else may be writing into the folder."""
    for path in folder.glob(f".*{TEMPORARY}"):
        path.unlink(missing_ok=True)


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors (on the CPU) and metadata of a file made by `write_tensors`.

    The checksum is compared first, so a damaged header cannot claim more memory than the file's size.

    Raises:
        CheckpointError: not such a file, truncated, changed in any byte, or of another version.
    """
    try:
        contents = _read(Path(path))
    except OSError as error:
        raise CheckpointError(f"cannot read checkpoint {path}: {error.strerror or error}") from error
    broken = f"{path} is not a whole dualhead checkpoint"
    end = 8 + int.from_bytes(contents[:8], "little")
    try:
        header = json.loads(contents[8:end])["__metadata__"]
        form, version = header["format"], int(header["version"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{broken}: no readable header ({error!r})") from error
    if form != FORMAT or version != VERSION:
        who = "an older" if form == FORMAT and version < VERSION else "a newer"
        raise CheckpointError(
            f"{path} has format {form!r} version {version}: expected {FORMAT!r} version {VERSION}: {who} dualhead "
            f"wrote it (read it with that one, or train again), or it is damaged"
        )
    begin = contents.find(_CHECKSUM, 8, end) + len(_CHECKSUM)
    blanked = bytearray(contents)
    blanked[begin : begin + len(_BLANK)] = _BLANK
    if hashlib.sha256(blanked).hexdigest().encode() != contents[begin : begin + len(_BLANK)]:
        raise CheckpointError(f"{broken}: cut off or damaged, its contents are not those of its checksum")
    try:
        tensors, metadata = load(contents), json.loads(header["json"])
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{broken}: {error!r}") from error
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{broken}: its metadata are {type(metadata).__name__}")
    return tensors, metadata


def _read(path: Path) -> bytes:
    """A file's bytes; of a file that cannot be ours only the header, however large the file is."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "not a file")  # opening a pipe would wait for a writer
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        size = size if size <= _MAX_HEADER else 0
        is_ours = _CHECKSUM in file.read(size)
        file.seek(0)
        return file.read() if is_ours else file.read(8 + size)


def can_write(dtype: torch.dtype) -> bool:
    """Whether a file can hold tensors of this type."""
    try:
        save({"x": torch.empty(0, dtype=dtype)})
    except KeyError:
        return False
    return True


def with_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def without_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name[len(prefix) + 1 :]: tensor for name, tensor in tensors.items() if name.startswith(f"{prefix}/")}


def check_fit(targets: dict[str, Tensor], sources: dict[str, Tensor], *, what: str) -> None:
    """Raises CheckpointError, with the first few names, where names, shapes or types differ."""
    missing, unknown = sorted(targets.keys() - sources.keys()), sorted(sources.keys() - targets.keys())
    if missing or unknown:
        raise CheckpointError(f"{what} is of another architecture: missing {missing[:3]}, unexpected {unknown[:3]}")
    for name, target in targets.items():
        there, here = ((tuple(tensor.shape), tensor.dtype) for tensor in (sources[name], target))
        if there != here:
            raise CheckpointError(f"{what} is of another architecture: {name} is {there} there, expected {here}")


def fill(targets: dict[str, Tensor], sources: dict[str, Tensor], *, what: str) -> None:
    """Copies tensors into those of the same names, all or none; raises as `check_fit`."""
    check_fit(targets, sources, what=what)
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(sources[name])
