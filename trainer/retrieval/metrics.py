"""Metrics of retrieval, pair verification and clustering, and bootstrap intervals.

Each function of `ranks` takes the ranks of a query's R relevant items, r_1 < r_2 < … <
r_R, from 1, and returns one number. For several queries with the same R it returns one
number per query. A metric of a set of queries is the mean over them.

Shapes: [...] queries with R >= 1 relevant items each; Q queries, M metrics, N items, D
dimensions, C classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Optional

import gin
import numpy as np

from trainer.errors import check_at_least
from trainer.runtime import watchdog

_NUM_RESAMPLES = 1000
_CONFIDENCE = 0.95


def recall_at_k(ranks: np.ndarray, k: int) -> np.ndarray:
  """Returns whether any of the k nearest is relevant: [r_1 <= k]; also hit rate, CMC@k.

  Args:
    ranks: [..., R] int, ascending.
    k: number of neighbours that count.

  Returns:
    [...] float, 0 or 1. All functions of `ranks` have this shape.

  Source: Jégou et al. 2011, Product quantization for nearest neighbor search.
  """
  return (ranks[..., 0] <= k) * 1.0


def set_recall_at_k(ranks: np.ndarray, k: int) -> np.ndarray:
  """Returns the share of relevant items among the k nearest: |{r_j <= k}| / R.

  Information retrieval calls this recall@k.

  Args:
    ranks: [..., R] int, ascending.
    k: number of neighbours that count.
  """
  return _num_within(ranks, k) / ranks.shape[-1]


def precision_at_k(ranks: np.ndarray, k: int) -> np.ndarray:
  """Returns the share of the k nearest that are relevant: |{r_j <= k}| / k.

  It is below 1 if R < k.

  Args:
    ranks: [..., R] int, ascending.
    k: number of neighbours that count.
  """
  return _num_within(ranks, k) / k


def r_precision(ranks: np.ndarray) -> np.ndarray:
  """Returns the share of relevant items among the R nearest: |{r_j <= R}| / R.

  Args:
    ranks: [..., R] int, ascending.
  """
  return precision_at_k(ranks, ranks.shape[-1])


def average_precision(ranks: np.ndarray) -> np.ndarray:
  """Returns 1/R Σ_j precision@r_j, where precision@r_j = j / r_j; its mean is MAP.

  Args:
    ranks: [..., R] int, ascending.
  """
  return (_positions(ranks) / ranks).mean(axis=-1)


def average_precision_at_k(ranks: np.ndarray, k: int) -> np.ndarray:
  """Returns 1/min(R, k) Σ_{j: r_j <= k} j / r_j; its mean is mAP@k.

  Args:
    ranks: [..., R] int, ascending.
    k: number of neighbours that count.
  """
  first = ranks[..., :k]
  precisions = np.where(first <= k, _positions(first) / first, 0.0)
  return precisions.sum(axis=-1) / min(ranks.shape[-1], k)


def average_precision_at_r(ranks: np.ndarray) -> np.ndarray:
  """Returns 1/R Σ_{j: r_j <= R} j / r_j; its mean is MAP@R.

  Args:
    ranks: [..., R] int, ascending.

  Source: Musgrave et al. 2020, https://arxiv.org/abs/2003.08505
  """
  return average_precision_at_k(ranks, ranks.shape[-1])


def reciprocal_rank(ranks: np.ndarray) -> np.ndarray:
  """Returns 1 / r_1; its mean is MRR.

  Args:
    ranks: [..., R] int, ascending.
  """
  return 1.0 / ranks[..., 0]


def ndcg_at_k(ranks: np.ndarray, k: int) -> np.ndarray:
  """Returns Σ_{j: r_j <= k} 1/log₂(1 + r_j) relative to the best ranks, 1, 2, 3 ….

  Args:
    ranks: [..., R] int, ascending.
    k: number of neighbours that count.

  Source: Järvelin and Kekäläinen 2002, Cumulated gain-based evaluation.
  """
  first = ranks[..., :k]
  gains = np.where(first <= k, 1.0 / np.log2(1.0 + first), 0.0)
  best = 1.0 / np.log2(1.0 + _positions(first))
  return gains.sum(axis=-1) / best.sum()


def _num_within(ranks: np.ndarray, k: int) -> np.ndarray:
  """Counts the ranks up to k, which are among the first k."""
  return (ranks[..., :k] <= k).sum(axis=-1)


def _positions(ranks: np.ndarray) -> np.ndarray:
  """Returns the numbers 1, 2, 3 … up to R, [R] int."""
  return np.arange(1, ranks.shape[-1] + 1)


def bootstrap_intervals(values: np.ndarray, *, seed: int = 0) -> np.ndarray:
  """Computes 95 % percentile intervals of means, from 1,000 resamples of the queries.

  All metrics are resampled together. Queries of one class are not independent: with few
  classes, new classes vary more than these intervals.

  Args:
    values: [Q, M] float64, Q >= 1.
    seed: random seed of the resampling.

  Returns:
    [M, 2] float64, low and high.

  Source: Efron 1979, Bootstrap methods: another look at the jackknife.
  """
  rng = np.random.default_rng(seed)
  num_queries = len(values)
  means = np.empty([_NUM_RESAMPLES, values.shape[1]])
  for row in means:
    watchdog.beat()
    drawn = rng.integers(num_queries, size=num_queries)
    row[:] = np.bincount(drawn, minlength=num_queries) @ values / num_queries
  tail = 50 * (1 - _CONFIDENCE)
  return np.percentile(means, [tail, 100 - tail], axis=0).T


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
