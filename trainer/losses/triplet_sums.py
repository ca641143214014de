"""Sums over the triplets of each anchor, without a cube of triplets.

For each positive of an anchor, t = d_ap + margin is a threshold, and the positive forms
triplets with the negatives below it. Their number is the gradient to d_ap. The number
of thresholds above a negative, negated, is the gradient to d_an.

`all_triplets` loops over positives: the k-th positive of all anchors is processed at
once. Each takes a few [T, C] passes, O(C) per anchor.

`sorted_sums_and_slope` sorts an anchor's negatives. The position of a threshold among
them is the number of negatives below it, and a running sum gives their total. With
sorted thresholds, the position of a negative gives the number of thresholds above it. A
row takes O(C log C) for classes of any size.

Shapes: T anchors, C candidates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Optional

import tensorflow as tf

from trainer.errors import UserError
from trainer.losses.loss_terms import PairMasks, PositiveLists

# Computes, from d_ap [T, 1] and d_an [T, C], the cost of each triplet and its
# derivative by d_ap, both [T, C]; the derivative by d_an is the same, negated.
PenaltyFn = Callable[[tf.Tensor, tf.Tensor], tuple[tf.Tensor, tf.Tensor]]

# A number; a scalar variable or graph tensor, which is read at each call; or "soft".
Margin = Any
_INFINITY = float("inf")
# Number of positives that share the passes over an anchor's negatives. With 64 samples
# per class, four take a quarter less time than one by one; eight take no less.
_POSITIVES_AT_ONCE = 4


def read_margin(margin: Margin) -> Any:
  """Reads a margin, and rejects values that are not above 0.

  Args:
    margin: a Python, NumPy or TensorFlow number; or a scalar variable or graph tensor.

  Returns:
    A float; or the variable or tensor itself, so that its value may change.

  Raises:
    UserError: the margin, or the current value of a variable, is not one finite number
      above 0.
  """
  value = tf.get_static_value(margin) if tf.is_tensor(margin) else margin
  if isinstance(margin, tf.Variable):
    value = margin.numpy() if tf.executing_eagerly() else None
  if getattr(margin, "shape", ()) not in ((), None):
    raise UserError(f"margin has shape {tuple(margin.shape)}; give one number.")
  if value is None:
    return margin
  try:
    number = float(value)
  except (TypeError, ValueError):
    raise UserError(
      f"margin={margin!r} is not a number; give one such as 0.2."
    ) from None
  if not number > 0:
    raise UserError(f"margin={value} is not above 0; give a margin such as 0.2.")
  if number == math.inf:
    raise UserError(f"margin={value} is not finite; give a margin such as 0.2.")
  return margin if isinstance(margin, tf.Variable) else number


def margin_parameters(margin: Any) -> list[tf.Tensor]:
  """Returns a margin that may change as input of the compiled part of a loss.

  Args:
    margin: as in `read_margin`.

  Returns:
    Its value, [] float32, without gradient; nothing for a float, which is compiled in.
  """
  if not tf.is_tensor(margin):
    return []
  return [tf.stop_gradient(tf.cast(tf.convert_to_tensor(margin), tf.float32))]


def margin_of(margin: Any, parameters: Sequence[tf.Tensor]) -> Any:
  """Returns the margin in the compiled part.

  Args:
    margin: as in `read_margin`.
    parameters: values of `margin_parameters`.
  """
  return tf.stop_gradient(parameters[0]) if tf.is_tensor(margin) else margin


def penalty_of(margin: Margin) -> PenaltyFn:
  """Returns the hinge with a margin, or the soft margin for None.

  Args:
    margin: as in `margin_of`, or None.
  """
  return soft_margin if margin is None else hinge(margin)


def hinge(margin: Any) -> PenaltyFn:
  """Returns the penalty max(d_ap − d_an + margin, 0)."""

  def penalty(positive: tf.Tensor, negative: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    cost = tf.nn.relu(positive + margin - negative)
    return cost, tf.sign(cost)

  return penalty


def hinge_of_semi_hard(margin: Any) -> PenaltyFn:
  """Returns d_ap − d_an + margin where d_ap < d_an < d_ap + margin, and 0 elsewhere."""

  def penalty(positive: tf.Tensor, negative: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    cost = tf.nn.relu(positive + margin - negative)
    cost = tf.where(negative > positive, cost, 0.0)
    return cost, tf.sign(cost)

  return penalty


def soft_margin(
  positive: tf.Tensor, negative: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
  """Computes log(1 + exp(d_ap − d_an))."""
  return tf.nn.softplus(positive - negative), tf.sigmoid(positive - negative)


def sorted_sums_and_slope(
  distances: tf.Tensor, pairs: PairMasks, margin: float
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
  """Computes Σ_pn max(d_ap − d_an + margin, 0) of each anchor, and its gradient.

  Args:
    distances: [T, C] float32.
    pairs: masks of positives and negatives.
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
  """Computes Σ_p (t · n − sum of the n smallest negatives), [T], n of them below t.

  In float64, because a hinge is a small difference of large sums.
  """
  finite = tf.where(negatives < _INFINITY, negatives, 0.0)
  running = tf.cumsum(tf.cast(finite, tf.float64), 1)
  running = tf.pad(running, [[0, 0], [1, 0]])
  below = tf.gather(running, num_below, batch_dims=1)
  at = tf.cast(tf.where(num_below > 0, thresholds, 0.0), tf.float64)
  hinges = at * tf.cast(num_below, tf.float64) - below
  return tf.cast(tf.reduce_sum(hinges, 1), tf.float32)


def all_triplets(
  distances: tf.Tensor, pairs: PairMasks, margin: float
) -> tuple[tf.Tensor, tf.Tensor]:
  """Computes Σ_pn max(d_ap − d_an + margin, 0) of each anchor, and its nonzero terms.

  Args:
    distances: [T, C] float32.
    pairs: masks of positives and negatives; with lists of positives it loops over them,
      without it sorts.
    margin: in the distances' units.

  Returns:
    [T] float32 sums, differentiable, and [T] float32 counts of the terms above 0.
  """

  @tf.custom_gradient
  def sums(distances: tf.Tensor) -> tuple[tuple[tf.Tensor, tf.Tensor], Callable]:
    by = sorted_sums_and_slope if pairs.lists is None else _sums_and_slope_of_all
    total, num_active, slope = by(distances, pairs, margin)

    def gradient(upstream: tf.Tensor, _: tf.Tensor) -> tf.Tensor:
      return upstream[:, None] * slope

    return (total, num_active), gradient

  return sums(distances)


def _sums_and_slope_of_all(
  distances: tf.Tensor, pairs: PairMasks, margin: float
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
  """Returns sums and counts, both [T], and the sums' gradient to distances, [T, C]."""
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


# Returns, for [T, 1] distances to a positive, the [T, C] weights of its negatives.
ChooseFn = Callable[[tf.Tensor], tf.Tensor]


def triplets_of_one_positive(
  distances: tf.Tensor,
  positives: tf.Tensor,
  choose_fn: ChooseFn,
  penalty_fn: PenaltyFn,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
  """Computes Σ_n w_n penalty(d_ap, d_an) of each anchor, which has one positive p.

  Args:
    distances: [T, C] float32.
    positives: [T, C] float32, above 0 at the positive, and at others of the same
      distance.
    choose_fn: returns the weights w_n, without gradient.
    penalty_fn: computes the cost of a triplet.

  Returns:
    As `triplets_of_all_positives`.
  """
  is_positive = positives > 0.0
  has_positive = tf.reduce_any(is_positive, 1, keepdims=True)
  # The gradient of a maximum is shared equally among ties.
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
  """Computes Σ_pn w_p w_n penalty(d_ap, d_an) of each anchor.

  Args:
    distances: [T, C] float32.
    lists: the positives of each anchor.
    positives: [T, C] float32 weights w_p, without gradient.
    choose_fn: returns the weights w_n, without gradient.
    penalty_fn: computes the cost of a triplet.

  Returns:
    [T] float32 sums, differentiable; [T] float32 weights of the triplets with nonzero
    cost, and of all.
  """

  @tf.custom_gradient
  def sums(distances: tf.Tensor) -> tuple[tuple[tf.Tensor, ...], Callable]:
    *values, slope = _sums_and_slope_of_chosen(
      distances, lists, positives, choose_fn, penalty_fn
    )

    def gradient(upstream: tf.Tensor, *_: tf.Tensor) -> tf.Tensor:
      return upstream[:, None] * slope

    return tuple(values), gradient

  return sums(distances)


def _sums_and_slope_of_chosen(
  distances: tf.Tensor,
  lists: Optional[PositiveLists],
  positives: tf.Tensor,
  choose_fn: ChooseFn,
  penalty_fn: PenaltyFn,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
  """Returns three [T] sums, and the gradient of the first to distances, [T, C]."""
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
