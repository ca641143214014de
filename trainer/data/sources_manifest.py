"""A CSV or TSV file that lists items: path, label, and further columns."""

from __future__ import annotations

import csv
import functools
import hashlib
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Optional

import gin

from trainer.data import paths
from trainer.data.sources import Item, Loader, Source, Value
from trainer.errors import UserError

_NUMBERS = {"int": int, "float": float}


@gin.register
class ManifestSource(Source):
  """Items as the rows of a CSV file, or of a TSV file where its name ends in .tsv.

  The first row names the columns. What is neither path nor label becomes a feature of
  the record, under the column's name: text, or a number where that is said.

  Args:
    path: the file, UTF-8.
    label_column: column of the class.
    path_column: column of the image's path; None for rows without images.
    folder: what the paths are relative to, and may not leave; None for the folder of
      the file.
    number_columns: "int" or "float" by the name of a column of numbers.

  Raises:
    UserError: a type of numbers is not known.
  """

  def __init__(
    self,
    *,
    path: str,
    label_column: str = "label",
    path_column: Optional[str] = "path",
    folder: Optional[str] = None,
    number_columns: Optional[Mapping[str, str]] = None,
  ):
    self._path = paths.absolute(path)
    self._label_column = label_column
    self._path_column = path_column
    self._folder = (
      os.path.dirname(self._path) if folder is None else paths.absolute(folder)
    )
    self._number_columns = dict(number_columns or {})
    for column, kind in self._number_columns.items():
      if kind not in _NUMBERS:
        raise UserError(
          f"ManifestSource.number_columns[{column!r}]={kind!r} is not known; choose "
          "'int' or 'float'."
        )

  def fingerprint(self) -> dict[str, object]:
    """A digest of the file; a change of an image alone is not noticed."""
    return {
      "source": "manifest",
      "digest": hashlib.sha256(self._content()).hexdigest(),
      "folder": self._folder,
      "columns": [self._label_column, self._path_column, self._number_columns],
    }

  def num_items(self) -> Optional[int]:
    """Rows but the first; None where they can't be told apart."""
    rows = csv.reader(self._text(), delimiter=self._delimiter(), strict=True)
    try:
      return sum(map(bool, rows)) - 1
    except csv.Error:  # `loaders` says which row it is.
      return None

  def loaders(self) -> Iterator[Loader]:
    """Every row.

    Yields:
      Loaders of items whose key is the path, or the number of the row where there is
      none; they raise a `UserError` where the image can't be read.

    Raises:
      UserError: naming the row that is damaged, or whose path leaves the folder.
    """
    rows = csv.DictReader(self._text(), delimiter=self._delimiter(), strict=True)
    try:
      self._check_columns(rows.fieldnames or ())
      for row in rows:
        yield self._loader(row, rows.line_num)
    except csv.Error as error:
      raise UserError(f"{self._path}: after line {rows.line_num}: {error}.") from error

  def _loader(self, row: Mapping[str, str], line: int) -> Loader:
    where = f"{self._path}: line {line}"
    if None in row or None in row.values():
      raise UserError(f"{where} has not as many fields as the first row has names.")
    label = row[self._label_column]
    if not label:
      raise UserError(f"{where} has no label in column {self._label_column!r}.")
    used = (self._label_column, self._path_column)
    features = {
      name: self._value(name, text, where)
      for name, text in row.items()
      if name not in used
    }
    if self._path_column is None:
      item = Item(f"{os.path.basename(self._path)}:{line}", label, None, features)
      return lambda: item
    path = self._inside(row[self._path_column], where)
    return functools.partial(self._load, path, label, features)

  def _load(self, key: str, label: str, features: Mapping[str, Value]) -> Item:
    path = os.path.join(self._folder, key)
    try:
      return Item(key, label, paths.read_bytes(path), features)
    except OSError as error:
      raise UserError(f"{path} can't be read: {error.strerror}.") from error

  def _value(self, name: str, text: str, where: str) -> Value:
    kind = self._number_columns.get(name)
    if kind is None:
      return text
    try:
      return _NUMBERS[kind](text)
    except ValueError as error:
      raise UserError(
        f"{where} has {text!r} in column {name!r}, which is no {kind}."
      ) from error

  def _inside(self, path: str, where: str) -> str:
    """The path relative to the folder, which it must not leave."""
    relative = os.path.normpath(path.replace("\0", ""))
    if not path or "\0" in path or os.path.isabs(path) or paths.is_remote(path):
      relative = ".."
    if relative == ".." or relative.startswith("../"):
      raise UserError(
        f"{where} has the path {path!r}, which is not inside {self._folder}; give "
        "ManifestSource.folder and paths relative to it."
      )
    return relative

  def _check_columns(self, names: Sequence[str]) -> None:
    known = list(names)
    needed = [self._label_column, self._path_column, *self._number_columns]
    for name in needed:
      if name is not None and name not in known:
        raise UserError(
          f"{self._path} has no column {name!r}; it has {', '.join(known) or 'none'}."
        )

  def _delimiter(self) -> str:
    return "\t" if self._path.endswith(".tsv") else ","

  def _text(self) -> io.StringIO:
    try:
      return io.StringIO(self._content().decode("utf-8-sig"), newline="")
    except UnicodeDecodeError as error:
      raise UserError(f"{self._path} is not UTF-8 (byte {error.start}).") from error

  def _content(self) -> bytes:
    try:
      return paths.read_bytes(self._path)
    except OSError as error:
      raise UserError(f"{self._path} can't be read: {error.strerror}.") from error
