"""Batch normalisation over the batch of all replicas, as one replica computes it.

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
