"""The TFRecord format: each record framed by its length and two checksums.

A frame is the length (8 bytes, little-endian), the masked CRC32C of the length
(4 bytes), the data, and the masked CRC32C of the data (4 bytes). Source:
tensorflow/core/lib/io/record_writer.h.
"""

from __future__ import annotations

import functools
import operator
import struct
from collections.abc import Sequence

import google_crc32c
import numpy as np

LENGTH_BYTES = 8
HEADER_BYTES = 12
FOOTER_BYTES = 4
OVERHEAD_BYTES = HEADER_BYTES + FOOTER_BYTES

_LENGTH = struct.Struct("<Q")
_FOOTER = struct.Struct("<I")
_MASK_DELTA = 0xA282EAD8
_HEAD = operator.itemgetter(slice(None, HEADER_BYTES))
_DATA = operator.itemgetter(slice(HEADER_BYTES, -FOOTER_BYTES))
_TAIL = operator.itemgetter(slice(-FOOTER_BYTES, None))

CORRUPT_LENGTH = "has a corrupt length (checksum differs)"
CORRUPT_DATA = "has corrupt data (checksum differs)"


class FramingError(ValueError):
  """A frame that is cut short or whose checksum does not fit.

  Attributes:
    number: of the record in its file, where records are read in order.
  """

  number: int = 0

  def line(self, path: str) -> str:
    """What is wrong with a file that was read in order, and what to do."""
    return f"{path}: record {self.number} {self}; restore the file, or leave it out."


class CompressedError(FramingError):
  """A file that is compressed as a whole: no record has an offset."""

  def line(self, path: str) -> str:
    """What is wrong with a file that was read in order, and what to do."""
    return (
      f"{path} is compressed ({self}), and records are read by their offsets; "
      "decompress the file, or write it anew without compression."
    )


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


def headers(lengths: Sequence[int]) -> np.ndarray:
  """[n, 12] uint8, the headers of data of n lengths."""
  content = b"".join(map(_header, lengths))
  return np.frombuffer(content, np.uint8).reshape(-1, HEADER_BYTES)


def footers(records: Sequence[bytes]) -> np.ndarray:
  """[n, 4] uint8, the footers of n records' data."""
  crcs = np.array(list(map(google_crc32c.value, records)), np.uint32)
  masked = (crcs >> np.uint32(15) | crcs << np.uint32(17)) + np.uint32(_MASK_DELTA)
  return masked.astype("<u4").view(np.uint8).reshape(-1, FOOTER_BYTES)


def check_header(header: bytes) -> None:
  """Makes sure that a length, [12] bytes with its checksum, is no damaged one.

  Raises:
    FramingError: the checksum does not fit.
  """
  length_crc = _FOOTER.unpack_from(header, LENGTH_BYTES)[0]
  if masked_crc(header[:LENGTH_BYTES]) != length_crc:
    raise FramingError(CORRUPT_LENGTH)


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
  header, data = framed[:HEADER_BYTES], framed[HEADER_BYTES:-FOOTER_BYTES]
  if header != _header(num_bytes):
    check_header(header)
    (length,) = _LENGTH.unpack_from(header)
    raise FramingError(f"has {length} bytes where the index has {num_bytes}")
  if framed[-FOOTER_BYTES:] != _FOOTER.pack(masked_crc(data)):
    raise FramingError(CORRUPT_DATA)
  return data


def unframe_all(frames: Sequence[bytes], lengths: Sequence[int]) -> list[bytes]:
  """The data of n frames, as by `unframe`, in half the time that takes.

  Raises:
    FramingError: one of them is damaged; `unframe` says which and how.
  """
  records = list(map(_DATA, frames))
  heads, tails = b"".join(map(_HEAD, frames)), b"".join(map(_TAIL, frames))
  if (
    list(map(len, frames)) != [length + OVERHEAD_BYTES for length in lengths]
    or heads != headers(lengths).tobytes()
    or tails != footers(records).tobytes()
  ):
    raise FramingError("is damaged")
  return records


def compression(beginning: bytes) -> str:
  """The method by which a file that begins so is compressed; empty where it is not."""
  if beginning.startswith(b"\x1f\x8b\x08"):
    return "GZIP"
  # Of RFC 1950: deflate in the low bits, and with its check a multiple of 31. A length
  # that begins so would have zeros further on.
  is_zlib = beginning[:1] == b"\x78" and int.from_bytes(beginning[:2], "big") % 31 == 0
  return "ZLIB" if is_zlib and any(beginning[4:LENGTH_BYTES]) else ""
