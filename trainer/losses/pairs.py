"""Pair losses, in which each pair is weighted by its own value.

Shapes: T anchors of a tile, C candidates. d is a distance, s the cosine similarity.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import gin
import tensorflow as tf

from trainer.errors import UserError
from trainer.losses.distances import cosine_similarity, distance_named
from trainer.losses.loss_terms import PairMasks
from trainer.losses.softmax import log_sum_exp, num_members
from trainer.losses.tiled_loss import AnchorTerms, TiledPairLoss
from trainer.losses.triplet_sums import (
  Margin,
  margin_of,
  margin_parameters,
  read_margin,
)


@gin.register
class ContrastiveLoss(TiledPairLoss):
  """The mean over all pairs of ½ d² if positive, ½ max(margin − d, 0)² if negative.

  TensorFlow Addons leaves out the factor of ½.

  Args:
    margin: above 0, in the distance's units.
    distance: one of `trainer.losses.distances.DISTANCES`.
    rows_per_tile: anchors at a time; None to choose by size.

  Source: Hadsell et al. 2006, Dimensionality Reduction by Learning an Invariant Mapping
  (CVPR).
  """

  def __init__(
    self,
    *,
    margin: Margin,
    distance: str = "euclidean",
    rows_per_tile: Optional[int] = None,
  ):
    margin = read_margin(margin)
    super().__init__(
      comparison=distance_named(distance),
      reduction="mean_terms",
      rows_per_tile=rows_per_tile,
    )
    self._margin = margin
    self._distance = distance

  def parameters(self) -> list[tf.Tensor]:
    """Returns the margin if it may change; see the base class."""
    return margin_parameters(self._margin)

  def anchor_terms(
    self, compared: tf.Tensor, pairs: PairMasks, parameters: Sequence[tf.Tensor]
  ) -> AnchorTerms:
    """Computes one term per pair; see the base class."""
    margin = margin_of(self._margin, parameters)
    lacking = tf.where(pairs.is_negative, tf.nn.relu(margin - compared), 0.0)
    offence = tf.where(pairs.is_positive, compared, lacking)
    return AnchorTerms(
      0.5 * tf.reduce_sum(tf.square(offence), 1),
      num_members(offence > 0.0),
      num_members(pairs.is_either),
    )


@gin.register
class LiftedStructureLoss(TiledPairLoss):
  """The mean over anchors of max(log Σ_p e^{d_ap} + log Σ_n e^{margin − d_an}, 0).

  This is the generalised form, with one term per anchor over all its positives and
  negatives. The original form has one term per pair over the negatives of both its
  ends. The mean is over anchors with a positive and a negative.

  Args:
    margin: above 0, in the distance's units.
    distance: one of `trainer.losses.distances.DISTANCES`.
    rows_per_tile: anchors at a time; None to choose by size.

  Source: Song et al. 2016, https://arxiv.org/abs/1511.06452, as generalised by Hermans
  et al. 2017, https://arxiv.org/abs/1703.07737.
  """

  def __init__(
    self,
    *,
    margin: Margin,
    distance: str = "euclidean",
    rows_per_tile: Optional[int] = None,
  ):
    margin = read_margin(margin)
    super().__init__(
      comparison=distance_named(distance),
      reduction="mean_terms",
      rows_per_tile=rows_per_tile,
    )
    self._margin = margin
    self._distance = distance

  def parameters(self) -> list[tf.Tensor]:
    """Returns the margin if it may change; see the base class."""
    return margin_parameters(self._margin)

  def anchor_terms(
    self, compared: tf.Tensor, pairs: PairMasks, parameters: Sequence[tf.Tensor]
  ) -> AnchorTerms:
    """Computes one term per anchor; see the base class."""
    margin = margin_of(self._margin, parameters)
    costs = tf.nn.relu(
      log_sum_exp(compared, pairs.is_positive)
      + log_sum_exp(margin - compared, pairs.is_negative)
    )
    has_both = tf.cast(pairs.has_both, tf.float32)
    return AnchorTerms(costs, tf.sign(costs), has_both)


@gin.register
class MultiSimilarityLoss(TiledPairLoss):
  """The mean over anchors of two soft maxima, over pairs mined by their similarity.

  1/α log(1 + Σ_p e^{−α (s_ap − λ)}) + 1/β log(1 + Σ_n e^{β (s_an − λ)}), over positives
  with s_ap < max_n s_an + ε and negatives with s_an > min_p s_ap − ε. An anchor without
  a positive or without a negative has no such pair: its term is 0, but it counts.

  Args:
    positive_scale: α.
    negative_scale: β.
    threshold: λ.
    mining_margin: ε.
    rows_per_tile: anchors at a time; None to choose by size.

  Source: Wang et al. 2019, https://arxiv.org/abs/1904.06627, whose constants are the
  defaults.
  """

  def __init__(
    self,
    *,
    positive_scale: float = 2.0,
    negative_scale: float = 50.0,
    threshold: float = 1.0,
    mining_margin: float = 0.1,
    rows_per_tile: Optional[int] = None,
  ):
    if positive_scale <= 0 or negative_scale <= 0:
      raise UserError(
        f"positive_scale={positive_scale} and negative_scale={negative_scale} are not "
        "both above 0; the paper has 2 and 50."
      )
    super().__init__(
      comparison=cosine_similarity,
      reduction="mean_anchors",
      rows_per_tile=rows_per_tile,
    )
    self._positive_scale = positive_scale
    self._negative_scale = negative_scale
    self._threshold = threshold
    self._mining_margin = mining_margin

  def anchor_terms(
    self, compared: tf.Tensor, pairs: PairMasks, parameters: Sequence[tf.Tensor]
  ) -> AnchorTerms:
    """Computes one term per anchor; see the base class."""
    mined = self._mined(compared, pairs)
    alpha, beta = self._positive_scale, self._negative_scale
    excess = compared - self._threshold
    costs = (
      tf.nn.softplus(log_sum_exp(-alpha * excess, mined.is_positive)) / alpha
      + tf.nn.softplus(log_sum_exp(beta * excess, mined.is_negative)) / beta
    )
    return AnchorTerms(costs, tf.cast(costs > 0.0, tf.float32), tf.ones_like(costs))

  def _mined(self, compared: tf.Tensor, pairs: PairMasks) -> PairMasks:
    infinity = float("inf")
    lowest = tf.reduce_min(
      tf.where(pairs.is_positive, compared, infinity), 1, keepdims=True
    )
    highest = tf.reduce_max(
      tf.where(pairs.is_negative, compared, -infinity), 1, keepdims=True
    )
    margin = self._mining_margin
    return PairMasks(
      tf.logical_and(pairs.is_positive, compared < highest + margin),
      tf.logical_and(pairs.is_negative, compared > lowest - margin),
    )


@gin.register
class CircleLoss(TiledPairLoss):
  """The mean over anchors of a soft maximum of s_an − s_ap, weighted by violation.

  log(1 + Σ_n e^{γ α_n (s_an − m)} Σ_p e^{−γ α_p (s_ap − 1 + m)}), where α_n = max(s_an
  + m, 0) and α_p = max(1 + m − s_ap, 0) have no gradient. The mean is over anchors with
  a positive and a negative.

  Args:
    margin: m, in (0, 1).
    scale: γ above 0.
    rows_per_tile: anchors at a time; None to choose by size.

  Source: Sun et al. 2020, https://arxiv.org/abs/2002.10857; it uses m = 0.25 and γ =
  256 for faces, 0.4 and 80 for retrieval.
  """

  def __init__(
    self, *, margin: Margin, scale: float, rows_per_tile: Optional[int] = None
  ):
    margin = read_margin(margin)
    if isinstance(margin, float) and margin >= 1:
      raise UserError(f"margin={margin:g} is not in (0, 1); give one such as 0.4.")
    if scale <= 0:
      raise UserError(f"scale={scale} is not above 0; give one such as 80.")
    super().__init__(
      comparison=cosine_similarity, reduction="mean_terms", rows_per_tile=rows_per_tile
    )
    self._margin = margin
    self._scale = scale

  def parameters(self) -> list[tf.Tensor]:
    """Returns the margin if it may change; see the base class."""
    return margin_parameters(self._margin)

  def anchor_terms(
    self, compared: tf.Tensor, pairs: PairMasks, parameters: Sequence[tf.Tensor]
  ) -> AnchorTerms:
    """Computes one term per anchor; see the base class."""
    margin = margin_of(self._margin, parameters)
    fixed = tf.stop_gradient(compared)
    push = self._scale * tf.nn.relu(fixed + margin)
    pull = self._scale * tf.nn.relu(1.0 + margin - fixed)
    negative = log_sum_exp(push * (compared - margin), pairs.is_negative)
    positive = log_sum_exp(-pull * (compared - 1.0 + margin), pairs.is_positive)
    has_both = tf.cast(pairs.has_both, tf.float32)
    costs = has_both * tf.nn.softplus(negative + positive)
    return AnchorTerms(costs, tf.cast(costs > 0.0, tf.float32), has_both)
