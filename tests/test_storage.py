"""Checkpoints that survive: every byte checked, one writer, a full disk, a killed process, a thousand broken files."""

import contextlib
import hashlib
import io
import json
import os
import pickle
import random
import resource
import signal
import socket
import struct
import subprocess
import sys
import tracemalloc
import warnings
import zipfile

import agents
import numpy as np
import pytest
import torch
from full_disk import files_of_at_most
from processes import PATIENCE, started
from safetensors import safe_open
from safetensors.torch import load, load_file, save

from dualhead import CheckpointError, NormConfig, NormEvents, RunConfig, RunError
from dualhead.running.checkpoint import (
    checkpoints,
    locked,
    new_run_dir,
    read_best,
    read_newest,
    save_best,
    save_checkpoint,
)
from dualhead.storage import VERSION, read_tensors, write_bytes, write_tensors

TENSORS = {"a": torch.arange(6, dtype=torch.float32).reshape(2, 3), "checksum": torch.tensor([True, False])}
METADATA = {"num_steps": 7, "text": 'a "quoted" "checksum":"' + "0" * 64 + '" é'}


def split(contents):
    """Header and data of a safetensors file, as its format says: 8 bytes of length, JSON, data."""
    size = struct.unpack("<Q", contents[:8])[0]
    return json.loads(contents[8 : 8 + size]), contents[8 + size :]


def joined(header, data):
    text = json.dumps(header, separators=(",", ":")).encode()
    return struct.pack("<Q", len(text)) + text + data


def reseal(contents):
    """The same file with the checksum that belongs to it, whatever else is wrong with it."""
    begin = contents.index(b'"checksum":"') + 12
    contents = contents[:begin] + b"0" * 64 + contents[begin + 64 :]
    return contents[:begin] + hashlib.sha256(contents).hexdigest().encode() + contents[begin + 64 :]


def sealed(header, data):
    return reseal(joined(header, data))


def replace(path, contents):
    """Writes a file anew (writing over one waits for the disk on some file systems)."""
    path.unlink(missing_ok=True)
    path.write_bytes(contents)


def test_a_checkpoint_is_a_safetensors_file_with_the_checksum_it_says(tmp_path):
    write_tensors(tmp_path / "file", TENSORS, METADATA)
    with safe_open(tmp_path / "file", "pt") as file:
        said = file.metadata()
    for name, tensor in load_file(tmp_path / "file").items():
        assert torch.equal(tensor, TENSORS[name])
    contents = (tmp_path / "file").read_bytes()
    blanked = contents.replace(said["checksum"].encode(), b"0" * 64)
    assert hashlib.sha256(blanked).hexdigest() == said["checksum"]
    tensors, metadata = read_tensors(tmp_path / "file")
    assert metadata == METADATA
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)


def test_every_flipped_bit_of_a_file_is_found(tmp_path):
    path = tmp_path / "file"
    write_tensors(path, TENSORS, METADATA)
    contents = path.read_bytes()
    for bit in range(8 * len(contents)):
        broken = bytearray(contents)
        broken[bit // 8] ^= 1 << bit % 8
        replace(path, broken)
        with pytest.raises(CheckpointError, match=str(path)):
            read_tensors(path)


def test_file_mode_is_the_users(tmp_path):
    before = os.umask(0o027)
    try:
        write_bytes(tmp_path / "file", b"x")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="this system does not say which file a descriptor is of")
def test_contents_reach_the_disk_before_the_name_and_the_name_before_the_end(tmp_path, monkeypatch):
    happened = []

    def noted(name, real, what):
        def call(*arguments):
            happened.append((name, what(*arguments)))
            return real(*arguments)

        monkeypatch.setattr(os, name, call)

    noted("fsync", os.fsync, lambda descriptor: os.path.realpath(f"/proc/self/fd/{descriptor}"))
    noted("replace", os.replace, lambda source, target: str(source))
    write_bytes(tmp_path / "file", b"x")
    (first, temporary), second, third = happened
    assert (first, second, third) == ("fsync", ("replace", temporary), ("fsync", str(tmp_path)))


# Which checkpoint counts.


def save_steps(run_dir, *steps, keep=2):
    (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
    for num_steps in steps:
        save_checkpoint(run_dir, {"steps": torch.tensor(num_steps)}, {"num_steps": num_steps}, keep=keep)


def steps_of(files):
    return [int(path.stem.removeprefix("step-")) for path in files]


def test_the_newest_few_are_kept(tmp_path):
    save_steps(tmp_path, 5, 60, 700, 8000, keep=3)
    assert steps_of(checkpoints(tmp_path)) == [8000, 700, 60]
    save_steps(tmp_path, 90_000, keep=1)
    assert steps_of(checkpoints(tmp_path)) == [90_000]


@pytest.mark.parametrize("keep", [1, 2])
def test_a_broken_newest_gives_way_and_never_outlives_a_whole_one(keep, tmp_path):
    """A run that resumes before a broken checkpoint writes smaller numbers: the broken one must not count as newest."""
    save_steps(tmp_path, 100, 200, 300)
    newest = checkpoints(tmp_path)[0]
    newest.write_bytes(newest.read_bytes()[:-1])
    with pytest.warns(UserWarning, match=r"step-000000000300.safetensors is not a whole.*trying the one before it"):
        path, tensors, metadata = read_newest(tmp_path)
    assert (steps_of([path]), tensors["steps"].item(), metadata) == ([200], 200, {"num_steps": 200})
    save_steps(tmp_path, 250, keep=keep)
    assert read_newest(tmp_path)[2]["num_steps"] == 250
    assert steps_of(checkpoints(tmp_path)) == [250, 200][:keep]
    assert newest.with_suffix(".passed-over").exists()


def test_no_whole_checkpoint_is_said(tmp_path):
    with pytest.raises(RunError, match="has no checkpoint yet: `dualhead resume`"):
        read_newest(tmp_path)
    save_steps(tmp_path, 1)
    checkpoints(tmp_path)[0].write_bytes(b"")
    with pytest.warns(UserWarning, match="not a whole"), pytest.raises(RunError, match="holds no whole checkpoint"):
        read_newest(tmp_path)


def test_the_best_is_kept_apart(tmp_path):
    save_steps(tmp_path, 1)
    with pytest.raises(RunError, match="holds no best checkpoint"):
        read_best(tmp_path)
    scores = {1: -3.0, 2: -5.0, 3: 2.5, 4: 2.5, 5: float("nan"), 6: 1}
    saved = {
        steps: save_best(tmp_path, {"steps": torch.tensor(steps)}, {"num_steps": steps}, score=score)
        for steps, score in scores.items()
    }
    assert saved == {1: True, 2: False, 3: True, 4: False, 5: False, 6: False}
    save_steps(tmp_path, 7, 8, 9, keep=1)
    path, tensors, metadata = read_best(tmp_path)
    assert path == tmp_path / "checkpoints" / "best.safetensors"
    assert (tensors["steps"].item(), metadata) == (3, {"num_steps": 3, "score": 2.5})
    assert steps_of(checkpoints(tmp_path)) == [9]


def test_a_broken_best_is_said_and_replaced(tmp_path):
    save_steps(tmp_path, 1)
    save_best(tmp_path, TENSORS, METADATA, score=9.0)
    path = read_best(tmp_path)[0]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(RunError, match=r"best.safetensors is not a whole"):
        read_best(tmp_path)
    with pytest.warns(UserWarning, match="replacing it"):
        assert save_best(tmp_path, TENSORS, METADATA, score=1.0)
    assert read_best(tmp_path)[2]["score"] == 1.0
    write_tensors(path, TENSORS, {**METADATA, "score": "much"})
    with pytest.raises(RunError, match="says no score: 'much'"):
        read_best(tmp_path)


# Killed processes, full disks, second processes.


def fork():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer Pythons warn of forking beside threads; the child computes nothing
        return os.fork()


def in_child(work):
    """Runs `work` in a forked process and gives the signal that ended it, or 0."""
    child = fork()
    if child == 0:
        signal.alarm(int(PATIENCE))
        try:
            work()
        finally:
            os._exit(0)
    return os.WTERMSIG(os.waitpid(child, 0)[1])


def test_a_kill_at_any_moment_leaves_the_checkpoint_before_or_the_new_one(tmp_path):
    """The process kills itself at the k-th line of the writing code, for every k until it gets through."""
    save_steps(tmp_path, 100, 200)
    seen, leftovers = [], 0
    for k in range(1, 1000):

        def work(k=k):
            lines = 0

            def trace(frame, event, _):
                nonlocal lines
                if frame.f_code.co_filename.endswith(("storage.py", "checkpoint.py")) and event == "line":
                    lines += 1
                    if lines == k:
                        os.kill(os.getpid(), signal.SIGKILL)
                return trace

            sys.settrace(trace)
            save_steps(tmp_path, 300)

        killed = in_child(work) == signal.SIGKILL
        leftovers += bool(list(tmp_path.rglob(".*.tmp")))
        seen.append(read_newest(tmp_path)[2]["num_steps"])
        with locked(tmp_path):
            assert not list(tmp_path.rglob(".*.tmp"))
        if not killed:
            break
        save_steps(tmp_path, 100, 200)
        for path in tmp_path.glob("checkpoints/*300*"):
            path.unlink()
    assert leftovers > 2
    assert seen == sorted(seen)
    assert seen.count(200) > 10
    assert seen.count(300) > 5


def test_a_disk_without_room_leaves_what_was_there(tmp_path):
    save_steps(tmp_path, 100, 200)
    save_best(tmp_path, TENSORS, METADATA, score=1.0)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    large = {"large": torch.zeros(100_000)}
    with files_of_at_most(100_000):
        with pytest.raises(RunError, match=r"cannot write checkpoint .*-0*300.*large"):
            save_checkpoint(tmp_path, large, {"num_steps": 300}, keep=2)
        with pytest.raises(RunError, match=r"cannot write checkpoint .*best.*large"):
            save_best(tmp_path, large, {"num_steps": 300}, score=2.0)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


HOLDER = """
import sys
from dualhead.running.checkpoint import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path):
    with started([sys.executable, "-c", HOLDER, str(tmp_path)], stdin=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == "held\n"
        said = rf"is being written by process {holder.pid} on {socket.gethostname()}: wait"
        with pytest.raises(RunError, match=said), locked(tmp_path):
            pass
        with pytest.raises(RunError, match=said):
            new_run_dir(RunConfig(env="CartPole-v1", run_dir=str(tmp_path)))
        assert not (tmp_path / "config.json").exists()
    with locked(tmp_path):
        assert (tmp_path / ".lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"
        with pytest.raises(RunError, match=f"process {os.getpid()} on"), locked(tmp_path):
            pass
    with locked(tmp_path):
        pass


def test_a_forked_child_does_not_hold_the_lock_on(tmp_path):
    """Environments in processes of their own outlive a killed parent for a while."""
    begun, over = os.pipe(), os.pipe()
    with locked(tmp_path):
        child = fork()
        if child == 0:
            os.close(over[1])
            os.write(begun[1], b"!")
            os.read(over[0], 1)  # until the parent closes it, or ends
            os._exit(0)
        os.read(begun[0], 1)
    try:
        with locked(tmp_path):
            pass
    finally:
        for end in (*begun, *over):
            os.close(end)
        os.waitpid(child, 0)


def test_where_nothing_can_be_locked_a_warning_says_so(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with pytest.warns(UserWarning, match=r"cannot be locked \(No locks available\)"), locked(tmp_path):
        pass
    with pytest.raises(RunError, match="cannot write the run directory"), locked(tmp_path / "nowhere"):
        pass


def test_two_runs_that_begin_at_once_get_a_directory_each(tmp_path, monkeypatch):
    """The second looks before the first has written its configuration, and finds it once it holds the lock."""
    monkeypatch.chdir(tmp_path)
    config = RunConfig(env="CartPole-v1")
    first = new_run_dir(config)
    real = os.path.exists
    looks = []

    def exists(path):
        looks.append(path)
        return len(looks) > 1 and real(path)

    monkeypatch.setattr("pathlib.Path.exists", lambda path: exists(str(path)))
    second = new_run_dir(config.model_copy(update={"total_steps": 99_999}))
    assert (first.name, second.name) == ("lstm-seed0", "lstm-seed0-2")
    assert json.loads((first / "config.json").read_text())["total_steps"] == 100_000
    assert json.loads((second / "config.json").read_text())["total_steps"] == 99_999


# A thousand broken files.

B = 2


def make_agent(memory, *, seed=0):
    small = {"rollout_length": 4, "sequence_length": 2, "batch_size": 4, "num_epochs": 1, "burn_in": 2}
    small |= {"num_streams": B, "hidden_size": 4, "encoder_sizes": (4,), "dtype": torch.float32}
    scaled = {"normalize_observations": True, "normalize_rewards": True, "norms": NormConfig(resources=("A", "B"))}
    return agents.make_agent(memory, seed=seed, **small, **scaled)


def play(agent, num_steps, *, seed=0):
    rng = np.random.default_rng(seed)
    for _ in range(num_steps):
        agent.act(rng.normal(size=(B, 3)))
        events = NormEvents(*rng.random((2, B, 2)) < 0.5)
        agent.record(rng.normal(size=B), rng.random(B) < 0.2, np.zeros(B, dtype=bool), events=events)
        if agent.rollout_is_ready:
            agent.learn(rng.normal(size=(B, 3)))
    return agent


def digest(agent):
    tensors, metadata = agent.state()
    everything = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        everything.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        everything.update(tensors[name].numpy().tobytes())
    return everything.digest()


def truncations(contents, rng):
    size = 8 + struct.unpack("<Q", contents[:8])[0]
    header, _ = split(contents)
    ends = {size + part["data_offsets"][1] for name, part in header.items() if name != "__metadata__"}
    places = {*range(17), size - 1, size, size + 1, *(end + by for end in ends for by in (-1, 0)), len(contents) - 1}
    places |= {rng.randrange(len(contents)) for _ in range(60)}
    yield from (contents[:place] for place in sorted(places - {len(contents)}))
    yield from (contents + more for more in (b"\0", b"\0" * 8, contents))


def flips(contents, rng):
    size = 8 + struct.unpack("<Q", contents[:8])[0]
    for place in [*range(16), *range(16, size, 37), *rng.sample(range(size, len(contents)), 150)]:
        broken = bytearray(contents)
        broken[place] ^= 1 << rng.randrange(8)
        yield bytes(broken)
    for place in rng.sample(range(len(contents) - 512), 20):  # blocks that never reached the disk
        if any(contents[place : place + 512]):
            yield contents[:place] + bytes(512) + contents[place + 512 :]


def splices(contents, other, rng):
    """The beginning of one file and the end of another, as a disk that lost a rename might give them back."""
    size = 8 + struct.unpack("<Q", contents[:8])[0]
    for place in [8, size, *rng.sample(range(size, min(len(contents), len(other)) - 600), 30)]:
        both = contents[:place] + other[place:], other[:place] + contents[place:]
        yield from (mixed for mixed in both if mixed not in (contents, other))


def header_lies(contents):
    size = struct.unpack("<Q", contents[:8])[0]
    for lie in (0, 1, size - 8, size - 1, size + 1, size + 8, len(contents), 10**8, 2**32, 2**63, 2**64 - 1):
        yield struct.pack("<Q", lie) + contents[8:]


def foreign(rng):
    packed, pickled = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("weights", b"x" * 100)
    torch.save({"weight": torch.ones(3)}, pickled)
    yield from (b"", b"\0" * 5000, b"{}", b"\x89PNG\r\n\x1a\n" + rng.randbytes(500), packed.getvalue())
    yield from (pickle.dumps({"weight": [1.0]}), pickled.getvalue(), rng.randbytes(10_000), b"steps,loss\n1,2\n")
    yield from (save({"weight": torch.ones(3)}), save({}, {"format": "pt"}))
    yield save({"x": torch.ones(1)}, {"checksum": "0"})


def other_entries(contents):
    """Missing, renamed and additional tensors, other shapes and other types, each with a right checksum."""
    header, _ = split(contents)
    metadata = header["__metadata__"]
    tensors = {name: tensor.clone() for name, tensor in load(contents).items()}

    def changed(**changes):
        return reseal(
            save({name: value for name, value in {**tensors, **changes}.items() if value is not None}, metadata)
        )

    yield changed(more=torch.ones(3))
    for name, tensor in tensors.items():
        other_type = tensor.double() if tensor.dtype == torch.float32 else tensor.float()
        wrong = [None, tensor[None], other_type]
        if tensor.dtype == torch.float32:
            wrong.append(tensor.view(torch.int32))
        if tensor.dim() == 2 and tensor.shape[0] != tensor.shape[1]:
            wrong.append(tensor.T.contiguous())
        yield from (changed(**{name: value}) for value in wrong)
        yield changed(**{name: None, f"{name}_": tensor})
    for name in ("rng/sampling", "rng/shuffling"):
        yield changed(**{name: torch.zeros_like(tensors[name])})


CONFUSIONS = (None, True, -1, 10**30, 1.5, float("nan"), "7", [], {}, [1], [1, 2, 3], [[]], {"a": {}})


def other_metadata(contents):
    header, data = split(contents)
    said = header["__metadata__"]
    metadata = json.loads(said["json"])

    def with_json(text):
        return sealed({**header, "__metadata__": {**said, "json": text}}, data)

    def may_be(name, value):
        """Any count of steps may be, and a checkpoint from another device is taken with this one's generator."""
        return value == {"num_steps": 10**30, "num_updates": 10**30, "num_skipped": 10**30, "device": "7"}.get(
            name, ...
        )

    confused = [{**metadata, name: v} for name in metadata for v in CONFUSIONS if not may_be(name, v)]
    confused += [{key: value for key, value in metadata.items() if key != name} for name in metadata]
    for rollout in ([-1, 0], [0, -1], [5, 0], [0, 3], [0.0, 0], [True, 0], ["1", 0], [None, None], [0, 0, 0]):
        confused.append({**metadata, "rollout": rollout})
    for name in ("rollout_length", "burn_in", "normalize_observations", "normalize_rewards"):
        for value in (*CONFUSIONS[2:], None, not metadata["config"][name]):
            confused.append({**metadata, "config": {**metadata["config"], name: value}})
    yield from (with_json(json.dumps(entries)) for entries in confused if entries != metadata)
    yield from map(with_json, ("", "{", "[]", "null", "7", '"text"', "[" * 200_000, "9" * 10_000, said["json"][:-1]))
    versions = (str(VERSION - 1), str(VERSION + 1), "one", "")
    for name, value in (("format", "pt"), *(("version", version) for version in versions)):
        yield sealed({**header, "__metadata__": {**said, name: value}}, data)
    for name in said:
        short = {**header, "__metadata__": {key: value for key, value in said.items() if key != name}}
        yield joined(short, data) if name == "checksum" else sealed(short, data)
    yield contents.replace(said["checksum"].encode(), said["checksum"].upper().encode())


def header_confusions(contents):
    """Descriptions of a tensor that cannot be, each with a right checksum: sizes that would fill any memory too."""
    header, data = split(contents)
    name = "policy/critic.weight"
    ours = header[name]
    begin, end = ours["data_offsets"]
    shapes = ([2**40], [2**62, 2**62], [2**64], [-1, -4], [1.5], [], None, [0, 2**60])
    places = [[begin, 2**62], [2**62, 2**62 + end - begin], [begin + 4, end + 4], [begin - 4, end - 4], [end, begin]]
    changes = [{"shape": shape} for shape in shapes]
    changes += [{"dtype": dtype} for dtype in ("F64", "F128", "O", 4, "F8_E8M0")]
    changes += [{"data_offsets": offsets} for offsets in (*places, [-1, 3], [0], "here")]
    yield from (sealed({**header, name: {**ours, **change}}, data) for change in changes)
    yield from (sealed({**header, name: value}, data) for value in (None, [], "text", 3, {}))
    yield from (sealed(header, data[:-4]), sealed(header, data + bytes(4)))
    yield sealed({**header, "nothing": {"shape": [0], "dtype": "F32", "data_offsets": [0, 0]}}, data)


@contextlib.contextmanager
def little_memory(more):
    """The system gives at most `more` bytes beyond what this process has."""
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def refusal(agent, path):
    try:
        agent.load(path)
    except CheckpointError as error:
        return str(error)
    return "loaded"


def test_no_broken_file_is_loaded_or_crashes(tmp_path):
    """Each is a CheckpointError that names the file, and the agent is to the bit what it was before."""
    rng, path = random.Random(0), tmp_path / "broken"
    counts = {}
    for memory in ("lstm", "gru"):
        play(make_agent(memory), 6).save(tmp_path / memory)
        play(make_agent(memory), 10).save(tmp_path / f"{memory}-later")
    for memory, elsewhere in (("lstm", "gru"), ("gru", "lstm")):
        contents = (tmp_path / memory).read_bytes()
        later, other = ((tmp_path / name).read_bytes() for name in (f"{memory}-later", elsewhere))
        agent = play(make_agent(memory, seed=9), 7, seed=9)
        before = digest(agent)
        kinds = {
            "truncated": truncations(contents, rng),
            "flipped": flips(contents, rng),
            "spliced": splices(contents, later, rng),
            "lying length": header_lies(contents),
            "foreign": foreign(rng),
            "other architecture": [other],
            "other entries": other_entries(contents),
            "other metadata": other_metadata(contents),
            "confused header": header_confusions(contents),
        }
        for kind, mutants in kinds.items():
            for number, mutant in enumerate(mutants):
                counts[kind] = counts.get(kind, 0) + 1
                assert mutant not in (contents, later)
                replace(path, mutant)
                with little_memory(2**32) if sys.platform == "linux" else contextlib.nullcontext():
                    assert str(path) in refusal(agent, path), (kind, number)
                assert digest(agent) == before, (kind, number)
    assert sum(counts.values()) >= 2000
    assert min(counts.values()) >= 2


def test_a_file_of_a_terabyte_is_refused_at_once(tmp_path):
    """Holes in a file take no room on the disk, and must take none in memory."""
    for beginning in (b"", struct.pack("<Q", 2**39), struct.pack("<Q", 10**6), b"\x89PNG\r\n\x1a\n"):
        with (tmp_path / "file").open("wb") as file:
            file.write(beginning)
            file.truncate(2**40)
        tracemalloc.start()
        with pytest.raises(CheckpointError, match="not a whole"):
            read_tensors(tmp_path / "file")
        assert tracemalloc.get_traced_memory()[1] < 2**27
        tracemalloc.stop()


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for a writer
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "nowhere"):
        with pytest.raises(CheckpointError, match=f"cannot read checkpoint {path}"):
            read_tensors(path)


def test_another_order_in_the_header_is_the_same_checkpoint(tmp_path):
    agent = play(make_agent("lstm"), 6)
    agent.save(tmp_path / "file")
    header, data = split((tmp_path / "file").read_bytes())
    replace(tmp_path / "other", sealed(dict(reversed(header.items())), data))
    loaded = make_agent("lstm", seed=9)
    loaded.load(tmp_path / "other")
    assert digest(loaded) == digest(agent)


def test_nothing_executable_is_loaded(tmp_path, monkeypatch):
    """Everything that could run what a file says is replaced by an error, and loading does not meet it."""
    run = tmp_path / "run"
    agent = play(make_agent("gru"), 6)
    (run / "checkpoints").mkdir(parents=True)
    save_checkpoint(run, *agent.state(), keep=2)
    save_best(run, *agent.state(), score=0.0)

    def explode(*_, **__):
        raise AssertionError("something executable would have been loaded")

    pickles = ("Unpickler", "loads", "load", "_Unpickler", "_loads")
    for name in ("torch.load", "torch.jit.load", *(f"pickle.{name}" for name in pickles)):
        monkeypatch.setattr(name, explode)
    newest, best, whole = read_newest(run), read_best(run), make_agent("gru", seed=9)
    whole.load(newest[0])
    monkeypatch.undo()
    assert digest(whole) == digest(agent)
    whole = make_agent("gru", seed=9)
    whole.restore(*best[1:])
    assert digest(whole) == digest(agent)
