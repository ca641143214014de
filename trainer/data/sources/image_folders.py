"""Source of image files in one folder per class."""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Optional, Union

import gin
from absl import logging

from trainer.data.image_formats import has_image_ending
from trainer.data.sources.source import Item, Loader, Source
from trainer.errors import UserError, check_choice
from trainer.runtime import filesystem

_NUM_NAMES_SHOWN = 5
_SUBFOLDERS = ("leave_out", "of_class", "classes")
_ADVICE = "which ImageFolderSource.subfolders can include"
# Common names of folders above the class folders.
_SPLIT_NAME = re.compile(
  "train(ing|val)?|val(id|idation)?|dev|test(ing)?|eval(uation)?|query|gallery",
  re.IGNORECASE,
)


class _File(NamedTuple):
  """An image file: its path within the folder, its class, and its split, if any."""

  key: str
  label: str
  split: Optional[str] = None


class _Listing(NamedTuple):
  """Names in a folder, sorted; those that begin with a dot are ignored."""

  images: list[str]
  others: list[str]
  folders: list[str]


class _Count:
  """A count of files, and the names of the first ones."""

  def __init__(self):
    self._number = 0
    self._names: list[str] = []

  def add(self, names: Iterable[str]) -> None:
    """Counts files by their names."""
    for name in names:
      self._number += 1
      if self._number <= _NUM_NAMES_SHOWN:
        self._names.append(name)

  def line(self, what: str) -> list[str]:
    """Returns a phrase with the kind, number and names; empty if there are none."""
    if not self._number:
      return []
    dots = ", ..." if self._number > len(self._names) else ""
    return [f"{self._number} {what} ({', '.join(self._names)}{dots})"]


@dataclasses.dataclass
class _SkippedFiles:
  """Skipped files and folders.

  Attributes:
    below: images in folders below the class folders.
    tops: the class folders that contain such images.
    outside: images next to the class folders.
    folders: folders next to those of `splits`.
    unreadable: folders below the class folders that can't be listed.
    endings: number of files without an image extension, by extension.
  """

  below: _Count = dataclasses.field(default_factory=_Count)
  tops: set[str] = dataclasses.field(default_factory=set)
  outside: _Count = dataclasses.field(default_factory=_Count)
  folders: _Count = dataclasses.field(default_factory=_Count)
  unreadable: _Count = dataclasses.field(default_factory=_Count)
  endings: collections.Counter[str] = dataclasses.field(
    default_factory=collections.Counter
  )

  def count_others(self, names: Iterable[str]) -> None:
    """Counts files without an image extension."""
    endings = (os.path.splitext(name)[1].lower() or "no extension" for name in names)
    self.endings.update(endings)

  def line(self) -> str:
    """Returns a summary; empty if nothing was skipped."""
    below = self.below.line("images in folders below the class folders")
    parts = [
      *(f"{line}, {_ADVICE}" for line in below),
      *self.outside.line("images next to the class folders"),
      *self.folders.line("folders that are not in ImageFolderSource.splits"),
      *self.unreadable.line("folders that can't be listed"),
    ]
    if self.endings:
      number = sum(self.endings.values())
      common = self.endings.most_common(_NUM_NAMES_SHOWN)
      shown = ", ".join(f"{count} {ending}" for ending, count in common)
      dots = ", ..." if len(self.endings) > len(common) else ""
      parts.append(f"{number} files without the extension of an image ({shown}{dots})")
    return "; ".join(parts)


@gin.register
class ImageFolderSource(Source):
  """A folder of class folders of image files.

  Images next to or below the class folders, and files without an image extension, are
  skipped and counted in a warning. Names that begin with a dot are ignored.

  Args:
    folder: its subfolders are the classes, named after them.
    subfolders: treatment of images in folders below the class folders. "leave_out"
      skips them. "of_class" assigns them to the class folder above. "classes" makes
      each folder with images a class, named by its path ("alphabet/character").
    splits: names of folders above the class folders, such as ("train", "test"). All are
      read, and each record has the feature "split". None if the class folders are in
      `folder` itself; folders with the names of splits that contain class folders are
      then refused. () accepts them as classes.

  Raises:
    UserError: `subfolders` is unknown, or `splits` is a text.
  """

  def __init__(
    self,
    *,
    folder: str,
    subfolders: str = "leave_out",
    splits: Optional[Sequence[str]] = None,
  ):
    check_choice("ImageFolderSource.subfolders", subfolders, _SUBFOLDERS)
    if isinstance(splits, str):
      raise UserError(
        f"ImageFolderSource.splits={splits!r} must be a list of names, such as "
        f"({splits!r},)."
      )
    self._folder = (
      folder if filesystem.is_remote(folder) else os.path.expanduser(folder)
    )
    self._subfolders = subfolders
    self._splits = None if splits is None else tuple(splits)

  def fingerprint(self) -> dict[str, object]:
    """Returns the number of files, and a digest of their names and sizes.

    Raises:
      UserError: the folder can't be read, holds splits, or does not hold images of two
        classes.
    """
    digest = hashlib.sha256()
    for file, size in zip(self._files, self._sizes):
      shown = "none" if isinstance(size, UserError) else size
      digest.update(os.fsencode(f"{file.key}\0{shown}\0"))
    fingerprint: dict[str, object] = {
      "source": "image_folder",
      "num_files": len(self._files),
      "digest": digest.hexdigest(),
    }
    # Default options are omitted, to match fingerprints made before they existed.
    if self._subfolders != "leave_out":
      fingerprint["subfolders"] = self._subfolders
    if self._splits:
      fingerprint["splits"] = list(self._splits)
    return fingerprint

  def num_items(self) -> int:
    """Returns the number of image files."""
    return len(self._files)

  def check(self) -> None:
    """Raises if a file can't be found, such as the target of a broken link.

    Raises:
      UserError: a file is missing (the message names the first); or as `fingerprint`.
    """
    for size in self._sizes:
      if isinstance(size, UserError):
        raise size

  def loaders(self) -> Iterator[Loader]:
    """Yields a loader for every image, with classes and files in alphabetical order.

    Yields:
      Loaders of items whose key is the path within the folder; they raise a `UserError`
      if the file can't be read.

    Raises:
      UserError: as `fingerprint`.
    """
    for file in self._files:
      yield functools.partial(self._load, file)

  def _load(self, file: _File) -> Item:
    try:
      content = filesystem.read_bytes(self._path(file.key))
    except OSError as error:
      raise _unreadable(error) from error
    features = {} if file.split is None else {"split": file.split}
    return Item(file.key, file.label, content, features)

  @functools.cached_property
  def _sizes(self) -> list[Union[int, UserError]]:
    """Size of each file in bytes, or the error why it can't be found."""
    sizes: list[Union[int, UserError]] = []
    for file in self._files:
      try:
        sizes.append(filesystem.status(self._path(file.key)).num_bytes)
      except OSError as error:
        # An unreachable store is not a fault of the file.
        if filesystem.is_remote(self._folder) and not isinstance(
          error, FileNotFoundError
        ):
          raise _unreadable(error) from error
        sizes.append(_unreadable(error))
    return sizes

  @functools.cached_property
  def _files(self) -> list[_File]:
    skipped = _SkippedFiles()
    try:
      by_folder = self._by_class_folder(skipped)
    except OSError as error:
      raise _unreadable(error) from error
    files = [file for files in by_folder.values() for file in files]
    if self._splits is None:
      self._check_splits(files, skipped.tops)
    num_classes = len({file.label for file in files})
    summary = skipped.line()
    if num_classes < 2:
      raise UserError(
        f"{self._folder} holds images of {num_classes} classes; it needs a folder of "
        f"images for each of at least two.{' Skipped: ' if summary else ''}{summary}"
      )
    empty = _Count()
    empty.add(name for name, files in by_folder.items() if not files)
    for line in empty.line("class folders have no image and are skipped"):
      logging.warning("%s: %s", self._folder, line)
    if summary:
      logging.warning("%s: skipped: %s.", self._folder, summary)
    return files

  def _by_class_folder(self, skipped: _SkippedFiles) -> dict[str, list[_File]]:
    """Returns the images of each class folder, by its path."""
    if self._splits:
      folders = self._list("", is_top=True).folders
      skipped.folders.add(name for name in folders if name not in self._splits)
    by_folder = {}
    for split in self._splits or (None,):
      top = self._list(split or "", is_top=True)
      skipped.outside.add(_join(split, name) for name in top.images)
      for name in top.folders:
        files = list(self._list_class(split, name, skipped))
        by_folder[_join(split, name)] = files
    return by_folder

  def _list_class(
    self, split: Optional[str], name: str, skipped: _SkippedFiles
  ) -> Iterator[_File]:
    top = _join(split, name)
    self._check_name(top)
    for folder, listing in self._walk(top, skipped):
      images = listing.images
      skipped.count_others(listing.others)
      if self._subfolders == "leave_out":
        if folder != top:
          if images:
            skipped.below.add(_join(folder, image) for image in images)
            skipped.tops.add(top)
          continue
        # A folder with an image extension is treated as a file, and refused by name.
        images = sorted([*images, *filter(has_image_ending, listing.folders)])
      label = folder if self._subfolders == "classes" else top
      label = label if split is None else label[len(split) + 1 :]
      if images:
        self._check_name(folder)
      for image in images:
        yield _File(_join(folder, image), label, split)

  def _walk(self, top: str, skipped: _SkippedFiles) -> Iterator[tuple[str, _Listing]]:
    """Yields a class folder and its subfolders, without links to a parent folder."""
    stack = [(top, frozenset([self._identity("")]))]
    while stack:
      folder, above = stack.pop()
      identity = self._identity(folder)
      if identity in above:
        continue
      try:
        listing = self._list(folder)
      except OSError:
        if folder == top or self._subfolders != "leave_out":
          raise
        skipped.unreadable.add([folder])
        continue
      yield folder, listing
      ancestors = above | {identity}
      stack += [(_join(folder, name), ancestors) for name in reversed(listing.folders)]

  def _list(self, folder: str, *, is_top: bool = False) -> _Listing:
    path = self._path(folder)
    names = [name for name in filesystem.list_folder(path) if not name.startswith(".")]
    if filesystem.is_remote(path):
      # Each check is a request: below the top level, images are not checked.
      candidates = [name for name in names if is_top or not has_image_ending(name)]
      folders = [
        name for name in candidates if filesystem.is_folder(os.path.join(path, name))
      ]
    else:
      folders = [n for n in filesystem.list_folders(path) if not n.startswith(".")]
    files = sorted({*names} - {*folders})
    images = [name for name in files if has_image_ending(name)]
    return _Listing(images, sorted({*files} - {*images}), folders)

  def _check_name(self, folder: str) -> None:
    try:
      folder.encode()
    except UnicodeEncodeError as error:
      raise UserError(
        f"{self._path(folder)!r}: a class name must be UTF-8; rename the folder."
      ) from error

  def _check_splits(self, files: Sequence[_File], tops_below: set[str]) -> None:
    """Raises if split folders are found instead of class folders."""
    tops = tops_below | {file.key.split("/")[0] for file in files}
    if not tops or not all(map(_SPLIT_NAME.fullmatch, tops)):
      return
    names = tuple(sorted(tops))
    if not any(file.key.count("/") == 1 for file in files):
      raise UserError(
        f"{self._folder} holds {', '.join(names)} above the class folders; set "
        f"ImageFolderSource.splits = {names!r} to read all, or set "
        "ImageFolderSource.folder to one of them."
      )
    logging.warning(
      "%s: the classes are named like splits: %s", self._folder, ", ".join(names)
    )

  def _identity(self, folder: str) -> str:
    path = self._path(folder)
    return path if filesystem.is_remote(path) else os.path.realpath(path)

  def _path(self, key: str) -> str:
    return os.path.join(self._folder, key) if key else self._folder


def _join(folder: Optional[str], name: str) -> str:
  return f"{folder}/{name}" if folder else name


def _unreadable(error: OSError) -> UserError:
  return UserError(f"{error.filename} can't be read: {error.strerror}.")
