"""Decoding of images and vectors, in the graph.

Reads format and size from the first bytes of many files at once, decodes them, and
converts examples to model inputs. Declared sizes are computed as in
`image_formats.read_image_head`, for a whole batch.

Shapes: B files or examples, H × W pixels, C channels.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import NamedTuple, Optional, Protocol

import gin
import tensorflow as tf
from PIL import Image, ImageColor

from trainer.data import image_formats
from trainer.errors import UserError, check_at_least

# Calls of the function in one graph. Starting an iterator takes 20 ms for each.
_MAX_PARALLEL = 16

# First bytes that declare the size, in all formats except JPEG.
_SIZE_HEAD_BYTES = 30

# 16-bit fixed-point weights of red, green and blue (ITU-R BT.601), as in Pillow.
_GREY_WEIGHTS = (19595, 38470, 7471)

_OTHER, _PALETTE_BMP, _ALPHA_PNG = range(3)
_BMP_HEADER_BYTES = 14
# First bytes that declare how the pixels of a BMP are stored.
_INFO_HEAD_BYTES = 34

# Files that are not plain and are decoded in parallel.
_PARALLEL_FILES = 32


def batched_map(
  file_fn: Callable[[tf.Tensor], tf.Tensor], files: tf.Tensor, spec: tf.TensorSpec
) -> tf.Tensor:
  """Applies a function to each file, several of them in one iteration of a loop.

  An iteration for each file would cost more than decoding a small PNG.

  Args:
    file_fn: maps one file, [] string, to a tensor.
    files: [B] string.
    spec: shape and type of that tensor.

  Returns:
    [B, ...].
  """
  # Traced once and called for each file: a trace per file dominated the start of a run.
  file_fn = tf.function(
    file_fn, input_signature=[tf.TensorSpec([], tf.string)], autograph=False
  )
  num_files = files.shape[0]
  if not num_files:
    return tf.map_fn(file_fn, files, fn_output_signature=spec)
  num_parts = -(-num_files // _MAX_PARALLEL)
  part_size = -(-num_files // num_parts)

  def of_part(part: tf.Tensor) -> tf.Tensor:
    return tf.stack([file_fn(file) for file in tf.unstack(part)])

  if num_parts == 1:
    return of_part(files)
  # The last part is filled up with the first file.
  num_missing = num_parts * part_size - num_files
  files = tf.concat([files, tf.repeat(files[:1], num_missing)], 0)
  parts = tf.map_fn(
    of_part,
    tf.reshape(files, [num_parts, part_size]),
    fn_output_signature=tf.TensorSpec([part_size, *spec.shape], spec.dtype),
  )
  return tf.reshape(parts, [num_parts * part_size, *spec.shape])[:num_files]


class DeclaredSize(NamedTuple):
  """Sizes that the heads of image files declare.

  Attributes:
    num_pixels: [B] int64, width times height; 0 for unknown formats.
    num_components: [B] int32, components of JPEG files; 0 for other files.
  """

  num_pixels: tf.Tensor
  num_components: tf.Tensor


def read_declared_size(files: tf.Tensor) -> DeclaredSize:
  """Reads the sizes that the heads of image files declare.

  Args:
    files: [B] string.
  """
  heads = tf.cast(
    tf.io.decode_raw(files, tf.uint8, fixed_length=_SIZE_HEAD_BYTES), tf.int64
  )
  is_jpeg = _starts_with(heads, b"\xff\xd8\xff")
  sizes = tf.where(
    _starts_with(heads, b"\x89PNG"), _big_endian(heads, 16) * _big_endian(heads, 20), 0
  )
  gif = _little_endian(heads, 6, 2) * _little_endian(heads, 8, 2)
  sizes = tf.where(_starts_with(heads, b"GIF8"), gif, sizes)
  bmp = _signed(_little_endian(heads, 18, 4)) * _signed(_little_endian(heads, 22, 4))
  sizes = tf.where(_starts_with(heads, b"BM"), tf.abs(bmp), sizes)
  is_webp = _starts_with(heads, b"RIFF") & _starts_with(heads[:, 8:], b"WEBP")
  sizes = tf.where(is_webp, _webp_size(heads), sizes)
  # The size of a JPEG is only found by walking through the preceding segments.
  shapes = tf.cond(
    tf.reduce_any(is_jpeg),
    lambda: _jpeg_size(files, is_jpeg),
    lambda: tf.zeros([tf.size(files), 3], tf.int32),
  )
  jpeg = tf.reduce_prod(tf.cast(shapes[:, :2], tf.int64), axis=1)
  return DeclaredSize(
    tf.where(is_jpeg, jpeg, sizes), tf.where(is_jpeg, shapes[:, 2], 0)
  )


def _jpeg_size(files: tf.Tensor, is_jpeg: tf.Tensor) -> tf.Tensor:
  """Returns [B, 3] int32: height, width and components of the JPEG files."""
  # A placeholder for other files: a branch per file would cost more than reading it.
  smallest = tf.io.encode_jpeg(tf.zeros([1, 1, 1], tf.uint8))
  # tf.where copies the files, so it is skipped if all are JPEG.
  all_jpeg = tf.cond(
    tf.reduce_all(is_jpeg), lambda: files, lambda: tf.where(is_jpeg, files, smallest)
  )
  return batched_map(
    tf.image.extract_jpeg_shape, all_jpeg, tf.TensorSpec([3], tf.int32)
  )


def _webp_size(heads: tf.Tensor) -> tf.Tensor:
  """Returns sizes for the three kinds of first chunk: lossy, lossless, extended."""
  mask = 0x3FFF
  lossy = (_little_endian(heads, 26, 2) & mask) * (_little_endian(heads, 28, 2) & mask)
  bits = _little_endian(heads, 21, 4)
  lossless = ((bits & mask) + 1) * ((tf.bitwise.right_shift(bits, 14) & mask) + 1)
  extended = (_little_endian(heads, 24, 3) + 1) * (_little_endian(heads, 27, 3) + 1)
  kind = heads[:, 12:]
  sizes = tf.where(_starts_with(kind, b"VP8L"), lossless, lossy)
  return tf.where(_starts_with(kind, b"VP8X"), extended, sizes)


def _starts_with(heads: tf.Tensor, magic: bytes) -> tf.Tensor:
  expected = tf.constant(list(magic), tf.int64)
  return tf.reduce_all(heads[:, : len(magic)] == expected, axis=1)


def _little_endian(heads: tf.Tensor, first: int, num_bytes: int) -> tf.Tensor:
  factors = tf.constant(
    [1 << (8 * position) for position in range(num_bytes)], tf.int64
  )
  return tf.reduce_sum(heads[:, first : first + num_bytes] * factors, axis=1)


def _big_endian(heads: tf.Tensor, first: int) -> tf.Tensor:
  return _little_endian(tf.reverse(heads[:, first : first + 4], [1]), 0, 4)


def _signed(value: tf.Tensor) -> tf.Tensor:
  return tf.where(value >= 1 << 31, value - (1 << 32), value)


class ImageInfo(NamedTuple):
  """Properties that the first bytes of files declare.

  Attributes:
    num_pixels: [B] int64, declared; 0 for unknown formats.
    is_plain: [B] bool, JPEG and PNG that need only TensorFlow's own decoder.
    kind: [B] int32, decoding method of the other files.
    orientation: [B] int32, 1 ... 8 as in Exif.
    is_refused: [B] bool, BMP and WebP files that TensorFlow decodes wrongly, or not in
      every version.
  """

  num_pixels: tf.Tensor
  is_plain: tf.Tensor
  kind: tf.Tensor
  orientation: tf.Tensor
  is_refused: tf.Tensor


def read_image_info(
  files: tf.Tensor, *, channels: int, has_background: bool
) -> ImageInfo:
  """Reads the first bytes of image files.

  Args:
    files: [B] string.
    channels: C, 1 or 3.
    has_background: whether transparent pixels are composited over a background.
  """
  heads = tf.io.decode_raw(files, tf.uint8, fixed_length=_INFO_HEAD_BYTES)
  heads = tf.cast(heads, tf.int32)
  declared = read_declared_size(files)
  orientations = image_formats.read_orientations(files)
  is_png = tf.reduce_all(heads[:, :4] == tf.constant(list(b"\x89PNG")), axis=1)
  is_bmp = tf.reduce_all(heads[:, :2] == tf.constant(list(b"BM")), axis=1)
  is_webp = tf.reduce_all(heads[:, 8:12] == tf.constant(list(b"WEBP")), axis=1)
  # libjpeg converts one or three components to grey, but not four (CMYK).
  is_plain = (declared.num_components >= 1) & (declared.num_components <= 3)
  is_plain |= (declared.num_components == 4) & (channels == 3)
  is_plain = (is_plain | (is_png & (not has_background))) & (orientations == 1)
  kind = tf.where(is_bmp & (heads[:, 28] == 8), _PALETTE_BMP, _OTHER)
  kind = tf.where(is_png, _ALPHA_PNG, kind) if has_background else kind
  is_decoded = (heads[:, 14] >= 40) & (heads[:, 30] == 0) & (heads[:, 29] == 0)
  is_decoded &= (heads[:, 28] == 8) | (heads[:, 28] == 24) | (heads[:, 28] == 32)
  return ImageInfo(
    declared.num_pixels, is_plain, kind, orientations, (is_bmp & ~is_decoded) | is_webp
  )


def decode_unusual(
  file: tf.Tensor,
  kind: tf.Tensor,
  *,
  channels: int,
  background: Optional[tuple[int, int, int]] = None,
) -> tf.Tensor:
  """Decodes an image file that is not plain, without turning it upright.

  Args:
    file: [] string.
    kind: [] int32, as in `ImageInfo`.
    channels: C, 1 or 3.
    background: red, green and blue under transparent pixels; None drops alpha, which
      leaves the colours that the file holds there.

  Returns:
    [H, W, C] uint8.
  """
  branches = [
    lambda: tf.io.decode_image(file, channels=3, expand_animations=False),
    lambda: _palette_bmp(file),
  ]
  if background is not None:
    branches.append(lambda: _blend(background, file))
  image = tf.ensure_shape(tf.switch_case(kind, branches), [None, None, 3])
  return image if channels == 3 else _grey(image)


def _blend(background: tuple[int, int, int], file: tf.Tensor) -> tf.Tensor:
  """Decodes a PNG file over a background colour."""
  # With 4 channels, TensorFlow decodes a wrong alpha for pixels of less than 8 bits.
  image = tf.cast(tf.io.decode_png(file), tf.int32)
  num_channels = tf.shape(image)[-1]
  num_colours = num_channels - (num_channels + 1) % 2
  opaque = tf.pad(image, [[0, 0], [0, 0], [0, 1]], constant_values=255)
  alpha = opaque[..., num_colours : num_colours + 1]
  mixed = image[..., :num_colours] * alpha + tf.constant(background) * (255 - alpha)
  return tf.cast((mixed + 127) // 255, tf.uint8)


def _palette_bmp(file: tf.Tensor) -> tf.Tensor:
  """Decodes a palette BMP: TensorFlow returns indices of the palette in the header."""
  numbers = tf.io.decode_bmp(file)[..., 0]
  head = tf.strings.substr(file, 0, 18)
  head = tf.cast(tf.io.decode_raw(head, tf.uint8, fixed_length=18), tf.int32)
  factors = tf.constant([1, 1 << 8, 1 << 16, 1 << 24])
  first = _BMP_HEADER_BYTES + tf.reduce_sum(head[14:18] * factors)
  num_bytes = tf.clip_by_value(tf.reduce_sum(head[10:14] * factors) - first, 0, 1024)
  palette = tf.strings.substr(file, first, num_bytes)
  palette = tf.reshape(tf.io.decode_raw(palette, tf.uint8, fixed_length=1024), [256, 4])
  return tf.gather(palette[:, 2::-1], tf.cast(numbers, tf.int32))


def _grey(image: tf.Tensor) -> tf.Tensor:
  weighted = tf.cast(image, tf.int32) * tf.constant(_GREY_WEIGHTS)
  grey = (tf.reduce_sum(weighted, axis=-1, keepdims=True) + (1 << 15)) // (1 << 16)
  return tf.cast(grey, tf.uint8)


class Decoder(Protocol):
  """A function from serialized examples to model inputs."""

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of one input."""

  @property
  def features(self) -> tuple[str, ...]:
    """Names of the features of an example that an input is computed from."""

  def __call__(self, serialized: tf.Tensor) -> tf.Tensor:
    """Decodes [B] serialized `tf.train.Example` to [B, *shape] float32."""


@gin.register
class ImageDecoder:
  """Decoder of PNG, JPEG, GIF (first picture) and BMP to values in [0, 1].

  Images are turned upright by their Exif orientation. An image of another size is
  resized, with antialiasing if it shrinks, and rounded to 8 bits. BMP must be
  uncompressed, with 8, 24 or 32 bits per pixel. Ingest converts other formats.

  Args:
    height: H, pixels.
    width: W, pixels.
    channels: 1 for grey, 3 for colour; images are converted.
    feature: name of the feature that holds the file's bytes.
    max_pixels: an image that declares more is a bad record and is not decoded.
    background: colour under transparent pixels of PNG, as a name ("white") or
      "#rrggbb"; None drops alpha, which leaves the colours that the file holds there.

  Raises:
    UserError: a size or the limit is below 1, channels are neither 1 nor 3, or the
      background is not a colour.
  """

  def __init__(
    self,
    *,
    height: int,
    width: int,
    channels: int,
    feature: str = "image",
    max_pixels: int = 100_000_000,
    background: Optional[str] = None,
  ):
    if height < 1 or width < 1 or channels not in (1, 3):
      raise UserError(
        f"ImageDecoder(height={height}, width={width}, channels={channels}): sizes "
        "must be at least 1 and channels 1 or 3."
      )
    check_at_least("ImageDecoder.max_pixels", max_pixels, 1)
    self.shape = (height, width, channels)
    self.features = (feature,)
    self._feature = feature
    self._max_pixels = max_pixels
    self._black = _black_png(self.shape)
    self._background = None if background is None else _colour(background)

  def __call__(self, serialized: tf.Tensor) -> tf.Tensor:
    """Decodes [B] string examples to [B, H, W, C] float32 in [0, 1]."""
    features = {self._feature: tf.io.FixedLenFeature([], tf.string)}
    return self.decode_files(tf.io.parse_example(serialized, features)[self._feature])

  def decode_files(self, files: tf.Tensor) -> tf.Tensor:
    """Decodes [B] string image files to [B, H, W, C] float32 in [0, 1]."""
    info = read_image_info(
      files, channels=self.shape[-1], has_background=self._background is not None
    )
    files = self._checked(files, info)
    # A branch per file would slow down the many files that need none.
    are_plain = tf.reduce_all(info.is_plain)
    plain = tf.cond(
      are_plain, lambda: files, lambda: tf.where(info.is_plain, files, self._black)
    )
    images = batched_map(self._decode_plain, plain, tf.TensorSpec(self.shape, tf.uint8))
    images = tf.cond(
      are_plain, lambda: images, lambda: self._decode_unusual_files(images, files, info)
    )
    return tf.cast(images, tf.float32) / 255.0

  def _checked(self, files: tf.Tensor, info: ImageInfo) -> tf.Tensor:
    """Checks for decompression bombs and unsupported files; returns the files."""
    is_small = info.num_pixels <= self._max_pixels
    checks = [
      tf.debugging.assert_equal(
        is_small,
        True,
        f"an image declares more pixels than the {self._max_pixels:,} allowed by "
        "ImageDecoder.max_pixels",
      ),
      tf.debugging.assert_equal(
        info.is_refused,
        False,
        "an image is WebP, or a BMP that is compressed or does not have 8, 24 or 32 "
        "bits per pixel; convert it with --mode=ingest",
      ),
    ]
    with tf.control_dependencies([check for check in checks if check is not None]):
      return tf.identity(files)

  def _decode_plain(self, file: tf.Tensor) -> tf.Tensor:
    height, width, channels = self.shape
    image = tf.io.decode_image(file, channels=channels, expand_animations=False)
    return tf.ensure_shape(_resize(image, [height, width]), self.shape)

  def _decode_unusual_files(
    self, images: tf.Tensor, files: tf.Tensor, info: ImageInfo
  ) -> tf.Tensor:
    """Returns the images, with those of files that are not plain filled in."""
    positions = tf.where(~info.is_plain)

    def decode(row: tuple[tf.Tensor, ...]) -> tf.Tensor:
      file, kind, orientation_of_file = row
      image = decode_unusual(
        file, kind, channels=self.shape[-1], background=self._background
      )
      # Turned after resizing: turning a full photo costs as much as decoding it.
      height, width, _ = self.shape
      size = tf.where(orientation_of_file >= 5, [width, height], [height, width])
      turned = image_formats.turn_upright(_resize(image, size), orientation_of_file)
      return tf.ensure_shape(turned, self.shape)

    others = tf.map_fn(
      decode,
      tuple(tf.gather_nd(c, positions) for c in (files, info.kind, info.orientation)),
      fn_output_signature=tf.TensorSpec(self.shape, tf.uint8),
      parallel_iterations=_PARALLEL_FILES,
    )
    return tf.tensor_scatter_nd_update(images, positions, others)


def _resize(image: tf.Tensor, size: Sequence[int] | tf.Tensor) -> tf.Tensor:
  """Resizes an image to (height, width), rounded to 8 bits."""

  def resize() -> tf.Tensor:
    resized = tf.image.resize(image, size, antialias=True)
    return tf.saturate_cast(tf.round(resized), tf.uint8)

  has_size = tf.reduce_all(tf.shape(image)[:2] == size)
  return tf.cond(has_size, lambda: image, resize)


def _black_png(shape: tuple[int, ...]) -> bytes:
  """Returns a black PNG file of the decoder's size, which needs no resizing."""
  height, width, channels = shape
  file = io.BytesIO()
  Image.new("L" if channels == 1 else "RGB", (width, height)).save(file, "PNG")
  return file.getvalue()


def _colour(name: str) -> tuple[int, int, int]:
  """Parses a colour to red, green and blue, 0 ... 255."""
  try:
    red, green, blue = ImageColor.getrgb(name)[:3]
  except (ValueError, TypeError) as error:
    raise UserError(
      f"ImageDecoder.background={name!r} is not a colour; use a name such as 'white', "
      "or '#rrggbb'."
    ) from error
  return red, green, blue


@gin.register
class VectorDecoder:
  """Decoder of float vectors, without any change.

  Args:
    size: length of a vector.
    feature: name of the feature that holds it.

  Raises:
    UserError: the size is below 1.
  """

  def __init__(self, *, size: int, feature: str = "vector"):
    check_at_least("VectorDecoder.size", size, 1)
    self.shape = (size,)
    self.features = (feature,)
    self._feature = feature

  def __call__(self, serialized: tf.Tensor) -> tf.Tensor:
    """Decodes [B] string examples to [B, size] float32."""
    features = {self._feature: tf.io.FixedLenFeature(self.shape, tf.float32)}
    return tf.io.parse_example(serialized, features)[self._feature]
