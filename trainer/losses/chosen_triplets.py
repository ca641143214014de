"""The sum over chosen triplets of each anchor, of one of its positives or of them all.

Shapes: T anchors, C candidates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Optional

import tensorflow as tf

from trainer.losses.penalties import PenaltyFn
from trainer.losses.positive_lists import PositiveLists

# From [T, 1] distances to a positive, the [T, C] weights of the negatives it meets.
ChooseFn = Callable[[tf.Tensor], tf.Tensor]


def triplets_of_one_positive(
  distances: tf.Tensor,
  positives: tf.Tensor,
  choose_fn: ChooseFn,
  penalty_fn: PenaltyFn,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
  """Σ_n w_n penalty(d_ap, d_an) of each anchor, which has one positive p.

  Args:
    distances: [T, C] float32.
    positives: [T, C] float32, above 0 on the positive, and on others as far.
    choose_fn: the weights w_n, without gradient.
    penalty_fn: what a triplet costs.

  Returns:
    As `triplets_of_all_positives`.
  """
  is_positive = positives > 0.0
  has_positive = tf.reduce_any(is_positive, 1, keepdims=True)
  # The gradient of a maximum goes to what is as large in equal parts.
  farthest = tf.reduce_max(
    tf.where(is_positive, distances, -float("inf")), 1, keepdims=True
  )
  positive = tf.where(has_positive, farthest, 0.0)
  weights = tf.cast(has_positive, tf.float32) * choose_fn(tf.stop_gradient(positive))
  cost, _ = penalty_fn(positive, distances)
  return (
    tf.reduce_sum(weights * cost, 1),
    tf.reduce_sum(weights * tf.sign(cost), 1),
    tf.reduce_sum(weights, 1),
  )


def triplets_of_all_positives(
  distances: tf.Tensor,
  lists: Optional[PositiveLists],
  positives: tf.Tensor,
  choose_fn: ChooseFn,
  penalty_fn: PenaltyFn,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
  """Σ_pn w_p w_n penalty(d_ap, d_an) of each anchor.

  Args:
    distances: [T, C] float32.
    lists: the positives of each anchor.
    positives: [T, C] float32 weights w_p, without gradient.
    choose_fn: the weights w_n, without gradient.
    penalty_fn: what a triplet costs.

  Returns:
    [T] float32 sums, differentiable; [T] float32 weights of the triplets that cost
    something, and of all.
  """

  @tf.custom_gradient
  def sums(distances: tf.Tensor) -> tuple[tuple[tf.Tensor, ...], Callable]:
    *values, slope = _sums_and_slope(distances, lists, positives, choose_fn, penalty_fn)

    def gradient(upstream: tf.Tensor, *_: tf.Tensor) -> tf.Tensor:
      return upstream[:, None] * slope

    return tuple(values), gradient

  return sums(distances)


def _sums_and_slope(
  distances: tf.Tensor,
  lists: Optional[PositiveLists],
  positives: tf.Tensor,
  choose_fn: ChooseFn,
  penalty_fn: PenaltyFn,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
  """Three [T] sums, and the gradient of the first to distances, [T, C]."""
  assert lists is not None

  def body(k, total, num_active, num_terms, slope):  # type: ignore[no-untyped-def]
    places, is_positive = lists.places(k)
    positive = tf.gather_nd(distances, places)[:, None]
    weight = tf.where(is_positive, tf.gather_nd(positives, places), 0.0)
    weights = weight[:, None] * choose_fn(positive)
    cost, derivative = penalty_fn(positive, distances)
    pull = weights * derivative
    return (
      k + 1,
      total + tf.reduce_sum(weights * cost, 1),
      num_active + tf.reduce_sum(weights * tf.sign(cost), 1),
      num_terms + tf.reduce_sum(weights, 1),
      tf.tensor_scatter_nd_add(slope - pull, places, tf.reduce_sum(pull, 1)),
    )

  zeros = tf.zeros_like(distances[:, 0])
  _, *sums, slope = tf.while_loop(
    lambda k, *_: k < tf.reduce_max(lists.sizes),
    body,
    (tf.constant(0), zeros, zeros, zeros, tf.zeros_like(distances)),
  )
  return (*sums, slope)
