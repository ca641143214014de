"""Images and labels in idx files, MNIST's format."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterator, Sequence
from typing import Optional

import gin
import numpy as np

from trainer.data import idx, paths
from trainer.data.sources import Item, Loader, Source, encode_png
from trainer.errors import UserError


@gin.register
class IdxSource(Source):
  """Images and labels in idx files, plain or gzipped.

  Args:
    folder: where the files are.
    pairs: (images file, labels file) of each part, relative to the folder.
    class_names: names of labels 0, 1, …; None for the numbers themselves.

  Raises:
    UserError: a pair is no pair, `class_names` is a text, or two labels have the same
      name.
  """

  def __init__(
    self,
    *,
    folder: str,
    pairs: Sequence[tuple[str, str]],
    class_names: Optional[Sequence[str]] = None,
  ):
    if not pairs or any(isinstance(p, str) or len(p) != 2 for p in pairs):
      raise UserError(
        f"IdxSource.pairs={pairs!r} must be pairs of file names: "
        "(('images', 'labels'), ...)."
      )
    if isinstance(class_names, str):
      raise UserError(
        f"IdxSource.class_names={class_names!r} must be a list of names, one a label."
      )
    if class_names is not None and len(set(class_names)) != len(class_names):
      raise UserError("IdxSource.class_names must be different names for each label.")
    self._folder = paths.absolute(folder)
    self._pairs = pairs
    self._class_names = class_names

  def fingerprint(self) -> dict[str, object]:
    """Names and digests of the files: data sets like MNIST have equal names and sizes.

    Raises:
      UserError: a file is missing or can't be read.
    """
    names = [name for pair in self._pairs for name in pair]
    return {
      "source": "idx",
      "files": [[name, _digest(self._path(name))] for name in names],
      "class_names": list(self._class_names or ()),
    }

  def num_items(self) -> int:
    """Labels, by the heads of their files."""
    return sum(idx.num_records(self._path(labels)) for _, labels in self._pairs)

  def loaders(self) -> Iterator[Loader]:
    """Every image of every pair.

    Yields:
      Loaders of items whose key is the images file and the number in it.

    Raises:
      UserError: a file is missing, cut short or no idx file, a pair differs in length,
        or a label has no name.
    """
    for images_name, labels_name in self._pairs:
      images = idx.read(self._path(images_name), num_axes=3)
      labels = idx.read(self._path(labels_name), num_axes=1)
      if len(images) != len(labels):
        raise UserError(
          f"{images_name} has {len(images)} images and {labels_name} {len(labels)} "
          f"labels; in {self._folder} they must be of the same data."
        )
      for number, (image, label) in enumerate(zip(images, labels)):
        name = self._class_name(int(label), labels_name, number)
        yield functools.partial(_load, f"{images_name}/{number}", name, image)

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
      if paths.exists(candidate):
        return candidate
    raise UserError(f"{path} is not there, neither plain nor as .gz.")


def _load(key: str, label: str, image: np.ndarray) -> Item:
  return Item(key, label, encode_png(image))


def _digest(path: str) -> str:
  try:
    return hashlib.sha256(paths.read_bytes(path)).hexdigest()
  except OSError as error:
    raise UserError(f"{path} can't be read: {error.strerror}.") from error
