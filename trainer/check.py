"""Mode `check`: whether this run's training is the same on any number of replicas."""

from __future__ import annotations

from absl import logging

from trainer.data.pipeline import Batch, Batches, Shard
from trainer.distribute.objective import mines_across_replicas
from trainer.distribute.strategy import divide_cpu, mirrored_on_cpu
from trainer.errors import CheckFailedError
from trainer.loop import parity
from trainer.loop.step import TrainStep
from trainer.run import Run
from trainer.train import Parts, check_batch

_NUM_STEPS = 3
_NUM_REPLICAS = (1, 2, 4)


def main(run: Run) -> None:
  """Trains a few steps on 1, 2 and 4 virtual replicas, and prints how far they differ.

  Raises:
    UserError: the run's parts don't fit each other.
    CheckFailedError: a row of the table is not within the tolerance.
  """
  del run  # Its configuration is gin's, and nothing is written.
  divide_cpu(max(_NUM_REPLICAS))
  parts = Parts()  # type: ignore[call-arg]  # They are gin's.
  batches = _batches(parts)
  rows = []
  for num_replicas in _numbers_of_replicas(parts):
    wanted = parity.expected(_make_step, batches, num_replicas)
    got = parity.trained(mirrored_on_cpu(num_replicas), _make_step, batches)
    rows.append((f"{num_replicas} replicas", parity.errors(got, wanted)))
  print(_heading(parts.step))
  print(parity.table(rows))
  if not all(parity.is_equal(found) for _, found in rows):
    raise CheckFailedError(
      f"replicas differ by more than {parity.TOLERANCE:g} from what they should be."
    )


def _make_step() -> TrainStep:
  parts = Parts()  # type: ignore[call-arg]
  parts.create_variables()
  return parts.step


def _batches(parts: Parts) -> list[Batch]:
  """The global batches of the first steps."""
  schedule = parts.make_schedule()
  check_batch(schedule, parts.step, 1)
  batches = Batches(parts.dataset.index, schedule, parts.dataset.decoder)
  with batches.naming_bad_records(0, _NUM_STEPS - 1):
    return list(batches.dataset(Shard(0, 1, 1), num_steps=_NUM_STEPS))


def _numbers_of_replicas(parts: Parts) -> list[int]:
  num_classes, _ = parts.make_schedule().shape
  for num_replicas in _NUM_REPLICAS:
    if num_classes % num_replicas:
      logging.warning(
        "%d replicas are left out: they don't divide PKSchedule.classes_per_batch=%d.",
        num_replicas,
        num_classes,
      )
  return [num for num in _NUM_REPLICAS if num_classes % num == 0]


def _heading(step: TrainStep) -> str:
  wanted = (
    "one replica with the whole batch"
    if mines_across_replicas(step.objective_fn)
    else "the mean over the replicas' parts"
  )
  return (
    f"{type(step.loss).__name__}, {step.optimizer.name}, {_NUM_STEPS} steps: largest "
    f"relative difference to {wanted}; at most {parity.TOLERANCE:g} passes."
  )
