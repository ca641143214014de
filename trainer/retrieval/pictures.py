"""Pictures of records, thumbnails, and grids of pictures.

Shapes: N pictures or records, H × W pixels, C channels.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from typing import Callable, Optional

import numpy as np
import tensorflow as tf

from trainer.data.images import Decoder
from trainer.data.records import RecordIndex
from trainer.retrieval.report_data import Sprite

# PNG files above both limits are stored as JPEG.
_MAX_PNG_BYTES, _MAX_PNG_BYTES_PER_PIXEL = 2_000, 0.5
_JPEG_QUALITY = 80

_RECORDS_AT_A_TIME = 64

_GAP, _AFTER_QUERY, _MIN_HEIGHT = 2, 10, 48
_WHITE = 255


def shrink(pictures: Sequence[bytes], max_side: int) -> np.ndarray:
  """Shrinks pictures to a maximum side; smaller pictures are unchanged.

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
  """Returns a data URI of a picture: PNG, or JPEG if the PNG is large.

  Args:
    image: [H, W, C] uint8.
  """
  content, kind = tf.io.encode_png(image).numpy(), "png"
  num_pixels = image.shape[0] * image.shape[1]
  if len(content) > max(_MAX_PNG_BYTES, _MAX_PNG_BYTES_PER_PIXEL * num_pixels):
    content, kind = tf.io.encode_jpeg(image, quality=_JPEG_QUALITY).numpy(), "jpeg"
  return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def mosaic(images: np.ndarray) -> np.ndarray:
  """Arranges pictures in rows, as nearly square as possible; the rest is black.

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
  """Combines pictures into one.

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


def pictures_of(
  index: RecordIndex, decoder: Decoder, record_numbers: np.ndarray
) -> Optional[Callable[[np.ndarray], list[bytes]]]:
  """Returns a function that makes PNG files of records; None for other inputs.

  Args:
    index: of the records.
    decoder: decodes records to inputs.
    record_numbers: [N] int64.

  Returns:
    A function from positions among the record numbers, [n] int64, to n files; None if
    inputs are not pictures.
  """
  shape = decoder.shape
  if len(shape) != 3 or shape[-1] not in (1, 3):
    return None

  def pictures(positions: np.ndarray) -> list[bytes]:
    files: list[bytes] = []
    for start in range(0, len(positions), _RECORDS_AT_A_TIME):
      numbers = record_numbers[positions[start : start + _RECORDS_AT_A_TIME]]
      records = tf.constant(index.read(numbers), tf.string)
      inputs = tf.round(tf.clip_by_value(decoder(records), 0.0, 1.0) * 255.0)
      files += [tf.io.encode_png(each).numpy() for each in tf.cast(inputs, tf.uint8)]
    return files

  return pictures


def grid_png(rows: Sequence[Sequence[Optional[np.ndarray]]]) -> bytes:
  """Returns a PNG file of a grid of pictures.

  Args:
    rows: of [H, W, C] uint8, all of one shape; None leaves a cell empty. Small pictures
      are enlarged by integer factors.
  """
  height, width, channels = next(p for row in rows for p in row if p is not None).shape
  factor = max(1, -(-_MIN_HEIGHT // height))
  high, wide = height * factor + _GAP, width * factor + _GAP
  longest = max(map(len, rows))
  shape = [len(rows) * high + _GAP, longest * wide + _GAP + _AFTER_QUERY, channels]
  canvas = np.full(shape, _WHITE, np.uint8)
  for y, row in enumerate(rows):
    for x, picture in enumerate(row):
      if picture is not None:
        top, left = _GAP + y * high, _GAP + x * wide + (_AFTER_QUERY if x else 0)
        enlarged = np.asarray(picture).repeat(factor, axis=0).repeat(factor, axis=1)
        canvas[top : top + high - _GAP, left : left + wide - _GAP] = enlarged
  return tf.io.encode_png(canvas).numpy()
