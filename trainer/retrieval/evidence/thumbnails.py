"""Pictures made small, alone and many in one.

Shapes: N pictures, H × W pixels, C channels.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from trainer.retrieval.evidence.record import Sprite

# PNG files above both limits are worth JPEG's loss.
_MAX_PNG_BYTES, _MAX_PNG_BYTES_PER_PIXEL = 2_000, 0.5
_JPEG_QUALITY = 80


def shrink(pictures: Sequence[bytes], max_side: int) -> np.ndarray:
  """Pictures of one size, each side at most so long; a smaller one stays as it is.

  Args:
    pictures: N PNG files, all of one size.
    max_side: pixels.

  Returns:
    [N, H, W, C] uint8.
  """
  images = np.stack([tf.io.decode_png(picture).numpy() for picture in pictures])
  height, width = images.shape[1:3]
  scale = min(1.0, max_side / max(height, width))
  if scale == 1.0:
    return images
  size = [max(1, round(height * scale)), max(1, round(width * scale))]
  resized = tf.image.resize(images, size, antialias=True)
  return tf.saturate_cast(tf.round(resized), tf.uint8).numpy()


def data_uri(image: np.ndarray) -> str:
  """The picture as text: PNG, or JPEG where that would be large.

  Args:
    image: [H, W, C] uint8.
  """
  content, kind = tf.io.encode_png(image).numpy(), "png"
  num_pixels = image.shape[0] * image.shape[1]
  if len(content) > max(_MAX_PNG_BYTES, _MAX_PNG_BYTES_PER_PIXEL * num_pixels):
    content, kind = tf.io.encode_jpeg(image, quality=_JPEG_QUALITY).numpy(), "jpeg"
  return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def mosaic(images: np.ndarray) -> np.ndarray:
  """Pictures in rows, as near to a square as it goes; the rest is black.

  Args:
    images: [N, H, W, C] uint8.

  Returns:
    [rows · H, columns · W, C] uint8.
  """
  num, height, width, channels = images.shape
  columns = math.ceil(math.sqrt(num))
  rows = math.ceil(num / columns)
  padded = np.zeros((rows * columns, height, width, channels), np.uint8)
  padded[:num] = images
  grid = padded.reshape(rows, columns, height, width, channels)
  return grid.swapaxes(1, 2).reshape(rows * height, columns * width, channels)


def sprite(images: np.ndarray) -> Sprite:
  """Pictures as one.

  Args:
    images: [N, H, W, C] uint8.
  """
  height, width = images.shape[1:3]
  whole = mosaic(images)
  return Sprite(
    picture=data_uri(whole),
    columns=whole.shape[1] // width,
    rows=whole.shape[0] // height,
    width=width,
    height=height,
  )
