"""Our defaults compared with sb3-contrib's, on the same tasks, at equal steps and at equal seconds.

    python benchmarks/untouched_sb3.py ENV --seed N --out benchmarks/results/untouched_sb3.csv    # one run, an hour
    dualhead study untouched                                                                      # ours, all runs
    python benchmarks/untouched.py speed --python PYTHON_WITH_SB3                                  # on a quiet machine
    python benchmarks/untouched.py table

`table` compares the mean return of 100 greedy evaluation episodes for every task with runs of both: at equal steps, and
ours at its last evaluation within the time that sb3-contrib needed. Times follow from the speeds that `speed` measured:
steps per second with one thread, alternating in rounds, medians.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import numpy as np

from dualhead.running.results import interval

RESULTS = Path(__file__).parent / "results"
THEIRS, OURS, SPEEDS = (f"untouched_{name}.csv" for name in ("sb3", "ours", "speed"))


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def with_interval(values: list[float]) -> str:
    """Mean ± half of the 95% t-interval."""
    if len(values) < 2:
        return f"{np.mean(values):.3f} (one seed)"
    low, high = interval(values)
    return f"{np.mean(values):.3f} ± {(high - low) / 2:.3f}"


def collect(study: Path, results: Path) -> None:
    """Writes every evaluation of the study's runs to one CSV file."""
    with (results / OURS).open("w", newline="") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(("env", "condition", "seed", "num_steps", "return_mean"))
        for path in sorted(study.glob("*/*/seed*/evaluations.csv")):
            env = json.loads((path.parent / "config.json").read_text())["env"]
            for row in rows_of(path):
                seed = path.parent.name.removeprefix("seed")
                out.writerow((env, path.parent.parent.name, seed, row["steps"], row["mean_return"]))
    print(f"wrote {results / OURS}")


def measure_speed(envs: list[str], python: str, rounds: int, results: Path) -> None:
    """Steps per second of both, alternating, one thread each; appends medians to the CSV file."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for env in envs:
        ours, theirs = [], []
        for number in range(rounds):
            with tempfile.TemporaryDirectory() as folder:
                run = f"{folder}/run"
                command = [sys.executable, "-m", "dualhead", "train", env, "--preset", "default", "--num-threads", "1"]
                command += ["--total-steps", "20480", "--eval-episodes", "0", "--seed", str(number), "--run-dir", run]
                subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
                ours.append(json.loads(Path(run, "summary.json").read_text())["steps_per_s"])
                script, out = str(Path(__file__).with_name("untouched_sb3.py")), f"{folder}/sb3.csv"
                command = [python, script, env, "--total-steps", "4096", "--seed", str(number), "--out", out]
                subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
                last = rows_of(Path(out))[-1]
                theirs.append(int(last["num_steps"]) / float(last["seconds"]))
        with (results / SPEEDS).open("a", newline="") as file:
            out_file = csv.writer(file, lineterminator="\n")
            if file.tell() == 0:
                out_file.writerow(("env", "rounds", "ours_steps_per_s", "sb3_steps_per_s"))
            row = (env, rounds, round(statistics.median(ours), 1), round(statistics.median(theirs), 1))
            out_file.writerow(row)
            print(*row)


def table(results: Path) -> None:
    theirs: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for row in rows_of(results / THEIRS):
        if row["kind"] == "greedy":
            theirs[row["env"]].append((int(row["num_steps"]), float(row["return_mean"])))
    ours: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows_of(results / OURS):
        ours[row["env"]][int(row["num_steps"])].append(float(row["return_mean"]))
    speeds = {row["env"]: row for row in rows_of(results / SPEEDS)} if (results / SPEEDS).exists() else {}
    print("| task | steps | sb3-contrib | ours | s: sb3-contrib | s: ours | ours in sb3-contrib's time |")
    print("|---|---|---|---|---|---|---|")
    for env, runs in theirs.items():
        if env not in ours:
            continue
        at = runs[0][0]
        equal = min(ours[env], key=lambda steps: abs(steps - at))
        cells = [env, f"{at:,}", with_interval([value for _, value in runs]), with_interval(ours[env][equal])]
        if env in speeds:
            rate, sb3_rate = (float(speeds[env][f"{who}_steps_per_s"]) for who in ("ours", "sb3"))
            seconds = at / sb3_rate
            within = [steps for steps in ours[env] if steps / rate <= seconds]
            cells += [f"{seconds:,.0f}", f"{equal / rate:,.0f}"]
            if within:
                last = max(within)
                cells.append(f"{with_interval(ours[env][last])} at {last:,} ({last / rate:,.0f} s)")
        print("| " + " | ".join([*cells, *["–"] * (7 - len(cells))]) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV files")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("table")
    of_study = commands.add_parser("collect", help="write the evaluations of our study's runs to the CSV file")
    of_study.add_argument("--study", type=Path, default=Path("runs/study-untouched"))
    speed = commands.add_parser("speed")
    speed.add_argument("envs", nargs="*", help="default: those that sb3-contrib has runs of")
    speed.add_argument("--python", default=sys.executable, help="an interpreter with sb3-contrib")
    speed.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    if args.command == "collect":
        collect(args.study, args.results)
    elif args.command == "speed":
        envs = args.envs or list(dict.fromkeys(row["env"] for row in rows_of(args.results / THEIRS)))
        measure_speed(envs, args.python, args.rounds, args.results)
    else:
        table(args.results)


if __name__ == "__main__":
    main()
