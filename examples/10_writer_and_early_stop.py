"""Your own log writer, a learning rate given by a function, and a run that stops at a return of 60."""

import json
from pathlib import Path

import dualhead


class JSONLines:
    """A writer has two methods, `write` and `close`."""

    def __init__(self, path):
        self.path = Path(path)
        self.path.write_text("")

    def write(self, num_steps, metrics):
        with self.path.open("a") as file:
            file.write(json.dumps({"steps": num_steps} | metrics) + "\n")

    def close(self):
        """The file is closed after every write."""


def good_enough(session, metrics):
    """Called after each update: True ends the run, with a checkpoint and an evaluation."""
    metrics["mine/progress"] = session.learner.num_steps / session.config.total_steps  # logged with the other metrics
    return metrics.get("episode/mean_return", 0.0) > 60.0


result = dualhead.train(
    "CartPole-v1",
    total_steps=50_000,
    eval_episodes=10,
    learning_rate=lambda progress: 1e-3 * (1 - progress),
    writers=[JSONLines("metrics.jsonl")],
    on_update=good_enough,
)
lines = Path("metrics.jsonl").read_text().splitlines()
print(f"stopped after {result.summary['steps']:,} steps and {len(lines)} updates")
print(f"learning rate of the last update: {json.loads(lines[-1])['update/learning_rate']:.6f}")
