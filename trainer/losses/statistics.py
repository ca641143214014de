"""What a person needs to see whether mining works, as sums over anchors.

Shapes: A anchors, C candidates, D dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tensorflow as tf

from trainer.losses.distances import euclidean
from trainer.losses.relevance import relevance
from trainer.losses.terms import Anchors, Candidates, Ratio, Statistic


def mining_statistics(anchors: Anchors, candidates: Candidates) -> dict[str, Statistic]:
  """Statistics of this replica's anchors, without gradient.

  Args:
    anchors: A of them; those of weight 0 are left out.
    candidates: C of them.

  Returns:
    By metric name, in Euclidean distance: mean hardest positive and negative, each
    over the anchors that have one, and the mean norm.
  """
  embeddings = tf.stop_gradient(anchors.embeddings)
  distances = euclidean(embeddings, tf.stop_gradient(candidates.embeddings))
  pairs = relevance(anchors, candidates)
  counts = anchors.weights > 0.0
  farthest = tf.reduce_max(tf.where(pairs.is_positive, distances, -1.0), 1)
  nearest = tf.reduce_min(tf.where(pairs.is_negative, distances, float("inf")), 1)
  return {
    "mining/hardest_positive_distance": _mean(farthest, counts & (farthest >= 0.0)),
    "mining/hardest_negative_distance": _mean(
      nearest, counts & (nearest < float("inf"))
    ),
    "mining/embedding_norm": _mean(tf.norm(embeddings, axis=1), counts),
  }


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
