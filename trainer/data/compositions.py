"""Schedules made of others: batches of one group, with hard classes, with lone images.

Each is a pure function of the step, as its parts are.

Shapes: S steps, P classes and K samples a class in a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Callable, Optional, Protocol

import gin
import numpy as np

from trainer.data import distinct_stream, members, permutation
from trainer.data.name_pattern import NamePattern
from trainer.data.schedule import PKSchedule, Schedule, draw
from trainer.errors import UserError

# What hashes are for, so that no two uses of one seed are alike (1 to 3: PKSchedule).
_GROUPS = 4


class NamedClasses(members.Classes, Protocol):
  """Classes with their members and names, such as a `RecordIndex`."""

  @property
  def class_names(self) -> Sequence[str]:
    """Names by class id."""


ScheduleFn = Callable[..., PKSchedule]


class _SideBySide:
  """Batches that have the rows of several schedules, one below the other."""

  def __init__(self, parts: Sequence[Schedule], num_samples: int):
    self._parts = parts
    self._num_samples = num_samples
    num_records = sum(int(np.prod(part.shape)) for part in parts)
    self.shape = (num_records // num_samples, num_samples)

  def batch(self, step: int) -> np.ndarray:
    """[P, K] int64, the record numbers of a step."""
    return self.batches(np.array([step]))[0]

  def batches(self, steps: np.ndarray) -> np.ndarray:
    """[S, P, K] int64, the record numbers of steps [S] int64."""
    rows = [
      draw(part, steps).reshape(len(steps), -1, self._num_samples)
      for part in self._parts
    ]
    return np.concatenate(rows, axis=1)


@gin.register
def with_hard_classes(
  index: NamedClasses,
  *,
  schedule_fn: ScheduleFn,
  hard_classes: Sequence[str],
  num_hard: int,
  num_others: int,
  classes: Optional[np.ndarray] = None,
) -> Schedule:
  """Batches of which some rows are of given classes, and the rest of the others.

  Args:
    index: knows classes, members and names.
    schedule_fn: makes the schedule of either part.
    hard_classes: names of the given classes; those not in `classes` are passed over.
    num_hard: how many of a batch's classes are of them.
    num_others: how many are not.
    classes: int32 ids of the classes to draw from; None for all.

  Returns:
    A schedule of num_hard + num_others classes.

  Raises:
    UserError: no class has one of the names, or a part has not enough classes.
  """
  ids = np.arange(index.num_classes, dtype=np.int32) if classes is None else classes
  wanted = set(hard_classes)
  names = [index.class_names[class_id] for class_id in ids]
  is_hard = np.array([name in wanted for name in names], bool)
  unknown = wanted.difference(names)
  if unknown:  # Others are of the other side of a split.
    unknown.difference_update(index.class_names)
  if unknown:
    raise UserError(
      f"with_hard_classes.hard_classes names {', '.join(sorted(unknown))}, "
      "and the data have no such class."
    )
  parts = [
    schedule_fn(index, classes=ids[chosen], classes_per_batch=num)
    for chosen, num in ((is_hard, num_hard), (~is_hard, num_others))
  ]
  return _SideBySide(parts, parts[0].shape[1])


@gin.register
def with_lone_images(
  index: members.Classes,
  *,
  schedule_fn: ScheduleFn,
  num_lone_rows: int,
  seed: int,
  classes: Optional[np.ndarray] = None,
) -> Schedule:
  """Batches with rows of classes of one image, which serve as negatives only.

  Such a row has K images of K classes, where others have K of one. The schedule draws
  from the other classes alone.

  Args:
    index: knows classes and members.
    schedule_fn: makes the schedule of the classes of two images or more.
    num_lone_rows: rows of a batch that have lone images.
    seed: of their order.
    classes: int32 ids of the classes to draw from; None for all.

  Returns:
    A schedule of P + num_lone_rows rows.

  Raises:
    UserError: there are not as many lone images as a batch takes.
  """
  table = members.of(index)
  ids = np.arange(table.num_classes, dtype=np.int32) if classes is None else classes
  sizes = table.starts[ids + 1] - table.starts[ids]
  main = schedule_fn(index, classes=ids[sizes > 1])
  num_samples = main.shape[1]
  num_lone = int((sizes == 1).sum())
  if num_lone < num_lone_rows * num_samples:
    raise UserError(
      f"with_lone_images.num_lone_rows={num_lone_rows} rows of {num_samples} need "
      f"{num_lone_rows * num_samples} classes of one image, and there are {num_lone}; "
      f"choose at most {num_lone // num_samples}."
    )
  lone = PKSchedule(
    index,
    classes_per_batch=num_lone_rows * num_samples,
    samples_per_class=1,
    seed=seed,
    classes=ids[sizes == 1],
  )
  return _SideBySide([main, lone], num_samples)


@gin.register
class OneGroupSchedule:
  """Batches of which each is drawn from one group of classes, such as a category.

  A group comes as often an epoch as it has batches' worth of classes, and each time
  goes on where its own schedule was.

  Args:
    index: knows classes, members and names.
    schedule_fn: makes the schedule of a group.
    group_pattern: regular expression whose first group, searched in a class's name,
      names the class's group; as it stands, what is before the first slash.
    seed: of the order of the groups.
    classes: int32 ids of the classes to draw from; None for all.

  Raises:
    UserError: the pattern is none, a name has no group, or a group has too few classes
      for a batch.
  """

  def __init__(
    self,
    index: NamedClasses,
    *,
    schedule_fn: ScheduleFn,
    group_pattern: str = "^([^/]+)/",
    seed: int,
    classes: Optional[np.ndarray] = None,
  ):
    ids = np.arange(index.num_classes, dtype=np.int32) if classes is None else classes
    pattern = NamePattern(group_pattern, "OneGroupSchedule.group_pattern")
    groups: dict[str, list[int]] = {}
    for class_id in ids.tolist():
      name = index.class_names[class_id]
      group = pattern.part_of(name)
      if group is None:
        raise UserError(
          f"The class {name!r} has no group by "
          f"OneGroupSchedule.group_pattern={group_pattern!r}."
        )
      groups.setdefault(group, []).append(class_id)
    self._schedules = [
      _schedule_of(index, schedule_fn, name, groups[name]) for name in sorted(groups)
    ]
    self.shape = self._schedules[0].shape
    sizes = [len(groups[name]) for name in sorted(groups)]
    self._ends = np.cumsum([-(-size // self.shape[0]) for size in sizes])
    self._key = permutation.mix(seed, _GROUPS)

  def batch(self, step: int) -> np.ndarray:
    """[P, K] int64, the record numbers of a step."""
    return self.batches(np.array([step]))[0]

  def batches(self, steps: np.ndarray) -> np.ndarray:
    """[S, P, K] int64, the record numbers of steps [S] int64."""
    total = int(self._ends[-1])
    keys = np.broadcast_to(self._key, steps.shape)
    sizes = np.full(steps.shape, total)
    tickets = distinct_stream.block(steps, sizes, keys, 1)[:, 0]
    groups = np.searchsorted(self._ends, tickets, side="right")
    starts = np.where(groups > 0, self._ends[groups - 1], 0)
    own_steps = steps // total * (self._ends[groups] - starts) + tickets - starts
    records = np.empty((len(steps), *self.shape), np.int64)
    for group in np.unique(groups).tolist():
      rows = np.flatnonzero(groups == group)
      records[rows] = draw(self._schedules[group], own_steps[rows])
    return records


def _schedule_of(
  index: NamedClasses, schedule_fn: ScheduleFn, name: str, class_ids: Sequence[int]
) -> PKSchedule:
  try:
    return schedule_fn(index, classes=np.array(class_ids, np.int32))
  except UserError as error:
    raise UserError(f"Group {name!r}: {error}") from error
