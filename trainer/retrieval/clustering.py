"""Do the classes come apart by themselves? Clusters of the embeddings against them.

Shapes: N items, D dimensions, C classes.
"""

from __future__ import annotations

import dataclasses

import gin
import numpy as np


@gin.register
@dataclasses.dataclass(frozen=True)
class Clustering:
  """Normalised mutual information of k-means clusters, k = C, and classes.

  NMI = 2 I(cluster; class) / (H(cluster) + H(class)). Costs N × C distances a round, so
  of more than `max_items`, whole classes are drawn until there are so many.

  Attributes:
    max_items: N at most.
    seed: of the first centres, and of the drawing.

  Source: Manning et al. 2008, Introduction to Information Retrieval, chapter 16.3
  """

  max_items: int = 20_000
  seed: int = 0

  def measure(self, embeddings: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Measures a set of items.

    Args:
      embeddings: [N, D] float32, finite.
      labels: [N] int.

    Returns:
      "eval/nmi", in [0, 1]; one class gives nothing.
    """
    from sklearn import cluster, metrics  # Late: it takes half a second to load.

    kept = self._drawn(np.asarray(labels))
    labels = labels[kept]
    num_classes = len(np.unique(labels))
    if num_classes < 2:
      return {}
    means = cluster.KMeans(num_classes, n_init=1, random_state=self.seed)
    clusters = means.fit_predict(embeddings[kept])
    return {"eval/nmi": float(metrics.normalized_mutual_info_score(labels, clusters))}

  def metric_names(self) -> list[str]:
    """The names of what is measured."""
    return ["eval/nmi"]

  def _drawn(self, labels: np.ndarray) -> np.ndarray:
    """Int64 items of whole classes."""
    if len(labels) <= self.max_items:
      return np.arange(len(labels))
    classes, class_of, sizes = np.unique(
      labels, return_inverse=True, return_counts=True
    )
    order = np.random.default_rng(self.seed).permutation(len(classes))
    num_kept = max(2, int(np.sum(np.cumsum(sizes[order]) <= self.max_items)))
    return np.flatnonzero(np.isin(class_of, order[:num_kept]))
