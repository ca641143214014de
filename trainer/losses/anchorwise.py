"""A loss that is a sum, over anchors, of terms of the anchor's distances.

Shapes: A anchors, T anchors of a tile, C candidates.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple, Optional

import tensorflow as tf

from trainer.errors import UserError
from trainer.losses.distances import Comparison
from trainer.losses.keras_loss import InBatchLoss
from trainer.losses.positive_lists import lists_of_pairs
from trainer.losses.relevance import (
  Relevance,
  check_batch,
  positive_lists,
  relevance,
)
from trainer.losses.terms import Anchors, Candidates, LossTerms, Ratio
from trainer.losses.tiles import (
  MIN_PAIRS_TO_COMPILE,
  Pairs,
  PairsFn,
  Slopes,
  Sums,
  num_pairs,
  sum_over_tiles,
)


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


class AnchorwiseLoss(InBatchLoss):
  """Base of the losses: compares anchors with candidates, tile by tile, and sums up.

  Each term of an anchor is multiplied by the anchor's weight, in the sum and in the
  count it is divided by. A mean over nothing is 0 with gradient 0.

  Attributes:
    comparison: how an anchor and a candidate are compared.
    needs_positives: whether nothing is learned from a batch in which no class comes
      twice.
    uses_lists: whether the terms are made of one positive after the other, where
      labels give lists of them.
    needs_lists: whether they are also where lists take a sort of every row.
  """

  needs_positives = True
  uses_lists = False
  needs_lists = False

  def __init__(
    self,
    *,
    comparison: Comparison,
    reduction: str,
    rows_per_tile: Optional[int] = None,
  ):
    if reduction not in REDUCTIONS:
      raise UserError(
        f"reduction={reduction!r} is unknown; use one of {sorted(REDUCTIONS)}."
      )
    super().__init__()
    self.comparison = comparison
    self._reduction = reduction
    self._reduction_fn = REDUCTIONS[reduction]
    self._rows_per_tile = rows_per_tile
    # Made once: a function made at each call would be compiled at each call.
    self._compiled_fn = tf.function(
      self._sums_and_slopes, jit_compile=True, autograph=False
    )

  @property
  def margin(self) -> Optional[float]:
    """Of its triplets; here none."""
    return None

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

  def terms(self, anchors: Anchors, candidates: Candidates) -> LossTerms:
    """This replica's sum, count and statistics.

    Raises:
      UserError: as `check_batch`.
    """
    check_batch(anchors, candidates)
    uses_lists = self.uses_lists or self.needs_lists
    lists = positive_lists(anchors, candidates) if uses_lists else None
    # What padding holds may be anything, and 0 times NaN is NaN.
    vectors_fn = self.comparison.vectors_fn
    own = _zero_unless(anchors.weights > 0.0, anchors.embeddings)
    fresh = candidates.embeddings
    others = _zero_unless(candidates.is_valid[: fresh.shape[0]], fresh)
    sums = sum_over_tiles(
      functools.partial(self._tile, self._pairs_fn(anchors, candidates)),
      anchors._replace(embeddings=vectors_fn(own)),
      candidates._replace(embeddings=vectors_fn(others)),
      lists,
      comparison=self.comparison,
      parameters=self.parameters(),
      rows_per_tile=self._rows_per_tile,
    )
    count = tf.stop_gradient(self._reduction_fn(sums, anchors.weights))
    active = Ratio(sums.num_active, sums.num_terms)
    return LossTerms(sums.total, count, {"mining/active_fraction": active})

  def _pairs_fn(self, anchors: Anchors, candidates: Candidates) -> PairsFn:
    is_large = (num_pairs(anchors, candidates) or 0) >= MIN_PAIRS_TO_COMPILE
    return self._compiled_fn if is_large else self._sums_and_slopes

  def _tile(
    self, pairs_fn: PairsFn, pairs: Pairs, parameters: Sequence[tf.Tensor]
  ) -> tuple[Sums, Slopes]:
    """The sums and slopes of a tile; around what XLA compiles."""
    return pairs_fn(self._with_lists(pairs), parameters)

  def _with_lists(self, pairs: Pairs) -> Pairs:
    """The same, with lists where they are needed and labels gave none."""
    if not self.needs_lists or pairs.lists is not None:
      return pairs
    is_positive = relevance(pairs.anchors, pairs.candidates).is_positive
    return pairs._replace(lists=lists_of_pairs(is_positive))

  def _sums_and_slopes(
    self, pairs: Pairs, parameters: Sequence[tf.Tensor]
  ) -> tuple[Sums, Slopes]:
    """The sums of a tile, and the gradients of its total."""
    sources = [pairs.products, *parameters]
    with tf.GradientTape(watch_accessed_variables=False) as tape:
      tape.watch(sources)
      compared = self.comparison.compare_fn(
        pairs.products, pairs.anchor_norms, pairs.candidate_norms
      )
      terms = self.anchor_terms(
        compared, relevance(pairs.anchors, pairs.candidates, pairs.lists), parameters
      )
      sums = Sums(*(tf.reduce_sum(pairs.anchors.weights * each) for each in terms))
    gradients = tape.gradient(
      sums.total, sources, unconnected_gradients=tf.UnconnectedGradients.ZERO
    )
    to_products, *to_parameters = gradients
    return sums, Slopes(to_products, to_parameters)


def _zero_unless(is_real: tf.Tensor, embeddings: tf.Tensor) -> tf.Tensor:
  embeddings = tf.convert_to_tensor(embeddings)
  return tf.where(is_real[:, None], embeddings, tf.zeros_like(embeddings))
