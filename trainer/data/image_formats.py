"""Image formats supported at ingest, detected by file extension and first bytes.

Training decodes PNG and JPEG; ingest converts the other formats with Pillow. Declared
sizes are read before decoding, because a small file may declare a size that exceeds any
memory (a decompression bomb).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import re
import struct
from typing import NamedTuple, Optional

import numpy as np
from PIL import Image, ImageOps

from trainer.errors import UserError

# JPEG's start-of-frame markers; C4, C8 and CC have other meanings.
_FRAME_MARKERS = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}

_START_OF_SCAN = 0xDA

_JPEG2000 = rb"\x00\x00\x00\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51"
_HEIF_BRANDS = rb"hei[cxms]|hev[cxms]|mif1|msf1"

# Extensions of image files that can't be converted.
OTHER_ENDINGS = (
  ".ai",
  ".arw",
  ".cr2",
  ".cr3",
  ".dcm",
  ".dng",
  ".eps",
  ".exr",
  ".hdr",
  ".icns",
  ".ico",
  ".jxl",
  ".jxr",
  ".nef",
  ".orf",
  ".pcx",
  ".pfm",
  ".psd",
  ".qoi",
  ".raf",
  ".raw",
  ".rw2",
  ".sgi",
  ".svg",
  ".tga",
  ".wbmp",
  ".xcf",
)

# Formats whose files are kept byte for byte.
_KEPT = ("PNG", "JPEG")

# Byte strings that indicate metadata with an orientation.
_METADATA = (b"Exif", b"eXIf", b"Raw profile", b"tiff:Orientation")
_ORIENTATION_TAG = 0x0112

# Number of first bytes that `detect_format` needs.
HEAD_BYTES = 16


class ImageHead(NamedTuple):
  """The format and size that an image file declares.

  Attributes:
    format: "png", "jpeg", "gif", "bmp" or "webp".
    width: pixels; 0 if not declared.
    height: pixels; 0 if not declared.
  """

  format: str
  width: int
  height: int


def read_image_head(file: bytes) -> Optional[ImageHead]:
  """Reads the head of an image file; returns None for an unknown format.

  Args:
    file: the whole file, or its beginning.
  """
  try:
    if file.startswith(b"\x89PNG\r\n\x1a\n"):
      return ImageHead("png", *struct.unpack_from(">II", file, 16))
    if file.startswith((b"GIF87a", b"GIF89a")):
      return ImageHead("gif", *struct.unpack_from("<HH", file, 6))
    if file.startswith(b"BM"):
      width, height = struct.unpack_from("<ii", file, 18)
      return ImageHead("bmp", width, abs(height))
    if file.startswith(b"\xff\xd8"):
      return ImageHead("jpeg", *_jpeg_size(file))
    if file.startswith(b"RIFF") and file[8:12] == b"WEBP":
      return ImageHead("webp", *_webp_size(file))
  except struct.error:
    return None
  return None


def _jpeg_size(file: bytes) -> tuple[int, int]:
  # Bytes between segments are skipped, as in libjpeg.
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


class ImageFormat(NamedTuple):
  """A format of image files.

  Attributes:
    name: display name.
    endings: file extensions in lower case, with the dot.
    magic: pattern of the first bytes.
    pillow: Pillow's names of the format; empty if Pillow never opens it.
    needs: requirement to open it, if not every Pillow can.
  """

  name: str
  endings: tuple[str, ...]
  magic: re.Pattern[bytes]
  pillow: tuple[str, ...]
  needs: str = ""


def _format(name, endings, magic, pillow, needs="") -> ImageFormat:
  pattern = re.compile(magic, re.DOTALL)
  return ImageFormat(name, tuple(endings.split()), pattern, tuple(pillow), needs)


FORMATS = (
  _format("PNG", ".png .apng", rb"\x89PNG\r\n\x1a\n", ["PNG"]),
  _format("JPEG", ".jpg .jpeg .jpe .jfif .mpo", rb"\xff\xd8\xff", ["JPEG", "MPO"]),
  _format("GIF", ".gif", rb"GIF8[79]a", ["GIF"]),
  _format("BMP", ".bmp .dib", rb"BM", ["BMP"]),
  _format("WebP", ".webp", rb"RIFF....WEBP", ["WEBP"], "a Pillow built with WebP"),
  _format("TIFF", ".tif .tiff", rb"II[\x2a\x2b]\x00|MM\x00[\x2a\x2b]", ["TIFF"]),
  _format("PNM", ".ppm .pgm .pbm .pnm", rb"P[1-6][\s#]", ["PPM"]),
  _format(
    "JPEG 2000",
    ".jp2 .j2k .jpx .jpf .j2c .jpc .jpeg2000",
    _JPEG2000,
    ["JPEG2000"],
    "a Pillow built with OpenJPEG",
  ),
  _format(
    "AVIF", ".avif .avifs", rb"....ftyp(avif|avis)", ["AVIF"], "Pillow 11.3 or later"
  ),
  _format(
    "HEIC",
    ".heic .heif .hif",
    rb"....ftyp(" + _HEIF_BRANDS + rb")",
    ["HEIF"],
    "the package pillow-heif",
  ),
)

# Extensions of files that ingest reads as images.
ENDINGS = tuple(sorted(ending for each in FORMATS for ending in each.endings))


def has_image_ending(name: str) -> bool:
  """Returns whether the extension of a file is one that ingest reads as an image."""
  return name.lower().endswith(ENDINGS)


def detect_format(head: bytes) -> Optional[ImageFormat]:
  """Detects the format from the first bytes of a file, whatever its extension.

  Args:
    head: the file, or its first `HEAD_BYTES`.

  Returns:
    The format; None if it is none of `FORMATS`.
  """
  return next((each for each in FORMATS if each.magic.match(head)), None)


def is_decoded_in_training(file: bytes) -> bool:
  """Returns whether a file is kept unchanged, because training decodes its format."""
  found = detect_format(file)
  return found is not None and found.name in _KEPT


def has_metadata(file: bytes) -> bool:
  """Returns whether a file may declare an orientation."""
  return any(mark in file for mark in _METADATA)


def orientation(file: bytes) -> int:
  """Reads the orientation of a PNG or JPEG file with Pillow, from all its metadata.

  Returns:
    1 ... 8 as in Exif; 1 if the file declares none or Pillow can't open it.
  """
  try:
    with Image.open(io.BytesIO(file)) as image:
      found = image.getexif().get(_ORIENTATION_TAG, 1)
  except Exception:  # Pillow raises many types; decoding is checked later.
    return 1
  return found if found in range(1, 9) else 1


def set_orientation(file: bytes, orientation: int) -> bytes:
  """Returns a PNG or JPEG file that training's decoders turn by the orientation.

  Args:
    file: a JPEG file gets an additional Exif segment before all others; a PNG file is
      rewritten upright.
    orientation: 1 ... 8.
  """
  if not file.startswith(b"\xff\xd8"):
    return convert_to_png(file, max_pixels=None)
  entry = struct.pack(">HHIHH", _ORIENTATION_TAG, 3, 1, orientation, 0)
  exif = b"Exif\0\0MM\0\x2a\0\0\0\x08\0\x01" + entry + bytes(4)
  return file[:2] + b"\xff\xe1" + struct.pack(">H", 2 + len(exif)) + exif + file[2:]


def convert_to_png(file: bytes, *, max_pixels: Optional[int]) -> bytes:
  """Converts an image file to PNG: first picture, upright, with alpha if it has any.

  Args:
    file: of any of `FORMATS`.
    max_pixels: limit on the declared pixels; None for Pillow's own limit.

  Raises:
    UserError: the format is unknown, the image is too large or damaged, or the white
      level of its pixels is unknown.
  """
  known = detect_format(file)
  if known is None:
    raise UserError("its first bytes match no supported image format.")
  try:
    with _open_image(file, known) as image:
      if max_pixels is not None and image.width * image.height > max_pixels:
        raise UserError(
          f"it declares {image.width} x {image.height} pixels, more than the "
          f"{max_pixels:,} allowed; resize it, or raise ingest.max_pixels."
        )
      upright = ImageOps.exif_transpose(image)
      png = io.BytesIO()
      _to_uint8(upright, known).save(png, "PNG")
  except UserError:
    raise
  except Exception as error:  # Pillow raises many types for damaged files.
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    raise UserError(f"it is {known.name}, and Pillow can't decode it: {reason}.") from (
      error
    )
  return png.getvalue()


def _open_image(file: bytes, known: ImageFormat) -> Image.Image:
  names = [name for name in known.pillow if name in _pillow_formats()]
  needs = f"it is {known.name}, which needs {known.needs}; install it, or convert it."
  if not names:
    raise UserError(needs)
  try:
    return Image.open(io.BytesIO(file), formats=names)
  except Image.UnidentifiedImageError as error:
    if known.needs:
      raise UserError(
        f"it is {known.name} and damaged, or needs {known.needs}."
      ) from error
    raise UserError(f"it is {known.name} and damaged.") from error


@functools.cache
def _pillow_formats() -> frozenset[str]:
  """Returns the formats that Pillow opens, including pillow-heif's if installed."""
  Image.init()
  with contextlib.suppress(ImportError):
    importlib.import_module("pillow_heif").register_heif_opener()
  return frozenset(Image.OPEN)


def _to_uint8(image: Image.Image, known: ImageFormat) -> Image.Image:
  """Returns the image as 8-bit greyscale or colour, with alpha if it has any."""
  if image.mode.startswith("I;16") or (image.mode == "I" and known.name == "PNM"):
    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
  if image.mode in ("I", "F"):
    raise UserError(
      f"it is {known.name} with 32-bit pixels, whose white level is unknown; convert "
      "it to 8 or 16 bits."
    )
  has_alpha = image.mode in ("LA", "PA", "RGBA", "La", "RGBa")
  if has_alpha or "transparency" in image.info:
    return image.convert("LA" if image.mode == "LA" else "RGBA")
  return image.convert("L" if image.mode in ("1", "L") else "RGB")
