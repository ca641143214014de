"""The batch normalisations of an encoder: which there are, and what replicas share."""

from __future__ import annotations

import tensorflow as tf


def batch_norms(encoder: tf.keras.Model) -> list[tf.keras.layers.Layer]:
  """The encoder's batch normalisations that training changes."""
  return [
    layer
    for layer in encoder.submodules
    if isinstance(layer, tf.keras.layers.BatchNormalization) and layer.trainable
  ]


def has_synchronized(encoder: tf.keras.Model) -> bool:
  """Whether one of them is over the batch of all replicas."""
  return any(getattr(each, "synchronized", False) for each in batch_norms(encoder))


def make_replicas_equal(encoder: tf.keras.Model) -> None:
  """Gives all replicas the mean of their moving averages, which is what is saved.

  To be called on all workers, in the strategy's scope.

  Args:
    encoder: its variables exist.
  """
  for variable in encoder.non_trainable_variables:
    if variable.synchronization == tf.VariableSynchronization.ON_READ:
      variable.assign(variable.read_value())
