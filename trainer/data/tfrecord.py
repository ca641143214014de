"""TFRecord files: the format, sequential reading, and features of examples.

A frame is the length (8 bytes, little-endian), the masked CRC32C of the length
(4 bytes), the data, and the masked CRC32C of the data (4 bytes). Source:
tensorflow/core/lib/io/record_writer.h.

Readers never allocate more memory than the file has bytes, whatever lengths it
declares.

Shapes: n records of a buffer.
"""

from __future__ import annotations

import functools
import operator
import os
import struct
from collections.abc import Iterator, Sequence
from typing import IO, Any

import google_crc32c
import numpy as np
import tensorflow as tf

from trainer.errors import UserError

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

# Fits into the processor's cache, because each chunk is read several times.
_CHUNK_BYTES = 1 << 20

_DTYPES = {"bytes_list": object, "int64_list": np.int64, "float_list": np.float32}


class FramingError(ValueError):
  """A frame is truncated, or its checksum does not match.

  Attributes:
    number: number of the record in its file, if records are read in order.
  """

  number: int = 0

  def line(self, path: str) -> str:
    """Returns the fault of a file that was read in order, with advice."""
    return f"{path}: record {self.number} {self}; restore the file, or remove it."


class CompressedError(FramingError):
  """A file is compressed as a whole, so its records have no offsets."""

  def line(self, path: str) -> str:
    """Returns the fault of a file that was read in order, with advice."""
    return (
      f"{path} is compressed ({self}), but records are read by their offsets; "
      "decompress the file, or write it without compression."
    )


def masked_crc(data: bytes) -> int:
  """Returns the masked (rotated) CRC32C, so that a CRC of CRCs is no special case."""
  crc = google_crc32c.value(data)
  return ((crc >> 15 | crc << 17) + _MASK_DELTA) & 0xFFFFFFFF


def frame_record(data: bytes) -> bytes:
  """Returns the frame of a record."""
  return b"".join((_header(len(data)), data, _FOOTER.pack(masked_crc(data))))


@functools.lru_cache(maxsize=4096)
def _header(num_bytes: int) -> bytes:
  length = struct.pack("<Q", num_bytes)
  return length + _FOOTER.pack(masked_crc(length))


def frame_headers(lengths: Sequence[int]) -> np.ndarray:
  """Returns [n, 12] uint8, the headers for data of n lengths."""
  content = b"".join(map(_header, lengths))
  return np.frombuffer(content, np.uint8).reshape(-1, HEADER_BYTES)


def frame_footers(records: Sequence[bytes]) -> np.ndarray:
  """Returns [n, 4] uint8, the footers for the data of n records."""
  crcs = np.array(list(map(google_crc32c.value, records)), np.uint32)
  masked = (crcs >> np.uint32(15) | crcs << np.uint32(17)) + np.uint32(_MASK_DELTA)
  return masked.astype("<u4").view(np.uint8).reshape(-1, FOOTER_BYTES)


def check_header(header: bytes) -> None:
  """Raises if a header of [12] bytes does not match its checksum.

  Raises:
    FramingError: the checksum does not match.
  """
  length_crc = _FOOTER.unpack_from(header, LENGTH_BYTES)[0]
  if masked_crc(header[:LENGTH_BYTES]) != length_crc:
    raise FramingError(CORRUPT_LENGTH)


def unframe(framed: bytes, num_bytes: int) -> bytes:
  """Returns the data of a frame.

  Args:
    framed: the bytes at the frame's position.
    num_bytes: length of the data according to the index.

  Returns:
    The data, `num_bytes` long.

  Raises:
    FramingError: the frame is truncated, or a length or checksum does not match.
  """
  if len(framed) != num_bytes + OVERHEAD_BYTES:
    raise FramingError("is truncated")
  header, data = framed[:HEADER_BYTES], framed[HEADER_BYTES:-FOOTER_BYTES]
  if header != _header(num_bytes):
    check_header(header)
    (length,) = _LENGTH.unpack_from(header)
    raise FramingError(f"has {length} bytes but {num_bytes} in the index")
  if framed[-FOOTER_BYTES:] != _FOOTER.pack(masked_crc(data)):
    raise FramingError(CORRUPT_DATA)
  return data


def unframe_all(frames: Sequence[bytes], lengths: Sequence[int]) -> list[bytes]:
  """Returns the data of n frames, in half the time of `unframe`.

  Raises:
    FramingError: a frame is damaged; `unframe` reports which and how.
  """
  records = list(map(_DATA, frames))
  heads, tails = b"".join(map(_HEAD, frames)), b"".join(map(_TAIL, frames))
  if (
    list(map(len, frames)) != [length + OVERHEAD_BYTES for length in lengths]
    or heads != frame_headers(lengths).tobytes()
    or tails != frame_footers(records).tobytes()
  ):
    raise FramingError("is damaged")
  return records


def compression(beginning: bytes) -> str:
  """Returns the compression method of a file by its first bytes; empty for none."""
  if beginning.startswith(b"\x1f\x8b\x08"):
    return "GZIP"
  # RFC 1950: the low bits mean deflate, and the first two bytes are a multiple of 31. A
  # length that begins with the same bytes would have zeros in its high bytes.
  is_zlib = beginning[:1] == b"\x78" and int.from_bytes(beginning[:2], "big") % 31 == 0
  return "ZLIB" if is_zlib and any(beginning[4:LENGTH_BYTES]) else ""


def iterate_records(file: IO[bytes]) -> Iterator[bytes]:
  """Yields the data of all records of a file, in order.

  Raises:
    FramingError: as `iterate_blocks`.
  """
  for block in iterate_blocks(file):
    yield from block


def iterate_blocks(file: IO[bytes]) -> Iterator[list[bytes]]:
  """Yields the data of all records of a file in order, in blocks.

  Args:
    file: open for reading, at its start.

  Yields:
    Data of records, including those before a damaged one.

  Raises:
    FramingError: a record is damaged; has the number of the first.
  """
  num_left, number, rest = _size(file), 0, b""
  while rest or num_left:
    try:
      chunk = _read_more(file, num_left, rest)
    except FramingError as error:
      raise _numbered(error, number, rest) from None
    num_left -= len(chunk)
    buffer = rest + chunk
    block, ends = _split_frames(buffer)
    num_good, damage = _check(buffer, block, ends)
    number += num_good
    if num_good:
      yield block[:num_good]
    if damage:
      raise _numbered(FramingError(damage), number, buffer)
    rest = buffer[ends[-1] :] if ends else buffer


def _read_more(file: IO[bytes], num_left: int, rest: bytes) -> bytes:
  """Reads at least the bytes that are missing from a partial frame.

  Raises:
    FramingError: its length is damaged, or the file ends before.
  """
  num_missing = HEADER_BYTES - len(rest)
  if num_missing <= 0:
    check_header(rest[:HEADER_BYTES])
    num_missing = _LENGTH.unpack_from(rest)[0] + OVERHEAD_BYTES - len(rest)
  if num_missing > num_left:  # Checked before memory is allocated.
    raise FramingError("is truncated")
  chunk = file.read(min(num_left, max(_CHUNK_BYTES, num_missing)))
  if len(chunk) < num_missing:
    raise FramingError("is truncated")
  return chunk


def _numbered(error: FramingError, number: int, beginning: bytes) -> FramingError:
  method = compression(beginning) if number == 0 else ""
  if method:
    return CompressedError(method)
  error.number = number
  return error


def _size(file: IO[bytes]) -> int:
  start = file.tell()
  file.seek(0, os.SEEK_END)
  end = file.tell()
  file.seek(start)
  return end - start


def _split_frames(buffer: bytes) -> tuple[list[bytes], list[int]]:
  """Returns the data of the complete frames in a buffer, and where each frame ends."""
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
  """Returns the number of undamaged leading records, and the fault of the next one.

  Args:
    buffer: the buffer that contains the frames.
    block: data of n records.
    ends: end of each frame in the buffer.

  Returns:
    n and an empty text if no record is damaged.
  """
  if not block:
    return 0, ""
  frame_ends = np.array(ends)
  starts = np.concatenate([np.zeros(1, np.int64), frame_ends[:-1]])
  bytes_of = np.frombuffer(buffer, np.uint8)
  headers = bytes_of[starts[:, None] + np.arange(HEADER_BYTES)]
  footers = bytes_of[frame_ends[:, None] + np.arange(-FOOTER_BYTES, 0)]
  is_bad_header = headers != frame_headers(list(map(len, block)))
  is_bad_footer = footers != frame_footers(block)
  is_bad = is_bad_header.any(axis=1) | is_bad_footer.any(axis=1)
  first = int(is_bad.argmax())
  if not is_bad[first]:
    return len(block), ""
  is_of_length = bool(is_bad_header[first].any())
  return first, CORRUPT_LENGTH if is_of_length else CORRUPT_DATA


def feature_values(record: bytes, name: str) -> dict[str, list[Any]]:
  """Returns the values of each feature that has any.

  Args:
    record: serialized example.
    name: name of the record, for the message.

  Returns:
    Bytes, integers or floats by feature name.

  Raises:
    UserError: it is not an example.
  """
  return {key: list(values) for key, (_, values) in _lists(record, name).items()}


def arrays(record: bytes, name: str) -> dict[str, np.ndarray]:
  """Returns the values of each feature as an array of the feature's own type.

  Args: as `feature_values`.

  Returns:
    Arrays [n] of int64, float32, or bytes as objects, by feature name; n may be 0.

  Raises:
    UserError: it is not an example.
  """
  found = {}
  for key, (kind, values) in _lists(record, name).items():
    found[key] = np.empty(len(values), _DTYPES[kind])
    found[key][:] = values
  return found


def _lists(record: bytes, name: str) -> dict[str, tuple[str, Sequence[Any]]]:
  """Returns kind and values of each feature that has a kind."""
  try:
    features = tf.train.Example.FromString(record).features.feature
  except Exception as error:  # protobuf raises its own type.
    raise UserError(f"{name} is not a tf.train.Example.") from error
  kinds = {key: feature.WhichOneof("kind") for key, feature in features.items()}
  return {
    key: (kind, getattr(features[key], kind).value)
    for key, kind in kinds.items()
    if kind
  }


def feature_text(value: Any) -> Any:
  """Decodes bytes to text, with replacement characters; returns other values as is."""
  return value.decode(errors="replace") if isinstance(value, bytes) else value
