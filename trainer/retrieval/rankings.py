"""The metrics of every query, and what they come to over queries, classes, categories.

Shapes: N items, D dimensions, Q queries that have something to find, M metrics.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Callable, NamedTuple

import numpy as np

from trainer.errors import UserError
from trainer.retrieval import metrics
from trainer.retrieval.intervals import bootstrap_intervals
from trainer.retrieval.judgements import LabelJudgements
from trainer.retrieval.ranks import ranks_of_relevant

# Ranks of queries that wait until there are more with as many, 32 MB.
_MAX_RANKS = 4_000_000

_OF_RANKING = {
  "map": metrics.average_precision,
  "map_at_r": metrics.average_precision_at_r,
  "r_precision": metrics.r_precision,
  "mrr": metrics.reciprocal_rank,
}
_OF_NEAREST = {
  "recall_at": metrics.recall_at_k,
  "precision_at": metrics.precision_at_k,
  "found_fraction_at": metrics.found_fraction_at_k,
  "map_at": metrics.average_precision_at_k,
  "ndcg_at": metrics.ndcg_at_k,
}


class Rankings(NamedTuple):
  """How well each query found what is relevant to it.

  Attributes:
    names: [M] of the metrics, with "eval/" before.
    values: [Q, M] float64.
    queries: [Q] int64, the items that asked.
    unanswerable: int64, items that would ask but have nothing to find.
  """

  names: list[str]
  values: np.ndarray
  queries: np.ndarray
  unanswerable: np.ndarray

  def means(self) -> dict[str, float]:
    """Each metric over all queries, and how many queries there are."""
    return {
      **self._named(self.values.mean(axis=0)),
      "eval/num_queries": len(self.queries),
      "eval/num_queries_without_relevant": len(self.unanswerable),
    }

  def intervals(self) -> dict[str, list[float]]:
    """Low and high of each metric; see `trainer.retrieval.intervals`."""
    return self._named(bootstrap_intervals(self.values))

  def by_group(self, groups: np.ndarray) -> dict[Any, dict[str, float]]:
    """Each metric over the queries of each group, the worst recall@1 and MAP@R first.

    Args:
      groups: [N] of every item, such as its class.

    Returns:
      By group; "num_queries" among the metrics.
    """
    found, group_of, counts = np.unique(
      groups[self.queries], return_inverse=True, return_counts=True
    )
    starts = np.cumsum(counts) - counts
    in_order = self.values[np.argsort(group_of, kind="stable")]
    means = np.add.reduceat(in_order, starts, axis=0) / counts[:, None]
    rows = {
      group: {"num_queries": int(count), **self._named(mean)}
      for group, count, mean in zip(found, counts, means)
    }
    firsts = [n for n in ("eval/recall_at_1", "eval/map_at_r") if n in self.names]
    return dict(sorted(rows.items(), key=lambda row: [row[1][n] for n in firsts]))

  def _named(self, values: np.ndarray) -> dict[str, Any]:
    return dict(zip(self.names, values.tolist()))


def rank(
  embeddings: np.ndarray, judged: LabelJudgements, *, ks: Sequence[int]
) -> Rankings:
  """Ranks the gallery for every query, exactly, in bounded memory.

  A query to which nothing is relevant has no answer: it is left out of the means, and
  told.

  Args:
    embeddings: [N, D] float32.
    judged: who asks, what is found, what is relevant.
    ks: the k of recall@k and others.

  Returns:
    The metrics of each query.

  Raises:
    UserError: an embedding is not finite, a k is not possible, or no query has anything
      to find.
  """
  check_finite(embeddings)
  functions = _functions(ks).values()
  queries, gallery = embeddings[judged.queries], embeddings[judged.gallery]
  values = np.zeros([len(queries), len(functions)])
  has_relevant = np.zeros(len(queries), bool)
  for those, ranks in _equally_many(ranks_of_relevant(queries, gallery, judged)):
    has_relevant[those] = True
    values[those] = np.stack([function(ranks) for function in functions], axis=1)
  if not has_relevant.any():
    raise UserError(
      f"None of {len(queries)} queries has anything to find; evaluation needs a class "
      "with at least two items."
    )
  return Rankings(
    metric_names(ks),
    values[has_relevant],
    judged.queries[has_relevant],
    judged.queries[~has_relevant],
  )


def metric_names(ks: Sequence[int]) -> list[str]:
  """The names of the metrics of a query, such as "eval/recall_at_1".

  Args:
    ks: the k of recall@k and others.

  Raises:
    UserError: a k is not possible.
  """
  return [f"eval/{name}" for name in _functions(ks)]


def check_finite(embeddings: np.ndarray) -> None:
  """Checks that no embedding holds NaN or an infinity.

  Args:
    embeddings: [N, D].

  Raises:
    UserError: some do; they are counted.
  """
  num_bad = int((~np.isfinite(embeddings).all(axis=1)).sum())
  if num_bad:
    raise UserError(
      f"{num_bad} of {len(embeddings)} embeddings are not finite; the training that "
      "made them went wrong."
    )


def _equally_many(
  found: Iterable[np.ndarray],
) -> Iterator[tuple[list[int], np.ndarray]]:
  """Numbers of queries [n], and their ranks [n, R], for each R > 0 that there is.

  Args:
    found: ranks [R] of each query in order.
  """
  waiting: dict[int, list[tuple[int, np.ndarray]]] = {}
  num_waiting = 0
  for query, ranks in enumerate(found):
    if len(ranks):
      waiting.setdefault(len(ranks), []).append((query, ranks))
      num_waiting += len(ranks)
    if num_waiting > _MAX_RANKS:
      yield from map(_stacked, waiting.values())
      waiting, num_waiting = {}, 0
  yield from map(_stacked, waiting.values())


def _stacked(rows: list[tuple[int, np.ndarray]]) -> tuple[list[int], np.ndarray]:
  queries, ranks = zip(*rows)
  return list(queries), np.stack(ranks)


def _functions(ks: Sequence[int]) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
  """A function from ranks [..., R] to [...], by the metric's name."""
  if not ks or min(ks) < 1:
    raise UserError(f"evaluate.ks={tuple(ks)} needs numbers of at least 1.")
  found: dict[str, Callable[[np.ndarray], np.ndarray]] = {}
  for name, function in _OF_NEAREST.items():
    for k in sorted(ks):
      # Of the nearest one alone, all say the same.
      if k > 1 or name == "recall_at":
        found[f"{name}_{k}"] = functools.partial(function, k=k)
  return {**found, **_OF_RANKING}
