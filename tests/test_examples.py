"""Every example runs, and every command and Python snippet of the README and the docs, in the order of the page."""

import importlib.util
import os
import re
import sys
from pathlib import Path

import pytest
from processes import run_process

from dualhead.studies.study import study_text

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
WITH_COMMANDS = ("README.md", "docs/own_environments.md")
ARGUMENTS = {"01_memory.py": ["--total-steps", "2048", "--out", "demo"]}
NEEDS = {"11_sorrel.py": "sorrel"}
"""What an example imports that our tests do not install on every Python."""


@pytest.mark.slow
@pytest.mark.parametrize("example", sorted(path.name for path in (ROOT / "examples").glob("*.py")))
def test_example_runs(tmp_path, example):
    if example in NEEDS and importlib.util.find_spec(NEEDS[example]) is None:
        pytest.skip(f"{NEEDS[example]} is not installed")
    command = [sys.executable, str(ROOT / "examples" / example), *ARGUMENTS.get(example, [])]
    done = run_process(command, cwd=tmp_path, env=os.environ | {"PYTHONWARNINGS": "default", "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


STEPS = "4096"
"""Stands in for every `total_steps` of a page."""


def shrunk(command, folder):
    """The same command with fewer steps and episodes; a study with one seed of them."""
    if command.startswith("dualhead train"):
        command = re.sub(r" --total-steps \d+", "", command) + f" --total-steps {STEPS} --eval-episodes 2"
        command = re.sub(r" --eval-every \d+", " --eval-every 2048", command)
    elif command.startswith("dualhead resume"):
        command = re.sub(r"--total-steps \d+", f"--total-steps {2 * int(STEPS)}", command)
    elif command.startswith("dualhead study") and "--copy" not in command:
        name = command.split()[2]
        text = re.sub(r"(?m)^seeds = .*", "seeds = [0]", study_text(name))
        text = re.sub(r"total_steps = [\d_]+", "total_steps = 16_000", text)  # of the norms: 100 turns
        text = re.sub(r"num_turns = \d+", "num_turns = 40", text)
        (folder / f"{name}.toml").write_text(re.sub(r"first_turn = \d+", "first_turn = 40", text))
        command = command.replace(f"study {name}", f"study {name}.toml")
    return command


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_says_runs_from_top_to_bottom(tmp_path, page):
    """Python in fences and commands in indented blocks; one process each, all in one directory.

    A fence that begins with the name of a file is also written to it.
    """
    text = (ROOT / page).read_text()
    pattern = r"^```python\n(.*?)^```$" + (r"|^    dualhead ([^\n]*?)(?: +#[^\n]*)?$" if page in WITH_COMMANDS else "")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    for match in re.finditer(pattern, text, flags=re.M | re.S):
        snippet = match[1]
        if snippet is None:
            command = shrunk(f"dualhead {match[2]}", tmp_path)
            called = ["bash", "-c", command.replace("dualhead", f"{sys.executable} -m dualhead", 1)]
        else:
            snippet = re.sub(r"\b(total_steps\s*=\s*)[\d_]+", rf"\g<1>{STEPS}", snippet)
            called = [sys.executable, "-c", snippet]
            if name := re.match(r"# (\w+\.py)\n", snippet):
                (tmp_path / name[1]).write_text(snippet)
        done = run_process(called, cwd=tmp_path, env=environment)
        assert done.returncode == 0, f"{match[0]}\n{done.stderr}"


def test_examples_are_short():
    for path in (ROOT / "examples").glob("*.py"):
        assert len(path.read_text().splitlines()) < 60, path.name
