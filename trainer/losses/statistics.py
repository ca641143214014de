"""What a person needs to see whether mining works, as sums over anchors.

Shapes: A anchors, C candidates, D dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import tensorflow as tf

from trainer.losses.distances import euclidean
from trainer.losses.relevance import Relevance
from trainer.losses.terms import Anchors, Candidates, Ratio, Statistic


class MiningSums(NamedTuple):
  """Statistics of some anchors, without gradient, which add up over tiles.

  Attributes:
    hardest_positive_distance: Euclidean, over the anchors that have a positive.
    hardest_negative_distance: Euclidean, over the anchors that have a negative.
    embedding_norm: over all anchors.
  """

  hardest_positive_distance: Ratio
  hardest_negative_distance: Ratio
  embedding_norm: Ratio


def mining_sums(
  anchors: Anchors, candidates: Candidates, pairs: Relevance
) -> MiningSums:
  """The statistics of these anchors.

  Args:
    anchors: A of them; those of weight 0 are left out.
    candidates: C of them.
    pairs: [A, C], which candidates are positives and which negatives.
  """
  embeddings = tf.stop_gradient(anchors.embeddings)
  distances = euclidean(embeddings, tf.stop_gradient(candidates.embeddings))
  counts = anchors.weights > 0.0
  farthest = tf.reduce_max(tf.where(pairs.is_positive, distances, -1.0), 1)
  nearest = tf.reduce_min(tf.where(pairs.is_negative, distances, float("inf")), 1)
  return MiningSums(
    _mean(farthest, counts & (farthest >= 0.0)),
    _mean(nearest, counts & (nearest < float("inf"))),
    _mean(tf.norm(embeddings, axis=1), counts),
  )


def named(sums: MiningSums) -> dict[str, Statistic]:
  """The statistics by metric name."""
  return {f"mining/{name}": value for name, value in sums._asdict().items()}


def summarize(statistics: Mapping[str, Any]) -> dict[str, float]:
  """The values of statistics that were added up over steps and replicas.

  Args:
    statistics: by metric name, NumPy scalars.

  Returns:
    By metric name; those of which nothing was counted are left out.
  """
  return {
    name: float(ratio.total / ratio.count)
    for name, ratio in statistics.items()
    if ratio.count > 0
  }


def _mean(values: tf.Tensor, counts: tf.Tensor) -> Ratio:
  return Ratio(
    tf.reduce_sum(tf.where(counts, values, 0.0)),
    tf.reduce_sum(tf.cast(counts, tf.float32)),
  )
