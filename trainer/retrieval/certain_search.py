"""A proof, for each query of a search in float32, that it found the nearest items.

A search by products in float32, on the devices or by FAISS, finds a few more items than
are asked for. Their distances are taken again in float64, from differences: they give
the order. That no other item belongs among the first k follows where the k-th is nearer
than anything that was not found, by more than the largest rounding error.

Shapes: Q queries, G gallery items, D dimensions, k neighbours, E >= k found.
"""

from __future__ import annotations

import os
from concurrent import futures
from typing import NamedTuple

import numpy as np

from trainer import heartbeat
from trainer.retrieval import exact_distances, faiss_library

# Queries and items given to FAISS at once: 128 MB of items at 128 dimensions.
_NUM_QUERIES, _NUM_ITEMS = 16_384, 262_144
_SMALLEST_NORMAL = 2.0**-126


class Candidates(NamedTuple):
  """What a search in float32 found.

  Attributes:
    indices: [Q, E] int64, in any order.
    last: [Q] float, the largest of their squared distances, as they were compared: no
      other item has a smaller one.
  """

  indices: np.ndarray
  last: np.ndarray


class Found(NamedTuple):
  """What is known of the nearest items.

  Attributes:
    indices: [Q, k] int64, nearest first; among equal ones the lower index first.
    squares: [Q, k] float64, squared distances.
    is_certain: [Q] bool, whether it is proven that no other item belongs there.
  """

  indices: np.ndarray
  squares: np.ndarray
  is_certain: np.ndarray


def prove(
  queries: np.ndarray,
  gallery: np.ndarray,
  offset: np.ndarray,
  candidates: Candidates,
  *,
  num_neighbours: int,
  roundoff: float,
) -> Found:
  """The k nearest of the candidates, and whether they are the nearest of all.

  Args:
    queries: [Q, D] float32.
    gallery: [G, D] float; may be mapped.
    offset: [D] float32, was subtracted from both before float32 was reckoned in.
    candidates: E of each query; E = G, or more than k.
    num_neighbours: k <= E.
    roundoff: of the products by which they were found.
  """
  ids = np.sort(candidates.indices, axis=1)
  squares = _squared_distances(queries, gallery, ids)
  order = np.argsort(squares, axis=1, kind="stable")[:, :num_neighbours]
  indices, squares = (
    np.take_along_axis(each, order, axis=1) for each in (ids, squares)
  )
  if ids.shape[1] == len(gallery):
    return Found(indices, squares, np.ones(len(queries), bool))
  # An item as near as the k-th is no longer than the query's length and that distance.
  kth = np.sqrt(squares[:, -1])
  centred = queries - offset
  norms = np.sqrt(np.einsum("qd,qd->q", centred, centred, dtype=np.float64))
  reach = 2.0 * norms + kth
  num_roundings = queries.shape[1] + 8
  error = num_roundings * (roundoff * reach**2 + 4.0 * _SMALLEST_NORMAL)
  error = np.where(reach**2 < 1e37, error, np.inf)
  return Found(indices, squares, squares[:, -1] < candidates.last - error)


def _squared_distances(
  queries: np.ndarray, gallery: np.ndarray, indices: np.ndarray
) -> np.ndarray:
  """[Q, E] float64, by all cores."""
  num_parts = os.cpu_count() or 1
  parts = (np.array_split(each, num_parts) for each in (queries, indices))
  with futures.ThreadPoolExecutor(num_parts) as threads:
    found = threads.map(
      lambda *part: exact_distances.squared_distances(part[0], gallery, part[1]), *parts
    )
    return np.concatenate(list(found))


def candidates_of_faiss(
  queries: np.ndarray, gallery: np.ndarray, offset: np.ndarray, *, num_found: int
) -> Candidates:
  """Candidates by FAISS, which computes on the processor.

  Args:
    queries: [Q, D] float32.
    gallery: [G, D] float; may be mapped.
    offset: [D] float32, subtracted from both.
    num_found: E <= G.
  """
  parts = [
    _candidates(
      queries[start : start + _NUM_QUERIES] - offset, gallery, offset, num_found
    )
    for start in range(0, max(1, len(queries)), _NUM_QUERIES)
  ]
  return Candidates(*(np.concatenate(each) for each in zip(*parts)))


def _candidates(
  centred: np.ndarray, gallery: np.ndarray, offset: np.ndarray, num_found: int
) -> Candidates:
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
  return Candidates(indices, squares.max(axis=1, initial=0.0))
