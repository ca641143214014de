"""Source of items listed in a CSV or TSV file: path, label, and further columns."""

from __future__ import annotations

import collections
import functools
import hashlib
import math
import os
import posixpath
import re
from collections.abc import Iterator, Mapping
from typing import NoReturn, Optional, Union

import gin
from absl import logging

from trainer.data.csv_file import CsvFile, CsvRow
from trainer.data.sources.source import Item, Loader, Source, Value, feature_names
from trainer.errors import UserError, reading
from trainer.runtime import filesystem

_NUMBERS = {"int": int, "float": float}
_WHOLE_FLOAT = re.compile(r"([+-]?\d+)\.0*")  # pandas writes integers in this form.
_WINDOWS_DRIVE = re.compile(r"[A-Za-z]:[\\/]")


@gin.register
class ManifestSource(Source):
  """Items as the rows of a text table: CSV, TSV, or with another separator.

  The first row names the columns. Columns other than path and label become features of
  the record, under the column's name: text, or numbers for `number_columns`. A missing
  number is omitted from its record. Surrounding blanks of paths and labels are removed.
  Backslashes in paths are read as slashes if no such file exists.

  Args:
    path: the file, UTF-8, or UTF-16 with its byte order mark.
    label_column: column of the class.
    path_column: column of the image's path; None for rows without images.
    folder: folder that contains all paths, and that relative paths refer to; None for
      the folder of the file. Absolute and remote paths (such as gs://) must be in it.
    number_columns: "int" or "float" by the name of a column of numbers.

  Raises:
    UserError: a number type is unknown.
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
    self._path = filesystem.absolute(path)
    self._label_column = label_column
    self._path_column = path_column
    self._folder = (
      os.path.dirname(self._path) if folder is None else filesystem.absolute(folder)
    )
    self._number_columns = dict(number_columns or {})
    for column, kind in self._number_columns.items():
      if kind not in _NUMBERS:
        raise UserError(
          f"ManifestSource.number_columns[{column!r}]={kind!r} must be 'int' or "
          "'float'."
        )

  def fingerprint(self) -> dict[str, object]:
    """Returns a digest of the file; changes of the images are not detected."""
    return {
      "source": "manifest",
      "digest": hashlib.sha256(self._table().content).hexdigest(),
      "folder": self._folder,
      "columns": [self._label_column, self._path_column, self._number_columns],
    }

  def num_items(self) -> Optional[int]:
    """Returns the number of rows after the header; None if they can't be parsed."""
    try:
      return sum(1 for _ in self._table().rows())
    except UserError:  # `loaders` reports the fault.
      return None

  def check(self) -> None:
    """Raises if a row is damaged; images are not read.

    Raises:
      UserError: a row is damaged; the message names the first.
    """
    for row in self._rows():
      if isinstance(row, UserError):
        raise row

  def loaders(self) -> Iterator[Loader]:
    """Yields a loader for every row.

    Yields:
      Loaders of items whose key is the path, or the row number without paths. They
      raise a `UserError` if the row is damaged, its path leaves the folder, or its
      image can't be read.

    Raises:
      UserError: the file can't be read as a table.
    """
    notes = _Notes(self._path)
    for row in self._rows(notes):
      if isinstance(row, UserError):
        yield functools.partial(_refuse, row)
      else:
        yield functools.partial(self._load, row)
    notes.log()

  def _rows(self, notes: Optional[_Notes] = None) -> Iterator[Union[Item, UserError]]:
    """Yields each row as an item without its image, or as an error."""
    notes = _Notes(self._path) if notes is None else notes
    table = self._table()
    used = (self._label_column, self._path_column)
    names = feature_names(name for name in table.columns if name not in used)
    notes.on_table(table, names)
    for row in table.rows():
      try:
        item = self._item(table, row, names, notes)
      except UserError as error:
        yield error
      else:
        yield item

  def _item(
    self, table: CsvFile, row: CsvRow, names: Mapping[str, str], notes: _Notes
  ) -> Item:
    where = f"{self._path}: line {row.line}"
    if len(row.cells) != len(table.columns):
      raise UserError(
        f"{where} has {len(row.cells)} fields, but the first row has "
        f"{len(table.columns)} names."
      )
    cells = dict(zip(table.columns, row.cells))
    label = notes.stripped(cells[self._label_column], row.line)
    if not label:
      raise UserError(f"{where} has no label in column {self._label_column!r}.")
    features = {}
    for column, name in names.items():
      value = self._value(column, cells[column], where)
      if value is None:
        notes.add(f"cells of column {column!r} have no number", row.line)
      else:
        features[name] = value
    if self._path_column is None:
      return Item(f"{os.path.basename(self._path)}:{row.line}", label, None, features)
    path = notes.stripped(cells[self._path_column], row.line)
    if "\\" in path and not self._is_file(path):
      notes.add("paths have backslashes, which are read as slashes", row.line)
      path = path if _WINDOWS_DRIVE.match(path) else path.replace("\\", "/")
    return Item(self._inside(path, where), label, None, features)

  def _load(self, item: Item) -> Item:
    if self._path_column is None:
      return item
    path = os.path.join(self._folder, item.key)
    with reading(path):
      return item._replace(image=filesystem.read_bytes(path))

  def _value(self, name: str, text: str, where: str) -> Optional[Value]:
    """Returns the value of a cell; None for a missing number."""
    kind = self._number_columns.get(name)
    if kind is None:
      return text
    text = text.strip()
    if not text:
      return None
    whole = _WHOLE_FLOAT.fullmatch(text) if kind == "int" else None
    try:
      if "_" in text:  # Python accepts underscores; tables do not use them.
        raise ValueError(text)
      value = _NUMBERS[kind](whole[1] if whole else text)
    except ValueError as error:
      raise UserError(
        f"{where} has {text!r} in column {name!r}, which is not of type {kind}."
      ) from error
    return None if math.isnan(value) else value

  def _inside(self, path: str, where: str) -> str:
    """Returns the path relative to the folder; raises if it is outside."""
    relative = self._relative(path)
    if relative is None or relative == ".." or relative.startswith("../"):
      raise UserError(
        f"{where} has the path {path!r}, which is not inside {self._folder}; set "
        "ManifestSource.folder to a folder or bucket that contains all paths of the "
        "list."
      )
    return relative

  def _relative(self, path: str) -> Optional[str]:
    """Returns the path relative to the folder; None if it does not start in it."""
    if not path or "\0" in path or _WINDOWS_DRIVE.match(path):
      return None
    if not filesystem.is_remote(path) and not os.path.isabs(path):
      return posixpath.normpath(path)
    if not filesystem.is_remote(path):
      path = os.path.normpath(path)
    for folder in (self._folder, self._real_folder):
      start = folder if folder.endswith("/") else folder + "/"
      if path.startswith(start):
        return posixpath.normpath(path[len(start) :].lstrip("/"))
    return None

  @functools.cached_property
  def _real_folder(self) -> str:
    if filesystem.is_remote(self._folder):
      return self._folder
    return os.path.realpath(self._folder)

  def _is_file(self, path: str) -> bool:
    """Returns whether a path with backslashes names a local file as it is."""
    if "\0" in path or filesystem.is_remote(self._folder):
      return False
    return os.path.exists(os.path.join(self._folder, path))

  def _table(self) -> CsvFile:
    needed = [self._label_column, self._path_column, *self._number_columns]
    return CsvFile(self._path, [name for name in needed if name is not None])


class _Notes:
  """Counts of values that are read differently than written, for one warning per kind.

  Args:
    path: path of the list.
  """

  def __init__(self, path: str):
    self._path = path
    self._lines: list[str] = []
    self._counts: collections.Counter[str] = collections.Counter()
    self._first: dict[str, int] = {}

  def add(self, what: str, line: int) -> None:
    """Counts one occurrence in a line of the file."""
    self._counts[what] += 1
    self._first.setdefault(what, line)

  def stripped(self, text: str, line: int) -> str:
    """Returns the text without surrounding blanks, which are counted."""
    plain = text.strip()
    if plain != text:
      self.add("paths or labels have surrounding blanks, which are removed", line)
    return plain

  def on_table(self, table: CsvFile, names: Mapping[str, str]) -> None:
    """Records the separator, and columns that are renamed or skipped."""
    note = table.separator_note()
    self._lines = [] if note is None else [note]
    if table.has_blanks:
      self._lines.append(f"{self._path}: blanks after separators are removed.")
    unnamed = table.columns.count("")
    if unnamed:
      self._lines.append(f"{self._path}: {unnamed} columns without a name are skipped.")
    self._lines += [
      f"{self._path}: column {column!r} becomes the feature {name!r}, because "
      f"{column!r} is a feature of every record."
      for column, name in names.items()
      if column != name
    ]

  def log(self) -> None:
    """Logs one warning per kind."""
    counted = [
      f"{self._path}: {count} {what}, first in line {self._first[what]}."
      for what, count in self._counts.items()
    ]
    for line in (*self._lines, *counted):
      logging.warning("%s", line)


def _refuse(error: UserError) -> NoReturn:
  raise error
