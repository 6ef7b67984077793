"""Every example runs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ARGUMENTS = {"01_memory.py": ["--total-steps", "2048", "--out", "demo"]}


@pytest.mark.slow
@pytest.mark.parametrize("example", sorted(path.name for path in (ROOT / "examples").glob("*.py")))
def test_example_runs(tmp_path, example):
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / example), *ARGUMENTS.get(example, [])],
        cwd=tmp_path,
        env=os.environ | {"PYTHONWARNINGS": "default", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_examples_are_short():
    for path in (ROOT / "examples").glob("*.py"):
        assert len(path.read_text().splitlines()) < 60, path.name
