"""The training corpus of a mining round: its items, and copies among them.

Shapes: N items, one record each, C classes with at least one item.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple, Optional

import numpy as np
import tensorflow as tf

from trainer.data import permutation
from trainer.data.images import Decoder
from trainer.data.index_arrays import MemberTable
from trainer.data.records import RecordIndex, Replacements
from trainer.errors import UserError
from trainer.runtime import watchdog

# Records read at once, and records checked at once, which decodes them.
_READ_AT_ONCE, _TRIED_AT_ONCE = 4_096, 256


def dedup_features(decoder: Decoder) -> Sequence[str]:
  """Returns the names of the features that a decoder reads.

  Raises:
    UserError: the decoder has no attribute `features`.
  """
  features = getattr(decoder, "features", None)
  if not features:
    raise UserError(
      f"{type(decoder).__name__} needs an attribute `features`, the names of the "
      "features that it reads; they identify copies of a record."
    )
  return features


def content_hashes(
  index: RecordIndex,
  record_numbers: np.ndarray,
  *,
  features: Sequence[str],
  replacements: Optional[Replacements] = None,
) -> np.ndarray:
  """Returns a hash of the decoded features of each record.

  Args:
    index: of the records.
    record_numbers: [N] int64.
    features: names of the decoded features, which exclude features that differ between
      copies, such as file names and addresses.
    replacements: of bad records, which count as copies of their replacements; None to
      refuse bad records.

  Returns:
    [N] uint64; equal where all bytes of these features are equal.

  Raises:
    UserError: a record cannot be read, or is not an example.
  """
  found = np.empty(len(record_numbers), np.uint64)
  for start in range(0, len(found), _READ_AT_ONCE):
    watchdog.beat()
    numbers = record_numbers[start : start + _READ_AT_ONCE]
    if replacements is not None:
      parts = np.array_split(numbers, -(-len(numbers) // _TRIED_AT_ONCE))
      numbers = np.concatenate([replacements.replace(part) for part in parts])
    for position, (number, record) in enumerate(
      zip(numbers, index.read(numbers)), start
    ):
      found[position] = _hash(record, features, index, int(number))
  return found


def _hash(
  record: bytes, features: Sequence[str], index: RecordIndex, number: int
) -> int:
  try:
    example = tf.train.Example.FromString(record)
  except Exception as error:  # protobuf raises its own type.
    raise UserError(f"{index.describe(number)} is not a tf.train.Example.") from error
  content = tf.train.Example()
  for name in features:
    if name in example.features.feature:
      content.features.feature[name].CopyFrom(example.features.feature[name])
  serialized = content.SerializeToString(deterministic=True)
  return int.from_bytes(hashlib.blake2b(serialized, digest_size=8).digest(), "little")


class CorpusItems(NamedTuple):
  """Records with their classes.

  Attributes:
    record_numbers: [N] int64, ascending.
    labels: [N] int32 class ids.
    by_class: [N] int64, items grouped by class, in random order within a class.
    positions: [N] int64, the position of each item in `by_class`.
    starts: [C + 1] int64, where the items of each class start in `by_class`.
    class_ids: [C] int32, ascending.
  """

  record_numbers: np.ndarray
  labels: np.ndarray
  by_class: np.ndarray
  positions: np.ndarray
  starts: np.ndarray
  class_ids: np.ndarray

  @property
  def largest_class(self) -> int:
    """Number of items of the largest class; 0 if there are none."""
    return int(np.diff(self.starts).max(initial=0))


def draw_items(
  table: MemberTable, classes: np.ndarray, records_per_class: Optional[int], key: int
) -> CorpusItems:
  """Draws the items of a round; takes about 60 bytes per record temporarily.

  Args:
    table: the members of all classes.
    classes: int32 ids of the classes to mine.
    records_per_class: the largest number of records per class; None for all.
    key: random key of the records and of their order within the classes.
  """
  classes = np.sort(classes)
  sizes = table.starts[classes + 1] - table.starts[classes]
  ends = np.cumsum(sizes)
  positions = np.arange(sizes.sum()) - np.repeat(ends - sizes, sizes)
  records = table.records[np.repeat(table.starts[classes], sizes) + positions]
  ranks = np.repeat(np.arange(len(classes)), sizes)
  order = np.lexsort((permutation.mix(key, records), ranks))
  # In this order the places of a class are again 0, 1, 2, …
  if records_per_class is not None:
    order = order[positions < records_per_class]
  records, labels = records[order], classes[ranks[order]]
  ascending = np.argsort(records)
  by_class = np.empty(len(records), np.int64)
  by_class[ascending] = np.arange(len(records))
  class_ids, starts = np.unique(labels, return_index=True)
  return CorpusItems(
    records[ascending],
    labels[ascending].astype(np.int32),
    by_class,
    ascending,
    np.append(starts, len(records)).astype(np.int64),
    class_ids.astype(np.int32),
  )
