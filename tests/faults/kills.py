"""Repeated SIGKILLs; the run must end like an uninterrupted one."""

from __future__ import annotations

import random
import signal
import time

from tests.faults import runs as runs_lib
from tests.faults.runs import NUM_STEPS, Runs
from tests.faults.table import Outcome, row

EQUAL = "0, every bit equal, each step once"


def ended_as(status, model_dir, whole) -> str:
  """Describes the result of a run: equal, or its differences."""
  found = runs_lib.differences(model_dir, whole)
  steps = [each["step"] for each in runs_lib.rows(model_dir)]
  if not found and steps == sorted(set(steps)):
    return f"{status}, every bit equal, each step once"
  return f"{status}, differs in {', '.join(found[:3])}"


def _logged_step(model_dir):
  try:
    return runs_lib.rows(model_dir)[-1]["step"]
  except (OSError, IndexError, ValueError):
    return 0


def kill_at_random(runs: Runs, name, *, num_replicas, num_kills, seed):
  """Kills a run several times during training, then lets it finish.

  The moments are spread over the steps, and over the time that a step takes.

  Returns:
    Exit status, seconds of the last start to the end, steps that were lost.
  """
  draw = random.Random(seed)
  model_dir = runs.folder / name
  flags = (f"--num_virtual_replicas={num_replicas}",)
  lost = 0
  for _ in range(num_kills):
    running = runs.start(name, flags=flags)
    first = runs_lib.newest_step(model_dir)
    target = first + draw.randrange(0, 8)
    running.wait_until(
      lambda t=target: _logged_step(model_dir) >= min(t, NUM_STEPS - 2)
    )
    time.sleep(draw.uniform(0, 0.03))
    running.tell(signal.SIGKILL)
    running.wait()
    lost += max(0, _logged_step(model_dir) - runs_lib.newest_step(model_dir))
  running = runs.start(name, flags=flags)
  status, seconds = running.wait()
  return status, seconds, lost


@row
def killed_on_one_replica(runs: Runs) -> Outcome:
  """SIGKILL, twice; training, at random moments, 1 replica."""
  status, seconds, lost = kill_at_random(
    runs, "killed-1", num_replicas=1, num_kills=2, seed=1
  )
  seen = ended_as(status, runs.folder / "killed-1", runs.finished(1))
  return Outcome(EQUAL, seen, seconds, lost)


@row
def killed_on_two_replicas(runs: Runs) -> Outcome:
  """SIGKILL; training, at a random moment, 2 replicas."""
  status, seconds, lost = kill_at_random(
    runs, "killed-2", num_replicas=2, num_kills=1, seed=2
  )
  seen = ended_as(status, runs.folder / "killed-2", runs.finished(2))
  return Outcome(EQUAL, seen, seconds, lost)


@row
def killed_while_saving(runs: Runs) -> Outcome:
  """SIGKILL, twice; while a checkpoint is written."""
  model_dir = runs.folder / "killed-saving"
  staging_dir = model_dir / "checkpoints" / "staging"
  lost = 0
  for number in range(2):
    running = runs.start("killed-saving")
    first = runs_lib.newest_step(model_dir)
    running.wait_until(lambda f=first: runs_lib.newest_step(model_dir) > f)
    # First as soon as writing starts, then after the data was written.
    looked_for = ("*", "ckpt-*.index")[number]
    running.wait_until(lambda pattern=looked_for: any(staging_dir.glob(pattern)))
    running.tell(signal.SIGKILL)
    running.wait()
    lost += max(0, _logged_step(model_dir) - runs_lib.newest_step(model_dir))
  status, seconds = runs.start("killed-saving").wait()
  return Outcome(EQUAL, ended_as(status, model_dir, runs.finished(1)), seconds, lost)


@row
def killed_while_saving_class_centres(runs: Runs) -> Outcome:
  """SIGKILL, twice; while class centres of 2 replicas are written."""
  runs = runs.with_centres()
  flags = ("--num_virtual_replicas=2",)
  model_dir = runs.folder / "killed-centres"
  checkpoints = model_dir / "checkpoints"
  lost = 0
  for number in range(2):
    running = runs.start("killed-centres", flags=flags)
    first = runs_lib.newest_step(model_dir)
    running.wait_until(lambda f=first: runs_lib.newest_step(model_dir) > f)
    # First as soon as a file exists, then after its facts were written.
    looked_for = ("ckpt-{}.centres-*", "ckpt-{}.centres-*.json")[number]
    running.wait_until(
      lambda pattern=looked_for: any(
        checkpoints.glob(pattern.format(runs_lib.newest_step(model_dir) + 4))
      )
    )
    running.tell(signal.SIGKILL)
    running.wait()
    lost += max(0, _logged_step(model_dir) - runs_lib.newest_step(model_dir))
  status, seconds = runs.start("killed-centres", flags=flags).wait()
  return Outcome(EQUAL, ended_as(status, model_dir, runs.finished(2)), seconds, lost)
