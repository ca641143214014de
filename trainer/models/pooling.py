"""From a feature map to one vector an image.

Shapes: B examples, H × W positions, F features.
"""

from __future__ import annotations

import tensorflow as tf

from trainer.errors import UserError


class GeneralizedMean(tf.keras.layers.Layer):
  """Generalised mean (GeM): (mean x^p)^(1/p) over the positions, with p learned.

  p = 1 is the average, p → ∞ the maximum. Features are clipped at `epsilon` first.

  Source: Radenović et al. 2018, https://arxiv.org/abs/1711.02512 (p starts at 3).
  """

  def __init__(self, *, initial_power: float = 3.0, epsilon: float = 1e-6):
    super().__init__()
    self._initial_power = initial_power
    self._epsilon = epsilon

  def build(self, input_shape):
    """Creates the power, one for all features."""
    self.power = self.add_weight(
      name="power",
      shape=(),
      initializer=tf.keras.initializers.Constant(self._initial_power),
    )
    super().build(input_shape)

  def call(self, features):
    """[B, H, W, F] float to [B, F] float."""
    clipped = tf.maximum(features, self._epsilon)
    return tf.reduce_mean(clipped**self.power, axis=(1, 2)) ** (1.0 / self.power)


POOLINGS = {
  "average": tf.keras.layers.GlobalAveragePooling2D,
  "flatten": tf.keras.layers.Flatten,
  "generalized_mean": GeneralizedMean,
  "max": tf.keras.layers.GlobalMaxPooling2D,
}


def make_pooling(name: str) -> tf.keras.layers.Layer:
  """The pooling layer of that name.

  Args:
    name: a key of `POOLINGS`. "flatten" also takes features that are vectors already.

  Returns:
    A layer from [B, H, W, F] to [B, anything].

  Raises:
    UserError: there is none of that name.
  """
  if name not in POOLINGS:
    raise UserError(
      f"Encoder.pooling={name!r} is unknown; choose from {', '.join(sorted(POOLINGS))}."
    )
  return POOLINGS[name]()
