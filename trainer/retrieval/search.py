"""Exact nearest neighbours in bounded memory.

Shapes: Q queries, G gallery items, D dimensions, k neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import tensorflow as tf

# Distances held at once: 64 M float32 are 256 MB.
MAX_DISTANCES = 64_000_000


def nearest_others(
  embeddings: np.ndarray, *, num_neighbours: int, max_distances: int = MAX_DISTANCES
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """For each item its nearest others, tile by tile.

  Order is by Euclidean distance; among equal ones the lower index comes first.

  Args:
    embeddings: [G, D] float32, queries and gallery at once.
    num_neighbours: k < G.
    max_distances: how many distances are held at once.

  Yields:
    Of each tile: the queries' indices [Q] int64, and their neighbours' [Q, k] int32,
    nearest first, without the query itself.
  """
  num_items = len(embeddings)
  tile = max(1, min(num_items, max_distances // num_items))
  gallery = tf.constant(embeddings)
  for start in range(0, num_items, tile):
    queries = tf.range(start, min(start + tile, num_items))
    neighbours = _nearest_to_queries(gallery, queries, tf.constant(num_neighbours))
    yield np.arange(start, start + len(queries)), neighbours.numpy()


@tf.function(reduce_retracing=True)
def _nearest_to_queries(gallery, queries, num_neighbours):
  # ‖q − g‖² orders as ‖g‖² / 2 − q·g does.
  half_norms = 0.5 * tf.reduce_sum(gallery**2, axis=1)
  closeness = tf.matmul(tf.gather(gallery, queries), gallery, transpose_b=True)
  closeness -= half_norms
  num_queries = tf.shape(queries)[0]
  itself = tf.stack([tf.range(num_queries), queries], axis=1)
  lowest = tf.fill([num_queries], closeness.dtype.min)
  closeness = tf.tensor_scatter_nd_update(closeness, itself, lowest)
  return tf.math.top_k(closeness, k=num_neighbours).indices
