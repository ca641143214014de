"""What can be embedded in micro-batches, and what it changes."""

from __future__ import annotations

import tensorflow as tf
from absl import logging

from trainer.errors import UserError
from trainer.models.batch_norms import batch_norms, has_synchronized

_Random = tf.keras.__internal__.layers.BaseRandomLayer


def check_encoder(encoder: tf.keras.Model) -> None:
  """Refuses what can't be computed twice alike; says what batch normalisation does.

  Raises:
    UserError: a layer draws random numbers that can't be drawn again, or speaks to
      other replicas.
  """
  for layer in encoder.submodules:
    if isinstance(layer, _Random):
      raise UserError(
        f"StepOptions.num_micro_batches embeds twice, and {type(layer).__name__} would "
        "draw other numbers the second time; use trainer.models.dropout.Dropout."
      )
  if has_synchronized(encoder):
    raise UserError(
      "StepOptions.num_micro_batches and synchronised batch normalisation exclude each "
      "other: replicas can't speak inside of a loop over micro-batches."
    )
  norms = batch_norms(encoder)
  if norms:
    logging.warning(
      "%d batch normalisations take mean and variance of each micro-batch, not of the "
      "replica's batch, and their moving averages are updated twice a micro-batch: the "
      "result is not that of num_micro_batches=1.",
      len(norms),
    )


def check_size(num_micro_batches: int, replica_batch_size: int) -> None:
  """Refuses a number of micro-batches into which the batch can't be divided.

  Raises:
    UserError: it does not divide.
  """
  if num_micro_batches < 1 or replica_batch_size % num_micro_batches:
    divisors = [
      n for n in range(1, replica_batch_size + 1) if replica_batch_size % n == 0
    ]
    nearest = min(divisors, key=lambda n: abs(n - num_micro_batches))
    raise UserError(
      f"StepOptions.num_micro_batches={num_micro_batches} does not divide the replica "
      f"batch of {replica_batch_size} examples; try {nearest}."
    )
