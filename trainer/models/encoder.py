"""The encoder: backbone, pooling, and the layer that makes embeddings.

Shapes: B examples, D dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence

import gin
import tensorflow as tf

from trainer.errors import UserError
from trainer.models.pooling import make_pooling


@gin.register
class Encoder(tf.keras.Model):
  """Maps inputs to embeddings, to be compared by their distance.

  Args:
    backbone: layer from inputs to features.
    embedding_size: D, dimensions of an embedding.
    pooling: how a feature map becomes a vector: "average", "flatten",
      "generalized_mean" or "max".
    is_normalized: whether embeddings are scaled to length 1. Without it a batch_all
      or batch_hard training can collapse for good: where all embeddings are equal the
      gradient is 0.

  Raises:
    UserError: a size or the pooling is not possible.
  """

  def __init__(
    self,
    *,
    backbone: tf.keras.layers.Layer,
    embedding_size: int,
    pooling: str = "flatten",
    is_normalized: bool = True,
  ):
    super().__init__(name="encoder")
    if embedding_size < 1:
      raise UserError(f"Encoder.embedding_size={embedding_size} must be at least 1.")
    self.embedding_size = embedding_size
    self._backbone = backbone
    self._pooling = make_pooling(pooling)
    self._projection = tf.keras.layers.Dense(embedding_size, name="projection")
    self._is_normalized = is_normalized

  def call(self, inputs, training=None):
    """[B, ...] float32 inputs to [B, D] float32 embeddings."""
    features = self._pooling(self._backbone(inputs, training=training))
    embeddings = tf.cast(self._projection(features), tf.float32)
    if self._is_normalized:
      embeddings = tf.math.l2_normalize(embeddings, axis=-1)
    return embeddings

  def create_variables(self, input_shape: Sequence[int]) -> None:
    """Creates all variables by a pass over one blank input of [1, *input_shape]."""
    self(tf.zeros([1, *input_shape]), training=False)
