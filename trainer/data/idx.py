"""The idx format: a head that gives the shape, then unsigned bytes.

Source: http://yann.lecun.com/exdb/mnist (the format's description).
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib

import numpy as np

from trainer.data import paths
from trainer.errors import UserError

_MAGIC_BYTES = 4
_UINT8 = 0x08


def read(path: str, *, num_axes: int) -> np.ndarray:
  """Reads an idx file of unsigned bytes.

  Args:
    path: the file, gzipped if it ends in .gz.
    num_axes: how many axes its array must have.

  Returns:
    uint8 array; no axis but the first may be empty.

  Raises:
    UserError: it can't be read, is no such file, or is damaged.
  """
  content = _read_bytes(path)
  header_bytes = _MAGIC_BYTES + 4 * num_axes
  magic = bytes([0, 0, _UINT8, num_axes])
  if content[:_MAGIC_BYTES] != magic or len(content) < header_bytes:
    raise UserError(f"{path} is no idx file of unsigned bytes with {num_axes} axes.")
  shape = struct.unpack(f">{num_axes}I", content[_MAGIC_BYTES:header_bytes])
  record_bytes = math.prod(shape[1:])
  if record_bytes == 0:
    raise UserError(f"{path} is damaged: its head says records of shape {shape[1:]}.")
  num_bytes = len(content) - header_bytes
  if num_bytes != shape[0] * record_bytes:
    raise UserError(
      f"{path} is damaged: its head says {shape[0]} records, and it holds "
      f"{num_bytes // record_bytes} whole ones ({num_bytes} bytes where "
      f"{shape[0] * record_bytes} belong)."
    )
  return np.frombuffer(content, np.uint8, offset=header_bytes).reshape(shape)


def num_records(path: str) -> int:
  """How many records the head of an idx file says.

  Raises:
    UserError: it can't be read, or has no head.
  """
  try:
    with paths.as_os_errors(path), paths.open_file(path, "rb") as file:
      plain = gzip.GzipFile(fileobj=file) if path.endswith(".gz") else file
      head = plain.read(_MAGIC_BYTES + 4)
  except (OSError, EOFError, zlib.error) as error:
    raise UserError(f"{path} can't be read: {error}.") from error
  if len(head) < _MAGIC_BYTES + 4:
    raise UserError(f"{path} is no idx file of unsigned bytes: it has no head.")
  return int.from_bytes(head[_MAGIC_BYTES:], "big")


def _read_bytes(path: str) -> bytes:
  try:
    content = paths.read_bytes(path)
    return gzip.decompress(content) if path.endswith(".gz") else content
  except (OSError, EOFError, zlib.error) as error:
    raise UserError(f"{path} can't be read: {error}.") from error
