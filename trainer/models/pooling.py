"""From a feature map to one vector an image.

Shapes: B examples, H × W positions, F features.
"""

from __future__ import annotations

from typing import Any, Optional

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
    return _power_mean(clipped, tf.convert_to_tensor(self.power))


@tf.custom_gradient
def _power_mean(features: tf.Tensor, power: tf.Tensor):
  """(mean x^p)^(1/p) over the positions, of positive features.

  The derivative by p is y / p² · mean(u log u), where u = (x / y)^p has mean 1. So it
  is y / p² · mean(u log u - u + 1), in which no term is negative: the terms don't
  cancel, as the two logarithms of the chain rule do, which cost up to three digits.

  Args:
    features: [B, H, W, F] float, above 0.
    power: [] float.

  Returns:
    [B, F] float.
  """
  largest = tf.reduce_max(features, axis=(1, 2), keepdims=True)  # x^p may underflow.
  of_largest = tf.reduce_mean((features / largest) ** power, axis=(1, 2), keepdims=True)
  mean = largest * of_largest ** (1.0 / power)

  def gradient(upstream):
    upstream = upstream[:, tf.newaxis, tf.newaxis, :]
    parts = features / mean
    logarithm = power * tf.math.log(parts)
    share = tf.exp(logarithm)
    num_positions = tf.reduce_prod(tf.shape(features)[1:3])
    to_features = upstream * share / (parts * tf.cast(num_positions, parts.dtype))
    bends = share * logarithm - tf.math.expm1(logarithm)
    by_power = mean * tf.reduce_mean(bends, axis=(1, 2), keepdims=True)
    return to_features, tf.reduce_sum(upstream * by_power) / power**2

  return tf.squeeze(mean, (1, 2)), gradient


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


def check_features(features: Any, *, num_examples: Optional[int], pooling: str) -> None:
  """Checks that a backbone's features can be pooled.

  Args:
    features: what the backbone gives.
    num_examples: B; None where it is not known yet.
    pooling: a key of `POOLINGS`.

  Raises:
    UserError: they are no dense float tensor of B examples, or of another rank.
  """
  needed = "[B, F] or more axes" if pooling == "flatten" else "[B, H, W, F]"
  is_dense = tf.is_tensor(features) and not isinstance(
    features, (tf.RaggedTensor, tf.SparseTensor)
  )
  if not is_dense or not features.dtype.is_floating:
    kind = features.dtype.name if is_dense else type(features).__name__
    raise UserError(
      f"the backbone gives features of {kind}; needed is a dense float tensor of "
      f"{needed}."
    )
  shape = features.shape
  if shape.rank is None:
    return
  is_rank_right = shape.rank >= 2 if pooling == "flatten" else shape.rank == 4
  counts = {num_examples, shape[0] if shape.rank else num_examples} - {None}
  if not is_rank_right or len(counts) > 1:
    raise UserError(
      f"the backbone gives features of shape {shape.as_list()} for a batch of "
      f"{num_examples or 'B'}; Encoder.pooling={pooling!r} needs {needed}"
      + ("." if pooling == "flatten" else ", or set it to 'flatten'.")
    )
