"""What a source of raw data is, and the one that needs no files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple, Protocol

import gin
import numpy as np


class Item(NamedTuple):
  """One record to be.

  Attributes:
    key: its name in the source, unique.
    label: name of its class.
    image: bytes of an image file.
  """

  key: str
  label: str
  image: bytes


class Source(Protocol):
  """A way to raw data."""

  def fingerprint(self) -> Mapping[str, object]:
    """What tells this source's data from another's; plain values that JSON keeps."""

  def items(self) -> Iterator[Item]:
    """Every item, always in the same order."""


@gin.register
class DigitsSource:
  """Scikit-learn's handwritten digits: 1,797 images of 8 × 8, ten classes."""

  def fingerprint(self) -> dict[str, object]:
    """The data set's name."""
    return {"source": "digits"}

  def items(self) -> Iterator[Item]:
    """Every digit; its class is its numeral."""
    from sklearn import datasets  # Late: a second to import.

    digits = datasets.load_digits()
    # Ink is 0…16 there; 15.9375 · 16 = 255.
    images = np.round(digits.images * 15.9375).astype(np.uint8)
    for number, (image, label) in enumerate(zip(images, digits.target)):
      yield Item(f"digits/{number}", str(label), encode_png(image))


def encode_png(image: np.ndarray) -> bytes:
  """A grey image as PNG.

  Args:
    image: [H, W] uint8.

  Returns:
    Bytes of the file.
  """
  import tensorflow as tf  # Late: looking at a finished ingest needs none.

  return tf.io.encode_png(image[:, :, None]).numpy()
