"""From items to records: images are checked by header, decoded and resized."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import tensorflow as tf

from trainer.data import image_formats
from trainer.data.example_encoder import ExampleEncoder, Resize
from trainer.data.sources.source import Item, encode_png
from trainer.errors import UserError


def _image(height=60, width=40, channels=3):
  shape = (height, width, channels)
  return np.random.default_rng(1).integers(0, 256, shape).astype(np.uint8)


def _encoded(format_name, image):
  from PIL import Image

  file = io.BytesIO()
  Image.fromarray(image).save(file, format_name, **_LOSSLESS.get(format_name, {}))
  return file.getvalue()


_LOSSLESS = {"webp": {"lossless": True}}


def _bomb(width=20_000, height=20_000):
  """A PNG of a few bytes that declares a large size."""
  head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
  chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(b"\0" * 1000)), (b"IEND", b"")]
  return b"\x89PNG\r\n\x1a\n" + b"".join(
    struct.pack(">I", len(data))
    + name
    + data
    + struct.pack(">I", zlib.crc32(name + data))
    for name, data in chunks
  )


def _encoded_image(item, **options):
  record = ExampleEncoder(max_pixels=10_000, **options)(item)
  features = tf.train.Example.FromString(record.data).features.feature
  return features["image"].bytes_list.value[0]


@pytest.mark.parametrize("format_name", ["png", "jpeg", "gif", "bmp", "webp"])
def test_header_has_format_and_size(format_name):
  file = _encoded(format_name, _image())
  assert image_formats.read_image_head(file) == image_formats.ImageHead(
    format_name, 40, 60
  )


@pytest.mark.parametrize("options", [{}, {"lossless": True}, {"exif": b"Exif\0\0"}])
def test_header_of_each_webp_variant_has_the_size(options):
  from PIL import Image

  file = io.BytesIO()
  Image.fromarray(_image()).save(file, "webp", **options)
  assert image_formats.read_image_head(file.getvalue()) == image_formats.ImageHead(
    "webp", 40, 60
  )


@pytest.mark.parametrize("format_name", ["png", "jpeg", "gif", "bmp", "webp"])
def test_truncated_header_raises_no_exception(format_name):
  file = _encoded(format_name, _image())
  for length in range(64):
    head = image_formats.read_image_head(file[:length])
    assert head is None or (head.width, head.height) in ((40, 60), (0, 0))


def test_a_decompression_bomb_is_refused_by_its_declared_size():
  with pytest.raises(UserError, match=r"boom declares 20000 x 20000 pixels, more than"):
    ExampleEncoder(max_pixels=100_000_000)(Item("boom", "a", _bomb()))


def test_empty_image_is_named():
  with pytest.raises(
    UserError, match=r"empty can't be decoded as an image \(0 bytes\)"
  ):
    ExampleEncoder(max_pixels=10_000)(Item("empty", "a", b""))


def test_webp_is_kept_as_png_with_the_same_pixels():
  image = _image()
  kept = _encoded_image(Item("w", "a", _encoded("webp", image)))
  assert image_formats.read_image_head(kept).format == "png"
  np.testing.assert_array_equal(tf.io.decode_png(kept), image)


def test_truncated_webp_is_named():
  file = _encoded("webp", _image())
  with pytest.raises(UserError, match="w can't be decoded as an image"):
    ExampleEncoder(max_pixels=10_000)(Item("w", "a", file[: len(file) // 2]))


def test_images_are_downsized_with_their_aspect_ratio():
  kept = _encoded_image(
    Item("i", "a", encode_png(_image())), resize=Resize(longest_side=30)
  )
  assert image_formats.read_image_head(kept) == image_formats.ImageHead("png", 20, 30)
  expected = tf.image.resize(_image(), (30, 20), antialias=True)
  np.testing.assert_allclose(tf.io.decode_png(kept), expected, atol=0.51)


def test_images_can_be_stored_as_jpeg():
  resize = Resize(longest_side=30, jpeg_quality=90)
  kept = _encoded_image(Item("i", "a", encode_png(_image())), resize=resize)
  assert image_formats.read_image_head(kept) == image_formats.ImageHead("jpeg", 20, 30)


def test_small_images_are_kept_byte_for_byte():
  file = encode_png(_image())
  assert _encoded_image(Item("i", "a", file), resize=Resize(longest_side=60)) == file


@pytest.mark.parametrize(
  ("item", "message"),
  [
    (Item("k", "a"), "k has neither an image nor another feature"),
    (
      Item("k", "a", features={"label": 3}),
      "feature 'label', which is a reserved name",
    ),
    (Item("k", "a", features={"x": np.array([1j])}), "'x' of type complex128"),
  ],
)
def test_items_that_make_no_record_are_refused(item, message):
  with pytest.raises(UserError, match=message):
    ExampleEncoder(max_pixels=10_000)(item)


@pytest.mark.parametrize(
  "options", [{"longest_side": 0}, {"longest_side": 9, "jpeg_quality": 0}]
)
def test_invalid_sizes_are_refused(options):
  with pytest.raises(UserError, match="must be"):
    Resize(**options)


@pytest.mark.parametrize("shape", [(3,), (4, 4, 2), (2, 4, 4, 3)])
def test_arrays_that_are_not_images_are_refused(shape):
  with pytest.raises(UserError, match="can't be stored; it must be uint8"):
    encode_png(np.zeros(shape, np.uint8))


def test_integer_beyond_int64_is_named():
  item = Item("k", "a", features={"x": 2**63})
  with pytest.raises(UserError, match="k has 9223372036854775808 in the feature 'x'"):
    ExampleEncoder(max_pixels=10)(item)


def test_size_is_found_despite_junk_between_jpeg_segments():
  file = _encoded("jpeg", _image())
  start = 4 + int.from_bytes(file[4:6], "big")
  odd = file[:start] + b"\0" + file[start:]
  assert tf.io.decode_jpeg(odd).shape == (60, 40, 3)
  assert image_formats.read_image_head(odd) == image_formats.ImageHead("jpeg", 40, 60)
  with pytest.raises(UserError, match="declares 40 x 60 pixels, more than"):
    ExampleEncoder(max_pixels=2000)(Item("odd", "a", odd))


@pytest.mark.parametrize(
  "file", [b"\xff\xd8\xff\xd9" + b"\0" * 40, b"BM" + b"\xff" * 40]
)
def test_image_of_unknown_size_is_refused(file):
  with pytest.raises(
    UserError, match=r"odd can't be decoded as an image .* its size can't be read"
  ):
    ExampleEncoder(max_pixels=2000)(Item("odd", "a", file))


def _feature(value):
  record = ExampleEncoder(max_pixels=100)(Item("k", "c", None, {"x": value}))
  feature = tf.train.Example.FromString(record.data).features.feature["x"]
  kind = feature.WhichOneof("kind")
  return kind, list(getattr(feature, kind).value)


@pytest.mark.parametrize(
  ("value", "kept"),
  [
    (True, ("int64_list", [1])),
    (np.array([True, False]), ("int64_list", [1, 0])),
    (np.array([], np.int8), ("int64_list", [])),
    (np.array([], np.float64), ("float_list", [])),
    (np.array([], object), ("bytes_list", [])),
    (["a", b"b\0"], ("bytes_list", [b"a", b"b\0"])),
    (np.array(["ö", "b"]), ("bytes_list", ["ö".encode(), b"b"])),
    (2.0**24, ("float_list", [2.0**24])),
    (np.array([1e9 + 1, 0.5]), ("float_list", [1e9, 0.5])),
    (float("nan"), ("float_list", pytest.approx([np.nan], nan_ok=True))),
  ],
)
def test_a_feature_keeps_values_and_type(value, kept):
  assert _feature(value) == kept


@pytest.mark.parametrize(
  ("value", "message"),
  [
    (
      2.0**24 + 1,
      "has 16777217.0 in the feature 'x', which the 32-bit floats of records",
    ),
    (np.array([0.0, -1e300]), r"has -1e\+300 in the feature 'x'"),
    (["a", 1], "a feature 'x' of type object"),
    (np.array([b"a", None], object), "a feature 'x' of type object"),
  ],
)
def test_lossy_feature_is_refused(value, message):
  with pytest.raises(UserError, match=message):
    _feature(value)


def test_masked_values_are_refused():
  with pytest.raises(ValueError, match="masked"):
    _feature(np.ma.masked_array([1, 2], [False, True]))
  assert _feature(np.ma.masked_array([1, 2], False)) == ("int64_list", [1, 2])
