"""Statistics of a sampler's draws, and classes with too few records.

Shapes: C classes (of the training side), N records of them, S steps.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from trainer.data.index_arrays import MemberTable
from trainer.data.records import RecordIndex
from trainer.data.samplers import BatchSampler, draw

_MAX_NAMES, _NUM_NAMES_IN_LINE = 1000, 5

_RECORDS_AT_A_TIME = 1_000_000


@dataclasses.dataclass(frozen=True)
class SmallClasses:
  """Classes with too few records.

  Attributes:
    min_members: number of records that a class should have.
    num_classes: number of classes with fewer.
    sizes: class name to number of records, for at most a thousand of the smallest.
  """

  min_members: int
  num_classes: int
  sizes: dict[str, int]

  def line(self) -> str:
    """Returns the number of such classes, and the smallest with their sizes."""
    names = list(self.sizes.items())[:_NUM_NAMES_IN_LINE]
    shown = ", ".join(f"{name} ({size})" for name, size in names)
    more = ", ..." if self.num_classes > len(names) else ""
    return (
      f"{self.num_classes} classes have fewer than {self.min_members} records: "
      f"{shown}{more}"
    )


def find_small_classes(
  index: RecordIndex, classes: np.ndarray, min_members: int
) -> SmallClasses:
  """Returns the classes that have too few records, the smallest first.

  Args:
    index: index with the members of the classes.
    classes: [C] int32 ids.
    min_members: number of records that a class should have.
  """
  starts = index.member_table.starts
  sizes = starts[classes + 1] - starts[classes]
  is_small = sizes < min_members
  small, small_sizes = classes[is_small], sizes[is_small]
  order = np.argsort(small_sizes, kind="stable")[:_MAX_NAMES]
  named = {index.class_names[small[place]]: int(small_sizes[place]) for place in order}
  return SmallClasses(min_members, len(small), named)


@dataclasses.dataclass(frozen=True)
class DrawStatistics:
  """Statistics of the records drawn by a sampler.

  Attributes:
    num_steps: S.
    num_draws: records drawn, including repeats.
    num_classes: C.
    num_records: N.
    class_epochs: mean number of times that a class is drawn.
    record_epochs: mean number of times that a record is drawn.
    num_classes_never_drawn: out of C.
    num_records_never_drawn: out of N.
    most_draws_of_a_class: maximum, in rows of a batch.
    most_draws_of_a_record: maximum.
    num_repeats_in_a_batch: draws of a record that is already in the same batch.
  """

  num_steps: int
  num_draws: int
  num_classes: int
  num_records: int
  class_epochs: float
  record_epochs: float
  num_classes_never_drawn: int
  num_records_never_drawn: int
  most_draws_of_a_class: int
  most_draws_of_a_record: int
  num_repeats_in_a_batch: int

  def lines(self) -> list[str]:
    """Returns the numbers as sentences."""
    return [
      f"{self.num_steps} steps draw {self.num_draws} of {self.num_records} records "
      f"of {self.num_classes} classes.",
      f"A class is drawn {self.class_epochs:.2f} times on average, "
      f"{self.most_draws_of_a_class} at most; {self.num_classes_never_drawn} are never "
      "drawn.",
      f"A record is drawn {self.record_epochs:.2f} times on average, "
      f"{self.most_draws_of_a_record} at most; {self.num_records_never_drawn} are "
      "never drawn.",
      f"{self.num_repeats_in_a_batch} draws repeat a record of the same batch.",
    ]


def draw_statistics(
  sampler: BatchSampler, table: MemberTable, classes: np.ndarray, num_steps: int
) -> DrawStatistics:
  """Draws all steps and counts.

  Args:
    sampler: sampler of batches [P, K].
    table: members of all classes.
    classes: ids of the classes that the sampler may draw.
    num_steps: S.

  Returns:
    The counts. Memory is a few bytes per record of the index.
  """
  labels = np.empty(len(table.records), np.int32)
  labels[table.records] = np.repeat(
    np.arange(table.num_classes, dtype=np.int32), np.diff(table.starts)
  )
  of_records = np.zeros(len(labels), np.int64)
  of_classes = np.zeros(table.num_classes, np.int64)
  num_samples = sampler.shape[-1]
  steps_at_a_time = max(1, _RECORDS_AT_A_TIME // math.prod(sampler.shape))
  num_repeats = 0
  for first in range(0, num_steps, steps_at_a_time):
    steps = np.arange(first, min(first + steps_at_a_time, num_steps))
    drawn = draw(sampler, steps).reshape(len(steps), -1)
    of_records += np.bincount(drawn.ravel(), minlength=len(labels))
    rows = labels[drawn].ravel()
    of_classes += np.bincount(rows, minlength=table.num_classes)
    in_order = np.sort(drawn, axis=1)
    num_repeats += int(np.count_nonzero(in_order[:, 1:] == in_order[:, :-1]))
  is_drawable = np.zeros(table.num_classes, bool)
  is_drawable[classes] = True
  draws_of_records = of_records[is_drawable[labels]]
  draws_of_classes = of_classes[is_drawable] / num_samples
  return DrawStatistics(
    num_steps=num_steps,
    num_draws=int(of_records.sum()),
    num_classes=len(draws_of_classes),
    num_records=len(draws_of_records),
    class_epochs=float(draws_of_classes.mean()),
    record_epochs=float(draws_of_records.mean()),
    num_classes_never_drawn=int((draws_of_classes == 0).sum()),
    num_records_never_drawn=int((draws_of_records == 0).sum()),
    most_draws_of_a_class=math.ceil(draws_of_classes.max()),
    most_draws_of_a_record=int(draws_of_records.max()),
    num_repeats_in_a_batch=num_repeats,
  )
