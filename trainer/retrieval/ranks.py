"""At which ranks of its gallery a query finds what is relevant to it.

Every metric of a ranking follows from these ranks; the ranking itself is never written
down, so neither its length nor the size of a class is limited.

Shapes: Q queries, G gallery items, D dimensions, R items relevant to a query.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent import futures
from typing import Protocol

import numpy as np

from trainer import heartbeat

# Distances held at once, 256 MB.
_MAX_DISTANCES = 64_000_000
# Up to so many relevant items, counting what is nearer than each beats sorting.
_MAX_COUNTED = 64
# Of uint16, less what float32 may round up.
_MAX_KEY = 65_000.0
# Rows and columns of a product are multiples of it: then one kernel makes them all, and
# copies of an item are equally near wherever they are.
_KERNEL = 32
# Parts of what is held at once, for threads to take.
_NUM_PARTS = 16


class Judgements(Protocol):
  """Which gallery items are relevant to a query, and which don't count."""

  def judge(self, query: int) -> tuple[np.ndarray, np.ndarray]:
    """What a query should find, and what doesn't count.

    Returns:
      [R] int64, distinct gallery items that are relevant; and int64 gallery items that
      are not in the query's gallery, none of them relevant.
    """


def ranks_of_relevant(
  queries: np.ndarray,
  gallery: np.ndarray,
  judgements: Judgements,
  *,
  max_distances: int = _MAX_DISTANCES,
) -> Iterator[np.ndarray]:
  """The ranks of each query's relevant items, exact.

  Order is by Euclidean distance in float32; among equal ones the lower gallery index
  comes first.

  Args:
    queries: [Q, D] float32, finite.
    gallery: [G, D] float32, finite.
    judgements: of each query by its number.
    max_distances: how many distances are held at once.

  Yields:
    Of each query in order: [R] int64 ranks, ascending, from 1.
  """
  # ‖q − g‖² orders as ‖g‖² / 2 − q·g does; near 0 the digits are those that differ. By
  # whole numbers, which change nothing that is exact.
  centre = np.rint(gallery.mean(axis=0))
  padded = _padded(gallery - centre, _KERNEL)
  # Nothing is as far as what is padding.
  half_norms = np.full(len(padded), np.inf, np.float32)
  half_norms[: len(gallery)] = 0.5 * np.sum(padded[: len(gallery)] ** 2, axis=1)
  num_rows = max(_KERNEL, min(len(queries), max_distances // len(gallery)))

  def of_some(first: int, rows: np.ndarray) -> list[np.ndarray]:
    found = []
    for query, distances in enumerate(rows, first):
      relevant, excluded = judgements.judge(query)
      distances[excluded] = np.inf
      found.append(_ranks(distances, relevant))
    return found

  with futures.ThreadPoolExecutor(os.cpu_count()) as threads:
    for start in range(0, len(queries), num_rows):
      heartbeat.beat()
      rows = queries[start : start + num_rows] - centre
      distances = half_norms - _padded(rows, _KERNEL) @ padded.T
      distances = distances[: len(rows), : len(gallery)]
      parts = np.array_split(distances, min(len(rows), _NUM_PARTS))
      firsts = start + np.cumsum([0, *map(len, parts[:-1])])
      for found in threads.map(of_some, firsts.tolist(), parts):
        yield from found


def _ranks(distances: np.ndarray, relevant: np.ndarray) -> np.ndarray:
  """Ascending ranks, from 1, of items [R] in the order of distances [G]."""
  if not len(relevant):
    return np.empty(0, np.int64)
  # What is farther than all that is relevant has no say: in a trained space, most.
  near = np.flatnonzero(distances <= distances[relevant].max())
  distances, relevant = distances[near], np.searchsorted(near, relevant)
  if len(relevant) > _MAX_COUNTED:
    is_relevant = np.zeros(len(distances), bool)
    is_relevant[relevant] = True
    return np.flatnonzero(is_relevant[_stable_order(distances)]) + 1
  found = np.sort(distances[relevant])
  nearer = np.array([np.count_nonzero(distances < each) for each in found], np.int64)
  equal = np.array([np.count_nonzero(distances == each) for each in found], np.int64)
  for value in np.unique(found[equal > 1]):
    places = np.flatnonzero(distances == value)
    nearer[found == value] += np.flatnonzero(np.isin(places, relevant))
  return nearer + 1


def _stable_order(distances: np.ndarray) -> np.ndarray:
  """[G] int64, the order of distances [G] float32, where some may be infinite.

  Sorted by 16 bits first, which takes time in proportion to G, and then what is nearly
  in order: a third of the time that argsort takes.
  """
  low = distances.min()
  high = distances.max(where=np.isfinite(distances), initial=low)
  scale = _MAX_KEY / (high - low) if high > low else 0.0
  keys = ((np.minimum(distances, high) - low) * np.float32(scale)).astype(np.uint16)
  roughly = np.argsort(keys, kind="stable")
  return roughly[np.argsort(distances[roughly], kind="stable")]


def _padded(rows: np.ndarray, multiple: int) -> np.ndarray:
  """Rows, followed by zeros up to a multiple."""
  return np.pad(rows, [(0, -len(rows) % multiple), (0, 0)])
