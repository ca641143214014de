"""The records among which a round mines: all of the training classes, or some of each.

Shapes: N items, C classes that have any.
"""

from __future__ import annotations

from typing import NamedTuple, Optional

import numpy as np

from trainer.data import permutation
from trainer.data.members import MemberTable


class Items(NamedTuple):
  """Records with their classes.

  Attributes:
    record_numbers: [N] int64, ascending.
    labels: [N] int32 class ids.
    by_class: [N] int64, items class after class, in a random order within a class.
    places: [N] int64, where in `by_class` each item is.
    starts: [C + 1] int64, where in `by_class` the items of each class start.
    class_ids: [C] int32, ascending.
  """

  record_numbers: np.ndarray
  labels: np.ndarray
  by_class: np.ndarray
  places: np.ndarray
  starts: np.ndarray
  class_ids: np.ndarray

  @property
  def largest_class(self) -> int:
    """Items of the largest class; 0 where there is none."""
    return int(np.diff(self.starts).max(initial=0))


def draw(
  table: MemberTable, classes: np.ndarray, records_per_class: Optional[int], key: int
) -> Items:
  """Draws the items of a round. Takes about 60 bytes a record meanwhile.

  Args:
    table: the members of all classes.
    classes: int32 ids of the classes to mine among.
    records_per_class: how many of a class at most; None for all.
    key: another key, other records and another order within the classes.
  """
  classes = np.sort(classes)
  sizes = table.starts[classes + 1] - table.starts[classes]
  ends = np.cumsum(sizes)
  places = np.arange(sizes.sum()) - np.repeat(ends - sizes, sizes)
  records = table.records[np.repeat(table.starts[classes], sizes) + places]
  ranks = np.repeat(np.arange(len(classes)), sizes)
  order = np.lexsort((permutation.mix(key, records), ranks))
  # In that order the places of a class are 0, 1, 2, … again.
  if records_per_class is not None:
    order = order[places < records_per_class]
  records, labels = records[order], classes[ranks[order]]
  ascending = np.argsort(records)
  by_class = np.empty(len(records), np.int64)
  by_class[ascending] = np.arange(len(records))
  class_ids, starts = np.unique(labels, return_index=True)
  return Items(
    records[ascending],
    labels[ascending].astype(np.int32),
    by_class,
    ascending,
    np.append(starts, len(records)).astype(np.int64),
    class_ids.astype(np.int32),
  )
