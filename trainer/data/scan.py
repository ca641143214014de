"""One pass over a TFRecord file: where its records lie, and their labels.

Labels are found many at a time. Only where that fails are records looked at one by one,
to say which it was.

Shapes: n records.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn, Optional

import numpy as np
import tensorflow as tf

from trainer.data import framing, manifest, paths, plain_pass
from trainer.data.index_builder import Labels, ShardIndex
from trainer.errors import UserError

# Parsed at once: enough that the call costs little, and little memory if large.
_MAX_RECORDS, _BATCH_BYTES = 2048, 32 << 20


def scan(folder: str, name: str, label_feature: str) -> ShardIndex:
  """Reads a shard once.

  Args:
    folder: of the shards.
    name: path of the shard relative to it.
    label_feature: name of the feature that holds the label, bytes or an integer.

  Returns:
    Its part of the index.

  Raises:
    UserError: naming the record that is damaged or has no such label.
  """
  path = os.path.join(folder, name)
  parser = _LabelParser(path, label_feature)
  lengths: list[np.ndarray] = []
  numbers: list[np.ndarray] = []
  labels = Labels()
  try:
    with paths.as_os_errors(path), paths.open_file(path, "rb") as file:
      for some in _batches(plain_pass.blocks(file)):
        lengths.append(np.array(list(map(len, some)), np.uint32))
        numbers.append(labels.numbers_of(parser.labels_of(some)))
    ends = np.cumsum(_joined(lengths, np.uint32) + np.int64(framing.OVERHEAD_BYTES))
    shard = manifest.describe_shard(folder, name, len(ends))
  except framing.FramingError as damage:
    raise UserError(damage.line(path)) from damage
  except OSError as error:
    raise UserError(f"{path} can't be read: {error.strerror}.") from error
  offsets = np.concatenate([np.zeros(1, np.int64), ends])[:-1]
  names = [_text(path, label) for label in labels.names]
  return ShardIndex(
    shard, offsets, _joined(lengths, np.uint32), _joined(numbers, np.int32), names
  )


def _joined(parts: list[np.ndarray], dtype: Any) -> np.ndarray:
  return np.concatenate([np.empty(0, dtype), *parts])


def _batches(blocks: Iterator[list[bytes]]) -> Iterator[list[bytes]]:
  """Joins blocks to as many records as are parsed at once, or a few more.

  What comes before a block that fails is given before.
  """
  batch: list[bytes] = []
  num_bytes = 0
  try:
    for block in blocks:
      batch += block
      num_bytes += sum(map(len, block))
      if len(batch) >= _MAX_RECORDS or num_bytes >= _BATCH_BYTES:
        yield batch
        batch, num_bytes = [], 0
  except framing.FramingError:
    yield batch
    raise
  yield batch


class _LabelParser:
  """Labels of one shard's records, all of one type.

  Args:
    path: of the shard, for messages.
    label_feature: name of the feature that holds the label.
  """

  def __init__(self, path: str, label_feature: str):
    self._path = path
    self._label_feature = label_feature
    self._is_bytes: Optional[bool] = None
    self._num_parsed = 0

  def labels_of(self, records: Sequence[bytes]) -> list[Any]:
    """The labels of the next n records.

    Raises:
      UserError: naming the first that has none.
    """
    if not records:
      return []
    if self._is_bytes is None:
      self._is_bytes = _kind(self._path, 0, records[0], self._label_feature)
    try:
      labels = _parse(records, self._label_feature, self._is_bytes)
    # TensorFlow's message may quote what is no text.
    except (tf.errors.OpError, UnicodeDecodeError) as error:
      self._explain(records, error)
    found = labels.tolist()
    if b"" in found:
      number = self._num_parsed + found.index(b"")
      raise UserError(f"{self._path}: record {number} has an empty label.")
    self._num_parsed += len(records)
    return found

  def _explain(self, records: Sequence[bytes], error: Exception) -> NoReturn:
    """Names the record that TensorFlow stumbled over."""
    for number, record in enumerate(records, self._num_parsed):
      if _kind(self._path, number, record, self._label_feature) != self._is_bytes:
        raise UserError(
          f"{self._path}: record {number} has a label of another type than those "
          "before it."
        ) from error
    reason = str(error).splitlines()[0]
    raise UserError(f"{self._path} can't be read: {reason}") from error


def _parse(records: Sequence[bytes], feature: str, is_bytes: bool) -> np.ndarray:
  """[n] bytes or int64, the only value of a feature in each of n examples."""
  none = np.empty(0, object)
  parsed = tf.raw_ops.ParseExampleV2(  # Python's own part of parse_example is slow.
    serialized=np.array(records, object),
    names=none,
    sparse_keys=none,
    dense_keys=np.array([feature], object),
    ragged_keys=none,
    dense_defaults=[tf.constant([], tf.string if is_bytes else tf.int64)],
    num_sparse=0,
    sparse_types=[],
    ragged_value_types=[],
    ragged_split_types=[],
    dense_shapes=[[]],
  )
  return parsed.dense_values[0].numpy()


def _kind(path: str, number: int, record: bytes, label_feature: str) -> bool:
  """Whether the label of a record is bytes, and not an integer.

  Raises:
    UserError: it has no label, or one of another type.
  """
  where = f"{path}: record {number}"
  try:
    features = tf.train.Example.FromString(record).features.feature
  except Exception as error:  # protobuf has its own.
    raise UserError(f"{where} is no tf.train.Example.") from error
  if label_feature not in features:
    has = ", ".join(sorted(features)) or "none"
    raise UserError(
      f"{where} has no feature {label_feature!r}; it has {has}. Name the right one in "
      "label_feature."
    )
  feature = features[label_feature]
  kind = feature.WhichOneof("kind")
  if kind not in ("bytes_list", "int64_list"):
    raise UserError(
      f"{where} has a label of type {kind or 'nothing'} in {label_feature!r}; it must "
      "be bytes or an integer."
    )
  num_values = len(getattr(feature, kind).value)
  if num_values != 1:
    raise UserError(
      f"{where} has {num_values} labels in {label_feature!r}; it must have one."
    )
  return kind == "bytes_list"


def _text(path: str, label: Any) -> str:
  try:
    return label.decode() if isinstance(label, bytes) else str(label)
  except UnicodeDecodeError as error:
    raise UserError(f"{path} has a label {label!r} that is no UTF-8.") from error
