"""Pixels and components that images declare, in the graph, before decoding.

The same as `image_head` finds in Python, for many files at once.

Shapes: B files.
"""

from __future__ import annotations

from typing import NamedTuple

import tensorflow as tf

from trainer.data.abreast import each

# What the formats but JPEG need to say their size.
_HEAD_BYTES = 30


class Declared(NamedTuple):
  """What the heads of image files say.

  Attributes:
    num_pixels: [B] int64, width times height; 0 where the format is not known.
    num_components: [B] int32, of JPEG files; 0 for the others.
  """

  num_pixels: tf.Tensor
  num_components: tf.Tensor


def read(files: tf.Tensor) -> Declared:
  """Reads what the heads of image files say.

  Args:
    files: [B] string.
  """
  heads = tf.cast(tf.io.decode_raw(files, tf.uint8, fixed_length=_HEAD_BYTES), tf.int64)
  is_jpeg = _starts_with(heads, b"\xff\xd8\xff")
  sizes = tf.where(
    _starts_with(heads, b"\x89PNG"), _big_endian(heads, 16) * _big_endian(heads, 20), 0
  )
  gif = _little_endian(heads, 6, 2) * _little_endian(heads, 8, 2)
  sizes = tf.where(_starts_with(heads, b"GIF8"), gif, sizes)
  bmp = _signed(_little_endian(heads, 18, 4)) * _signed(_little_endian(heads, 22, 4))
  sizes = tf.where(_starts_with(heads, b"BM"), tf.abs(bmp), sizes)
  is_webp = _starts_with(heads, b"RIFF") & _starts_with(heads[:, 8:], b"WEBP")
  sizes = tf.where(is_webp, _webp(heads), sizes)
  # Where JPEG says its size is only found by going through what comes before.
  shapes = tf.cond(
    tf.reduce_any(is_jpeg),
    lambda: _jpeg(files, is_jpeg),
    lambda: tf.zeros([tf.size(files), 3], tf.int32),
  )
  jpeg = tf.reduce_prod(tf.cast(shapes[:, :2], tf.int64), axis=1)
  return Declared(tf.where(is_jpeg, jpeg, sizes), tf.where(is_jpeg, shapes[:, 2], 0))


def _jpeg(files: tf.Tensor, is_jpeg: tf.Tensor) -> tf.Tensor:
  """[B, 3] int32: height, width and components of the JPEG files."""
  # A branch for each file would cost more than looking at a file in its place.
  smallest = tf.io.encode_jpeg(tf.zeros([1, 1, 1], tf.uint8))
  # Choosing copies the files.
  all_jpeg = tf.cond(
    tf.reduce_all(is_jpeg),
    lambda: files,
    lambda: tf.where(is_jpeg, files, smallest),
  )
  return each(tf.image.extract_jpeg_shape, all_jpeg, tf.TensorSpec([3], tf.int32))


def _webp(heads: tf.Tensor) -> tf.Tensor:
  """By the three kinds of a first chunk: lossy, lossless, extended."""
  mask = 0x3FFF
  lossy = (_little_endian(heads, 26, 2) & mask) * (_little_endian(heads, 28, 2) & mask)
  bits = _little_endian(heads, 21, 4)
  lossless = ((bits & mask) + 1) * ((tf.bitwise.right_shift(bits, 14) & mask) + 1)
  extended = (_little_endian(heads, 24, 3) + 1) * (_little_endian(heads, 27, 3) + 1)
  kind = heads[:, 12:]
  sizes = tf.where(_starts_with(kind, b"VP8L"), lossless, lossy)
  return tf.where(_starts_with(kind, b"VP8X"), extended, sizes)


def _starts_with(heads: tf.Tensor, magic: bytes) -> tf.Tensor:
  expected = tf.constant(list(magic), tf.int64)
  return tf.reduce_all(heads[:, : len(magic)] == expected, axis=1)


def _little_endian(heads: tf.Tensor, first: int, num_bytes: int) -> tf.Tensor:
  factors = tf.constant([1 << (8 * place) for place in range(num_bytes)], tf.int64)
  return tf.reduce_sum(heads[:, first : first + num_bytes] * factors, axis=1)


def _big_endian(heads: tf.Tensor, first: int) -> tf.Tensor:
  return _little_endian(tf.reverse(heads[:, first : first + 4], [1]), 0, 4)


def _signed(value: tf.Tensor) -> tf.Tensor:
  return tf.where(value >= 1 << 31, value - (1 << 32), value)
