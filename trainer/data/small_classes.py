"""Classes with fewer records than a batch takes of each, by name.

Shapes: C classes.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from trainer.data.records import RecordIndex

_MAX_NAMES, _NUM_NAMES_IN_LINE = 1000, 5


@dataclasses.dataclass(frozen=True)
class SmallClasses:
  """Classes that have too few records.

  Attributes:
    min_members: how many a class should have.
    num_classes: how many classes have fewer.
    sizes: records of the smallest of them, a thousand at most, by their names.
  """

  min_members: int
  num_classes: int
  sizes: dict[str, int]

  def line(self) -> str:
    """How many there are, and the smallest with their numbers of records."""
    names = list(self.sizes.items())[:_NUM_NAMES_IN_LINE]
    shown = ", ".join(f"{name} ({size})" for name, size in names)
    more = ", ..." if self.num_classes > len(names) else ""
    return (
      f"{self.num_classes} classes have fewer than {self.min_members} records: "
      f"{shown}{more}"
    )


def find(index: RecordIndex, classes: np.ndarray, min_members: int) -> SmallClasses:
  """Those of some classes that have too few records, the smallest first.

  Args:
    index: knows the classes' members.
    classes: [C] int32 ids.
    min_members: how many a class should have.
  """
  starts = index.member_table.starts
  sizes = starts[classes + 1] - starts[classes]
  is_small = sizes < min_members
  small, small_sizes = classes[is_small], sizes[is_small]
  order = np.argsort(small_sizes, kind="stable")[:_MAX_NAMES]
  named = {index.class_names[small[place]]: int(small_sizes[place]) for place in order}
  return SmallClasses(min_members, len(small), named)
