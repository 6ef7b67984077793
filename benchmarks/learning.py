"""Train one environment with several memories and seeds, and say what each run's evaluation gave.

    python benchmarks/learning.py dualhead/CartPoleNoVel-v1 --memories lstm gru none --seeds 10

Runs are `dualhead train` processes with one thread each, as many side by side as there are cores. Everything after
`--` goes to `dualhead train`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np


def run(env: str, memory: str, seed: int, out: Path, options: list[str]) -> dict:
    """One training; its summary, or the error it ended with."""
    run_dir = out / f"{memory}-seed{seed}"
    command = [sys.executable, "-m", "dualhead", "train", env, "--memory", memory, "--seed", str(seed)]
    command += ["--run-dir", str(run_dir), "--num-threads", "1", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        return {"memory": memory, "seed": seed, "error": done.stderr.strip().splitlines()[-1]}
    return json.loads((run_dir / "summary.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("env")
    parser.add_argument("--memories", nargs="+", default=["lstm"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, help="keep the runs here; default: a temporary folder")
    words = sys.argv[1:]
    cut = words.index("--") if "--" in words else len(words)
    args, options = parser.parse_args(words[:cut]), words[cut + 1 :]

    out = args.out or Path(tempfile.mkdtemp(prefix="dualhead-learning-"))
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    jobs = [(memory, seed) for memory in args.memories for seed in seeds]
    with ThreadPoolExecutor(args.jobs) as pool:
        summaries = list(pool.map(lambda job: run(args.env, *job, out, options), jobs))
    print(f"{args.env}, seeds {seeds.start}..{seeds.stop - 1}, options {' '.join(options) or '(tuned)'}")
    for memory in args.memories:
        of_memory = [s for s in summaries if s["memory"] == memory]
        returns = [s["evaluation"]["mean_return"] for s in of_memory if "evaluation" in s]
        speed = np.median([s["steps_per_s"] for s in of_memory if "evaluation" in s] or [np.nan])
        listed = " ".join(f"{value:.3f}" for value in returns)
        print(
            f"{memory:>5}: min {min(returns, default=np.nan):.3f} mean {np.mean(returns):.3f} "
            f"({speed:,.0f} steps/s each): {listed}"
        )
        for failed in (s for s in of_memory if "error" in s):
            print(f"       seed {failed['seed']}: {failed['error']}")


if __name__ == "__main__":
    main()
