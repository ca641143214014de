"""Sources of raw data."""

from __future__ import annotations

import abc
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Callable, NamedTuple, Optional, Union

import gin
import numpy as np

from trainer.errors import UserError


class NamePattern:
  """A regular expression whose first group, searched in a name, is what is wanted.

  Args:
    pattern: the expression.
    parameter: where the user gives it, for the message.

  Raises:
    UserError: it is no regular expression, or has no group.
  """

  def __init__(self, pattern: str, parameter: str):
    try:
      self._pattern = re.compile(pattern)
    except re.error as error:
      raise UserError(
        f"{parameter}={pattern!r} is no regular expression: {error}."
      ) from error
    if not self._pattern.groups:
      raise UserError(
        f"{parameter}={pattern!r} has no group; put what it shall take of a name into "
        "parentheses."
      )

  def part_of(self, name: str) -> Optional[str]:
    """What the first group matches; None where that is nothing."""
    found = self._pattern.search(name)
    return None if found is None else found[1]


# What a feature of a record can hold.
Value = Union[
  str, bytes, int, float, Sequence[int], Sequence[float], Sequence[bytes], np.ndarray
]
# Features that ingest gives each record.
RECORD_FEATURES = ("image", "label", "key")


class Item(NamedTuple):
  """One record to be.

  Attributes:
    key: its name in the source, unique.
    label: name of its class.
    image: bytes of an image file; None where it is no image.
    features: further features by name, such as a text or a vector.
  """

  key: str
  label: str
  image: Optional[bytes] = None
  features: Mapping[str, Value] = {}


Loader = Callable[[], Item]


class Source(abc.ABC):
  """A way to raw data."""

  @abc.abstractmethod
  def fingerprint(self) -> Mapping[str, object]:
    """What tells this source's data from another's; plain values that JSON keeps."""

  @abc.abstractmethod
  def loaders(self) -> Iterator[Loader]:
    """Gives every item by a function that loads it, always in the same order.

    To go through them is cheap; the functions may be called side by side.
    """

  def num_items(self) -> Optional[int]:
    """How many items there are; None where only reading all would tell."""
    return None

  def check(self) -> None:  # noqa: B027  Most sources find faults only by reading.
    """Raises if an item is found to be bad without reading it.

    Ingest calls it where a bad item is refused, before anything is written.

    Raises:
      UserError: naming the first such item.
    """

  def items(self) -> Iterator[Item]:
    """Every item, loaded one after the other."""
    for load in self.loaders():
      yield load()


class ItemLoader:
  """Gives an item that is loaded already.

  Args:
    item: what it gives.
  """

  def __init__(self, item: Item):
    self._item = item

  def __call__(self) -> Item:
    """The item."""
    return self._item


@gin.register
class DigitsSource(Source):
  """Scikit-learn's handwritten digits: 1,797 images of 8 × 8, ten classes."""

  def fingerprint(self) -> dict[str, object]:
    """The data set's name."""
    return {"source": "digits"}

  def num_items(self) -> int:
    """Digits."""
    return 1797

  def loaders(self) -> Iterator[Loader]:
    """Every digit; its class is its numeral."""
    from sklearn import datasets  # Late: a second to import.

    digits = datasets.load_digits()
    # Ink is 0…16 there; 15.9375 · 16 = 255.
    images = np.round(digits.images * 15.9375).astype(np.uint8)
    for number, (image, label) in enumerate(zip(images, digits.target)):
      yield ItemLoader(Item(f"digits/{number}", str(label), encode_png(image)))


def feature_names(columns: Iterable[str]) -> dict[str, str]:
  """The names that columns of a table get as features of a record.

  Args:
    columns: neither the image's nor the label's; one without a name is left out.

  Returns:
    Feature by column: the column's own name, or with "_column" behind it where each
    record has a feature of that name already.
  """
  names = {column: column for column in columns if column}
  for column in names:
    if column in RECORD_FEATURES:
      names[column] = f"{column}_column"
      while names[column] in names:
        names[column] += "_"
  return names


def text_of(value: object, where: str) -> str:
  """A label as text.

  Args:
    value: text, bytes in UTF-8, or an integer. A float that is whole is taken for an
      integer: a column of integers becomes floats where some are missing.
    where: names it in the message.

  Raises:
    UserError: it is missing (None, NaN or no text), its bytes are no UTF-8, or it is a
      float that is not whole.
  """
  if value is None or value in ("", b"") or value != value:
    raise UserError(f"{where} has no label; give it one, or leave it out.")
  if isinstance(value, (float, np.floating)):
    if not float(value).is_integer():
      raise UserError(f"{where} has the label {value}; it must be text or an integer.")
    return str(int(value))
  if not isinstance(value, bytes):
    return str(value)
  try:
    return value.decode()
  except UnicodeDecodeError as error:
    raise UserError(f"{where} has a label {value!r} that is no UTF-8.") from error


def encode_png(image: np.ndarray) -> bytes:
  """An image as PNG.

  Args:
    image: [H, W] or [H, W, 1] for grey, [H, W, 3] for colour; uint8.

  Returns:
    Bytes of the file.

  Raises:
    UserError: it has another shape or type.
  """
  import tensorflow as tf  # Late: looking at a finished ingest needs none.

  pixels = image[:, :, None] if image.ndim == 2 else image
  is_image = pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.size > 0
  if not is_image or pixels.shape[2] not in (1, 3):
    raise UserError(
      f"An image of type {image.dtype} and shape {image.shape} can't be kept; it must "
      "be uint8 and [H, W], [H, W, 1] or [H, W, 3], and not empty."
    )
  return tf.io.encode_png(pixels).numpy()
