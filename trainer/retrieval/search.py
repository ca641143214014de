"""Exact nearest neighbours in bounded memory.

Shapes: Q queries, G gallery items, D dimensions, k neighbours.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent import futures

import numpy as np

# Distances held at once. With their sort keys a distance takes 20 bytes, so 320 MB.
MAX_DISTANCES = 16_000_000


def nearest_others(
  embeddings: np.ndarray, *, num_neighbours: int, max_distances: int = MAX_DISTANCES
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """For each item its nearest others, tile by tile.

  Order is by Euclidean distance; among equal ones the lower index comes first.

  Args:
    embeddings: [G, D] float32, queries and gallery at once; finite.
    num_neighbours: k < G.
    max_distances: how many distances are held at once.

  Yields:
    Of each tile: the queries' indices [Q] int64, and their neighbours' [Q, k] int64,
    nearest first, without the query itself.
  """
  num_items = len(embeddings)
  tile = max(1, min(num_items, max_distances // num_items))
  # ‖q − g‖² orders as ‖g‖² / 2 − q·g does.
  half_norms = 0.5 * np.sum(embeddings**2, axis=1)
  with futures.ThreadPoolExecutor(os.cpu_count()) as threads:
    for start in range(0, num_items, tile):
      queries = np.arange(start, min(start + tile, num_items))
      distances = half_norms - embeddings[queries] @ embeddings.T
      distances[np.arange(len(queries)), queries] = np.inf
      parts = np.array_split(distances, os.cpu_count() or 1)
      nearest = threads.map(lambda part: _nearest(part, num_neighbours), parts)
      yield queries, np.concatenate(list(nearest))


def _nearest(distances: np.ndarray, num_neighbours: int) -> np.ndarray:
  """[Q, k] int64, the columns of the smallest distances [Q, G], smallest first."""
  # Distance and column in one integer sort together, so that ties go by the column,
  # and NumPy sorts integers with vector instructions, which it can't with indices.
  columns = np.arange(distances.shape[1], dtype=np.uint64)
  keys = (_sortable(distances).astype(np.uint64) << np.uint64(32)) | columns
  if num_neighbours < keys.shape[1]:
    keys = np.partition(keys, num_neighbours, axis=1)[:, :num_neighbours]
  return (np.sort(keys, axis=1) & np.uint64(0xFFFFFFFF)).astype(np.int64)


def _sortable(values: np.ndarray) -> np.ndarray:
  """uint32 in the order of float32 values: bits flipped, all where negative."""
  bits = (values + np.float32(0)).view(np.uint32)  # The sum makes −0 a 0.
  is_negative = (bits >> np.uint32(31)).astype(bool)
  return np.where(is_negative, ~bits, bits | np.uint32(0x80000000))
