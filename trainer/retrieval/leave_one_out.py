"""Leave-one-out retrieval: each item looks for the others of its class.

Shapes: G items, D dimensions, Q queries of a tile, k neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trainer.errors import UserError
from trainer.retrieval import metrics
from trainer.retrieval.search import nearest_others


def evaluate_leave_one_out(
  embeddings: np.ndarray, labels: np.ndarray, *, recall_ks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
  """Recall@k, MAP@R and R-precision, exact, in bounded memory.

  Items alone in their class are gallery only: a query without a relevant item has no
  answer, so it is counted and left out of the means.

  Args:
    embeddings: [G, D] float32, finite.
    labels: [G] int.
    recall_ks: the k of recall@k.

  Returns:
    "eval/recall_at_K", "eval/map_at_r", "eval/r_precision" as means over queries;
    "eval/num_queries" and "eval/num_queries_without_relevant".

  Raises:
    UserError: no item has another of its class, or an embedding is not finite.
  """
  if not np.isfinite(embeddings).all():
    num_bad = int((~np.isfinite(embeddings).all(axis=1)).sum())
    raise UserError(f"{num_bad} of {len(embeddings)} embeddings are not finite.")
  _, class_of, sizes = np.unique(labels, return_inverse=True, return_counts=True)
  num_relevant = sizes[class_of] - 1
  most_relevant = int(np.max(num_relevant, initial=0))
  if most_relevant < 1:
    raise UserError("Evaluation needs a class with at least two items.")
  depth = min(max(*recall_ks, most_relevant), len(labels) - 1)
  sums = np.zeros(len(recall_ks) + 2)
  for queries, neighbours in nearest_others(embeddings, num_neighbours=depth):
    has_relevant = num_relevant[queries] > 0
    queries, neighbours = queries[has_relevant], neighbours[has_relevant]
    is_relevant = labels[neighbours] == labels[queries, None]
    values = [metrics.recall_at_k(is_relevant, k) for k in recall_ks]
    values.append(metrics.average_precision_at_r(is_relevant, num_relevant[queries]))
    values.append(metrics.r_precision(is_relevant, num_relevant[queries]))
    sums += np.sum(values, axis=1)
  names = [*(f"recall_at_{k}" for k in recall_ks), "map_at_r", "r_precision"]
  num_queries = int((num_relevant > 0).sum())
  means = {f"eval/{name}": float(s) / num_queries for name, s in zip(names, sums)}
  return {
    **means,
    "eval/num_queries": num_queries,
    "eval/num_queries_without_relevant": len(labels) - num_queries,
  }
