"""Ranks of the relevant items of each query, and the metrics computed from them.

Every metric of a ranking follows from these ranks. The ranking itself is never stored,
so neither its length nor the size of a class is limited.

Shapes: N items, Q queries with relevant items, G gallery items, D dimensions, R items
relevant to a query, n some queries or irrelevant items, M metrics.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent import futures
from typing import Any, Callable, NamedTuple, Optional, Protocol

import numpy as np

from trainer.errors import UserError
from trainer.retrieval import exact_distances, metrics
from trainer.retrieval.exact_distances import ROUNDOFF_32, ROUNDOFF_64
from trainer.retrieval.ground_truth import LabelGroundTruth
from trainer.retrieval.metrics import bootstrap_intervals
from trainer.runtime import watchdog

# Distances held at once, 256 MB.
_MAX_DISTANCES = 64_000_000
# Up to this many relevant items, counting nearer items is faster than sorting.
_MAX_COUNTED = 64
# Up to this share of the gallery, vector differences are faster than a float64 product.
_MAX_SHARE_UNDECIDED = 1 / 32
# Parts of the distances in memory, distributed to threads.
_NUM_PARTS = 16

# Buffered ranks, grouped by the number of relevant items, 32 MB.
_MAX_RANKS = 4_000_000

_RANKING_METRICS = {
  "map": metrics.average_precision,
  "map_at_r": metrics.average_precision_at_r,
  "r_precision": metrics.r_precision,
  "mrr": metrics.reciprocal_rank,
}
_METRICS_AT_K = {
  "recall_at": metrics.recall_at_k,
  "precision_at": metrics.precision_at_k,
  "set_recall_at": metrics.set_recall_at_k,
  "map_at": metrics.average_precision_at_k,
  "ndcg_at": metrics.ndcg_at_k,
}


class GroundTruth(Protocol):
  """Protocol of the relevant and excluded gallery items of each query."""

  def relevant_and_excluded(self, query: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the relevant and the excluded items of a query.

    Returns:
      [R] int64, distinct gallery items that are relevant; and int64 gallery items that
      are excluded from the query's gallery, none of them relevant.
    """


def ranks_of_relevant(
  queries: np.ndarray,
  gallery: np.ndarray,
  ground_truth: GroundTruth,
  *,
  max_distances: int = _MAX_DISTANCES,
) -> Iterator[np.ndarray]:
  """Yields the exact ranks of each query's relevant items.

  Items are ordered by Euclidean distance, computed from float64 differences of the
  vectors; among equal distances the lower gallery index comes first. Items that float32
  products cannot distinguish are compared in float64.

  Args:
    queries: [Q, D] float32, finite.
    gallery: [G, D] float32, finite.
    ground_truth: ground truth of each query by its number.
    max_distances: the largest number of distances held at once.

  Yields:
    [R] int64 ranks of each query in order, ascending, from 1.
  """
  ranking = _Ranking(queries, gallery, ground_truth)
  num_rows = max(1, min(len(queries), max_distances // max(1, len(gallery))))
  buffer = np.empty([num_rows, len(gallery)], np.float32)
  with futures.ThreadPoolExecutor(os.cpu_count()) as threads:
    for start in range(0, len(queries), num_rows):
      watchdog.beat()
      nearness = ranking.nearness(start, buffer[: len(queries) - start])
      parts = np.array_split(nearness, min(len(nearness), _NUM_PARTS))
      firsts = start + np.cumsum([0, *map(len, parts[:-1])])
      for found in threads.map(ranking.ranks, firsts.tolist(), parts):
        yield from found


class _Ranking:
  """Queries and their gallery, after subtracting the common offset of all items."""

  def __init__(
    self, queries: np.ndarray, gallery: np.ndarray, ground_truth: GroundTruth
  ):
    self._queries, self._gallery = queries, gallery
    self._ground_truth = ground_truth
    self._offset = exact_distances.common_offset(gallery)
    self._items = gallery - self._offset
    squares = np.einsum("gd,gd->g", self._items, self._items, dtype=np.float64)
    self._half_norms = (0.5 * squares).astype(np.float32)
    self._largest_norm = float(squares.max(initial=0.0)) ** 0.5
    is_exact = exact_distances.is_exact_in_float32(self._offset, queries, gallery)
    self._roundoff = 0.0 if is_exact else ROUNDOFF_32

  def nearness(self, start: int, out: np.ndarray) -> np.ndarray:
    """Computes ‖g‖² / 2 − ⟨q, g⟩ of queries from `start` on, into [n, G] float32."""
    rows = self._queries[start : start + len(out)] - self._offset
    np.matmul(rows, self._items.T, out=out)
    return np.subtract(self._half_norms, out, out=out)

  def ranks(self, start: int, nearness: np.ndarray) -> list[np.ndarray]:
    """Returns the ranks of the queries from `start` on.

    Args:
      start: the first query.
      nearness: [n, G] float32, is overwritten.
    """
    centred = self._queries[start : start + len(nearness)] - self._offset
    norms = np.sqrt(np.einsum("qd,qd->q", centred, centred, dtype=np.float64)).tolist()
    found: list[Optional[np.ndarray]] = []
    for row, norm in enumerate(norms):
      found.append(self._ranks(start + row, nearness[row], norm, self._roundoff))
      if found[-1] is None:  # Most of the others will be undecided, too.
        break
    found += [None] * (len(norms) - len(found))
    undecided = [row for row, ranks in enumerate(found) if ranks is None]
    if undecided:
      queries = start + np.array(undecided)
      exact = exact_distances.nearness_in_float64(
        self._queries[queries], self._gallery, self._offset
      )
      for row, values in zip(undecided, np.concatenate(list(exact), axis=1)):
        found[row] = self._ranks(start + row, values, norms[row], ROUNDOFF_64)
    return [ranks for ranks in found if ranks is not None]

  def _ranks(
    self, query: int, nearness: np.ndarray, norm: float, roundoff: float
  ) -> Optional[np.ndarray]:
    """Returns the ranks of a query; None if float32 leaves too much undecided.

    Two items whose nearness differs by more than two errors are in their true order.
    For each relevant item, others within this range are compared by their true
    distances.

    Args:
      query: its number.
      nearness: [G] float32 or float64, is overwritten.
      norm: norm of the query, after subtracting the offset.
      roundoff: of the nearness; 0 if it is exact.
    """
    relevant, excluded = self._ground_truth.relevant_and_excluded(query)
    if not len(relevant):
      return np.empty(0, np.int64)
    relevant = relevant[np.argsort(nearness[relevant])]
    of_relevant = nearness[relevant]
    nearness[excluded] = nearness[relevant] = np.inf
    error = self._error(norm, float(of_relevant[-1]), roundoff)
    if roundoff == ROUNDOFF_32 and not error < np.inf:
      return None
    low, high = (
      (of_relevant + sign * 2.0 * error).astype(of_relevant.dtype) for sign in (-1, 1)
    )
    # Skip items farther than all relevant ones: the majority in a trained space.
    candidates = np.flatnonzero(
      nearness <= min(high[-1], np.finfo(of_relevant.dtype).max)
    )
    others = nearness[candidates]
    num_nearer, num_possibly_nearer = _counts(others, low, high)
    is_open = num_nearer < num_possibly_nearer
    if is_open.any():
      limit = _MAX_SHARE_UNDECIDED * len(nearness)
      if roundoff == ROUNDOFF_32 and (num_possibly_nearer - num_nearer).sum() > limit:
        return None
      is_close = _is_between(others, low[is_open], high[is_open])
      items = np.append(candidates[is_close], relevant[is_open])
      values = np.append(others[is_close], of_relevant[is_open])
      if roundoff:
        values = exact_distances.squared_distances(
          self._queries[query, None], self._gallery, items[None]
        )[0]
      nearer_before = np.searchsorted(np.sort(others[is_close]), low[is_open])
      nearer = _num_before(values, items, np.count_nonzero(is_close))
      num_nearer[is_open] += nearer - nearer_before
    return np.sort(num_nearer) + np.arange(1, len(num_nearer) + 1)

  def _error(self, norm: float, farthest: float, roundoff: float) -> float:
    """Returns the error bound for items up to the farthest relevant one."""
    if not roundoff:
      return 0.0
    reach = 1.01 * (norm + max(0.0, 2.0 * farthest + norm**2) ** 0.5)
    longest = min(self._largest_norm, reach)
    num_dimensions = self._gallery.shape[1]
    return float(exact_distances.product_error(num_dimensions, norm, longest, roundoff))


def _counts(
  others: np.ndarray, low: np.ndarray, high: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Counts the others [n] below each low and up to each high, [R] int64 each."""
  if len(low) > _MAX_COUNTED:
    in_order = np.sort(others)
    return np.searchsorted(in_order, low), np.searchsorted(in_order, high, "right")
  below = [np.count_nonzero(others < each) for each in low]
  up_to = [np.count_nonzero(others <= each) for each in high]
  return np.array(below, np.int64), np.array(up_to, np.int64)


def _is_between(others: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
  """Returns which of others [n] are between low and high, [R] each, ascending."""
  is_between = np.zeros(len(others), bool)
  if len(low) <= _MAX_COUNTED:
    for lowest, highest in zip(low, high):
      is_between |= (others >= lowest) & (others <= highest)
    return is_between
  order = np.argsort(others)
  in_order = others[order]
  firsts = np.searchsorted(in_order, low)
  ends = np.searchsorted(in_order, high, "right")
  opened, closed = (
    np.bincount(each, minlength=len(others) + 1) for each in (firsts, ends)
  )
  is_between[order] = np.cumsum(opened - closed)[:-1] > 0
  return is_between


def _num_before(values: np.ndarray, items: np.ndarray, num_others: int) -> np.ndarray:
  """Counts the others before each relevant item, [R] int64.

  Args:
    values: [n + R], of the others and then of the relevant items.
    items: [n + R] int64; of equal values the lower item comes first.
    num_others: n.
  """
  order = np.lexsort((items, values))
  num_before = np.empty(len(order), np.int64)
  num_before[order] = np.cumsum(order < num_others)
  return num_before[num_others:]


class Rankings(NamedTuple):
  """Ranking metrics of each query.

  Attributes:
    names: [M] of the metrics, prefixed by "eval/".
    values: [Q, M] float64.
    queries: [Q] int64, the query items.
    queries_without_relevant: int64, query items without relevant items.
  """

  names: list[str]
  values: np.ndarray
  queries: np.ndarray
  queries_without_relevant: np.ndarray

  def means(self) -> dict[str, float]:
    """Returns each metric over all queries, and the number of queries."""
    return {
      **self._by_name(self.values.mean(axis=0)),
      "eval/num_queries": len(self.queries),
      "eval/num_queries_without_relevant": len(self.queries_without_relevant),
    }

  def intervals(self) -> dict[str, list[float]]:
    """Returns low and high of each metric; see `trainer.retrieval.metrics`."""
    return self._by_name(bootstrap_intervals(self.values))

  def by_group(self, groups: np.ndarray) -> dict[Any, dict[str, float]]:
    """Returns metrics per group of queries, the worst recall@1 and MAP@R first.

    Args:
      groups: [N] of every item, such as its class.

    Returns:
      Metrics by group, including "num_queries".
    """
    found, group_of, counts = np.unique(
      groups[self.queries], return_inverse=True, return_counts=True
    )
    starts = np.cumsum(counts) - counts
    in_order = self.values[np.argsort(group_of, kind="stable")]
    means = np.add.reduceat(in_order, starts, axis=0) / counts[:, None]
    rows = {
      group: {"num_queries": int(count), **self._by_name(mean)}
      for group, count, mean in zip(found, counts, means)
    }
    firsts = [n for n in ("eval/recall_at_1", "eval/map_at_r") if n in self.names]
    return dict(sorted(rows.items(), key=lambda row: [row[1][n] for n in firsts]))

  def _by_name(self, values: np.ndarray) -> dict[str, Any]:
    return dict(zip(self.names, values.tolist()))


def rank(
  embeddings: np.ndarray, ground_truth: LabelGroundTruth, *, ks: Sequence[int]
) -> Rankings:
  """Ranks the gallery for every query, exactly, in bounded memory.

  A query without relevant items is excluded from the means and reported.

  Args:
    embeddings: [N, D] float32.
    ground_truth: queries, gallery and ground truth.
    ks: the k of recall@k and similar metrics.

  Returns:
    The metrics of each query.

  Raises:
    UserError: an embedding is not finite, a k is below 1, or no query has relevant
      items.
  """
  check_finite(embeddings)
  functions = _functions(ks).values()
  queries, gallery = embeddings[ground_truth.queries], embeddings[ground_truth.gallery]
  values = np.zeros([len(queries), len(functions)])
  has_relevant = np.zeros(len(queries), bool)
  for rows, ranks in _group_by_count(ranks_of_relevant(queries, gallery, ground_truth)):
    has_relevant[rows] = True
    values[rows] = np.stack([function(ranks) for function in functions], axis=1)
  if not has_relevant.any():
    raise UserError(
      f"None of {len(queries)} queries has a relevant item; evaluation needs a class "
      "with at least two items."
    )
  return Rankings(
    metric_names(ks),
    values[has_relevant],
    ground_truth.queries[has_relevant],
    ground_truth.queries[~has_relevant],
  )


def metric_names(ks: Sequence[int]) -> list[str]:
  """Returns the names of a query's metrics, such as "eval/recall_at_1".

  Args:
    ks: the k of recall@k and similar metrics.

  Raises:
    UserError: a k is below 1.
  """
  return [f"eval/{name}" for name in _functions(ks)]


def check_finite(embeddings: np.ndarray) -> None:
  """Checks that no embedding has a NaN or an infinity.

  Args:
    embeddings: [N, D].

  Raises:
    UserError: some embeddings do; reports their number.
  """
  num_bad = int((~np.isfinite(embeddings).all(axis=1)).sum())
  if num_bad:
    raise UserError(
      f"{num_bad} of {len(embeddings)} embeddings are not finite; the training "
      "diverged: use an earlier checkpoint."
    )


def _group_by_count(
  found: Iterable[np.ndarray],
) -> Iterator[tuple[list[int], np.ndarray]]:
  """Groups queries by their number of relevant items R > 0.

  Args:
    found: ranks [R] of each query in order.

  Yields:
    Numbers of queries [n], and their ranks [n, R].
  """
  waiting: dict[int, list[tuple[int, np.ndarray]]] = {}
  num_waiting = 0
  for query, ranks in enumerate(found):
    if len(ranks):
      waiting.setdefault(len(ranks), []).append((query, ranks))
      num_waiting += len(ranks)
    if num_waiting > _MAX_RANKS:
      yield from map(_stack, waiting.values())
      waiting, num_waiting = {}, 0
  yield from map(_stack, waiting.values())


def _stack(rows: list[tuple[int, np.ndarray]]) -> tuple[list[int], np.ndarray]:
  queries, ranks = zip(*rows)
  return list(queries), np.stack(ranks)


def _functions(ks: Sequence[int]) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
  """Returns a function from ranks [..., R] to [...] for each metric name."""
  if not ks or min(ks) < 1:
    raise UserError(f"evaluate.ks={tuple(ks)} must have numbers of at least 1.")
  found: dict[str, Callable[[np.ndarray], np.ndarray]] = {}
  for name, function in _METRICS_AT_K.items():
    for k in sorted(ks):
      # At k = 1 the other metrics equal recall, or recall divided by R.
      if k > 1 or name == "recall_at":
        found[f"{name}_{k}"] = functools.partial(function, k=k)
  return {**found, **_RANKING_METRICS}
