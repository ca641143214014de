"""From serialized examples to inputs, in the graph.

Shapes: B examples, H × W pixels, C channels.
"""

from __future__ import annotations

from typing import Protocol

import gin
import tensorflow as tf

from trainer.data import declared_size
from trainer.data.abreast import each
from trainer.errors import UserError


class Decoder(Protocol):
  """Makes inputs of examples."""

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of one input."""

  @property
  def features(self) -> tuple[str, ...]:
    """Names of the features of an example that an input is made of."""

  def __call__(self, serialized: tf.Tensor) -> tf.Tensor:
    """[B] serialized `tf.train.Example` to [B, *shape] float32."""


@gin.register
class ImageDecoder:
  """PNG, JPEG, GIF (its first picture) and BMP to values in [0, 1].

  An image of another size is resized, smoothed where it shrinks, and rounded to the 256
  values of a byte.

  Args:
    height: H, pixels.
    width: W, pixels.
    channels: 1 for grey, 3 for colour; images are converted.
    feature: name of the feature that holds the file's bytes.
    max_pixels: an image that declares more is a bad record, and not decoded.

  Raises:
    UserError: a size or the limit is below 1, or channels are neither 1 nor 3.
  """

  def __init__(
    self,
    *,
    height: int,
    width: int,
    channels: int,
    feature: str = "image",
    max_pixels: int = 100_000_000,
  ):
    if height < 1 or width < 1 or channels not in (1, 3):
      raise UserError(
        f"ImageDecoder of {height} x {width} pixels and {channels} channels is not "
        "possible; sizes must be at least 1 and channels 1 or 3."
      )
    if max_pixels < 1:
      raise UserError(f"ImageDecoder.max_pixels={max_pixels} must be at least 1.")
    self.shape = (height, width, channels)
    self.features = (feature,)
    self._feature = feature
    self._max_pixels = max_pixels

  def __call__(self, serialized: tf.Tensor) -> tf.Tensor:
    """[B] string to [B, H, W, C] float32 in [0, 1]."""
    features = {self._feature: tf.io.FixedLenFeature([], tf.string)}
    return self.decode_files(tf.io.parse_example(serialized, features)[self._feature])

  def decode_files(self, files: tf.Tensor) -> tf.Tensor:
    """[B] string, bytes of image files, to [B, H, W, C] float32 in [0, 1]."""
    checked = self._checked(files)
    images = each(self._decode, checked, tf.TensorSpec(self.shape, tf.uint8))
    return tf.cast(images, tf.float32) / 255.0

  def _checked(self, files: tf.Tensor) -> tf.Tensor:
    """The files, none of which is a decompression bomb."""
    message = (
      "an image declares more pixels than the "
      f"{self._max_pixels:,} allowed by ImageDecoder.max_pixels"
    )
    is_small = declared_size.num_pixels(files) <= self._max_pixels
    check = tf.debugging.assert_equal(is_small, True, message)
    with tf.control_dependencies([] if check is None else [check]):
      return tf.identity(files)

  def _decode(self, file: tf.Tensor) -> tf.Tensor:
    height, width, channels = self.shape
    image = tf.io.decode_image(file, channels=channels, expand_animations=False)
    has_size = tf.reduce_all(tf.shape(image)[:2] == [height, width])
    image = tf.cond(has_size, lambda: image, lambda: self._resize(image))
    return tf.ensure_shape(image, self.shape)

  def _resize(self, image: tf.Tensor) -> tf.Tensor:
    resized = tf.image.resize(image, self.shape[:2], antialias=True)
    return tf.saturate_cast(tf.round(resized), tf.uint8)


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
    self.features = (feature,)
    self._feature = feature

  def __call__(self, serialized: tf.Tensor) -> tf.Tensor:
    """[B] string to [B, size] float32."""
    features = {self._feature: tf.io.FixedLenFeature(self.shape, tf.float32)}
    return tf.io.parse_example(serialized, features)[self._feature]
