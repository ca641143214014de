"""Exact nearest neighbours in bounded memory, by tiles on the devices.

Shapes: Q queries, G gallery items, D dimensions, k neighbours; T items of a tile.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from trainer.errors import UserError

# Queries and gallery items of a tile on one replica: 256 MB of products.
_NUM_QUERIES, _NUM_ITEMS = 4_096, 16_384
_NUM_SAMPLED = 4_096


class Neighbours(NamedTuple):
  """The gallery items nearest to each query.

  Attributes:
    indices: [Q, k] int64, nearest first.
    distances: [Q, k] float32, Euclidean.
  """

  indices: np.ndarray
  distances: np.ndarray


def nearest(
  queries: np.ndarray,
  gallery: np.ndarray,
  *,
  num_neighbours: int,
  max_queries: int = _NUM_QUERIES,
  max_items: int = _NUM_ITEMS,
) -> Neighbours:
  """For each query its nearest gallery items, among equal ones the lower index first.

  The replicas of the current strategy share the queries. A [queries, items] matrix of
  distances never exists: a tile's products are reduced to the k best before the next.
  Nearness is compared as q·g − ‖g‖²/2 in float32, so that what differs by a rounding
  error of it may change places; what all items have in common is subtracted before, as
  far from zero it would take the digits in which they differ.

  Args:
    queries: [Q, D] float32, finite; may be mapped.
    gallery: [G, D] float32, finite; may be mapped.
    num_neighbours: k <= G.
    max_queries: queries of a tile on one replica.
    max_items: T.

  Returns:
    Indices and distances. Without a query: nothing, [0, k].

  Raises:
    UserError: k exceeds the gallery, or the dimensions differ.
  """
  check_sizes(queries, gallery.shape, num_neighbours)
  if not len(queries):
    empty = np.zeros([0, num_neighbours])
    return Neighbours(empty.astype(np.int64), empty.astype(np.float32))
  strategy = tf.distribute.get_strategy()
  rows = min(max_queries, -(-len(queries) // strategy.num_replicas_in_sync))
  offset = _common_offset(gallery)
  parts = [
    _nearest_of_part(strategy, part, gallery, offset, num_neighbours, max_items)
    for part in _parts(queries, offset, rows * strategy.num_replicas_in_sync)
  ]
  indices, distances = (np.concatenate(each)[: len(queries)] for each in zip(*parts))
  return Neighbours(indices, distances)


def check_sizes(
  queries: np.ndarray, gallery_shape: Sequence[int], num_neighbours: int
) -> None:
  """Checks that queries can be answered from a gallery.

  Args:
    queries: [Q, D].
    gallery_shape: (G, D).
    num_neighbours: k.

  Raises:
    UserError: k exceeds the gallery, or the dimensions differ.
  """
  num_items, num_dimensions = gallery_shape
  if queries.shape[1] != num_dimensions:
    raise UserError(
      f"Queries of {queries.shape[1]} dimensions can't be compared with a gallery of "
      f"{num_dimensions}; embed both with one encoder."
    )
  if not 1 <= num_neighbours <= num_items:
    raise UserError(
      f"{num_neighbours} neighbours can't be had from a gallery of {num_items} items; "
      f"ask for 1 to {num_items}."
    )


@functools.cache
def _merge_fn(
  strategy: tf.distribute.Strategy,
) -> Callable[..., tuple[tf.Tensor, tf.Tensor]]:
  """Kept, so that it is traced once for a shape and not at each call."""
  return tf.function(lambda *arguments: strategy.run(_merged, arguments))


def _common_offset(gallery: np.ndarray) -> np.ndarray:
  """[D] float32, about the mean of the items, in steps of a power of 2.

  The steps are about as large as the spread: what lies around zero, or on a grid,
  stays what it is.
  """
  step = -(-len(gallery) // _NUM_SAMPLED)
  sample = np.asarray(gallery[::step], np.float64)
  mean, spread = sample.mean(axis=0), sample.std(axis=0).max()
  if spread > 0:
    unit = np.exp2(np.ceil(np.log2(spread)))
    mean = np.round(mean / unit) * unit
  return mean.astype(np.float32)


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
  strategy: tf.distribute.Strategy,
  queries: np.ndarray,
  gallery: np.ndarray,
  offset: np.ndarray,
  num_neighbours: int,
  max_items: int,
) -> tuple[np.ndarray, np.ndarray]:
  """Indices and distances [Q, k] of queries, less the offset, that replicas divide."""
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
  # A multiple of 32, so that every item's product is of one kernel, and equal items are
  # equally near.
  num_items = min(max_items, -(-len(gallery) // 32) * 32)
  for start in range(0, len(gallery), num_items):
    items = gallery[start : start + num_items]
    tile = tf.constant(_filled(items, offset, num_items))
    place = tf.constant([start, len(items)], tf.int32)
    nearness, indices = merge(local, tile, place, nearness, indices)
  found = strategy.gather(nearness, axis=0).numpy()
  squared = np.sum(queries**2, axis=1, keepdims=True) - 2.0 * found
  distances = np.sqrt(np.maximum(squared, 0.0))
  return strategy.gather(indices, axis=0).numpy().astype(np.int64), distances


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
  is_item = tf.range(tf.shape(tile)[0]) < num_items
  half_norms = tf.reduce_sum(tile**2, axis=1) / 2.0
  half_norms = tf.where(is_item, half_norms, np.inf)
  found = tf.matmul(queries, tile, transpose_b=True) - half_norms
  # What was found before has lower indices: among equals, top_k takes the first.
  both = tf.concat([nearness, found], axis=1)
  num_neighbours = tf.shape(nearness)[1]
  nearness, columns = tf.math.top_k(both, num_neighbours)
  known = tf.gather(indices, tf.minimum(columns, num_neighbours - 1), batch_dims=1)
  new = first_item + columns - num_neighbours
  return nearness, tf.where(columns < num_neighbours, known, new)
