"""The sum over all triplets of each anchor, by sorting: for classes of hundreds.

Shapes: T anchors, C candidates.

With an anchor's negatives sorted, the place of a threshold d_ap + margin among them
says how many are below it, and a running sum says what they add up to; with its
thresholds sorted, the place of a negative says how many are above it. So a row takes
O(C log C), however large the classes, where `all_triplets` takes O(C) for a positive.
"""

from __future__ import annotations

import tensorflow as tf

from trainer.losses.relevance import Relevance

_INFINITY = float("inf")


def sums_and_slope(
  distances: tf.Tensor, pairs: Relevance, margin: float
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
  """Σ_pn max(d_ap − d_an + margin, 0) of each anchor, and its gradient.

  Args:
    distances: [T, C] float32.
    pairs: which distances are to positives and which to negatives.
    margin: in the distances' units.

  Returns:
    [T] float32 sums, [T] float32 counts of the terms above 0, and the sums' gradient to
    distances, [T, C].
  """
  thresholds = tf.where(pairs.is_positive, distances + margin, -_INFINITY)
  negatives = tf.sort(tf.where(pairs.is_negative, distances, _INFINITY), 1)
  num_below = tf.searchsorted(negatives, thresholds)
  num_above = tf.shape(distances)[1] - tf.searchsorted(
    tf.sort(thresholds, 1), distances, side="right"
  )
  num_above = tf.where(pairs.is_negative, num_above, 0)
  total = _hinges(thresholds, negatives, num_below)
  slope = tf.cast(num_below - num_above, tf.float32)
  return total, tf.cast(tf.reduce_sum(num_below, 1), tf.float32), slope


def _hinges(
  thresholds: tf.Tensor, negatives: tf.Tensor, num_below: tf.Tensor
) -> tf.Tensor:
  """Σ_p (t · n − the sum of the n smallest negatives), [T], n of them below t.

  In float64, because a hinge is a small difference of large sums.
  """
  finite = tf.where(negatives < _INFINITY, negatives, 0.0)
  running = tf.cumsum(tf.cast(finite, tf.float64), 1)
  running = tf.pad(running, [[0, 0], [1, 0]])
  below = tf.gather(running, num_below, batch_dims=1)
  at = tf.cast(tf.where(num_below > 0, thresholds, 0.0), tf.float64)
  hinges = at * tf.cast(num_below, tf.float64) - below
  return tf.cast(tf.reduce_sum(hinges, 1), tf.float32)
