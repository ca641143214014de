"""Exif orientation of image files, read in the graph, and rotation of images.

Cameras store the sensor's rows and an orientation tag. Most files have no such tag;
only those with metadata before their pixels are searched.

Shapes: B files, N of them with metadata, H × W pixels, C channels.
"""

from __future__ import annotations

from typing import NamedTuple

import tensorflow as tf

# First bytes of a file that show whether metadata follows.
_HEAD_BYTES = 44

# Segments and chunks before the pixels; later ones are not searched.
_MAX_STEPS = 256
# Entries of the first Exif directory. It is sorted, and the orientation is among the
# first entries.
_MAX_ENTRIES = 64
_ORIENTATION_TAG, _SHORT, _LONG = 0x0112, 3, 4
# JPEG markers after which no metadata follows: frame, tables, restart interval.
_TABLE_MARKERS = (0xC0, 0xC1, 0xC2, 0xC4, 0xDB, 0xDD)


class _Cursor(NamedTuple):
  """The state of the search in each file.

  Attributes:
    position: [N] int32, of the next segment or chunk.
    exif: [N] int32, of the Exif data's first byte; 0 if none is found yet.
    is_done: [N] bool.
  """

  position: tf.Tensor
  exif: tf.Tensor
  is_done: tf.Tensor


def read_orientations(files: tf.Tensor) -> tf.Tensor:
  """Reads the orientation of image files.

  Args:
    files: [B] string.

  Returns:
    [B] int32, 1 ... 8 as in Exif; 1 is upright, also for files without the tag.
  """
  heads = tf.io.decode_raw(files, tf.uint8, fixed_length=_HEAD_BYTES)
  heads = tf.cast(heads, tf.int32)
  may_have = _may_have_metadata(heads)
  upright = tf.ones_like(heads[:, 0])

  def read() -> tf.Tensor:
    positions = tf.where(may_have)
    orientations = _read(tf.gather_nd(files, positions), tf.gather_nd(heads, positions))
    return tf.tensor_scatter_nd_update(upright, positions, orientations)

  return tf.cond(tf.reduce_any(may_have), read, lambda: upright)


def turn_upright(image: tf.Tensor, orientation: tf.Tensor) -> tf.Tensor:
  """Turns and mirrors the pixels according to the orientation.

  Args:
    image: [H, W, C].
    orientation: [] int32, 1 ... 8.

  Returns:
    [H, W, C], or [W, H, C] for orientations above 4.
  """
  # Without branches, which would slow down the start of a run.
  is_turned = orientation >= 5
  image = tf.transpose(image, tf.where(is_turned, [1, 0, 2], [0, 1, 2]))
  is_mirrored = [
    tf.reduce_any(orientation == tf.constant(mirrored))
    for mirrored in ((3, 4, 7, 8), (2, 3, 6, 7))
  ]
  return tf.reverse(image, tf.boolean_mask([0, 1], is_mirrored))


def _may_have_metadata(heads: tf.Tensor) -> tf.Tensor:
  """Returns [B] bool, from the segment after JFIF (JPEG) or chunk after IHDR (PNG)."""
  is_jpeg = _equals(heads, 0, b"\xff\xd8\xff")
  has_jfif = _equals(heads, 2, b"\xff\xe0\x00\x10")
  marker = tf.where(has_jfif, heads[:, 21], heads[:, 3])
  is_table = tf.reduce_any(marker[:, tf.newaxis] == tf.constant(_TABLE_MARKERS), axis=1)
  is_png = _equals(heads, 0, b"\x89PNG")
  return (is_jpeg & ~is_table) | (is_png & ~_equals(heads, 37, b"IDAT"))


def _read(files: tf.Tensor, heads: tf.Tensor) -> tf.Tensor:
  is_jpeg = _equals(heads, 0, b"\xff\xd8")
  start = _Cursor(
    tf.where(is_jpeg, 2, 8), tf.zeros_like(heads[:, 0]), tf.zeros_like(is_jpeg)
  )
  end = tf.while_loop(
    lambda cursor: ~tf.reduce_all(cursor.is_done),
    lambda cursor: (_step(files, is_jpeg, cursor),),
    (start,),
    maximum_iterations=_MAX_STEPS,
  )[0]
  return tf.where(end.exif > 0, _parse_exif(files, end.exif), 1)


def _step(files: tf.Tensor, is_jpeg: tf.Tensor, cursor: _Cursor) -> _Cursor:
  """Advances to the next segment or chunk, unless this one ends the search."""
  head = _bytes(files, cursor.position, 10)
  is_exif = tf.where(
    is_jpeg,
    _equals(head, 0, b"\xff\xe1") & _equals(head, 4, b"Exif\0\0"),
    _equals(head, 4, b"eXIf"),
  )
  exif = cursor.position + tf.where(is_jpeg, 10, 8)
  length = tf.where(is_jpeg, _segment_length(head), _integer(head[:, :4]) + 12)
  position = cursor.position + length
  is_end = tf.where(
    is_jpeg,
    _equals(head, 0, b"\xff\xda") | _equals(head, 0, b"\xff\xd9"),
    _equals(head, 4, b"IDAT") | (length < 12),
  )
  is_end |= (position >= tf.strings.length(files)) | (position <= cursor.position)
  return _Cursor(
    tf.where(cursor.is_done, cursor.position, position),
    tf.where(is_exif & ~cursor.is_done, exif, cursor.exif),
    cursor.is_done | is_exif | is_end,
  )


def _segment_length(head: tf.Tensor) -> tf.Tensor:
  """Returns [N] int32, bytes to JPEG's next marker; skips bytes between segments."""
  marker = head[:, 1]
  is_marker = (head[:, 0] == 0xFF) & (marker != 0xFF)
  is_alone = (marker <= 0x01) | ((marker >= 0xD0) & (marker <= 0xD8))
  segment = tf.where(is_alone, 2, 2 + _integer(head[:, 2:4]))
  return tf.where(is_marker, segment, 1)


def _parse_exif(files: tf.Tensor, start: tf.Tensor) -> tf.Tensor:
  """Returns [N] int32, from the first directory of the Exif data, in TIFF format."""
  head = _bytes(files, start, 8)
  is_little = _equals(head, 0, b"II")
  first = start + _byte_order(head[:, 4:8], is_little)
  directory = _bytes(files, first, 2 + 12 * _MAX_ENTRIES)
  num_entries = _byte_order(directory[:, :2], is_little)[:, tf.newaxis]
  entries = tf.reshape(directory[:, 2:], [-1, _MAX_ENTRIES, 12])
  is_little = is_little[:, tf.newaxis]
  short = _byte_order(entries[..., 8:10], is_little)
  long = _byte_order(entries[..., 8:12], is_little)
  kind = _byte_order(entries[..., 2:4], is_little)
  value = tf.where(kind == _SHORT, short, tf.where(kind == _LONG, long, 0))
  is_it = _byte_order(entries[..., :2], is_little) == _ORIENTATION_TAG
  is_it &= tf.range(_MAX_ENTRIES) < num_entries
  is_it &= _byte_order(entries[..., 4:8], is_little) == 1
  orientation = tf.reduce_max(tf.where(is_it, value, 0), axis=1)
  return tf.where((orientation >= 1) & (orientation <= 8), orientation, 1)


def _bytes(files: tf.Tensor, start: tf.Tensor, num_bytes: int) -> tf.Tensor:
  """Returns [N, num_bytes] int32 from a position in each file; zeros after its end."""
  start = tf.clip_by_value(start, 0, tf.strings.length(files))
  pieces = tf.strings.substr(files, start, tf.fill(tf.shape(start), num_bytes))
  raw = tf.io.decode_raw(pieces, tf.uint8, fixed_length=num_bytes)
  return tf.cast(raw, tf.int32)


def _equals(values: tf.Tensor, first: int, expected: bytes) -> tf.Tensor:
  part = values[:, first : first + len(expected)]
  return tf.reduce_all(part == tf.constant(list(expected)), axis=1)


def _integer(values: tf.Tensor) -> tf.Tensor:
  """Converts [..., n] int32 big-endian bytes to [...] int32."""
  num_bytes = values.shape[-1]
  factors = [1 << 8 * position for position in reversed(range(num_bytes))]
  return tf.reduce_sum(values * tf.constant(factors), axis=-1)


def _byte_order(values: tf.Tensor, is_little: tf.Tensor) -> tf.Tensor:
  return tf.where(is_little, _integer(tf.reverse(values, [-1])), _integer(values))
