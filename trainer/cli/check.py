"""Mode `check`: compares training on different numbers of replicas."""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf
from absl import logging

from trainer.cli.train import TrainConfig, make_parts
from trainer.data.pipeline import Batch, Shard
from trainer.data.samplers import PKSampler
from trainer.distribute.strategy import divide_cpu, mirrored_on_cpu
from trainer.errors import CheckFailedError, UserError
from trainer.losses.objectives import mines_across_replicas
from trainer.run import Hardware, Run
from trainer.training import parity
from trainer.training.checks import check_batch
from trainer.training.step import TrainStep

_NUM_STEPS = 3
_NUM_REPLICAS = (1, 2, 4)
_STRATEGIES = ("auto", "cpu", "mirrored")


def main(run: Run) -> None:
  """Trains a few steps on 1, 2 and 4 virtual replicas, and prints the differences.

  Raises:
    UserError: the run's parts do not fit each other, or the flags do not fit a check.
    CheckFailedError: a row of the table exceeds the tolerance.
  """
  # Everything else comes from gin, and nothing is written.
  _use_cpu_alone(run.hardware)
  parts = make_parts()
  sampler = parts.make_sampler()
  check_batch(sampler, parts.step, num_replicas=1)
  batches = _batches(parts, sampler)
  scales = parity.gradient_scales(_make_step, batches[0])
  rows = []
  for num_replicas in _NUM_REPLICAS:
    try:
      check_batch(sampler, parts.step, num_replicas)
      differences = _differences(batches, num_replicas, scales)
    except UserError as error:
      if num_replicas == 1:
        raise
      logging.warning("%d replicas are skipped: %s", num_replicas, error)
    else:
      rows.append((f"{num_replicas} replicas", differences))
  print(_heading(parts.step))
  print(parity.table(rows))
  if not all(parity.is_equal(differences) for _, differences in rows):
    raise CheckFailedError(
      f"replicas differ by more than {parity.TOLERANCE:g} from the expected values."
    )


def _use_cpu_alone(hardware: Hardware) -> None:
  """Divides the CPU, and hides devices with other rounding.

  Raises:
    UserError: the flags select other devices.
  """
  if hardware.strategy not in _STRATEGIES or hardware.tpu is not None:
    flag = (
      f"--tpu={hardware.tpu}" if hardware.tpu else f"--strategy={hardware.strategy}"
    )
    raise UserError(
      f"--mode=check compares virtual replicas on the CPU; got {flag}: remove that "
      "flag."
    )
  tf.config.set_visible_devices([], "GPU")
  tf.config.experimental.enable_tensor_float_32_execution(False)
  divide_cpu(max(_NUM_REPLICAS))


def _differences(
  batches: list[Batch], num_replicas: int, scales: Sequence[float]
) -> dict[str, float]:
  expected = parity.expected(_make_step, batches, num_replicas)
  expected = expected._replace(gradient_scales=scales)
  trained = parity.trained(_strategy(num_replicas), _make_step, batches)
  return parity.errors(trained, expected)


def _strategy(num_replicas: int) -> tf.distribute.Strategy:
  """Returns the strategy of a run on some number of virtual replicas."""
  if num_replicas == 1:
    return tf.distribute.OneDeviceStrategy("CPU:0")
  return mirrored_on_cpu(num_replicas)


def _make_step() -> TrainStep:
  parts = make_parts()
  parts.create_variables()
  return parts.step


def _batches(parts: TrainConfig, sampler: PKSampler) -> list[Batch]:
  """Returns the global batches of the first steps."""
  batches = parts.dataset.training_batches(sampler)
  with batches.reporting_bad_records(0, _NUM_STEPS - 1):
    return list(batches.dataset(Shard(0, 1, 1), num_steps=_NUM_STEPS))


def _heading(step: TrainStep) -> str:
  expected = (
    "one replica with the same global batch"
    if mines_across_replicas(step.objective_fn)
    else "the mean over the replicas' parts of the batch"
  )
  return (
    f"{type(step.loss).__name__}, {step.optimizer.name}, {_NUM_STEPS} steps: largest "
    f"relative difference to {expected}; at most {parity.TOLERANCE:g} passes."
  )
