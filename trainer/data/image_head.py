"""Format and size of an image by its first bytes, before anything is decoded.

A small file may declare a size that no memory holds (a decompression bomb).
"""

from __future__ import annotations

import struct
from typing import NamedTuple, Optional

# JPEG's start-of-frame markers: C4, C8 and CC are something else.
_FRAME_MARKERS = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}

_START_OF_SCAN = 0xDA


class Head(NamedTuple):
  """What an image file says of itself.

  Attributes:
    format: "png", "jpeg", "gif", "bmp" or "webp".
    width: pixels; 0 where it isn't said.
    height: pixels; 0 where it isn't said.
  """

  format: str
  width: int
  height: int


def read(file: bytes) -> Optional[Head]:
  """The head of an image file; None where it is of no known format.

  Args:
    file: the whole file, or its beginning.
  """
  try:
    if file.startswith(b"\x89PNG\r\n\x1a\n"):
      return Head("png", *struct.unpack_from(">II", file, 16))
    if file.startswith((b"GIF87a", b"GIF89a")):
      return Head("gif", *struct.unpack_from("<HH", file, 6))
    if file.startswith(b"BM"):
      width, height = struct.unpack_from("<ii", file, 18)
      return Head("bmp", width, abs(height))
    if file.startswith(b"\xff\xd8"):
      return Head("jpeg", *_jpeg_size(file))
    if file.startswith(b"RIFF") and file[8:12] == b"WEBP":
      return Head("webp", *_webp_size(file))
  except struct.error:
    return None
  return None


def _jpeg_size(file: bytes) -> tuple[int, int]:
  # Bytes between segments are skipped, as libjpeg does.
  position = file.find(b"\xff", 2)
  while 0 <= position <= len(file) - 9:
    marker = file[position + 1]
    if marker in _FRAME_MARKERS:
      height, width = struct.unpack_from(">HH", file, position + 5)
      return width, height
    if marker == _START_OF_SCAN:
      break
    if marker == 0xFF:
      position += 1
    elif marker <= 0x01 or 0xD0 <= marker <= 0xD8:
      position += 2
    else:
      position += 2 + struct.unpack_from(">H", file, position + 2)[0]
    position = file.find(b"\xff", position)
  return 0, 0


def _webp_size(file: bytes) -> tuple[int, int]:
  kind = file[12:16]
  if kind == b"VP8 ":
    width, height = struct.unpack_from("<HH", file, 26)
    return width & 0x3FFF, height & 0x3FFF
  if kind == b"VP8L":
    (bits,) = struct.unpack_from("<I", file, 21)
    return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
  if kind == b"VP8X":
    low_w, high_w, low_h, high_h = struct.unpack_from("<HBHB", file, 24)
    return (low_w | high_w << 16) + 1, (low_h | high_h << 16) + 1
  return 0, 0
