"""Batch normalisation: synchronised over replicas, and equal on all of them.

Shapes: B examples on each replica, R replicas, C channels.
"""

from __future__ import annotations

import tensorflow as tf

from trainer.distribute.collectives import current_collectives


class SynchronizedBatchNormalization(tf.keras.layers.BatchNormalization):
  """Keras' layer, with a mean and variance of the R·B examples that keep their digits.

  The variance is the mean of squared distances to the mean of all replicas, one
  collective more than E(x²) − E(x)², which loses the digits that both have in common.
  Means are taken axis by axis, from the last: a float32 that adds up all pixels of all
  examples, one after the other, has an error that grows with their number, and another
  one on each number of replicas.

  Args:
    options: of Keras' layer.
  """

  def __init__(self, **options):
    super().__init__(**{**options, "synchronized": True})

  def _calculate_mean_and_var(self, inputs, reduction_axes, keep_dims, mask=None):
    del mask  # None reaches an image network.
    collectives = current_collectives()

    def global_mean(values):
      for axis in sorted(reduction_axes, reverse=True):
        values = tf.reduce_mean(values, axis, keepdims=True)
      return collectives.sum(values) / collectives.num_replicas

    mean = global_mean(inputs)
    variance = global_mean(tf.math.squared_difference(inputs, mean))
    if keep_dims:
      return mean, variance
    return tf.squeeze(mean, reduction_axes), tf.squeeze(variance, reduction_axes)


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
