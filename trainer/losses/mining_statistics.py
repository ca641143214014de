"""Mining statistics of a batch, and collapse detection.

Shapes: A anchors, C candidates, N sampled anchors, D dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Optional, Protocol

import gin
import tensorflow as tf

from trainer.errors import UserError
from trainer.losses import metric_accumulators
from trainer.losses.distances import PairwiseMetric, exact_euclidean
from trainer.losses.loss_terms import (
  Anchors,
  Candidates,
  LossOutput,
  PairMasks,
  WeightedMean,
  lists_of_pairs,
  pair_masks,
  positive_lists,
)
from trainer.losses.tiled_loss import MIN_PAIRS_TO_COMPILE, num_pairs

# Half of all pairs at distance 0: no data set has so many duplicates in a batch.
_DUPLICATE_FRACTION = 0.5
# A spread this small relative to the norm is close to the rounding of the distances.
_SPREAD = 5e-3
# Nearly all embeddings on one line, unless two classes are well separated.
_RANK = 1.2
_HARD_FRACTION = 0.1
# Positives and negatives share a histogram of this many bins; the last is for other
# pairs.
_NUM_SEGMENTS = 2 * metric_accumulators.NUM_BINS + 1

ADVICE = (
  "try Encoder.is_normalized = True, a lower learning rate or a warm-up, "
  "BatchAllTripletLoss before BatchHardTripletLoss, or a soft margin; JitteredLoss "
  "around the loss leaves a collapsed state"
)


def describe_collapse(metrics: Mapping[str, float]) -> Optional[str]:
  """Returns a description of the collapse, or None if there is none.

  Args:
    metrics: including those of `MiningStatistics`, if they are on.
  """
  duplicates = metrics.get("mining/duplicate_fraction", 0.0)
  if duplicates > _DUPLICATE_FRACTION:
    return f"{duplicates:.0%} of the pairs of a batch have equal embeddings"
  spread = metrics.get("mining/embedding_spread", 1.0)
  if spread < _SPREAD:
    return f"the embeddings differ by {spread:.1e} of their norm"
  rank = metrics.get("mining/embedding_rank", 2.0)
  if rank < _RANK and metrics.get("mining/hard_fraction", 0.0) > _HARD_FRACTION:
    return f"the embeddings lie on one line (effective rank {rank:.2f})"
  return None


class MinedLoss(Protocol):
  """A loss whose mining can be analysed.

  Attributes:
    comparison: compares an anchor and a candidate.
    margin: of its triplets, in units of the comparison; None if it has none.
  """

  comparison: PairwiseMetric

  @property
  def margin(self) -> Optional[float]:
    """Margin of its triplets, see above."""

  def __call__(self, anchors: Anchors, candidates: Candidates) -> LossOutput:
    """Computes the loss."""


@gin.register
class MiningStatistics:
  """Mining statistics of anchors sampled at equal intervals from the global batch.

  The sampled anchors depend only on the number of candidates, so that any number of
  replicas logs the same values. They are compared with the global batch and not with a
  cross-batch memory, so that values with and without one are comparable. Distances are
  Euclidean, between unmodified embeddings. Only comparisons of a positive with a
  negative use the loss's own metric.

  Args:
    num_anchors: approximate number of anchors of the global batch; all of a smaller
      one.
    every_steps: interval in steps; statistics are computed in the first step of each.

  Raises:
    UserError: an argument is below 1.
  """

  def __init__(self, *, num_anchors: int = 32, every_steps: int = 10):
    if num_anchors < 1 or every_steps < 1:
      raise UserError(
        f"MiningStatistics.num_anchors={num_anchors} and every_steps={every_steps} "
        "must be at least 1; for no statistics set TrainStep.mining_statistics = None."
      )
    self._num_anchors = num_anchors
    self._every_steps = every_steps
    self._compiled_fn = tf.function(_sums, jit_compile=True, autograph=False)

  def at_step(
    self, step: tf.Tensor, loss: MinedLoss, anchors: Anchors, candidates: Candidates
  ) -> Mapping[str, Any]:
    """Computes the statistics if the step is the first of its interval, else zeros.

    Args:
      step: [] integer, number of steps done.
      loss: its comparison and margin are used.
      anchors: as in `__call__`.
      candidates: as in `__call__`.
    """
    compute = tf.function(lambda: self(loss, anchors, candidates), autograph=False)
    specs = compute.get_concrete_function().structured_outputs

    def zeros() -> Mapping[str, Any]:
      return tf.nest.map_structure(lambda each: tf.zeros(each.shape, each.dtype), specs)

    return tf.cond(tf.equal(step % self._every_steps, 0), compute, zeros)

  def __call__(
    self, loss: MinedLoss, anchors: Anchors, candidates: Candidates
  ) -> Mapping[str, Any]:
    """Computes the statistics, by metric name, without gradient.

    Args:
      loss: its comparison and margin are used.
      anchors: A of them, contiguous among the candidates; padding is left out.
      candidates: C of them.
    """
    is_real = anchors.weights > 0.0
    anchors = anchors._replace(embeddings=_fixed(is_real, anchors.embeddings))
    candidates = candidates._replace(
      embeddings=_fixed(candidates.is_valid, candidates.embeddings)
    )
    sample, candidates = self._sample(anchors, candidates)
    lists = positive_lists(sample, candidates)
    if lists is None:
      lists = lists_of_pairs(pair_masks(sample, candidates).is_positive)
    is_large = (num_pairs(sample, candidates) or 0) >= MIN_PAIRS_TO_COMPILE
    sums, segments, shares = (self._compiled_fn if is_large else _sums)(
      sample,
      candidates,
      comparison=loss.comparison,
      margin=loss.margin,
      lists=lists,
    )
    # XLA on a CPU scatters one by one, so this is outside the compiled function.
    counts = tf.math.unsorted_segment_sum(shares, segments, _NUM_SEGMENTS)
    positive, negative, _ = tf.split(counts, [metric_accumulators.NUM_BINS] * 2 + [1])
    norms = tf.norm(anchors.embeddings, axis=1)
    return {
      **sums,
      "mining/embedding_norm": metric_accumulators.moments(norms, is_real),
      "mining/positive_distance": metric_accumulators.Histogram(positive),
      "mining/negative_distance": metric_accumulators.Histogram(negative),
    }

  def _sample(
    self, anchors: Anchors, candidates: Candidates
  ) -> tuple[Anchors, Candidates]:
    """Selects every n-th local anchor; the rest of the N have weight 0."""
    num_anchors, num_candidates = anchors.labels.shape[0], candidates.labels.shape[0]
    stride = -(-num_candidates // min(self._num_anchors, num_candidates))
    first = -candidates.positions[0] % stride
    rows = first + stride * tf.range(-(-num_anchors // stride))
    is_here = rows < num_anchors
    rows = tf.minimum(rows, num_anchors - 1)
    sample = Anchors(*(tf.gather(each, rows) for each in anchors))
    sample = sample._replace(weights=tf.where(is_here, sample.weights, 0.0))
    return sample, candidates.of_anchors(rows)


def _fixed(is_real: tf.Tensor, embeddings: tf.Tensor) -> tf.Tensor:
  """Returns embeddings without gradient, and 0 for padding, which may hold anything."""
  embeddings = tf.stop_gradient(tf.cast(embeddings, tf.float32))
  return tf.where(is_real[:, None], embeddings, 0.0)


def _sums(anchors, candidates, *, comparison, margin, lists):  # type: ignore[no-untyped-def]
  """Computes sums over [N] anchors, and the histogram bins of their N · C pairs."""
  pairs = pair_masks(anchors, candidates, lists)
  counts = anchors.weights > 0.0
  pairs = pairs._replace(
    is_positive=tf.logical_and(pairs.is_positive, counts[:, None]),
    is_negative=tf.logical_and(pairs.is_negative, counts[:, None]),
  )
  distances = exact_euclidean(anchors.embeddings, candidates.embeddings)
  compared = comparison.distance_fn(
    comparison(anchors.embeddings, candidates.embeddings)
  )
  sums = {
    **_of_distances(distances, pairs, counts),
    **_of_triplets(compared, pairs, margin),
    "mining/embedding": metric_accumulators.covariance(anchors.embeddings, counts),
  }
  return sums, *_places(distances, pairs)


def _of_distances(
  distances: tf.Tensor, pairs: PairMasks, counts: tf.Tensor
) -> dict[str, WeightedMean]:
  """Computes statistics of [N, C] distances and of [N] anchors that count."""
  is_pair = tf.reshape(pairs.is_either, [-1])
  is_duplicate = tf.cast(tf.reshape(distances, [-1]) <= 0.0, tf.float32)
  farthest = tf.reduce_max(tf.where(pairs.is_positive, distances, -1.0), 1)
  nearest = tf.reduce_min(tf.where(pairs.is_negative, distances, float("inf")), 1)
  has_none = tf.cast(farthest < 0.0, tf.float32)
  return {
    "mining/hardest_positive_distance": metric_accumulators.weighted_mean(
      farthest, farthest >= 0.0
    ),
    "mining/hardest_negative_distance": metric_accumulators.weighted_mean(
      nearest, nearest < float("inf")
    ),
    "mining/duplicate_fraction": metric_accumulators.weighted_mean(
      is_duplicate, is_pair
    ),
    "mining/anchors_without_positive": metric_accumulators.weighted_mean(
      has_none, counts
    ),
  }


def _of_triplets(
  compared: tf.Tensor, pairs: PairMasks, margin: Optional[float]
) -> dict[str, WeightedMean]:
  """Computes fractions of triplets by hardness, and of violated margins."""
  infinity = float("inf")
  negatives = tf.where(pairs.is_negative, compared, infinity)
  hard = _num_below(negatives, compared, pairs, 0.0)
  num_negatives = tf.reduce_sum(tf.cast(pairs.is_negative, tf.float32), 1)
  num_positives = tf.reduce_sum(tf.cast(pairs.is_positive, tf.float32), 1)
  total = tf.reduce_sum(num_positives * num_negatives)
  shares = {"mining/hard_fraction": WeightedMean(hard, total)}
  if margin is None:
    return shares
  violated = _num_below(negatives, compared, pairs, margin)
  farthest = tf.reduce_max(tf.where(pairs.is_positive, compared, -infinity), 1)
  is_violated = farthest + margin > tf.reduce_min(negatives, 1)
  return {
    **shares,
    "mining/semi_hard_fraction": WeightedMean(violated - hard, total),
    "mining/easy_fraction": WeightedMean(total - violated, total),
    "mining/margin_violations": metric_accumulators.weighted_mean(
      tf.cast(is_violated, tf.float32), pairs.has_both
    ),
  }


def _num_below(
  negatives: tf.Tensor, compared: tf.Tensor, pairs: PairMasks, margin: float
) -> tf.Tensor:
  """Counts the triplets with d_an < d_ap + margin, [] float32."""
  lists = pairs.lists
  assert lists is not None

  def body(k: tf.Tensor, num: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    places, is_positive = lists.places(k)
    threshold = tf.where(
      is_positive, tf.gather_nd(compared, places) + margin, -float("inf")
    )
    is_below = tf.cast(negatives < threshold[:, None], tf.float32)
    return k + 1, num + tf.reduce_sum(is_below)

  return tf.while_loop(
    lambda k, _: k < tf.reduce_max(lists.sizes), body, (tf.constant(0), tf.zeros([]))
  )[1]


def _places(distances: tf.Tensor, pairs: PairMasks) -> tuple[tf.Tensor, tf.Tensor]:
  """Returns bins [2 · N · C] int32 and their increments, float32, two per pair.

  Bins of positives come first, then those of negatives, then the last for other pairs.
  """
  lower, share = metric_accumulators.bins_of(distances)
  first = tf.where(pairs.is_negative, metric_accumulators.NUM_BINS, 0) + lower
  rest = 2 * metric_accumulators.NUM_BINS
  bins = [tf.where(pairs.is_either, first + upper, rest) for upper in (0, 1)]
  return tf.reshape(bins, [-1]), tf.reshape([1.0 - share, share], [-1])
