"""The positives of each anchor as a list of columns, without a sort of every row.

Shapes: A anchors, T anchors of a tile, C candidates, N entries of the table.
"""

from __future__ import annotations

from typing import NamedTuple

import tensorflow as tf

from trainer.losses.terms import Anchors, Candidates


class PositiveLists(NamedTuple):
  """Where the positives of each anchor stand in a table of columns.

  Attributes:
    table: [N] int32, numbers of candidates; an anchor's positives are a run of it.
    starts: [A] int32, where the run of each anchor begins.
    sizes: [A] int32, how many positives it has.
    skipped: [A] int32, the place in the run that is the anchor itself; -1 for none.
  """

  table: tf.Tensor
  starts: tf.Tensor
  sizes: tf.Tensor
  skipped: tf.Tensor

  def rows(self, numbers: tf.Tensor) -> PositiveLists:
    """Those of the anchors with these numbers, [T]."""
    return PositiveLists(self.table, *(tf.gather(each, numbers) for each in self[1:]))

  def places(self, k: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """The k-th positive of each anchor.

    Args:
      k: [] int32.

    Returns:
      [A, 2] int32, row and column; and [A] bool, false where an anchor has no k-th
      positive and its column means nothing.
    """
    places = self.starts + k
    is_after = tf.logical_and(self.skipped >= 0, places >= self.skipped)
    places = tf.minimum(
      places + tf.cast(is_after, tf.int32), tf.shape(self.table)[0] - 1
    )
    columns = tf.gather(self.table, tf.maximum(places, 0))
    return tf.stack([tf.range(tf.shape(columns)[0]), columns], 1), k < self.sizes


def lists_of_classes(anchors: Anchors, candidates: Candidates) -> PositiveLists:
  """The lists of integer labels, by one sort of [C].

  Candidates are sorted by class, padding last in each: a class is a run of the table.

  Args:
    anchors: A of them.
    candidates: C of them.
  """
  order = _valid_first(candidates.is_valid)
  order = tf.gather(order, tf.argsort(tf.gather(candidates.labels, order), stable=True))
  labels = tf.gather(candidates.labels, order)
  starts = tf.searchsorted(labels, anchors.labels)
  ends = tf.searchsorted(labels, anchors.labels, side="right")
  is_valid = tf.cast(tf.gather(candidates.is_valid, order), tf.int32)
  num_valid = tf.concat([[0], tf.cumsum(is_valid)], 0)
  num_of_class = tf.gather(num_valid, ends) - tf.gather(num_valid, starts)
  is_own_valid = tf.gather(candidates.is_valid, candidates.positions)
  return PositiveLists(
    table=order,
    starts=starts,
    sizes=num_of_class - tf.cast(is_own_valid, tf.int32),
    skipped=tf.gather(_inverse(order), candidates.positions),
  )


def _valid_first(is_valid: tf.Tensor) -> tf.Tensor:
  """[C] int32, the order of candidates in which padding is last, without a sort."""
  ones = tf.cast(is_valid, tf.int32)
  num_before, num_valid = tf.cumsum(ones, exclusive=True), tf.reduce_sum(ones)
  numbers = tf.range(tf.shape(ones)[0])
  return _inverse(tf.where(is_valid, num_before, num_valid + numbers - num_before))


def _inverse(order: tf.Tensor) -> tf.Tensor:
  """[C] int32, at which place of an order [C] each number stands."""
  size = tf.shape(order)
  return tf.scatter_nd(order[:, None], tf.range(size[0]), size)


def lists_of_pairs(is_positive: tf.Tensor) -> PositiveLists:
  """The lists of any relevance, by a sort of each row.

  Args:
    is_positive: [A, C] bool.
  """
  counts = tf.cast(is_positive, tf.int32)
  columns = tf.argsort(counts, direction="DESCENDING", stable=True)
  num_anchors, num_candidates = tf.unstack(tf.shape(is_positive))
  return PositiveLists(
    table=tf.reshape(columns, [-1]),
    starts=num_candidates * tf.range(num_anchors),
    sizes=tf.reduce_sum(counts, 1),
    skipped=tf.fill([num_anchors], -1),
  )
