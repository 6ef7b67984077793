"""From JSON and bytes back into objects: see `object_graph`."""

from __future__ import annotations

import json
import math
import random
import struct
import sys
import types
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable
from enum import Enum
from typing import Any

import gymnasium as gym
import numpy as np

from dualhead.worlds.graph_kinds import (
    ABSENT,
    BIT_GENERATORS,
    Refused,
    Snapshot,
    description_of,
    dtype_of,
    in_slot,
    name_of,
    names_of,
    random_of_words,
    slot,
    slots_of,
)
from dualhead.worlds.graph_writer import is_taken_apart

_MAPPINGS: dict[str, Any] = {kind.__name__: kind for kind in (dict, OrderedDict, Counter)}
_CLOSED_PACKAGES = sys.stdlib_module_names | {"numpy", "torch"}
_SINGLETONS = {"Ellipsis": ..., "NotImplemented": NotImplemented}


class Reader:
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
        self._exact = {tuple(names_of(kind)): kind for kind in classes}
        self._packages = {module.split(".")[0] for module, _ in self._exact} - _CLOSED_PACKAGES

    def root(self, fresh: Any) -> Any:
        return self.value(self._root, fresh)

    def value(self, given: Any, fresh: Any = ABSENT) -> Any:
        if type(given) is not list:
            if type(given) is dict:
                raise Refused("a JSON object where a value should be")
            return given
        if type(given[0]) is not int:
            return _INLINE[given[0]](self, fresh, *given[1:])
        (node,) = given
        if node in self._built:
            if node in self._kept and self._built[node] is not fresh:
                raise Refused("a function moved to another place")
            return self._built[node]
        if node < 0:
            raise Refused(f"no node {node}")
        return _BUILDERS[self._nodes[node][0]](self, node, fresh, *self._nodes[node][1:])

    def _items(self, given: Any, fresh: Any = ()) -> Iterable[Any]:
        # A list may hold itself, and the counterpart is read while it is filled.
        counterparts = list(fresh) if isinstance(fresh, list | tuple | deque) else []
        for number, item in enumerate(given):
            try:
                value = self.value(item, counterparts[number] if number < len(counterparts) else ABSENT)
            except Refused as error:
                raise error.under(f"[{number}]") from None
            if value is ABSENT:
                raise Refused("nothing there to keep").under(f"[{number}]")
            yield value

    def _pairs(self, given: Any, fresh: Any) -> Iterable[tuple[Any, Any]]:
        for key, item in given:
            key = self.value(key)
            try:
                value = self.value(item, dict.get(fresh, key, ABSENT) if isinstance(fresh, dict) else ABSENT)
            except Refused as error:
                raise error.under(f"[{key!r}]") from None
            if value is ABSENT:
                raise Refused("nothing there to keep").under(f"[{key!r}]")
            yield key, value

    def _keep(self, fresh: Any, description: str) -> Any:
        if fresh is ABSENT or description_of(fresh) != description:
            there = "nothing" if fresh is ABSENT else description_of(fresh)
            raise Refused(f"{description} cannot be restored: a fresh environment has {there} there")
        return fresh

    def _method(self, fresh: Any, description: str, given: Any) -> Any:
        self._keep(fresh, description)
        itself = self.value(given, fresh.__self__)
        if itself is fresh.__self__:
            return fresh
        if type(itself) is not type(fresh.__self__):
            raise Refused(f"{description} of another kind of object")
        if isinstance(fresh, types.MethodType):
            return types.MethodType(fresh.__func__, itself)
        return getattr(itself, fresh.__name__)

    def _enum(self, fresh: Any, number: int, name: str) -> Any:
        kind = self._class(number, fresh)
        if not issubclass(kind, Enum):
            raise Refused(f"{name_of(kind)} is no enum")
        return kind.__members__[name]

    def _named(self, fresh: Any, number: int, items: Any) -> Any:
        kind = self._class(number, fresh)
        slots_of(kind, base=tuple)
        return tuple.__new__(kind, self._items(items, fresh))

    def _scalar(self, fresh: Any, descr: str, contents: str) -> Any:
        return np.frombuffer(bytes.fromhex(contents), dtype_of(descr))[0]

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
        theirs = fresh.default_factory if type(fresh) is defaultdict else ABSENT
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
            raise Refused("an array of another size than its contents")
        out = self._built[node] = np.empty(shape, object)
        out_of_order = fresh.ravel().tolist() if isinstance(fresh, np.ndarray) and fresh.dtype == object else ()
        for place, value in zip(np.ndindex(*shape), self._items(items, out_of_order)):
            out[place] = value
        return out

    def _memory(self, node: int, fresh: Any, descr: str, shape: Any, position: int, read_only: bool) -> Any:
        dtype = dtype_of(descr)
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
            raise Refused("a window on something else than an array")
        out = np.ndarray(shape, dtype_of(descr), seen_through, offset, strides)
        if read_only:
            out.flags.writeable = False
        self._built[node] = out
        return out

    def _closure(self, node: int, fresh: Any, description: str, cells: Any) -> Any:
        self._built[node] = self._keep(fresh, description)
        self._kept.add(node)
        if not isinstance(fresh, types.FunctionType) or len(fresh.__closure__ or ()) != len(cells):
            raise Refused(f"{description} remembers other variables")
        for cell, given in zip(fresh.__closure__ or (), cells):
            if given == ["fresh"]:
                continue
            try:
                theirs = cell.cell_contents
            except ValueError:
                theirs = ABSENT
            restored = self.value(given, theirs)
            if restored is not theirs:
                cell.cell_contents = restored
        return fresh

    def _bits(self, node: int, fresh: Any, name: str, seeds: Any, state: Any) -> Any:
        seeds = self.value(seeds)
        if not isinstance(seeds, np.random.SeedSequence | None):
            raise Refused("a generator seeded by something else")
        out = self._built[node] = BIT_GENERATORS[name](seeds)
        out.state = self.value(state)
        return out

    def _generator(self, node: int, fresh: Any, bits: Any) -> Any:
        bits = self.value(bits)
        if not isinstance(bits, np.random.BitGenerator):
            raise Refused("a generator without bits")
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
        out.setstate(random_of_words(*self._items(state)))
        return out

    def _object(self, node: int, fresh: Any, number: int, attributes: Any) -> Any:
        in_place = names_of(type(fresh)) == self._classes[number] and id(fresh) not in self._claimed
        kind = self._class(number, fresh)
        slots = slots_of(kind)
        if not is_taken_apart(kind):
            raise Refused(f"a {name_of(kind)} is never captured as an object")
        if in_place:
            out = self._claimed[id(fresh)] = fresh
        elif issubclass(kind, gym.Env):
            raise Refused(f"a {name_of(kind)}, where a fresh environment has a {name_of(type(fresh))}")
        elif any("__del__" in vars(base) for base in kind.__mro__):
            raise Refused(f"a {name_of(kind)}, which does something when it ends, may not be made")
        else:
            out = object.__new__(kind)
        self._built[node] = out
        own = getattr(out, "__dict__", {})

        def counterpart(name: str, absent: Any) -> Any:
            if not in_place:
                return absent
            return in_slot(out, name) if name in slots else own.get(name, absent)

        state = dict(self._attributes(attributes, counterpart))
        for name in slots:
            if name in state:
                slot(kind, name).__set__(out, state.pop(name))
            elif in_slot(out, name) is not ABSENT:
                slot(kind, name).__delete__(out)
        if state or own:
            out.__dict__.clear()
            out.__dict__.update(state)
        return out

    def _attributes(self, given: Any, counterpart: Callable[[str, Any], Any]) -> Iterable[tuple[str, Any]]:
        for name, attribute in given.items():
            try:
                value = self.value(attribute, counterpart(name, ABSENT))
            except Refused as error:
                raise error.under(f".{name}") from None
            if value is not ABSENT:
                yield name, value

    def _class(self, number: int, fresh: Any) -> type:
        """A class that the snapshot names, if the rule allows it."""
        module, qualname = names = tuple(self._classes[number])
        if names_of(type(fresh)) == [module, qualname]:
            return type(fresh)
        if names in self._exact:
            return self._exact[names]
        if module.split(".")[0] not in self._packages:
            raise Refused(f"{module}.{qualname} does not belong to this environment")
        found: Any = sys.modules[module]
        for part in qualname.split("."):
            found = vars(found)[part]
        if not isinstance(found, type) or names_of(found) != [module, qualname]:
            raise Refused(f"{module}.{qualname} is no class of that name")
        return found

    def _stored(self, position: int, size: int) -> bytes:
        if not 0 <= position <= position + size <= len(self.data):
            raise Refused(f"{size} bytes from {position} on of data that has {len(self.data)}")
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
    "dtype": lambda reader, fresh, descr: dtype_of(descr),
    "fresh": lambda reader, fresh: fresh,
    "kept": Reader._keep,
    "method": Reader._method,
    "enum": Reader._enum,
    "named": Reader._named,
    "scalar": Reader._scalar,
    "text": Reader._text,
}
_BUILDERS: dict[str, Callable[..., Any]] = {
    "list": Reader._list,
    "mapping": Reader._mapping,
    "defaultdict": Reader._defaultdict,
    "set": Reader._set,
    "deque": Reader._deque,
    "namespace": Reader._namespace,
    "bytearray": Reader._bytearray,
    "objects": Reader._objects,
    "memory": Reader._memory,
    "window": Reader._window,
    "closure": Reader._closure,
    "generator": Reader._generator,
    "bits": Reader._bits,
    "seeds": Reader._seeds,
    "random_state": Reader._random_state,
    "random": Reader._random,
    "object": Reader._object,
}
