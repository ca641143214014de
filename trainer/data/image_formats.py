"""Image formats supported at ingest, detected by file extension and first bytes.

Training decodes PNG and JPEG; ingest converts the other formats with Pillow. Declared
sizes are read before decoding, because a small file may declare a size that exceeds any
memory (a decompression bomb).

Exif orientation is read in the graph. Cameras store the sensor's rows and an
orientation tag. Most files have no such tag; only those with metadata before their
pixels are searched.

Shapes: B files, N of them with metadata, H × W pixels, C channels.
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
import tensorflow as tf
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

# Number of first bytes that `detect_format` needs.
HEAD_BYTES = 16

# First bytes of a file that show whether metadata follows.
_SEARCHED_HEAD_BYTES = 44

# Segments and chunks before the pixels; later ones are not searched.
_MAX_STEPS = 256
# Entries of the first Exif directory. It is sorted, and the orientation is among the
# first entries.
_MAX_ENTRIES = 64
_ORIENTATION_TAG, _SHORT, _LONG = 0x0112, 3, 4
# JPEG markers after which no metadata follows: frame, tables, restart interval.
_TABLE_MARKERS = (0xC0, 0xC1, 0xC2, 0xC4, 0xDB, 0xDD)


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
  heads = tf.io.decode_raw(files, tf.uint8, fixed_length=_SEARCHED_HEAD_BYTES)
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
