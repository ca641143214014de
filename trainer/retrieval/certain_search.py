"""The search of `trainer.retrieval.search` by FAISS, with a proof for each query.

FAISS takes distances in float32 from a product of matrices. Of a few more items than
are asked for, distances are taken again in float64, from differences: they give the
order. That no other item belongs among the first k follows where the k-th is nearer
than anything FAISS left out, by more than its largest rounding error.

Shapes: Q queries, G gallery items, D dimensions, k neighbours, E >= k found by FAISS.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from trainer import heartbeat
from trainer.retrieval import faiss_library

# Items found beside those asked for: room between the last of these and all others.
_NUM_MORE = 16
# Queries and items given to FAISS at once: 128 MB of items at 128 dimensions.
_NUM_QUERIES, _NUM_ITEMS = 16_384, 262_144
# Numbers in float64 that are held at once, 32 MB.
_MAX_NUMBERS = 4_000_000
_UNIT_ROUNDOFF = 2.0**-24


class Found(NamedTuple):
  """What FAISS found.

  Attributes:
    indices: [Q, k] int64, nearest first; among equal ones the lower index first.
    squares: [Q, k] float64, squared distances.
    is_certain: [Q] bool, whether it is proven that no other item belongs there.
  """

  indices: np.ndarray
  squares: np.ndarray
  is_certain: np.ndarray


def search_by_faiss(
  queries: np.ndarray, gallery: np.ndarray, offset: np.ndarray, *, num_neighbours: int
) -> Found:
  """For each query the items nearest to it.

  Args:
    queries: [Q, D] float; may be mapped.
    gallery: [G, D] float; may be mapped.
    offset: [D] float32, subtracted from both before float32 is reckoned in.
    num_neighbours: k <= G.
  """
  parts = [
    _search_part(queries[start : start + _NUM_QUERIES], gallery, offset, num_neighbours)
    for start in range(0, max(1, len(queries)), _NUM_QUERIES)
  ]
  return Found(*(np.concatenate(each) for each in zip(*parts)))


def _search_part(
  queries: np.ndarray, gallery: np.ndarray, offset: np.ndarray, num_neighbours: int
) -> Found:
  num_found = min(num_neighbours + _NUM_MORE, len(gallery))
  centred = np.asarray(queries, np.float32) - offset
  indices, last = _candidates(centred, gallery, offset, num_found)
  indices, squares = _in_order(queries, gallery, indices, num_neighbours)
  if num_found == len(gallery):
    return Found(indices, squares, np.ones(len(queries), bool))
  # An item as near as the k-th is no longer than the query's length and that distance.
  kth = np.sqrt(squares[:, -1])
  reach = 2.0 * np.linalg.norm(centred.astype(np.float64), axis=1) + kth
  error = (queries.shape[1] + 8) * _UNIT_ROUNDOFF * reach**2
  return Found(indices, squares, squares[:, -1] < last - error)


def _candidates(
  centred: np.ndarray, gallery: np.ndarray, offset: np.ndarray, num_found: int
) -> tuple[np.ndarray, np.ndarray]:
  """Indices [Q, E] by FAISS, in any order; and the largest of their squares, [Q]."""
  faiss = faiss_library.load()
  indices = np.zeros([len(centred), 0], np.int64)
  squares = np.zeros([len(centred), 0], np.float32)
  for start in range(0, len(gallery), _NUM_ITEMS):
    heartbeat.beat()
    items = np.asarray(gallery[start : start + _NUM_ITEMS], np.float32) - offset
    more = faiss.knn(centred, items, min(num_found, len(items)))
    squares = np.concatenate([squares, more[0]], axis=1)
    indices = np.concatenate([indices, more[1] + start], axis=1)
    if squares.shape[1] > num_found:
      best = np.argpartition(squares, num_found - 1, axis=1)[:, :num_found]
      squares = np.take_along_axis(squares, best, axis=1)
      indices = np.take_along_axis(indices, best, axis=1)
  return indices, squares.max(axis=1, initial=0.0)


def _in_order(
  queries: np.ndarray, gallery: np.ndarray, indices: np.ndarray, num_neighbours: int
) -> tuple[np.ndarray, np.ndarray]:
  """The k nearest of [Q, E] items in float64: indices and squares [Q, k]."""
  size = (len(queries), num_neighbours)
  ordered, squares = np.empty(size, np.int64), np.empty(size)
  num_rows = max(1, _MAX_NUMBERS // (indices.shape[1] * gallery.shape[1]))
  for start in range(0, len(queries), num_rows):
    rows = slice(start, start + num_rows)
    ids = np.sort(indices[rows], axis=1)
    differences = gallery[ids].astype(np.float64)
    differences -= queries[rows, None]
    found = np.einsum("qed,qed->qe", differences, differences)
    order = np.argsort(found, axis=1, kind="stable")[:, :num_neighbours]
    ordered[rows] = np.take_along_axis(ids, order, axis=1)
    squares[rows] = np.take_along_axis(found, order, axis=1)
  return ordered, squares
