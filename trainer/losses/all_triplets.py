"""The sum over all triplets of each anchor, without a cube of triplets.

Shapes: T anchors, C candidates.

For each positive of an anchor, t = d_ap + margin is a threshold: the negatives below it
are those it forms a triplet with. Their number is the gradient to d_ap; the number of
thresholds above a negative is, negated, the gradient to d_an. So a positive costs a few
[T, C] passes, and the k-th positive of all anchors is dealt with at once.
"""

from __future__ import annotations

from collections.abc import Callable

import tensorflow as tf

from trainer.losses import sorted_triplets
from trainer.losses.relevance import Relevance

# Positives of an anchor that share the passes over its negatives: with 64 samples a
# class, four at once take a quarter less time than one by one, and eight no less.
_POSITIVES_AT_ONCE = 4


def all_triplets(
  distances: tf.Tensor, pairs: Relevance, margin: float
) -> tuple[tf.Tensor, tf.Tensor]:
  """Σ_pn max(d_ap − d_an + margin, 0) of each anchor, and how many are above 0.

  Args:
    distances: [T, C] float32.
    pairs: which distances are to positives and which to negatives; with lists of the
      positives to go through them, without to sort.
    margin: in the distances' units.

  Returns:
    [T] float32 sums, differentiable, and [T] float32 counts.
  """

  @tf.custom_gradient
  def sums(distances: tf.Tensor) -> tuple[tuple[tf.Tensor, tf.Tensor], Callable]:
    by = sorted_triplets.sums_and_slope if pairs.lists is None else _sums_and_slope
    total, num_active, slope = by(distances, pairs, margin)

    def gradient(upstream: tf.Tensor, _: tf.Tensor) -> tf.Tensor:
      return upstream[:, None] * slope

    return (total, num_active), gradient

  return sums(distances)


def _sums_and_slope(
  distances: tf.Tensor, pairs: Relevance, margin: float
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
  """The sums and counts, both [T], and the sums' gradient to distances, [T, C]."""
  lists = pairs.lists
  assert lists is not None
  negatives = tf.where(pairs.is_negative, distances, float("inf"))

  def body(k, total, num_active, slope):  # type: ignore[no-untyped-def]
    found = [lists.places(k + number) for number in range(_POSITIVES_AT_ONCE)]
    thresholds = [
      tf.where(is_positive, tf.gather_nd(distances, places) + margin, -float("inf"))
      for places, is_positive in found
    ]
    is_active = [tf.cast(t[:, None] > negatives, tf.float32) for t in thresholds]
    counts = [tf.reduce_sum(each, 1) for each in is_active]
    hinges = tf.add_n([tf.nn.relu(t[:, None] - negatives) for t in thresholds])
    positives = tf.concat([places for places, _ in found], 0)
    slope = tf.tensor_scatter_nd_add(
      slope - tf.add_n(is_active), positives, tf.concat(counts, 0)
    )
    return (
      k + _POSITIVES_AT_ONCE,
      total + tf.reduce_sum(hinges, 1),
      num_active + tf.add_n(counts),
      slope,
    )

  zeros = tf.zeros_like(distances[:, 0])
  _, total, num_active, slope = tf.while_loop(
    lambda k, *_: k < tf.reduce_max(lists.sizes),
    body,
    (tf.constant(0), zeros, zeros, tf.zeros_like(distances)),
  )
  return total, num_active, slope
