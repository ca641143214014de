"""Image files to pixels, in the graph: formats, palettes, alpha, grey.

Shapes: B files, H × W pixels, C channels.
"""

from __future__ import annotations

from typing import NamedTuple, Optional

import tensorflow as tf

from trainer.data import declared_size, orientation

# 16-bit fixed-point weights of red, green and blue (ITU-R BT.601), as Pillow's.
_GREY_WEIGHTS = (19595, 38470, 7471)

_OTHER, _PALETTE_BMP, _ALPHA_PNG = range(3)
_BMP_HEADER_BYTES = 14
# What BMP needs to say how its pixels are kept.
_HEAD_BYTES = 34


class Facts(NamedTuple):
  """What the first bytes of files say.

  Attributes:
    num_pixels: [B] int64, declared; 0 where the format is not known.
    is_plain: [B] bool, JPEG and PNG that TensorFlow alone decodes as wanted.
    kind: [B] int32, which way another file is decoded.
    orientation: [B] int32, 1 ... 8 as Exif has it.
    is_refused: [B] bool, BMP and WebP files that TensorFlow decodes wrongly, or not in
      every version.
  """

  num_pixels: tf.Tensor
  is_plain: tf.Tensor
  kind: tf.Tensor
  orientation: tf.Tensor
  is_refused: tf.Tensor


def facts(files: tf.Tensor, *, channels: int, has_background: bool) -> Facts:
  """Reads the first bytes of image files.

  Args:
    files: [B] string.
    channels: C, 1 or 3.
    has_background: whether transparent pixels are laid over one.
  """
  heads = tf.io.decode_raw(files, tf.uint8, fixed_length=_HEAD_BYTES)
  heads = tf.cast(heads, tf.int32)
  declared = declared_size.read(files)
  orientations = orientation.of_files(files)
  is_png = tf.reduce_all(heads[:, :4] == tf.constant(list(b"\x89PNG")), axis=1)
  is_bmp = tf.reduce_all(heads[:, :2] == tf.constant(list(b"BM")), axis=1)
  is_webp = tf.reduce_all(heads[:, 8:12] == tf.constant(list(b"WEBP")), axis=1)
  # libjpeg makes grey of one or three components, not of four (CMYK).
  is_plain = (declared.num_components >= 1) & (declared.num_components <= 3)
  is_plain |= (declared.num_components == 4) & (channels == 3)
  is_plain = (is_plain | (is_png & (not has_background))) & (orientations == 1)
  kind = tf.where(is_bmp & (heads[:, 28] == 8), _PALETTE_BMP, _OTHER)
  kind = tf.where(is_png, _ALPHA_PNG, kind) if has_background else kind
  is_decoded = (heads[:, 14] >= 40) & (heads[:, 30] == 0) & (heads[:, 29] == 0)
  is_decoded &= (heads[:, 28] == 8) | (heads[:, 28] == 24) | (heads[:, 28] == 32)
  return Facts(
    declared.num_pixels,
    is_plain,
    kind,
    orientations,
    (is_bmp & ~is_decoded) | is_webp,
  )


def decode(
  file: tf.Tensor,
  kind: tf.Tensor,
  *,
  channels: int,
  background: Optional[tuple[int, int, int]] = None,
) -> tf.Tensor:
  """Decodes an image file that is not plain to pixels, turned as it holds them.

  Args:
    file: [] string.
    kind: [] int32, as in `Facts`.
    channels: C, 1 or 3.
    background: red, green and blue under transparent pixels; None drops alpha, which
      leaves the colours that the file holds there.

  Returns:
    [H, W, C] uint8.
  """
  branches = [
    lambda: tf.io.decode_image(file, channels=3, expand_animations=False),
    lambda: _palette_bmp(file),
  ]
  if background is not None:
    branches.append(lambda: _over(background, file))
  image = tf.ensure_shape(tf.switch_case(kind, branches), [None, None, 3])
  return image if channels == 3 else _grey(image)


def _over(background: tuple[int, int, int], file: tf.Tensor) -> tf.Tensor:
  """A PNG file over a colour."""
  # Of 4 channels TensorFlow makes a wrong alpha where pixels have less than 8 bits.
  image = tf.cast(tf.io.decode_png(file), tf.int32)
  num_channels = tf.shape(image)[-1]
  num_colours = num_channels - (num_channels + 1) % 2
  opaque = tf.pad(image, [[0, 0], [0, 0], [0, 1]], constant_values=255)
  alpha = opaque[..., num_colours : num_colours + 1]
  mixed = image[..., :num_colours] * alpha + tf.constant(background) * (255 - alpha)
  return tf.cast((mixed + 127) // 255, tf.uint8)


def _palette_bmp(file: tf.Tensor) -> tf.Tensor:
  """TensorFlow gives the numbers of the colours; the colours precede the pixels."""
  numbers = tf.io.decode_bmp(file)[..., 0]
  head = tf.strings.substr(file, 0, 18)
  head = tf.cast(tf.io.decode_raw(head, tf.uint8, fixed_length=18), tf.int32)
  factors = tf.constant([1, 1 << 8, 1 << 16, 1 << 24])
  first = _BMP_HEADER_BYTES + tf.reduce_sum(head[14:18] * factors)
  num_bytes = tf.clip_by_value(tf.reduce_sum(head[10:14] * factors) - first, 0, 1024)
  palette = tf.strings.substr(file, first, num_bytes)
  palette = tf.reshape(tf.io.decode_raw(palette, tf.uint8, fixed_length=1024), [256, 4])
  return tf.gather(palette[:, 2::-1], tf.cast(numbers, tf.int32))


def _grey(image: tf.Tensor) -> tf.Tensor:
  weighted = tf.cast(image, tf.int32) * tf.constant(_GREY_WEIGHTS)
  grey = (tf.reduce_sum(weighted, axis=-1, keepdims=True) + (1 << 15)) // (1 << 16)
  return tf.cast(grey, tf.uint8)
