"""Augmentation: images changed at random, each on its own, many at once in the graph.

Plain TensorFlow, so that it is the same on every TensorFlow this package runs on.

Shapes: L images, H × W pixels, C channels; values in [0, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import gin
import tensorflow as tf

from trainer.data.row_random import RowRandom
from trainer.errors import UserError


class Change(Protocol):
  """Changes images at random."""

  def __call__(self, images: tf.Tensor, random: RowRandom) -> tf.Tensor:
    """[L, H, W, C] float32 to the same shape."""


@gin.register
class Augmentation:
  """Changes in a row, the first one first.

  Attributes:
    seed: another seed, other changes.

  Args:
    changes: applied in this order.
    seed: see above.
  """

  def __init__(self, *, changes: Sequence[Change], seed: int):
    self.seed = seed
    self._changes = list(changes)

  def __call__(self, images: tf.Tensor, random: RowRandom) -> tf.Tensor:
    """[L, H, W, C] float32 to the same shape, values kept in [0, 1]."""
    shape = images.shape
    for change in self._changes:
      images = change(images, random)
    return tf.ensure_shape(tf.clip_by_value(images, 0.0, 1.0), shape)


@gin.register
class Flip:
  """Left and right exchanged, in half of the images."""

  def __call__(self, images: tf.Tensor, random: RowRandom) -> tf.Tensor:
    """[L, H, W, C] float32 to the same shape."""
    (draw,) = random.uniform(1)
    return tf.where(
      _per_image(random.local(draw) < 0.5), tf.reverse(images, [2]), images
    )


@gin.register
class Colour:
  """Brightness, contrast and saturation changed by random factors.

  Args:
    brightness: values are times 1 ± so much.
    contrast: differences from the image's mean are times 1 ± so much.
    saturation: differences from each pixel's grey are times 1 ± so much.

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
    """[L, H, W, C] float32 to the same shape."""
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
  """A square of each image made grey (DeVries and Taylor 2017,
  https://arxiv.org/abs/1708.04552).

  Args:
    share: side of the square, as a share of the image's shorter side.

  Raises:
    UserError: the share is not between 0 and 1.
  """  # noqa: D205

  def __init__(self, *, share: float):
    if not 0 < share < 1:
      raise UserError(f"Cutout.share={share} must be between 0 and 1.")
    self._share = share

  def __call__(self, images: tf.Tensor, random: RowRandom) -> tf.Tensor:
    """[L, H, W, C] float32 to the same shape."""
    height, width = images.shape[1:3]
    half = self._share * min(height, width) / 2
    y, x = map(random.local, random.uniform(2))
    rows = tf.abs(tf.range(height, dtype=tf.float32) + 0.5 - (y * height)[:, None])
    columns = tf.abs(tf.range(width, dtype=tf.float32) + 0.5 - (x * width)[:, None])
    inside = (rows < half)[:, :, None, None] & (columns < half)[:, None, :, None]
    return tf.where(inside, 0.5, images)


@gin.register
class Blur:
  """Gaussian blur of a random width.

  Args:
    max_sigma: greatest width, pixels.

  Raises:
    UserError: it is not positive.
  """

  def __init__(self, *, max_sigma: float):
    if max_sigma <= 0:
      raise UserError(f"Blur.max_sigma={max_sigma} must be greater than 0.")
    self._max_sigma = max_sigma

  def __call__(self, images: tf.Tensor, random: RowRandom) -> tf.Tensor:
    """[L, H, W, C] float32 to the same shape."""
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
  """Σ_i weights[:, i] · images shifted by i − radius; edges are repeated."""
  size = images.shape[axis]
  places = tf.range(-radius, size + radius)
  padded = tf.gather(images, tf.clip_by_value(places, 0, size - 1), axis=axis)
  total = tf.zeros_like(images)
  for number in range(2 * radius + 1):
    window = tf.gather(padded, tf.range(number, number + size), axis=axis)
    total += _per_image(weights[:, number]) * window
  return total


def _per_image(values: tf.Tensor) -> tf.Tensor:
  """[L] to [L, 1, 1, 1]."""
  return tf.reshape(values, [-1, 1, 1, 1])
