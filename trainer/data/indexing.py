"""Indexing of TFRecord shards: newly written ones, and existing ones.

Labels are parsed in batches. Records are parsed one by one only after a failure, to
name the bad record.

Shapes: n records of a shard, N records of all shards, C classes.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any, NamedTuple, NoReturn, Optional

import gin
import numpy as np
import tensorflow as tf
from absl import logging

from trainer.data import index_arrays, manifest, tfrecord
from trainer.data.index_arrays import ClassNames
from trainer.data.records import RecordIndex, locate
from trainer.data.sources.source import label_text
from trainer.errors import UserError, is_out_of_space, reading
from trainer.runtime import filesystem
from trainer.runtime.lease import locked_folder
from trainer.runtime.progress import Progress

# Batch limits: large enough to amortize the call, with little memory for large records.
_MAX_RECORDS, _BATCH_BYTES = 2048, 32 << 20


_ENDINGS = (".tfrecord", ".tfrecords")


def scan_shard(folder: str, name: str, label_feature: str) -> ShardIndex:
  """Reads a shard once, and returns its part of the index.

  Args:
    folder: folder of the shards.
    name: path of the shard relative to it.
    label_feature: name of the feature that holds the label, bytes or an integer.

  Returns:
    Its part of the index.

  Raises:
    UserError: a record is damaged or has no such label; the message names it.
  """
  path = os.path.join(folder, name)
  parser = _LabelParser(path, label_feature)
  lengths: list[np.ndarray] = []
  numbers: list[np.ndarray] = []
  labels = LabelMapping()
  with reading(path):
    try:
      with filesystem.as_os_errors(path), filesystem.open_file(path, "rb") as file:
        for some in _batches(tfrecord.iterate_blocks(file)):
          lengths.append(np.array(list(map(len, some)), np.uint32))
          numbers.append(labels.numbers_of(parser.labels_of(some)))
    except tfrecord.FramingError as damage:
      raise UserError(damage.line(path)) from damage
    ends = np.cumsum(
      _concatenate(lengths, np.uint32) + np.int64(tfrecord.OVERHEAD_BYTES)
    )
    shard = manifest.describe_shard(folder, name, len(ends))
  offsets = np.concatenate([np.zeros(1, np.int64), ends])[:-1]
  names = [label_text(label, path) for label in labels.names]
  return ShardIndex(
    shard,
    offsets,
    _concatenate(lengths, np.uint32),
    _concatenate(numbers, np.int32),
    names,
  )


def _concatenate(parts: list[np.ndarray], dtype: Any) -> np.ndarray:
  return np.concatenate([np.empty(0, dtype), *parts])


def _batches(blocks: Iterator[list[bytes]]) -> Iterator[list[bytes]]:
  """Joins blocks into batches of about the number of records that is parsed at once.

  Records before a damaged block are yielded before the error is raised.
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
  except tfrecord.FramingError:
    yield batch
    raise
  yield batch


class _LabelParser:
  """Parser of the labels of one shard, which must all have the same type.

  Args:
    path: path of the shard, for messages.
    label_feature: name of the feature that holds the label.
  """

  def __init__(self, path: str, label_feature: str):
    self._path = path
    self._label_feature = label_feature
    self._is_bytes: Optional[bool] = None
    self._num_parsed = 0

  def labels_of(self, records: Sequence[bytes]) -> list[Any]:
    """Returns the labels of the next n records.

    Raises:
      UserError: a record has no label; the message names the first.
    """
    if not records:
      return []
    if self._is_bytes is None:
      self._is_bytes = _kind(self._path, 0, records[0], self._label_feature)
    try:
      labels = _parse(records, self._label_feature, self._is_bytes)
    # TensorFlow's message may contain bytes that can't be decoded.
    except (tf.errors.OpError, UnicodeDecodeError) as error:
      self._explain(records, error)
    found = labels.tolist()
    if b"" in found:
      number = self._num_parsed + found.index(b"")
      raise UserError(f"{self._path}: record {number} has an empty label.")
    self._num_parsed += len(records)
    return found

  def _explain(self, records: Sequence[bytes], error: Exception) -> NoReturn:
    """Raises an error that names the record TensorFlow failed on."""
    for number, record in enumerate(records, self._num_parsed):
      if _kind(self._path, number, record, self._label_feature) != self._is_bytes:
        raise UserError(
          f"{self._path}: record {number} has a label of another type than earlier "
          "records."
        ) from error
    reason = str(error).splitlines()[0]
    raise UserError(f"{self._path} can't be read: {reason}") from error


def _parse(records: Sequence[bytes], feature: str, is_bytes: bool) -> np.ndarray:
  """Returns the single value of a feature in each of n examples, [n] bytes or int64."""
  default = np.empty(0, object)
  parsed = tf.raw_ops.ParseExampleV2(  # The Python part of tf.io.parse_example is slow.
    serialized=np.array(records, object),
    names=default,
    sparse_keys=default,
    dense_keys=np.array([feature], object),
    ragged_keys=default,
    dense_defaults=[tf.constant([], tf.string if is_bytes else tf.int64)],
    num_sparse=0,
    sparse_types=[],
    ragged_value_types=[],
    ragged_split_types=[],
    dense_shapes=[[]],
  )
  return parsed.dense_values[0].numpy()


def _kind(path: str, number: int, record: bytes, label_feature: str) -> bool:
  """Returns whether the label of a record is bytes rather than an integer.

  Raises:
    UserError: it has no label, or one of another type.
  """
  where = f"{path}: record {number}"
  try:
    features = tf.train.Example.FromString(record).features.feature
  except Exception as error:  # protobuf raises its own type.
    raise UserError(f"{where} is not a tf.train.Example.") from error
  if label_feature not in features:
    has = ", ".join(sorted(features)) or "none"
    raise UserError(
      f"{where} has no feature {label_feature!r}; it has {has}. Set label_feature to "
      "the feature of the label."
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


class ShardIndex(NamedTuple):
  """The part of an index that describes one shard.

  Attributes:
    shard: the file.
    offsets: [n] int64, start of each frame, bytes.
    lengths: [n] uint32, length of each record's data, bytes.
    labels: [n] int32, positions in `label_names`.
    label_names: the classes of this shard.
  """

  shard: manifest.IndexedShard
  offsets: np.ndarray
  lengths: np.ndarray
  labels: np.ndarray
  label_names: Sequence[str]


class LabelMapping:
  """A mapping of names to numbers, in order of first occurrence."""

  def __init__(self) -> None:
    self._ids: dict[Any, int] = {}

  def numbers_of(self, names: Sequence[Any]) -> np.ndarray:
    """Returns [n] int32, the number of each of n names; new names get the next one."""
    ids = self._ids
    numbers = (ids.setdefault(name, len(ids)) for name in names)
    return np.fromiter(numbers, np.int32, len(names))

  @property
  def names(self) -> list[Any]:
    """Returns the names by number."""
    return list(self._ids)


def write_index(
  folder: str,
  parts: Sequence[ShardIndex],
  *,
  label_feature: str,
  source: Optional[Mapping[str, Any]] = None,
  old_names: Sequence[str] = (),
) -> None:
  """Writes the arrays of an index, and then its manifest.

  Args:
    folder: an existing folder for the index.
    parts: parts in the order of the record numbers.
    label_feature: name of the feature that the labels were read from.
    source: fingerprint of the ingested source.
    old_names: classes that keep their ids; the others follow in alphabetical order.
  """
  new_names = {name for part in parts for name in part.label_names} - set(old_names)
  class_names = [*old_names, *sorted(new_names)]
  names = ClassNames.from_names(class_names)
  labels = _class_ids(parts, class_names)
  table = index_arrays.members_from_labels(labels, len(class_names))
  counts = [part.shard.num_records for part in parts]
  arrays = index_arrays.IndexArrays(
    offsets=np.concatenate([part.offsets for part in parts]),
    lengths=np.concatenate([part.lengths for part in parts]),
    shards=np.repeat(np.arange(len(counts), dtype=np.int32), counts),
    labels=labels,
    member_records=table.records,
    member_starts=table.starts,
    name_text=names.text,
    name_starts=names.starts,
    name_hashes=names.hashes,
  )
  index_arrays.write_arrays(folder, arrays)
  manifest.write(
    folder,
    manifest.Manifest(
      shards=tuple(part.shard for part in parts),
      num_classes=len(class_names),
      label_feature=label_feature,
      source=source,
    ),
  )


def publish_index(staging_dir: str, folder: str) -> None:
  """Moves a complete index into place and replaces an existing one.

  Processes that have the old index open can keep using it.

  Args:
    staging_dir: folder where it was written.
    folder: final folder of the index.
  """
  if not filesystem.is_remote(folder):
    filesystem.replace_folder(staging_dir, folder)
    return
  filesystem.remove_folder(folder)
  filesystem.make_folder(folder)
  names = filesystem.list_folder(staging_dir)
  for name in sorted(names, key=lambda name: name == manifest.MANIFEST_FILE):
    filesystem.move(os.path.join(staging_dir, name), os.path.join(folder, name))


def recover_index(folder: str) -> None:
  """Restores the index that a killed `publish_index` had renamed."""
  if not filesystem.is_remote(folder):
    filesystem.recover_folder(folder)


def _class_ids(parts: Sequence[ShardIndex], class_names: Sequence[str]) -> np.ndarray:
  """Returns [N] int32, the class id of every record."""
  ids = {name: class_id for class_id, name in enumerate(class_names)}
  labels = []
  for part in parts:
    class_ids = np.array([ids[name] for name in part.label_names], np.int32)
    labels.append(class_ids[part.labels] if len(class_ids) else np.empty(0, np.int32))
  return np.concatenate(labels)


@gin.register
class ExistingTFRecords:
  """Existing TFRecords in `ingest.folder`, which is a folder or a pattern.

  Args:
    label_feature: name of the feature that holds the label, bytes or an integer.
  """

  def __init__(self, *, label_feature: str = "label"):
    self.label_feature = label_feature


def index_records(folder_or_pattern: str, *, label_feature: str) -> RecordIndex:
  """Indexes shards, or adds new shards to their index.

  Shards that are already in the index are not read again unless their modification time
  differs; their records and classes keep their numbers. If a shard is missing or its
  bytes have changed, all shards are read again.

  Args:
    folder_or_pattern: a folder, in which files ending in .tfrecord or .tfrecords are
      used, or a pattern of files.
    label_feature: name of the feature that holds the label.

  Returns:
    The opened index.

  Raises:
    UserError: a file can't be read or written; the message names it.
  """
  folder, index_folder = locate(folder_or_pattern)
  try:
    with locked_folder(folder, "indexing"):
      recover_index(index_folder)
      return _index(folder_or_pattern, folder, index_folder, label_feature)
  except OSError as error:
    verb = "written to" if is_out_of_space(error) else "read"
    raise UserError(f"{folder} can't be {verb}: {error.strerror}.") from error


def _index(
  folder_or_pattern: str, folder: str, index_folder: str, label_feature: str
) -> RecordIndex:
  names = _shard_names(folder_or_pattern, folder)
  old = _find_reusable(folder_or_pattern, folder, index_folder, label_feature)
  old_parts = [] if old is None else _parts_of(old)
  # Only samples of shards with a new time were compared, and labels may have changed.
  known = {
    part.shard.name for part in old_parts if manifest.has_same_time(folder, part.shard)
  }
  names_to_scan = [name for name in names if name not in known]
  if old is not None and not names_to_scan:
    logging.info("%s: all %d shards are already indexed.", folder, len(names))
    return old
  scanned = {
    part.shard.name: part for part in _scan_all(folder, names_to_scan, label_feature)
  }
  kept = [scanned.pop(part.shard.name, part) for part in old_parts]
  parts = [*kept, *scanned.values()]
  _check_classes(folder_or_pattern, parts)
  staging_dir = index_folder + ".partial"
  try:
    filesystem.remove_folder(staging_dir)  # Left by a killed run.
    filesystem.make_folder(staging_dir)
    write_index(
      staging_dir,
      parts,
      label_feature=label_feature,
      old_names=[] if old is None else list(old.class_names),
    )
    publish_index(staging_dir, index_folder)
  except OSError as error:
    raise UserError(f"{index_folder} can't be written: {error.strerror}.") from error
  return RecordIndex.open(folder_or_pattern)


def _shard_names(folder_or_pattern: str, folder: str) -> list[str]:
  with reading(folder):
    if filesystem.absolute(folder_or_pattern) == folder:
      names = [n for n in filesystem.list_folder(folder) if n.endswith(_ENDINGS)]
    else:
      found = filesystem.matching(_in_folder(filesystem.absolute(folder_or_pattern)))
      unfinished = (".index", ".index.partial", ".index.old")
      names = [os.path.basename(p) for p in found if not p.endswith(unfinished)]
  if not names:
    raise UserError(
      f"{folder_or_pattern} has no shards; give a folder with files that end in "
      f"{' or '.join(_ENDINGS)}, or a pattern such as 'data/train-*'."
    )
  return names


def _in_folder(pattern: str) -> str:
  """Escapes the folder of a pattern, so that only the file name is a pattern."""
  if filesystem.is_remote(pattern):
    return pattern
  folder, names = os.path.split(pattern)
  return os.path.join(glob.escape(folder), names)


def _find_reusable(
  folder_or_pattern: str, folder: str, index_folder: str, label_feature: str
) -> Optional[RecordIndex]:
  """Returns the existing index if it describes the existing shards."""
  description = manifest.read(index_folder)
  if description is None or description.label_feature != label_feature:
    return None
  has_changed = False
  for shard in description.shards:
    reason = manifest.describe_change(folder, shard)
    if reason:
      has_changed = True
      logging.warning("%s %s.", os.path.join(folder, shard.name), reason)
  if has_changed:
    logging.warning("All shards are read again; class ids may change.")
    return None
  return RecordIndex.open(folder_or_pattern)


def _parts_of(index: RecordIndex) -> list[ShardIndex]:
  """Splits an index into its shards' parts."""
  arrays = index.arrays
  names = list(index.class_names)
  ends = np.cumsum([shard.num_records for shard in index.manifest.shards]).tolist()
  parts = []
  for shard, end in zip(index.manifest.shards, ends):
    part = slice(end - shard.num_records, end)
    labels = arrays.labels[part]
    parts.append(
      ShardIndex(shard, arrays.offsets[part], arrays.lengths[part], labels, names)
    )
  return parts


def _scan_all(
  folder: str, names: Sequence[str], label_feature: str
) -> list[ShardIndex]:
  """Reads new shards in parallel, and returns their parts of the index."""
  parts = []
  with futures.ThreadPoolExecutor(os.cpu_count()) as threads:
    scanned = threads.map(lambda name: scan_shard(folder, name, label_feature), names)
    progress = Progress(f"indexing {folder}", "shards", len(names))
    for part in scanned:
      parts.append(part)
      progress.advance(1)
    progress.finish()
  return parts


def _check_classes(folder_or_pattern: str, parts: Sequence[ShardIndex]) -> None:
  names = {name for part in parts for name in part.label_names}
  if len(names) < 2:
    raise UserError(
      f"{folder_or_pattern} has {len(names)} class ({', '.join(names)}); retrieval "
      "needs at least two."
    )
