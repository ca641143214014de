"""How many pixels images declare, in the graph, before anything is decoded.

The same as `image_head` finds in Python, for many files at once.

Shapes: B files.
"""

from __future__ import annotations

import tensorflow as tf

from trainer.data.abreast import each

# What the formats but JPEG need to say their size.
_HEAD_BYTES = 30


def num_pixels(files: tf.Tensor) -> tf.Tensor:
  """Width times height by the heads of image files.

  Args:
    files: [B] string.

  Returns:
    [B] int64; 0 where the format is not known.
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
  return tf.cond(
    tf.reduce_any(is_jpeg),
    lambda: tf.where(is_jpeg, _jpeg(files, is_jpeg), sizes),
    lambda: sizes,
  )


def _jpeg(files: tf.Tensor, is_jpeg: tf.Tensor) -> tf.Tensor:
  # A branch for each file would cost more than looking at a file in its place.
  smallest = tf.io.encode_jpeg(tf.zeros([1, 1, 1], tf.uint8))
  all_jpeg = tf.where(is_jpeg, files, smallest)
  shapes = each(tf.image.extract_jpeg_shape, all_jpeg, tf.TensorSpec([3], tf.int32))
  return tf.reduce_prod(tf.cast(shapes[:, :2], tf.int64), axis=1)


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
