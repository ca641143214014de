"""Retrieval metrics of one query, and bootstrap intervals of their means.

Each function takes the ranks of a query's R relevant items, r_1 < r_2 < … < r_R, from
1, and returns one number. For several queries with the same R it returns one number per
query. A metric of a set of queries is the mean over them.

Shapes: [...] queries with R >= 1 relevant items each; Q queries, M metrics.
"""

from __future__ import annotations

import numpy as np

from trainer.runtime import watchdog

_NUM_RESAMPLES = 1000
_CONFIDENCE = 0.95


def recall_at_k(ranks: np.ndarray, k: int) -> np.ndarray:
  """Returns whether any of the k nearest is relevant: [r_1 <= k]; also hit rate, CMC@k.

  Args:
    ranks: [..., R] int, ascending.
    k: number of neighbours that count.

  Returns:
    [...] float, 0 or 1. All metrics of this module have this shape.

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
