"""The search of `trainer.retrieval.search` by tiles on the devices.

Shapes: Q queries, G gallery items, D dimensions, k neighbours; T items of a tile, W of
a window.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator

import numpy as np
import tensorflow as tf

# Queries and gallery items of a tile on one replica: 256 MB of products.
_NUM_QUERIES, _NUM_ITEMS = 4_096, 16_384
# Every item's product is of one kernel where tiles have a multiple of so many items, so
# that equal items are equally near.
_KERNEL = 32
# Narrower windows don't pay.
_MIN_WINDOW = 4


def search_by_tiles(
  queries: np.ndarray,
  gallery: np.ndarray,
  offset: np.ndarray,
  *,
  num_neighbours: int,
  max_queries: int = _NUM_QUERIES,
  max_items: int = _NUM_ITEMS,
) -> tuple[np.ndarray, np.ndarray]:
  """Indices [Q, k] int64 and squared distances [Q, k] float64, nearest first.

  A [queries, items] matrix of distances never exists: a tile's products are reduced to
  the k best before the next. Nearness is compared as q·g − ‖g‖²/2 in float32; among
  equal ones the lower index comes first. The replicas share the queries.

  Args:
    queries: [Q, D] float, Q > 0.
    gallery: [G, D] float; may be mapped.
    offset: [D] float32, subtracted from both.
    num_neighbours: k <= G.
    max_queries: of a tile on one replica.
    max_items: T.
  """
  num_replicas = tf.distribute.get_strategy().num_replicas_in_sync
  rows = min(max_queries, -(-len(queries) // num_replicas))
  parts = [
    _nearest_of_part(part, gallery, offset, num_neighbours, max_items)
    for part in _parts(queries, offset, rows * num_replicas)
  ]
  indices, squares = (np.concatenate(each)[: len(queries)] for each in zip(*parts))
  return indices, squares


@functools.cache
def _merge_fn(
  strategy: tf.distribute.Strategy,
) -> Callable[..., tuple[tf.Tensor, tf.Tensor]]:
  """Kept, so that it is traced once for a shape and not at each call."""
  return tf.function(
    lambda *arguments: strategy.run(_merged, arguments), autograph=False
  )


def _parts(
  queries: np.ndarray, offset: np.ndarray, num_rows: int
) -> Iterator[np.ndarray]:
  """Parts of [num_rows, D], the last filled up with zeros."""
  for start in range(0, len(queries), num_rows):
    yield _filled(queries[start : start + num_rows], offset, num_rows)


def _filled(rows: np.ndarray, offset: np.ndarray, num_rows: int) -> np.ndarray:
  padding = [(0, num_rows - len(rows)), (0, 0)]
  return np.pad(np.asarray(rows, np.float32) - offset, padding)


def _nearest_of_part(
  queries: np.ndarray,
  gallery: np.ndarray,
  offset: np.ndarray,
  num_neighbours: int,
  max_items: int,
) -> tuple[np.ndarray, np.ndarray]:
  """Indices and squared distances [Q, k] of queries that the replicas divide.

  Args:
    queries: [Q, D] float32, less the offset.
    gallery: [G, D].
    offset: [D].
    num_neighbours: k.
    max_items: T.
  """
  strategy = tf.distribute.get_strategy()
  merge = _merge_fn(strategy)
  by_replica = queries.reshape(strategy.num_replicas_in_sync, -1, queries.shape[1])
  shape = [by_replica.shape[1], num_neighbours]

  def of_replicas(make_fn):
    return strategy.experimental_distribute_values_from_function(
      lambda context: tf.constant(make_fn(context.replica_id_in_sync_group))
    )

  local = of_replicas(lambda replica: by_replica[replica])
  nearness = of_replicas(lambda _: np.full(shape, -np.inf, np.float32))
  indices = of_replicas(lambda _: np.zeros(shape, np.int32))
  num_items = min(max_items, -(-len(gallery) // _KERNEL) * _KERNEL)
  for start in range(0, len(gallery), num_items):
    items = gallery[start : start + num_items]
    tile = tf.constant(_filled(items, offset, num_items))
    place = tf.constant([start, len(items)], tf.int32)
    nearness, indices = merge(local, tile, place, nearness, indices)
  found = strategy.gather(nearness, axis=0).numpy()
  norms = np.einsum("qd,qd->q", queries, queries, dtype=np.float64)
  squares = norms[:, None] - 2.0 * found.astype(np.float64)
  return strategy.gather(indices, axis=0).numpy().astype(np.int64), squares


def _merged(
  queries: tf.Tensor,
  tile: tf.Tensor,
  place: tf.Tensor,
  nearness: tf.Tensor,
  indices: tf.Tensor,
) -> tuple[tf.Tensor, tf.Tensor]:
  """The best of what was found before and of a tile.

  Args:
    queries: [Q, D] float32.
    tile: [T, D] float32.
    place: [2] int32, the gallery index of the tile's first item, and how many items it
      has; the rest is padding.
    nearness: [Q, k] float32 of what was found, best first.
    indices: [Q, k] int32.

  Returns:
    Nearness and indices, [Q, k].
  """
  first_item, num_items = tf.unstack(place)
  is_item = tf.range(tile.shape[0]) < num_items
  half_norms = tf.reduce_sum(tile**2, axis=1) / 2.0
  half_norms = tf.where(is_item, half_norms, np.inf)
  found = tf.matmul(queries, tile, transpose_b=True) - half_norms
  found, columns = _best_windows(found, nearness.shape[1])
  # What was found before has lower indices: among equals, top_k takes the first.
  both = tf.concat([nearness, found], axis=1)
  both_indices = tf.concat([indices, first_item + columns], axis=1)
  nearness, places = tf.math.top_k(both, nearness.shape[1])
  return nearness, tf.gather(both_indices, places, batch_dims=1)


def _best_windows(found: tf.Tensor, num_neighbours: int) -> tuple[tf.Tensor, tf.Tensor]:
  """The columns among which the k best of each row are, in ascending order.

  Of windows of W columns, the k whose best is best hold the k best columns: a column of
  another window is no better than these k bests, and stands behind those it equals.

  Args:
    found: [Q, T] float32, the more the better.
    num_neighbours: k.

  Returns:
    Values [Q, n] float32, and which columns they are, [Q, n] int32; n is k · W, or T.
  """
  num_rows, num_columns = found.shape
  # Windows are looked at, and k · W columns: about as many of either.
  width = 2 ** round(math.log2(max(1.0, num_columns / num_neighbours)) / 2.0)
  if width < _MIN_WINDOW or num_columns % width:
    return found, tf.tile(tf.range(num_columns)[None, :], [num_rows, 1])
  windows = tf.reshape(found, [num_rows, num_columns // width, width])
  _, best = tf.math.top_k(tf.reduce_max(windows, axis=2), num_neighbours)
  best = tf.sort(best, axis=1)
  columns = best[:, :, None] * width + tf.range(width)
  size = [num_rows, num_neighbours * width]
  values = tf.gather(windows, best, batch_dims=1)
  return tf.reshape(values, size), tf.reshape(columns, size)
