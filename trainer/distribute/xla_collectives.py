"""Collectives without a strategy: what XLA compiles into a program of N replicas.

The step that is exported to be compiled for a TPU has no `tf.distribute` around it:
its sums are XLA all-reduces, and a gather is a sum of rows put in their places.

Shapes: N rows on each replica, R replicas.
"""

from __future__ import annotations

import itertools

import tensorflow as tf

from trainer.distribute.collectives import Collectives

_GROUP_KEY = 1


class XlaCollectives(Collectives):
  """The collectives of one replica of a program compiled by XLA for R of them.

  To be made inside of the function with `jit_compile=True`, once a trace, because its
  sums are numbered.

  Args:
    num_replicas: R.
  """

  def __init__(self, num_replicas: int):
    self._num_replicas = num_replicas
    self._instance_keys = itertools.count(1)

  @property
  def num_replicas(self):
    """R."""
    return self._num_replicas

  @property
  def replica_id(self):
    """This replica's number, [] int32, known when the program runs."""
    if self._num_replicas == 1:
      return 0  # Run on a CPU, the operation would ask for a number nobody gave.
    from tensorflow.compiler.tf2xla.python import xla  # Loads what few runs need.

    return tf.cast(xla.replica_id(), tf.int32)

  def sum(self, values):
    """Sums over replicas, a collective each tensor."""
    return tf.nest.map_structure(self._sum, values)

  def gather(self, rows):
    """Stacks the rows of all replicas: sums them, each in its place among zeros.

    A NaN in one row is one in that row of the result, as the others add 0 to it.
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
      return value  # XLA for the CPU runs no collectives, and none are needed.
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
