"""Class centres: one trained vector or several for each class, sharded over replicas.

Replica r of R holds the rows of ⌈C/R⌉ classes and their optimizer state; no replica
holds all. Initial values and samples are pure functions of seed, step and class, so
they are the same on any number of replicas.

Shapes: C classes, k centres of a class, D dimensions, R replicas, N examples of the
global batch, S rows read on a replica.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Optional, Protocol, Union

import gin
import numpy as np
import tensorflow as tf

from trainer.distribute.collectives import Collectives, current_collectives
from trainer.distribute.workers import current_workers
from trainer.errors import UserError, check_at_least, check_choice
from trainer.losses.centre_values import draw_classes, initial_centres
from trainer.losses.loss_terms import WeightedMean

# Rows of a tile: with 256 examples its cosines take 2 MB, about the cache of a core.
_ROWS_PER_TILE = 2048
# Rows that are gathered, or copied between host and device, together.
_BLOCK, _NUM_COPIED = 4096, 65_536


def num_tiles(num_rows: int) -> int:
  """Returns the number of tiles, a divisor of a number from `padded`."""
  return -(-num_rows // _ROWS_PER_TILE)


def padded(num_rows: int) -> int:
  """Returns the number of rows, rounded up so that all tiles have equal size."""
  tiles = num_tiles(max(1, num_rows))
  return tiles * -(-max(1, num_rows) // tiles)


class CentreRows(NamedTuple):
  """The centres that a replica compares with the global batch in one step.

  Attributes:
    vectors: [S·k, D] float32, the k centres of a class one after the other.
    indices: [S] int32, row of each in the replica's table; None if all are read.
    is_used: [S] bool; false for padding and repeated rows.
    columns: [N] int32, place of each example's class among the S rows; −1 if another
      replica has it, or for padding.
    centres_per_class: k.
    log_weights: [S] float32, added to the logits of other classes; None for 0.
    own_rows: [N] int32, row of each example's class in the replica's table; the number
      of rows if another replica has it, or for padding.
    never_seen: number of this replica's classes that were in no batch, and of all.
  """

  vectors: tf.Tensor
  indices: Optional[tf.Tensor]
  is_used: tf.Tensor
  columns: tf.Tensor
  centres_per_class: int
  log_weights: Optional[tf.Tensor] = None
  own_rows: Optional[tf.Tensor] = None
  never_seen: Optional[WeightedMean] = None


class RowUpdate(NamedTuple):
  """Indices and own rows of `CentreRows`, and the gradients [S·k, D] to its vectors."""

  indices: Optional[tf.Tensor]
  gradients: tf.Tensor
  own_rows: tf.Tensor


class TrainingClasses(NamedTuple):
  """The classes of the training data, in ascending order of their labels.

  Attributes:
    labels: [C] int32.
    sizes: [C] number of training examples; None if no loss needs it.
    name_hashes: [C] uint64, hashes of their names, by which a checkpoint knows them;
      None for the labels.
  """

  labels: Union[Sequence[int], np.ndarray]
  sizes: Optional[Union[Sequence[int], np.ndarray]] = None
  name_hashes: Optional[np.ndarray] = None


class RowOptimizer(Protocol):
  """An optimizer that updates some rows of a table.

  Attributes:
    num_moments: number of tables of the same size that it needs.
  """

  num_moments: int

  def update(
    self,
    values: tf.Tensor,
    moments: Sequence[tf.Tensor],
    gradients: tf.Tensor,
    step: tf.Tensor,
  ) -> tuple[tf.Tensor, Sequence[tf.Tensor]]:
    """Returns the new values of rows, and their new moments.

    Args:
      values: [n, D] float32.
      moments: each [n, D] float32.
      gradients: [n, D] float32.
      step: [] integer, number of steps done.
    """


@gin.register
class ClassCentres:
  """A table of class centres, of which each replica holds a part.

  Centres start at random with norms of about 1. Only their direction counts; the larger
  the norm, the less a step turns them.

  This is not a `tf.Module`, because TensorFlow would save its variables as if they were
  equal on all replicas. `trainer.training.checkpoint` saves the rows.

  With `sampling_rate` below 1, a step reads the centres of the batch's classes and a
  random sample of the others, and only those rows are updated, decayed and moved by
  momentum. The C classes, from a random one on, are divided into n = ⌈`sampling_rate` ·
  C⌉ intervals of nearly equal length, and one class is drawn from each. A loss's sum
  over the classes other than the example's own is replaced by its part Σ' over the rows
  read. B is the set of the batch's classes, y the own class:

    E[Σ'_{j≠y} e_j] = n/C · Σ_{j∉B} e_j + Σ_{j∈B, j≠y} e_j.

  With `is_corrected`, e_j of a drawn class is multiplied by the length of its interval,
  and the expectation is Σ_{j≠y} e_j, the sum over all classes.

  Source: An et al. 2021, https://arxiv.org/abs/2010.05222 (Partial FC).

  Args:
    optimizer: updates the rows; see `trainer.training.row_optimizers`.
    sampling_rate: fraction of the classes compared in a step, in (0, 1].
    centres_per_class: k >= 1.
    num_classes: C, to be compared with the data; None to use the data's.
    is_corrected: whether drawn classes are weighted, see above. Partial FC does not.
    seed: of initial values and samples.
    initial_centres: where the centres start: "random"; or "means" of the embeddings of
      up to 32 examples of each class, which takes the time to embed them.
    new_classes: where the centres of classes start that a resumed training adds:
      "means" or "random".

  Raises:
    UserError: an argument is out of its range.
  """

  def __init__(
    self,
    *,
    optimizer: RowOptimizer,
    sampling_rate: float = 1.0,
    centres_per_class: int = 1,
    num_classes: Optional[int] = None,
    is_corrected: bool = False,
    seed: int = 0,
    initial_centres: str = "random",
    new_classes: str = "means",
  ):
    for name, start in (
      ("initial_centres", initial_centres),
      ("new_classes", new_classes),
    ):
      check_choice(f"ClassCentres.{name}", start, ("means", "random"))
    if not 0 < sampling_rate <= 1:
      raise UserError(
        f"ClassCentres.sampling_rate={sampling_rate} must be in (0, 1]; 1 compares "
        "with all classes."
      )
    check_at_least("ClassCentres.centres_per_class", centres_per_class, 1)
    self.centres_per_class = centres_per_class
    self.initial_centres = initial_centres
    self.new_classes = new_classes
    self._optimizer = optimizer
    self._sampling_rate = sampling_rate
    self.given_num_classes = num_classes
    self._is_corrected = is_corrected
    self._seed = seed
    self._tables: list[tf.Variable] = []

  def create_variables(
    self,
    embedding_size: int,
    classes: TrainingClasses,
    *,
    num_replicas: Optional[int] = None,
    number: int = 0,
  ) -> None:
    """Creates the rows of each replica.

    Args:
      embedding_size: D.
      classes: C of them.
      num_replicas: R; None for the replicas of the strategy.
      number: of this table among those of the loss, so that they differ.

    Raises:
      UserError: the number of classes is not the configured one, or below 2.
    """
    labels, self._class_sizes, name_hashes = classes
    num_classes = len(labels)
    if self.given_num_classes not in (None, num_classes):
      raise UserError(
        f"ClassCentres.num_classes={self.given_num_classes}, and the training data "
        f"has {num_classes} classes; set {num_classes}, or leave it out."
      )
    if num_classes < 2:
      raise UserError(
        f"ClassCentres needs at least 2 classes, and the training data has "
        f"{num_classes}."
      )
    self._table_seed = self._seed + number
    # Made here, so that functions share them.
    self._all_labels = tf.constant(labels, tf.int32)
    if self._class_sizes is not None:
      self._class_sizes = tf.constant(self._class_sizes, tf.float32)
    self.labels = np.asarray(labels, np.int32)
    self.num_classes = num_classes
    self.name_hashes = np.asarray(
      self.labels if name_hashes is None else name_hashes, np.uint64
    )
    num_replicas = num_replicas or tf.distribute.get_strategy().num_replicas_in_sync
    self.classes_per_replica = -(-num_classes // num_replicas)
    self._num_rows = padded(self.classes_per_replica)
    # Unused places of a sample refer to one more row.
    size = self._num_rows + (0 if self._reads_all else 1)
    width = self.centres_per_class * embedding_size
    self._tables = [
      _of_each_replica(tf.zeros([size, width]))
      for _ in range(1 + self._optimizer.num_moments)
    ]
    # Examples without a row here refer to one more.
    self._is_seen = _of_each_replica(tf.zeros([self._num_rows + 1], tf.bool))
    self._embedding_size = embedding_size
    self.assign_rows(self.initial_rows)

  def check_batch(self, num_batch_classes: int, num_classes: int) -> None:
    """Checks that a sample is no smaller than the classes of a batch.

    Args:
      num_batch_classes: P, classes of the global batch.
      num_classes: C, classes of the training data.

    Raises:
      UserError: the sample is smaller.
    """
    num_sampled = math.ceil(self._sampling_rate * num_classes)
    if num_sampled < num_batch_classes:
      enough = math.ceil(1000 * num_batch_classes / num_classes) / 1000
      raise UserError(
        f"ClassCentres.sampling_rate={self._sampling_rate} of {num_classes} classes is "
        f"{num_sampled}, fewer than the {num_batch_classes} classes of a batch; set at "
        f"least {min(1.0, enough):g}."
      )

  @property
  def _reads_all(self) -> bool:
    return self._sampling_rate == 1

  def sizes_of(self, labels: tf.Tensor) -> tf.Tensor:
    """Returns the number of training examples of each label's class; 1 for padding.

    Args:
      labels: [N] int32; negative for padding.

    Returns:
      [N] float32.

    Raises:
      UserError: `create_variables` received no sizes.
    """
    if self._class_sizes is None:
      raise UserError(
        "ClassCentres has no numbers of examples of the classes, which a margin by "
        "class size needs; set TrainingClasses.sizes."
      )
    numbers = self._numbers_of(labels)
    sizes = tf.gather(self._class_sizes, tf.maximum(numbers, 0))
    return tf.where(numbers >= 0, sizes, 1.0)

  def read(
    self, labels: tf.Tensor, step: tf.Tensor, collectives: Collectives
  ) -> CentreRows:
    """Reads this replica's centres for a step.

    Args:
      labels: [N] int32, of the global batch; negative for padding.
      step: [] integer, number of steps done.
      collectives: give this replica's number.
    """
    first = collectives.replica_id * self.classes_per_replica
    numbers = self._numbers_of(labels)
    table = _of_this_replica(self._tables[0])
    log_weights = None
    own_rows = numbers - first
    is_mine = (numbers >= 0) & (own_rows >= 0) & (own_rows < self.classes_per_replica)
    if self._reads_all:
      places = tf.range(self._num_rows)
      is_used = (places < self.classes_per_replica) & (
        first + places < self.num_classes
      )
      vectors, indices = tf.convert_to_tensor(table), None
      columns = tf.where(is_mine, own_rows, -1)
    else:
      indices, is_used, columns, log_weights = self._sample(numbers, first, step)
      vectors = table.sparse_read(indices)
    return CentreRows(
      tf.reshape(vectors, [-1, self._embedding_size]),
      indices,
      is_used,
      columns,
      self.centres_per_class,
      log_weights,
      tf.where(is_mine, own_rows, self._num_rows),
      self._never_seen(first),
    )

  def _never_seen(self, first: tf.Tensor) -> WeightedMean:
    count = tf.clip_by_value(self.num_classes - first, 0, self.classes_per_replica)
    is_seen = tf.convert_to_tensor(_of_this_replica(self._is_seen))[:-1]
    count = tf.cast(count, tf.float32)
    return WeightedMean(count - tf.reduce_sum(tf.cast(is_seen, tf.float32)), count)

  def update(
    self, rows: RowUpdate, step: tf.Tensor, is_applied: Optional[tf.Tensor] = None
  ) -> None:
    """Updates this replica's rows.

    Args:
      rows: which, and their gradients.
      step: [] integer, number of steps done before.
      is_applied: [] bool, false to leave rows and moments as they are; None for true.
    """
    indices, gradients, own_rows = rows
    seen = tf.ones_like(own_rows, tf.bool)
    if is_applied is not None:
      seen &= is_applied
    is_seen = _of_this_replica(self._is_seen)
    seen |= is_seen.sparse_read(own_rows)
    is_seen.scatter_update(tf.IndexedSlices(seen, own_rows))
    tables = [_of_this_replica(each) for each in self._tables]
    if indices is None:
      before = [tf.convert_to_tensor(each) for each in tables]
    else:
      before = [each.sparse_read(indices) for each in tables]
    values, *moments = before
    gradients = tf.reshape(gradients, values.shape)
    values, changed = self._optimizer.update(values, moments, gradients, step)
    for table, old, new in zip(tables, before, [values, *changed]):
      if is_applied is not None:
        new = tf.where(is_applied, new, old)
      if indices is None:
        table.assign(new)
      else:
        table.scatter_update(tf.IndexedSlices(new, indices))

  def _numbers_of(self, labels: tf.Tensor) -> tf.Tensor:
    """Returns the place of each label among the classes; −1 for padding, [N] int32."""
    numbers = labels
    if self.labels[-1] != self.num_classes - 1:
      numbers = tf.searchsorted(self._all_labels, labels)
    return tf.where(labels >= 0, numbers, -1)

  def _sample(
    self, numbers: tf.Tensor, first: tf.Tensor, step: tf.Tensor
  ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, Optional[tf.Tensor]]:
    """Draws one class of each interval, and adds the classes of the batch."""
    drawn, lengths = draw_classes(
      first,
      self.classes_per_replica,
      math.ceil(self._sampling_rate * self.num_classes),
      self.num_classes,
      tf.stack([self._table_seed, tf.cast(step, tf.int32)]),
    )
    of_batch = tf.sort(numbers)
    is_new = tf.concat([[True], of_batch[1:] != of_batch[:-1]], 0)
    places = tf.searchsorted(of_batch, drawn)
    last = of_batch.shape[0] - 1
    is_in_batch = tf.equal(tf.gather(of_batch, tf.minimum(places, last)), drawn)
    classes = tf.concat([drawn, of_batch], 0)
    is_used = tf.concat([~is_in_batch, is_new], 0)
    is_used &= (classes >= first) & (classes < first + self.classes_per_replica)
    missing = padded(classes.shape[0]) - classes.shape[0]
    is_used = tf.pad(is_used, [[0, missing]])
    rows = tf.pad(classes - first, [[0, missing]])
    indices = tf.where(is_used, rows, self._num_rows)
    columns = drawn.shape[0] + tf.searchsorted(of_batch, numbers)
    columns = tf.where(tf.gather(is_used, columns), columns, -1)
    log_weights = None
    if self._is_corrected:
      num_others = indices.shape[0] - drawn.shape[0]
      log_weights = tf.pad(tf.math.log(lengths), [[0, num_others]])
    return indices, is_used, columns, log_weights

  @property
  def ranges(self) -> list[tuple[int, int]]:
    """First and last class, exclusive, of each replica that has any."""
    size = self.classes_per_replica
    return [
      (first, min(first + size, self.num_classes))
      for first in range(0, self.num_classes, size)
    ]

  @property
  def num_bytes(self) -> int:
    """Size of all rows and their moments on all replicas."""
    width = self.centres_per_class * self._embedding_size
    return 4 * self.num_classes * width * len(self._tables)

  def local_rows(self) -> list[tuple[int, np.ndarray]]:
    """Copies the rows of this worker's replicas.

    Returns:
      For each replica that has classes, the first class, and [n, 1 + m, k·D] float32,
      centres and m moments.
    """
    return [
      (first, _copied(tables, last - first))
      for first, last, tables in self._local_tables()
    ]

  def local_seen(self) -> list[tuple[int, np.ndarray]]:
    """Copies whether classes were in a batch: like `local_rows`, but [n] bool."""
    return [
      (first, is_seen.numpy()[: last - first])
      for first, last, is_seen in self._of_local_replicas(self._is_seen)
    ]

  def assign_seen(self, read_fn: Callable[[int, int], np.ndarray]) -> None:
    """Sets whether classes were in a batch: like `assign_rows`, but [n] bool."""
    for first, last, is_seen in self._of_local_replicas(self._is_seen):
      values = np.zeros(is_seen.shape, bool)
      values[: last - first] = read_fn(first, last)
      is_seen.assign(values)

  def assign_rows(self, read_fn: Callable[[int, int], np.ndarray]) -> None:
    """Sets the rows of this worker's replicas.

    Args:
      read_fn: returns [n, 1 + m, k·D] float32 for the first and last class, exclusive;
        it is called for parts of the classes.

    Raises:
      UserError: the rows have another size, or another number of moments.
    """
    for first, last, tables in self._local_tables():
      for begin in range(first, last, _NUM_COPIED):
        end = min(begin + _NUM_COPIED, last)
        rows = read_fn(begin, end)
        self.check_row_shape(rows.shape[1:])
        places = tf.range(begin - first, end - first)
        for number, table in enumerate(tables):
          table.scatter_update(tf.IndexedSlices(rows[:, number], places))

  def assign_centres(self, labels: np.ndarray, centres: np.ndarray) -> None:
    """Sets centres of some classes; their moments stay.

    Several centres of a class start near the given one, a tenth of their current values
    away, so that they can become different.

    Args:
      labels: [n] int32, of classes, ascending.
      centres: [n, D].

    Raises:
      ValueError: there are not as many centres as labels.
    """
    if len(centres) != len(labels):
      raise ValueError(f"there are {len(labels)} labels and {len(centres)} centres")
    k = self.centres_per_class
    numbers = np.searchsorted(self.labels, labels)
    for first, last, (table, *_) in self._local_tables():
      begin, end = np.searchsorted(numbers, [first, last])
      rows = tf.constant(numbers[begin:end] - first, tf.int32)
      values = tf.tile(tf.constant(centres[begin:end], tf.float32), [1, k])
      if k > 1:
        values += 0.1 * table.sparse_read(rows)
      table.scatter_update(tf.IndexedSlices(values, rows))

  def gather_centres(self) -> np.ndarray:
    """Returns the centres of all classes, [C, k, D] float32, on every worker."""
    strategy = tf.distribute.get_strategy()

    def on_replica(first: tf.Tensor) -> tf.Tensor:
      rows = tf.minimum(first + tf.range(_BLOCK), self.classes_per_replica - 1)
      table = _of_this_replica(self._tables[0])
      return current_collectives().gather(table.sparse_read(rows)[None])

    gather = tf.function(lambda first: strategy.run(on_replica, (first,)))
    parts = []
    for first in range(0, self.classes_per_replica, _BLOCK):
      block = strategy.experimental_local_results(gather(tf.constant(first)))[0]
      parts.append(block.numpy()[:, : self.classes_per_replica - first])
    centres = np.concatenate(parts, 1)  # [R, ⌈C/R⌉, k·D]
    shape = (-1, self.centres_per_class, self._embedding_size)
    return centres.reshape(shape)[: self.num_classes]

  def check_row_shape(self, shape: Sequence[int]) -> None:
    """Checks that saved rows are those of such a table.

    Args:
      shape: (1 + m, k·D), of one saved row.

    Raises:
      UserError: they have another size, or another number of moments.
    """
    expected = (len(self._tables), self.centres_per_class * self._embedding_size)
    if tuple(shape) != expected:
      raise UserError(
        f"the saved class centres have {shape[0] - 1} moments and {shape[1]} numbers "
        f"each, and this configuration has {expected[0] - 1} and {expected[1]}; take "
        "another --model_dir."
      )

  def _local_tables(self) -> Iterator[tuple[int, int, list[tf.Variable]]]:
    """Yields first and last class and the variables of this worker's replicas."""
    of_replicas = map(self._of_local_replicas, self._tables)
    for of_replica in zip(*of_replicas):
      first, last, _ = of_replica[0]
      yield first, last, [table for _, _, table in of_replica]

  def _of_local_replicas(
    self, variable: tf.Variable
  ) -> Iterator[tuple[int, int, tf.Variable]]:
    """Yields first and last class and the variable of this worker's replicas."""
    values = getattr(variable, "values", (variable,))
    first_replica = current_workers().index * len(values)
    for number, value in enumerate(values, first_replica):
      first = number * self.classes_per_replica
      last = min(first + self.classes_per_replica, self.num_classes)
      if first < last:
        yield first, last, value

  def initial_rows(self, first: int, last: int) -> np.ndarray:
    """Returns rows of classes before the first step, [n, 1 + m, k·D] float32.

    Args:
      first: first class.
      last: last class, exclusive.
    """
    values = initial_centres(
      first, last, self.centres_per_class, self._embedding_size, self._table_seed
    )
    moments = [np.zeros_like(values)] * self._optimizer.num_moments
    return np.stack([values, *moments], 1)


def _copied(tables: Sequence[tf.Variable], num_rows: int) -> np.ndarray:
  """Copies rows of all tables to the host without a second copy, [n, 1 + m, k·D]."""
  rows = np.empty([num_rows, len(tables), tables[0].shape[1]], np.float32)
  for begin in range(0, num_rows, _NUM_COPIED):
    places = tf.range(begin, min(begin + _NUM_COPIED, num_rows))
    for number, table in enumerate(tables):
      rows[begin : begin + _NUM_COPIED, number] = table.sparse_read(places)
  return rows


def _of_each_replica(initial_value: tf.Tensor) -> tf.Variable:
  """Creates a variable of which each replica has its own value."""
  return tf.Variable(
    initial_value,
    trainable=False,
    synchronization=tf.VariableSynchronization.ON_READ,
    aggregation=tf.VariableAggregation.NONE,
  )


def _of_this_replica(variable: tf.Variable) -> tf.Variable:
  """Returns the variable of the replica that calls this; of the first outside one."""
  values = getattr(variable, "values", None)
  if values is None:
    return variable
  context = tf.distribute.get_replica_context()
  if context is None:
    return values[0]
  replica = tf.get_static_value(context.replica_id_in_sync_group)
  return values[int(replica) % len(values)]
