"""How far the logged losses of a run drift apart between numbers of replicas.

  python -m tests.benchmarks.replica_drift [--num_seeds=3] [--num_replicas=1,2,4]
    [--num_steps=150] [--run=configs/runs/digits.gin] [--folder=runs/replica_drift]

Trains the same run from the same seed on each number of virtual replicas, with the same
global batches, and prints `train/loss` of each log row. Below it is, for each step, the
largest difference between replicas of one seed, and between seeds on one replica, both
relative to the mean. Runs that are done already are not repeated.
"""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import numpy as np
from absl import app, flags

_NUM_SEEDS = flags.DEFINE_integer("num_seeds", 3, "Seeds 1 to this number.", 1)
_NUM_REPLICAS = flags.DEFINE_list("num_replicas", ["1", "2", "4"], "Virtual replicas.")
_NUM_STEPS = flags.DEFINE_integer("num_steps", 150, "Steps of a run.", 1)
_RUN = flags.DEFINE_string("run", "configs/runs/digits.gin", "Run file with SEED.")
_FOLDER = flags.DEFINE_string("folder", "runs/replica_drift", "Where the runs live.")

_ROOT = pathlib.Path(__file__).parents[2]


def main(_):
  _task("ingest", pathlib.Path(_FOLDER.value, "ingest"), [])
  losses = {
    (seed, num_replicas): _losses(seed, num_replicas)
    for seed in range(1, _NUM_SEEDS.value + 1)
    for num_replicas in map(int, _NUM_REPLICAS.value)
  }
  _show(losses)


def _losses(seed, num_replicas):
  """The logged loss by step, of a run that is trained unless it was before."""
  folder = pathlib.Path(_FOLDER.value, f"seed_{seed}_replicas_{num_replicas}")
  bindings = [f"SEED={seed}", f"NUM_STEPS={_NUM_STEPS.value}"]
  flags_of_run = [f"--gin_param={binding}" for binding in bindings]
  _task("train", folder, [*flags_of_run, f"--num_virtual_replicas={num_replicas}"])
  lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
  rows = [json.loads(line) for line in lines]
  return {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}


def _task(mode, folder, more):
  """Runs a mode in a process of its own, which chooses the number of CPU devices."""
  command = [sys.executable, "-m", "trainer.task", f"--mode={mode}"]
  command += [f"--gin_file={_RUN.value}", f"--model_dir={folder.absolute()}", *more]
  done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True)
  if done.returncode:
    raise RuntimeError(f"{' '.join(command)} ended with {done.stderr[-2000:]}")


def _show(losses):
  """A row a run, and the differences below."""
  steps = list(next(iter(losses.values())))
  seeds = sorted({seed for seed, _ in losses})
  counts = sorted({num_replicas for _, num_replicas in losses})
  print(f"\n{'seed':>24}{'replicas':>10}" + "".join(f"{s:>10}" for s in steps))
  for (seed, num_replicas), of_run in losses.items():
    cells = "".join(f"{of_run[step]:10.4f}" for step in steps)
    print(f"{seed:24}{num_replicas:10}{cells}")
  table = np.array(
    [[[losses[s, r][step] for step in steps] for r in counts] for s in seeds]
  )
  print(f"{'largest difference of':>34}")
  _print_spread("replicas, one seed", _spread(table, axis=1).max(0))
  _print_spread("seeds, one replica", _spread(table[:, 0], axis=0))


def _spread(values, axis):
  """Largest minus smallest, relative to the mean."""
  return np.ptp(values, axis=axis) / values.mean(axis=axis)


def _print_spread(name, shares):
  print(f"{name:>34}" + "".join(f"{share:10.1%}" for share in shares))


if __name__ == "__main__":
  app.run(main)
