"""Checks of a step's batches, and of its limits on TPUs."""

from __future__ import annotations

import tensorflow as tf

from trainer.data.samplers import BatchSampler, PKSampler
from trainer.errors import UserError
from trainer.losses.objectives import WithinGroups, mines_across_replicas
from trainer.training import gradients
from trainer.training.step import TrainStep


def check_batch(sampler: PKSampler, step: TrainStep, num_replicas: int) -> None:
  """Checks that a batch fits the replicas, the loss and the micro-batches.

  Args:
    sampler: of P classes and K samples.
    step: its loss may need positives, and its micro-batches must divide the batch.
    num_replicas: must divide the classes.

  Raises:
    UserError: the batch does not fit.
  """
  num_classes, num_samples = sampler.shape
  if num_classes % num_replicas:
    multiple = -(-num_classes // num_replicas) * num_replicas
    if multiple > getattr(sampler, "num_classes", multiple):
      multiple = max(multiple - num_replicas, num_replicas)
    raise UserError(
      f"{_rows_parameter(sampler)}={num_classes} does not split over {num_replicas} "
      f"replicas; try {multiple}."
    )
  check_groups(sampler, step, "train.sampler_fn")
  _check_centres(step)
  if step.loss.needs_positives and num_samples < 2:
    raise UserError(
      f"PKSampler.samples_per_class={num_samples} leaves "
      f"{type(step.loss).__name__} without positives; it needs at least 2."
    )
  size = num_classes * num_samples // num_replicas
  gradients.check_micro_batch_size(step.options.num_micro_batches, size)


def _check_centres(step: TrainStep) -> None:
  """Raises if a loss against class centres has another objective or encoder."""
  name = type(step.loss).__name__
  is_whole = not isinstance(step.objective_fn, WithinGroups)
  if step.loss.tables and not (mines_across_replicas(step.objective_fn) and is_whole):
    raise UserError(
      f"{name} has class centres that are shared by all replicas, and compares all "
      "examples with them; set TrainStep.objective_fn = @global_negatives."
    )
  if step.loss.needs_norms and getattr(step.encoder, "is_normalized", False):
    raise UserError(
      f"{name} reads the quality of an example from the norm of its embedding, and all "
      "norms are 1; set Encoder.is_normalized = False."
    )


def check_groups(sampler: BatchSampler, step: TrainStep, sampler_name: str) -> None:
  """Checks that batches have the groups that a step's objective needs.

  Args:
    sampler: of the batches.
    step: its objective may use groups.
    sampler_name: name of the parameter that has the sampler.

  Raises:
    UserError: batches have no groups, or different ones.
  """
  if isinstance(step.objective_fn, WithinGroups):
    group = getattr(sampler, "group", None)
    step.objective_fn.check_groups(group, sampler_name)


def _rows_parameter(sampler: PKSampler) -> str:
  """Returns the parameter that sets the rows of a batch; by default the classes."""
  return getattr(sampler, "rows_parameter", "PKSampler.classes_per_batch")


def check_tpu_limits(step: TrainStep) -> None:
  """Raises for what TensorFlow's TPUStrategy rejects only during the first step.

  Args:
    step: to train on a TPU.

  Raises:
    UserError: its encoder computes in mixed_float16, or its loss has class centres.
  """
  if step.loss.tables:
    raise UserError(
      f"{type(step.loss).__name__} has class centres, which are not trained on TPUs; "
      "use GPUs, or a loss of pairs such as @InfoNCELoss()."
    )
  if isinstance(step.optimizer, tf.keras.mixed_precision.LossScaleOptimizer):
    raise UserError(
      "Encoder.precision='mixed_float16' needs a loss scale, which TensorFlow "
      "does not support on TPUs; use 'mixed_bfloat16'."
    )


def check_tpu_limits_if_on_tpu(step: TrainStep) -> None:
  """Checks the TPU limits if the current strategy is that of a TPU.

  Args:
    step: to train under the strategy.

  Raises:
    UserError: as in `check_tpu_limits`.
  """
  if isinstance(tf.distribute.get_strategy(), tf.distribute.TPUStrategy):
    check_tpu_limits(step)
