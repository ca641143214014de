"""Pair verification and clustering metrics of embeddings.

Shapes: N items, D dimensions, C classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Optional

import gin
import numpy as np

from trainer.errors import check_at_least


@gin.register
@dataclasses.dataclass(frozen=True)
class Verification:
  """ROC of pairs, ordered by distance.

  Rates are taken within positive and within negative pairs, so they do not depend on
  the number of pairs of each kind. Of more than `max_pairs`, that many are drawn
  uniformly without replacement.

  Attributes:
    false_positive_rates: rates for which the true-positive rate is reported.
    max_pairs: limit on positive pairs, and on negative pairs.
    seed: random seed of the drawing.
  """

  false_positive_rates: Sequence[float] = (1e-1, 1e-2, 1e-3, 1e-4)
  max_pairs: int = 1_000_000
  seed: int = 0

  def measure(
    self,
    embeddings: np.ndarray,
    labels: np.ndarray,
    groups: Optional[np.ndarray] = None,
  ) -> dict[str, float]:
    """Measures a set of items.

    - roc_auc: share of (positive pair, negative pair) in which the positive pair is
      nearer; ties count half.
    - tpr_at_fpr_F: largest share of positive pairs below a threshold that has at most
      the share F of the negative pairs below it.
    - best_threshold: the largest distance of pairs classified as positive that
      maximizes best_balanced_accuracy, (true-positive rate + true-negative rate) / 2.

    Args:
      embeddings: [N, D] float32, finite.
      labels: [N] int.
      groups: [N] int; pairs with equal label and equal group are excluded; None to
        exclude no pairs.

    Returns:
      Metrics by name, prefixed by "eval/"; empty if one kind of pair does not exist.
    """
    positives, negatives = self._pairs(np.asarray(labels))
    if groups is not None:
      positives = positives[groups[positives[:, 0]] != groups[positives[:, 1]]]
    if not len(positives) or not len(negatives):
      return {}
    distances = [_distances(embeddings, pairs) for pairs in (positives, negatives)]
    is_positive = np.repeat([1, 0], [len(each) for each in distances])
    nearness = -np.concatenate(distances)
    from sklearn import metrics  # Imported late: loading takes half a second.

    false_rates, true_rates, thresholds = metrics.roc_curve(
      is_positive, nearness, drop_intermediate=False
    )
    # The first threshold is below all distances.
    best = 1 + int(np.argmax((true_rates - false_rates)[1:]))
    found = {
      "eval/roc_auc": metrics.auc(false_rates, true_rates),
      "eval/best_threshold": -thresholds[best],
      "eval/best_balanced_accuracy": (1 + true_rates[best] - false_rates[best]) / 2,
    }
    for rate in self.false_positive_rates:
      last = np.searchsorted(false_rates, rate, side="right") - 1
      found[_tpr_at(rate)] = true_rates[last]
    return {name: float(value) for name, value in found.items()}

  def metric_names(self) -> list[str]:
    """Returns the names of the metrics."""
    of_thresholds = ("roc_auc", "best_threshold", "best_balanced_accuracy")
    return [
      *(f"eval/{name}" for name in of_thresholds),
      *map(_tpr_at, self.false_positive_rates),
    ]

  def _pairs(self, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns [n, 2] positive and [m, 2] negative pairs of items, each pair once."""
    check_at_least("Verification.max_pairs", self.max_pairs, 1)
    rng = np.random.default_rng(self.seed)
    order = np.argsort(labels, kind="stable")
    _, class_of, sizes = np.unique(
      labels[order], return_inverse=True, return_counts=True
    )
    positions = np.arange(len(labels))
    ends = np.cumsum(sizes)[class_of]
    # For an item in class order: the rest of its class, then all later classes.
    ranges = ((positions + 1, ends - positions - 1), (ends, len(labels) - ends))
    positives, negatives = (
      order[_drawn_pairs(firsts, counts, self.max_pairs, rng)]
      for firsts, counts in ranges
    )
    return positives, negatives


def _tpr_at(false_positive_rate: float) -> str:
  return f"eval/tpr_at_fpr_{false_positive_rate:g}"


def _drawn_pairs(
  firsts: np.ndarray, counts: np.ndarray, max_pairs: int, rng: np.random.Generator
) -> np.ndarray:
  """Returns pairs of places: all, or `max_pairs` drawn uniformly without replacement.

  Args:
    firsts: [N] int64, the first partner of each place; the others follow it.
    counts: [N] int64, the number of its partners.
    max_pairs: the largest number of pairs returned.
    rng: draws them.

  Returns:
    [n, 2] int64, ordered by the first place.
  """
  last_numbers = np.cumsum(counts)
  num_pairs = int(counts.sum())
  numbers = _distinct(num_pairs, min(max_pairs, num_pairs), rng)
  positions = np.searchsorted(last_numbers, numbers, side="right")
  partners = numbers - last_numbers[positions] + counts[positions] + firsts[positions]
  return np.stack([positions, partners], axis=1)


def _distinct(population: int, size: int, rng: np.random.Generator) -> np.ndarray:
  """Draws a uniform set of distinct numbers below `population`, [size] int64 ascending.

  Memory grows with the size, not with the population.
  """
  if population <= 4 * size:
    return np.sort(rng.permutation(population)[:size])
  found = np.empty(0, np.int64)
  # Each round draws exactly the missing count, so no number is dropped by its size.
  while len(found) < size:
    drawn = rng.integers(population, size=size - len(found))
    found = np.union1d(found, drawn)
  return found


def _distances(embeddings: np.ndarray, pairs: np.ndarray) -> np.ndarray:
  """Computes Euclidean distances [n] float64, from float64 differences."""
  parts = np.array_split(pairs, max(1, len(pairs) // 50_000))
  distances = []
  for part in parts:
    differences = embeddings[part[:, 0]].astype(np.float64) - embeddings[part[:, 1]]
    distances.append(np.sqrt(np.einsum("nd,nd->n", differences, differences)))
  return np.concatenate(distances)


@gin.register
@dataclasses.dataclass(frozen=True)
class Clustering:
  """Normalised mutual information of k-means clusters, k = C, and classes.

  NMI = 2 I(cluster; class) / (H(cluster) + H(class)). Each k-means iteration costs N ×
  C distances, so of more than `max_items` items, whole classes are drawn up to that
  number.

  Attributes:
    max_items: the largest N.
    seed: random seed of the first centres and of the drawing.

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
      "eval/nmi", in [0, 1]; empty if there is only one class.
    """
    from sklearn import cluster, metrics  # Imported late: loading takes half a second.

    kept = self._drawn(np.asarray(labels))
    labels = labels[kept]
    num_classes = len(np.unique(labels))
    if num_classes < 2:
      return {}
    means = cluster.KMeans(num_classes, n_init=1, random_state=self.seed)
    clusters = means.fit_predict(embeddings[kept])
    return {"eval/nmi": float(metrics.normalized_mutual_info_score(labels, clusters))}

  def metric_names(self) -> list[str]:
    """Returns the names of the metrics."""
    return ["eval/nmi"]

  def _drawn(self, labels: np.ndarray) -> np.ndarray:
    """Returns the items of the drawn classes, int64."""
    if len(labels) <= self.max_items:
      return np.arange(len(labels))
    classes, class_of, sizes = np.unique(
      labels, return_inverse=True, return_counts=True
    )
    order = np.random.default_rng(self.seed).permutation(len(classes))
    num_kept = max(2, int(np.sum(np.cumsum(sizes[order]) <= self.max_items)))
    return np.flatnonzero(np.isin(class_of, order[:num_kept]))
