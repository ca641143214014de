"""Rankings and metrics by loops, from their definitions."""

from __future__ import annotations

import math

import numpy as np


def hits_of(query, gallery, relevant, excluded):
  """Returns whether each gallery item is relevant, nearest first."""
  squares = [(float(((item - query) ** 2).sum()), n) for n, item in enumerate(gallery)]
  order = [place for _, place in sorted(squares) if place not in excluded]
  return [place in relevant for place in order]


def recall_at_k(hits, k):
  return 1.0 if True in hits[:k] else 0.0


def precision_at_k(hits, k):
  return hits[:k].count(True) / k


def set_recall_at_k(hits, k):
  return hits[:k].count(True) / hits.count(True)


def average_precision_at_k(hits, k):
  total = 0.0
  for rank in range(1, min(k, len(hits)) + 1):
    if hits[rank - 1]:
      total += hits[:rank].count(True) / rank
  return total / min(hits.count(True), k)


def ndcg_at_k(hits, k):
  ideal = sorted(hits, reverse=True)
  gains = [
    sum(h / math.log2(i + 2) for i, h in enumerate(x[:k])) for x in (hits, ideal)
  ]
  return gains[0] / gains[1]


def reciprocal_rank(hits):
  return 1 / (hits.index(True) + 1)


def expected(hits, ks):
  """Returns every metric of one query, by name."""
  num_relevant = hits.count(True)
  found = {
    "eval/map": average_precision_at_k(hits, len(hits))
    * min(num_relevant, len(hits))
    / num_relevant,
    "eval/map_at_r": average_precision_at_k(hits, num_relevant),
    "eval/r_precision": precision_at_k(hits, num_relevant),
    "eval/mrr": reciprocal_rank(hits),
  }
  for k in ks:
    found[f"eval/recall_at_{k}"] = recall_at_k(hits, k)
    if k > 1:
      found[f"eval/precision_at_{k}"] = precision_at_k(hits, k)
      found[f"eval/set_recall_at_{k}"] = set_recall_at_k(hits, k)
      found[f"eval/map_at_{k}"] = average_precision_at_k(hits, k)
      found[f"eval/ndcg_at_{k}"] = ndcg_at_k(hits, k)
  return found


def means(rows):
  """Returns the mean of each metric over queries."""
  return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
