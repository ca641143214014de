"""From serialized examples to inputs, in the graph.

Shapes: B examples, H × W pixels, C channels.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Optional, Protocol

import gin
import tensorflow as tf
from PIL import Image, ImageColor

from trainer.data import orientation, pixels
from trainer.data.abreast import each
from trainer.errors import UserError

# Files that are not plain and are decoded at once.
_PARALLEL_FILES = 32


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

  Images are turned upright by their Exif orientation. An image of another size is
  resized, smoothed where it shrinks, and rounded to the 256 values of a byte. BMP must
  be uncompressed, of 8, 24 or 32 bits for each pixel. Ingest converts other formats.

  Args:
    height: H, pixels.
    width: W, pixels.
    channels: 1 for grey, 3 for colour; images are converted.
    feature: name of the feature that holds the file's bytes.
    max_pixels: an image that declares more is a bad record, and not decoded.
    background: colour under transparent pixels of PNG, as a name ("white") or
      "#rrggbb"; None drops alpha, which leaves the colours that the file holds there.

  Raises:
    UserError: a size or the limit is below 1, channels are neither 1 nor 3, or the
      background is not a colour.
  """

  def __init__(
    self,
    *,
    height: int,
    width: int,
    channels: int,
    feature: str = "image",
    max_pixels: int = 100_000_000,
    background: Optional[str] = None,
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
    self._black = _black_png(self.shape)
    self._background = None if background is None else _colour(background)

  def __call__(self, serialized: tf.Tensor) -> tf.Tensor:
    """[B] string to [B, H, W, C] float32 in [0, 1]."""
    features = {self._feature: tf.io.FixedLenFeature([], tf.string)}
    return self.decode_files(tf.io.parse_example(serialized, features)[self._feature])

  def decode_files(self, files: tf.Tensor) -> tf.Tensor:
    """[B] string, bytes of image files, to [B, H, W, C] float32 in [0, 1]."""
    facts = pixels.facts(
      files,
      channels=self.shape[-1],
      has_background=self._background is not None,
    )
    files = self._checked(files, facts)
    # A branch for each file would slow down the many that need none.
    are_plain = tf.reduce_all(facts.is_plain)
    plain = tf.cond(
      are_plain, lambda: files, lambda: tf.where(facts.is_plain, files, self._black)
    )
    images = each(self._decode_plain, plain, tf.TensorSpec(self.shape, tf.uint8))
    images = tf.cond(
      are_plain,
      lambda: images,
      lambda: self._with_others(images, files, facts),
    )
    return tf.cast(images, tf.float32) / 255.0

  def _checked(self, files: tf.Tensor, facts: pixels.Facts) -> tf.Tensor:
    """The files, none of which is a decompression bomb or would be decoded wrongly."""
    is_small = facts.num_pixels <= self._max_pixels
    checks = [
      tf.debugging.assert_equal(
        is_small,
        True,
        "an image declares more pixels than the "
        f"{self._max_pixels:,} allowed by ImageDecoder.max_pixels",
      ),
      tf.debugging.assert_equal(
        facts.is_refused,
        False,
        "an image is WebP, or BMP that is compressed or not of 8, 24 or 32 bits for "
        "each pixel; ingest converts it",
      ),
    ]
    with tf.control_dependencies([check for check in checks if check is not None]):
      return tf.identity(files)

  def _decode_plain(self, file: tf.Tensor) -> tf.Tensor:
    height, width, channels = self.shape
    image = tf.io.decode_image(file, channels=channels, expand_animations=False)
    return tf.ensure_shape(_sized(image, [height, width]), self.shape)

  def _with_others(
    self, images: tf.Tensor, files: tf.Tensor, facts: pixels.Facts
  ) -> tf.Tensor:
    """The images, with those of files that are not plain in their places."""
    places = tf.where(~facts.is_plain)

    def decode(row: tuple[tf.Tensor, ...]) -> tf.Tensor:
      file, kind, orientation_of_file = row
      image = pixels.decode(
        file, kind, channels=self.shape[-1], background=self._background
      )
      # Turned when they are small: turning a photo costs as much as decoding it.
      height, width, _ = self.shape
      size = tf.where(orientation_of_file >= 5, [width, height], [height, width])
      turned = orientation.turn_upright(_sized(image, size), orientation_of_file)
      return tf.ensure_shape(turned, self.shape)

    others = tf.map_fn(
      decode,
      tuple(tf.gather_nd(c, places) for c in (files, facts.kind, facts.orientation)),
      fn_output_signature=tf.TensorSpec(self.shape, tf.uint8),
      parallel_iterations=_PARALLEL_FILES,
    )
    return tf.tensor_scatter_nd_update(images, places, others)


def _sized(image: tf.Tensor, size: Sequence[int] | tf.Tensor) -> tf.Tensor:
  """The image in a size of height and width, rounded to bytes."""

  def resize() -> tf.Tensor:
    resized = tf.image.resize(image, size, antialias=True)
    return tf.saturate_cast(tf.round(resized), tf.uint8)

  has_size = tf.reduce_all(tf.shape(image)[:2] == size)
  return tf.cond(has_size, lambda: image, resize)


def _black_png(shape: tuple[int, ...]) -> bytes:
  """A PNG file of a size that needs no resizing."""
  height, width, channels = shape
  file = io.BytesIO()
  Image.new("L" if channels == 1 else "RGB", (width, height)).save(file, "PNG")
  return file.getvalue()


def _colour(name: str) -> tuple[int, int, int]:
  """Red, green and blue, 0 ... 255, of a colour."""
  try:
    red, green, blue = ImageColor.getrgb(name)[:3]
  except (ValueError, TypeError) as error:
    raise UserError(
      f"ImageDecoder.background={name!r} is not a colour; give a name such as 'white', "
      "or '#rrggbb'."
    ) from error
  return red, green, blue


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
