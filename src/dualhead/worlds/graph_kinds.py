"""What taking objects apart and putting them together both need to know: see `object_graph`."""

from __future__ import annotations

import ast
import functools
import struct
import types
from typing import Any, NamedTuple

import numpy as np
from gymnasium.envs.registration import EnvSpec, WrapperSpec
from numpy.lib.format import descr_to_dtype, dtype_to_descr

_PICTURES = frozenset({"pygame", "matplotlib"})
"""Packages whose objects are for looking at only."""
SPECS = (EnvSpec, WrapperSpec)
BIT_GENERATORS = {
    kind.__name__: kind
    for kind in (np.random.PCG64, np.random.PCG64DXSM, np.random.MT19937, np.random.Philox, np.random.SFC64)
}
_HEAP_TYPE = 1 << 9
"""Py_TPFLAGS_HEAPTYPE: a class made by Python code."""


class Snapshot(NamedTuple):
    """Fields:
    structure: JSON in UTF-8 (lone surrogates, which Python's strings may have, are let through).
    data: the contents of arrays, to which the structure refers by position.
    """

    structure: bytes
    data: bytes


class Refused(Exception):
    """What cannot be captured or restored; the path grows on the way up."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason, self.path = reason, ""

    def under(self, step: str) -> Refused:
        self.path = step + self.path
        return self


class LeftToFresh(Refused):
    """Met something of which the fresh environment's own is as good; an attribute or a closure can be left so."""


ABSENT: Any = object()
"""The counterpart of what the fresh environment does not have."""


@functools.cache
def descr_of(dtype: np.dtype) -> str:
    descr = dtype_to_descr(dtype)
    text = descr if isinstance(descr, str) else repr(descr)
    if dtype.hasobject or dtype.metadata or dtype_of(text) != dtype:
        raise Refused(f"an array of {dtype}")
    return text


@functools.cache
def dtype_of(descr: str) -> np.dtype:
    """The inverse of `descr_of`. Types with references in them would make pointers out of the file: refused."""
    parsed: Any = ast.literal_eval(descr) if descr.startswith(("[", "(")) else descr
    dtype = descr_to_dtype(parsed)
    if dtype.hasobject:
        raise Refused(f"an array of {dtype}")
    return dtype


@functools.cache
def slots_of(kind: type, *, base: type = object) -> tuple[str, ...]:
    """Names of a class's slots; all other state of its instances is in `__dict__`.

    Raises:
        Refused: instances keep state elsewhere: a C class is among the ancestors, or (pybind11, nanobind) made to look
            like one of Python's, but then instances are larger than slots, `__dict__` and `__weakref__` make them.
    """
    slots: list[str] = []
    for ancestor in kind.__mro__:
        if not ancestor.__flags__ & _HEAP_TYPE:
            if ancestor is not base or kind is base:
                raise Refused(f"a {name_of(kind)} cannot be taken apart")
            break
        slots.extend(name for name, held in vars(ancestor).items() if isinstance(held, types.MemberDescriptorType))
    pointers = len(slots) + (kind.__dictoffset__ > 0) + (kind.__weakrefoffset__ > 0)
    if kind.__basicsize__ != base.__basicsize__ + pointers * struct.calcsize("P"):
        raise Refused(f"a {name_of(kind)} cannot be taken apart")
    return tuple(dict.fromkeys(slots))


def slot(kind: type, name: str) -> Any:
    """The descriptor of a slot; nothing that the class defines itself is asked."""
    held = (vars(ancestor).get(name) for ancestor in kind.__mro__)
    return next(member for member in held if isinstance(member, types.MemberDescriptorType))


def in_slot(value: Any, name: str) -> Any:
    try:
        return slot(type(value), name).__get__(value, type(value))
    except AttributeError:
        return ABSENT


def is_picture(kind: type) -> bool:
    return names_of(kind)[0].split(".")[0] in _PICTURES


def is_left_to_fresh(value: Any) -> bool:
    """Whether nothing is lost with it: pictures, specs, and built-in containers of nothing else."""
    if isinstance(value, list | tuple):
        return all(map(is_left_to_fresh, value))
    if isinstance(value, dict):
        return all(map(is_left_to_fresh, value.values()))
    return value is None or isinstance(value, SPECS) or is_picture(type(value))


def names_of(kind: type) -> list[str]:
    # Some wrappers of C libraries (SWIG's) lack these.
    return [str(getattr(kind, "__module__", "")), str(getattr(kind, "__qualname__", kind.__name__))]


def name_of(kind: type) -> str:
    return ".".join(names_of(kind)).removeprefix("builtins.")


def description_of(value: Any) -> str:
    """Says of things that are kept which one it is, as far as its name does."""
    name = getattr(value, "__qualname__", None) or getattr(value, "__name__", "")
    if isinstance(value, types.MethodType | types.BuiltinFunctionType) and value.__self__ is not None:
        return f"{type(value).__name__} {name}"
    module = getattr(value, "__module__", "") if isinstance(value, type | types.FunctionType) else ""
    return " ".join(filter(None, (name_of(type(value)), module or "", name)))


def words_of_random(source: Any) -> tuple[Any, ...]:
    """State of `random` or of a `random.Random`, its 625 numbers as an array."""
    version, words, gauss = source.getstate()
    return version, np.array(words, np.uint32), gauss


def random_of_words(version: int, words: np.ndarray, gauss: float | None) -> tuple[Any, ...]:
    return version, tuple(words.tolist()), gauss
