"""Rows of a Parquet file as plain values: scalars, byte strings and arrays.

`read` runs in a reader process and converts every column to one of a few types.
`parse_row` extracts one row of a batch. Fields of a struct become separate columns with
dotted names, such as `image.bytes`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Optional

import numpy as np
import pyarrow as pa
from pyarrow import parquet, types

from trainer.data.sources.reader_process import Message
from trainer.data.sources.source import Value
from trainer.errors import UserError

_BATCH_BYTES, _MAX_BATCH_ROWS = 16 << 20, 4096
_DAMAGE = (
  *(OSError, ValueError, MemoryError, RuntimeError, OverflowError),
  *(KeyError, TypeError, IndexError, pa.ArrowException),
)


def read(
  path: str,
  name: str,
  label: str,
  image: Optional[str],
  columns: Optional[Sequence[str]],
) -> Iterator[Message]:
  """Reads one file; runs in a reader process.

  Args:
    path: path of the local file.
    name: name of the file, for messages.
    label: column of the class.
    image: column of the image files; None for rows without images.
    columns: further columns (a struct includes all its fields); None for all.

  Yields:
    First a header with the kind of each column: "bytes", "int", "float", or None for a
    column without any value. Then the rows, as batches in Arrow's stream format.

  Raises:
    UserError: the file is damaged, lacks a column, or has a column of a type that
      records can't store.
  """
  try:
    with parquet.ParquetFile(
      path, pre_buffer=False, buffer_size=1 << 20, page_checksum_verification=True
    ) as file:
      yield from _read(file, name, (label, image), columns)
  except UserError:
    raise
  except _DAMAGE as error:
    raise _damaged(name, error) from error


def count(path: str, name: str) -> Iterator[Message]:
  """Yields one header with the number of rows of a file; runs in a reader process.

  Raises:
    UserError: the file is damaged.
  """
  try:
    yield {"num_rows": parquet.read_metadata(path).num_rows}, ()
  except _DAMAGE as error:
    raise _damaged(name, error) from error


def parse_batch(message: bytes) -> pa.RecordBatch:
  """Returns the batch in one message of `read`."""
  return pa.ipc.open_stream(message).read_next_batch()


def parse_row(batch: pa.RecordBatch, number: int, where: str) -> dict[str, Value]:
  """Returns the values of one row by column; nulls are skipped.

  Args:
    batch: batch from `parse_batch`.
    number: number of the row in the batch.
    where: name of the row, for the message.

  Raises:
    UserError: a list contains a null, or is ragged.
  """
  row: dict[str, Value] = {}
  for name, column in zip(batch.schema.names, batch.columns):
    scalar = column[number]
    if not scalar.is_valid:
      continue
    if not _is_list(scalar.type):
      row[name] = scalar.as_py()
    elif not types.is_null(_leaf_type(scalar.type)):
      row[name] = _array(scalar.values, name, where)
    elif len(scalar.values):
      raise _has_null(name, where)
  return row


def _read(
  file: parquet.ParquetFile,
  name: str,
  special: tuple[str, Optional[str]],
  columns: Optional[Sequence[str]],
) -> Iterator[Message]:
  schema = file.schema_arrow
  wanted = _choose(schema, name, special, columns)
  yield {"kinds": {each: _kind(type_) for each, type_ in wanted.items()}}, ()
  roots = [f.name for f in schema if any(n in wanted for n, _ in _leaves([f]))]
  num_rows = 0
  for batch in file.iter_batches(_rows_at_once(file.metadata), columns=roots):
    plain = _plain_batch(batch, wanted)
    plain.validate(full=True)
    num_rows += plain.num_rows
    yield {}, [_bytes_of(plain)]
  if num_rows != file.metadata.num_rows:
    raise UserError(
      f"{name} can't be read: it is damaged (it has {num_rows} of "
      f"{file.metadata.num_rows} rows)."
    )


def _choose(
  schema: pa.Schema,
  name: str,
  special: tuple[str, Optional[str]],
  columns: Optional[Sequence[str]],
) -> dict[str, pa.DataType]:
  """Returns the types of the wanted columns by dotted name.

  Raises:
    UserError: a column is missing, occurs twice, or can't be stored.
  """
  found = list(_leaves(schema))
  label, image = special
  needed = [each for each in special if each is not None]
  wanted = [n for n, _ in found if columns is None or _is_within(n, columns)]
  has = ", ".join(dict.fromkeys(n for n, _ in found)) or "none"
  for each in needed:
    if each not in dict(found):
      raise UserError(f"{name} has no column {each!r}; it has {has}.")
  for each in columns or ():
    if not any(_is_within(n, [each]) for n, _ in found):
      raise UserError(f"{name} has no column {each!r}; it has {has}.")
  chosen = {n: type_ for n, type_ in found if n in needed or n in wanted}
  for each, type_ in chosen.items():
    if [n for n, _ in found].count(each) > 1:
      raise UserError(f"{name} has two columns called {each!r}; rename one of them.")
    _check_type(name, each, type_)
  if _is_list(_stored(chosen[label])):
    raise UserError(
      f"{name}: the label column {label!r} is of type {chosen[label]}; it must be text "
      "or an integer."
    )
  if image is not None and not _is_bytes(_stored(chosen[image])):
    raise UserError(
      f"{name}: the image column {image!r} is of type {chosen[image]}; it must be "
      "binary, the bytes of image files."
    )
  return chosen


def _is_within(name: str, columns: Sequence[str]) -> bool:
  return any(name == each or name.startswith(f"{each}.") for each in columns)


def _check_type(name: str, column: str, type_: pa.DataType) -> None:
  """Raises for a type that records can't store: maps, lists of structs, unions."""
  try:
    _plain(pa.array([], _stored(type_)))
  except (pa.ArrowException, NotImplementedError, TypeError, ValueError) as error:
    raise UserError(
      f"{name}: column {column!r} is of type {type_}, which records can't store; name "
      "the columns to store in ParquetSource.columns."
    ) from error


def _leaves(fields: Any, prefix: str = "") -> Iterator[tuple[str, pa.DataType]]:
  """Yields dotted name and type of every column, including the fields of structs."""
  for field in fields:
    type_ = _stored(field.type)
    if types.is_struct(type_):
      inner = [type_.field(n) for n in range(type_.num_fields)]
      yield from _leaves(inner, f"{prefix}{field.name}.")
    else:
      yield prefix + field.name, field.type


def _plain_batch(
  batch: pa.RecordBatch, wanted: Mapping[str, pa.DataType]
) -> pa.RecordBatch:
  columns = {
    name: _plain(array)
    for field, column in zip(batch.schema, batch.columns)
    for name, array in _flattened(field.name, column)
    if name in wanted
  }
  return pa.RecordBatch.from_arrays(list(columns.values()), list(columns))


def _flattened(name: str, array: pa.Array) -> Iterator[tuple[str, pa.Array]]:
  """Yields a column, or the fields of a struct, which are null where the struct is."""
  if isinstance(array, pa.ExtensionArray):
    array = array.storage
  if not types.is_struct(array.type):
    yield name, array
    return
  for number, inner in enumerate(array.flatten()):
    yield from _flattened(f"{name}.{array.type.field(number).name}", inner)


def _plain(array: pa.Array) -> pa.Array:
  """Converts values to integers, floats, Booleans or bytes, or (nested) lists of them.

  Dates, times and decimal numbers become text; durations become integers.
  """
  with_text = array.cast(_plain_type(array.type, pa.large_string()))
  return with_text.cast(_plain_type(with_text.type, pa.large_binary()))


def _plain_type(type_: pa.DataType, text: pa.DataType) -> pa.DataType:
  type_ = _stored(type_)
  if types.is_dictionary(type_):
    return _plain_type(type_.value_type, text)
  if types.is_fixed_size_list(type_):
    return pa.list_(_plain_type(type_.value_type, text), type_.list_size)
  if _is_list(type_):
    return pa.large_list(_plain_type(type_.value_type, text))
  if types.is_duration(type_):
    return pa.int64()
  if _is_bytes(type_):
    return pa.large_binary()
  if _is_text(type_) or types.is_decimal(type_) or types.is_temporal(type_):
    return text
  if types.is_primitive(type_) or types.is_null(type_):
    return type_
  raise TypeError(str(type_))


def _stored(type_: pa.DataType) -> pa.DataType:
  return type_.storage_type if isinstance(type_, pa.BaseExtensionType) else type_


def _is_list(type_: pa.DataType) -> bool:
  of_any_size = types.is_list(type_) or types.is_large_list(type_)
  return of_any_size or types.is_fixed_size_list(type_)


def _is_bytes(type_: pa.DataType) -> bool:
  is_known = types.is_binary(type_) or types.is_large_binary(type_)
  return is_known or types.is_fixed_size_binary(type_) or str(type_) == "binary_view"


def _is_text(type_: pa.DataType) -> bool:
  is_known = types.is_string(type_) or types.is_large_string(type_)
  return is_known or str(type_) == "string_view"


def _leaf_type(type_: pa.DataType) -> pa.DataType:
  while _is_list(type_):
    type_ = _stored(type_.value_type)
  return type_


def _kind(type_: pa.DataType) -> Optional[str]:
  leaf = _leaf_type(_plain_type(type_, pa.large_binary()))
  if types.is_null(leaf):
    return None
  if types.is_floating(leaf):
    return "float"
  return "int" if types.is_integer(leaf) or types.is_boolean(leaf) else "bytes"


def _rows_at_once(metadata: parquet.FileMetaData) -> int:
  groups = [metadata.row_group(n) for n in range(metadata.num_row_groups)]
  num_bytes = sum(group.total_byte_size for group in groups)
  rows = _BATCH_BYTES * metadata.num_rows // max(1, num_bytes)
  return min(max(1, rows), _MAX_BATCH_ROWS)


def _bytes_of(batch: pa.RecordBatch) -> bytes:
  sink = pa.BufferOutputStream()
  with pa.ipc.new_stream(sink, batch.schema) as stream:
    stream.write_batch(batch)
  return sink.getvalue().to_pybytes()


def _array(values: pa.Array, name: str, where: str) -> np.ndarray:
  """Returns the values of one list, nested lists in row-major order."""
  while _is_list(values.type):
    if values.null_count:
      raise _has_null(name, where)
    lengths = {len(each.values) for each in values}
    if len(lengths) > 1:
      raise UserError(
        f"{where} has lists of lengths {sorted(lengths)[:3]} inside column {name!r}; "
        "they must have equal lengths."
      )
    values = values.flatten()
  if values.null_count:
    raise _has_null(name, where)
  if types.is_primitive(values.type):
    return values.to_numpy(zero_copy_only=False)
  array = np.empty(len(values), object)
  array[:] = values.to_pylist()
  return array


def _has_null(name: str, where: str) -> UserError:
  return UserError(
    f"{where} has a null inside the list of column {name!r}; replace it by a value, or "
    "remove the column from ParquetSource.columns."
  )


def _damaged(name: str, error: Exception) -> UserError:
  reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
  return UserError(f"{name} can't be read as Parquet: {reason[:200]}")
