"""Triplet losses, each a way to choose positives and negatives of an anchor.

Shapes: T anchors of a tile, C candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import gin
import tensorflow as tf

from trainer.losses.all_triplets import all_triplets
from trainer.losses.anchorwise import AnchorTerms, AnchorwiseLoss
from trainer.losses.distances import distance_named
from trainer.losses.hardest import farthest_positive, nearest_negative
from trainer.losses.penalties import check_margin
from trainer.losses.relevance import Relevance


class _TripletLoss(AnchorwiseLoss):
  """Base of the triplet losses: a margin and a distance."""

  margin: float

  def __init__(
    self,
    *,
    margin: float,
    distance: str = "euclidean",
    reduction: str,
    rows_per_tile: Optional[int] = None,
  ):
    check_margin(margin)
    super().__init__(
      comparison=distance_named(distance),
      reduction=reduction,
      rows_per_tile=rows_per_tile,
    )
    self.margin = margin


@gin.register
class BatchAllTripletLoss(_TripletLoss):
  """The mean of max(d_ap − d_an + margin, 0) over all triplets of the batch.

  By default the mean is over the triplets that are above 0, as Hermans et al. 2017,
  https://arxiv.org/abs/1703.07737, propose; `reduction="mean_terms"` divides by all.
  """

  needs_lists = True

  def __init__(
    self,
    *,
    margin: float,
    distance: str = "euclidean",
    reduction: str = "mean_active",
    rows_per_tile: Optional[int] = None,
  ):
    super().__init__(
      margin=margin, distance=distance, reduction=reduction, rows_per_tile=rows_per_tile
    )

  def anchor_terms(
    self, compared: tf.Tensor, pairs: Relevance, parameters: Sequence[tf.Tensor]
  ) -> AnchorTerms:
    """All triplets of each anchor; see the base class."""
    total, num_active = all_triplets(compared, pairs, self.margin)
    return AnchorTerms(
      total, num_active, _num(pairs.is_positive) * _num(pairs.is_negative)
    )


@gin.register
class BatchHardTripletLoss(_TripletLoss):
  """The mean of max(hardest d_ap − hardest d_an + margin, 0) over all anchors.

  An anchor without a positive has d_ap = 0; one without a negative has for d_an the
  largest of its distances: its term is the margin, with gradient 0. Both count.

  Source: Hermans et al. 2017, https://arxiv.org/abs/1703.07737.
  """

  def __init__(
    self,
    *,
    margin: float,
    distance: str = "euclidean",
    reduction: str = "mean_anchors",
    rows_per_tile: Optional[int] = None,
  ):
    super().__init__(
      margin=margin, distance=distance, reduction=reduction, rows_per_tile=rows_per_tile
    )

  def anchor_terms(
    self, compared: tf.Tensor, pairs: Relevance, parameters: Sequence[tf.Tensor]
  ) -> AnchorTerms:
    """One triplet an anchor; see the base class."""
    positive = farthest_positive(compared, pairs.is_positive)
    negative = nearest_negative(compared, pairs)
    hinge = tf.nn.relu(positive - negative + self.margin)
    return AnchorTerms(hinge, tf.sign(hinge), tf.ones_like(hinge))


def _num(is_pair: tf.Tensor) -> tf.Tensor:
  return tf.reduce_sum(tf.cast(is_pair, tf.float32), 1)
