"""One pass over a TFRecord file: where its records lie, and their labels.

TensorFlow reads, checks the checksums and finds the label, many records at a time.
Only where that fails are records looked at one by one, to say which it was.

Shapes: n records.
"""

from __future__ import annotations

import os
from typing import Any, NoReturn

import numpy as np
import tensorflow as tf

from trainer.data import framing, manifest, paths
from trainer.data.index_builder import Labels, ShardIndex
from trainer.errors import UserError

# Read at a time: as many as the bytes hold, by the size of the first.
_MAX_RECORDS, _BATCH_BYTES = 4096, 32 << 20
_BUFFER_BYTES = 8 << 20


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
  lengths: list[np.ndarray] = []
  numbers: list[np.ndarray] = []
  labels = Labels()
  try:
    # TensorFlow asks for as much memory as a length says, and dies where none is left.
    if not paths.is_remote(path) and not framing.lengths_fit(path):
      _explain(path, label_feature, ValueError("its lengths are not its size."))
    for some_lengths, some_labels in _dataset(path, label_feature):
      lengths.append(some_lengths.numpy().astype(np.uint32))
      numbers.append(labels.numbers_of(some_labels.numpy().tolist()))
    ends = np.cumsum(_joined(lengths, np.uint32) + np.int64(framing.OVERHEAD_BYTES))
    shard = manifest.describe_shard(folder, name, len(ends))
  # TensorFlow's message may quote what is no text.
  except (tf.errors.OpError, UnicodeDecodeError) as error:
    _explain(path, label_feature, error)
  except OSError as error:
    raise UserError(f"{path} can't be read: {error.strerror}.") from error
  offsets = np.concatenate([np.zeros(1, np.int64), ends])[:-1]
  names = [_text(path, label) for label in labels.names]
  return ShardIndex(
    shard, offsets, _joined(lengths, np.uint32), _joined(numbers, np.int32), names
  )


def _joined(parts: list[np.ndarray], dtype: Any) -> np.ndarray:
  return np.concatenate([np.empty(0, dtype), *parts])


def _dataset(path: str, label_feature: str) -> tf.data.Dataset:
  """Lengths and labels of some records at a time."""
  records = tf.data.TFRecordDataset(path, buffer_size=_BUFFER_BYTES)
  label_dtype, num_bytes = _first(path, records, label_feature)
  features = {label_feature: tf.io.FixedLenFeature([], label_dtype)}

  def read(some: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    label = tf.io.parse_example(some, features)[label_feature]
    return tf.strings.length(some), label

  batches = records.batch(max(1, min(_MAX_RECORDS, _BATCH_BYTES // (num_bytes + 1))))
  return batches.map(read, tf.data.AUTOTUNE).prefetch(2)


def _first(
  path: str, records: tf.data.Dataset, label_feature: str
) -> tuple[tf.DType, int]:
  """Type of the first record's label, and its size in bytes; of an empty file, any."""
  for record in records.take(1):
    content = record.numpy()
    is_bytes = _kind(path, 0, content, label_feature)
    return (tf.string if is_bytes else tf.int64), len(content)
  return tf.string, 0


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


def _explain(path: str, label_feature: str, error: Exception) -> NoReturn:
  """Names the record that TensorFlow stumbled over."""
  try:
    with paths.open_file(path, "rb") as file:
      kinds = set()
      for number, record in enumerate(framing.records(file)):
        kinds.add(_kind(path, number, record, label_feature))
        if len(kinds) > 1:
          raise UserError(
            f"{path}: record {number} has a label of another type than those before it."
          ) from error
  except framing.FramingError as damage:
    raise UserError(
      f"{path}: record {damage.number} {damage}; restore the file, or leave it out."
    ) from damage
  except OSError as reason:
    raise UserError(f"{path} can't be read: {reason.strerror}.") from reason
  raise UserError(f"{path} can't be read: {str(error).splitlines()[0]}") from error
