"""Which records belong to which class, as two plain arrays.

Shapes: N records, C classes.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np


class Classes(Protocol):
  """What a schedule must know of an index."""

  @property
  def num_classes(self) -> int:
    """Number of classes; their ids are 0 … num_classes − 1."""

  def members(self, class_id: int) -> np.ndarray:
    """[n] int64, the numbers of the records of a class."""


class MemberTable(NamedTuple):
  """Record numbers sorted by class.

  Attributes:
    records: [N] int64, the members of class 0, then of class 1, and so on.
    starts: [C + 1] int64, where the members of each class start.
  """

  records: np.ndarray
  starts: np.ndarray

  @property
  def num_classes(self) -> int:
    """Number of classes, empty ones included."""
    return len(self.starts) - 1

  def members(self, class_id: int) -> np.ndarray:
    """[n] int64, the numbers of the records of a class."""
    start, end = self.starts[class_id : class_id + 2]
    return self.records[start:end]


def from_labels(labels: np.ndarray, num_classes: int) -> MemberTable:
  """Sorts record numbers by their class, in order of the records within a class.

  Args:
    labels: [N] int32 class ids.
    num_classes: C.

  Returns:
    The table of members.
  """
  starts = np.zeros(num_classes + 1, np.int64)
  np.cumsum(np.bincount(labels, minlength=num_classes), out=starts[1:])
  return MemberTable(np.argsort(labels, kind="stable").astype(np.int64), starts)


def of(classes: Classes) -> MemberTable:
  """The table of anything that knows its members: its own if it has one."""
  table = getattr(classes, "member_table", classes)
  if isinstance(table, MemberTable):
    return table
  members = [classes.members(class_id) for class_id in range(classes.num_classes)]
  starts = np.zeros(len(members) + 1, np.int64)
  np.cumsum([len(each) for each in members], out=starts[1:])
  records = np.concatenate([np.empty(0, np.int64), *members]).astype(np.int64)
  return MemberTable(records, starts)
