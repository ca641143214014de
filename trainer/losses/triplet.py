"""Triplet losses, each a way to choose positives and negatives of an anchor.

Shapes: T anchors of a tile, C candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional

import gin
import tensorflow as tf

from trainer.losses.all_triplets import all_triplets
from trainer.losses.anchorwise import AnchorTerms, AnchorwiseLoss
from trainer.losses.distances import distance_named
from trainer.losses.hardest import farthest_positive, nearest_negative
from trainer.losses.masked import num_members
from trainer.losses.penalties import (
  Margin,
  margin_of,
  margin_parameters,
  read_margin,
)
from trainer.losses.relevance import Relevance
from trainer.losses.tiles import Pairs, PairsFn, Slopes, Sums

# Beyond so many positives of an anchor sorting is the faster way: on a CPU, at 4,096
# candidates, the loop takes 6 ms a positive, and sorting 1.8 s.
MAX_POSITIVES_OF_LOOP = 256


class MarginTripletLoss(AnchorwiseLoss):
  """Base of the triplet losses that have a margin and a distance.

  Args:
    margin: above 0, in the distance's units; a variable is read at each call, and gets
      no gradient.
    distance: one of `trainer.losses.distances.DISTANCES`.
    reduction: "mean_active" over the terms above 0, "mean_terms" over all that could
      be, "mean_anchors"; None for the loss's own, which is what it is known by.
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
    """In units of what is compared, a float or [] float32."""
    return margin_of(self._margin, self.parameters())

  def parameters(self) -> list[tf.Tensor]:
    """The margin, if it may change; see the base class."""
    return margin_parameters(self._margin)

  def _margin_in(self, parameters: Sequence[tf.Tensor]) -> Any:
    """Of a tile."""
    return margin_of(self._margin, parameters)


@gin.register
class BatchAllTripletLoss(MarginTripletLoss):
  """The mean of max(d_ap − d_an + margin, 0) over all triplets of the batch.

  By default the mean is over the triplets that are above 0, as Hermans et al. 2017,
  https://arxiv.org/abs/1703.07737, propose; `reduction="mean_terms"` divides by all.
  """

  needs_lists = True
  own_reduction = "mean_active"

  def anchor_terms(
    self, compared: tf.Tensor, pairs: Relevance, parameters: Sequence[tf.Tensor]
  ) -> AnchorTerms:
    """All triplets of each anchor; see the base class."""
    total, num_active = all_triplets(compared, pairs, self._margin_in(parameters))
    return AnchorTerms(
      total, num_active, num_members(pairs.is_positive) * num_members(pairs.is_negative)
    )

  def _tile(
    self, pairs_fn: PairsFn, pairs: Pairs, parameters: Sequence[tf.Tensor]
  ) -> tuple[Sums, Slopes]:
    """By a loop over positives, or by sorting where an anchor has very many."""
    pairs = self._with_lists(pairs)
    assert pairs.lists is not None
    without_lists = pairs._replace(lists=None)
    return tf.cond(
      tf.reduce_max(pairs.lists.sizes) > MAX_POSITIVES_OF_LOOP,
      lambda: self._sums_and_slopes(without_lists, parameters),
      lambda: pairs_fn(pairs, parameters),
    )


@gin.register
class BatchHardTripletLoss(MarginTripletLoss):
  """The mean of max(hardest d_ap − hardest d_an + margin, 0) over all anchors.

  An anchor without a positive has d_ap = 0; one without a negative has for d_an the
  largest of its distances: its term is the margin, with gradient 0. Both count.

  Source: Hermans et al. 2017, https://arxiv.org/abs/1703.07737.
  """

  own_reduction = "mean_anchors"

  def anchor_terms(
    self, compared: tf.Tensor, pairs: Relevance, parameters: Sequence[tf.Tensor]
  ) -> AnchorTerms:
    """One triplet an anchor; see the base class."""
    positive = farthest_positive(compared, pairs.is_positive)
    negative = nearest_negative(compared, pairs)
    hinge = tf.nn.relu(positive - negative + self._margin_in(parameters))
    return AnchorTerms(hinge, tf.sign(hinge), tf.ones_like(hinge))
