"""A record whose pixels are no numbers."""

from __future__ import annotations

import json

import numpy as np

from tests.faults import runs as runs_lib
from tests.faults.runs import NUM_STEPS, Runs
from tests.faults.stops import harmful
from tests.faults.table import Outcome, row
from trainer.data import examples
from trainer.data.records import RecordIndex
from trainer.data.schedule import PKSchedule

_BAD_STEP = 13


def _key_drawn(runs: Runs) -> str:
  """The key of a record of the batch of a step, and of none before it."""
  index = RecordIndex.open(str(runs.folder / "digits"))
  names = [str(name) for name in index.class_names]
  classes = np.array(
    [i for i, name in enumerate(names) if name not in "6789"], np.int32
  )
  schedule = PKSchedule(
    index, classes_per_batch=4, samples_per_class=4, seed=1, classes=classes
  )
  number = int(schedule.batch(_BAD_STEP)[0, 0])
  assert all(number not in schedule.batch(step) for step in range(_BAD_STEP))
  [record] = index.read([number])
  return examples.values(record, "record")["key"][0].decode()


def _poisoned(runs: Runs, name, policy, *params):
  running = runs.start(
    name,
    *harmful(not_finite_key=_key_drawn(runs)),
    f"LoopOptions.when_not_finite = '{policy}'",
    *params,
  )
  status, seconds = running.wait()
  return running, runs.folder / name, status, seconds


@row
def not_finite_where_it_stops(runs: Runs) -> Outcome:
  """A record of NaN; when_not_finite = 'stop'."""
  running, model_dir, status, seconds = _poisoned(runs, "nan-stop", "stop")
  [path] = model_dir.glob("not_finite-*.json")
  told = json.loads(path.read_text())
  line = running.last_line()
  is_named = f"error: step {_BAD_STEP}: the inputs of rows" in line
  is_named &= _key_drawn(runs) in told["keys"]
  is_finite = runs_lib.all_finite(model_dir)
  seen = f"{status}, step and record named: {is_named}, saved is finite: {is_finite}"
  lost = told["step"] - runs_lib.newest_step(model_dir)
  return Outcome(
    "5, step and record named: True, saved is finite: True", seen, seconds, lost
  )


def _passed_over(model_dir, status) -> tuple[str, str, int]:
  """What must come of a run and what did, in words, and how many steps it left out."""
  rows = runs_lib.rows(model_dir)
  steps = [row["step"] for row in rows] == list(range(2, NUM_STEPS + 1, 2))
  count = rows[-1]["train/not_finite_steps"]
  is_finite = runs_lib.all_finite(model_dir)
  seen = f"{status}, counted: {count > 0}, all steps: {steps}, finite: {is_finite}"
  return "0, counted: True, all steps: True, finite: True", seen, int(count)


@row
def not_finite_that_is_skipped(runs: Runs) -> Outcome:
  """A record of NaN; when_not_finite = 'skip'."""
  _, model_dir, status, seconds = _poisoned(
    runs, "nan-skip", "skip", "LoopOptions.max_not_finite = 100"
  )
  expected, seen, count = _passed_over(model_dir, status)
  return Outcome(expected, seen, seconds, count)


@row
def not_finite_that_is_gone_back_from(runs: Runs) -> Outcome:
  """A record of NaN; when_not_finite = 'go_back', two workers."""
  file = runs.folder / "weights"
  chief, other = runs.start_workers(
    "nan-go-back",
    *harmful(not_finite_key=_key_drawn(runs)),
    "LoopOptions.when_not_finite = 'go_back'",
    "LoopOptions.max_not_finite = 100",
    "TrainStep.optimizer = @noting_weights()",
    "noting_weights.optimizer = @adam()",
    f"noting_weights.file = '{file}'",
  )
  status, seconds = chief.wait()
  other_status, _ = other.wait()
  expected, seen, _ = _passed_over(runs.folder / "nan-go-back", status)
  notes, others = (_notes(f"{file}-{index}") for index in range(2))
  steps = [step for step, _ in notes]
  is_back = chief.said(f"the newest checkpoint is of step {_BAD_STEP - 1}.")
  is_back &= _BAD_STEP + 1 not in steps and steps[-1] == NUM_STEPS
  seen += (
    f"; back: {is_back}; worker 1: {other_status}, equal weights: {notes == others}"
  )
  expected += "; back: True; worker 1: 0, equal weights: True"
  return Outcome(expected, seen, seconds, NUM_STEPS - len(steps))


def _notes(path):
  """Step and digest of each update that a worker made."""
  with open(path, encoding="ascii") as lines:
    return [(int(step), digest) for step, digest in map(str.split, lines)]
