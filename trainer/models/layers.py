"""Layers whose results do not depend on the number of replicas.

Dropout: its mask is a pure function of step, layer and example. An example has the same
mask for every split of the global batch: on any number of replicas, in any micro-batch,
and when it is computed again.

Batch normalisation: synchronised over replicas, with equal moving averages.

Shapes: B examples (of batch normalisation: on each replica), R replicas, C channels, F
features of an example.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple, Optional

import tensorflow as tf

from trainer.distribute.collectives import current_collectives


class _Position(NamedTuple):
  """The position of the current examples.

  Attributes:
    step: [] integer.
    first_example: [] int32, index of the first example in the global batch.
  """

  step: tf.Tensor
  first_example: tf.Tensor


_positions: list[_Position] = []


@contextlib.contextmanager
def example_scope(step: tf.Tensor, first_example: tf.Tensor) -> Iterator[None]:
  """Sets the position of the examples while a function is traced.

  Args:
    step: [] integer; each step has a different mask.
    first_example: [] int32, index of the first example in the global batch.
  """
  _positions.append(_Position(step, first_example))
  try:
    yield
  finally:
    _positions.pop()


def set_seed(encoder: tf.keras.Model, seed: int) -> None:
  """Sets the seed of the encoder's dropout layers.

  Args:
    encoder: its layers exist.
    seed: each seed has different masks.
  """
  for layer in encoder.submodules:
    if isinstance(layer, Dropout):
      layer.seed = seed % 2**32


class Dropout(tf.keras.layers.Layer):
  """Dropout layer: zeroes a fraction of features in training, and scales up the rest.

  Outside `example_scope` the mask is arbitrary.

  Args:
    rate: fraction of the features that is dropped, in [0, 1).
    noise_shape: as in Keras; 1 for an axis along which features are dropped together.

  Attributes:
    number: index of this layer in its encoder, so that no two have the same masks.
    seed: of the run, in 0…2³²−1; each seed has different masks.
  """

  def __init__(self, rate: float, noise_shape: Optional[tuple] = None, **options):
    super().__init__(**options)
    self.number = 0
    self.seed = 0
    self._rate = rate
    self._noise_shape = noise_shape

  def call(self, features, training=None):
    """Maps [B, ...] float to the same shape."""
    if not training or self._rate == 0:
      return features
    shape = list(features.shape)
    for axis, size in enumerate(self._noise_shape or ()):
      shape[axis] = shape[axis] if size is None else size
    uniform = self._uniform(shape) if _positions else tf.random.uniform(shape)
    scaled = features / tf.cast(1.0 - self._rate, features.dtype)
    return tf.where(uniform >= self._rate, scaled, tf.zeros_like(features))

  def get_config(self):
    """Returns the arguments that Keras needs to copy the layer."""
    return {
      **super().get_config(),
      "rate": self._rate,
      "noise_shape": self._noise_shape,
    }

  def _uniform(self, shape: list[int]) -> tf.Tensor:
    """Draws [B, ...] float32 in [0, 1) by the position of each example and feature."""
    layer = _mix(
      _mix(tf.constant(self.seed, tf.uint32)) + tf.constant(self.number, tf.uint32)
    )
    step = _mix(tf.cast(_positions[-1].step, tf.uint32) + tf.constant(1, tf.uint32))
    return _uniform(shape, _mix(step + layer), _positions[-1].first_example)


def _uniform(shape: list[int], seed: tf.Tensor, first_example: tf.Tensor) -> tf.Tensor:
  num_features = tf.TensorShape(shape[1:]).num_elements()
  examples = tf.cast(first_example + tf.range(shape[0]), tf.uint32)
  rows = _mix(seed + examples)
  features = tf.range(num_features, dtype=tf.int32)
  bits = _mix(rows[:, None] + _mix(tf.cast(features, tf.uint32))[None, :])
  # A float32 has 24 significant bits.
  top = tf.cast(tf.bitwise.right_shift(bits, tf.constant(8, tf.uint32)), tf.float32)
  return tf.reshape(top * 2.0**-24, shape)


def _mix(values: tf.Tensor) -> tf.Tensor:
  """Applies the finalizer of MurmurHash3 to uint32: all bits depend on all bits."""
  for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
    shifted = tf.bitwise.right_shift(values, tf.constant(shift, tf.uint32))
    values = tf.bitwise.bitwise_xor(values, shifted) * tf.constant(factor, tf.uint32)
  return values


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
