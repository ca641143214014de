"""The TFRecord format: each record framed by its length and two checksums.

A frame is the length (8 bytes, little-endian), the masked CRC32C of the length
(4 bytes), the data, and the masked CRC32C of the data (4 bytes). Source:
tensorflow/core/lib/io/record_writer.h.
"""

from __future__ import annotations

import functools
import mmap
import os
import struct
from collections.abc import Iterator
from typing import IO

import google_crc32c

HEADER_BYTES = 12
FOOTER_BYTES = 4
OVERHEAD_BYTES = HEADER_BYTES + FOOTER_BYTES

_LENGTH = struct.Struct("<Q")
_HEADER = struct.Struct("<QI")
_FOOTER = struct.Struct("<I")
_MASK_DELTA = 0xA282EAD8


class FramingError(ValueError):
  """A frame that is cut short or whose checksum does not fit.

  Attributes:
    number: of the record in its file, where records are read in order.
  """

  number: int = 0


def masked_crc(data: bytes) -> int:
  """CRC32C as TFRecord stores it: rotated, so that a CRC of CRCs is no special case."""
  crc = google_crc32c.value(data)
  return ((crc >> 15 | crc << 17) + _MASK_DELTA) & 0xFFFFFFFF


def frame(data: bytes) -> bytes:
  """The bytes that stand in a file for one record."""
  return b"".join((_header(len(data)), data, _FOOTER.pack(masked_crc(data))))


@functools.lru_cache(maxsize=4096)
def _header(num_bytes: int) -> bytes:
  length = struct.pack("<Q", num_bytes)
  return length + _FOOTER.pack(masked_crc(length))


def unframe(framed: bytes, num_bytes: int) -> bytes:
  """The data of a frame.

  Args:
    framed: what was read where the frame should be.
    num_bytes: length of the data, as the index has it.

  Returns:
    The data, `num_bytes` long.

  Raises:
    FramingError: if the frame is cut short, or a length or checksum does not fit.
  """
  if len(framed) != num_bytes + OVERHEAD_BYTES:
    raise FramingError("is cut short")
  if framed[:HEADER_BYTES] != _header(num_bytes):
    length, length_crc = _HEADER.unpack_from(framed)
    if masked_crc(framed[:8]) != length_crc:
      raise FramingError("has a corrupt length (checksum differs)")
    raise FramingError(f"has {length} bytes where the index has {num_bytes}")
  data = framed[HEADER_BYTES:-FOOTER_BYTES]
  crc = google_crc32c.value(data)  # Masked here: a call costs as much as the sum.
  masked = ((crc >> 15 | crc << 17) + _MASK_DELTA) & 0xFFFFFFFF
  if masked != _FOOTER.unpack_from(framed, HEADER_BYTES + num_bytes)[0]:
    raise FramingError("has corrupt data (checksum differs)")
  return data


def _size(file: IO[bytes]) -> int:
  start = file.tell()
  file.seek(0, os.SEEK_END)
  end = file.tell()
  file.seek(start)
  return end


def lengths_fit(path: str) -> bool:
  """Whether the lengths of all records of a local file together are its size.

  Only the lengths are looked at, and no checksum.

  Raises:
    OSError: it can't be read.
  """
  end = os.path.getsize(path)
  if not end:
    return True
  with (
    open(path, "rb") as file,
    mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
  ):
    position, last = 0, end - OVERHEAD_BYTES
    length_at = _LENGTH.unpack_from
    while position <= last:
      position += length_at(mapped, position)[0] + OVERHEAD_BYTES
  return position == end


def records(file: IO[bytes]) -> Iterator[bytes]:
  """The data of all records of a file, in order.

  Raises:
    FramingError: with the number of the first record that is damaged.
  """
  number = 0
  end = _size(file)
  while header := file.read(HEADER_BYTES):
    try:
      if len(header) < HEADER_BYTES:
        raise FramingError("is cut short")
      num_bytes, length_crc = _HEADER.unpack(header)
      if masked_crc(header[:8]) != length_crc:
        raise FramingError("has a corrupt length (checksum differs)")
      if num_bytes > end - file.tell():  # Before memory for it is asked for.
        raise FramingError("is cut short")
      yield unframe(header + file.read(num_bytes + FOOTER_BYTES), num_bytes)
    except FramingError as error:
      error.number = number
      raise
    number += 1
