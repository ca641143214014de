"""Sources of raw data: the interface, items, and conversion of names and labels."""

from __future__ import annotations

import abc
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Callable, NamedTuple, Optional, Union

import gin
import numpy as np

from trainer.errors import UserError

# Features that ingest adds to each record.
RECORD_FEATURES = ("image", "label", "key")


class NamePattern:
  """A regular expression whose first group is searched in names.

  Args:
    pattern: the expression.
    parameter: name of the user's parameter, for the message.

  Raises:
    UserError: it is not a regular expression, or has no group.
  """

  def __init__(self, pattern: str, parameter: str):
    try:
      self._pattern = re.compile(pattern)
    except re.error as error:
      raise UserError(
        f"{parameter}={pattern!r} is not a regular expression: {error}."
      ) from error
    if not self._pattern.groups:
      raise UserError(
        f"{parameter}={pattern!r} has no group; put the part of the name into "
        "parentheses."
      )

  def part_of(self, name: str) -> Optional[str]:
    """Returns the match of the first group; None if there is no match."""
    found = self._pattern.search(name)
    return None if found is None else found[1]


# Types of a record's feature.
Value = Union[
  str, bytes, int, float, Sequence[int], Sequence[float], Sequence[bytes], np.ndarray
]


class Item(NamedTuple):
  """One item of a source, which becomes a record.

  Attributes:
    key: its name in the source, unique.
    label: name of its class.
    image: bytes of an image file; None for items without an image.
    features: further features by name, such as a text or a vector.
  """

  key: str
  label: str
  image: Optional[bytes] = None
  features: Mapping[str, Value] = {}


Loader = Callable[[], Item]


class Source(abc.ABC):
  """A source of raw data."""

  @abc.abstractmethod
  def fingerprint(self) -> Mapping[str, object]:
    """Returns plain JSON values that identify the source's data."""

  @abc.abstractmethod
  def loaders(self) -> Iterator[Loader]:
    """Yields a function per item that loads it, always in the same order.

    Iteration is cheap; the functions may be called in parallel.
    """

  def num_items(self) -> Optional[int]:
    """Returns the number of items; None if it is only known after reading all."""
    return None

  def check(self) -> None:  # noqa: B027  Most sources find faults only when reading.
    """Raises if an item can be recognized as bad without reading it.

    Ingest calls it before anything is written, if bad items are refused.

    Raises:
      UserError: an item is bad; the message names the first.
    """

  def items(self) -> Iterator[Item]:
    """Yields every item, loaded one after the other."""
    for load in self.loaders():
      yield load()


class ItemLoader:
  """Loader of an item that is already loaded.

  Args:
    item: the item to return.
  """

  def __init__(self, item: Item):
    self._item = item

  def __call__(self) -> Item:
    """Returns the item."""
    return self._item


@gin.register
class DigitsSource(Source):
  """Scikit-learn's handwritten digits: 1,797 images of 8 × 8 pixels, ten classes."""

  def fingerprint(self) -> dict[str, object]:
    """Returns the data set's name."""
    return {"source": "digits"}

  def num_items(self) -> int:
    """Returns the number of digits."""
    return 1797

  def loaders(self) -> Iterator[Loader]:
    """Yields a loader for every digit; its class is its numeral."""
    from sklearn import datasets  # Late: a second to import.

    digits = datasets.load_digits()
    # Original values are 0…16; 15.9375 · 16 = 255.
    images = np.round(digits.images * 15.9375).astype(np.uint8)
    for number, (image, label) in enumerate(zip(images, digits.target)):
      yield ItemLoader(Item(f"digits/{number}", str(label), encode_png(image)))


def feature_names(columns: Iterable[str]) -> dict[str, str]:
  """Returns the feature names for the columns of a table.

  Args:
    columns: columns other than image and label; an unnamed one is skipped.

  Returns:
    Column to feature name: the column's own name, with the suffix "_column" if each
    record already has a feature of that name.
  """
  names = {column: column for column in columns if column}
  for column in names:
    if column in RECORD_FEATURES:
      names[column] = f"{column}_column"
      while names[column] in names:
        names[column] += "_"
  return names


def label_text(value: object, where: str) -> str:
  """Converts a label to text.

  Args:
    value: text, bytes in UTF-8, or an integer. A whole float is read as an integer: a
      column of integers with missing values is stored as floats.
    where: name of the item, for the message.

  Raises:
    UserError: it is missing (None, NaN or empty text), its bytes are not UTF-8, or it
      is a float that is not whole.
  """
  if value is None or value in ("", b"") or value != value:
    raise UserError(f"{where} has no label; add one, or remove the item.")
  if isinstance(value, (float, np.floating)):
    if not float(value).is_integer():
      raise UserError(f"{where} has the label {value}; it must be text or an integer.")
    return str(int(value))
  if not isinstance(value, bytes):
    return str(value)
  try:
    return value.decode()
  except UnicodeDecodeError as error:
    raise UserError(f"{where} has a label {value!r} that is not UTF-8.") from error


def encode_png(image: np.ndarray) -> bytes:
  """Encodes an image as PNG.

  Args:
    image: [H, W] or [H, W, 1] for grey, [H, W, 3] for colour; uint8.

  Returns:
    Bytes of the file.

  Raises:
    UserError: it has another shape or type.
  """
  import tensorflow as tf  # Late: inspecting a finished ingest doesn't need it.

  pixels = image[:, :, None] if image.ndim == 2 else image
  is_image = pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.size > 0
  if not is_image or pixels.shape[2] not in (1, 3):
    raise UserError(
      f"An image of type {image.dtype} and shape {image.shape} can't be stored; it "
      "must be uint8 and [H, W], [H, W, 1] or [H, W, 3], and not empty."
    )
  return tf.io.encode_png(pixels).numpy()
