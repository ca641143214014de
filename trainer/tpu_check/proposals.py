"""What to change in a run that does not fit.

Shapes: B examples of a replica, R replicas, P classes of the global batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from trainer.models.batch_norms import batch_norms, has_synchronized
from trainer.tpu_check.compiler import Array
from trainer.tpu_check.run_step import RunStep

_ROWS_PER_TILE = 128


def proposals(
  run: RunStep, num_replicas: int, share: float, largest: Sequence[Array]
) -> list[str]:
  """Bindings that take less memory, each with what it does, best first.

  Args:
    run: it does not fit.
    num_replicas: R.
    share: how many times the memory that there is it needs.
    largest: the largest arrays of its program.
  """
  found = []
  is_of_encoder = [f"{run.step.encoder.name}/" in array.name for array in largest]
  if any(is_of_encoder):
    found += [*_micro_batches(run, num_replicas, share), *_precision(run)]
  if not all(is_of_encoder):
    found.append(
      f"{type(run.step.loss).__name__}.rows_per_tile = {_ROWS_PER_TILE}: streaming, so "
      f"many anchors at a time against all candidates; the same result"
    )
  return [*found, *_smaller_batch(run, num_replicas, share)]


def _micro_batches(run: RunStep, num_replicas: int, share: float) -> list[str]:
  size = run.num_classes * run.num_samples // num_replicas
  now = run.step.options.num_micro_batches
  # What does not shrink with the micro-batch is left some room.
  wanted = now * max(2, math.ceil(share * 1.25))
  enough = [n for n in range(wanted, size + 1) if size % n == 0]
  if not enough or has_synchronized(run.step.encoder):
    return []
  result = (
    "batch normalisation then sees micro-batches"
    if batch_norms(run.step.encoder)
    else "the same result"
  )
  return [
    f"StepOptions.num_micro_batches = {enough[0]}: gradient caching, one more forward "
    f"pass; {result}"
  ]


def _precision(run: RunStep) -> list[str]:
  if getattr(run.step.encoder, "precision", None) != "float32":
    return []
  return [
    "Encoder.precision = 'mixed_bfloat16': half the memory for the backbone's "
    "activations, with 8 bits of precision"
  ]


def _smaller_batch(run: RunStep, num_replicas: int, share: float) -> list[str]:
  unit = run.class_unit(num_replicas)
  fewer = int(run.num_classes / share) // unit * unit
  if not 0 < fewer < run.num_classes:
    return []
  return [
    f"PKSchedule.classes_per_batch = {fewer}: a smaller P, with fewer negatives; --fit "
    "searches the largest"
  ]
