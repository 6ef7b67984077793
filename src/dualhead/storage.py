"""Atomic files of named tensors plus JSON: what checkpoints are made of. Nothing executable is ever loaded."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import stat
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

_MAX_HEADER = 100_000_000
"""Bytes; safetensors itself refuses longer ones."""

_BLANK = b"0" * 64
_CHECKSUM = b'"checksum":"'
"""Nothing else in a header can read like this: quotes inside of names and metadata are escaped there."""


RUN_PREFIX = "run"
"""Tensors and metadata of a run's checkpoint that belong to the run and not to its agent."""


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
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{TEMPORARY}")
    try:
        with temporary.open("xb") as file:
            file.write(contents)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(path: Path) -> None:
    """Puts the folder's entries on the disk, where the system can do that for folders."""
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def remove_temporaries(folder: Path) -> None:
    """Removes what killed processes left unfinished in a folder; for who alone writes there."""
    for path in folder.glob(f".*{TEMPORARY}"):
        path.unlink(missing_ok=True)


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors (on the CPU) and metadata of a file made by `write_tensors`.

    The checksum is compared before anything is built from the contents, so memory is taken for what the file holds,
    never for what a damaged header claims.

    Raises:
        CheckpointError: not such a file, truncated, changed in any byte, or of a newer version.
    """
    try:
        contents = _read(Path(path))
    except OSError as error:
        raise CheckpointError(f"cannot read checkpoint {path}: {error.strerror or error}") from error
    end = 8 + int.from_bytes(contents[:8], "little")
    try:
        header = json.loads(contents[8:end])["__metadata__"]
        form, version = header["format"], int(header["version"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a whole dualhead checkpoint: no readable header ({error!r})") from error
    if form != FORMAT or version != VERSION:
        who = "an older" if form == FORMAT and version < VERSION else "a newer"
        raise CheckpointError(
            f"{path} has format {form!r} version {version}: expected {FORMAT!r} version {VERSION}: {who} dualhead "
            f"wrote it (read it with that one, or train again), or it is damaged"
        )
    if not _checksum_holds(contents, end):
        raise CheckpointError(
            f"{path} is not a whole dualhead checkpoint: cut off or damaged, its contents are not those of its checksum"
        )
    try:
        tensors, metadata = load(contents), json.loads(header["json"])
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a whole dualhead checkpoint: {error!r}") from error
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{path} is not a whole dualhead checkpoint: its metadata are {type(metadata).__name__}")
    return tensors, metadata


def _read(path: Path) -> bytes:
    """A file's bytes; of a file that cannot be ours only the beginning, however large it is."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "not a file")
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        is_ours = size <= _MAX_HEADER and _CHECKSUM in file.read(size)
        file.seek(0)
        return file.read() if is_ours else file.read(8 + size if size <= _MAX_HEADER else 8)


def _checksum_holds(contents: bytes, end: int) -> bool:
    """Whether the checksum in the header, which ends before byte `end`, is that of the contents."""
    found = contents.find(_CHECKSUM, 8, end)
    begin = found + len(_CHECKSUM)
    rest = begin + len(_BLANK)
    if found < 0 or rest > end:
        return False
    view = memoryview(contents)
    digest = hashlib.sha256(view[:begin])
    digest.update(_BLANK)
    digest.update(view[rest:])
    return digest.hexdigest().encode() == view[begin:rest]


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
    """Compares names, shapes and types.

    Raises:
        CheckpointError: they differ; the message names the first few.
    """
    missing, unknown = sorted(targets.keys() - sources.keys()), sorted(sources.keys() - targets.keys())
    if missing or unknown:
        raise CheckpointError(f"{what} is of another architecture: missing {missing[:3]}, unexpected {unknown[:3]}")
    for name, target in targets.items():
        there, here = ((tuple(tensor.shape), tensor.dtype) for tensor in (sources[name], target))
        if there != here:
            raise CheckpointError(f"{what} is of another architecture: {name} is {there} there, expected {here}")


def fill(targets: dict[str, Tensor], sources: dict[str, Tensor], *, what: str) -> None:
    """Copies tensors into those of the same names, all or none.

    Raises:
        CheckpointError: as `check_fit`.
    """
    check_fit(targets, sources, what=what)
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(sources[name])
