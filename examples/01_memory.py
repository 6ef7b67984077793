"""Balance a pole without observing velocities: an LSTM can, a memoryless control cannot.

Usage: python examples/01_memory.py [--total-steps N] [--out DIR]
"""

import argparse
import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

import dualhead

ENV = "dualhead/CartPoleNoVel-v1"

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--total-steps", type=int, default=50_000)
parser.add_argument("--out", type=Path, default=Path("runs/demo"))
args = parser.parse_args()

number = 1 + sum(1 for _ in args.out.glob("try-*"))
out = args.out / f"try-{number}"
figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
scores = {}
for memory in ("lstm", "none"):
    print(f"\n{ENV}, memory {memory}: {args.total_steps:,} steps")
    settings = {"total_steps": args.total_steps, "network": {"memory": memory}, "run_dir": str(out / memory)}
    summary = dualhead.train(ENV, preset="tuned", **settings).summary
    if summary["stopped_early"]:
        raise SystemExit(f"stopped; checkpoint: {summary['checkpoint']}")
    scores[memory] = summary["evaluation"]
    with (out / memory / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    axes.plot([int(r["steps"]) for r in rows], [float(r["episode/mean_return"]) for r in rows], label=memory)
axes.set(xlabel="environment steps", ylabel="mean return of the last 100 episodes", title=ENV)
axes.legend(title="memory")
figure.savefig(out / "curves.png", dpi=120)

print("\nmemory   mean return of 20 episodes (the maximum is 500)")
for memory, score in scores.items():
    print(f"{memory:>6}   {score['mean_return']:.1f} ± {score['std_return']:.1f}")
print(f"\ncurves: {out / 'curves.png'}\nruns:   {out}\nplay again: .venv/bin/dualhead eval {out / 'lstm'}")
