"""Makes one index of the parts that describe a shard each.

Shapes: n records of a shard, N of all, C classes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Optional

import numpy as np

from trainer.data import index_arrays, manifest, members, paths
from trainer.data.class_names import ClassNames

_OLD = ".old"


class ShardIndex(NamedTuple):
  """Where the records of a shard lie, and what they are.

  Attributes:
    shard: the file.
    offsets: [n] int64, where each frame starts, bytes.
    lengths: [n] uint32, length of each record's data, bytes.
    labels: [n] int32, positions in `label_names`.
    label_names: the classes that this shard has.
  """

  shard: manifest.Shard
  offsets: np.ndarray
  lengths: np.ndarray
  labels: np.ndarray
  label_names: Sequence[str]


class Labels:
  """Numbers names in the order in which they first come."""

  def __init__(self) -> None:
    self._ids: dict[Any, int] = {}

  def numbers_of(self, names: Sequence[Any]) -> np.ndarray:
    """[n] int32, the number of each of n names; a new name gets the next one."""
    ids = self._ids
    numbers = (ids.setdefault(name, len(ids)) for name in names)
    return np.fromiter(numbers, np.int32, len(names))

  @property
  def names(self) -> list[Any]:
    """The names by number."""
    return list(self._ids)


def write_index(
  folder: str,
  parts: Sequence[ShardIndex],
  *,
  label_feature: str,
  source: Optional[Mapping[str, Any]] = None,
  old_names: Sequence[str] = (),
) -> None:
  """Writes arrays and then the manifest.

  Args:
    folder: of the index; it exists.
    parts: in the order of the record numbers.
    label_feature: name of the feature that the labels were read from.
    source: fingerprint of what was ingested.
    old_names: classes that keep their ids; others follow in the order of their names.
  """
  new_names = {name for part in parts for name in part.label_names} - set(old_names)
  class_names = [*old_names, *sorted(new_names)]
  names = ClassNames.of(class_names)
  labels = _class_ids(parts, class_names)
  table = members.from_labels(labels, len(class_names))
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
  index_arrays.write(folder, arrays)
  manifest.write(
    folder,
    manifest.Manifest(
      shards=tuple(part.shard for part in parts),
      num_classes=len(class_names),
      label_feature=label_feature,
      source=source,
    ),
  )


def publish_index(aside: str, folder: str) -> None:
  """Moves a written index to its place, over one that is there.

  Who has the old one open goes on with it.

  Args:
    aside: where it was written.
    folder: where it belongs.
  """
  if not paths.is_remote(folder):
    old = folder + _OLD
    paths.remove_folder(old)
    if paths.exists(folder):
      os.replace(folder, old)
    os.replace(aside, folder)
    paths.remove_folder(old)
    return
  paths.remove_folder(folder)
  paths.make_folder(folder)
  names = paths.list_folder(aside)
  for name in sorted(names, key=lambda name: name == manifest.FILE_NAME):
    paths.move(os.path.join(aside, name), os.path.join(folder, name))


def recover_index(folder: str) -> None:
  """Puts back the index that `publish_index`, killed, had moved out of the way."""
  if paths.is_remote(folder):
    return
  if not paths.exists(folder) and paths.exists(folder + _OLD):
    os.replace(folder + _OLD, folder)
  paths.remove_folder(folder + _OLD)


def _class_ids(parts: Sequence[ShardIndex], class_names: Sequence[str]) -> np.ndarray:
  """[N] int32, the class id of every record."""
  ids = {name: class_id for class_id, name in enumerate(class_names)}
  labels = []
  for part in parts:
    own = np.array([ids[name] for name in part.label_names], np.int32)
    labels.append(own[part.labels] if len(own) else np.empty(0, np.int32))
  return np.concatenate(labels)
