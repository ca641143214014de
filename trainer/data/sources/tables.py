"""Sources of Parquet rows, LMDB entries and TFRecord records.

Parquet and LMDB are read in a child process, which a damaged file may crash.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Optional

import gin
import numpy as np

from trainer.data.sources import reader_process
from trainer.data.sources.source import (
  Item,
  Loader,
  NamePattern,
  Source,
  Value,
  feature_names,
  label_text,
)
from trainer.errors import UserError, reading
from trainer.runtime import filesystem

_LMDB_BATCH_BYTES = 4 << 20


@gin.register
class ParquetSource(Source):
  """Rows of Parquet files; further columns become features of the record.

  Fields of a struct are columns with dotted names, such as `image.bytes`. A null is
  left out of its record. Lists, also of fixed size, are features with many values;
  nested lists of equal length are flattened. Dates, times and decimal numbers become
  text. Further columns named `image`, `label` or `key` get the suffix `_column`.

  Args:
    pattern: pattern of the files.
    label_column: column of the class, text or an integer.
    image_column: column of the image file's bytes; None for rows without images.
    columns: further columns to keep; None for all.
  """

  def __init__(
    self,
    *,
    pattern: str,
    label_column: str = "label",
    image_column: Optional[str] = "image",
    columns: Optional[Sequence[str]] = None,
  ):
    self._pattern = pattern
    self._label_column = label_column
    self._image_column = image_column
    self._columns = None if columns is None else list(columns)

  def fingerprint(self) -> dict[str, object]:
    """Returns names, sizes and times of the files, and the columns."""
    return {
      "source": "parquet",
      "reader": "pyarrow",
      "files": _file_states(self._pattern),
      "columns": [self._label_column, self._image_column, self._columns],
    }

  def num_items(self) -> Optional[int]:
    """Returns the number of rows, from the files' metadata; None for remote files."""
    found = _expand_pattern(self._pattern)
    if any(map(filesystem.is_remote, found)):
      return None  # Each file would be copied here twice.
    return sum(map(_num_parquet_rows, found))

  def loaders(self) -> Iterator[Loader]:
    """Yields a loader for every row, in order; keys are the file and the row number.

    Raises:
      UserError: a file can't be read, lacks a column, or has a column of another type
        than earlier files.
    """
    _check_installed("pyarrow", "Parquet files")
    from trainer.data.sources import (
      parquet_columns as parquet_columns_lib,  # Late: pyarrow takes time to import.
    )

    columns = (self._label_column, self._image_column, self._columns)
    kinds: dict[str, tuple[str, str]] = {}
    for name, path in _with_names(_expand_pattern(self._pattern)):
      num_rows, names = 0, {}
      for header, parts in reader_process.read(
        parquet_columns_lib.read, path, *columns
      ):
        if "kinds" in header:
          _check_kinds(kinds, header["kinds"], path, self._label_column)
          names = feature_names(n for n in header["kinds"] if n not in columns[:2])
        for batch in map(parquet_columns_lib.parse_batch, parts):
          for number in range(batch.num_rows):
            key = f"{name}/{num_rows + number}"
            yield functools.partial(self._load, key, batch, number, names)
          num_rows += batch.num_rows

  def _load(self, key: str, batch: Any, number: int, names: Mapping[str, str]) -> Item:
    from trainer.data.sources import parquet_columns as parquet_columns_lib

    row = parquet_columns_lib.parse_row(batch, number, key)
    if self._label_column not in row:
      raise UserError(f"{key} has no label: column {self._label_column!r} is null.")
    label = label_text(row.pop(self._label_column), key)
    image = None
    if self._image_column is not None:
      image = row.pop(self._image_column, None)
      if image is None:
        raise UserError(f"{key} has no image: column {self._image_column!r} is null.")
    assert image is None or isinstance(image, bytes)
    return Item(key, label, image, {names[n]: row[n] for n in row if n in names})


@gin.register
class LmdbSource(Source):
  """Entries of an LMDB file: values are image files, and keys contain the class.

  Args:
    path: the database's folder, or its file.
    label_pattern: regular expression, searched in the key; its first group is the
      class. Default: the part before the last slash.

  Raises:
    UserError: it is not a regular expression, or has no group.
  """

  def __init__(self, *, path: str, label_pattern: str = r"^(.+)/"):
    self._path = filesystem.absolute(path)
    self._label_pattern = label_pattern
    self._label = NamePattern(label_pattern, "LmdbSource.label_pattern")

  def fingerprint(self) -> dict[str, object]:
    """Returns name, size and time of the file, and the pattern."""
    return {
      "source": "lmdb",
      "files": _file_states(self._file()),
      "label_pattern": self._label_pattern,
    }

  def loaders(self) -> Iterator[Loader]:
    """Yields a loader for every entry, in the order of the keys.

    Raises:
      UserError: the file can't be read.
    """
    _check_installed("lmdb", "LMDB files")
    for _, parts in reader_process.read(read_lmdb, self._file()):
      for key, value in zip(parts[::2], parts[1::2]):
        yield functools.partial(self._load, key, value)

  def _load(self, key: bytes, value: bytes) -> Item:
    name = key.decode("utf-8", "surrogateescape")
    label = self._label.part_of(name)
    if label is None:
      raise UserError(
        f"{self._path}: LmdbSource.label_pattern={self._label_pattern!r} finds no "
        f"class in the key {name!r}."
      )
    where = f"{self._path}: the key {name!r}"
    return Item(name, label_text(os.fsencode(label), where), value)

  def _file(self) -> str:
    inside = os.path.join(self._path, "data.mdb")
    return inside if filesystem.exists(inside) else self._path


def read_lmdb(path: str, name: str) -> Iterator[reader_process.Message]:
  """Reads keys and values of an LMDB file; runs in a reader process.

  Args:
    path: path of the local file.
    name: name of the file, for messages.

  Yields:
    Batches of alternating keys and values.

  Raises:
    UserError: the file is damaged.
  """
  import lmdb

  try:
    with (
      contextlib.closing(
        lmdb.open(path, subdir=False, readonly=True, lock=False)
      ) as environment,
      environment.begin(buffers=False) as transaction,
    ):
      parts: list[bytes] = []
      num_bytes = 0
      is_sorted = not any(environment.open_db(None, transaction).flags().values())
      for entry in _checked_entries(transaction, name, is_sorted):
        parts += entry
        num_bytes += sum(map(len, entry))
        if num_bytes >= _LMDB_BATCH_BYTES:
          yield {}, parts
          parts, num_bytes = [], 0
      yield {}, parts
  except (lmdb.Error, OSError, MemoryError, OverflowError) as error:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    raise UserError(f"{name} can't be read as LMDB: {reason}.") from error


def _checked_entries(
  transaction: Any, name: str, is_sorted: bool
) -> Iterator[tuple[bytes, bytes]]:
  """Yields keys and values; checks their number and that keys increase."""
  declared, num_entries = transaction.stat()["entries"], 0
  last: Optional[bytes] = None
  for key, value in transaction.cursor():
    num_entries += 1
    is_unsorted = is_sorted and last is not None and key <= last
    if num_entries > declared or is_unsorted:
      raise UserError(f"{name} can't be read: it is damaged after key {last!r}.")
    last = key
    yield key, value
  if num_entries < declared:
    raise UserError(
      f"{name} can't be read: it is damaged (it has {num_entries} of {declared} "
      "entries)."
    )


@gin.register
class TfRecordSource(Source):
  """Records of TFRecords that are rewritten, with other names or resized.

  To use TFRecords unchanged, see `ExistingTFRecords`.

  Args:
    pattern: pattern of the files.
    label_feature: feature of the class, bytes or an integer.
    image_feature: feature of the image file; None for records without images.
    features: names of further features to keep.
  """

  def __init__(
    self,
    *,
    pattern: str,
    label_feature: str = "label",
    image_feature: Optional[str] = "image",
    features: Sequence[str] = (),
  ):
    self._pattern = pattern
    self._label_feature = label_feature
    self._image_feature = image_feature
    self._features = tuple(features)

  def fingerprint(self) -> dict[str, object]:
    """Returns names, sizes and times of the files, and the features."""
    names = [self._label_feature, self._image_feature, *self._features]
    return {
      "source": "tfrecord",
      "files": _file_states(self._pattern),
      "features": names,
    }

  def loaders(self) -> Iterator[Loader]:
    """Yields a loader for every record, in file order; keys are file and number.

    Raises:
      UserError: a record is damaged; the message names it.
    """
    from trainer.data import tfrecord

    for name, path in _with_names(_expand_pattern(self._pattern)):
      try:
        with reading(path), filesystem.open_file(path, "rb") as file:
          for number, record in enumerate(tfrecord.iterate_records(file)):
            yield functools.partial(self._load, f"{name}/{number}", record)
      except tfrecord.FramingError as error:
        raise UserError(error.line(path)) from error

  def _load(self, key: str, record: bytes) -> Item:
    from trainer.data import tfrecord

    values = tfrecord.arrays(record, key)
    names = [self._label_feature, self._image_feature, *self._features]
    for name in names:
      if name is not None and name not in values:
        raise UserError(f"{key} has no feature {name!r}; it has {', '.join(values)}.")
    label = label_text(
      _single_value(values[self._label_feature], key, self._label_feature), key
    )
    image = None
    if self._image_feature is not None:
      image = _single_value(values[self._image_feature], key, self._image_feature)
    further: dict[str, Value] = {n: values[n] for n in self._features}
    return Item(key, label, image, further)


def _single_value(values: np.ndarray, key: str, name: str) -> Any:
  if len(values) != 1:
    raise UserError(f"{key} has {len(values)} values in {name!r}; it must have one.")
  return values[0]


def _check_installed(module: str, purpose: str) -> None:
  if importlib.util.find_spec(module) is None:
    raise UserError(f"{purpose} need {module}; install it: pip install {module}")


def _num_parquet_rows(path: str) -> int:
  _check_installed("pyarrow", "Parquet files")
  from trainer.data.sources import parquet_columns as parquet_columns_lib

  [(header, _)] = reader_process.read(parquet_columns_lib.count, path)
  return header["num_rows"]


def _check_kinds(
  known: dict[str, tuple[str, str]],
  kinds: Mapping[str, Optional[str]],
  path: str,
  label_column: str,
) -> None:
  """Raises if files store a column with different types; records new columns."""
  for column, kind in kinds.items():
    if kind is None or column == label_column:  # Labels are converted to text.
      continue
    before, first = known.setdefault(column, (kind, path))
    if before != kind:
      raise UserError(
        f"{path} has column {column!r} as {kind}, {first} as {before}; write both with "
        "one type, or remove it from ParquetSource.columns."
      )


def _with_names(found: Sequence[str]) -> list[tuple[str, str]]:
  """Returns each path with a short name: its last part, or more if names collide."""
  names = [os.path.basename(path) for path in found]
  if len(set(names)) < len(names):
    above = os.path.commonpath([os.path.dirname(path) for path in found])
    names = [path[len(above) :].lstrip("/") for path in found]
  return list(zip(names, found))


def _expand_pattern(pattern: str) -> list[str]:
  with reading(pattern):
    found = filesystem.matching(filesystem.absolute(pattern))
  if not found:
    raise UserError(f"{pattern} matches no file.")
  return found


def _file_states(pattern: str) -> list[Mapping[str, object]]:
  states: list[Mapping[str, object]] = []
  for path in _expand_pattern(pattern):
    with reading(path):
      states.append({"name": path, **filesystem.status(path)._asdict()})
  return states
