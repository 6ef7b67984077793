"""From objects to JSON and bytes: see `object_graph`."""

from __future__ import annotations

import functools
import io
import logging
import math
import multiprocessing.process
import random
import struct
import subprocess
import threading
import types
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable
from enum import Enum
from typing import Any

import numpy as np

from dualhead.worlds.graph_kinds import (
    ABSENT,
    BIT_GENERATORS,
    SPECS,
    LeftToFresh,
    Refused,
    descr_of,
    description_of,
    in_slot,
    is_left_to_fresh,
    is_picture,
    name_of,
    slots_of,
    words_of_random,
)

_ALIVE = (threading.Thread, multiprocessing.process.BaseProcess, subprocess.Popen)
_LOCKS = (type(threading.Lock()), type(threading.RLock()))


class Writer:
    """Turns values into JSON.

    None, booleans, numbers and strings are themselves. A list is `[tag, ...]`, or `[i]` for node i: all that has an
    identity is a node, written once.
    """

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.classes: dict[type, int] = {}
        self.data: list[bytes] = []
        self._size = 0
        self._known: dict[Any, tuple[int, Any]] = {}  # id -> node and, so that the id stays taken, the object

    def value(self, value: Any) -> Any:
        kind: Any = type(value)
        if value is None or kind is bool or kind is str:
            return value
        if kind is int:
            return value if value.bit_length() <= 1024 else ["int", hex(value)]  # Python limits the digits of decimals
        if kind is float:
            return value if math.isfinite(value) else ["float", struct.pack("<d", value).hex()]
        known = self._known.get(id(value))
        if known is not None:
            return [known[0]]
        return _writer_of(kind)(self, value)

    def _enum(self, value: Any) -> Any:
        if type(value).__members__.get(value.name) is not value:
            raise Refused("a combination of flags")
        return ["enum", self._class(type(value)), value.name]

    def _scalar(self, value: np.generic) -> Any:
        if isinstance(value, np.str_ | np.bytes_):  # NumPy's own ways of reading them lose trailing zeros
            plain: Any = str if isinstance(value, str) else bytes
            return ["text", self.value(plain.__getitem__(value, slice(None)))]
        if type(value) is not value.dtype.type:
            raise Refused(f"a {name_of(type(value))} cannot be taken apart")
        return ["scalar", descr_of(value.dtype), value.tobytes().hex()]

    def _leave(self, value: Any) -> Any:
        raise LeftToFresh(f"a {name_of(type(value))} that is not an attribute of its own")

    def _name_only(self, value: Any) -> Any:
        return ["kept", description_of(value)]

    def _lock(self, value: Any) -> Any:
        if not value.acquire(blocking=False):
            raise Refused("a lock that is held")
        value.release()
        return ["kept", description_of(value)]

    def _file(self, value: io.IOBase) -> Any:
        if not value.closed and value.readable():
            raise Refused("an open file, whose position would be lost")
        return ["kept", description_of(value)]

    def _bits(self, value: np.random.BitGenerator) -> Any:
        kind = type(value)
        if kind is not BIT_GENERATORS.get(kind.__name__):
            raise Refused(f"a {name_of(kind)} cannot be taken apart")
        node = self._begin(value)
        seeds = value.seed_seq if type(value.seed_seq) is np.random.SeedSequence else None
        return self._end(node, "bits", kind.__name__, self.value(seeds), self.value(value.state))

    def _named(self, value: tuple[Any, ...]) -> Any:
        slots_of(type(value), base=tuple)
        return ["named", self._class(type(value)), self._items(value)]

    def _running(self, value: Any) -> Any:
        raise Refused(f"a {name_of(type(value))} that may be running")

    def _object(self, value: Any) -> Any:
        kind: Any = type(value)
        slots = slots_of(kind)
        node = self._begin(value)
        state = dict(getattr(value, "__dict__", ()))
        state |= {name: held for name in slots if (held := in_slot(value, name)) is not ABSENT}
        return self._end(node, "object", self._class(kind), self._attributes(state))

    def _attributes(self, state: dict[str, Any]) -> dict[str, Any]:
        return {
            name: held if held is None or held is True or held is False else self._attribute(held, name)
            for name, held in state.items()
        }

    def _attribute(self, value: Any, name: str) -> Any:
        """A value that may be left to the fresh environment."""
        num_known = len(self._known)
        try:
            return self.value(value)
        except LeftToFresh as error:
            if not is_left_to_fresh(value):
                raise Refused(error.reason).under(error.path).under(f".{name}") from error
            while len(self._known) > num_known:  # what it went through on the way is not written
                self._known.popitem()
            return ["fresh"]
        except Refused as error:
            raise error.under(f".{name}") from None

    def _items(self, values: Iterable[Any]) -> list[Any]:
        out = []
        for number, value in enumerate(values):
            try:
                out.append(self.value(value))
            except Refused as error:
                raise error.under(f"[{number}]") from None
        return out

    def _pairs(self, mapping: dict[Any, Any]) -> list[Any]:
        out = []
        for key, value in mapping.items():
            try:
                out.append([self.value(key), self.value(value)])
            except Refused as error:
                raise error.under(f"[{key!r}]") from None
        return out

    def _begin(self, value: Any, key: Any = None) -> int:
        self.nodes.append(None)
        self._known[id(value) if key is None else key] = len(self.nodes) - 1, value
        return len(self.nodes) - 1

    def _end(self, node: int, *contents: Any) -> list[int]:
        self.nodes[node] = contents
        return [node]

    def _class(self, kind: type) -> int:
        return self.classes.setdefault(kind, len(self.classes))

    def _list(self, value: list[Any]) -> Any:
        node = self._begin(value)
        return self._end(node, "list", self._items(value))

    def _mapping(self, value: Any) -> Any:
        node = self._begin(value)
        if type(value) is defaultdict:
            factory = self._attribute(value.default_factory, "default_factory")
            return self._end(node, "defaultdict", factory, self._pairs(value))
        return self._end(node, "mapping", type(value).__name__, self._pairs(value))

    def _set(self, value: set[Any]) -> Any:
        node = self._begin(value)
        return self._end(node, "set", self._items(value))

    def _deque(self, value: deque[Any]) -> Any:
        node = self._begin(value)
        return self._end(node, "deque", self._items(value), value.maxlen)

    def _namespace(self, value: types.SimpleNamespace) -> Any:
        node = self._begin(value)
        return self._end(node, "namespace", self._attributes(vars(value)))

    def _bytearray(self, value: bytearray) -> Any:
        return self._end(self._begin(value), "bytearray", self._keep(bytes(value)), len(value))

    def _keep(self, contents: bytes) -> int:
        """Adds to the data; its position."""
        self.data.append(contents)
        self._size += len(contents)
        return self._size - len(contents)

    def _array(self, value: np.ndarray) -> Any:
        """An array, as a window on the memory of the array that owns it, so that windows stay windows."""
        if value.dtype.hasobject:
            if value.dtype != object or isinstance(value.base, np.ndarray):
                raise Refused("a view of, or fields with, Python objects in an array")
            node = self._begin(value)
            return self._end(node, "objects", list(value.shape), self._items(value.ravel().tolist()))
        owner = value
        while value.size and isinstance(owner.base, np.ndarray):
            owner = owner.base
        # Arrays in Fortran's and other orders are windows on the same memory in C's order.
        order = sorted(range(owner.ndim), key=lambda axis: -owner.strides[axis])
        memory = owner if owner.flags.c_contiguous else owner.transpose(order)
        if not memory.flags.c_contiguous:
            raise Refused("an array over foreign memory with gaps")
        known = self._known.get(("memory", id(owner)))
        if known is not None:
            node = known[0]
        else:
            node = self._begin(owner, ("memory", id(owner)))
            position = self._keep(memory.tobytes())
            self._end(node, "memory", descr_of(memory.dtype), list(memory.shape), position, not owner.flags.writeable)
        if value is memory:
            self._known[id(value)] = node, value
            return [node]
        offset = value.__array_interface__["data"][0] - memory.__array_interface__["data"][0]
        window = list(value.shape), list(value.strides), not value.flags.writeable
        return self._end(self._begin(value), "window", node, descr_of(value.dtype), offset, *window)

    def _function(self, value: types.FunctionType) -> Any:
        if not value.__closure__:
            return ["kept", description_of(value)]
        node = self._begin(value)
        cells = []
        for name, cell in zip(value.__code__.co_freevars, value.__closure__):
            try:
                contents = cell.cell_contents
            except ValueError:
                cells.append(["fresh"])  # empty
                continue
            cells.append(self._attribute(contents, f"<variable {name}>"))
        return self._end(node, "closure", description_of(value), cells)

    def _method(self, value: Any) -> Any:
        if value.__self__ is None or isinstance(value.__self__, types.ModuleType):
            return ["kept", description_of(value)]
        try:
            return ["method", description_of(value), self.value(value.__self__)]
        except Refused as error:
            raise error.under(".__self__") from None

    def _generator(self, value: np.random.Generator) -> Any:
        node = self._begin(value)
        return self._end(node, "generator", self.value(value.bit_generator))

    def _seeds(self, value: np.random.SeedSequence) -> Any:
        node = self._begin(value)
        spawned = value.pool_size, value.n_children_spawned
        return self._end(node, "seeds", self.value(value.entropy), self.value(value.spawn_key), *spawned)

    def _random_state(self, value: np.random.RandomState) -> Any:
        if value is np.random.mtrand._rand:
            return ["kept", description_of(value)]
        node = self._begin(value)
        state = value.get_state(legacy=False)
        if state["bit_generator"] != "MT19937":
            raise Refused(f"a RandomState over {state['bit_generator']}")
        return self._end(node, "random_state", self.value(state))

    def _random(self, value: random.Random) -> Any:
        if value is random._inst:
            return ["kept", description_of(value)]
        node = self._begin(value)
        return self._end(node, "random", self._items(words_of_random(value)))


_WRITERS: dict[type, Callable[[Writer, Any], Any]] = {
    tuple: lambda writer, value: ["tuple", writer._items(value)],
    frozenset: lambda writer, value: ["frozenset", writer._items(value)],
    complex: lambda writer, value: ["complex", struct.pack("<dd", value.real, value.imag).hex()],
    bytes: lambda writer, value: ["bytes", value.hex()],
    range: lambda writer, value: ["range", writer._items((value.start, value.stop, value.step))],
    slice: lambda writer, value: ["slice", writer._items((value.start, value.stop, value.step))],
    type(...): lambda writer, value: ["singleton", "Ellipsis"],
    type(NotImplemented): lambda writer, value: ["singleton", "NotImplemented"],
    list: Writer._list,
    dict: Writer._mapping,
    OrderedDict: Writer._mapping,
    Counter: Writer._mapping,
    defaultdict: Writer._mapping,
    set: Writer._set,
    deque: Writer._deque,
    types.SimpleNamespace: Writer._namespace,
    bytearray: Writer._bytearray,
    np.ndarray: Writer._array,
    types.FunctionType: Writer._function,
    types.MethodType: Writer._method,
    types.BuiltinFunctionType: Writer._method,
    np.random.Generator: Writer._generator,
    np.random.SeedSequence: Writer._seeds,
    np.random.RandomState: Writer._random_state,
    random.Random: Writer._random,
}
"""By the very class."""
_FAMILIES: tuple[tuple[Any, Callable[[Writer, Any], Any]], ...] = (
    (Enum, Writer._enum),
    (np.generic, Writer._scalar),
    (np.dtype, lambda writer, value: ["dtype", descr_of(value)]),
    (SPECS, Writer._leave),
    ((type, types.ModuleType, np.ufunc, logging.Logger), Writer._name_only),
    (_LOCKS, Writer._lock),
    (io.IOBase, Writer._file),
    (np.random.BitGenerator, Writer._bits),
    (tuple, Writer._named),
    (_ALIVE, Writer._running),
)
"""With subclasses, the first that fits."""


@functools.cache
def _writer_of(kind: type) -> Callable[[Writer, Any], Any]:
    if kind in _WRITERS:
        return _WRITERS[kind]
    if is_picture(kind):
        return Writer._leave
    return next((write for base, write in _FAMILIES if issubclass(kind, base)), Writer._object)


def is_taken_apart(kind: type) -> bool:
    """Whether instances are written attribute by attribute, and not in a form of their own."""
    return _writer_of(kind) is Writer._object
