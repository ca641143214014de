"""Triplet losses: all, hardest, semi-hard and configurable triplets.

A selection gives each candidate a weight: 1 if it is selected, in equal parts in case
of ties, or a probability if the selection is random. A loss is then the expectation
over the selection. Weights have no gradient.

Shapes: T anchors of a tile, C candidates.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Callable, Optional, TypeVar, Union

import gin
import tensorflow as tf

from trainer.errors import UserError
from trainer.losses.distances import distance_named
from trainer.losses.keras_loss import KerasSerializable
from trainer.losses.loss_terms import Anchors, Candidates, PairMasks
from trainer.losses.softmax import num_members
from trainer.losses.tiled_loss import (
  AnchorTerms,
  PairGradients,
  Pairs,
  PairsFn,
  Sums,
  TiledPairLoss,
)
from trainer.losses.triplet_sums import (
  Margin,
  all_triplets,
  hinge,
  hinge_of_semi_hard,
  margin_of,
  margin_parameters,
  penalty_of,
  read_margin,
  triplets_of_all_positives,
  triplets_of_one_positive,
)

# [T, C] weights of positives, given [T, C] distances.
PositivesFn = Callable[[tf.Tensor, PairMasks], tf.Tensor]
# The same for negatives, given also [T, 1] distances to a positive.
NegativesFn = Callable[[tf.Tensor, PairMasks, tf.Tensor], tf.Tensor]

_INFINITY = float("inf")

# With more positives per anchor sorting is faster. On a CPU, at 4,096 candidates, the
# loop takes 6 ms per positive, and sorting 1.8 s.
MAX_POSITIVES_OF_LOOP = 256


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


def farthest_positive(distances: tf.Tensor, is_positive: tf.Tensor) -> tf.Tensor:
  """Returns the distance of each anchor to its farthest positive, [T]; 0 without one.

  Args:
    distances: [T, C] float32 >= 0.
    is_positive: [T, C] bool.
  """
  return tf.reduce_max(tf.where(is_positive, distances, 0.0), 1)


def nearest_negative(distances: tf.Tensor, pairs: PairMasks) -> tf.Tensor:
  """Returns the distance of each anchor to its nearest negative, [T].

  For an anchor without a negative it is the farthest positive, or 0 without either.

  Args:
    distances: [T, C] float32 >= 0.
    pairs: masks of positives and negatives.
  """
  has_negative = tf.reduce_any(pairs.is_negative, 1)
  nearest = tf.reduce_min(tf.where(pairs.is_negative, distances, float("inf")), 1)
  farthest = farthest_positive(distances, pairs.is_positive)
  return tf.where(has_negative, nearest, farthest)


class MarginTripletLoss(TiledPairLoss):
  """Base of the triplet losses that have a margin and a distance.

  Args:
    margin: above 0, in the distance's units; a variable is read at each call and has no
      gradient.
    distance: one of `trainer.losses.distances.DISTANCES`.
    reduction: "mean_active" over the terms above 0, "mean_terms" over all possible
      terms, "mean_anchors"; None for the loss's own reduction.
    rows_per_tile: anchors at a time; None to choose by size.

  Raises:
    UserError: a name is unknown, or the margin is not above 0.
  """

  own_reduction: str

  def __init__(
    self,
    *,
    margin: Margin,
    distance: str = "euclidean",
    reduction: Optional[str] = None,
    rows_per_tile: Optional[int] = None,
  ):
    margin = read_margin(margin)
    super().__init__(
      comparison=distance_named(distance),
      reduction=reduction or self.own_reduction,
      rows_per_tile=rows_per_tile,
    )
    self._margin = margin
    self._distance = distance

  @property
  def margin(self) -> Any:
    """Margin in units of what is compared, a float or [] float32."""
    return margin_of(self._margin, self.parameters())

  def parameters(self) -> list[tf.Tensor]:
    """Returns the margin if it may change; see the base class."""
    return margin_parameters(self._margin)

  def _margin_in(self, parameters: Sequence[tf.Tensor]) -> Any:
    """Returns the margin inside a tile."""
    return margin_of(self._margin, parameters)


@gin.register
class BatchAllTripletLoss(MarginTripletLoss):
  """The mean of max(d_ap − d_an + margin, 0) over all triplets of the batch.

  By default the mean is over the triplets above 0, as proposed by Hermans et al. 2017,
  https://arxiv.org/abs/1703.07737; `reduction="mean_terms"` divides by all.
  """

  needs_lists = True
  own_reduction = "mean_active"

  def anchor_terms(
    self, compared: tf.Tensor, pairs: PairMasks, parameters: Sequence[tf.Tensor]
  ) -> AnchorTerms:
    """Computes all triplets of each anchor; see the base class."""
    total, num_active = all_triplets(compared, pairs, self._margin_in(parameters))
    return AnchorTerms(
      total, num_active, num_members(pairs.is_positive) * num_members(pairs.is_negative)
    )

  def _pairs_fn(self, anchors: Anchors, candidates: Candidates) -> PairsFn:
    return functools.partial(self._loop_or_sort, super()._pairs_fn(anchors, candidates))

  def _loop_or_sort(
    self, loop_fn: PairsFn, pairs: Pairs, parameters: Sequence[tf.Tensor]
  ) -> tuple[Sums, PairGradients]:
    """Loops over positives, or sorts if an anchor has very many."""
    assert pairs.lists is not None
    without_lists = pairs._replace(lists=None)
    return tf.cond(
      tf.reduce_max(pairs.lists.sizes) > MAX_POSITIVES_OF_LOOP,
      functools.partial(self._sums_and_gradients, without_lists, parameters),
      functools.partial(loop_fn, pairs, parameters),
    )


@gin.register
class BatchHardTripletLoss(MarginTripletLoss):
  """The mean of max(hardest d_ap − hardest d_an + margin, 0) over all anchors.

  An anchor without a positive has d_ap = 0. For one without a negative, d_an is the
  largest of its distances, so its term is the margin with gradient 0. Both count.

  Source: Hermans et al. 2017, https://arxiv.org/abs/1703.07737.
  """

  own_reduction = "mean_anchors"

  def anchor_terms(
    self, compared: tf.Tensor, pairs: PairMasks, parameters: Sequence[tf.Tensor]
  ) -> AnchorTerms:
    """Computes one triplet per anchor; see the base class."""
    positive = farthest_positive(compared, pairs.is_positive)
    negative = nearest_negative(compared, pairs)
    hinge = tf.nn.relu(positive - negative + self._margin_in(parameters))
    return AnchorTerms(hinge, tf.sign(hinge), tf.ones_like(hinge))


@gin.register
class TripletLoss(TiledPairLoss):
  """The mean cost of the triplets formed by selected positives and negatives.

  An anchor without a positive or without a negative forms no triplet and adds nothing
  to the sum. Only `reduction="mean_anchors"` counts it.

  Args:
    positives: "all", "hardest" (the farthest) or "easiest" (the nearest).
    negatives: "all", "hardest" (the nearest), "semi_hard_of_pair" (the nearest beyond
      the positive, else the farthest), "semi_hard_of_anchor" (the nearest beyond the
      farthest positive, else the farthest), or `DistanceWeightedNegatives`.
    margin: above 0 for max(d_ap − d_an + margin, 0), or "soft" for log(1 + exp(d_ap −
      d_an)).
    reduction: "mean_active" over triplets with nonzero cost, "mean_terms" over all
      triplets formed, "mean_anchors".
    distance: one of `trainer.losses.distances.DISTANCES`.
    rows_per_tile: anchors at a time; None to choose by size.

  Raises:
    UserError: a name is unknown, or the margin is not above 0.
  """

  def __init__(
    self,
    *,
    positives: str,
    negatives: Union[str, NegativesFn],
    margin: Margin,
    reduction: str,
    distance: str = "euclidean",
    rows_per_tile: Optional[int] = None,
  ):
    super().__init__(
      comparison=distance_named(distance),
      reduction=reduction,
      rows_per_tile=rows_per_tile,
    )
    if (
      isinstance(negatives, DistanceWeightedNegatives) and "normalized" not in distance
    ):
      raise UserError(
        f"distance={distance!r} does not fit DistanceWeightedNegatives, which need "
        'unit vectors; use "normalized_euclidean".'
      )
    self._positives_fn = _named("positives", positives, POSITIVES)
    self.needs_lists = positives == "all"
    self._negatives_fn = (
      _named("negatives", negatives, NEGATIVES)
      if isinstance(negatives, str)
      else negatives
    )
    self._positives, self._negatives = positives, negatives
    self._distance, self._reduction = distance, reduction
    self._margin = margin if _is_soft(margin) else read_margin(margin)

  @property
  def margin(self) -> Any:
    """Margin above 0, a float or [] float32; None for the soft margin."""
    return self._margin_in(self.parameters())

  def parameters(self) -> list[tf.Tensor]:
    """Returns the margin if it may change; see the base class."""
    return margin_parameters(self._margin)

  def _margin_in(self, parameters: Sequence[tf.Tensor]) -> Any:
    """Returns the margin inside a tile."""
    return None if _is_soft(self._margin) else margin_of(self._margin, parameters)

  def anchor_terms(
    self, compared: tf.Tensor, pairs: PairMasks, parameters: Sequence[tf.Tensor]
  ) -> AnchorTerms:
    """Computes the selected triplets of each anchor; see the base class."""
    fixed = tf.stop_gradient(compared)
    arguments = (
      self._positives_fn(fixed, pairs),
      lambda positive: self._negatives_fn(fixed, pairs, positive),
      penalty_of(self._margin_in(parameters)),
    )
    if self.needs_lists:
      return AnchorTerms(*triplets_of_all_positives(compared, pairs.lists, *arguments))
    return AnchorTerms(*triplets_of_one_positive(compared, *arguments))


@gin.register
class SemiHardTripletLoss(MarginTripletLoss):
  """The mean over positive pairs of max(d_ap − semi-hard d_an + margin, 0).

  The semi-hard negative of a pair is the nearest beyond the positive, or else the
  farthest. An anchor without a negative has d_an = 0. The values equal those of
  TensorFlow Addons, except that without any pair the loss is 0 with gradient 0, not
  NaN.

  Source: Schroff et al. 2015, https://arxiv.org/abs/1503.03832.
  """

  needs_lists = True
  own_reduction = "mean_terms"

  def anchor_terms(
    self, compared: tf.Tensor, pairs: PairMasks, parameters: Sequence[tf.Tensor]
  ) -> AnchorTerms:
    """Computes one triplet per positive pair; see the base class."""
    fixed = tf.stop_gradient(compared)
    positives = tf.cast(pairs.is_positive, tf.float32)
    total, num_active, num_terms = triplets_of_all_positives(
      compared,
      pairs.lists,
      positives,
      lambda positive: semi_hard_of_pair(fixed, pairs, positive),
      hinge(self._margin_in(parameters)),
    )
    num_pairs = tf.reduce_sum(positives, 1)
    alone = tf.reduce_sum(positives * (compared + self._margin_in(parameters)), 1)
    has_negative = tf.reduce_any(pairs.is_negative, 1)
    return AnchorTerms(
      tf.where(has_negative, total, alone),
      tf.where(has_negative, num_active, num_pairs),
      tf.where(has_negative, num_terms, num_pairs),
    )


@gin.register
class InsideMarginTripletLoss(MarginTripletLoss):
  """The mean of d_ap − d_an + margin over triplets with d_ap < d_an < d_ap + margin.

  These are all semi-hard triplets of the batch, without a fallback, as PyTorch Metric
  Learning defines semi-hard.
  """

  needs_lists = True
  own_reduction = "mean_active"

  def anchor_terms(
    self, compared: tf.Tensor, pairs: PairMasks, parameters: Sequence[tf.Tensor]
  ) -> AnchorTerms:
    """Computes all semi-hard triplets of each anchor; see the base class."""
    negatives = tf.cast(pairs.is_negative, tf.float32)
    return AnchorTerms(
      *triplets_of_all_positives(
        compared,
        pairs.lists,
        tf.cast(pairs.is_positive, tf.float32),
        lambda positive: negatives,
        hinge_of_semi_hard(self._margin_in(parameters)),
      )
    )


def _is_soft(margin: Margin) -> bool:
  """Returns whether the margin is the word "soft".

  Raises:
    UserError: the margin is another word.
  """
  if isinstance(margin, str) and margin != "soft":
    raise UserError(f'margin={margin!r} is unknown; give a number above 0, or "soft".')
  return isinstance(margin, str)


_Function = TypeVar("_Function", bound=Callable)


def _named(kind: str, name: str, functions: Mapping[str, _Function]) -> _Function:
  if name not in functions:
    raise UserError(f"{kind}={name!r} is unknown; use one of {sorted(functions)}.")
  return functions[name]
