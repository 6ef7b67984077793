"""Environments go on from a saved state with the same bits, and a saved state can run nothing."""

import contextlib
import copy
import json
import logging
import math
import os
import random
import struct
import threading
from collections import Counter, OrderedDict, UserDict, defaultdict, deque, namedtuple
from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import FrameStackObservation, NormalizeObservation, TimeLimit
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dualhead.storage import CheckpointError, read_tensors, write_tensors
from dualhead.worlds.commons.world import Commons, CommonsConfig
from dualhead.worlds.object_graph import CannotSnapshot, Snapshot, capture, restore
from dualhead.worlds.snapshots import can_snapshot, capture_process, restore_process
from dualhead.worlds.streams import GymnasiumStreams, LeanSyncVectorEnv, make_env, make_streams, restart


def bits(value: Any) -> Any:
    """A value in a form whose equality is that of type and bits, without the code under test."""
    if isinstance(value, np.ndarray | np.generic):
        return type(value), value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, float):
        return float, struct.pack("<d", value)
    if isinstance(value, complex):
        return complex, bits(value.real), bits(value.imag)
    if isinstance(value, dict):
        pairs = [(bits(key), bits(held)) for key, held in value.items()]
        return type(value), pairs, *([value.default_factory] if isinstance(value, defaultdict) else [])
    if isinstance(value, list | tuple | deque):
        return type(value), [bits(held) for held in value], getattr(value, "maxlen", None)
    if isinstance(value, set | frozenset):
        return type(value), sorted(map(repr, map(bits, value)))
    return type(value), value


def play(env: gym.Env, seed: int, num_steps: int) -> list[Any]:
    """Everything seen in so many random steps."""
    actions = copy.deepcopy(env.action_space)
    actions.seed(seed)
    seen = []
    for _ in range(num_steps):
        observation, reward, terminated, truncated, _ = env.step(actions.sample())
        seen.append((bits(observation), bits(reward), bool(terminated), bool(truncated)))
        if terminated or truncated:
            seen.append(bits(env.reset()[0]))
    return seen


def stack(env: gym.Env) -> gym.Env:
    return FrameStackObservation(NormalizeObservation(TimeLimit(env, 23)), 3)


ENVS = [
    "CartPole-v1",
    "Pendulum-v1",
    "MountainCar-v0",
    "MountainCarContinuous-v0",
    "Acrobot-v1",
    "FrozenLake-v1",
    "CliffWalking-v1",
    "Taxi-v4",
    "Blackjack-v1",
    "dualhead/CartPoleNoVel-v1",
    "dualhead/PendulumNoVel-v1",
    "dualhead/RecallCue-v0",
    "popgym-RepeatPreviousEasy-v0",
    "popgym-RepeatFirstMedium-v0",
    "popgym-AutoencodeEasy-v0",
    "popgym-MineSweeperEasy-v0",
    "popgym-BattleshipEasy-v0",
    "popgym-CountRecallEasy-v0",
    "popgym-ConcentrationEasy-v0",
    "popgym-HigherLowerEasy-v0",
    "popgym-MultiarmedBanditEasy-v0",
    "popgym-NoisyPositionOnlyPendulumEasy-v0",
    "MiniGrid-DoorKey-5x5-v0",
    "MiniGrid-MemoryS7-v0",
    "MiniGrid-FourRooms-v0",
    "MiniGrid-Dynamic-Obstacles-6x6-v0",
]


def assert_goes_on(make, *, seed: int, num_before: int, num_after: int = 220) -> None:
    """A snapshot after some steps, restored into a second environment, gives what the first one gives."""
    env, other = make(), make()
    env.reset(seed=seed)
    play(env, seed, num_before)
    snapshot = capture_process(env=env)
    going_on = play(env, seed + 1, num_after)
    going_on.append(bits(env.reset()[0]))
    going_on += play(env, seed + 2, 15)
    at_the_end = capture_process(env=env)

    other.reset(seed=seed + 100)
    assert restore_process(snapshot, env=other).env is other
    assert capture_process(env=other) == snapshot
    resumed = play(other, seed + 1, num_after)
    resumed.append(bits(other.reset()[0]))
    resumed += play(other, seed + 2, 15)
    assert resumed == going_on
    assert capture_process(env=other) == at_the_end
    env.close()
    other.close()


@pytest.mark.parametrize("name", ENVS)
def test_an_environment_goes_on(name):
    for seed, num_before in enumerate(np.random.default_rng(len(name)).integers(0, 60, size=2)):
        assert_goes_on(lambda: make_env(name), seed=seed, num_before=int(num_before))


@pytest.mark.parametrize("name", ["CartPole-v1", "popgym-RepeatPreviousEasy-v0", "dualhead/RecallCue-v0"])
def test_wrappers_go_on(name):
    def make():
        env = make_env(name)
        return stack(env) if isinstance(env.observation_space, spaces.Box) else TimeLimit(env, 23)

    assert_goes_on(make, seed=0, num_before=40)


def test_the_normalisation_is_part_of_the_state():
    env, other = stack(make_env("CartPole-v1")), stack(make_env("CartPole-v1"))
    env.reset(seed=0)
    play(env, 0, 100)
    other.reset(seed=0)
    restore(capture(env), other)
    assert other.get_wrapper_attr("obs_rms").count == env.get_wrapper_attr("obs_rms").count > 100


def test_a_rendered_environment_goes_on(monkeypatch):
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    env, other = (gym.make("CartPole-v1", render_mode="rgb_array") for _ in range(2))
    env.reset(seed=0)
    other.reset(seed=1)
    frame = env.render()
    assert env.unwrapped.surf is not None
    restore(capture(env), other)
    assert other.unwrapped.screen is None
    np.testing.assert_array_equal(other.render(), frame)
    assert play(other, 0, 50) == play(env, 0, 50)


# Values.

plain = st.one_of(
    *(st.none(), st.booleans(), st.integers(), st.integers(-(2**5000), 2**5000), st.floats(), st.complex_numbers()),
    *(st.text(), st.text(st.characters(min_codepoint=0xD800, max_codepoint=0xDFFF)), st.binary()),
    hnp.array_dtypes(max_size=3).flatmap(lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, min_side=0))),
    hnp.scalar_dtypes().flatmap(hnp.from_dtype),
)
keys = st.recursive(
    st.one_of(st.none(), st.integers(), st.text(), st.binary(), st.floats(allow_nan=False)),
    lambda inner: st.one_of(st.tuples(inner, inner), st.frozensets(inner, max_size=3)),
    max_leaves=5,
)
values = st.recursive(
    plain,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(keys, inner, max_size=4),
        st.dictionaries(keys, inner, max_size=3).map(OrderedDict),
        st.sets(keys, max_size=4),
        st.tuples(st.lists(inner, max_size=3), st.sampled_from([None, 3, 7])).map(lambda pair: deque(*pair)),
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(values)
def test_values_survive(value):
    assert bits(restore(capture(value), None)) == bits(value)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7), st.booleans()), max_size=25))
def test_shared_references_and_cycles_survive(size, edges):
    """A random graph of lists and dicts: the same walk over both meets the same nodes in the same order."""
    nodes = [[] if number % 2 else {} for number in range(size)]
    for source, target, in_tuple in edges:
        held = nodes[target % size]
        container = nodes[source % size]
        held = (held, 1) if in_tuple else held
        if isinstance(container, list):
            container.append(held)
        else:
            container[len(container)] = held

    def shape(root):
        order, out = {}, []

        def visit(value):
            if isinstance(value, list | dict):
                is_known = id(value) in order
                out.append((type(value), order.setdefault(id(value), len(order)), len(value)))
                if is_known:
                    return
            parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
            for part in parts:
                visit(part)

        visit(root)
        return out

    assert shape(restore(capture(nodes), None)) == shape(nodes)


Point = namedtuple("Point", "x y")


class Colour(Enum):
    RED = "r"
    BLUE = "b"


class Level(IntEnum):
    LOW = 1
    HIGH = 2


@dataclass(frozen=True)
class Frozen:
    number: int
    items: list


class Slotted:
    __slots__ = ("__hidden", "never", "value")

    def __init__(self, value, hidden):
        self.value, self.__hidden = value, hidden

    def both(self):
        return self.value, self.__hidden


class Holder:
    """Takes any attributes; setting one the usual way, or calling the class, would be noticed."""

    def __init__(self, **attributes):
        self.__dict__.update(attributes)

    def __setattr__(self, name, value):
        raise AssertionError(f"{name} was set by running code")


def through(live: Holder, fresh: Holder) -> Any:
    assert restore(capture(live), fresh) is fresh
    return fresh


def test_objects_of_all_kinds():
    same = [1, 2]
    live = Holder(
        point=Point(1, same),
        same=same,
        colour=Colour.BLUE,
        level=Level.HIGH,
        frozen=Frozen(3, same),
        slotted=Slotted(4, same),
        counted=Counter("abba"),
        lists=defaultdict(list, a=same),
        odd=[
            range(1, 9, 2),
            slice(None, 3),
            ...,
            np.dtype(">f4"),
            np.str_("a\0"),
            np.bytes_(b"\0a\0"),
            bytearray(b"ab"),
        ],
        by_tuple={(1, (2, "x")): Frozen(5, [])},
    )
    out = through(live, Holder(lists=defaultdict(list), stale=1))
    assert out.point == (1, [1, 2])
    assert type(out.point) is Point
    assert out.colour is Colour.BLUE
    assert out.level is Level.HIGH
    assert out.frozen == Frozen(3, [1, 2])
    assert out.slotted.both() == (4, [1, 2])
    assert not hasattr(out.slotted, "never")
    assert out.point.y is out.same is out.frozen.items is out.slotted.both()[1] is out.lists["a"]
    assert out.counted == {"a": 2, "b": 2}
    assert type(out.counted) is Counter
    assert out.lists["new"] == []
    assert bits(out.odd) == bits(live.odd)
    assert out.by_tuple == live.by_tuple
    assert not hasattr(out, "stale")


def test_objects_in_place_keep_their_identity_and_no_two_share_one():
    inner = Holder(number=0)
    fresh = Holder(a=inner, b=inner, c=Holder(number=0, more=1))
    c = fresh.c
    through(Holder(a=Holder(number=1), b=Holder(number=2), c=Holder(number=3)), fresh)
    assert fresh.a is inner
    assert fresh.c is c
    assert (fresh.a.number, fresh.b.number, vars(fresh.c)) == (1, 2, {"number": 3})


def test_a_slot_that_is_empty_in_the_snapshot_is_emptied():
    live, fresh = Slotted(1, 2), Slotted(3, 4)
    fresh.never = 5
    restore(capture(live), fresh)
    assert fresh.both() == (1, 2)
    assert not hasattr(fresh, "never")


def test_arrays_that_share_memory_still_do():
    base = np.arange(24.0).reshape(4, 6)
    fortran = np.asfortranarray(base)
    locked = np.arange(3)
    locked.flags.writeable = False
    permuted = np.arange(24).reshape(2, 3, 4).transpose(1, 2, 0).copy(order="K")
    wide = np.broadcast_to(base[0], (5, 6))
    live = [base[1:3, ::2], base, base[::-1].T, fortran, fortran[2], wide, locked, permuted, permuted[1]]
    part, whole, turned, theirs, row, wide, still_locked, _, _ = out = restore(capture(live), None)
    assert bits(out) == bits(live)
    assert [array.strides for array in out] == [array.strides for array in live]
    whole[1, 2] = -1
    assert part[0, 1] == turned[2, 2] == -1
    whole[0] = 7
    assert (wide == 7).all()
    theirs[2, 3] = -2
    assert row[3] == -2
    assert base[1, 2] == 8
    assert not still_locked.flags.writeable


def test_arrays_of_objects():
    shared = [1]
    live = np.empty((2, 2), object)
    live[0, 0], live[1, 1] = shared, shared
    out = restore(capture(live), None)
    assert out.tolist() == [[[1], None], [None, [1]]]
    assert out[0, 0] is out[1, 1]


@pytest.mark.parametrize("kind", ["PCG64", "PCG64DXSM", "MT19937", "Philox", "SFC64"])
def test_generators_go_on(kind):
    generator = np.random.Generator(getattr(np.random, kind)(np.random.SeedSequence(2**100, spawn_key=(1, 2))))
    generator.integers(5, dtype=np.int32)  # half of a 64-bit draw is kept for the next one
    generator.spawn(2)
    one, other, shared_bits = restore(capture([generator, generator, generator.bit_generator]), None)
    assert one is other
    assert one.bit_generator is shared_bits
    for _ in range(3):
        assert one.integers(5, dtype=np.int32) == generator.integers(5, dtype=np.int32)
    assert one.spawn(1)[0].random() == generator.spawn(1)[0].random()


def test_other_random_sources_go_on():
    mine, numpys = random.Random(3), np.random.RandomState(4)
    mine.gauss(0, 1)
    numpys.randn()  # each keeps the second of a pair
    out = restore(capture([mine, numpys]), None)
    assert [out[0].gauss(0, 1), out[0].random()] == [mine.gauss(0, 1), mine.random()]
    assert out[1].randn(5).tolist() == numpys.randn(5).tolist()


# What stays with the fresh environment.


def counting(start):
    count = start

    def next_one():
        nonlocal count
        count += 1
        return count

    return next_one


def test_what_cannot_be_data_is_the_fresh_one(tmp_path):
    def make(file):
        out = Holder(count=counting(0), lock=threading.Lock(), log=logging.getLogger("x"), file=file, kind=dict)
        out.__dict__.update(items=[], module=math, sqrt=math.sqrt, ufunc=np.add, lambda_=lambda: out)
        out.__dict__.update(method=Slotted(1, 2).both, append=out.items.append, singleton=random._inst)
        return out

    with open(tmp_path / "a", "w") as a, open(tmp_path / "b", "w") as b:
        live, fresh = make(a), make(b)
        live.count()
        live.append(5)
        live.method.__self__.value = 9
        before = dict(vars(fresh))
        through(live, fresh)
        kept = ("count", "lock", "log", "file", "kind", "module", "sqrt", "ufunc", "lambda_", "method", "singleton")
        assert all(vars(fresh)[name] is before[name] for name in kept)
    assert [live.count(), fresh.count(), fresh.count()] == [2, 2, 3]
    assert fresh.lambda_() is fresh
    assert fresh.method() == (9, 2)
    fresh.append(6)
    assert fresh.items == [5, 6]
    assert live.items == [5]


def test_a_method_of_an_object_that_is_made_anew_is_bound_to_it():
    inner = Slotted(0, 0)
    fresh = Holder(a=inner, b=inner, call=inner.both)
    second = Slotted(2, 2)
    through(Holder(a=Slotted(1, 1), b=second, call=second.both), fresh)
    assert fresh.call.__self__ is fresh.b
    assert fresh.call() == (2, 2)


@pytest.mark.parametrize(
    ("live", "fresh", "message"),
    [
        (math.sin, math.cos, r" f: .*sin cannot be restored: a fresh environment has .*cos"),
        (math.sin, None, r" f: .*sin cannot be restored"),
        ([math.sin], [], r" f\[0\]: .*sin .* has nothing there"),
        (dict, list, r" f: .*dict cannot be restored"),
        (counting(0), lambda: 0, r" f: .*next_one cannot be restored"),
        (Slotted(1, 2).both, Slotted(1, 2).__reduce_ex__, r" f: .*both cannot be restored"),
    ],
)
def test_another_function_at_that_place_is_an_error(live, fresh, message):
    with pytest.raises(CheckpointError, match=message):
        through(Holder(f=live), Holder(f=fresh))


class Iterating:
    def __init__(self):
        self.deep = {"a": [0, Holder(steps=(number for number in range(3)))]}


class OfNumPy(np.ndarray):
    pass


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Holder(x=iter([1])), r"env\.x: a list_iterator"),
        (lambda: Holder(x=threading.Thread()), r"env\.x: a threading\.Thread that may be running"),
        (lambda: Holder(x=memoryview(b"")), r"env\.x: a memoryview"),
        (lambda: Holder(x=np.zeros(2).view(OfNumPy)), r"env\.x: a .*OfNumPy"),
        (lambda: Holder(x=ValueError()), r"env\.x: a ValueError"),
        (lambda: Holder(x=struct.Struct("d")), r"env\.x: a _?struct\.Struct"),
        (lambda: Holder(x=torch.zeros(2)), r"env\.x: a torch\.Tensor"),
        (lambda: Holder(x=np.zeros(2, "O")[:1]), r"env\.x: a view"),
        (lambda: Holder(x=counting(iter([1]))), r"env\.x\.<variable count>: a list_iterator"),
        (Iterating, r"env\.deep\['a'\]\[1\]\.steps: a generator cannot be taken apart"),
    ],
)
def test_what_cannot_be_captured_is_named(make, message):
    with pytest.raises(CannotSnapshot, match=message):
        capture(make(), name="env")


def test_what_is_in_use_cannot_be_captured():
    with open(os.devnull) as file, pytest.raises(CannotSnapshot, match=r"env\.file: an open file, whose position"):
        capture(Holder(file=file), name="env")
    lock = threading.Lock()
    with lock, pytest.raises(CannotSnapshot, match=r"env\.lock: a lock that is held"):
        capture(Holder(lock=lock), name="env")
    assert not lock.locked()


def test_pictures_are_left_but_nothing_beside_them():
    pygame = pytest.importorskip("pygame")
    surface = pygame.Surface((2, 2))
    fresh = Holder(screen=None, images=None, spec=None)
    spec = gym.spec("CartPole-v1")
    through(Holder(screen=surface, images={"a": [surface, None]}, spec=spec, n=[1], m=Holder(s=surface)), fresh)
    assert vars(fresh).keys() == {"screen", "images", "spec", "n", "m"}
    assert [fresh.screen, fresh.images, fresh.spec, fresh.n, vars(fresh.m)] == [None, None, None, [1], {}]
    with pytest.raises(CannotSnapshot, match=r"env\.both\[1\]: a pygame.*Surface"):
        capture(Holder(both=[np.zeros(3), surface]), name="env")


def test_what_was_written_before_a_picture_was_met_is_taken_back():
    """The nodes and data of an attribute that is left must not shift those that follow."""
    pygame = pytest.importorskip("pygame")
    images = {"a": [None, None], "b": pygame.Surface((2, 2))}
    shared = images["a"]
    out = through(Holder(images=images, array=np.arange(3), again=shared), Holder(images=None))
    assert out.array.tolist() == [0, 1, 2]
    assert out.again == [None, None]


# A snapshot is only data.


class Tripwire:
    """Notes every way in which making or ending an instance could run code."""

    ran: list = []  # noqa: RUF012

    def __new__(cls, *args, **kwargs):
        cls.ran.append("new")
        return super().__new__(cls)

    def __init__(self, value=None):
        self.ran.append("init")
        self.__dict__["value"] = value

    def __setattr__(self, name, value):
        self.ran.append("setattr")

    def __setstate__(self, state):
        self.ran.append("setstate")

    def __reduce__(self):
        self.ran.append("reduce")
        return (Tripwire, ())


class Ending:
    def __del__(self):
        Tripwire.ran.append("del")


def edited(snapshot: Snapshot, edit) -> Snapshot:
    whole = json.loads(snapshot.structure)
    edit(whole)
    return snapshot._replace(structure=json.dumps(whole).encode())


def test_making_an_instance_runs_no_code():
    live, fresh = Holder(x=[Tripwire(1)]), Holder(x=[])
    Tripwire.ran.clear()
    through(live, fresh)
    assert fresh.x[0].value == 1
    assert Tripwire.ran == []


def test_an_instance_that_would_do_something_when_it_ends_is_not_made():
    live = Holder(x=Ending())
    Tripwire.ran.clear()
    with pytest.raises(CheckpointError, match="does something when it ends"):
        restore(capture(live), Holder(x=None))
    assert Tripwire.ran == []
    through(live, Holder(x=Ending()))  # into one that is there: fine


@pytest.mark.parametrize(
    "named",
    [
        ("os", "system"),
        ("posix", "system"),
        ("subprocess", "Popen"),
        ("builtins", "eval"),
        ("builtins", "object"),
        ("builtins", "list"),
        ("collections", "UserDict"),
        ("numpy.lib._iotools", "NameValidator"),
        ("dualhead.config", "RunConfig"),
        ("antigravity", "x"),
        ("test_snapshots", "os"),
        ("test_snapshots", "os.system"),
        ("test_snapshots", "subprocess.Popen"),
        ("test_snapshots", "counting"),
        ("test_snapshots", "Missing"),
        ("test_snapshots", "Colour"),
        ("test_snapshots", "ENVS"),
        ("test_snapshots", "Commons"),
    ],
)
def test_a_snapshot_may_not_name_other_classes(named, monkeypatch):
    for module, name in (("os", "system"), ("subprocess", "Popen")):
        monkeypatch.setattr(f"{module}.{name}", lambda *args: pytest.fail("it was called"), raising=True)
    snapshot = capture(Holder(x=[Slotted("touch pwned", 1)]))
    assert json.loads(snapshot.structure)["classes"][1] == [__name__, "Slotted"]

    def rename(whole):
        whole["classes"][1] = [named[0].replace("test_snapshots", __name__), named[1]]

    with pytest.raises(CheckpointError):
        restore(edited(snapshot, rename), Holder(x=[]))


def test_of_the_standard_library_only_classes_that_are_there_may_be_made():
    def named(name):
        return edited(capture(Holder(x=[UserDict(a=1)])), lambda whole: whole["classes"][1].__setitem__(1, name))

    fresh = Holder(x=[], y=UserDict())
    restore(named("UserDict"), fresh)
    assert fresh.x == [{"a": 1}]
    with pytest.raises(CheckpointError, match=r"collections\.UserList does not belong"):
        restore(named("UserList"), Holder(x=[], y=UserDict()))


def test_no_import_is_made_for_a_snapshot():
    import sys

    assert "this" not in sys.modules
    snapshot = edited(capture(Holder(x=[Slotted(1, 1)])), lambda whole: whole["classes"].__setitem__(1, ["this", "d"]))
    with pytest.raises(CheckpointError, match=r"this\.d does not belong"):
        restore(snapshot, Holder(x=[]))
    assert "this" not in sys.modules


def test_functions_cannot_be_swapped():
    """What a fresh environment holds at one place cannot be moved to another."""
    live = Holder(step=counting(0), shell=counting(0))

    def swap(whole):
        attributes = whole["nodes"][0][2]
        attributes["step"] = attributes["shell"]

    with pytest.raises(CheckpointError, match="moved to another place"):
        restore(edited(capture(live), swap), Holder(step=counting(0), shell=counting(0)))


def test_enum_members_and_specs_are_not_written_into():
    whole = capture(Holder(x=Slotted(1, 1)))
    for held in (Colour.RED, gym.spec("CartPole-v1"), logging.getLogger("x")):
        names = [type(held).__module__, type(held).__qualname__]
        changed = edited(whole, lambda parts, names=names: parts["classes"].__setitem__(1, names))
        before = dict(vars(held))
        with pytest.raises(CheckpointError, match="never captured as an object"):
            restore(changed, Holder(x=held))
        assert vars(held) == before


def test_memory_is_not_read_as_pointers_nor_beyond_its_end():
    snapshot = capture([np.arange(4)[1:3]])
    number = next(n for n, node in enumerate(json.loads(snapshot.structure)["nodes"]) if node[0] == "window")

    def changing(field, value, of=number):
        return edited(snapshot, lambda whole: whole["nodes"][of].__setitem__(field, value))

    assert restore(changing(3, 16), None)[0].tolist() == [2, 3]
    for field, value in ((2, "|O"), (2, "[('a', '|O')]"), (3, -8), (3, 24), (4, [9]), (5, [-16]), (1, number), (1, -1)):
        with pytest.raises(CheckpointError):
            restore(changing(field, value), None)
    memory = json.loads(snapshot.structure)["nodes"][number][1]
    for field, value in ((1, "|O"), (2, [5]), (2, [-4]), (2, [2**70]), (3, 8), (3, -8)):
        with pytest.raises(CheckpointError):
            restore(changing(field, value, memory), None)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damaged_snapshots_give_one_kind_of_error(data):
    """Any part replaced by anything else of JSON: an error of ours, or a harmless other value."""
    live = Holder(x=[1, Slotted(2, np.arange(3))], g=np.random.default_rng(0), d={"a": (Level.LOW, 1.5)}, f=counting(1))
    snapshot = capture(live)
    whole = json.loads(snapshot.structure)
    place, key = whole, data.draw(st.sampled_from(["root", "nodes", "classes"]))
    while isinstance(place[key], list | dict) and place[key] and data.draw(st.integers(0, 4)):
        place = place[key]
        key = data.draw(st.sampled_from(range(len(place)) if isinstance(place, list) else sorted(place)))
    json_values = st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(-9, 99), st.floats(allow_nan=False), st.sampled_from(
            ["list", "object", "window", "kept", "fresh", "bits", "|O", "<f8", "tuple", "x"])),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
        max_leaves=5,
    )  # fmt: skip
    place[key] = data.draw(json_values)
    fresh = Holder(x=[], g=None, d={"a": (Level.HIGH, 0)}, f=counting(1))
    with contextlib.suppress(CheckpointError):
        restore(Snapshot(json.dumps(whole).encode(), snapshot.data), fresh)


@pytest.mark.parametrize(
    "structure", [b"", b"{", b"[]", b"3", b'{"root": [0]}', b"\xff\xfe", b'{"root": ' + b"[" * 9**5]
)
def test_what_is_no_snapshot_at_all(structure):
    with pytest.raises(CheckpointError):
        restore(Snapshot(structure, b""), Holder())


def test_the_state_of_another_environment_is_refused():
    env, other = make_env("MiniGrid-FourRooms-v0"), make_env("CartPole-v1")
    env.reset(seed=0)
    other.reset(seed=0)
    with pytest.raises(
        CheckpointError,
        match=r"a gymnasium\.wrappers.*TransformObservation, where a fresh environment has a .*TimeLimit",
    ):
        restore(capture(env), other)


# The check at the start of a run.


class Walk(gym.Env):
    """A random walk; episodes of ten steps."""

    observation_space = spaces.Box(-np.inf, np.inf, (1,))
    action_space = spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time, self.place = 0, 0.0
        return self._see(), {}

    def step(self, action):
        self.time += 1
        self.place += self.noise()
        return self._see(), self.place, self.time == 10, False, {}

    def noise(self):
        return self.np_random.normal()

    def _see(self):
        return np.array([self.place], np.float32)


MODULE_STATE = [0.0]


class ModuleState(Walk):
    def noise(self):
        MODULE_STATE[0] += 1.0
        return MODULE_STATE[0]


class GlobalGenerators(Walk):
    def noise(self):
        return random.random() + np.random.random()  # noqa: NPY002


class HoldsGenerator(Walk):
    def reset(self, *, seed=None, options=None):
        self.steps = (number for number in range(100))
        return super().reset(seed=seed)

    def noise(self):
        return next(self.steps)


class Impatient(Walk):
    def step(self, action):
        raise OSError("the simulator has gone")


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Walk, None),
        (GlobalGenerators, None),
        (ModuleState, "step 1 after a restored snapshot differed"),
        (HoldsGenerator, "env.env.steps: a generator cannot be taken apart"),
        (Impatient, "trying it raised OSError: the simulator has gone"),
    ],
)
def test_can_snapshot(kind, reason):
    random_before, numpy_before = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    said = can_snapshot(lambda: TimeLimit(kind(), 100))
    assert said is None if reason is None else said.startswith(reason)
    assert random.getstate() == random_before
    assert np.random.get_state()[1].tolist() == numpy_before  # noqa: NPY002


class ForgetsAtReset(Walk):
    """Differs only after a reset, which 300 steps would not bring about by themselves."""

    def reset(self, *, seed=None, options=None):
        out = super().reset(seed=seed)
        MODULE_STATE[0] += 1.0
        self.place = MODULE_STATE[0]
        return self._see(), out[1]

    def step(self, action):
        observation, reward, _, _, info = super().step(action)
        return observation, reward, False, False, info


def test_can_snapshot_looks_beyond_a_reset():
    assert "differed" in can_snapshot(ForgetsAtReset)


def test_can_snapshot_stops_in_time():
    steps = []

    class Slow(Walk):
        def noise(self):
            steps.append(1)
            return 0.0

    assert can_snapshot(Slow, min_steps=5, max_steps=1000, seconds=0.0) is None
    assert len(steps) == 7 + 2 * (5 + 1)


# Streams.


def actions_for(streams, seed):
    space = gym.vector.utils.batch_space(streams.action_space, streams.num_streams)
    space.seed(seed)
    while True:
        yield space.sample()


def watch(streams, num_steps, seed):
    sampled = actions_for(streams, seed)
    return [bits(tuple(streams.step(next(sampled)))) for _ in range(num_steps)]


def save_and_load(streams, path):
    write_tensors(path, *streams.state())
    return read_tensors(path)


@pytest.mark.parametrize(
    "env", ["CartPole-v1", "dualhead/RecallCue-v0", "MiniGrid-DoorKey-5x5-v0", "popgym-CountRecallEasy-v0"]
)
def test_streams_go_on(env, tmp_path):
    streams = make_streams(env, 3)
    assert streams.resumable is None
    streams.reset(seed=0)
    watch(streams, 37, seed=1)
    seen = bits(streams.step(next(actions_for(streams, 9))).observations)
    saved = save_and_load(streams, tmp_path / "state")
    expected = watch(streams, 80, seed=2)
    resumed = make_streams(env, 3)
    assert bits(resumed.restore(*saved)) == seen
    assert watch(resumed, 80, seed=2) == expected


def test_streams_in_processes_go_on(tmp_path):
    streams, resumed = (make_streams("popgym-CountRecallEasy-v0", 2, vectorization="async") for _ in range(2))
    try:
        assert streams.resumable is None
        streams.reset(seed=0)
        watch(streams, 20, seed=1)
        seen = bits(streams.step(next(actions_for(streams, 9))).observations)
        saved = save_and_load(streams, tmp_path / "state")
        expected = watch(streams, 70, seed=2)
        assert bits(resumed.restore(*saved)) == seen
        assert watch(resumed, 70, seed=2) == expected
    finally:
        streams.close()
        resumed.close()


def test_the_first_observations_are_part_of_the_state():
    streams = make_streams("CartPole-v1", 2)
    with pytest.raises(RuntimeError, match="reset"):
        streams.state()
    first = bits(streams.reset(seed=0))
    assert bits(make_streams("CartPole-v1", 2).restore(*streams.state())) == first


def test_data_that_all_environments_share_is_saved_once_and_stays_shared():
    data = np.zeros(100_000)

    class Shared(Walk):
        def __init__(self):
            self.data = data

    streams, other = (GymnasiumStreams(LeanSyncVectorEnv([Shared] * 3)) for _ in range(2))
    streams.reset(seed=0)
    tensors, metadata = streams.state()
    assert data.nbytes < sum(tensor.numel() for tensor in tensors.values()) < 1.1 * data.nbytes
    other.restore(tensors, metadata)
    assert other.envs.envs[0].data is other.envs.envs[2].data


def test_the_state_of_other_streams_is_refused():
    streams = make_streams("CartPole-v1", 2)
    streams.reset(seed=0)
    tensors, metadata = streams.state()
    with pytest.raises(CheckpointError, match="num_streams"):
        make_streams("CartPole-v1", 3).restore(tensors, metadata)
    with pytest.raises(CheckpointError, match="lacks"):
        streams.restore({}, metadata)
    with pytest.raises(
        CheckpointError,
        match=r"checkpoint does not fit this environment: envs\[0\]\.env\.env: a .*CartPoleEnv, where .*Acrobot",
    ):
        make_streams("Acrobot-v1", 2).restore(tensors, metadata)


def test_streams_say_why_they_are_not_resumable():
    streams = GymnasiumStreams(LeanSyncVectorEnv([HoldsGenerator] * 2))
    streams.reset(seed=0)
    assert streams.resumable == "env.steps: a generator cannot be taken apart"
    with pytest.raises(CannotSnapshot, match=r"^envs\[0\]\.steps: a generator"):
        streams.state()
    theirs = SyncVectorEnv([lambda: make_env("CartPole-v1")] * 2, autoreset_mode=AutoresetMode.SAME_STEP)
    assert GymnasiumStreams(theirs).resumable is None
    wrapped = GymnasiumStreams(gym.wrappers.vector.RecordEpisodeStatistics(theirs))
    wrapped.reset(seed=0)
    assert "RecordEpisodeStatistics cannot be reached" in wrapped.resumable
    with pytest.raises(CannotSnapshot, match="cannot be reached"):
        wrapped.state()


def test_plain_vector_environments_go_on():
    """Gymnasium's own vector environment keeps nothing else either."""

    def make():
        return GymnasiumStreams(
            SyncVectorEnv([lambda: make_env("CartPole-v1")] * 2, autoreset_mode=AutoresetMode.SAME_STEP)
        )

    streams, resumed = make(), make()
    streams.reset(seed=0)
    watch(streams, 30, seed=1)
    saved = streams.state()
    expected = watch(streams, 60, seed=2)
    resumed.restore(*saved)
    assert watch(resumed, 60, seed=2) == expected


def test_the_commons_keep_the_same_convention():
    streams, resumed = (Commons(CommonsConfig(num_agents=2, form="bandit"), num_worlds=2) for _ in range(2))
    assert streams.resumable is None
    streams.reset(seed=0)
    step = streams.step(np.zeros((4, 2), int))
    observations = resumed.restore(*streams.state())
    assert observations.keys() == step.observations.keys()
    for name, part in step.observations.items():
        assert part.equal(observations[name]), name


def test_a_restart_is_no_repetition():
    streams = make_streams("CartPole-v1", 2)
    first = bits(streams.reset(seed=0))
    again = [
        bits(restart(streams, seed=seed, num_steps=steps)) for seed, steps in ((0, 64), (0, 128), (1, 64), (0, 64))
    ]
    assert again[0] == again[3]
    assert len({str(observations) for observations in (first, *again)}) == 4
