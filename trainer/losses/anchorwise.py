"""A loss that is a sum, over anchors, of terms of the anchor's distances.

Shapes: A anchors, T anchors of a tile, C candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Optional

import tensorflow as tf

from trainer.errors import UserError
from trainer.losses.relevance import Relevance, check_labels, relevance
from trainer.losses.statistics import mining_sums, named
from trainer.losses.terms import Anchors, Candidates, LossTerms, Ratio, Statistic
from trainer.losses.tiles import Sums, sum_over_tiles


class AnchorTerms(NamedTuple):
  """The terms of each anchor of a tile, before the anchors' weights.

  Attributes:
    total: [T] float32, the sum of the anchor's terms, differentiable.
    num_active: [T] float32, how many of its terms are not 0.
    num_terms: [T] float32, how many terms it has.
  """

  total: tf.Tensor
  num_active: tf.Tensor
  num_terms: tf.Tensor


def _active(sums: Sums, weights: tf.Tensor) -> tf.Tensor:
  del weights
  return sums.num_active


def _terms(sums: Sums, weights: tf.Tensor) -> tf.Tensor:
  del weights
  return sums.num_terms


def _anchors(sums: Sums, weights: tf.Tensor) -> tf.Tensor:
  del sums
  return tf.reduce_sum(weights)


# What the sum of all terms is divided by.
REDUCTIONS = {"mean_active": _active, "mean_terms": _terms, "mean_anchors": _anchors}


class AnchorwiseLoss(tf.Module):
  """Base of the losses: compares anchors with candidates, tile by tile, and sums up.

  Each term of an anchor is multiplied by the anchor's weight, in the sum and in the
  count it is divided by. A mean over nothing is 0 with gradient 0.

  Attributes:
    needs_positives: whether a batch without two examples of a class has no loss.
  """

  needs_positives = True

  def __init__(
    self,
    *,
    compare_fn: Callable[[tf.Tensor, tf.Tensor], tf.Tensor],
    reduction: str,
    rows_per_tile: Optional[int] = None,
  ):
    if reduction not in REDUCTIONS:
      raise UserError(
        f"reduction={reduction!r} is unknown; use one of {sorted(REDUCTIONS)}."
      )
    super().__init__()
    self._compare_fn = compare_fn
    self._reduction_fn = REDUCTIONS[reduction]
    self._rows_per_tile = rows_per_tile

  def anchor_terms(
    self, compared: tf.Tensor, pairs: Relevance, parameters: Sequence[tf.Tensor]
  ) -> AnchorTerms:
    """The terms of a tile's anchors.

    Args:
      compared: [T, C] float32, distances or similarities.
      pairs: which of them are to positives, which to negatives.
      parameters: the values of `parameters()`.
    """
    raise NotImplementedError

  def parameters(self) -> list[tf.Tensor]:
    """Values, of variables of the loss, that the terms have a gradient to."""
    return []

  def __call__(self, anchors: Anchors, candidates: Candidates) -> LossTerms:
    """This replica's sum, count and statistics.

    Raises:
      UserError: the labels are not one integer, or several bools, an embedding.
    """
    check_labels(anchors.labels, anchors.embeddings.shape[0])
    check_labels(candidates.labels, candidates.embeddings.shape[0])
    anchors = anchors._replace(embeddings=tf.cast(anchors.embeddings, tf.float32))
    candidates = candidates._replace(
      embeddings=tf.cast(candidates.embeddings, tf.float32)
    )
    sums = sum_over_tiles(
      self._tile_sums, anchors, candidates, self.parameters(), self._rows_per_tile
    )
    statistics: dict[str, Statistic] = {
      "mining/active_fraction": Ratio(sums.num_active, sums.num_terms),
      **named(sums.mining),
    }
    count = tf.stop_gradient(self._reduction_fn(sums, anchors.weights))
    return LossTerms(sums.total, count, statistics)

  def _tile_sums(
    self,
    anchors: Anchors,
    candidates: Candidates,
    parameters: Sequence[tf.Tensor],
  ) -> Sums:
    compared = self._compare_fn(anchors.embeddings, candidates.embeddings)
    pairs = relevance(anchors, candidates)
    terms = self.anchor_terms(compared, pairs, parameters)
    total, num_active, num_terms = (
      tf.reduce_sum(anchors.weights * each) for each in terms
    )
    mining = mining_sums(anchors, candidates, pairs)
    return Sums(total, num_active, num_terms, mining)
