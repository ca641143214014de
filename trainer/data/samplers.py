"""Batch samplers: pure functions from a step to record numbers.

Samplers have no state, so resuming is exact and needs no extra work. The global batch
does not depend on the worker that computes it.

Shapes: S steps, P classes and K samples per class in a batch, B records in a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Callable, Optional, Protocol

import gin
import numpy as np
from absl import logging

from trainer.data import index_arrays, permutation
from trainer.data.class_sampling import (
  ClassStream,
  ClassWeights,
  EqualClasses,
  WeightedClasses,
)
from trainer.data.sources.source import NamePattern
from trainer.errors import UserError, check_at_least, check_choice

# Salts of hashes, so that no two uses of one seed collide (1 and 3: the classes).
_MEMBERS = 2
_GROUPS = 4
# Class sizes are processed in chunks of this many, to limit memory.
_CLASSES_AT_A_TIME = 1_000_000


StreamFn = Callable[[ClassStream, int, Optional[np.ndarray]], ClassStream]


class BatchSampler(Protocol):
  """The interface of a sampler for the pipeline."""

  @property
  def shape(self) -> tuple[int, ...]:
    """(P, K) or (B,)."""

  def batch(self, step: int) -> np.ndarray:
    """Returns the record numbers of a step, [P, K] or [B] int64; −1 is padding."""


def draw(sampler: BatchSampler, steps: np.ndarray) -> np.ndarray:
  """Returns the records drawn in steps [S], [S, P, K] or [S, B] int64.

  If a sampler has `batches`, many steps at once cost little more than one.
  """
  batches = getattr(sampler, "batches", None)
  if batches is not None:
    return batches(steps)
  return np.stack([sampler.batch(step) for step in steps.tolist()])


@gin.register
class PKSampler:
  """Sampler of P classes with K samples each, balanced over classes and members.

  Every class is drawn once per epoch of classes, or as often as its weight specifies.
  Within a class no member is repeated before all have been drawn. The P classes of a
  batch are distinct. The K samples of a class are distinct if the class has K records;
  otherwise its records are repeated as evenly as possible.
  """

  def __init__(
    self,
    index: index_arrays.Classes,
    *,
    classes_per_batch: int,
    samples_per_class: int,
    seed: int,
    classes: Optional[np.ndarray] = None,
    small_classes: str = "repeat",
    weights: Optional[ClassWeights] = None,
    stream_fn: Optional[StreamFn] = None,
  ):
    """Determines the classes to draw from.

    Args:
      index: classes and their members, such as a `RecordIndex`.
      classes_per_batch: P.
      samples_per_class: K.
      seed: random seed of the order.
      classes: int32 ids of the classes to draw from; None for all.
      small_classes: "repeat" members of a class with fewer than K, or "leave_out" it.
      weights: how often each class is drawn; None for equal frequencies.
      stream_fn: function of the stream of classes, P and the class ids (None for all)
        that returns the stream to draw from; None for the unchanged stream.

    Raises:
      UserError: if P or K is below 1, or fewer than P classes can be drawn.
    """
    check_at_least("classes_per_batch", classes_per_batch, 1)
    check_at_least("samples_per_class", samples_per_class, 1)
    self._num_samples = samples_per_class
    self._num_classes_drawn = classes_per_batch
    self._seed = seed
    self._table = index_arrays.members_of(index)
    self._classes = _select_classes(
      self._table, classes, samples_per_class, small_classes
    )
    self.num_classes = (
      self._table.num_classes if self._classes is None else len(self._classes)
    )
    if self.num_classes < classes_per_batch:
      raise UserError(
        f"classes_per_batch={classes_per_batch} exceeds the {self.num_classes} "
        f"available classes; choose at most {self.num_classes}."
      )
    self._stream = self._make_stream(weights)
    if stream_fn is not None:
      self._stream = stream_fn(self._stream, classes_per_batch, self._classes)

  @property
  def shape(self) -> tuple[int, int]:
    """Returns (P, K)."""
    return self._num_classes_drawn, self._num_samples

  def batch(self, step: int) -> np.ndarray:
    """Returns the record numbers of a step, [P, K] int64."""
    return self.batches(np.array([step]))[0]

  def batches(self, steps: np.ndarray) -> np.ndarray:
    """Returns the record numbers of steps [S] int64, [S, P, K] int64."""
    draws = self._stream.draw(steps)
    ranks, blocks = draws.classes.ravel(), draws.blocks.ravel()
    class_ids = ranks if self._classes is None else self._classes[ranks]
    starts = self._table.starts[class_ids]
    sizes = self._table.starts[class_ids + 1] - starts
    keys = permutation.mix(self._seed, _MEMBERS, class_ids)
    positions = permutation.distinct_block(blocks, sizes, keys, self._num_samples)
    records = self._table.records[starts[:, None] + positions]
    return records.reshape(len(steps), *self.shape)

  def _make_stream(self, weights: Optional[ClassWeights]) -> ClassStream:
    if weights is None:
      return EqualClasses(self.num_classes, self._num_classes_drawn, self._seed)
    sizes = np.diff(self._table.starts)
    if self._classes is not None:
      sizes = sizes[self._classes]
    draws_per_epoch = weights.draws_per_epoch(sizes, self._num_samples)
    return WeightedClasses(draws_per_epoch, self._num_classes_drawn, self._seed)


class SequentialSampler:
  """Sampler of given records, each once, in order; the last batch is padded with −1."""

  def __init__(self, record_numbers: np.ndarray, *, records_per_batch: int):
    """Sets the records to iterate over.

    Args:
      record_numbers: [n] int64.
      records_per_batch: B.

    Raises:
      UserError: if B is below 1.
    """
    check_at_least("records_per_batch", records_per_batch, 1)
    self._records = np.asarray(record_numbers, np.int64)
    self._size = records_per_batch

  @property
  def num_batches(self) -> int:
    """Number of batches that cover every record once."""
    return -(-len(self._records) // self._size)

  @property
  def shape(self) -> tuple[int]:
    """Returns (B,)."""
    return (self._size,)

  def batch(self, step: int) -> np.ndarray:
    """Returns the record numbers of a step, [B] int64; −1 after the last record."""
    return self.batches(np.array([step]))[0]

  def batches(self, steps: np.ndarray) -> np.ndarray:
    """Returns the record numbers of steps [S] int64, [S, B] int64."""
    positions = steps[:, None] * self._size + np.arange(self._size)
    is_real = positions < len(self._records)
    records = self._records[np.where(is_real, positions, 0)]
    return np.where(is_real, records, -1)


def _select_classes(
  table: index_arrays.MemberTable,
  classes: Optional[np.ndarray],
  num_samples: int,
  small_classes: str,
) -> Optional[np.ndarray]:
  """Returns the ids of the classes to draw from; None for all, to save memory."""
  check_choice("small_classes", small_classes, ("repeat", "leave_out"))
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
      "their records are repeated" if small_classes == "repeat" else "they are skipped",
    )
  if is_drawn.all():
    return None if classes is None else np.asarray(classes, np.int32)
  if classes is None:
    return np.flatnonzero(is_drawn).astype(np.int32)
  return np.asarray(classes, np.int32)[is_drawn]


class NamedClasses(index_arrays.Classes, Protocol):
  """Classes with members and names, such as a `RecordIndex`."""

  @property
  def class_names(self) -> Sequence[str]:
    """Class names by class id."""


SamplerFn = Callable[..., PKSampler]


class _StackedSampler:
  """Sampler that concatenates the rows of several samplers."""

  def __init__(self, parts: Sequence[BatchSampler], num_samples: int):
    self._parts = parts
    self._num_samples = num_samples
    num_records = sum(int(np.prod(part.shape)) for part in parts)
    self.shape = (num_records // num_samples, num_samples)

  def batch(self, step: int) -> np.ndarray:
    """Returns the record numbers of a step, [P, K] int64."""
    return self.batches(np.array([step]))[0]

  def batches(self, steps: np.ndarray) -> np.ndarray:
    """Returns the record numbers of steps [S] int64, [S, P, K] int64."""
    rows = [
      draw(part, steps).reshape(len(steps), -1, self._num_samples)
      for part in self._parts
    ]
    return np.concatenate(rows, axis=1)


@gin.register
class HardClassSampler(_StackedSampler):
  """Sampler with some rows from given classes, and the other rows from the others.

  Args:
    index: classes, members and names.
    sampler_fn: creates the sampler of each part.
    hard_classes: names of the given classes; those not in `classes` are skipped.
    num_hard: number of given classes per batch.
    num_others: number of other classes per batch.
    classes: int32 ids of the classes to draw from; None for all.

  Raises:
    UserError: a name matches no class, or a part has too few classes.
  """

  def __init__(
    self,
    index: NamedClasses,
    *,
    sampler_fn: SamplerFn,
    hard_classes: Sequence[str],
    num_hard: int,
    num_others: int,
    classes: Optional[np.ndarray] = None,
  ):
    ids = np.arange(index.num_classes, dtype=np.int32) if classes is None else classes
    wanted = set(hard_classes)
    names = [index.class_names[class_id] for class_id in ids]
    is_hard = np.array([name in wanted for name in names], bool)
    unknown = wanted.difference(names)
    if unknown:  # The other names are on the other side of a split.
      unknown.difference_update(index.class_names)
    if unknown:
      raise UserError(
        f"HardClassSampler.hard_classes names {', '.join(sorted(unknown))}: not a "
        "class of the data."
      )
    parts = [
      sampler_fn(index, classes=ids[chosen], classes_per_batch=num)
      for chosen, num in ((is_hard, num_hard), (~is_hard, num_others))
    ]
    super().__init__(parts, parts[0].shape[1])


@gin.register
class SingletonSampler(_StackedSampler):
  """Sampler with extra rows of singleton classes (one image), which are negatives only.

  Such a row has K images of K classes, while other rows have K images of one class.

  Args:
    index: classes and members.
    sampler_fn: creates the sampler of the classes with two images or more.
    num_singleton_rows: number of rows per batch with images of singleton classes.
    seed: random seed of their order.
    classes: int32 ids of the classes to draw from; None for all.

  Raises:
    UserError: there are fewer singleton classes than a batch needs.
  """

  def __init__(
    self,
    index: index_arrays.Classes,
    *,
    sampler_fn: SamplerFn,
    num_singleton_rows: int,
    seed: int,
    classes: Optional[np.ndarray] = None,
  ):
    table = index_arrays.members_of(index)
    ids = np.arange(table.num_classes, dtype=np.int32) if classes is None else classes
    sizes = table.starts[ids + 1] - table.starts[ids]
    main = sampler_fn(index, classes=ids[sizes > 1])
    num_samples = main.shape[1]
    num_singletons = int((sizes == 1).sum())
    if num_singletons < num_singleton_rows * num_samples:
      raise UserError(
        f"SingletonSampler.num_singleton_rows={num_singleton_rows} rows of "
        f"{num_samples} need {num_singleton_rows * num_samples} classes of one image, "
        f"and there are {num_singletons}; choose at most "
        f"{num_singletons // num_samples}."
      )
    singletons = PKSampler(
      index,
      classes_per_batch=num_singleton_rows * num_samples,
      samples_per_class=1,
      seed=seed,
      classes=ids[sizes == 1],
    )
    super().__init__([main, singletons], num_samples)


@gin.register
class GroupedSampler:
  """Sampler that draws each batch from one group of classes, such as a category.

  A group is drawn per epoch as often as its classes fill batches. Each time, its own
  sampler continues where it stopped.

  Args:
    index: classes, members and names.
    sampler_fn: creates the sampler of a group.
    group_pattern: regular expression, searched in the class name; its first group is
      the name of the class's group. Default: the part before the first slash.
    seed: random seed of the order of the groups.
    classes: int32 ids of the classes to draw from; None for all.

  Raises:
    UserError: the pattern is invalid, a name has no group, or a group has too few
      classes for a batch.
  """

  def __init__(
    self,
    index: NamedClasses,
    *,
    sampler_fn: SamplerFn,
    group_pattern: str = "^([^/]+)/",
    seed: int,
    classes: Optional[np.ndarray] = None,
  ):
    ids = np.arange(index.num_classes, dtype=np.int32) if classes is None else classes
    pattern = NamePattern(group_pattern, "GroupedSampler.group_pattern")
    groups: dict[str, list[int]] = {}
    for class_id in ids.tolist():
      name = index.class_names[class_id]
      group = pattern.part_of(name)
      if group is None:
        raise UserError(
          f"The class {name!r} has no group by "
          f"GroupedSampler.group_pattern={group_pattern!r}."
        )
      groups.setdefault(group, []).append(class_id)
    self._samplers = [
      _build_sampler(index, sampler_fn, name, groups[name]) for name in sorted(groups)
    ]
    self.shape = self._samplers[0].shape
    sizes = [len(groups[name]) for name in sorted(groups)]
    self._ends = np.cumsum([-(-size // self.shape[0]) for size in sizes])
    self._key = permutation.mix(seed, _GROUPS)

  def batch(self, step: int) -> np.ndarray:
    """Returns the record numbers of a step, [P, K] int64."""
    return self.batches(np.array([step]))[0]

  def batches(self, steps: np.ndarray) -> np.ndarray:
    """Returns the record numbers of steps [S] int64, [S, P, K] int64."""
    total = int(self._ends[-1])
    keys = np.broadcast_to(self._key, steps.shape)
    sizes = np.full(steps.shape, total)
    draws = permutation.distinct_block(steps, sizes, keys, 1)[:, 0]
    groups = np.searchsorted(self._ends, draws, side="right")
    starts = np.where(groups > 0, self._ends[groups - 1], 0)
    own_steps = steps // total * (self._ends[groups] - starts) + draws - starts
    records = np.empty((len(steps), *self.shape), np.int64)
    for group in np.unique(groups).tolist():
      rows = np.flatnonzero(groups == group)
      records[rows] = draw(self._samplers[group], own_steps[rows])
    return records


def _build_sampler(
  index: NamedClasses, sampler_fn: SamplerFn, name: str, class_ids: Sequence[int]
) -> PKSampler:
  try:
    return sampler_fn(index, classes=np.array(class_ids, np.int32))
  except UserError as error:
    raise UserError(f"Group {name!r}: {error}") from error
