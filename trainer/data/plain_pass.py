"""A plain pass over a TFRecord file: all its records in order, many at a time.

Whatever the file says, no more memory is taken than it has bytes.

Shapes: n records of a buffer.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from typing import IO

import numpy as np

from trainer.data import framing
from trainer.data.framing import FOOTER_BYTES, HEADER_BYTES, OVERHEAD_BYTES

# What stays in the processor's cache while it is looked at more than once.
_CHUNK_BYTES = 1 << 20
_LENGTH = struct.Struct("<Q")


def records(file: IO[bytes]) -> Iterator[bytes]:
  """The data of all records of a file, in order.

  Raises:
    FramingError: as `blocks`.
  """
  for block in blocks(file):
    yield from block


def blocks(file: IO[bytes]) -> Iterator[list[bytes]]:
  """The data of all records of a file, in order, some at a time.

  Args:
    file: open for reading, at its start.

  Yields:
    Data of records; also of those before one that is damaged.

  Raises:
    FramingError: with the number of the first record that is damaged.
  """
  num_left, number, rest = _size(file), 0, b""
  while rest or num_left:
    try:
      chunk = _read_on(file, num_left, rest)
    except framing.FramingError as error:
      raise _numbered(error, number, rest) from None
    num_left -= len(chunk)
    buffer = rest + chunk
    block, ends = _cut(buffer)
    num_good, damage = _check(buffer, block, ends)
    number += num_good
    if num_good:
      yield block[:num_good]
    if damage:
      raise _numbered(framing.FramingError(damage), number, buffer)
    rest = buffer[ends[-1] :] if ends else buffer


def _read_on(file: IO[bytes], num_left: int, rest: bytes) -> bytes:
  """What follows the beginning of a frame: at least what it lacks.

  Raises:
    FramingError: its length is damaged, or the file ends before.
  """
  num_missing = HEADER_BYTES - len(rest)
  if num_missing <= 0:
    framing.check_header(rest[:HEADER_BYTES])
    num_missing = _LENGTH.unpack_from(rest)[0] + OVERHEAD_BYTES - len(rest)
  if num_missing > num_left:  # Before memory for it is asked for.
    raise framing.FramingError("is cut short")
  chunk = file.read(min(num_left, max(_CHUNK_BYTES, num_missing)))
  if len(chunk) < num_missing:
    raise framing.FramingError("is cut short")
  return chunk


def _numbered(
  error: framing.FramingError, number: int, beginning: bytes
) -> framing.FramingError:
  method = framing.compression(beginning) if number == 0 else ""
  if method:
    return framing.CompressedError(method)
  error.number = number
  return error


def _size(file: IO[bytes]) -> int:
  start = file.tell()
  file.seek(0, os.SEEK_END)
  end = file.tell()
  file.seek(start)
  return end - start


def _cut(buffer: bytes) -> tuple[list[bytes], list[int]]:
  """The data of the frames that a buffer holds whole, and where each frame ends."""
  block: list[bytes] = []
  ends: list[int] = []
  position, last = 0, len(buffer) - OVERHEAD_BYTES
  length_at = _LENGTH.unpack_from
  while position <= last:
    start = position + HEADER_BYTES
    end = start + length_at(buffer, position)[0]
    position = end + FOOTER_BYTES
    if position > len(buffer):
      break
    block.append(buffer[start:end])
    ends.append(position)
  return block, ends


def _check(
  buffer: bytes, block: Sequence[bytes], ends: Sequence[int]
) -> tuple[int, str]:
  """How many records, from the first, are whole, and what is wrong with the next.

  Args:
    buffer: what the frames were cut from.
    block: n records' data.
    ends: where each frame ends in the buffer.

  Returns:
    n and nothing, if none is damaged.
  """
  if not block:
    return 0, ""
  frame_ends = np.array(ends)
  starts = np.concatenate([np.zeros(1, np.int64), frame_ends[:-1]])
  bytes_of = np.frombuffer(buffer, np.uint8)
  headers = bytes_of[starts[:, None] + np.arange(HEADER_BYTES)]
  footers = bytes_of[frame_ends[:, None] + np.arange(-FOOTER_BYTES, 0)]
  is_bad_header = headers != framing.headers(list(map(len, block)))
  is_bad_footer = footers != framing.footers(block)
  is_bad = is_bad_header.any(axis=1) | is_bad_footer.any(axis=1)
  first = int(is_bad.argmax())
  if not is_bad[first]:
    return len(block), ""
  is_of_length = bool(is_bad_header[first].any())
  return first, framing.CORRUPT_LENGTH if is_of_length else framing.CORRUPT_DATA
