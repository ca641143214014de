"""Image formats: files are recognised by their endings and contents."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from trainer.data import image_formats


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
def test_a_format_is_recognised_by_what_pillow_writes(name):
  file = _encoded(Image.fromarray(_pixels()), _PILLOW_NAMES.get(name, name))
  found = image_formats.of_content(file[: image_formats.HEAD_BYTES])
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
def test_contents_of_other_files_are_no_images(head, name):
  found = image_formats.of_content(head)
  assert (found and found.name) == name


def test_endings_are_compared_without_case():
  assert image_formats.has_image_ending("UPPER.JPG")
  assert image_formats.has_image_ending("a.b.heic")
  assert not image_formats.has_image_ending("Thumbs.db")
  assert not image_formats.has_image_ending("png")
  assert not set(image_formats.ENDINGS) & set(image_formats.OTHER_ENDINGS)
