"""Image formats that ingest takes, by the endings of files and by their first bytes.

Training decodes PNG and JPEG. Ingest converts the other formats with Pillow.
"""

from __future__ import annotations

import re
from typing import NamedTuple, Optional


class ImageFormat(NamedTuple):
  """A format of image files.

  Attributes:
    name: as people write it.
    endings: of files, in lower case, each with its dot.
    magic: pattern of the first bytes.
    pillow: names that Pillow has for it; empty where Pillow never opens it.
    needs: what Pillow needs to open it, where not every Pillow does.
  """

  name: str
  endings: tuple[str, ...]
  magic: re.Pattern[bytes]
  pillow: tuple[str, ...]
  needs: str = ""


def _format(name, endings, magic, pillow, needs="") -> ImageFormat:
  pattern = re.compile(magic, re.DOTALL)
  return ImageFormat(name, tuple(endings.split()), pattern, tuple(pillow), needs)


_JPEG2000 = rb"\x00\x00\x00\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51"
_HEIF_BRANDS = rb"hei[cxms]|hev[cxms]|mif1|msf1"

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

# Endings of the files that ingest reads as images.
ENDINGS = tuple(sorted(ending for each in FORMATS for ending in each.endings))

# Endings of image files that nothing here converts.
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

# First bytes that `of_content` needs.
HEAD_BYTES = 16


def has_image_ending(name: str) -> bool:
  """Whether a file is one that ingest reads as an image, by the ending of its name."""
  return name.lower().endswith(ENDINGS)


def of_content(head: bytes) -> Optional[ImageFormat]:
  """The format that a file's first bytes show, whatever its name ends in.

  Args:
    head: the file, or its first `HEAD_BYTES`.

  Returns:
    None where they are of none of `FORMATS`.
  """
  return next((each for each in FORMATS if each.magic.match(head)), None)
