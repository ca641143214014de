"""Selection of the positives and negatives that form triplets with an anchor.

A selection gives each candidate a weight: 1 if it is selected, in equal parts in case
of ties, or a probability if the selection is random. A loss is then the expectation
over the selection. Weights have no gradient.

Shapes: T anchors, C candidates.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Callable

import gin
import tensorflow as tf

from trainer.errors import UserError
from trainer.losses.keras_loss import KerasSerializable
from trainer.losses.loss_terms import PairMasks

# [T, C] weights of positives, given [T, C] distances.
PositivesFn = Callable[[tf.Tensor, PairMasks], tf.Tensor]
# The same for negatives, given also [T, 1] distances to a positive.
NegativesFn = Callable[[tf.Tensor, PairMasks, tf.Tensor], tf.Tensor]

_INFINITY = float("inf")


def _all_positives(distances: tf.Tensor, pairs: PairMasks) -> tf.Tensor:
  return tf.cast(pairs.is_positive, distances.dtype)


def _hardest_positives(distances: tf.Tensor, pairs: PairMasks) -> tf.Tensor:
  return _farthest(distances, pairs.is_positive)


def _easiest_positives(distances: tf.Tensor, pairs: PairMasks) -> tf.Tensor:
  return _nearest(distances, pairs.is_positive)


def _all_negatives(
  distances: tf.Tensor, pairs: PairMasks, positive: tf.Tensor
) -> tf.Tensor:
  del positive
  return tf.cast(pairs.is_negative, distances.dtype)


def _hardest_negatives(
  distances: tf.Tensor, pairs: PairMasks, positive: tf.Tensor
) -> tf.Tensor:
  del positive
  return _nearest(distances, pairs.is_negative)


def semi_hard_of_pair(
  distances: tf.Tensor, pairs: PairMasks, positive: tf.Tensor
) -> tf.Tensor:
  """Selects the nearest negative beyond the positive, or else the farthest negative.

  Source: Schroff et al. 2015, https://arxiv.org/abs/1503.03832; the fallback is that of
  TensorFlow Addons.
  """
  is_beyond = tf.logical_and(pairs.is_negative, distances > positive)
  has_beyond = tf.reduce_any(is_beyond, 1, keepdims=True)
  return tf.where(
    has_beyond,
    _nearest(distances, is_beyond),
    _farthest(distances, pairs.is_negative),
  )


def _semi_hard_of_anchor(
  distances: tf.Tensor, pairs: PairMasks, positive: tf.Tensor
) -> tf.Tensor:
  """Selects as `semi_hard_of_pair`, but beyond the anchor's farthest positive."""
  del positive
  farthest = tf.reduce_max(
    tf.where(pairs.is_positive, distances, -_INFINITY), 1, keepdims=True
  )
  return semi_hard_of_pair(distances, pairs, farthest)


@gin.register
class DistanceWeightedNegatives(KerasSerializable):
  """Random negatives, with a uniform distribution of distances on the unit sphere.

  Probabilities are inverse to q(d) = d^(n−2) (1 − d²/4)^((n−3)/2), the density of
  distances between random points of the sphere in n dimensions. Distances below
  `nearest` count as `nearest`, and those above `farthest` are never selected. The loss
  is the expectation, which sampling would estimate with noise.

  Args:
    num_dimensions: n, of the embeddings, which must have norm 1 and be compared by
      Euclidean distance.
    nearest: distance below which the selection would be noise.
    farthest: distance above which no margin is violated.

  Source: Wu et al. 2017, https://arxiv.org/abs/1706.07567.
  """

  def __init__(
    self, *, num_dimensions: int, nearest: float = 0.5, farthest: float = 1.4
  ):
    if num_dimensions < 3:
      raise UserError(f"num_dimensions={num_dimensions} is below 3; give 3 or more.")
    if not 0 < nearest < farthest < 2:
      raise UserError(
        f"nearest={nearest} and farthest={farthest} must be distances between unit "
        "vectors; give 0 < nearest < farthest < 2."
      )
    self._num_dimensions = num_dimensions
    self._nearest = nearest
    self._farthest = farthest

  def __call__(
    self, distances: tf.Tensor, pairs: PairMasks, positive: tf.Tensor
  ) -> tf.Tensor:
    """Returns the negatives' probabilities, [T, C]; all 0 if none is near enough."""
    del positive
    is_near = tf.logical_and(pairs.is_negative, distances < self._farthest)
    clipped = tf.clip_by_value(distances, self._nearest, self._farthest)
    density = (self._num_dimensions - 2.0) * tf.math.log(clipped) + (
      0.5 * (self._num_dimensions - 3.0)
    ) * tf.math.log(1.0 - 0.25 * tf.square(clipped))
    lowest = tf.reduce_min(tf.where(is_near, density, _INFINITY), 1, keepdims=True)
    weights = tf.where(is_near, tf.exp(tf.minimum(lowest - density, 0.0)), 0.0)
    return tf.math.divide_no_nan(weights, tf.reduce_sum(weights, 1, keepdims=True))


POSITIVES: Mapping[str, PositivesFn] = {
  "all": _all_positives,
  "hardest": _hardest_positives,
  "easiest": _easiest_positives,
}

NEGATIVES: Mapping[str, NegativesFn] = {
  "all": _all_negatives,
  "hardest": _hardest_negatives,
  "semi_hard_of_pair": semi_hard_of_pair,
  "semi_hard_of_anchor": _semi_hard_of_anchor,
}


def _nearest(distances: tf.Tensor, is_member: tf.Tensor) -> tf.Tensor:
  """Returns 1 at the nearest member, shared among ties; all 0 if there is none."""
  masked = tf.where(is_member, distances, _INFINITY)
  is_nearest = tf.equal(masked, tf.reduce_min(masked, 1, keepdims=True))
  return _shared(tf.logical_and(is_nearest, is_member), distances.dtype)


def _farthest(distances: tf.Tensor, is_member: tf.Tensor) -> tf.Tensor:
  return _nearest(-distances, is_member)


def _shared(is_chosen: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
  chosen = tf.cast(is_chosen, dtype)
  return tf.math.divide_no_nan(chosen, tf.reduce_sum(chosen, 1, keepdims=True))
