"""Random augmentation of images, computed for a whole batch in the graph.

The random numbers of a row depend on the seed, the step and the row's position in the
global batch. They do not depend on threads, workers or replicas. Random numbers, and
values derived from them, are computed for all rows before this worker's rows are
selected: the last bit of a root or an exponential may depend on the number of values
computed at once.

The module uses plain TensorFlow, so the results are the same on every TensorFlow
version that the package supports. Each geometric change is one map from output to input
coordinates per image, applied by a single operation.

Shapes: G rows of the global batch, L rows of this worker, H × W pixels, C channels;
values in [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import gin
import tensorflow as tf

from trainer.errors import UserError, check_at_least

# Salt that separates this use of the seed from others.
_SALT = 0x5EED


class RowRandom:
  """Random numbers for this worker's rows of a step.

  Args:
    seed: random seed of the run.
    step: scalar int64.
    num_rows: G.
    first_row: position of this worker's first row.
    num_local_rows: L.
  """

  def __init__(
    self,
    seed: int,
    step: tf.Tensor,
    *,
    num_rows: int,
    first_row: int,
    num_local_rows: int,
  ):
    self._seed = seed
    self._step = step
    self._num_rows = num_rows
    self._rows = slice(first_row, first_row + num_local_rows)
    self._num_calls = 0

  def uniform(
    self, num_values: int, low: float = 0.0, high: float = 1.0
  ) -> list[tf.Tensor]:
    """Draws uniform numbers, different for every call.

    Args:
      num_values: numbers per row.
      low: lower bound, inclusive.
      high: upper bound, exclusive.

    Returns:
      `num_values` float32 tensors [G].
    """
    self._num_calls += 1
    salted = self._seed * 1_000_003 + _SALT + self._num_calls
    seed = tf.stack([tf.constant(salted % 2**63, tf.int64), self._step])
    shape = [self._num_rows, num_values]
    values = tf.random.stateless_uniform(shape, seed, low, high)
    return tf.unstack(values, axis=1)

  def local(self, values: tf.Tensor) -> tf.Tensor:
    """Selects this worker's rows: [G, ...] to [L, ...]."""
    return values[self._rows]


class Transform(Protocol):
  """A random change of images."""

  def __call__(self, images: tf.Tensor, random: RowRandom) -> tf.Tensor:
    """Maps [L, H, W, C] float32 to the same shape."""


@gin.register
class Augmentation:
  """A sequence of random changes.

  Attributes:
    seed: random seed.

  Args:
    transforms: applied in this order.
    seed: see above.
  """

  def __init__(self, *, transforms: Sequence[Transform], seed: int):
    self.seed = seed
    self._transforms = list(transforms)

  def __call__(self, images: tf.Tensor, random: RowRandom) -> tf.Tensor:
    """Maps [L, H, W, C] float32 to the same shape; values are clipped to [0, 1]."""
    shape = images.shape
    for transform in self._transforms:
      images = transform(images, random)
    return tf.ensure_shape(tf.clip_by_value(images, 0.0, 1.0), shape)


@gin.register
class Flip:
  """Horizontal flip of half of the images."""

  def __call__(self, images: tf.Tensor, random: RowRandom) -> tf.Tensor:
    """Maps [L, H, W, C] float32 to the same shape."""
    (draw,) = random.uniform(1)
    return tf.where(
      _per_image(random.local(draw) < 0.5), tf.reverse(images, [2]), images
    )


@gin.register
class Colour:
  """Random changes of brightness, contrast and saturation.

  Args:
    brightness: values are multiplied by a factor in 1 ± brightness.
    contrast: differences from the image's mean are multiplied by 1 ± contrast.
    saturation: differences from the pixel's grey are multiplied by 1 ± saturation.

  Raises:
    UserError: one of them is not between 0 and 1.
  """

  def __init__(
    self, *, brightness: float = 0.0, contrast: float = 0.0, saturation: float = 0.0
  ):
    self._strengths = (brightness, contrast, saturation)
    for name, value in zip(("brightness", "contrast", "saturation"), self._strengths):
      if not 0 <= value <= 1:
        raise UserError(f"Colour.{name}={value} must be between 0 and 1.")

  def __call__(self, images: tf.Tensor, random: RowRandom) -> tf.Tensor:
    """Maps [L, H, W, C] float32 to the same shape."""
    brightness, contrast, saturation = (
      _per_image(1.0 + strength * random.local(draw))
      for strength, draw in zip(self._strengths, random.uniform(3, -1.0, 1.0))
    )
    images = images * brightness
    mean = tf.reduce_mean(images, axis=[1, 2, 3], keepdims=True)
    images = mean + (images - mean) * contrast
    grey = tf.reduce_mean(images, axis=3, keepdims=True)
    return tf.clip_by_value(grey + (images - grey) * saturation, 0.0, 1.0)


@gin.register
class Cutout:
  """Cutout: a grey square in each image (DeVries and Taylor 2017,
  https://arxiv.org/abs/1708.04552).

  Args:
    side_fraction: side of the square as a fraction of the image's shorter side.

  Raises:
    UserError: the fraction is not between 0 and 1.
  """  # noqa: D205

  def __init__(self, *, side_fraction: float):
    if not 0 < side_fraction < 1:
      raise UserError(f"Cutout.side_fraction={side_fraction} must be between 0 and 1.")
    self._side_fraction = side_fraction

  def __call__(self, images: tf.Tensor, random: RowRandom) -> tf.Tensor:
    """Maps [L, H, W, C] float32 to the same shape."""
    height, width = images.shape[1:3]
    half = self._side_fraction * min(height, width) / 2
    y, x = map(random.local, random.uniform(2))
    rows = tf.abs(tf.range(height, dtype=tf.float32) + 0.5 - (y * height)[:, None])
    columns = tf.abs(tf.range(width, dtype=tf.float32) + 0.5 - (x * width)[:, None])
    inside = (rows < half)[:, :, None, None] & (columns < half)[:, None, :, None]
    return tf.where(inside, 0.5, images)


@gin.register
class Blur:
  """Gaussian blur of random width.

  Args:
    max_sigma: largest standard deviation, pixels.

  Raises:
    UserError: it is not positive.
  """

  def __init__(self, *, max_sigma: float):
    if max_sigma <= 0:
      raise UserError(f"Blur.max_sigma={max_sigma} must be greater than 0.")
    self._max_sigma = max_sigma

  def __call__(self, images: tf.Tensor, random: RowRandom) -> tf.Tensor:
    """Maps [L, H, W, C] float32 to the same shape."""
    (sigma,) = random.uniform(1, 0.01, self._max_sigma)
    radius = max(1, round(2.5 * self._max_sigma))
    offsets = tf.range(-radius, radius + 1, dtype=tf.float32)
    weights = tf.exp(-0.5 * (offsets / sigma[:, None]) ** 2)
    weights = random.local(weights / tf.reduce_sum(weights, axis=1, keepdims=True))
    for axis in (1, 2):
      images = _weighted_shifts(images, weights, radius, axis)
    return images


def _weighted_shifts(
  images: tf.Tensor, weights: tf.Tensor, radius: int, axis: int
) -> tf.Tensor:
  """Returns Σ_i weights[:, i] · images shifted by i − radius; edges are repeated."""
  size = images.shape[axis]
  places = tf.range(-radius, size + radius)
  padded = tf.gather(images, tf.clip_by_value(places, 0, size - 1), axis=axis)
  total = tf.zeros_like(images)
  for number in range(2 * radius + 1):
    window = tf.gather(padded, tf.range(number, number + size), axis=axis)
    total += _per_image(weights[:, number]) * window
  return total


def _per_image(values: tf.Tensor) -> tf.Tensor:
  """Reshapes [L] to [L, 1, 1, 1]."""
  return tf.reshape(values, [-1, 1, 1, 1])


@gin.register
class Shift:
  """Random shift by whole pixels; uncovered pixels are black.

  Args:
    pixels: largest shift in each direction.

  Raises:
    UserError: fewer than 1.
  """

  def __init__(self, *, pixels: int):
    check_at_least("Shift.pixels", pixels, 1)
    self._pixels = pixels

  def __call__(self, images: tf.Tensor, random: RowRandom) -> tf.Tensor:
    """Maps [L, H, W, C] float32 to the same shape."""
    draws = random.uniform(2, -self._pixels - 0.5, self._pixels + 0.5)
    x, y = (tf.round(draw) for draw in draws)
    one, zero = tf.ones_like(x), tf.zeros_like(x)
    return _warp(images, random, (one, zero, x), (zero, one, y), "NEAREST", "CONSTANT")


@gin.register
class Rotation:
  """Random rotation about the centre; edges are repeated.

  Args:
    degrees: largest angle in each direction.

  Raises:
    UserError: not between 0 and 180.
  """

  def __init__(self, *, degrees: float):
    if not 0 < degrees <= 180:
      raise UserError(
        f"Rotation.degrees={degrees} must be greater than 0 and at most 180."
      )
    self._radians = math.radians(degrees)

  def __call__(self, images: tf.Tensor, random: RowRandom) -> tf.Tensor:
    """Maps [L, H, W, C] float32 to the same shape."""
    (angle,) = random.uniform(1, -self._radians, self._radians)
    cos, sin = tf.cos(angle), tf.sin(angle)
    middle_y, middle_x = ((size - 1) / 2 for size in images.shape[1:3])
    return _warp(
      images,
      random,
      (cos, -sin, middle_x - cos * middle_x + sin * middle_y),
      (sin, cos, middle_y - sin * middle_x - cos * middle_y),
      "BILINEAR",
      "NEAREST",
    )


@gin.register
class CropAndResize:
  """Random crop of random area and aspect ratio, resized to the size of the image.

  Args:
    min_area: smallest fraction of the image's area.
    max_stretch: largest factor by which the aspect ratio is multiplied or divided.

  Raises:
    UserError: the fraction is not in (0, 1], or the stretch is below 1.
  """

  def __init__(self, *, min_area: float, max_stretch: float = 4 / 3):
    if not 0 < min_area <= 1:
      raise UserError(
        f"CropAndResize.min_area={min_area} must be greater than 0 and at most 1."
      )
    check_at_least("CropAndResize.max_stretch", max_stretch, 1)
    self._min_area = min_area
    self._log_stretch = math.log(max_stretch)

  def __call__(self, images: tf.Tensor, random: RowRandom) -> tf.Tensor:
    """Maps [L, H, W, C] float32 to the same shape."""
    (area,) = random.uniform(1, self._min_area, 1.0)
    (log_stretch,) = random.uniform(1, -self._log_stretch, self._log_stretch)
    place_x, place_y = random.uniform(2)
    stretch = tf.exp(log_stretch / 2)
    width = tf.minimum(tf.sqrt(area) * stretch, 1.0)
    height = tf.minimum(tf.sqrt(area) / stretch, 1.0)
    num_rows, num_columns = images.shape[1:3]
    left = place_x * (1 - width) * (num_columns - 1)
    top = place_y * (1 - height) * (num_rows - 1)
    zero = tf.zeros_like(width)
    return _warp(
      images, random, (width, zero, left), (zero, height, top), "BILINEAR", "NEAREST"
    )


def _warp(
  images: tf.Tensor,
  random: RowRandom,
  x_from: tuple[tf.Tensor, tf.Tensor, tf.Tensor],
  y_from: tuple[tf.Tensor, tf.Tensor, tf.Tensor],
  interpolation: str,
  fill_mode: str,
) -> tf.Tensor:
  """Moves pixels to (x, y) from (x_from · (x, y, 1), y_from · (x, y, 1)), each [G]."""
  zero = tf.zeros_like(x_from[0])
  return tf.raw_ops.ImageProjectiveTransformV3(
    images=images,
    transforms=random.local(tf.stack([*x_from, *y_from, zero, zero], axis=1)),
    output_shape=images.shape[1:3],
    interpolation=interpolation,
    fill_mode=fill_mode,
    fill_value=0.0,
  )
