"""Encoding of items as serialized examples."""

from __future__ import annotations

import hashlib
import re
from typing import NamedTuple, Optional

import gin
import numpy as np
import tensorflow as tf

from trainer.data import image_formats
from trainer.data.sources.source import RECORD_FEATURES, Item, Value
from trainer.errors import UserError, check_at_least

LABEL_FEATURE = "label"
_LARGEST_INTEGER = np.iinfo(np.int64).max
_FLOAT_BYTES = 4
_LARGEST_WHOLE_FLOAT = 2.0**53


@gin.register
class Resize:
  """Downscaling of images at ingest; results are stored as PNG or JPEG.

  Args:
    longest_side: pixels; smaller images are unchanged.
    jpeg_quality: 1 … 100; None for PNG, which is lossless.

  Raises:
    UserError: the side is below 1, or the quality is out of range.
  """

  def __init__(self, *, longest_side: int, jpeg_quality: Optional[int] = None):
    check_at_least("Resize.longest_side", longest_side, 1)
    if jpeg_quality is not None and not 1 <= jpeg_quality <= 100:
      raise UserError(f"Resize.jpeg_quality={jpeg_quality} must be 1 … 100, or None.")
    self._longest_side = longest_side
    self._jpeg_quality = jpeg_quality

  def describe(self) -> dict[str, object]:
    """Returns its arguments."""
    return {"longest_side": self._longest_side, "jpeg_quality": self._jpeg_quality}

  def __call__(self, image: tf.Tensor) -> Optional[bytes]:
    """Returns [H, W, C] uint8 as a smaller file; None if it is small enough."""
    height, width, channels = image.shape
    scale = self._longest_side / max(height, width)
    if scale >= 1:
      return None
    size = [max(1, round(height * scale)), max(1, round(width * scale))]
    resized = tf.image.resize(image, size, antialias=True)
    pixels = tf.saturate_cast(tf.round(resized), tf.uint8)
    if self._jpeg_quality is None or channels not in (1, 3):
      return tf.io.encode_png(pixels).numpy()
    return tf.io.encode_jpeg(pixels, quality=self._jpeg_quality).numpy()


class EncodedExample(NamedTuple):
  """A record, ready to be written.

  Attributes:
    label: name of its class.
    key: its name in the source.
    data: the serialized `tf.train.Example`.
    digest: 64-bit hash of its content without key and label.
  """

  label: str
  key: str
  data: bytes
  digest: int


class ExampleEncoder:
  """Encoder of items as records.

  Args:
    max_pixels: an image that declares more is refused before it is decoded.
    resize: downscales images; None to keep files byte for byte.
  """

  def __init__(self, *, max_pixels: int, resize: Optional[Resize] = None):
    self._max_pixels = max_pixels
    self._resize = resize

  def __call__(self, item: Item) -> EncodedExample:
    """Returns the record of an item.

    Raises:
      UserError: its image doesn't decode or is too large, or a feature can't be stored.
    """
    image = None if item.image is None else self._encode_image(item.key, item.image)
    values: dict[str, Value] = dict(item.features)
    for name in RECORD_FEATURES:
      if name in values:
        raise UserError(
          f"{item.key} has a feature {name!r}, which is a reserved name; rename or "
          "remove it."
        )
    if image is not None:
      values["image"] = image
    if not values:
      raise UserError(f"{item.key} has neither an image nor another feature.")
    content = _serialize(values, item.key)
    values[LABEL_FEATURE] = item.label
    values["key"] = item.key.encode("utf-8", "surrogateescape")
    digest = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
    return EncodedExample(item.label, item.key, _serialize(values, item.key), digest)

  def _encode_image(self, key: str, file: bytes) -> bytes:
    head = image_formats.read_image_head(file)
    if head is not None and min(head.width, head.height) < 1:
      raise _image_error(key, file, f"it is {head.format}, and its size can't be read.")
    if head is not None and head.width * head.height > self._max_pixels:
      raise UserError(
        f"{key} declares {head.width} x {head.height} pixels, more than the "
        f"{self._max_pixels:,} allowed; resize it, or raise ingest.max_pixels."
      )
    try:
      file = convert_for_training(file, self._max_pixels)
      resized = None if self._resize is None else self._resize(_decode_native(file))
      if resized is not None:
        return resized
      # Decodes with the operation that training uses.
      tf.io.decode_image(file, channels=3, expand_animations=False)
    except UserError as error:
      raise _image_error(key, file, str(error)) from error
    except tf.errors.OpError as error:
      raise _image_error(key, file, error.message) from error
    return file


def convert_for_training(file: bytes, max_pixels: Optional[int] = None) -> bytes:
  """Returns an image file that training decodes to the same image as Pillow.

  Args:
    file: PNG and JPEG are returned unchanged, unless their orientation is in metadata
      that training does not read.
    max_pixels: limit on the declared pixels of an image in another format.

  Raises:
    UserError: it has another format and can't be converted.
  """
  if not image_formats.is_decoded_in_training(file):
    file = image_formats.convert_to_png(file, max_pixels=max_pixels)
  if not image_formats.has_metadata(file):
    return file
  wanted = image_formats.orientation(file)
  if wanted != _orientation_in_training(tf.constant(file)):
    file = image_formats.set_orientation(file, wanted)
  return file


def _decode_native(file: bytes) -> tf.Tensor:
  """Returns [H, W, C] uint8, upright; greyscale and alpha are preserved."""
  # Image encoders don't support CMYK pixels.
  is_jpeg = file.startswith(b"\xff\xd8")
  is_cmyk = is_jpeg and tf.image.extract_jpeg_shape(file)[2] > 3
  image = tf.io.decode_image(file, channels=3 if is_cmyk else 0)
  if not image_formats.has_metadata(file):
    return image
  return image_formats.turn_upright(image, _orientation_in_training(tf.constant(file)))


@tf.function(input_signature=[tf.TensorSpec([], tf.string)])
def _orientation_in_training(file: tf.Tensor) -> tf.Tensor:
  return image_formats.read_orientations(file[tf.newaxis])[0]


def _image_error(key: str, file: bytes, message: str) -> UserError:
  reason = re.sub(r"^{{.*?}} ?|\[Op:.*", "", message).splitlines()[0]
  return UserError(f"{key} can't be decoded as an image ({len(file)} bytes): {reason}")


def _serialize(values: dict[str, Value], key: str) -> bytes:
  features = {name: _feature(value, name, key) for name, value in values.items()}
  example = tf.train.Example(features=tf.train.Features(feature=features))
  return example.SerializeToString(deterministic=True)


def _feature(value: Value, name: str, key: str) -> tf.train.Feature:
  if isinstance(value, str):
    value = value.encode()
  if isinstance(value, bytes):
    return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))
  array = _flatten(value)
  if array.dtype.kind == "O":
    texts = [each.encode() if isinstance(each, str) else each for each in array]
    if all(isinstance(each, bytes) for each in texts):
      return tf.train.Feature(bytes_list=tf.train.BytesList(value=texts))
  if array.dtype.kind == "u" and array.size and array.max() > _LARGEST_INTEGER:
    raise UserError(
      f"{key} has {array.max()} in the feature {name!r}; integers in records are at "
      f"most {_LARGEST_INTEGER}."
    )
  if array.dtype.kind in "iub":
    return tf.train.Feature(
      int64_list=tf.train.Int64List(value=array.astype(np.int64).tolist())
    )
  if array.dtype.kind == "f":
    _check_precision(array, name, key)
    return tf.train.Feature(float_list=tf.train.FloatList(value=array.tolist()))
  raise UserError(
    f"{key} has a feature {name!r} of type {array.dtype}; it must be text, bytes, "
    "integers or floats."
  )


def _flatten(value: Value) -> np.ndarray:
  """Flattens the values of a feature to [n]; text and bytes stay objects, unchanged.

  Raises:
    ValueError: it is ragged.
  """
  if isinstance(value, (list, tuple)) and any(
    isinstance(v, (str, bytes)) for v in value
  ):
    array: np.ndarray = np.empty(len(value), np.dtype(object))
    array[:] = value
    return array
  array = np.asarray(value)
  if np.ma.is_masked(value):
    raise ValueError("it has masked values.")
  return array.ravel().astype(object if array.dtype.kind in "US" else array.dtype)


def _check_precision(array: np.ndarray, name: str, key: str) -> None:
  """Raises if float32 would change a value into a different number.

  Rounding is expected. A number that overflows to infinity is refused, and so is a
  single whole float64, possibly an identifier, that float32 can't represent.
  """
  if array.dtype.itemsize <= _FLOAT_BYTES:
    return
  with np.errstate(over="ignore"):
    as_float32 = array.astype(np.float32)
  is_changed = np.isfinite(array) & ~np.isfinite(as_float32)
  if array.size == 1:
    is_whole = (array == np.floor(array)) & (np.abs(array) <= _LARGEST_WHOLE_FLOAT)
    is_changed |= is_whole & (as_float32 != array)
  if is_changed.any():
    raise UserError(
      f"{key} has {array[is_changed][0]} in the feature {name!r}, which the 32-bit "
      "floats of records can't represent; convert it to an integer, or remove it."
    )
