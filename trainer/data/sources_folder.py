"""Image files in a folder for each class."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterator
from typing import NamedTuple

import gin
from absl import logging

from trainer.data import paths
from trainer.data.sources import Item, Loader, Source
from trainer.errors import UserError

_IMAGE_ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp")
_NUM_NAMES_IN_LOG = 5


class _File(NamedTuple):
  """An image file: its path within the folder, and its class."""

  key: str
  label: str


@gin.register
class ImageFolderSource(Source):
  """A folder of class folders of image files, which are kept byte for byte.

  Args:
    folder: its folders are the classes, named after them; files that are no images
      by their ending, and names that begin with a dot, are passed over.
  """

  def __init__(self, *, folder: str):
    self._folder = folder if paths.is_remote(folder) else os.path.expanduser(folder)

  def fingerprint(self) -> dict[str, object]:
    """Number of the files, and a digest of their names and sizes.

    Raises:
      UserError: the folder can't be read, or does not hold images of two classes.
    """
    digest = hashlib.sha256()
    for file in self._files:
      size = self._size(file)
      digest.update(os.fsencode(f"{file.key}\0{size}\0"))
    return {
      "source": "image_folder",
      "num_files": len(self._files),
      "digest": digest.hexdigest(),
    }

  def num_items(self) -> int:
    """Image files."""
    return len(self._files)

  def loaders(self) -> Iterator[Loader]:
    """Every image, classes and files in the order of their names.

    Yields:
      Loaders of items whose key is the path within the folder; they raise a `UserError`
      where the file can't be read.

    Raises:
      UserError: as `fingerprint`.
    """
    for file in self._files:
      yield functools.partial(self._load, file)

  def _load(self, file: _File) -> Item:
    try:
      content = paths.read_bytes(os.path.join(self._folder, file.key))
    except OSError as error:
      raise _unreadable(error) from error
    return Item(file.key, file.label, content)

  def _size(self, file: _File) -> int:
    try:
      return paths.status(os.path.join(self._folder, file.key)).num_bytes
    except OSError as error:
      raise _unreadable(error) from error

  @functools.cached_property
  def _files(self) -> list[_File]:
    try:
      classes = [n for n in paths.list_folders(self._folder) if not n.startswith(".")]
      by_class = {name: self._images_of(name) for name in classes}
    except OSError as error:
      raise _unreadable(error) from error
    empty = [name for name, files in by_class.items() if not files]
    if len(by_class) - len(empty) < 2:
      raise UserError(
        f"{self._folder} holds images of {len(by_class) - len(empty)} classes; it "
        "needs a folder for each of at least two, with files ending in "
        f"{', '.join(_IMAGE_ENDINGS)}."
      )
    if empty:
      shown = ", ".join(empty[:_NUM_NAMES_IN_LOG])
      logging.warning(
        "%s: %d class folders hold no image and are left out: %s%s",
        self._folder,
        len(empty),
        shown,
        ", ..." if len(empty) > _NUM_NAMES_IN_LOG else "",
      )
    return [file for files in by_class.values() for file in files]

  def _images_of(self, class_name: str) -> list[_File]:
    folder = os.path.join(self._folder, class_name)
    if not _is_utf8(class_name):
      raise UserError(f"{folder!r}: a class needs a name in UTF-8; rename the folder.")
    return [
      _File(f"{class_name}/{name}", class_name)
      for name in paths.list_folder(folder)
      if name.lower().endswith(_IMAGE_ENDINGS) and not name.startswith(".")
    ]


def _is_utf8(name: str) -> bool:
  try:
    name.encode()
  except UnicodeEncodeError:
    return False
  return True


def _unreadable(error: OSError) -> UserError:
  return UserError(f"{error.filename} can't be read: {error.strerror}.")
