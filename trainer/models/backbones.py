"""Backbones: from inputs to features, before pooling.

Shapes: B examples, H × W pixels, C channels, F features.
"""

from __future__ import annotations

from collections.abc import Sequence

import gin
import tensorflow as tf

from trainer.errors import UserError
from trainer.models.dropout import Dropout
from trainer.models.synchronized_norm import SynchronizedBatchNormalization

_NORMALIZATIONS = {
  "none": lambda: tf.keras.layers.Activation("linear"),
  "batch": tf.keras.layers.BatchNormalization,
  "synchronized_batch": SynchronizedBatchNormalization,
}


@gin.register
class ConvNet(tf.keras.layers.Layer):
  """Blocks of convolution, rectifier and 2 × 2 maximum: the seed's small network.

  Args:
    filters: number of filters of each block, e.g. (32, 64).
    kernel_size: width of the convolutions, pixels.
    normalization: after each convolution: "none"; "batch", over the replica's batch;
      "synchronized_batch", over that of all replicas.
  """

  def __init__(
    self,
    *,
    filters: Sequence[int],
    kernel_size: int = 3,
    normalization: str = "none",
  ):
    super().__init__()
    if normalization not in _NORMALIZATIONS:
      raise UserError(
        f"ConvNet.normalization={normalization!r} is unknown; choose from "
        f"{', '.join(_NORMALIZATIONS)}."
      )
    if not filters or min(filters) < 1:
      raise UserError(f"ConvNet.filters={filters!r} needs one number >= 1 a block.")
    self._convolutions = [
      tf.keras.layers.Conv2D(num, kernel_size, padding="same", activation="relu")
      for num in filters
    ]
    self._norms = [_NORMALIZATIONS[normalization]() for _ in filters]
    self._shrink = tf.keras.layers.MaxPool2D(2, padding="same")

  def call(self, images, training=None):
    """[B, H, W, C] float to [B, H / 2^blocks, W / 2^blocks, F] float."""
    features = images
    for convolution, norm in zip(self._convolutions, self._norms):
      features = self._shrink(norm(convolution(features), training=training))
    return features


@gin.register
class Perceptron(tf.keras.layers.Layer):
  """Dense layers with rectifiers, for inputs that are vectors.

  Args:
    hidden_units: number of units of each layer; () hands the inputs on.
    dropout_rate: share of units dropped in training, after each layer.
  """

  def __init__(self, *, hidden_units: Sequence[int], dropout_rate: float = 0.0):
    super().__init__()
    self._dense = [
      tf.keras.layers.Dense(num, activation="relu") for num in hidden_units
    ]
    self._dropouts = [Dropout(dropout_rate) for _ in hidden_units]

  def call(self, vectors, training=None):
    """[B, anything] float to [B, F] float."""
    features = tf.reshape(
      vectors, [vectors.shape[0] or -1, vectors.shape[1:].num_elements()]
    )
    for dense, dropout in zip(self._dense, self._dropouts):
      features = dropout(dense(features), training=training)
    return features
