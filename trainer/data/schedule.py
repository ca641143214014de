"""Which records make a batch: pure functions of the step, without state.

So resuming is exact and free, and the global batch does not depend on who computes it.

Shapes: S steps, P classes and K samples a class in a batch, B records in a batch.
"""

from __future__ import annotations

from typing import Callable, Optional, Protocol

import gin
import numpy as np
from absl import logging

from trainer.data import distinct_stream, members, permutation
from trainer.data.class_stream import ClassStream, EqualClasses, WeightedClasses
from trainer.data.class_weights import ClassWeights
from trainer.errors import UserError

# What a hash is for, so that no two uses of one seed are alike (1 and 3: the classes).
_MEMBERS = 2
# Sizes of classes are looked at so many at a time, to hold little of them.
_CLASSES_AT_A_TIME = 1_000_000


StreamFn = Callable[[ClassStream, int, Optional[np.ndarray]], ClassStream]


class Schedule(Protocol):
  """What the pipeline must know of a schedule."""

  @property
  def shape(self) -> tuple[int, ...]:
    """(P, K) or (B,)."""

  def batch(self, step: int) -> np.ndarray:
    """Record numbers of a step, [P, K] or [B] int64; −1 is a padding row."""


def draw(schedule: Schedule, steps: np.ndarray) -> np.ndarray:
  """[S, P, K] or [S, B] int64, what a schedule draws in steps [S].

  Many steps at once cost little more than one, where a schedule has `batches`.
  """
  batches = getattr(schedule, "batches", None)
  if batches is not None:
    return batches(steps)
  return np.stack([schedule.batch(step) for step in steps.tolist()])


@gin.register
class PKSchedule:
  """P classes of K samples each, classes and members balanced over time.

  Every class comes once in an epoch of classes, or as often as its weight says. Within
  a class no member comes again before all have come. The P classes of a batch are
  distinct, and the K samples of a class too if it has so many; otherwise each is
  repeated as equally often as possible.
  """

  def __init__(
    self,
    index: members.Classes,
    *,
    classes_per_batch: int,
    samples_per_class: int,
    seed: int,
    classes: Optional[np.ndarray] = None,
    small_classes: str = "repeat",
    weights: Optional[ClassWeights] = None,
    stream_fn: Optional[StreamFn] = None,
  ):
    """Looks up what can be drawn.

    Args:
      index: knows classes and their members, such as a `RecordIndex`.
      classes_per_batch: P.
      samples_per_class: K.
      seed: another seed, another order.
      classes: int32 ids of the classes to draw from; None for all.
      small_classes: "repeat" members of a class of fewer than K, or "leave_out" it.
      weights: how often each class comes; None for all equally often.
      stream_fn: makes of the stream of classes, of P and of the classes' ids (None for
        all) the stream that is drawn from; None for the stream itself.

    Raises:
      UserError: if P or K is below 1, or fewer than P classes can be drawn.
    """
    _check_at_least_one("classes_per_batch", classes_per_batch)
    _check_at_least_one("samples_per_class", samples_per_class)
    self._num_samples = samples_per_class
    self._num_classes_drawn = classes_per_batch
    self._seed = seed
    self._table = members.of(index)
    self._classes = _drawable(self._table, classes, samples_per_class, small_classes)
    self.num_classes = (
      self._table.num_classes if self._classes is None else len(self._classes)
    )
    if self.num_classes < classes_per_batch:
      raise UserError(
        f"classes_per_batch={classes_per_batch} but only {self.num_classes} classes "
        f"can be drawn from; choose at most {self.num_classes}."
      )
    self._stream = self._make_stream(weights)
    if stream_fn is not None:
      self._stream = stream_fn(self._stream, classes_per_batch, self._classes)

  @property
  def shape(self) -> tuple[int, int]:
    """(P, K)."""
    return self._num_classes_drawn, self._num_samples

  def batch(self, step: int) -> np.ndarray:
    """[P, K] int64, the record numbers of a step."""
    return self.batches(np.array([step]))[0]

  def batches(self, steps: np.ndarray) -> np.ndarray:
    """[S, P, K] int64, the record numbers of steps [S] int64."""
    draws = self._stream.draw(steps)
    ranks, blocks = draws.classes.ravel(), draws.blocks.ravel()
    class_ids = ranks if self._classes is None else self._classes[ranks]
    starts = self._table.starts[class_ids]
    sizes = self._table.starts[class_ids + 1] - starts
    keys = permutation.mix(self._seed, _MEMBERS, class_ids)
    places = distinct_stream.block(blocks, sizes, keys, self._num_samples)
    records = self._table.records[starts[:, None] + places]
    return records.reshape(len(steps), *self.shape)

  def _make_stream(self, weights: Optional[ClassWeights]) -> ClassStream:
    if weights is None:
      return EqualClasses(self.num_classes, self._num_classes_drawn, self._seed)
    sizes = np.diff(self._table.starts)
    if self._classes is not None:
      sizes = sizes[self._classes]
    tickets = weights.num_tickets(sizes, self._num_samples)
    return WeightedClasses(tickets, self._num_classes_drawn, self._seed)


class SequentialSchedule:
  """Given records once, in order; the last batch is filled up with −1."""

  def __init__(self, record_numbers: np.ndarray, *, records_per_batch: int):
    """Takes the records to go through.

    Args:
      record_numbers: [n] int64.
      records_per_batch: B.

    Raises:
      UserError: if B is below 1.
    """
    _check_at_least_one("records_per_batch", records_per_batch)
    self._records = np.asarray(record_numbers, np.int64)
    self._size = records_per_batch

  @property
  def num_batches(self) -> int:
    """Batches until every record has come once."""
    return -(-len(self._records) // self._size)

  @property
  def shape(self) -> tuple[int]:
    """(B,)."""
    return (self._size,)

  def batch(self, step: int) -> np.ndarray:
    """[B] int64, the record numbers of a step; −1 from the last record on."""
    return self.batches(np.array([step]))[0]

  def batches(self, steps: np.ndarray) -> np.ndarray:
    """[S, B] int64, the record numbers of steps [S] int64."""
    places = steps[:, None] * self._size + np.arange(self._size)
    is_real = places < len(self._records)
    records = self._records[np.where(is_real, places, 0)]
    return np.where(is_real, records, -1)


def _drawable(
  table: members.MemberTable,
  classes: Optional[np.ndarray],
  num_samples: int,
  small_classes: str,
) -> Optional[np.ndarray]:
  """Ids of the classes to draw from; None for all, which takes no memory."""
  if small_classes not in ("repeat", "leave_out"):
    raise UserError(
      f"small_classes={small_classes!r} is not known; choose 'repeat' or 'leave_out'."
    )
  smallest = 1 if small_classes == "repeat" else num_samples
  num_classes = table.num_classes if classes is None else len(classes)
  is_drawn = np.empty(num_classes, bool)
  num_small = 0
  for first in range(0, num_classes, _CLASSES_AT_A_TIME):
    part = slice(first, min(first + _CLASSES_AT_A_TIME, num_classes))
    ids = np.arange(part.start, part.stop) if classes is None else classes[part]
    sizes = table.starts[ids + 1] - table.starts[ids]
    is_drawn[part] = sizes >= smallest
    num_small += int(np.count_nonzero((sizes < num_samples) & (sizes > 0)))
  if num_small:
    logging.info(
      "%d of %d classes have fewer than %d records: %s",
      num_small,
      num_classes,
      num_samples,
      "their records are repeated"
      if small_classes == "repeat"
      else "they are left out",
    )
  if is_drawn.all():
    return None if classes is None else np.asarray(classes, np.int32)
  if classes is None:
    return np.flatnonzero(is_drawn).astype(np.int32)
  return np.asarray(classes, np.int32)[is_drawn]


def _check_at_least_one(name: str, value: int) -> None:
  if value < 1:
    raise UserError(f"{name}={value} is too small; it must be at least 1.")
