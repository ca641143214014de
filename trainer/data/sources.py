"""Where raw data come from: each source yields items, one image at a time."""

from __future__ import annotations

import gzip
import os
import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Optional, Protocol

import gin
import numpy as np

from trainer.errors import UserError

_IDX_MAGIC_BYTES = 4
_IDX_UINT8 = 0x08
_IMAGE_ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".png")


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

  def fingerprint(self) -> dict[str, object]:
    """What tells this source's data from another's, without reading them all."""

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


@gin.register
class IdxSource:
  """Images and labels in idx files, MNIST's format, plain or gzipped.

  Args:
    folder: where the files are.
    pairs: (images file, labels file) of each part, relative to the folder.
    class_names: names of labels 0, 1, …; None for the numbers themselves.
  """

  def __init__(
    self,
    *,
    folder: str,
    pairs: Sequence[tuple[str, str]],
    class_names: Optional[Sequence[str]] = None,
  ):
    self._folder = os.path.expanduser(folder)
    self._pairs = pairs
    self._class_names = class_names

  def fingerprint(self) -> dict[str, object]:
    """Names and sizes of the files."""
    paths = [self._path(name) for pair in self._pairs for name in pair]
    return {
      "source": "idx",
      "files": [[os.path.basename(p), os.path.getsize(p)] for p in paths],
      "class_names": list(self._class_names or ()),
    }

  def items(self) -> Iterator[Item]:
    """Every image of every pair.

    Yields:
      Items whose key is the images file and the number in it.

    Raises:
      UserError: a file is missing, cut short or no idx file, a pair differs in length,
        or a label has no name.
    """
    for images_name, labels_name in self._pairs:
      images = read_idx(self._path(images_name), num_axes=3)
      labels = read_idx(self._path(labels_name), num_axes=1)
      if len(images) != len(labels):
        raise UserError(
          f"{images_name} has {len(images)} images and {labels_name} {len(labels)} "
          f"labels; in {self._folder} they must be of the same data."
        )
      for number, (image, label) in enumerate(zip(images, labels)):
        name = self._class_name(int(label), labels_name, number)
        yield Item(f"{images_name}/{number}", name, encode_png(image))

  def _class_name(self, label: int, file_name: str, number: int) -> str:
    if self._class_names is None:
      return str(label)
    if label >= len(self._class_names):
      raise UserError(
        f"{file_name}: record {number} has label {label}, but IdxSource.class_names "
        f"names only {len(self._class_names)} classes."
      )
    return self._class_names[label]

  def _path(self, name: str) -> str:
    """The file, or its gzipped form where only that is there."""
    path = os.path.join(self._folder, name)
    for candidate in (path, path + ".gz"):
      if os.path.isfile(candidate):
        return candidate
    raise UserError(f"{path} is not there, neither plain nor as .gz.")


@gin.register
class ImageFolderSource:
  """A folder of class folders of image files.

  Args:
    folder: its folders are the classes, named after them; files that are no images
      by their ending, and names that begin with a dot, are passed over.
  """

  def __init__(self, *, folder: str):
    self._folder = os.path.expanduser(folder)

  def fingerprint(self) -> dict[str, object]:
    """Names and sizes of all files."""
    files = [[key, os.path.getsize(path)] for key, _, path in self._files()]
    return {"source": "image_folder", "files": files}

  def items(self) -> Iterator[Item]:
    """Every image, classes and files in the order of their names.

    Yields:
      Items whose key is the path within the folder.

    Raises:
      UserError: the folder can't be read or holds no image.
    """
    for key, label, path in self._files():
      with open(path, "rb") as file:
        yield Item(key, label, file.read())

  def _files(self) -> list[tuple[str, str, str]]:
    """Key, class and path of every image."""
    try:
      classes = sorted(e.name for e in os.scandir(self._folder) if e.is_dir())
      found = [
        (f"{name}/{file}", name, os.path.join(self._folder, name, file))
        for name in classes
        if not name.startswith(".")
        for file in sorted(os.listdir(os.path.join(self._folder, name)))
        if file.lower().endswith(_IMAGE_ENDINGS) and not file.startswith(".")
      ]
    except OSError as error:
      raise UserError(f"{error.filename} can't be read: {error.strerror}.") from error
    if not found:
      raise UserError(
        f"{self._folder} holds no images; it needs a folder for each class, with files "
        f"ending in {', '.join(_IMAGE_ENDINGS)}."
      )
    return found


def read_idx(path: str, *, num_axes: int) -> np.ndarray:
  """Reads an idx file of unsigned bytes.

  Args:
    path: the file, gzipped if it ends in .gz.
    num_axes: how many axes its array must have.

  Returns:
    uint8 array.

  Raises:
    UserError: it is no such file, or cut short.

  Source: http://yann.lecun.com/exdb/mnist (the format's description).
  """
  try:
    with gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb") as file:
      content = file.read()
  except (OSError, EOFError) as error:
    raise UserError(f"{path} can't be read: {error}.") from error
  header_bytes = _IDX_MAGIC_BYTES + 4 * num_axes
  is_idx = content[:3] == bytes([0, 0, _IDX_UINT8]) and len(content) >= header_bytes
  if not is_idx or content[3] != num_axes:
    raise UserError(f"{path} is no idx file of unsigned bytes with {num_axes} axes.")
  shape = struct.unpack(f">{num_axes}I", content[_IDX_MAGIC_BYTES:header_bytes])
  num_bytes = int(np.prod(shape, dtype=np.int64))
  if len(content) - header_bytes != num_bytes:
    per_item = num_bytes // shape[0] if shape[0] else 0
    num_whole = (len(content) - header_bytes) // per_item if per_item else 0
    raise UserError(
      f"{path} is damaged: its head says {shape[0]} records, and it holds {num_whole} "
      f"whole ones ({len(content) - header_bytes} bytes where {num_bytes} belong)."
    )
  return np.frombuffer(content, np.uint8, offset=header_bytes).reshape(shape)


def encode_png(image: np.ndarray) -> bytes:
  """A grey image as PNG.

  Args:
    image: [H, W] uint8.

  Returns:
    Bytes of the file.
  """
  import tensorflow as tf  # Late: looking at a finished ingest needs none.

  return tf.io.encode_png(image[:, :, None]).numpy()
