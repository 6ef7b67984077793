"""The README's figure: recall a cue after 20 steps of noise, with and without gradients through time and memory.

python benchmarks/recall_cue.py --seeds 5 --figure docs/recall_cue.png
"""

from __future__ import annotations

import argparse
import csv
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import gymnasium as gym
import matplotlib.pyplot as plt
import numpy as np
from learning import run

import dualhead.worlds.tasks  # noqa: F401  (registers dualhead/...)

ENV = "dualhead/RecallCue-v0"
CONDITIONS = {
    "LSTM, segments of 32": ("lstm", ["--sequence-length", "32"]),
    "GRU, segments of 32": ("gru", ["--sequence-length", "32"]),
    "LSTM, one-step slices": ("lstm", ["--sequence-length", "1"]),
    "no memory": ("none", ["--sequence-length", "32"]),
}


def curve(run_dir: Path) -> tuple[np.ndarray, np.ndarray]:
    """Environment steps and mean return of the last 100 episodes, per update."""
    with (run_dir / "metrics.csv").open() as file:
        rows = [(int(row["steps"]), float(row["episode/mean_return"])) for row in csv.DictReader(file)]
    steps, returns = zip(*rows)
    return np.array(steps), np.array(returns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--figure", type=Path, default=Path("docs/recall_cue.png"))
    args = parser.parse_args()

    out = Path(tempfile.mkdtemp(prefix="dualhead-recall-"))
    jobs = [(i, seed) for i in range(len(CONDITIONS)) for seed in range(args.seeds)]

    def train(job: tuple[int, int]) -> dict:
        memory, options = list(CONDITIONS.values())[job[0]]
        return run(ENV, memory, job[1], out / str(job[0]), options)

    with ThreadPoolExecutor(args.jobs) as pool:
        results = dict(zip(jobs, pool.map(train, jobs)))

    chance = gym.make(ENV).get_wrapper_attr("chance")
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for i, (name, (memory, _)) in enumerate(CONDITIONS.items()):
        returns = [results[i, seed]["evaluation"]["mean_return"] for seed in range(args.seeds)]
        print(f"{name:>22}: {' '.join(f'{value:.3f}' for value in returns)}")
        curves = [curve(out / str(i) / f"{memory}-seed{seed}") for seed in range(args.seeds)]
        steps, values = curves[0][0], np.stack([values for _, values in curves])
        (line,) = axes.plot(steps, values.mean(0), label=name)
        axes.fill_between(steps, values.min(0), values.max(0), color=line.get_color(), alpha=0.2, linewidth=0)
    axes.axhline(chance, color="grey", linestyle=":", label=f"chance without memory ({chance:.3f})")
    axes.set(
        xlabel="environment steps",
        ylabel="return (1 is all there is)",
        title=f"Recall a cue after 20 steps of noise: mean and range of {args.seeds} seeds",
        ylim=(0.2, 1.02),
    )
    axes.legend()
    figure.savefig(args.figure, dpi=130)
    print(f"figure: {args.figure}")


if __name__ == "__main__":
    main()
