"""How good a ranking is, from the ranks at which it has what is relevant.

Each function takes the ranks of one query's R relevant items, r_1 < r_2 < … < r_R, from
1, and gives one number; a metric of a set of queries is the mean over them.

Shapes: R relevant items of the query, R >= 1.
"""

from __future__ import annotations

import numpy as np


def recall_at_k(ranks: np.ndarray, k: int) -> float:
  """Whether any of the k nearest is relevant: [r_1 <= k]; also hit rate, CMC@k.

  Args:
    ranks: [R] int, ascending.
    k: how many neighbours count.

  Returns:
    0 or 1.

  Source: Jégou et al. 2011, Product quantization for nearest neighbor search.
  """
  return float(ranks[0] <= k)


def found_fraction_at_k(ranks: np.ndarray, k: int) -> float:
  """Share of the relevant items that are among the k nearest: |{r_j <= k}| / R.

  Information retrieval calls this recall@k.

  Args:
    ranks: [R] int, ascending.
    k: how many neighbours count.
  """
  return len(_within(ranks, k)) / len(ranks)


def precision_at_k(ranks: np.ndarray, k: int) -> float:
  """Share of the k nearest that are relevant: |{r_j <= k}| / k.

  It can't reach 1 where R < k.

  Args:
    ranks: [R] int, ascending.
    k: how many neighbours count.
  """
  return len(_within(ranks, k)) / k


def r_precision(ranks: np.ndarray) -> float:
  """Share of relevant items among the R nearest: |{r_j <= R}| / R.

  Args:
    ranks: [R] int, ascending.
  """
  return precision_at_k(ranks, len(ranks))


def average_precision(ranks: np.ndarray) -> float:
  """1/R Σ_j precision@r_j, where precision@r_j = j / r_j; its mean is MAP.

  Args:
    ranks: [R] int, ascending.
  """
  return average_precision_at_k(ranks, int(ranks[-1]))


def average_precision_at_k(ranks: np.ndarray, k: int) -> float:
  """1/min(R, k) Σ_{j: r_j <= k} j / r_j; its mean is mAP@k.

  Args:
    ranks: [R] int, ascending.
    k: how many neighbours count.
  """
  within = _within(ranks, k)
  precisions = np.arange(1, len(within) + 1) / within
  return float(precisions.sum() / min(len(ranks), k))


def average_precision_at_r(ranks: np.ndarray) -> float:
  """1/R Σ_{j: r_j <= R} j / r_j; its mean is MAP@R.

  Args:
    ranks: [R] int, ascending.

  Source: Musgrave et al. 2020, https://arxiv.org/abs/2003.08505
  """
  return average_precision_at_k(ranks, len(ranks))


def reciprocal_rank(ranks: np.ndarray) -> float:
  """1 / r_1; its mean is MRR.

  Args:
    ranks: [R] int, ascending.
  """
  return 1.0 / float(ranks[0])


def ndcg_at_k(ranks: np.ndarray, k: int) -> float:
  """Σ_{j: r_j <= k} 1/log₂(1 + r_j), over the same sum for the best ranks, 1, 2, 3 ….

  Args:
    ranks: [R] int, ascending.
    k: how many neighbours count.

  Source: Järvelin and Kekäläinen 2002, Cumulated gain-based evaluation.
  """
  best = np.arange(1, min(len(ranks), k) + 1)
  return _discounted(_within(ranks, k)) / _discounted(best)


def _within(ranks: np.ndarray, k: int) -> np.ndarray:
  """The ranks up to k, which are among the first k."""
  first = ranks[:k]
  return first[first <= k]


def _discounted(ranks: np.ndarray) -> float:
  return float(np.sum(1.0 / np.log2(1.0 + ranks)))
