"""Files that a stranger has crafted, with right checksums: each is refused by an error of ours, or is what it says.

    python benchmarks/crafted_files.py --count 4000

Every file is a whole run directory in which one thing differs from what a run wrote: a part of a checkpoint (header,
metadata, tensors), of `config.json`, `summary.json` or `metrics.csv`. It is read as `dualhead resume`, `eval`,
`load_policy` and `report` read it, in one process whose memory is limited.

A file that is not refused must be what it says: what was loaded from it, written again, gives its contents.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

import dualhead
from dualhead import CheckpointError, DualHeadRecurrentPPO, RunError, SettingsError
from dualhead.config import NetworkConfig, PPOConfig, TurnoverConfig
from dualhead.errors import UnavailableEnvironment
from dualhead.running.checkpoint import checkpoints, read_config, use_newest
from dualhead.running.evaluation import evaluate
from dualhead.running.report import group_runs, render
from dualhead.running.results import read_run
from dualhead.running.session import Session
from dualhead.running.trainer import _newest_unfinished, train
from dualhead.storage import write_bytes
from dualhead.worlds.commons.config import CommonsConfig

OURS = (CheckpointError, RunError, SettingsError, UnavailableEnvironment)
LONGEST = 2.0
"""Seconds of the processor that a file may cost."""
MORE_MEMORY = 1_000_000_000
"""Bytes of address space that the process may take beyond what it has before a file is read."""
_NESTED: Any = 0
for _ in range(300):
    _NESTED = [_NESTED]
POISON: list[Any] = [
    *(None, True, "x", "7", "", -1, 0, 3, 2**31, 2**53, 2**63, 2**64, 10**12, 10**30, 10**400, 1.5, 1e308),
    *(
        float("inf"),
        float("-inf"),
        float("nan"),
        [],
        {},
        [1],
        {"x": 1},
        _NESTED,
        "A" * 50_000,
        [0] * 20_000,
        "a\0b/../c",
    ),
]
DTYPES = ("BOOL", "U8", "I8", "I64", "F16", "BF16", "F32", "F64", "F8_E4M3", "X", 7, None)
SHAPES: list[Any] = [[], [0], [-1], [10**12], [2**62, 4], [1.5], ["1"], None, "1", [1] * 70, [10**30]]


class Case(NamedTuple):
    """Fields:
    name: what differs.
    file: of the run directory.
    contents: what it holds instead.
    """

    name: str
    file: str
    contents: bytes


def split(contents: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    size = struct.unpack("<Q", contents[:8])[0]
    return json.loads(contents[8 : 8 + size]), contents[8 + size :]


def sealed(header: Any, data: bytes) -> bytes:
    """A file with the checksum that belongs to it."""
    text = json.dumps(header, separators=(",", ":")).encode()
    contents = struct.pack("<Q", len(text)) + text + data
    begin = contents.find(b'"checksum":"') + 12
    if begin < 12 or len(contents) < begin + 64:
        return contents
    contents = contents[:begin] + b"0" * 64 + contents[begin + 64 :]
    return contents[:begin] + hashlib.sha256(contents).hexdigest().encode() + contents[begin + 64 :]


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to everything inside nested JSON; of a long list its ends alone."""
    if path:
        yield path
    keys = list(tree) if isinstance(tree, dict) else list(range(len(tree))) if isinstance(tree, list) else []
    for key in keys if isinstance(tree, dict) or len(keys) < 12 else [0, 1, keys[-1]]:
        yield from places(tree[key], (*path, key))


def changed(tree: Any, path: tuple[Any, ...], change: Callable[[Any, Any], None]) -> Any:
    """A copy in which `change(parent, key)` was done at a path."""
    tree = copy.deepcopy(tree)
    parent = tree
    for key in path[:-1]:
        parent = parent[key]
    change(parent, path[-1])
    return tree


def json_cases(tree: Any, rng: random.Random) -> Iterator[tuple[str, Any]]:
    """Nested JSON with one part of another type, range, length or name, without it, or with one more."""
    paths = list(places(tree))
    while True:
        path = rng.choice(paths)
        where = ".".join(map(str, path))
        kind = rng.choice(("poison", "poison", "poison", "drop", "rename", "add", "longer", "shorter"))
        value = rng.choice(POISON)

        def change(parent: Any, key: Any, *, kind: str = kind, value: Any = value) -> None:
            own = parent[key]
            if kind == "drop":
                del parent[key]
            elif kind == "rename" and isinstance(parent, dict):
                parent[f"{key}_"] = parent.pop(key)
            elif kind == "add" and isinstance(own, dict):
                own["another"] = value
            elif kind == "longer" and isinstance(own, list):
                parent[key] = own * rng.choice((2, 50)) + [0]
            elif kind == "shorter" and isinstance(own, list):
                parent[key] = own[:-1]
            else:
                parent[key] = value

        yield f"{kind} {where} {value!r:.30}", changed(tree, path, change)


def checkpoint_cases(file: str, contents: bytes, rng: random.Random) -> Iterator[Case]:
    """A checkpoint with another header, other metadata, or other numbers."""
    header, data = split(contents)
    names = [name for name in header if name != "__metadata__"]
    metadata = json.loads(header["__metadata__"]["json"])
    metadata_cases = json_cases(metadata, rng)
    while True:
        where = rng.choice(("metadata",) * 6 + ("dtype", "shape", "offsets", "name", "drop", "said", "data", "data"))
        if where == "metadata":
            what, tree = next(metadata_cases)
            try:
                text = json.dumps(tree)
            except ValueError:
                continue
            header_ = copy.deepcopy(header)
            header_["__metadata__"]["json"] = text
            yield Case(f"metadata: {what}", file, sealed(header_, data))
            continue
        name = rng.choice(names)
        header_, entry = copy.deepcopy(header), None
        entry = header_[name]
        begin, end = entry["data_offsets"]
        own = data
        if where == "dtype":
            entry["dtype"] = value = rng.choice([one for one in DTYPES if one != entry["dtype"]])
        elif where == "shape":
            entry["shape"] = value = rng.choice([*SHAPES, entry["shape"][::-1] + [1]])
        elif where == "offsets":
            lies = [
                [end, begin],
                [begin, end + 8],
                [0, 10**15],
                [-1, end],
                [begin],
                "x",
                None,
                [begin, 10**40],
                [1.5, 2],
            ]
            entry["data_offsets"] = value = rng.choice(lies)
        elif where == "name":
            value = rng.choice(
                ("policy/x", "../x", "", "__metadata", "run/streams/actions/0", "A" * 10_000, f"{name}_")
            )
            header_[value] = header_.pop(name)
        elif where == "drop":
            value = header_.pop(name)
        elif where == "said":
            key, value = rng.choice(["format", "version", "json", "checksum"]), rng.choice([*POISON, "[" * 100_000])
            header_["__metadata__"][key] = value
        else:
            size = end - begin
            value = rng.choice(("00", "ff", "7f", "0000c07f", "random"))  # the last but one: NaN
            filled = rng.randbytes(size) or b"x" if value == "random" else bytes.fromhex(value)
            own = data[:begin] + (filled * (size // len(filled) + 1))[:size] + data[end:]
        yield Case(f"{where} {name} {value!r:.30}", file, sealed(header_, own))


def text_cases(run: Path, rng: random.Random) -> Iterator[Case]:
    """Other settings, summaries and metrics."""
    trees = {name: json.loads((run / name).read_text()) for name in ("config.json", "summary.json")}
    cases = {name: json_cases(tree, rng) for name, tree in trees.items()}
    metrics = (run / "metrics.csv").read_text()
    cells = ["9" * 5000, "-1", "nan", "1e999", "x" * 200_000, "", "\0", "\u0663", str(2**63), "=1+1", '"', "<script>"]
    odd = [b"\xff\xfe", b"", b"[" * 100_000, b"{}", b"null", b"\0" * 1000, b'{"env": "\xff"}', b'{"a":' * 50_000, b"7"]
    while True:
        name = rng.choice(("config.json", "config.json", "summary.json", "metrics.csv", "odd"))
        if name == "odd":
            name = rng.choice(("config.json", "summary.json", "metrics.csv", "evaluations.csv"))
            yield Case(f"{name}: odd", name, rng.choice(odd))
        elif name == "metrics.csv":
            rows = [line.split(",") for line in metrics.splitlines()]
            row = rng.choice(rows)
            row[rng.choice((0, rng.randrange(len(row))))] = cell = rng.choice(cells)
            text = "\n".join(",".join(row) for row in rows) + "\n"
            yield Case(f"metrics.csv: {cell:.20}", name, text.encode())
        else:
            what, tree = next(cases[name])
            yield Case(f"{name}: {what}", name, json.dumps(tree).encode())


# Reading, as commands do.


def read(run: Path, session: Session, *, whole: bool) -> None:
    """Reads a run as resume, load_policy and report do; `whole`: also as eval does."""
    problems: list[Exception] = []

    def attempt(what: Callable[[], Any]) -> Any:
        try:
            return what()
        except OURS as error:
            problems.append(error)
            return None

    def resume() -> None:
        config = read_config(run).model_copy(update={"total_steps": 10**6})
        newest = _newest_unfinished(run, config)
        assert newest is not None

        def restore(path: Path, tensors: Any, metadata: Any) -> None:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                session.restore(tensors, metadata, source=str(path))
            if not any("begin again" in str(warning.message) for warning in said):
                expect_same(session.state(), (tensors, metadata))

        use_newest(run, restore, first=newest)

    def load_agent() -> None:
        agent = DualHeadRecurrentPPO.from_file(checkpoints(run)[0])
        agent.state()

    for what in (resume, lambda: dualhead.load_policy(run), *([load_agent] if run.name == "one" else [])):
        attempt(what)
    if whole:
        attempt(lambda: evaluate(run, episodes=1))
    found = attempt(lambda: read_run(run))
    if found is not None and whole:
        attempt(lambda: render(group_runs([found]), []))
    if problems:
        raise problems[0]


class Silent(AssertionError):
    """A file was loaded as something that it does not say."""


_FREE = ("config", "norms", "device", "foreign_parts", "score")
"""Entries of a learner that may differ between a file and who loads it (`config`: where no tensor depends on it)."""


def expect_same(loaded: Any, said: Any) -> None:
    """Raises Silent where what was loaded, written again, differs from the file."""
    (tensors, metadata), (their_tensors, theirs) = loaded, said
    if tensors.keys() != their_tensors.keys():
        raise Silent(f"tensors {sorted(tensors.keys() ^ their_tensors.keys())[:3]}")
    for name, tensor in tensors.items():
        same = torch.equal(
            tensor.contiguous().view(-1).view(torch.uint8), their_tensors[name].view(-1).view(torch.uint8)
        )
        if not same and not name.startswith("run/streams"):
            raise Silent(f"tensor {name}")
    ours, theirs = (json.loads(json.dumps(of), parse_int=float) for of in (metadata, theirs))
    for each in (ours, theirs, *ours.get("learners", []), *theirs.get("learners", [])):
        for name in _FREE:
            each.pop(name, None)
        each.get("run", {}).pop("next_evaluation", None)
        if each.get("run", {}).get("streams"):
            each["run"]["streams"].pop("randomness", None)
    if json.dumps(ours, sort_keys=True) != json.dumps(theirs, sort_keys=True):
        names = [
            name for name in ours.keys() | theirs.keys() if json.dumps(ours.get(name)) != json.dumps(theirs.get(name))
        ]
        raise Silent(f"metadata {names[:3]}")


def make_runs(folder: Path) -> list[Path]:
    """Short runs: one agent, and independent ones with norms and newcomers."""
    small = {"network": NetworkConfig(hidden_size=4, encoder_sizes=(4,), previous_reward=True), "show_progress": False}
    ppo = PPOConfig(rollout_length=8, batch_size=8, num_epochs=1, burn_in=2)
    often = {"checkpoint_every": 20, "num_envs": 2, "ppo": ppo, "eval_episodes": 2}
    train("CartPole-v1", run_dir=str(folder / "one"), total_steps=40, **often, **small)
    world = CommonsConfig(num_agents=3, patch_size=5, window_radius=1, initial_resources=2, epoch_turns=10)
    newcomers = TurnoverConfig(first_turn=8, every_turns=8)
    many = {"policies": "independent", "enforce_norms": True, "world": world, "turnover": newcomers}
    train("commons", run_dir=str(folder / "many"), total_steps=120, **often, **small, **many)
    return [folder / "one", folder / "many"]


def main(count: int, *, seed: int = 0, verbose: bool = False, limited: bool = True) -> Counter[str]:
    """Crafts and reads `count` files; how many were refused or loaded, and what must not happen.

    `limited`: limits and measures the memory of this process meanwhile (Linux).
    """
    rng, outcomes, slowest, largest = random.Random(seed), Counter[str](), (0.0, ""), (0, "")
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        runs = make_runs(Path(name))
        sources: list[tuple[Path, Session, list[Iterator[Case]]]] = []
        for run in runs:
            newest = checkpoints(run)[0]
            for other in checkpoints(run)[1:]:
                other.unlink()
            cases = [checkpoint_cases(f"checkpoints/{newest.name}", newest.read_bytes(), rng), text_cases(run, rng)]
            session = Session(read_config(run))
            session.begin()
            sources.append((run, session, cases))
            read(run, session, whole=run.name == "one")  # nothing was crafted yet
        before = resource.getrlimit(resource.RLIMIT_AS)
        hang = signal.signal(signal.SIGALRM, _hangs)
        try:
            for number in range(count):
                run, session, (of_checkpoint, of_text) = sources[number % 2]
                case = next(of_checkpoint if rng.random() < 0.8 else of_text)
                path, kept = run / case.file, run / "kept"
                had = path.exists()
                if had:
                    shutil.copyfile(path, kept)
                write_bytes(path, case.contents)
                if limited:
                    Path("/proc/self/clear_refs").write_text("5")  # the peak of memory counts from now on
                    memory = _memory()
                    resource.setrlimit(resource.RLIMIT_AS, (memory["VmSize"] + MORE_MEMORY, before[1]))
                signal.alarm(60)
                begun = time.process_time()
                try:
                    read(run, session, whole=run.name == "one" and not case.file.startswith("checkpoints"))
                    outcome = "loaded"
                except OURS:
                    outcome = "refused"
                except Silent as error:
                    outcome = f"SILENT {case.name}: {error}"
                except Exception as error:
                    outcome = f"TRACEBACK {case.name}: {error!r:.200}"
                    if verbose:
                        import traceback

                        traceback.print_exc()
                signal.alarm(0)
                if limited:
                    largest = max(largest, (_memory()["VmHWM"] - memory["VmRSS"], case.name))
                slowest = max(slowest, (time.process_time() - begun, case.name))
                if slowest[0] > LONGEST and slowest[1] == case.name:
                    outcome = f"SLOW {case.name}: {slowest[0]:.1f} s"
                outcomes[outcome] += 1
                if verbose and outcome == "loaded":
                    print("loaded", run.name, case.name)
                shutil.copyfile(kept, path) if had else path.unlink()
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, hang)
            resource.setrlimit(resource.RLIMIT_AS, before)
    print(f"{count} files: {outcomes['refused']} refused, {outcomes['loaded']} loaded as they say")
    print(f"slowest: {slowest[0]:.2f} s ({slowest[1]})")
    if limited:
        print(f"most memory while one was read: {largest[0] / 1e6:.0f} MB ({largest[1]})")
    for outcome, times in outcomes.items():
        if outcome not in ("refused", "loaded"):
            print(f"{times} x {outcome}")
    return outcomes


def _memory() -> dict[str, int]:
    """Bytes of this process, as Linux names them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return {name: 1024 * int(size.split()[0]) for name, size in (line.split(":") for line in lines if " kB" in line)}


def _hangs(*_: object) -> None:
    raise TimeoutError("it hangs")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verbose", action="store_true", help="name every file that was loaded; show tracebacks")
    chosen = parser.parse_args()
    sys.exit(bool(main(chosen.count, seed=chosen.seed, verbose=chosen.verbose).keys() - {"refused", "loaded"}))
