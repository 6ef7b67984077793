"""What an environment holds as JSON and bytes, and back: what exact resume needs, without pickle.

`capture` walks the graph of objects from a root: attributes and slots of plain objects, containers, arrays, numbers,
random generators. Shared references, cycles, and arrays that share memory stay so. `restore` writes it into a
counterpart that was made afresh. Both walk from the same root, so every value has its *place*, and what the fresh
environment has at the same place is its counterpart.

What happens to each kind of thing:

- Plain values, containers, arrays and random generators are made anew.
- A plain Python object is written into its counterpart if that is of the same class, so that wrappers, spaces and what
  refers to them stay the same objects. Where there is none (a MiniGrid ball that the fresh grid lacks), a bare instance
  is made with `object.__new__`, under the rule below.
- Functions, classes, modules, locks, loggers and files that are only written cannot be data: the counterpart is kept,
  and must have the same name. The variables that a closure remembers are captured and written back, and a bound method
  is bound to the restored object.
- Pictures (pygame, matplotlib) and Gymnasium's specs: whatever the counterpart is, which is None before the first
  render. Where one attribute holds them beside other things, it is refused, as those would be lost.
- Anything else (a running generator, an iterator, objects of C and C++ libraries such as Box2D's bodies, MuJoCo's data,
  Atari's emulator, tensors) raises `CannotSnapshot` with the path of attributes that leads there.

Nothing executable comes out of a snapshot. It names no functions to call and nothing is imported for it. It may name
classes, for instances without a counterpart and for enum members, and such a class must be loaded already and either

- be the class of something that the fresh environment itself holds, or
- belong to the same top-level package as such a class, unless that is the standard library, NumPy or torch.

To be made anew it must keep its whole state in attributes (no C base), have no `__del__` and be no environment. No
`__init__`, `__new__`, `__setattr__`, `__setstate__` or property is run; of the environment's own code only `__hash__`
and `__eq__` of keys. What a snapshot can do is to give wrong values to an environment's attributes.

Not captured: variables of modules and classes, and the insertion history of sets (on which their order can depend, as
after pickle).
"""

from __future__ import annotations

import ast
import functools
import gc
import io
import json
import logging
import math
import multiprocessing.process
import random
import struct
import subprocess
import sys
import threading
import types
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import EnvSpec, WrapperSpec
from numpy.lib.format import descr_to_dtype, dtype_to_descr

from dualhead.storage import CheckpointError

_PICTURES = frozenset({"pygame", "matplotlib"})
"""Packages whose objects are for looking at only."""
_SPECS = (EnvSpec, WrapperSpec)
_ALIVE = (threading.Thread, multiprocessing.process.BaseProcess, subprocess.Popen)
_LOCKS = (type(threading.Lock()), type(threading.RLock()))
_BIT_GENERATORS = {
    kind.__name__: kind
    for kind in (np.random.PCG64, np.random.PCG64DXSM, np.random.MT19937, np.random.Philox, np.random.SFC64)
}
_MAPPINGS: dict[str, Any] = {kind.__name__: kind for kind in (dict, OrderedDict, Counter)}
_CLOSED_PACKAGES = sys.stdlib_module_names | {"numpy", "torch"}
_SINGLETONS = {"Ellipsis": ..., "NotImplemented": NotImplemented}
_MALFORMED = (
    *(ArithmeticError, AttributeError, BufferError, LookupError, MemoryError, RuntimeError, SyntaxError, TypeError),
    *(ValueError, struct.error),
)
"""What reading parts of a snapshot as something that they are not may raise."""
_HEAP_TYPE = 1 << 9
"""Py_TPFLAGS_HEAPTYPE: a class made by Python code."""


class CannotSnapshot(RuntimeError):
    """Something in an environment cannot be captured; the message names where it is."""


class Snapshot(NamedTuple):
    """Fields:
    structure: JSON in UTF-8 (lone surrogates, which Python's strings may have, are let through).
    data: the contents of arrays, to which the structure refers by position.
    """

    structure: bytes
    data: bytes


def capture(root: Any, *, name: str = "") -> Snapshot:
    """The present state of everything that `root` holds; `root` is left as it is.

    Args:
        root: an environment, or any of the kinds of values above.
        name: what error messages call it, where it is not a namespace, whose attributes have names of their own.

    Raises:
        CannotSnapshot: with the path of attributes to what cannot be captured.
    """
    try:
        with _no_garbage_collection():
            writer = _Writer()
            whole = {"root": writer.value(root), "nodes": writer.nodes, "classes": list(map(_names, writer.classes))}
            text = json.dumps(whole, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return Snapshot(text.encode("utf-8", "surrogatepass"), b"".join(writer.data))
    except _Refused as error:
        raise CannotSnapshot(f"{name}{error.path}: {error.reason}".lstrip(".:")) from error
    except RecursionError as error:
        raise CannotSnapshot(f"{name or 'an environment'}: nested too deeply") from error


def restore(snapshot: Snapshot, fresh: Any, *, source: str = "snapshot") -> Any:
    """Writes a captured state into a counterpart that was made, and reset, in the same way as the captured one.

    Args:
        snapshot: from `capture`, perhaps through a file. It need not be trusted; see the module's rule.
        fresh: where it goes. After an error it is of no further use.
        source: what error messages call the snapshot.

    Returns:
        The restored root: `fresh` itself if that is an object, else a new value.

    Raises:
        CheckpointError: the snapshot is not whole, was made of something else, or breaks the rule.
    """
    try:
        classes = _Writer()
        classes.value(fresh)
        return _Reader(snapshot, classes.classes).root(fresh)
    except _Refused as error:
        where = error.path.lstrip(".") or "it"
        raise CheckpointError(f"{source} does not fit this environment: {where}: {error.reason}") from error
    except _MALFORMED as error:
        raise CheckpointError(f"{source} holds no state of this environment: {error!r}") from error


class _Refused(Exception):
    """What cannot be captured or restored; the path grows on the way up."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason, self.path = reason, ""

    def under(self, step: str) -> _Refused:
        self.path = step + self.path
        return self


class _LeftToFresh(_Refused):
    """Met something of which the fresh environment's own is as good; an attribute or a closure can be left so."""


_ABSENT: Any = object()
"""The counterpart of what the fresh environment does not have."""


@functools.cache
def _descr(dtype: np.dtype) -> str:
    descr = dtype_to_descr(dtype)
    text = descr if isinstance(descr, str) else repr(descr)
    if dtype.hasobject or dtype.metadata or _dtype(text) != dtype:
        raise _Refused(f"an array of {dtype}")
    return text


@functools.cache
def _dtype(descr: str) -> np.dtype:
    """The inverse of `_descr`. Types with references in them would make pointers out of the file: refused."""
    parsed: Any = ast.literal_eval(descr) if descr.startswith(("[", "(")) else descr
    dtype = descr_to_dtype(parsed)
    if dtype.hasobject:
        raise _Refused(f"an array of {dtype}")
    return dtype


class _Writer:
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
            raise _Refused("a combination of flags")
        return ["enum", self._class(type(value)), value.name]

    def _scalar(self, value: np.generic) -> Any:
        if isinstance(value, np.str_ | np.bytes_):  # NumPy's own ways of reading them lose trailing zeros
            plain: Any = str if isinstance(value, str) else bytes
            return ["text", self.value(plain.__getitem__(value, slice(None)))]
        if type(value) is not value.dtype.type:
            raise _Refused(f"a {_name(type(value))} cannot be taken apart")
        return ["scalar", _descr(value.dtype), value.tobytes().hex()]

    def _leave(self, value: Any) -> Any:
        raise _LeftToFresh(f"a {_name(type(value))} that is not an attribute of its own")

    def _name_only(self, value: Any) -> Any:
        return ["kept", _description(value)]

    def _lock(self, value: Any) -> Any:
        if not value.acquire(blocking=False):
            raise _Refused("a lock that is held")
        value.release()
        return ["kept", _description(value)]

    def _file(self, value: io.IOBase) -> Any:
        if not value.closed and value.readable():
            raise _Refused("an open file, whose position would be lost")
        return ["kept", _description(value)]

    def _bits(self, value: np.random.BitGenerator) -> Any:
        kind = type(value)
        if kind is not _BIT_GENERATORS.get(kind.__name__):
            raise _Refused(f"a {_name(kind)} cannot be taken apart")
        node = self._begin(value)
        seeds = value.seed_seq if type(value.seed_seq) is np.random.SeedSequence else None
        return self._end(node, "bits", kind.__name__, self.value(seeds), self.value(value.state))

    def _named(self, value: tuple[Any, ...]) -> Any:
        _state_of(type(value), base=tuple)
        return ["named", self._class(type(value)), self._items(value)]

    def _running(self, value: Any) -> Any:
        raise _Refused(f"a {_name(type(value))} that may be running")

    def _object(self, value: Any) -> Any:
        kind: Any = type(value)
        slots = _state_of(kind)
        node = self._begin(value)
        state = dict(getattr(value, "__dict__", ()))
        state |= {name: held for name in slots if (held := _in_slot(value, name)) is not _ABSENT}
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
        except _LeftToFresh as error:
            if not _is_left_to_fresh(value):
                raise _Refused(error.reason).under(error.path).under(f".{name}") from error
            while len(self._known) > num_known:  # what it went through on the way is not written
                self._known.popitem()
            return ["fresh"]
        except _Refused as error:
            raise error.under(f".{name}") from None

    def _items(self, values: Iterable[Any]) -> list[Any]:
        out = []
        for number, value in enumerate(values):
            try:
                out.append(self.value(value))
            except _Refused as error:
                raise error.under(f"[{number}]") from None
        return out

    def _pairs(self, mapping: dict[Any, Any]) -> list[Any]:
        out = []
        for key, value in mapping.items():
            try:
                out.append([self.value(key), self.value(value)])
            except _Refused as error:
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
                raise _Refused("a view of, or fields with, Python objects in an array")
            node = self._begin(value)
            return self._end(node, "objects", list(value.shape), self._items(value.ravel().tolist()))
        owner = value
        while value.size and isinstance(owner.base, np.ndarray):
            owner = owner.base
        # Arrays in Fortran's and other orders are windows on the same memory in C's order.
        order = sorted(range(owner.ndim), key=lambda axis: -owner.strides[axis])
        memory = owner if owner.flags.c_contiguous else owner.transpose(order)
        if not memory.flags.c_contiguous:
            raise _Refused("an array over foreign memory with gaps")
        known = self._known.get(("memory", id(owner)))
        if known is not None:
            node = known[0]
        else:
            node = self._begin(owner, ("memory", id(owner)))
            position = self._keep(memory.tobytes())
            self._end(node, "memory", _descr(memory.dtype), list(memory.shape), position, not owner.flags.writeable)
        if value is memory:
            self._known[id(value)] = node, value
            return [node]
        offset = value.__array_interface__["data"][0] - memory.__array_interface__["data"][0]
        window = list(value.shape), list(value.strides), not value.flags.writeable
        return self._end(self._begin(value), "window", node, _descr(value.dtype), offset, *window)

    def _function(self, value: types.FunctionType) -> Any:
        if not value.__closure__:
            return ["kept", _description(value)]
        node = self._begin(value)
        cells = []
        for name, cell in zip(value.__code__.co_freevars, value.__closure__):
            try:
                contents = cell.cell_contents
            except ValueError:
                cells.append(["fresh"])  # empty
                continue
            cells.append(self._attribute(contents, f"<variable {name}>"))
        return self._end(node, "closure", _description(value), cells)

    def _method(self, value: Any) -> Any:
        if value.__self__ is None or isinstance(value.__self__, types.ModuleType):
            return ["kept", _description(value)]
        try:
            return ["method", _description(value), self.value(value.__self__)]
        except _Refused as error:
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
            return ["kept", _description(value)]
        node = self._begin(value)
        state = value.get_state(legacy=False)
        if state["bit_generator"] != "MT19937":
            raise _Refused(f"a RandomState over {state['bit_generator']}")
        return self._end(node, "random_state", self.value(state))

    def _random(self, value: random.Random) -> Any:
        if value is random._inst:
            return ["kept", _description(value)]
        node = self._begin(value)
        return self._end(node, "random", self._items(_random_state(value)))


_WRITERS: dict[type, Callable[[_Writer, Any], Any]] = {
    tuple: lambda writer, value: ["tuple", writer._items(value)],
    frozenset: lambda writer, value: ["frozenset", writer._items(value)],
    complex: lambda writer, value: ["complex", struct.pack("<dd", value.real, value.imag).hex()],
    bytes: lambda writer, value: ["bytes", value.hex()],
    range: lambda writer, value: ["range", writer._items((value.start, value.stop, value.step))],
    slice: lambda writer, value: ["slice", writer._items((value.start, value.stop, value.step))],
    type(...): lambda writer, value: ["singleton", "Ellipsis"],
    type(NotImplemented): lambda writer, value: ["singleton", "NotImplemented"],
    list: _Writer._list,
    dict: _Writer._mapping,
    OrderedDict: _Writer._mapping,
    Counter: _Writer._mapping,
    defaultdict: _Writer._mapping,
    set: _Writer._set,
    deque: _Writer._deque,
    types.SimpleNamespace: _Writer._namespace,
    bytearray: _Writer._bytearray,
    np.ndarray: _Writer._array,
    types.FunctionType: _Writer._function,
    types.MethodType: _Writer._method,
    types.BuiltinFunctionType: _Writer._method,
    np.random.Generator: _Writer._generator,
    np.random.SeedSequence: _Writer._seeds,
    np.random.RandomState: _Writer._random_state,
    random.Random: _Writer._random,
}
"""By the very class."""
_FAMILIES: tuple[tuple[Any, Callable[[_Writer, Any], Any]], ...] = (
    (Enum, _Writer._enum),
    (np.generic, _Writer._scalar),
    (np.dtype, lambda writer, value: ["dtype", _descr(value)]),
    (_SPECS, _Writer._leave),
    ((type, types.ModuleType, np.ufunc, logging.Logger), _Writer._name_only),
    (_LOCKS, _Writer._lock),
    (io.IOBase, _Writer._file),
    (np.random.BitGenerator, _Writer._bits),
    (tuple, _Writer._named),
    (_ALIVE, _Writer._running),
)
"""With subclasses, the first that fits."""


@functools.cache
def _writer_of(kind: type) -> Callable[[_Writer, Any], Any]:
    if kind in _WRITERS:
        return _WRITERS[kind]
    if _is_picture(kind):
        return _Writer._leave
    return next((write for base, write in _FAMILIES if issubclass(kind, base)), _Writer._object)


class _Reader:
    """Builds values from JSON beside their counterparts; errors of every kind mean that the snapshot is no good.

    Args:
        snapshot: from anywhere.
        classes: of what the fresh environment holds.
    """

    def __init__(self, snapshot: Snapshot, classes: Iterable[type]) -> None:
        whole = json.loads(snapshot.structure.decode("utf-8", "surrogatepass"))
        self.data = snapshot.data
        self._root, self._nodes, self._classes = whole["root"], whole["nodes"], whole["classes"]
        self._built: dict[int, Any] = {}
        self._kept: set[int] = set()
        self._claimed: dict[int, Any] = {}  # id -> counterpart that was written into; two objects may not share one
        self._exact = {tuple(_names(kind)): kind for kind in classes}
        self._packages = {module.split(".")[0] for module, _ in self._exact} - _CLOSED_PACKAGES

    def root(self, fresh: Any) -> Any:
        return self.value(self._root, fresh)

    def value(self, given: Any, fresh: Any = _ABSENT) -> Any:
        if type(given) is not list:
            if type(given) is dict:
                raise _Refused("a JSON object where a value should be")
            return given
        if type(given[0]) is not int:
            return _INLINE[given[0]](self, fresh, *given[1:])
        (node,) = given
        if node in self._built:
            if node in self._kept and self._built[node] is not fresh:
                raise _Refused("a function moved to another place")
            return self._built[node]
        if node < 0:
            raise _Refused(f"no node {node}")
        return _BUILDERS[self._nodes[node][0]](self, node, fresh, *self._nodes[node][1:])

    def _items(self, given: Any, fresh: Any = ()) -> Iterable[Any]:
        # A list may hold itself, and the counterpart is read while it is filled.
        counterparts = list(fresh) if isinstance(fresh, list | tuple | deque) else []
        for number, item in enumerate(given):
            try:
                value = self.value(item, counterparts[number] if number < len(counterparts) else _ABSENT)
            except _Refused as error:
                raise error.under(f"[{number}]") from None
            if value is _ABSENT:
                raise _Refused("nothing there to keep").under(f"[{number}]")
            yield value

    def _pairs(self, given: Any, fresh: Any) -> Iterable[tuple[Any, Any]]:
        for key, item in given:
            key = self.value(key)
            try:
                value = self.value(item, dict.get(fresh, key, _ABSENT) if isinstance(fresh, dict) else _ABSENT)
            except _Refused as error:
                raise error.under(f"[{key!r}]") from None
            if value is _ABSENT:
                raise _Refused("nothing there to keep").under(f"[{key!r}]")
            yield key, value

    def _keep(self, fresh: Any, description: str) -> Any:
        if fresh is _ABSENT or _description(fresh) != description:
            there = "nothing" if fresh is _ABSENT else _description(fresh)
            raise _Refused(f"{description} cannot be restored: a fresh environment has {there} there")
        return fresh

    def _method(self, fresh: Any, description: str, given: Any) -> Any:
        self._keep(fresh, description)
        itself = self.value(given, fresh.__self__)
        if itself is fresh.__self__:
            return fresh
        if type(itself) is not type(fresh.__self__):
            raise _Refused(f"{description} of another kind of object")
        if isinstance(fresh, types.MethodType):
            return types.MethodType(fresh.__func__, itself)
        return getattr(itself, fresh.__name__)

    def _enum(self, fresh: Any, number: int, name: str) -> Any:
        kind = self._class(number, fresh)
        if not issubclass(kind, Enum):
            raise _Refused(f"{_name(kind)} is no enum")
        return kind.__members__[name]

    def _named(self, fresh: Any, number: int, items: Any) -> Any:
        kind = self._class(number, fresh)
        _state_of(kind, base=tuple)
        return tuple.__new__(kind, self._items(items, fresh))

    def _scalar(self, fresh: Any, descr: str, contents: str) -> Any:
        return np.frombuffer(bytes.fromhex(contents), _dtype(descr))[0]

    def _text(self, fresh: Any, given: Any) -> Any:
        text = self.value(given)
        return np.str_(text) if isinstance(text, str) else np.bytes_(text)

    def _list(self, node: int, fresh: Any, items: Any) -> Any:
        out = self._built[node] = []
        out.extend(self._items(items, fresh))
        return out

    def _mapping(self, node: int, fresh: Any, name: str, pairs: Any) -> Any:
        out = self._built[node] = _MAPPINGS[name]()
        for key, value in self._pairs(pairs, fresh):
            out[key] = value
        return out

    def _defaultdict(self, node: int, fresh: Any, factory: Any, pairs: Any) -> Any:
        out: Any = defaultdict()
        self._built[node] = out
        theirs = fresh.default_factory if type(fresh) is defaultdict else _ABSENT
        out.default_factory = self.value(factory, theirs)
        for key, value in self._pairs(pairs, fresh):
            out[key] = value
        return out

    def _set(self, node: int, fresh: Any, items: Any) -> Any:
        out = self._built[node] = set()
        out.update(self._items(items))
        return out

    def _deque(self, node: int, fresh: Any, items: Any, maxlen: int | None) -> Any:
        out: deque[Any] = deque(maxlen=maxlen)
        self._built[node] = out
        out.extend(self._items(items, fresh))
        return out

    def _namespace(self, node: int, fresh: Any, attributes: Any) -> Any:
        out = self._built[node] = types.SimpleNamespace()
        theirs = vars(fresh) if type(fresh) is types.SimpleNamespace else {}
        vars(out).update(self._attributes(attributes, theirs.get))
        return out

    def _bytearray(self, node: int, fresh: Any, position: int, size: int) -> Any:
        out = self._built[node] = bytearray(self._stored(position, size))
        return out

    def _objects(self, node: int, fresh: Any, shape: Any, items: Any) -> Any:
        if math.prod(shape) != len(items):
            raise _Refused("an array of another size than its contents")
        out = self._built[node] = np.empty(shape, object)
        out_of_order = fresh.ravel().tolist() if isinstance(fresh, np.ndarray) and fresh.dtype == object else ()
        for place, value in zip(np.ndindex(*shape), self._items(items, out_of_order)):
            out[place] = value
        return out

    def _memory(self, node: int, fresh: Any, descr: str, shape: Any, position: int, read_only: bool) -> Any:
        dtype = _dtype(descr)
        contents = self._stored(position, math.prod(shape) * dtype.itemsize)
        out = self._built[node] = np.empty(shape, dtype)
        if contents:
            out.reshape(-1).view(np.uint8)[:] = np.frombuffer(contents, np.uint8)
        out.flags.writeable = not read_only
        return out

    def _window(
        self, node: int, fresh: Any, memory: int, descr: str, offset: int, shape: Any, strides: Any, read_only: bool
    ) -> Any:
        seen_through = self.value([memory])
        if type(seen_through) is not np.ndarray or seen_through.dtype.hasobject:
            raise _Refused("a window on something else than an array")
        out = np.ndarray(shape, _dtype(descr), seen_through, offset, strides)
        if read_only:
            out.flags.writeable = False
        self._built[node] = out
        return out

    def _closure(self, node: int, fresh: Any, description: str, cells: Any) -> Any:
        self._built[node] = self._keep(fresh, description)
        self._kept.add(node)
        if not isinstance(fresh, types.FunctionType) or len(fresh.__closure__ or ()) != len(cells):
            raise _Refused(f"{description} remembers other variables")
        for cell, given in zip(fresh.__closure__ or (), cells):
            if given == ["fresh"]:
                continue
            try:
                theirs = cell.cell_contents
            except ValueError:
                theirs = _ABSENT
            restored = self.value(given, theirs)
            if restored is not theirs:
                cell.cell_contents = restored
        return fresh

    def _bits(self, node: int, fresh: Any, name: str, seeds: Any, state: Any) -> Any:
        seeds = self.value(seeds)
        if not isinstance(seeds, np.random.SeedSequence | None):
            raise _Refused("a generator seeded by something else")
        out = self._built[node] = _BIT_GENERATORS[name](seeds)
        out.state = self.value(state)
        return out

    def _generator(self, node: int, fresh: Any, bits: Any) -> Any:
        bits = self.value(bits)
        if not isinstance(bits, np.random.BitGenerator):
            raise _Refused("a generator without bits")
        out = self._built[node] = np.random.Generator(bits)
        return out

    def _seeds(self, node: int, fresh: Any, entropy: Any, spawn_key: Any, pool_size: int, num_spawned: int) -> Any:
        out = self._built[node] = np.random.SeedSequence(
            self.value(entropy), spawn_key=self.value(spawn_key), pool_size=pool_size, n_children_spawned=num_spawned
        )
        return out

    def _random_state(self, node: int, fresh: Any, state: Any) -> Any:
        out = self._built[node] = np.random.RandomState()
        out.set_state(self.value(state))
        return out

    def _random(self, node: int, fresh: Any, state: Any) -> Any:
        out = self._built[node] = random.Random()
        out.setstate(_random_tuple(*self._items(state)))
        return out

    def _object(self, node: int, fresh: Any, number: int, attributes: Any) -> Any:
        in_place = _names(type(fresh)) == self._classes[number] and id(fresh) not in self._claimed
        kind = self._class(number, fresh)
        slots = _state_of(kind)
        if _writer_of(kind) is not _Writer._object:
            raise _Refused(f"a {_name(kind)} is never captured as an object")
        if in_place:
            out = self._claimed[id(fresh)] = fresh
        elif issubclass(kind, gym.Env):
            raise _Refused(f"a {_name(kind)}, where a fresh environment has a {_name(type(fresh))}")
        elif any("__del__" in vars(base) for base in kind.__mro__):
            raise _Refused(f"a {_name(kind)}, which does something when it ends, may not be made")
        else:
            out = object.__new__(kind)
        self._built[node] = out
        own = getattr(out, "__dict__", {})

        def counterpart(name: str, absent: Any) -> Any:
            if not in_place:
                return absent
            return _in_slot(out, name) if name in slots else own.get(name, absent)

        state = dict(self._attributes(attributes, counterpart))
        for name in slots:
            if name in state:
                _slot(kind, name).__set__(out, state.pop(name))
            elif _in_slot(out, name) is not _ABSENT:
                _slot(kind, name).__delete__(out)
        if state or own:
            out.__dict__.clear()
            out.__dict__.update(state)
        return out

    def _attributes(self, given: Any, counterpart: Callable[[str, Any], Any]) -> Iterable[tuple[str, Any]]:
        for name, attribute in given.items():
            try:
                value = self.value(attribute, counterpart(name, _ABSENT))
            except _Refused as error:
                raise error.under(f".{name}") from None
            if value is not _ABSENT:
                yield name, value

    def _class(self, number: int, fresh: Any) -> type:
        """A class that the snapshot names, if the rule allows it."""
        module, qualname = names = tuple(self._classes[number])
        if _names(type(fresh)) == [module, qualname]:
            return type(fresh)
        if names in self._exact:
            return self._exact[names]
        if module.split(".")[0] not in self._packages:
            raise _Refused(f"{module}.{qualname} does not belong to this environment")
        found: Any = sys.modules[module]
        for part in qualname.split("."):
            found = vars(found)[part]
        if not isinstance(found, type) or _names(found) != [module, qualname]:
            raise _Refused(f"{module}.{qualname} is no class of that name")
        return found

    def _stored(self, position: int, size: int) -> bytes:
        if not 0 <= position <= position + size <= len(self.data):
            raise _Refused(f"{size} bytes from {position} on of data that has {len(self.data)}")
        return self.data[position : position + size]


_INLINE: dict[str, Callable[..., Any]] = {
    "int": lambda reader, fresh, digits: int(digits, 16),
    "float": lambda reader, fresh, contents: struct.unpack("<d", bytes.fromhex(contents))[0],
    "complex": lambda reader, fresh, contents: complex(*struct.unpack("<dd", bytes.fromhex(contents))),
    "bytes": lambda reader, fresh, contents: bytes.fromhex(contents),
    "tuple": lambda reader, fresh, items: tuple(reader._items(items, fresh)),
    "frozenset": lambda reader, fresh, items: frozenset(reader._items(items)),
    "range": lambda reader, fresh, items: range(*reader._items(items)),
    "slice": lambda reader, fresh, items: slice(*reader._items(items)),
    "singleton": lambda reader, fresh, name: _SINGLETONS[name],
    "dtype": lambda reader, fresh, descr: _dtype(descr),
    "fresh": lambda reader, fresh: fresh,
    "kept": _Reader._keep,
    "method": _Reader._method,
    "enum": _Reader._enum,
    "named": _Reader._named,
    "scalar": _Reader._scalar,
    "text": _Reader._text,
}
_BUILDERS: dict[str, Callable[..., Any]] = {
    "list": _Reader._list,
    "mapping": _Reader._mapping,
    "defaultdict": _Reader._defaultdict,
    "set": _Reader._set,
    "deque": _Reader._deque,
    "namespace": _Reader._namespace,
    "bytearray": _Reader._bytearray,
    "objects": _Reader._objects,
    "memory": _Reader._memory,
    "window": _Reader._window,
    "closure": _Reader._closure,
    "generator": _Reader._generator,
    "bits": _Reader._bits,
    "seeds": _Reader._seeds,
    "random_state": _Reader._random_state,
    "random": _Reader._random,
    "object": _Reader._object,
}


@functools.cache
def _state_of(kind: type, *, base: type = object) -> tuple[str, ...]:
    """Names of a class's slots; all other state of its instances is in `__dict__`.

    Raises:
        _Refused: instances keep state elsewhere: a C class is among the ancestors, or (pybind11, nanobind) made to look
            like one of Python's, but then instances are larger than slots, `__dict__` and `__weakref__` make them.
    """
    slots: list[str] = []
    for ancestor in kind.__mro__:
        if not ancestor.__flags__ & _HEAP_TYPE:
            if ancestor is not base or kind is base:
                raise _Refused(f"a {_name(kind)} cannot be taken apart")
            break
        slots.extend(name for name, held in vars(ancestor).items() if isinstance(held, types.MemberDescriptorType))
    pointers = len(slots) + (kind.__dictoffset__ > 0) + (kind.__weakrefoffset__ > 0)
    if kind.__basicsize__ != base.__basicsize__ + pointers * struct.calcsize("P"):
        raise _Refused(f"a {_name(kind)} cannot be taken apart")
    return tuple(dict.fromkeys(slots))


def _slot(kind: type, name: str) -> Any:
    """The descriptor of a slot; nothing that the class defines itself is asked."""
    held = (vars(ancestor).get(name) for ancestor in kind.__mro__)
    return next(member for member in held if isinstance(member, types.MemberDescriptorType))


def _in_slot(value: Any, name: str) -> Any:
    try:
        return _slot(type(value), name).__get__(value, type(value))
    except AttributeError:
        return _ABSENT


def _is_picture(kind: type) -> bool:
    return _names(kind)[0].split(".")[0] in _PICTURES


def _is_left_to_fresh(value: Any) -> bool:
    """Whether nothing is lost with it: pictures, specs, and built-in containers of nothing else."""
    if isinstance(value, list | tuple):
        return all(map(_is_left_to_fresh, value))
    if isinstance(value, dict):
        return all(map(_is_left_to_fresh, value.values()))
    return value is None or isinstance(value, _SPECS) or _is_picture(type(value))


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Many small objects start a full collection, which takes longer than the capture; none of them is garbage yet."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _names(kind: type) -> list[str]:
    # Some wrappers of C libraries (SWIG's) lack these.
    return [str(getattr(kind, "__module__", "")), str(getattr(kind, "__qualname__", kind.__name__))]


def _name(kind: type) -> str:
    return ".".join(_names(kind)).removeprefix("builtins.")


def _description(value: Any) -> str:
    """Says of things that are kept which one it is, as far as its name does."""
    name = getattr(value, "__qualname__", None) or getattr(value, "__name__", "")
    if isinstance(value, types.MethodType | types.BuiltinFunctionType) and value.__self__ is not None:
        return f"{type(value).__name__} {name}"
    module = getattr(value, "__module__", "") if isinstance(value, type | types.FunctionType) else ""
    return " ".join(filter(None, (_name(type(value)), module or "", name)))


def _random_state(source: Any) -> tuple[Any, ...]:
    """State of `random` or of a `random.Random`, its 625 numbers as an array."""
    version, words, gauss = source.getstate()
    return version, np.array(words, np.uint32), gauss


def _random_tuple(version: int, words: np.ndarray, gauss: float | None) -> tuple[Any, ...]:
    return version, tuple(words.tolist()), gauss
