"""Batch normalisation: synchronised over replicas, with equal moving averages.

Shapes: B examples on each replica, R replicas, C channels.
"""

from __future__ import annotations

import tensorflow as tf

from trainer.distribute.collectives import current_collectives


class SynchronizedBatchNormalization(tf.keras.layers.BatchNormalization):
  """Keras' layer, with an accurate mean and variance of the R·B examples.

  The variance is the mean of squared distances to the mean of all replicas. This takes
  one collective more than E(x²) − E(x)², which loses the digits that both terms share.
  Means are computed axis by axis, from the last. Adding all pixels of all examples in
  one float32 would have an error that grows with their number and depends on the number
  of replicas.

  Args:
    options: of Keras' layer.
  """

  def __init__(self, **options):
    super().__init__(**{**options, "synchronized": True})

  def _calculate_mean_and_var(self, inputs, reduction_axes, keep_dims, mask=None):
    del mask  # Always None in an image network.
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
  """Returns the encoder's batch normalisations that training changes."""
  return [
    layer
    for layer in encoder.submodules
    if isinstance(layer, tf.keras.layers.BatchNormalization) and layer.trainable
  ]


def has_synchronized_batch_norm(encoder: tf.keras.Model) -> bool:
  """Returns whether one of them uses the batch of all replicas."""
  return any(getattr(each, "synchronized", False) for each in batch_norms(encoder))


def make_replicas_equal(encoder: tf.keras.Model) -> None:
  """Sets the moving averages of all replicas to their mean, which is also saved.

  Must be called on all workers, in the strategy's scope.

  Args:
    encoder: its variables exist.
  """
  for variable in encoder.non_trainable_variables:
    if variable.synchronization == tf.VariableSynchronization.ON_READ:
      variable.assign(variable.read_value())
