"""The input pipeline: draws, reads and decodes batches, and splits them over replicas.

The pipeline has no state: batch n consists of the records that the sampler draws in
step n.

Shapes: G examples of the global batch, L of this worker, B of a replica, S steps.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator
from typing import NamedTuple, Optional

import numpy as np
import tensorflow as tf

from trainer.data.augment import Augmentation, RowRandom
from trainer.data.images import Decoder
from trainer.data.records import RecordIndex, Replacements, record_error
from trainer.data.samplers import BatchSampler, draw
from trainer.errors import UserError

# Worker batches that are prefetched while the devices compute.
_NUM_PREFETCHED = 2
# Steps drawn by one call: for small batches the cost of a call is large in proportion.
_MAX_STEPS_DRAWN, _MAX_RECORDS_DRAWN = 64, 16_384
# Concurrent Python calls that read; more would delay each other more than files do.
_NUM_READING = 2
# Upper bound on the steps that tf.data processes ahead of the consumer.
_NUM_READ_AHEAD = 2 * _MAX_STEPS_DRAWN
# AutoGraph conversion takes a second at the start; code without conditions needs none.
_no_autograph = tf.autograph.experimental.do_not_convert
PADDING_LABEL = -1
PADDING_RECORD = -1


class Batch(NamedTuple):
  """The examples of one replica.

  Attributes:
    inputs: [B, ...] float32.
    labels: [B] int32, class ids; −1 for a padding row.
    weights: [B] float32, 1; 0 for a padding row.
    record_numbers: [B] int32, numbers of the records that were read; they differ from
      the drawn ones if a bad record was replaced; −1 for a padding row.
  """

  inputs: tf.Tensor
  labels: tf.Tensor
  weights: tf.Tensor
  record_numbers: tf.Tensor


@dataclasses.dataclass(frozen=True)
class Shard:
  """The part of every global batch that one worker reads.

  Attributes:
    first_replica: index of its first replica.
    num_local_replicas: number of its replicas.
    num_replicas: number of replicas on all workers.
  """

  first_replica: int
  num_local_replicas: int
  num_replicas: int


class Batches:
  """The batches of a sampler.

  Args:
    index: returns the records by number.
    sampler: returns the record numbers of each step.
    decoder: converts records to inputs.
    augmentation: random changes of the inputs; None for no change.
    replacements: replaces bad records; None to refuse them.
  """

  def __init__(
    self,
    index: RecordIndex,
    sampler: BatchSampler,
    decoder: Decoder,
    *,
    augmentation: Optional[Augmentation] = None,
    replacements: Optional[Replacements] = None,
  ):
    self._index = index
    self._sampler = sampler
    self._decoder = decoder
    self._augmentation = augmentation
    self._replacements = replacements
    self._failure: Optional[UserError] = None

  def dataset(
    self, shard: Shard, *, first_step: int = 0, num_steps: Optional[int] = None
  ) -> tf.data.Dataset:
    """Returns replica batches: for each step in order, one per local replica in order.

    Replica r of R gets rows [r·G/R, (r+1)·G/R) of the global batch. With P classes of K
    samples these are whole classes.

    Args:
      shard: the replicas of this worker.
      first_step: first step.
      num_steps: number of steps; None for an endless data set.

    Returns:
      Dataset of `Batch`, all shapes static.
    """
    options = tf.data.Options()
    no_sharding = tf.data.experimental.AutoShardPolicy.OFF  # Sharded by `Shard`.
    options.experimental_distribute.auto_shard_policy = no_sharding
    worker_batches = (
      self._record_numbers(shard, first_step, num_steps)
      .map(_no_autograph(self._read), _NUM_READING)
      .map(
        _no_autograph(lambda step, *read: self._decode(step, shard, *read)),
        tf.data.AUTOTUNE,
      )
    )
    return (
      _per_replica(worker_batches, shard.num_local_replicas)
      .prefetch(_NUM_PREFETCHED * shard.num_local_replicas)
      .with_options(options)
    )

  @contextlib.contextmanager
  def reporting_bad_records(self, first_step: int, last_step: int) -> Iterator[None]:
    """Names the bad record if reading or decoding fails inside the block.

    Errors that no record can cause, such as a lost worker, are not changed.

    Args:
      first_step: first step that runs inside.
      last_step: last step that runs inside; steps read ahead are searched too.

    Raises:
      UserError: names file and record.
    """
    try:
      yield
    except (tf.errors.InvalidArgumentError, tf.errors.DataLossError):
      if self._failure is not None:
        raise self._failure from None
      if self._replacements is None:  # Otherwise bad records are tolerated.
        self._raise_first_bad(range(first_step, last_step + _NUM_READ_AHEAD))
      raise

  def _raise_first_bad(self, steps: Iterable[int]) -> None:
    for step in steps:
      for number in np.ravel(self._sampler.batch(step)):
        if number >= 0:
          reason = record_error(self._index, self._decoder, int(number))
          if reason is not None:
            raise UserError(reason) from None

  def _record_numbers(
    self, shard: Shard, first_step: int, num_steps: Optional[int]
  ) -> tf.data.Dataset:
    """Returns a dataset of step, record numbers [L] int64 and is_real [L] bool."""
    num_rows = int(np.prod(self._sampler.shape))
    steps_per_draw = min(_MAX_STEPS_DRAWN, max(1, _MAX_RECORDS_DRAWN // num_rows))
    local = _local_rows(shard, num_rows)

    def draw_local(steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
      return _fill_padding(draw(self._sampler, steps).reshape(len(steps), -1), local)

    def draw_steps(steps: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
      drawn = tf.numpy_function(draw_local, [steps], (tf.int64, tf.bool))
      shape = [None, local.stop - local.start]
      numbers, is_real = (tf.ensure_shape(each, shape) for each in drawn)
      return steps, numbers, is_real

    end = np.iinfo(np.int64).max if num_steps is None else first_step + num_steps
    steps = tf.data.Dataset.range(first_step, end).batch(steps_per_draw)
    return steps.map(_no_autograph(draw_steps), 1).prefetch(1).unbatch()

  def _read(
    self, step: tf.Tensor, numbers: tf.Tensor, is_real: tf.Tensor
  ) -> list[tf.Tensor]:
    """Returns the step, and examples, labels, weights and record numbers, each [L]."""
    read_tensors = tf.numpy_function(
      self._read_rows, [numbers, is_real], (tf.string, tf.int32, tf.float32, tf.int32)
    )
    return [step, *(tf.ensure_shape(each, numbers.shape) for each in read_tensors)]

  def _read_rows(
    self, numbers: np.ndarray, is_real: np.ndarray
  ) -> tuple[np.ndarray, ...]:
    try:
      if self._replacements is not None:
        numbers = self._replacements.replace(numbers)
      records = self._index.read(numbers)
    except UserError as error:
      self._failure = error  # TensorFlow only propagates its text.
      raise
    labels = np.where(is_real, self._index.labels[numbers], PADDING_LABEL)
    return (
      np.array(records, object),
      labels.astype(np.int32),
      is_real.astype(np.float32),
      np.where(is_real, numbers, PADDING_RECORD).astype(np.int32),
    )

  def _decode(
    self, step: tf.Tensor, shard: Shard, records: tf.Tensor, *rows: tf.Tensor
  ) -> Batch:
    """Returns the batch of this worker, [L] rows."""
    inputs = self._decoder(records)
    if self._augmentation is not None:
      num_rows = int(np.prod(self._sampler.shape))
      random = RowRandom(
        self._augmentation.seed,
        step,
        num_rows=num_rows,
        first_row=_local_rows(shard, num_rows).start,
        num_local_rows=records.shape[0],
      )
      inputs = self._augmentation(inputs, random)
    return Batch(inputs, *rows)


def _fill_padding(numbers: np.ndarray, local: slice) -> tuple[np.ndarray, np.ndarray]:
  """Selects local rows, and replaces padding by a record that is read anyway.

  Args:
    numbers: [S, G] int64, record numbers of S steps; −1 for padding.
    local: this worker's rows.

  Returns:
    [S, L] int64, in which padding has the largest number of the worker's own rows, or
    of all rows if it has none; and [S, L] bool, true for rows that are not padding.
  """
  local_numbers = numbers[:, local]
  largest = local_numbers.max(axis=1, keepdims=True)
  filling = np.where(largest >= 0, largest, numbers.max(axis=1, keepdims=True))
  is_real = local_numbers >= 0
  return np.where(is_real, local_numbers, filling), is_real


def _local_rows(shard: Shard, num_rows: int) -> slice:
  """Returns this worker's rows of a global batch."""
  rows_per_replica = num_rows // shard.num_replicas
  first = shard.first_replica * rows_per_replica
  return slice(first, first + shard.num_local_replicas * rows_per_replica)


def _per_replica(
  worker_batches: tf.data.Dataset, num_local_replicas: int
) -> tf.data.Dataset:
  """Splits each worker batch into replica batches, in order."""
  if num_local_replicas == 1:
    return worker_batches

  def cut(batch: Batch) -> Batch:
    rows = batch.labels.shape[0] // num_local_replicas
    shape = [num_local_replicas, rows]
    return Batch(*(tf.reshape(each, shape + each.shape[1:]) for each in batch))

  return worker_batches.map(_no_autograph(cut)).unbatch()
