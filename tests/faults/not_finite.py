"""A record with NaN pixels, and one that overflows inside the network."""

from __future__ import annotations

import itertools
import json

import numpy as np

from tests.faults import runs as runs_lib
from tests.faults.runs import NUM_STEPS, Runs
from tests.faults.stops import harmful
from tests.faults.table import Outcome, row
from trainer.data import tfrecord
from trainer.data.records import RecordIndex
from trainer.data.samplers import PKSampler

_BAD_STEP = 13


def _key_drawn(runs: Runs) -> str:
  """Returns the key of a record that first occurs in the batch of a step."""
  index = RecordIndex.open(str(runs.folder / "digits"))
  names = [str(name) for name in index.class_names]
  classes = np.array(
    [i for i, name in enumerate(names) if name not in "6789"], np.int32
  )
  sampler = PKSampler(
    index, classes_per_batch=4, samples_per_class=4, seed=1, classes=classes
  )
  number = int(sampler.batch(_BAD_STEP)[0, 0])
  assert all(number not in sampler.batch(step) for step in range(_BAD_STEP))
  [record] = index.read([number])
  return tfrecord.feature_values(record, "record")["key"][0].decode()


def _poisoned(runs: Runs, name, policy, *params):
  running = runs.start(
    name,
    *harmful(not_finite_key=_key_drawn(runs)),
    f"LoopOptions.on_nonfinite = '{policy}'",
    *params,
  )
  status, seconds = running.wait()
  return running, runs.folder / name, status, seconds


@row
def not_finite_with_stop(runs: Runs) -> Outcome:
  """A record of NaN; on_nonfinite = 'stop'."""
  running, model_dir, status, seconds = _poisoned(runs, "nan-stop", "stop")
  [path] = model_dir.glob("nonfinite-*.json")
  diagnosis = json.loads(path.read_text())
  line = running.last_line()
  is_named = f"error: step {_BAD_STEP}: the inputs of rows" in line
  is_named &= _key_drawn(runs) in diagnosis["keys"]
  is_finite = runs_lib.all_finite(model_dir)
  seen = f"{status}, step and record named: {is_named}, saved is finite: {is_finite}"
  lost = diagnosis["step"] - runs_lib.newest_step(model_dir)
  return Outcome(
    "5, step and record named: True, saved is finite: True", seen, seconds, lost
  )


def _passed_over(model_dir, status) -> tuple[str, str, int]:
  """What must come of a run and what did, in words, and how many steps it left out."""
  rows = runs_lib.rows(model_dir)
  steps = [row["step"] for row in rows] == list(range(2, NUM_STEPS + 1, 2))
  count = rows[-1]["train/nonfinite_steps"]
  is_finite = runs_lib.all_finite(model_dir)
  seen = f"{status}, counted: {count > 0}, all steps: {steps}, finite: {is_finite}"
  return "0, counted: True, all steps: True, finite: True", seen, int(count)


@row
def not_finite_with_skip(runs: Runs) -> Outcome:
  """A record of NaN; on_nonfinite = 'skip'."""
  _, model_dir, status, seconds = _poisoned(
    runs, "nan-skip", "skip", "LoopOptions.max_nonfinite_steps = 100"
  )
  expected, seen, count = _passed_over(model_dir, status)
  return Outcome(expected, seen, seconds, count)


@row
def not_finite_with_restore(runs: Runs) -> Outcome:
  """A record of NaN; on_nonfinite = 'restore', two workers."""
  file = runs.folder / "weights"
  chief, other = runs.start_workers(
    "nan-go-back",
    *harmful(not_finite_key=_key_drawn(runs)),
    "LoopOptions.on_nonfinite = 'restore'",
    "LoopOptions.max_nonfinite_steps = 100",
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
  """Returns step and digest of each update of a worker."""
  with open(path, encoding="ascii") as lines:
    return [(int(step), digest) for step, digest in map(str.split, lines)]


# A cross-batch memory of ten batches, and half precision with its maximum of 65,504.
_OVERFLOWING = (
  "NUM_STEPS = 20",
  "LoopOptions.checkpoint_every_steps = 10",
  "Encoder.precision = 'mixed_float16'",
  "TrainStep.cross_batch_memory = @CrossBatchMemory()",
  "CrossBatchMemory.size = 160",
  "CrossBatchMemory.warm_up_steps = 2",
)
# The steps with entries in the memory at the end.
_REMEMBERED = {
  "stop": [*range(10)],
  "skip": [9, 10, 11, 12, *range(14, 20)],
  "restore": [*range(6, 10), *range(14, 20)],
}
_STATES = {
  "moving averages": ("moving_",),
  "averages of weights": ("averages/averages/",),
  "loss scale": ("current_loss_scale",),
  "optimizer": (
    "optimizer/_variables",
    "optimizer/_momentums",
    "optimizer/_velocities",
  ),
  "memory bank": ("cross_batch_memory/contents/embeddings",),
}


def _overflowing(runs: Runs, policy, num_replicas, normalization, steps_per_loop):
  """Returns a run in which one record overflows internally, and its final states."""
  name = f"overflow-{policy}-{num_replicas}-{normalization}-{steps_per_loop}"
  running = runs.start(
    name,
    *harmful(large_key=_key_drawn(runs), factor=1e6),
    *_OVERFLOWING,
    f"LoopOptions.on_nonfinite = '{policy}'",
    f"LoopOptions.steps_per_loop = {steps_per_loop}",
    f"ConvNet.normalization = '{normalization}'",
    flags=(f"--num_virtual_replicas={num_replicas}",),
  )
  status, seconds = running.wait()
  model_dir = runs.folder / name
  newest = 10 if policy == "stop" else 20
  parts = [f"{status}", f"step {runs_lib.newest_step(model_dir)}"]
  parts += _damaged_states(model_dir, _REMEMBERED[policy], newest)
  diagnosis = json.loads((model_dir / f"nonfinite-{_BAD_STEP}.json").read_text())
  if not diagnosis["what"].startswith("the output of layer "):
    parts.append(f"said to be {diagnosis['what']}")
  expected = f"{5 if policy == 'stop' else 0}, step {newest}"
  return Outcome(expected, ", ".join(parts), seconds)


def _damaged_states(model_dir, remembered, newest) -> list[str]:
  """Returns descriptions of the wrong states in the checkpoints of a run."""
  found = [] if runs_lib.all_finite(model_dir) else ["not finite"]
  values, before = (runs_lib.values(model_dir, step) for step in (newest, 10))

  def of(*words):
    return [n for n in values if any(word in n for word in words)]

  for state, words in _STATES.items():
    if not any(np.any(values[name]) for name in of(*words)):
      found.append(f"{state}: none saved, or all 0")
  counters = {int(values[name]) for name in of("iteration")}
  if counters != {newest}:
    found.append(f"optimizer counters at {counters}")
  [steps] = [values[name] for name in of("cross_batch_memory/contents/steps")]
  if sorted(set(steps.tolist())) != remembered:
    found.append(f"memory bank of steps {sorted(set(steps.tolist()))}")
  # The initial scales are too large; after step 10 no gradient overflows.
  [scale] = of("current_loss_scale")
  if values[scale] != before[scale]:
    found.append(f"loss scale {before[scale]}, then {values[scale]}")
  return found


def _overflow_row(policy, num_replicas, normalization, steps_per_loop):
  def overflow(runs: Runs) -> Outcome:
    return _overflowing(runs, policy, num_replicas, normalization, steps_per_loop)

  kind = normalization.split("_")[0]
  overflow.__name__ = f"overflow_{policy}_{num_replicas}_{kind}_{steps_per_loop}"
  place = f"{num_replicas} replicas, {kind}, {steps_per_loop} steps a loop"
  overflow.__doc__ = f"Overflow inside, {policy}; {place}."
  return overflow


for _case in itertools.product(
  ("stop", "skip", "restore"), (1, 2), ("batch", "synchronized_batch"), (1, 10)
):
  row(_overflow_row(*_case))


@row
def overflow_of_a_variance_alone(runs: Runs) -> Outcome:
  """Overflow of a variance, go_back; float32, an optimizer per part, 2 replicas."""
  running = runs.start(
    "overflow-variance",
    *harmful(large_key=_key_drawn(runs), factor=1e25),
    *("NUM_STEPS = 20", "LoopOptions.checkpoint_every_steps = 10"),
    *("LoopOptions.steps_per_loop = 10", "LoopOptions.on_nonfinite = 'restore'"),
    "TrainStep.optimizer = @MultiOptimizer()",
    *(
      "MultiOptimizer.backbone = @backbone/adam()",
      "MultiOptimizer.head = @head/adam()",
    ),
    flags=("--num_virtual_replicas=2",),
  )
  status, seconds = running.wait()
  model_dir = runs.folder / "overflow-variance"
  values = runs_lib.values(model_dir)
  counters = [int(v) for name, v in sorted(values.items()) if "iteration" in name]
  diagnosis = json.loads((model_dir / f"nonfinite-{_BAD_STEP}.json").read_text())
  is_named = "moving_variance" in diagnosis["what"]
  is_finite = runs_lib.all_finite(model_dir)
  seen = f"{status}, finite: {is_finite}, named: {is_named}, counters {counters}"
  expected = "0, finite: True, named: True, counters [20, 20]"
  return Outcome(expected, seen, seconds)
