"""Rows of Parquet files, entries of LMDB, and records of TFRecords, made records anew.

Parquet and LMDB are read by tensorflow-io, so they need a Python that has it.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Optional

import gin

from trainer.data import paths
from trainer.data.name_pattern import NamePattern
from trainer.data.sources import Item, Loader, Source, Value, text_of
from trainer.errors import UserError

_PARQUET_MAGIC = b"PAR1"


@gin.register
class ParquetSource(Source):
  """Rows of Parquet files; further columns become features of the record.

  Args:
    pattern: the files.
    label_column: column of the class, text or an integer.
    image_column: column of the image file's bytes; None for rows without images.
  """

  def __init__(
    self,
    *,
    pattern: str,
    label_column: str = "label",
    image_column: Optional[str] = "image",
  ):
    self._pattern = pattern
    self._label_column = label_column
    self._image_column = image_column

  def fingerprint(self) -> dict[str, object]:
    """Names, sizes and times of the files."""
    columns = [self._label_column, self._image_column]
    return {"source": "parquet", "files": _states(self._pattern), "columns": columns}

  def num_items(self) -> int:
    """Rows, by the ends of the files."""
    return sum(map(_num_parquet_rows, _matching(self._pattern)))

  def loaders(self) -> Iterator[Loader]:
    """Every row, one after the other; keys are the file and the number in it.

    Raises:
      UserError: a file can't be read, or has no such column.
    """
    for path in _matching(self._pattern):
      for number, row in enumerate(_parquet_rows(path)):
        item = self._item(f"{os.path.basename(path)}/{number}", row, path)
        yield functools.partial(_give, item)

  def _item(self, key: str, row: dict[str, Any], path: str) -> Item:
    for name in (self._label_column, self._image_column):
      if name is not None and name not in row:
        raise UserError(f"{path} has no column {name!r}; it has {', '.join(row)}.")
    label = text_of(row.pop(self._label_column), key)
    image = None if self._image_column is None else row.pop(self._image_column)
    return Item(key, label, image, row)


@gin.register
class LmdbSource(Source):
  """Entries of an LMDB file: the value is an image file, the key tells the class.

  Args:
    path: the database's folder, or its file.
    label_pattern: regular expression whose first group is the class, searched in the
      key; as it stands, what is before the last slash.

  Raises:
    UserError: the expression is none, or has no group.
  """

  def __init__(self, *, path: str, label_pattern: str = r"^(.+)/"):
    self._path = paths.absolute(path)
    self._label_pattern = label_pattern
    self._label = NamePattern(label_pattern, "LmdbSource.label_pattern")

  def fingerprint(self) -> dict[str, object]:
    """Name, size and time of the file."""
    return {
      "source": "lmdb",
      "files": _states(self._file()),
      "label_pattern": self._label_pattern,
    }

  def loaders(self) -> Iterator[Loader]:
    """Every entry, one after the other, in the order of the keys.

    Raises:
      UserError: the file can't be read, or a key has no class.
    """
    from trainer.data import tensorflow_io

    lmdb = tensorflow_io.load("LMDB files").IODataset.from_lmdb(self._file())
    for key, value in _read_all(lmdb, self._file()):
      name = key.numpy().decode("utf-8", "surrogateescape")
      label = self._label.part_of(name)
      if label is None:
        raise UserError(
          f"{self._path}: the key {name!r} has no class by "
          f"LmdbSource.label_pattern={self._label_pattern!r}."
        )
      yield functools.partial(_give, Item(name, label, value.numpy()))

  def _file(self) -> str:
    inside = os.path.join(self._path, "data.mdb")
    return inside if paths.exists(inside) else self._path


@gin.register
class TfRecordSource(Source):
  """Records of TFRecords, to be written anew: with other names, or resized.

  To use TFRecords as they are, see `RecordsInPlace`.

  Args:
    pattern: the files.
    label_feature: the feature of the class, bytes or an integer.
    image_feature: the feature of the image file; None where there is none.
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
    """Names, sizes and times of the files."""
    names = [self._label_feature, self._image_feature, *self._features]
    return {"source": "tfrecord", "files": _states(self._pattern), "features": names}

  def loaders(self) -> Iterator[Loader]:
    """Every record, in the order of the files; keys are file and number.

    Raises:
      UserError: naming the record that is damaged.
    """
    from trainer.data import framing, plain_pass

    for path in _matching(self._pattern):
      name = os.path.basename(path)
      try:
        with paths.open_file(path, "rb") as file:
          for number, record in enumerate(plain_pass.records(file)):
            yield functools.partial(self._load, f"{name}/{number}", record)
      except framing.FramingError as error:
        raise UserError(error.line(path)) from error
      except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}.") from error

  def _load(self, key: str, record: bytes) -> Item:
    from trainer.data import examples

    values = examples.values(record, key)
    names = [self._label_feature, self._image_feature, *self._features]
    for name in names:
      if name is not None and name not in values:
        raise UserError(f"{key} has no feature {name!r}; it has {', '.join(values)}.")
    label = text_of(_only(values[self._label_feature], key, self._label_feature), key)
    image = None
    if self._image_feature is not None:
      image = _only(values[self._image_feature], key, self._image_feature)
    further = {n: _one_or_all(values[n]) for n in self._features}
    return Item(key, label, image, further)


def _one_or_all(values: Sequence[Any]) -> Value:
  return values[0] if len(values) == 1 else list(values)


def _only(values: Sequence[Any], key: str, name: str) -> Any:
  if len(values) != 1:
    raise UserError(f"{key} has {len(values)} values in {name!r}; it must have one.")
  return values[0]


def _give(item: Item) -> Item:
  return item


def _parquet_rows(path: str) -> Iterator[dict[str, Any]]:
  from trainer.data import tensorflow_io

  files = tensorflow_io.load("Parquet files").IODataset
  _check_parquet(path)
  for row in _read_all(lambda: files.from_parquet(path), path):
    yield {text_of(name, path): value.numpy() for name, value in row.items()}


def _num_parquet_rows(path: str) -> int:
  import tensorflow as tf

  from trainer.data import tensorflow_io

  tables = tensorflow_io.load("Parquet files").IOTensor
  _check_parquet(path)
  try:
    columns = tables.from_parquet(path).spec
  except tf.errors.OpError as error:
    raise UserError(f"{path} can't be read: {error.message.splitlines()[0]}") from error
  return columns[0].shape[0] if columns else 0


def _check_parquet(path: str) -> None:
  """Refuses what tensorflow-io would crash on: a file without its end."""
  try:
    size = paths.status(path).num_bytes
    with paths.open_file(path, "rb") as file:
      head = file.read(len(_PARQUET_MAGIC))
      file.seek(max(0, size - len(_PARQUET_MAGIC)))
      tail = file.read(len(_PARQUET_MAGIC))
  except OSError as error:
    raise UserError(f"{path} can't be read: {error.strerror}.") from error
  if head != _PARQUET_MAGIC or tail != _PARQUET_MAGIC:
    raise UserError(f"{path} can't be read: it is no whole Parquet file.")


def _read_all(dataset: Any, path: str) -> Iterator[Any]:
  """What a dataset of tensorflow-io has, or makes when called."""
  import tensorflow as tf

  try:
    yield from dataset() if callable(dataset) else dataset
  except tf.errors.OpError as error:
    reason = error.message.splitlines()[0]
    raise UserError(f"{path} can't be read: {reason}") from error


def _matching(pattern: str) -> list[str]:
  try:
    found = paths.matching(paths.absolute(pattern))
  except OSError as error:
    raise UserError(f"{pattern} can't be read: {error.strerror}.") from error
  if not found:
    raise UserError(f"{pattern} matches no file.")
  return found


def _states(pattern: str) -> list[Mapping[str, object]]:
  states: list[Mapping[str, object]] = []
  for path in _matching(pattern):
    try:
      status = paths.status(path)
    except OSError as error:
      raise UserError(f"{path} can't be read: {error.strerror}.") from error
    states.append({"name": path, **status._asdict()})
  return states
