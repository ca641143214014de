"""Augmentation that moves pixels: crops, shifts and rotations.

Each is one map of output places to input places for every image, done by one operation.

Shapes: G images of the global batch, L of this worker, H × W pixels, C channels.
"""

from __future__ import annotations

import math

import gin
import tensorflow as tf

from trainer.data.row_random import RowRandom
from trainer.errors import UserError


@gin.register
class Shift:
  """Images moved by whole pixels; what comes in is black.

  Args:
    pixels: at most so far, each way.

  Raises:
    UserError: fewer than 1.
  """

  def __init__(self, *, pixels: int):
    if pixels < 1:
      raise UserError(f"Shift.pixels={pixels} must be at least 1.")
    self._pixels = pixels

  def __call__(self, images: tf.Tensor, random: RowRandom) -> tf.Tensor:
    """[L, H, W, C] float32 to the same shape."""
    draws = random.uniform(2, -self._pixels - 0.5, self._pixels + 0.5)
    x, y = (tf.round(draw) for draw in draws)
    one, zero = tf.ones_like(x), tf.zeros_like(x)
    return _moved(images, random, (one, zero, x), (zero, one, y), "NEAREST", "CONSTANT")


@gin.register
class Rotation:
  """Images turned about their middle; edges are repeated.

  Args:
    degrees: at most so far, each way.

  Raises:
    UserError: not between 0 and 180.
  """

  def __init__(self, *, degrees: float):
    if not 0 < degrees <= 180:
      raise UserError(f"Rotation.degrees={degrees} must be above 0 and at most 180.")
    self._radians = math.radians(degrees)

  def __call__(self, images: tf.Tensor, random: RowRandom) -> tf.Tensor:
    """[L, H, W, C] float32 to the same shape."""
    (angle,) = random.uniform(1, -self._radians, self._radians)
    cos, sin = tf.cos(angle), tf.sin(angle)
    middle_y, middle_x = ((size - 1) / 2 for size in images.shape[1:3])
    return _moved(
      images,
      random,
      (cos, -sin, middle_x - cos * middle_x + sin * middle_y),
      (sin, cos, middle_y - sin * middle_x - cos * middle_y),
      "BILINEAR",
      "NEAREST",
    )


@gin.register
class CropAndResize:
  """A part of random size, proportions and place, as large as the image again.

  Args:
    min_area: least share of the image's area.
    max_stretch: width to height, times or divided by at most so much.

  Raises:
    UserError: the share is not in (0, 1], or the stretch is below 1.
  """

  def __init__(self, *, min_area: float, max_stretch: float = 4 / 3):
    if not 0 < min_area <= 1:
      raise UserError(f"CropAndResize.min_area={min_area} must be above 0, at most 1.")
    if max_stretch < 1:
      raise UserError(f"CropAndResize.max_stretch={max_stretch} must be at least 1.")
    self._min_area = min_area
    self._log_stretch = math.log(max_stretch)

  def __call__(self, images: tf.Tensor, random: RowRandom) -> tf.Tensor:
    """[L, H, W, C] float32 to the same shape."""
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
    return _moved(
      images, random, (width, zero, left), (zero, height, top), "BILINEAR", "NEAREST"
    )


def _moved(
  images: tf.Tensor,
  random: RowRandom,
  x_from: tuple[tf.Tensor, tf.Tensor, tf.Tensor],
  y_from: tuple[tf.Tensor, tf.Tensor, tf.Tensor],
  interpolation: str,
  fill_mode: str,
) -> tf.Tensor:
  """What stands at (x, y) comes from x_from · (x, y, 1) and y_from · (x, y, 1), [G]."""
  zero = tf.zeros_like(x_from[0])
  return tf.raw_ops.ImageProjectiveTransformV3(
    images=images,
    transforms=random.local(tf.stack([*x_from, *y_from, zero, zero], axis=1)),
    output_shape=images.shape[1:3],
    interpolation=interpolation,
    fill_mode=fill_mode,
    fill_value=0.0,
  )
