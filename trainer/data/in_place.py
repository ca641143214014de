"""Indexes TFRecords as users already have them; the shards are left as they are."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from concurrent import futures
from typing import Optional

import gin
import numpy as np
from absl import logging

from trainer.data import manifest, paths
from trainer.data.folder_lock import alone_in
from trainer.data.index_builder import (
  ShardIndex,
  publish_index,
  recover_index,
  write_index,
)
from trainer.data.progress import Progress
from trainer.data.records import RecordIndex, locate
from trainer.errors import UserError, is_out_of_space

_ENDINGS = (".tfrecord", ".tfrecords")


@gin.register
class RecordsInPlace:
  """TFRecords that are there already, in the folder or the pattern of `ingest.folder`.

  Args:
    label_feature: name of the feature that holds the label, bytes or an integer.
  """

  def __init__(self, *, label_feature: str = "label"):
    self.label_feature = label_feature


def index_records(folder_or_pattern: str, *, label_feature: str) -> RecordIndex:
  """Writes the index of shards, or adds to it those that are new.

  Shards that are in the index already are not read again, unless their time of change
  is another; their records and classes keep their numbers. Where one of them is missing
  or has other bytes, all is read anew.

  Args:
    folder_or_pattern: a folder, of which files ending in .tfrecord or .tfrecords are
      taken, or a pattern of files.
    label_feature: name of the feature that holds the label.

  Returns:
    The index, opened.

  Raises:
    UserError: naming what can't be read or written.
  """
  folder, index_folder = locate(folder_or_pattern)
  try:
    with alone_in(folder, "indexing"):
      recover_index(index_folder)
      return _index(folder_or_pattern, folder, index_folder, label_feature)
  except OSError as error:
    verb = "written to" if is_out_of_space(error) else "read"
    raise UserError(f"{folder} can't be {verb}: {error.strerror}.") from error


def _index(
  folder_or_pattern: str, folder: str, index_folder: str, label_feature: str
) -> RecordIndex:
  names = _shard_names(folder_or_pattern, folder)
  old = _reusable(folder_or_pattern, folder, index_folder, label_feature)
  old_parts = [] if old is None else _parts_of(old)
  # Of those with another time only samples were compared, which labels may escape.
  known = {
    part.shard.name for part in old_parts if manifest.has_time_of(folder, part.shard)
  }
  names_to_scan = [name for name in names if name not in known]
  if old is not None and not names_to_scan:
    logging.info("%s: all %d shards are indexed already.", folder, len(names))
    return old
  scanned = {
    part.shard.name: part for part in _scan_all(folder, names_to_scan, label_feature)
  }
  kept = [scanned.pop(part.shard.name, part) for part in old_parts]
  parts = [*kept, *scanned.values()]
  _check_classes(folder_or_pattern, parts)
  aside = index_folder + ".partial"
  try:
    paths.remove_folder(aside)  # What a killed run left.
    paths.make_folder(aside)
    write_index(
      aside,
      parts,
      label_feature=label_feature,
      old_names=[] if old is None else list(old.class_names),
    )
    publish_index(aside, index_folder)
  except OSError as error:
    raise UserError(f"{index_folder} can't be written: {error.strerror}.") from error
  return RecordIndex.open(folder_or_pattern)


def _shard_names(folder_or_pattern: str, folder: str) -> list[str]:
  try:
    if paths.absolute(folder_or_pattern) == folder:
      names = [n for n in paths.list_folder(folder) if n.endswith(_ENDINGS)]
    else:
      found = paths.matching(_in_folder(paths.absolute(folder_or_pattern)))
      beside = (".index", ".index.partial", ".index.old")
      names = [os.path.basename(p) for p in found if not p.endswith(beside)]
  except OSError as error:
    raise UserError(f"{folder} can't be read: {error.strerror}.") from error
  if not names:
    raise UserError(
      f"{folder_or_pattern} has no shards; a folder needs files that end in "
      f"{' or '.join(_ENDINGS)}, or give a pattern such as 'data/train-*'."
    )
  return names


def _in_folder(pattern: str) -> str:
  """The pattern, whose folder is a name and no pattern, whatever is in it."""
  if paths.is_remote(pattern):
    return pattern
  folder, names = os.path.split(pattern)
  return os.path.join(glob.escape(folder), names)


def _reusable(
  folder_or_pattern: str, folder: str, index_folder: str, label_feature: str
) -> Optional[RecordIndex]:
  """The index that is there, if it describes what is there."""
  description = manifest.read(index_folder)
  if description is None or description.label_feature != label_feature:
    return None
  changed = [s for s in description.shards if manifest.change_of(folder, s)]
  for shard in changed:
    reason = manifest.change_of(folder, shard)
    logging.warning("%s %s.", os.path.join(folder, shard.name), reason)
  if changed:
    logging.warning("All shards are read anew; classes may get other numbers.")
    return None
  return RecordIndex.open(folder_or_pattern)


def _parts_of(index: RecordIndex) -> list[ShardIndex]:
  """The parts that an index was made of."""
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
  """The parts of new shards, read side by side."""
  from trainer.data import scan  # Late: TensorFlow isn't needed before.

  parts = []
  with futures.ThreadPoolExecutor(os.cpu_count()) as threads:
    scanned = threads.map(lambda name: scan.scan(folder, name, label_feature), names)
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
