"""Steps/s and resident memory over a long run.

    python benchmarks/level.py
    python benchmarks/level.py --workload grid --total-steps 200000

Our trainer's own loop with its log files; what is measured here lies between its updates.
"""

from __future__ import annotations

import argparse
import statistics

import psutil
import torch
from workloads import WORKLOADS, Workload, time_ours

from dualhead.running.machine import keep_freed_memory


def measure(workload: Workload, *, total_steps: int, parts: int) -> list[tuple[int, float, float]]:
    """Of each part of a run: steps up to its end, steps/s (median over its updates), and MiB resident at its end."""
    resident: list[float] = []
    process = psutil.Process()
    timings = time_ours(
        workload,
        num_updates=total_steps // workload.num_steps,
        between=lambda: resident.append(process.memory_info().rss / 2**20),
    )
    ends = [len(timings) * (part + 1) // parts for part in range(parts)]
    return [
        (
            end * workload.num_steps,
            statistics.median(workload.num_steps / timing.total for timing in timings[begin:end]),
            resident[end - 1],
        )
        for begin, end in zip([0, *ends], ends)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=list(WORKLOADS), default="popgym")
    parser.add_argument("--total-steps", type=int, default=2_000_000, help="default 2,000,000")
    parser.add_argument("--parts", type=int, default=8, help="parts of the run that are compared; default 8")
    parser.add_argument("--threads", type=int, default=2, help="of torch; default 2")
    args = parser.parse_args()
    workload = WORKLOADS[args.workload]
    if min(args.parts, args.threads) < 1 or args.total_steps < args.parts * workload.num_steps:
        parser.error(
            f"expected --threads and --parts of at least 1, and an update of {workload.num_steps} steps for each part"
        )
    keep_freed_memory()
    torch.set_num_threads(args.threads)
    print("     steps   steps/s       MiB")
    for steps, rate, resident in measure(workload, total_steps=args.total_steps, parts=args.parts):
        print(f"{steps:>10,} {rate:>9,.0f} {resident:>9,.0f}")


if __name__ == "__main__":
    main()
