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

import gc
import json
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dualhead.storage import CheckpointError
from dualhead.worlds.graph_kinds import Refused, Snapshot, names_of
from dualhead.worlds.graph_reader import Reader
from dualhead.worlds.graph_writer import Writer

_MALFORMED = (
    *(ArithmeticError, AttributeError, BufferError, LookupError, MemoryError, RuntimeError, SyntaxError, TypeError),
    *(ValueError, struct.error),
)
"""What reading parts of a snapshot as something that they are not may raise."""


class CannotSnapshot(RuntimeError):
    """Something in an environment cannot be captured; the message names where it is."""


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
            writer = Writer()
            whole = {"root": writer.value(root), "nodes": writer.nodes, "classes": list(map(names_of, writer.classes))}
            text = json.dumps(whole, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return Snapshot(text.encode("utf-8", "surrogatepass"), b"".join(writer.data))
    except Refused as error:
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
        classes = Writer()
        classes.value(fresh)
        return Reader(snapshot, classes.classes).root(fresh)
    except Refused as error:
        where = error.path.lstrip(".") or "it"
        raise CheckpointError(f"{source} does not fit this environment: {where}: {error.reason}") from error
    except _MALFORMED as error:
        raise CheckpointError(f"{source} holds no state of this environment: {error!r}") from error


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
