"""From serialized examples to inputs, in the graph.

Shapes: B examples, H × W pixels, C channels.
"""

from __future__ import annotations

from typing import Protocol

import gin
import tensorflow as tf

from trainer.errors import UserError


class Decoder(Protocol):
  """Makes inputs of examples."""

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of one input."""

  def __call__(self, serialized: tf.Tensor) -> tf.Tensor:
    """[B] serialized `tf.train.Example` to [B, *shape] float32."""


@gin.register
class ImageDecoder:
  """PNG, JPEG, GIF (its first picture) and BMP to values in [0, 1].

  An image of another size is resized, smoothed where it shrinks.

  Args:
    height: H, pixels.
    width: W, pixels.
    channels: 1 for grey, 3 for colour; images are converted.
    feature: name of the feature that holds the file's bytes.

  Raises:
    UserError: a size is below 1, or channels are neither 1 nor 3.
  """

  def __init__(self, *, height: int, width: int, channels: int, feature: str = "image"):
    if height < 1 or width < 1 or channels not in (1, 3):
      raise UserError(
        f"ImageDecoder of {height} x {width} pixels and {channels} channels is not "
        "possible; sizes must be at least 1 and channels 1 or 3."
      )
    self.shape = (height, width, channels)
    self._feature = feature

  def __call__(self, serialized: tf.Tensor) -> tf.Tensor:
    """[B] string to [B, H, W, C] float32 in [0, 1]."""
    features = {self._feature: tf.io.FixedLenFeature([], tf.string)}
    files = tf.io.parse_example(serialized, features)[self._feature]
    spec = tf.TensorSpec(self.shape, tf.float32)
    return tf.map_fn(self._decode, files, fn_output_signature=spec)

  def _decode(self, file: tf.Tensor) -> tf.Tensor:
    height, width, channels = self.shape
    image = tf.io.decode_image(file, channels=channels, expand_animations=False)
    image = tf.cast(image, tf.float32) / 255.0
    has_size = tf.reduce_all(tf.shape(image)[:2] == [height, width])
    image = tf.cond(
      has_size,
      lambda: image,
      lambda: tf.image.resize(image, [height, width], antialias=True),
    )
    return tf.ensure_shape(image, self.shape)


@gin.register
class VectorDecoder:
  """Vectors of floats, as they are.

  Args:
    size: length of a vector.
    feature: name of the feature that holds it.

  Raises:
    UserError: the size is below 1.
  """

  def __init__(self, *, size: int, feature: str = "vector"):
    if size < 1:
      raise UserError(f"VectorDecoder.size={size} must be at least 1.")
    self.shape = (size,)
    self._feature = feature

  def __call__(self, serialized: tf.Tensor) -> tf.Tensor:
    """[B] string to [B, size] float32."""
    features = {self._feature: tf.io.FixedLenFeature(self.shape, tf.float32)}
    return tf.io.parse_example(serialized, features)[self._feature]
