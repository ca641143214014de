"""Image formats: recognition, conversion at ingest and decoding, against Pillow."""

from __future__ import annotations

import functools
import io
import struct

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageOps, PngImagePlugin

from trainer.data import image_formats
from trainer.data.example_encoder import ExampleEncoder, Resize
from trainer.data.images import ImageDecoder
from trainer.data.sources.source import Item
from trainer.errors import UserError


def _pixels(height=6, width=9, channels=3, seed=0):
  shape = (height, width, channels) if channels else (height, width)
  return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def _encoded(image, kind, **options):
  file = io.BytesIO()
  image.save(file, kind, **options)
  return file.getvalue()


_PILLOW_NAMES = {"PNM": "PPM", "JPEG 2000": "JPEG2000"}
_WRITTEN = [each.name for each in image_formats.FORMATS if each.name != "HEIC"]


@pytest.mark.parametrize("name", _WRITTEN)
def test_formats_written_by_pillow_are_recognised(name):
  file = _encoded(Image.fromarray(_pixels()), _PILLOW_NAMES.get(name, name))
  found = image_formats.detect_format(file[: image_formats.HEAD_BYTES])
  assert found is not None and found.name == name


@pytest.mark.parametrize(
  ("head", "name"),
  [
    (b"\0\0\0\x18ftypheic\0\0\0\0", "HEIC"),
    (b"\0\0\0\x18ftypmif1\0\0\0\0", "HEIC"),
    (b"\xff\x4f\xff\x51\0\x29", "JPEG 2000"),
    (b"MM\0\x2a\0\0\0\x08", "TIFF"),
    (b"\0\0\0\x18ftypmp42\0\0\0\0", None),
    (b"RIFF\0\0\0\0WAVE", None),
    (b"<html>404</html>", None),
    (b"", None),
  ],
)
def test_other_files_are_not_recognised_as_images(head, name):
  found = image_formats.detect_format(head)
  assert (found and found.name) == name


def test_file_extensions_are_case_insensitive():
  assert image_formats.has_image_ending("UPPER.JPG")
  assert image_formats.has_image_ending("a.b.heic")
  assert not image_formats.has_image_ending("Thumbs.db")
  assert not image_formats.has_image_ending("png")
  assert not set(image_formats.ENDINGS) & set(image_formats.OTHER_ENDINGS)


def _smooth(height=24, width=40):
  """Returns smooth colours with little JPEG error and four different corners."""
  rows, columns = np.mgrid[:height, :width]
  red, green = rows * 255 // height, columns * 255 // width
  return np.stack([red, green, (red + green) // 3], -1).astype(np.uint8)


def _exif(orientation, order=">", kind=3):
  value = struct.pack(
    order + ("HH" if kind == 3 else "I"), orientation, *[0][: kind == 3]
  )
  mark = b"MM\0\x2a" if order == ">" else b"II\x2a\0"
  head = struct.pack(order + "IHHHI", 8, 1, 0x0112, kind, 1)
  return b"Exif\0\0" + mark + head + value + bytes(4)


def _segment(marker, content):
  return b"\xff" + bytes([marker]) + struct.pack(">H", len(content) + 2) + content


def _xmp(orientation):
  text = f'<x:xmpmeta><rdf:Description tiff:Orientation="{orientation}"/></x:xmpmeta>'
  return _segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + text.encode())


def _upright(file, channels, background=None):
  """Returns the pixels of Pillow, the oracle."""
  with Image.open(io.BytesIO(file)) as opened:
    image = ImageOps.exif_transpose(opened)
  if image.mode.startswith("I"):
    image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
  if background is not None:
    over = Image.new("RGBA", image.size, background)
    image = Image.alpha_composite(over, image.convert("RGBA"))
  image = image.convert("RGB" if channels == 3 else "L")
  return np.asarray(image).reshape(image.height, image.width, channels)


@functools.cache
def _decoder(shape, **options):
  height, width, channels = shape
  decoder = ImageDecoder(height=height, width=width, channels=channels, **options)
  return tf.function(
    decoder.decode_files, input_signature=[tf.TensorSpec([1], tf.string)]
  )


def _decoded(file, shape, **options):
  images = _decoder(shape, **options)(tf.constant([file]))
  return np.round(images.numpy()[0] * 255)


def _ingested(file, **options):
  record = ExampleEncoder(max_pixels=10**6, **options)(Item("picture", "a", file))
  example = tf.train.Example.FromString(record.data)
  return example.features.feature["image"].bytes_list.value[0]


def _levels_off(kept, file, channels, **options):
  """Returns the largest difference to the pixels of Pillow, in 8-bit levels."""
  expected = _upright(file, channels, **options)
  got = _decoded(kept, expected.shape, **options)
  return np.abs(got - expected.astype(float)).max()


_JPEG = _encoded(Image.fromarray(_smooth()), "JPEG", quality=95)
_COLOURS = Image.fromarray(_smooth())
_GREY = _COLOURS.convert("L")
_DEEP = Image.fromarray(np.asarray(_GREY).astype(np.uint16) * 257)
_ALPHA = _COLOURS.copy()
_ALPHA.putalpha(_GREY)
_PALETTE = _COLOURS.quantize(16)
_CLEAR = Image.fromarray(np.asarray(_PALETTE))
_CLEAR.putpalette(_PALETTE.getpalette())


def _two_pictures(kind, **options):
  others = [Image.new("RGB", _COLOURS.size, "red")]
  return _encoded(
    _COLOURS, kind, save_all=True, append_images=others, duration=9, **options
  )


def _rle_bmp():
  """Returns two pixels of one colour, run-length encoded."""
  head = struct.pack("<IiiHHIIiiII", 40, 2, 1, 1, 8, 1, 4, 0, 0, 1, 0)
  palette, pixels = bytes([10, 200, 90, 0]), bytes([2, 0, 0, 1])
  first = 14 + len(head) + len(palette)
  size = first + len(pixels)
  return struct.pack("<2sIII", b"BM", size, 0, first) + head + palette + pixels


_KINDS = {
  "PNG": (_encoded(_COLOURS, "PNG"), 1),
  "PNG of a palette": (_encoded(_PALETTE, "PNG"), 1),
  "PNG of a palette with a clear colour": (_encoded(_CLEAR, "PNG", transparency=3), 1),
  "PNG of 1 bit": (_encoded(_GREY.convert("1"), "PNG"), 0),
  "PNG of 16 bits": (_encoded(_DEEP, "PNG"), 0),
  "PNG with alpha": (_encoded(_ALPHA, "PNG"), 1),
  "PNG of grey with alpha": (_encoded(_ALPHA.convert("LA"), "PNG"), 0),
  "PNG with a profile": (_encoded(_COLOURS, "PNG", icc_profile=b"profile"), 1),
  "JPEG": (_JPEG, 6),
  "JPEG of grey": (_encoded(_GREY, "JPEG"), 6),
  "JPEG of CMYK": (_encoded(_COLOURS.convert("CMYK"), "JPEG", quality=95), 6),
  "JPEG of RGB": (_encoded(_COLOURS, "JPEG", keep_rgb=True, quality=95), 6),
  "progressive JPEG": (_encoded(_COLOURS, "JPEG", progressive=True, quality=95), 6),
  "GIF": (_encoded(_PALETTE, "GIF"), 1),
  "GIF with a clear colour": (_encoded(_PALETTE, "GIF", transparency=3), 1),
  "animated GIF": (_two_pictures("GIF"), 1),
  "BMP": (_encoded(_COLOURS, "BMP"), 1),
  "BMP of a palette": (_encoded(_PALETTE, "BMP"), 1),
  "BMP of grey": (_encoded(_GREY, "BMP"), 0),
  "BMP of 1 bit": (_encoded(_GREY.convert("1"), "BMP"), 0),
  "BMP with alpha": (_encoded(_ALPHA, "BMP"), 1),
  "compressed BMP": (_rle_bmp(), 1),
  "WebP": (_encoded(_COLOURS, "WEBP", quality=95), 1),
  "WebP with alpha": (_encoded(_ALPHA, "WEBP", lossless=True, exact=True), 1),
  "animated WebP": (_two_pictures("WEBP", lossless=True), 1),
  "PPM": (_encoded(_COLOURS, "PPM"), 1),
  "PGM of 16 bits": (_encoded(_DEEP, "PPM"), 0),
  "PBM": (_encoded(_GREY.convert("1"), "PPM"), 0),
  "TIFF": (_encoded(_COLOURS, "TIFF", compression="tiff_lzw"), 1),
  "TIFF of 16 bits": (_encoded(_DEEP, "TIFF"), 0),
  "TIFF of CMYK": (_encoded(_COLOURS.convert("CMYK"), "TIFF"), 1),
  "turned TIFF": (_encoded(_COLOURS, "TIFF", tiffinfo={0x0112: 6}), 1),
  "JPEG 2000": (_encoded(_COLOURS, "JPEG2000"), 1),
  "AVIF": (_encoded(_COLOURS, "AVIF"), 1),
  "WebP with Exif": (
    _encoded(_COLOURS, "WEBP", lossless=True, exif=_exif(8)),
    1,
  ),
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", _KINDS)
def test_ingested_images_decode_to_the_pixels_of_pillow(kind, channels):
  file, levels = _KINDS[kind]
  assert _levels_off(_ingested(file), file, channels) <= levels


@pytest.mark.parametrize("kind", ["PNG with alpha", "JPEG of CMYK", "BMP of a palette"])
def test_decoder_of_tensorflow_fails_on_these_images(kind):
  file, levels = _KINDS[kind]
  with pytest.raises((AssertionError, tf.errors.InvalidArgumentError)):
    image = tf.io.decode_image(file, channels=1, expand_animations=False)
    background = "white" if "alpha" in kind else None
    expected = _upright(file, 1, background).astype(float)
    np.testing.assert_allclose(image, expected, atol=levels)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "JPEG of CMYK", "PNG of 16 bits"])
def test_png_and_jpeg_are_kept_byte_for_byte(kind):
  assert _ingested(_KINDS[kind][0]) == _KINDS[kind][0]


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_jpeg_is_decoded_upright(orientation, order):
  exif = _segment(0xE1, _exif(orientation, order, kind=3 if order == "<" else 4))
  file = _JPEG[:2] + exif + _JPEG[2:]
  assert _ingested(file) == file
  for channels in (1, 3):
    assert _levels_off(file, file, channels) <= 6


_BEFORE_EXIF = {
  "JFIF": _JPEG[2:20],
  "JFIF with a thumbnail": _segment(0xE0, b"JFIF\0\1\1\0\0\1\0\1\1\1abc"),
  "a comment": _segment(0xFE, b"Exif\0\0 is what follows"),
  "a profile and XMP": _segment(0xE2, b"ICC_PROFILE\0" + bytes(70_000 % 60_000))
  + _xmp(3),
  "a filling byte": b"\xff",
}


@pytest.mark.parametrize("before", _BEFORE_EXIF)
def test_the_orientation_is_found_behind_other_segments(before):
  start = _BEFORE_EXIF[before] + _segment(0xE1, _exif(6))
  file = _JPEG[:2] + start + _JPEG[20:]
  assert _upright(file, 3).shape == (40, 24, 3)
  assert _levels_off(file, file, 3) <= 6


@pytest.mark.parametrize("num_files", [7, None])
def test_batch_of_all_orientations_keeps_its_order(num_files):
  files = [_JPEG[:2] + _segment(0xE1, _exif(k)) + _JPEG[2:] for k in range(1, 9)]
  files = [_KINDS["PNG"][0], *files, _KINDS["BMP of a palette"][0], _JPEG]
  files = [file for file in files if _upright(file, 3).shape == (24, 40, 3)]
  decoder = ImageDecoder(height=24, width=40, channels=3)
  signature = [tf.TensorSpec([num_files], tf.string)]
  decode = tf.function(decoder.decode_files, input_signature=signature)
  images = decode(tf.constant(files)).numpy() * 255
  expected = np.stack([_upright(file, 3) for file in files])
  assert len(files) == 7
  np.testing.assert_allclose(images, expected, atol=6.01)


@pytest.mark.parametrize("kind", ["XMP", "PNG", "PNG written by a tool"])
def test_orientations_outside_jpeg_exif_are_kept_at_ingest(kind):
  exif = Image.Exif()
  exif[0x0112] = 6
  text = PngImagePlugin.PngInfo()
  text.add_text(
    "Raw profile type exif", f"\nexif\n{len(_exif(6)):8}\n{_exif(6).hex()}\n"
  )
  file = {
    "XMP": _JPEG[:2] + _xmp(6) + _JPEG[2:],
    "PNG": _encoded(_COLOURS, "PNG", exif=exif),
    "PNG written by a tool": _encoded(_COLOURS, "PNG", pnginfo=text),
  }[kind]
  assert _upright(file, 3).shape == (40, 24, 3)
  assert _levels_off(_ingested(file), file, 3) <= 6
  if kind == "PNG":
    assert _levels_off(file, file, 3) <= 1


@pytest.mark.parametrize(
  "exif",
  [
    _exif(9),
    _exif(0),
    _exif(6)[:20],
    _exif(6)[:10] + b"\xff" * 4 + _exif(6)[14:],
    b"Exif\0\0",
    b"Exif\0\0" + bytes(40),
  ],
)
def test_image_with_a_damaged_orientation_is_not_rotated(exif):
  file = _JPEG[:2] + _segment(0xE1, exif) + _JPEG[2:]
  np.testing.assert_array_equal(
    _decoded(file, (24, 40, 3)), _decoded(_JPEG, (24, 40, 3))
  )


def test_segment_beyond_the_file_ends_the_search():
  file = _JPEG[:2] + b"\xff\xe1\xff\xff" + bytes(3)
  assert image_formats.read_orientations(
    tf.constant([file, b"", b"\xff\xd8\xff"])
  ).numpy().tolist() == [1, 1, 1]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
  "kind",
  [
    "PNG with alpha",
    "PNG of grey with alpha",
    "PNG of a palette with a clear colour",
    "PNG of 1 bit",
    "PNG of a palette",
    "PNG",
    "WebP with alpha",
    "GIF with a clear colour",
    "JPEG",
  ],
)
def test_transparent_pixels_show_the_background(kind, channels):
  file, levels = _KINDS[kind]
  kept = _ingested(file)
  for background in ("white", "#204060"):
    off = _levels_off(kept, file, channels, background=background)
    assert off <= max(levels, 1)


@pytest.mark.parametrize("background", ["whiteish", "", 7])
def test_invalid_background_colour_is_refused(background):
  with pytest.raises(UserError, match=r"background=.* is not a colour"):
    ImageDecoder(height=1, width=1, channels=3, background=background)


@pytest.mark.parametrize("kind", ["JPEG of CMYK", "PNG with alpha", "turned JPEG"])
def test_resizing_at_ingest_keeps_colours_alpha_and_orientation(kind):
  turned = _JPEG[:2] + _segment(0xE1, _exif(6)) + _JPEG[2:]
  file = {**_KINDS, "turned JPEG": (turned, 6)}[kind][0]
  kept = _ingested(file, resize=Resize(longest_side=20))
  with Image.open(io.BytesIO(file)) as opened:
    small = ImageOps.exif_transpose(opened)
    size = (small.width // 2, small.height // 2)
    colours = small.convert("RGBA" if "alpha" in kind else "RGB")
    bands = [band.resize(size, Image.Resampling.BILINEAR) for band in colours.split()]
  with Image.open(io.BytesIO(kept)) as opened:
    assert opened.mode == colours.mode
    assert opened.size == size
    difference = np.asarray(opened).astype(float) - np.stack(bands, axis=-1)
  assert np.abs(difference).max() <= 8


@pytest.mark.parametrize("kind", ["BMP of 1 bit", "compressed BMP", "WebP"])
def test_unconverted_record_is_refused_in_training(kind):
  message = (
    "an image is WebP, or a BMP that is compressed or does not have 8, 24 or 32 bits"
  )
  with pytest.raises(tf.errors.InvalidArgumentError, match=message):
    _decoded(_KINDS[kind][0], (24, 40, 3))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
  "kind", ["BMP", "BMP of a palette", "BMP of grey", "GIF", "JPEG of CMYK"]
)
def test_records_in_place_decode_like_ingested_records(kind, channels):
  file, levels = _KINDS[kind]
  assert _levels_off(file, file, channels) <= levels


_HEIC = b"\0\0\0\x18ftypheic\0\0\0\0heicmif1" + bytes(40)


@pytest.mark.parametrize(
  ("file", "message"),
  [
    (
      _HEIC,
      r"picture can't be decoded as an image .*: .* HEIC, .*pillow-heif",
    ),
    (
      _KINDS["AVIF"][0][:90],
      r"it is AVIF and damaged, or needs Pillow 11.3 or later",
    ),
    (_KINDS["TIFF"][0][:20], r"it is TIFF and damaged"),
    (_KINDS["PPM"][0][:90], r"it is PNM, and Pillow can't decode it: "),
    (_encoded(_GREY.convert("F"), "TIFF"), r"TIFF with 32-bit pixels, whose white"),
    (_encoded(Image.new("L", (1001, 1000)), "TIFF"), r"1001 x 1000 pixels, more than"),
    (b"<html>404</html>", r"\(16 bytes\): its first bytes match no supported image"),
    (b"\xff\xd8\xff\xe0" + bytes(30), r"size can't be read"),
    (_KINDS["PNG"][0][:90], r"picture can't be decoded as an image \(90 bytes\)"),
    (_JPEG[:300], r"picture can't be decoded as an image \(300 bytes\)"),
  ],
)
def test_unsupported_images_are_refused_at_ingest_in_one_line(file, message):
  with pytest.raises(UserError, match=message) as caught:
    _ingested(file)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize("orientation_of_file", range(2, 9))
def test_rotated_image_is_resized_like_its_upright_copy(orientation_of_file):
  exif = _segment(0xE1, _exif(orientation_of_file))
  file = _JPEG[:2] + exif + _JPEG[2:]
  held = tf.io.decode_jpeg(_JPEG)
  upright = image_formats.turn_upright(held, tf.constant(orientation_of_file))
  copy = tf.io.encode_png(upright).numpy()
  shape = (17, 12, 3)
  np.testing.assert_allclose(_decoded(file, shape), _decoded(copy, shape), atol=1)
