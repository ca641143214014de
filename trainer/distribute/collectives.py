"""Collectives between replicas: for one replica, of a strategy, or compiled by XLA.

The step uses only this interface, so that the same function trains under every strategy
and can be exported without one. A step that is exported for a TPU has no
`tf.distribute` around it. Its sums are XLA all-reduces, and a gather is a sum of rows
at their positions.

Shapes: N rows on each replica, R replicas.
"""

from __future__ import annotations

import abc
import contextlib
import itertools
from collections.abc import Iterator
from typing import Any, Optional, Union

import tensorflow as tf

from trainer.runtime import tensorflow_private

_GROUP_KEY = 1


class Collectives(abc.ABC):
  """Sums and gathers over all replicas, both differentiable."""

  @property
  @abc.abstractmethod
  def num_replicas(self) -> int:
    """Number of replicas, R."""

  @property
  @abc.abstractmethod
  def replica_id(self) -> Union[int, tf.Tensor]:
    """This replica's number, [] int32 in 0…R−1."""

  @abc.abstractmethod
  def sum(self, values: Any) -> Any:
    """Sums each tensor of a structure over the replicas.

    Args:
      values: structure of float tensors, of equal shapes on all replicas.

    Returns:
      The same structure, equal on all replicas. The gradient is the sum of the
      replicas' gradients.
    """

  @abc.abstractmethod
  def gather(self, rows: tf.Tensor) -> tf.Tensor:
    """Stacks the rows of all replicas, in the order of their numbers.

    Args:
      rows: [N, ...] float32, int32 or bool, of a static shape that is equal on all
        replicas.

    Returns:
      [R·N, ...], equal on all replicas. The gradient to a replica's rows is the sum
      of all replicas' gradients to them.
    """


class OneReplica(Collectives):
  """The collectives of a single replica: no communication."""

  num_replicas = 1
  replica_id = 0

  def sum(self, values):
    """Returns the values unchanged."""
    return values

  def gather(self, rows):
    """Returns the rows unchanged."""
    return rows


class StrategyCollectives(Collectives):
  """The collectives of the `tf.distribute` replica context that creates it."""

  def __init__(self):
    self._context = tf.distribute.get_replica_context()
    self._order: Optional[tf.Tensor] = None

  @property
  def num_replicas(self):
    """Number of replicas, R."""
    return self._context.num_replicas_in_sync

  @property
  def replica_id(self):
    """This replica's number in the global batch, [] int32."""
    return self._context.replica_id_in_sync_group

  def sum(self, values):
    """Sums over replicas; all tensors in one collective if that is faster."""
    return self._context.all_reduce(tf.distribute.ReduceOp.SUM, values)

  def gather(self, rows):
    """Stacks the rows of all replicas."""
    if rows.dtype == tf.bool:  # CPU collectives do not support bool.
      return tf.cast(self._stack(tf.cast(rows, tf.int32)), tf.bool)
    num_rows = rows.shape[0]

    @tf.custom_gradient
    def stack(rows):
      def gradient(upstream):
        first = self.replica_id * num_rows
        return self.sum(upstream)[first : first + num_rows]

      return self._stack(rows), gradient

    return stack(rows) if rows.dtype.is_floating else self._stack(rows)

  def _stack(self, rows):
    """Gathers without TensorFlow's gradient, which slices in the wrong order."""
    # The copy is on this replica's device, which all_gather needs.
    gathered = self._context.all_gather(tf.identity(rows), axis=0)
    # all_gather drops the static shape, which the losses and XLA need.
    shape = [self.num_replicas, rows.shape[0], *rows.shape[1:]]
    by_rank = tf.reshape(gathered, shape)
    return tf.reshape(self._by_number(by_rank), [shape[0] * shape[1], *shape[2:]])

  def _by_number(self, by_rank):
    """Sorts by number: TensorFlow sorts workers by name, task 10 before task 2."""
    if not isinstance(
      self._context.strategy, tf.distribute.MultiWorkerMirroredStrategy
    ):
      return by_rank
    if self._order is None:
      number = tf.identity(tf.reshape(self.replica_id, [1]))
      self._order = tf.argsort(self._context.all_gather(number, axis=0))
    return tf.gather(by_rank, self._order)


_used: list[Collectives] = []


@contextlib.contextmanager
def using(collectives: Collectives) -> Iterator[None]:
  """Sets the current collectives while a function is traced without a strategy.

  Args:
    collectives: those of the traced replica function.
  """
  _used.append(collectives)
  try:
    yield
  finally:
    _used.pop()


def current_collectives() -> Collectives:
  """Returns the collectives of the replica function that calls this."""
  if _used:
    return _used[-1]
  if tf.distribute.get_replica_context().num_replicas_in_sync == 1:
    return OneReplica()
  return StrategyCollectives()


class XlaCollectives(Collectives):
  """The collectives of one replica of a program compiled by XLA for R replicas.

  Create it inside the function with `jit_compile=True`, once per trace, because its
  sums are numbered.

  Args:
    num_replicas: R.
  """

  def __init__(self, num_replicas: int):
    self._num_replicas = num_replicas
    self._instance_keys = itertools.count(1)

  @property
  def num_replicas(self):
    """Number of replicas, R."""
    return self._num_replicas

  @property
  def replica_id(self):
    """This replica's number, [] int32, known at run time."""
    if self._num_replicas == 1:
      return 0  # On a CPU the operation would need a device number that is not set.
    return tf.cast(tensorflow_private.xla_replica_id(), tf.int32)

  def sum(self, values):
    """Sums over replicas, with one collective per tensor."""
    return tf.nest.map_structure(self._sum, values)

  def gather(self, rows):
    """Stacks the rows of all replicas: sums them, each at its position among zeros.

    A NaN in one row stays in that row of the result, because the others add 0 to it.
    """
    if rows.dtype == tf.bool:
      return tf.cast(self.gather(tf.cast(rows, tf.int32)), tf.bool)
    zeros = tf.zeros([self._num_replicas, *rows.shape], rows.dtype)
    is_mine = tf.equal(tf.range(self._num_replicas), self.replica_id)
    is_mine = tf.reshape(is_mine, [-1, *[1] * rows.shape.rank])
    placed = tf.where(is_mine, rows[None], zeros)
    return self._sum(tf.reshape(placed, [-1, *rows.shape[1:]]))

  def _sum(self, value: tf.Tensor) -> tf.Tensor:
    if not value.dtype.is_floating:
      return self._all_reduce(value)

    @tf.custom_gradient
    def total(value):
      return self._all_reduce(value), self._all_reduce

    return total(value)

  def _all_reduce(self, value: tf.Tensor) -> tf.Tensor:
    if self._num_replicas == 1:
      return value  # XLA for the CPU has no collectives, and none are needed.
    return tf.raw_ops.CollectiveReduceV2(
      input=value,
      group_size=self._num_replicas,
      group_key=_GROUP_KEY,
      instance_key=next(self._instance_keys),
      ordering_token=[],
      merge_op="Add",
      final_op="Id",
      communication_hint="auto",
    )
