"""How good a ranking is, by the relevance of its items.

Shapes: Q queries, k neighbours; R_q, the number of items relevant to query q.
"""

from __future__ import annotations

import numpy as np


def recall_at_k(is_relevant: np.ndarray, k: int) -> np.ndarray:
  """Whether any of the k nearest is relevant (also: hit rate, CMC@k).

  Args:
    is_relevant: [Q, >= k] bool, nearest first.
    k: how many neighbours count.

  Returns:
    [Q] float64, 0 or 1.
  """
  return is_relevant[:, :k].any(axis=1).astype(np.float64)


def r_precision(is_relevant: np.ndarray, num_relevant: np.ndarray) -> np.ndarray:
  """Share of relevant items among the R_q nearest.

  Args:
    is_relevant: [Q, >= max R_q] bool, nearest first.
    num_relevant: [Q] int, R_q >= 1.

  Returns:
    [Q] float64.
  """
  within = np.arange(is_relevant.shape[1]) < num_relevant[:, None]
  return (is_relevant & within).sum(axis=1) / num_relevant


def average_precision_at_r(
  is_relevant: np.ndarray, num_relevant: np.ndarray
) -> np.ndarray:
  """AP@R: 1/R_q Σ_{i <= R_q} precision@i · [item i is relevant].

  Its mean over queries is MAP@R.

  Args:
    is_relevant: [Q, >= max R_q] bool, nearest first.
    num_relevant: [Q] int, R_q >= 1.

  Returns:
    [Q] float64.

  Source: Musgrave et al. 2020, https://arxiv.org/abs/2003.08505
  """
  ranks = np.arange(1, is_relevant.shape[1] + 1)
  precision = np.cumsum(is_relevant, axis=1) / ranks
  counted = is_relevant & (ranks <= num_relevant[:, None])
  return np.where(counted, precision, 0.0).sum(axis=1) / num_relevant
