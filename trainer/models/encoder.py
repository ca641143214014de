"""The encoder: backbone, pooling, and the layer that makes embeddings.

Shapes: B examples, D dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence

import gin
import tensorflow as tf

from trainer.errors import UserError
from trainer.models.dropout import Dropout
from trainer.models.pooling import make_pooling
from trainer.models.precision import PRECISIONS, set_precision


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
    precision: of the backbone's computation: "float32", "mixed_bfloat16" or
      "mixed_float16". Weights, pooling, projection and loss stay in float32.
    is_backbone_frozen: whether only the head is trained; then batch normalisation in
      the backbone is as in inference.

  Attributes:
    embedding_size: D.
    precision: as given.

  Raises:
    UserError: a size, the pooling or the precision is not possible.
  """

  def __init__(
    self,
    *,
    backbone: tf.keras.layers.Layer,
    embedding_size: int,
    pooling: str = "flatten",
    is_normalized: bool = True,
    precision: str = "float32",
    is_backbone_frozen: bool = False,
  ):
    super().__init__(name="encoder")
    if embedding_size < 1:
      raise UserError(f"Encoder.embedding_size={embedding_size} must be at least 1.")
    if precision not in PRECISIONS:
      raise UserError(
        f"Encoder.precision={precision!r} is unknown; choose from "
        f"{', '.join(PRECISIONS)}."
      )
    self.embedding_size = embedding_size
    self.precision = precision
    self._backbone = backbone
    self._backbone.trainable = not is_backbone_frozen
    set_precision(backbone, precision)
    self._pooling = make_pooling(pooling)
    self._projection = tf.keras.layers.Dense(embedding_size, name="projection")
    self._is_normalized = is_normalized

  def call(self, inputs, training=None):
    """[B, ...] float32 inputs to [B, D] float32 embeddings."""
    features = tf.cast(self._backbone(inputs, training=training), tf.float32)
    embeddings = self._projection(self._pooling(features))
    if self._is_normalized:
      embeddings = tf.math.l2_normalize(embeddings, axis=-1)
    return embeddings

  def create_variables(self, input_shape: Sequence[int]) -> None:
    """Creates all variables by a pass over one blank input of [1, *input_shape]."""
    self(tf.zeros([1, *input_shape]), training=False)
    dropouts = [layer for layer in self.submodules if isinstance(layer, Dropout)]
    for number, dropout in enumerate(dropouts):
      dropout.number = number

  @property
  def backbone_variables(self) -> list[tf.Variable]:
    """Trainable variables before the pooling."""
    return list(self._backbone.trainable_variables)
