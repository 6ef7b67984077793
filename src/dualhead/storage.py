"""Atomic files of named tensors plus JSON: what checkpoints are made of. Nothing executable is ever loaded."""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from dualhead.config import problems
from dualhead.errors import CheckpointError

if TYPE_CHECKING:
    from typing_extensions import Self

FORMAT = "dualhead"
VERSION = 5
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
    header's metadata, so that other readers see an ordinary safetensors file. Tensors are written one after the other,
    so that at most one of them is copied.

    Raises:
        OSError: as `write_bytes`.
    """
    said = {"format": FORMAT, "version": str(VERSION), "json": json.dumps(metadata), "checksum": _BLANK.decode()}
    header: dict[str, Any] = {"__metadata__": said}
    end = 0
    # The widest numbers first, so that each tensor lies where its type may begin.
    names = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    for name in names:
        tensor = tensors[name]
        begin, end = end, end + tensor.numel() * tensor.itemsize
        header[name] = {"dtype": _dtype(tensor.dtype), "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    text = len(text).to_bytes(8, "little") + text
    digest = hashlib.sha256(text)
    with _replacing(path) as file:
        file.write(text)
        for name in names:
            tensor = tensors[name].detach().cpu().contiguous()
            # A tensor of one number, or of none, may have any strides.
            contents = tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy().data
            digest.update(contents)
            file.write(contents)
        file.seek(text.index(_CHECKSUM) + len(_CHECKSUM))
        file.write(digest.hexdigest().encode())


@functools.cache
def _dtype(dtype: torch.dtype) -> str:
    """What safetensors calls a type; KeyError where it has none."""
    contents = save({"x": torch.empty(0, dtype=dtype)})
    return json.loads(contents[8 : 8 + int.from_bytes(contents[:8], "little")])["x"]["dtype"]


def write_bytes(path: str | os.PathLike[str], contents: bytes) -> None:
    """Replaces a file atomically by one of these contents.

    Raises:
        OSError: the folder cannot be written or the disk is full; a file that was there before is untouched.
    """
    with _replacing(path) as file:
        file.write(contents)


@contextmanager
def _replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
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
            yield file
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
        if not path.is_dir():
            path.unlink(missing_ok=True)


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors (on the CPU) and metadata of a file made by `write_tensors`.

    The checksum is compared first, so a damaged header cannot claim more memory than the file's size.

    Raises:
        CheckpointError: not such a file, truncated, changed in any byte, or of another version.
    """
    broken = f"{path} is not a whole dualhead checkpoint"
    try:
        with _open(Path(path)) as file:
            start = file.read(8)
            size = int.from_bytes(start, "little")
            start += file.read(size if size <= _MAX_HEADER else 0)
            header = _header_of(path, start, os.fstat(file.fileno()).st_size)
            file.seek(0)
            contents = file.read()
    except (OSError, MemoryError) as error:
        raise CheckpointError(f"cannot read checkpoint {path}: {_reason(error)}") from error
    begin = contents.find(_CHECKSUM, 8, len(start)) + len(_CHECKSUM)
    digest, end = hashlib.sha256(contents[:begin] + _BLANK), begin + len(_BLANK)
    digest.update(memoryview(contents)[end:])
    if digest.hexdigest().encode() != contents[begin:end]:
        raise CheckpointError(f"{broken}: cut off or damaged, its contents are not those of its checksum")
    try:
        tensors, metadata = load(contents), json.loads(header.json_)
    except (SafetensorError, ValueError, KeyError, TypeError, OverflowError, RuntimeError, MemoryError) as error:
        raise CheckpointError(f"{broken}: {error!r:.200}") from error
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{broken}: its metadata are {type(metadata).__name__}")
    for name, tensor in tensors.items():
        if tensor.dtype == torch.bool and (tensor.view(torch.uint8) > 1).any():
            raise CheckpointError(f"{broken}: {name} is neither true nor false")
    return tensors, metadata


class Saved(BaseModel):
    """What a checkpoint says in JSON. It may come from a stranger: every field is checked before it is used."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    @classmethod
    def read(cls, given: Any, *, source: str) -> Self:
        """These contents of a checkpoint; CheckpointError names the first field that is missing or wrong."""
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            name, message = problems(error)[0]
            raise CheckpointError(f"{source} has no valid {name or 'contents'}: {message:.200}") from None


class _Header(BaseModel):
    """What the metadata of the file's header say."""

    format: str
    version: int
    json_: str = Field(alias="json")
    checksum: str = ""


def _header_of(path: str | os.PathLike[str], start: bytes, size: int) -> _Header:
    """The header at the start of a file of so many bytes. It must be ours and say this size before the rest is read."""
    broken = f"{path} is not a whole dualhead checkpoint"
    try:
        entries = json.loads(start[8:])
        header = _Header(**entries.pop("__metadata__"))
        expected = len(start) + max([0, *(entry["data_offsets"][1] for entry in entries.values())])
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise CheckpointError(f"{broken}: no readable header ({error!r:.200})") from error
    form, version = header.format, header.version
    if form != FORMAT or version != VERSION:
        who = "an older" if form == FORMAT and version < VERSION else "a newer"
        raise CheckpointError(
            f"{path} has format {form!r:.80} version {version}: expected {FORMAT!r} version {VERSION}: {who} dualhead "
            f"wrote it (read it with that one, or train again), or it is damaged"
        )
    if size != expected or _CHECKSUM not in start:
        raise CheckpointError(f"{broken}: cut off or damaged, it has {size} bytes, its header says {expected}")
    return header


def read_bytes(path: Path, *, at_most: int) -> bytes:
    """A file's contents; OSError if it is longer, or no regular file."""
    with _open(path) as file:
        if os.fstat(file.fileno()).st_size > at_most:
            raise OSError(errno.EFBIG, f"longer than {at_most:,} bytes", str(path))
        return file.read()


def _open(path: Path) -> BinaryIO:
    """Opens a regular file for reading; OSError for anything else, such as a pipe, which would wait for a writer."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "not a file", str(path))
    return path.open("rb")


def _reason(error: OSError | MemoryError) -> str:
    return "it does not fit into memory" if isinstance(error, MemoryError) else str(getattr(error, "strerror", error))


def can_write(dtype: torch.dtype) -> bool:
    """Whether a file can hold tensors of this type."""
    try:
        _dtype(dtype)
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
