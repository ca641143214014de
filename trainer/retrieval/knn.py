"""Exact nearest neighbours in bounded memory, by FAISS or by tiles.

A search by float32 products finds a few more items than requested. It uses FAISS on the
CPU of one replica if it is installed, otherwise tiles on the devices. Distances of
these candidates are then computed by float64 differences, which give the order.

No other item belongs among the first k if the k-th is nearer than every item outside
the candidates by more than the largest rounding error. Queries for which this is not
proven are compared with all items again. Both searches therefore give the same result.

Shapes: Q queries, G gallery items, D dimensions, k neighbours, E >= k candidates, T
items of a tile, W columns of a window.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from trainer.errors import UserError
from trainer.retrieval import exact_distances
from trainer.retrieval.exact_distances import (
  ROUNDOFF_32,
  common_offset,
  is_exact_in_float32,
  nearest_in_float64,
)
from trainer.runtime import watchdog

# Candidates in addition to k: a margin between the k-th item and those not found. More
# take more time; with fewer, more queries are compared with all items again.
_NUM_MORE_OF_FAISS, _NUM_MORE_OF_TILES = 16, 2

# Queries and items given to FAISS at once: 128 MB of items at 128 dimensions.
_NUM_QUERIES, _NUM_ITEMS = 16_384, 262_144
_SMALLEST_NORMAL = 2.0**-126

# Queries and gallery items of a tile on one replica: 256 MB of products.
_MIN_TILE_QUERIES, _MIN_TILE_ITEMS = 4_096, 16_384
# If tiles have a multiple of this many items, one kernel computes every product, so
# that equal items are equally near.
_KERNEL = 32
# Narrower windows do not save time.
_MIN_WINDOW = 4


def is_faiss_installed() -> bool:
  """Returns whether FAISS can be imported."""
  return importlib.util.find_spec("faiss") is not None


def load_faiss() -> Any:
  """Returns the module `faiss`.

  Raises:
    UserError: FAISS is not installed.
  """
  # The loader logs at length which CPU instructions it uses.
  logging.getLogger("faiss.loader").setLevel(logging.WARNING)
  try:
    import faiss
  except ImportError as error:
    raise UserError(
      "An index needs FAISS: pip install 'retrieval-trainer[search]'."
    ) from error
  return faiss


class Neighbours(NamedTuple):
  """The nearest gallery items of each query.

  Attributes:
    indices: [Q, k] int64, nearest first.
    distances: [Q, k] float32, Euclidean.
  """

  indices: np.ndarray
  distances: np.ndarray


def nearest(
  queries: np.ndarray, gallery: np.ndarray, *, num_neighbours: int
) -> Neighbours:
  """Finds the nearest gallery items of each query; ties by the lower index.

  The matrix of all distances is never in memory. Float32 products find a few more items
  than requested, and float64 differences order them. A result is accepted if no
  rounding error can have left out another item; other queries are compared with all
  items in float64. Order and distances thus equal those of float64 differences, also
  for near-duplicates, and are the same on all devices.

  Args:
    queries: [Q, D] float, finite.
    gallery: [G, D] float, finite; may be memory-mapped. Both are converted to float32.
    num_neighbours: k <= G.

  Returns:
    Indices and distances; [0, k] without queries.

  Raises:
    UserError: k exceeds the gallery size, or the dimensions differ.
  """
  check_sizes(queries, gallery.shape, num_neighbours)
  if not len(queries):
    empty = np.zeros([0, num_neighbours])
    return Neighbours(empty.astype(np.int64), empty.astype(np.float32))
  queries = np.asarray(queries, np.float32)
  if gallery.dtype.itemsize > queries.dtype.itemsize:
    gallery = np.asarray(gallery, np.float32)
  offset, roundoff = common_offset(gallery), _unit_roundoff()
  if roundoff == ROUNDOFF_32 and is_exact_in_float32(offset, queries, gallery):
    # For example binary codes, where many items are equally near.
    indices, squares = search_by_tiles(
      queries, gallery, offset, num_neighbours=num_neighbours
    )
    return Neighbours(indices, _roots(squares))
  found = prove(
    queries,
    gallery,
    offset,
    _candidates(queries, gallery, offset, num_neighbours),
    num_neighbours=num_neighbours,
    roundoff=roundoff,
  )
  is_unproven = ~found.is_proven
  if is_unproven.any():
    found.indices[is_unproven], found.squares[is_unproven] = nearest_in_float64(
      queries[is_unproven],
      gallery,
      offset,
      num_neighbours=num_neighbours,
      at_most=found.squares[is_unproven, -1],
    )
  return Neighbours(found.indices, _roots(found.squares))


def _candidates(
  queries: np.ndarray, gallery: np.ndarray, offset: np.ndarray, num_neighbours: int
) -> SearchCandidates:
  """Returns a few more than k candidates, from FAISS or from the devices."""
  by_faiss = is_faiss_used()
  num_more = _NUM_MORE_OF_FAISS if by_faiss else _NUM_MORE_OF_TILES
  num_found = min(num_neighbours + num_more, len(gallery))
  if by_faiss:
    return faiss_candidates(queries, gallery, offset, num_found=num_found)
  indices, squares = search_by_tiles(queries, gallery, offset, num_neighbours=num_found)
  return SearchCandidates(indices, squares[:, -1])


def _roots(squares: np.ndarray) -> np.ndarray:
  return np.sqrt(np.maximum(squares, 0.0)).astype(np.float32)


def _unit_roundoff() -> float:
  """Returns an upper bound on the roundoff of float32 products on the devices."""
  kinds = {device.device_type for device in tf.config.list_logical_devices()}
  if kinds == {"CPU"}:
    return ROUNDOFF_32
  if tf.config.experimental.tensor_float_32_execution_enabled():
    # TensorFloat-32 has 11 bits, and bfloat16 8.
    return 2.0**-11 if kinds <= {"CPU", "GPU"} else 2.0**-8
  # A TPU sums products of bfloat16 parts, slightly less precise than float32.
  return ROUNDOFF_32 if kinds <= {"CPU", "GPU"} else 2.0**-21


def check_sizes(
  queries: np.ndarray, gallery_shape: Sequence[int], num_neighbours: int
) -> None:
  """Checks that a gallery can be searched for queries.

  Args:
    queries: [Q, D].
    gallery_shape: (G, D).
    num_neighbours: k.

  Raises:
    UserError: k exceeds the gallery size, or the dimensions differ.
  """
  num_items, num_dimensions = gallery_shape
  if queries.shape[1] != num_dimensions:
    raise UserError(
      f"Queries of {queries.shape[1]} dimensions can't be compared with a gallery of "
      f"{num_dimensions}; embed both with the same encoder."
    )
  if not 1 <= num_neighbours <= num_items:
    raise UserError(
      f"num_neighbours={num_neighbours} exceeds the gallery size {num_items}; set it "
      f"to 1 to {num_items}."
    )


def is_faiss_used() -> bool:
  """Returns whether there is one replica on a CPU and FAISS is installed."""
  is_one = tf.distribute.get_strategy().num_replicas_in_sync == 1
  kinds = {device.device_type for device in tf.config.list_logical_devices()}
  return is_one and kinds == {"CPU"} and is_faiss_installed()


class SearchCandidates(NamedTuple):
  """Candidates of a float32 search.

  Attributes:
    indices: [Q, E] int64, in any order.
    last: [Q] float, the largest of their squared distances as compared in the search;
      no other item has a smaller one.
  """

  indices: np.ndarray
  last: np.ndarray


class ProvenNeighbours(NamedTuple):
  """Nearest candidates, and whether they are proven.

  Attributes:
    indices: [Q, k] int64, nearest first; among equal distances the lower index first.
    squares: [Q, k] float64, squared distances.
    is_proven: [Q] bool, whether it is proven that no other item belongs there.
  """

  indices: np.ndarray
  squares: np.ndarray
  is_proven: np.ndarray


def prove(
  queries: np.ndarray,
  gallery: np.ndarray,
  offset: np.ndarray,
  candidates: SearchCandidates,
  *,
  num_neighbours: int,
  roundoff: float,
) -> ProvenNeighbours:
  """Returns the k nearest candidates, and whether they are the nearest of all items.

  Args:
    queries: [Q, D] float32.
    gallery: [G, D] float; may be memory-mapped.
    offset: [D] float32, was subtracted from both before the float32 products.
    candidates: E of each query; E = G, or more than k.
    num_neighbours: k <= E.
    roundoff: of the products that found the candidates.
  """
  ids = np.sort(candidates.indices, axis=1)
  squares = _squared_distances(queries, gallery, ids)
  order = np.argsort(squares, axis=1, kind="stable")[:, :num_neighbours]
  indices, squares = (
    np.take_along_axis(each, order, axis=1) for each in (ids, squares)
  )
  if ids.shape[1] == len(gallery):
    return ProvenNeighbours(indices, squares, np.ones(len(queries), bool))
  # The norm of an item as near as the k-th is at most ‖q‖ plus that distance.
  kth = np.sqrt(squares[:, -1])
  centred = queries - offset
  norms = np.sqrt(np.einsum("qd,qd->q", centred, centred, dtype=np.float64))
  reach = 2.0 * norms + kth
  num_roundings = queries.shape[1] + 8
  error = num_roundings * (roundoff * reach**2 + 4.0 * _SMALLEST_NORMAL)
  error = np.where(reach**2 < 1e37, error, np.inf)
  return ProvenNeighbours(indices, squares, squares[:, -1] < candidates.last - error)


def _squared_distances(
  queries: np.ndarray, gallery: np.ndarray, indices: np.ndarray
) -> np.ndarray:
  """Computes squared distances [Q, E] float64 on all cores."""
  num_parts = os.cpu_count() or 1
  parts = (np.array_split(each, num_parts) for each in (queries, indices))
  with futures.ThreadPoolExecutor(num_parts) as threads:
    found = threads.map(
      lambda *part: exact_distances.squared_distances(part[0], gallery, part[1]), *parts
    )
    return np.concatenate(list(found))


def faiss_candidates(
  queries: np.ndarray, gallery: np.ndarray, offset: np.ndarray, *, num_found: int
) -> SearchCandidates:
  """Finds candidates with FAISS on the CPU.

  Args:
    queries: [Q, D] float32.
    gallery: [G, D] float; may be memory-mapped.
    offset: [D] float32, subtracted from both.
    num_found: E <= G.
  """
  parts = [
    _candidates_of_part(
      queries[start : start + _NUM_QUERIES] - offset, gallery, offset, num_found
    )
    for start in range(0, max(1, len(queries)), _NUM_QUERIES)
  ]
  return SearchCandidates(*(np.concatenate(each) for each in zip(*parts)))


def _candidates_of_part(
  centred: np.ndarray, gallery: np.ndarray, offset: np.ndarray, num_found: int
) -> SearchCandidates:
  faiss = load_faiss()
  indices = np.zeros([len(centred), 0], np.int64)
  squares = np.zeros([len(centred), 0], np.float32)
  for start in range(0, len(gallery), _NUM_ITEMS):
    watchdog.beat()
    items = np.asarray(gallery[start : start + _NUM_ITEMS], np.float32) - offset
    more = faiss.knn(centred, items, min(num_found, len(items)))
    squares = np.concatenate([squares, more[0]], axis=1)
    indices = np.concatenate([indices, more[1] + start], axis=1)
    if squares.shape[1] > num_found:
      best = np.argpartition(squares, num_found - 1, axis=1)[:, :num_found]
      squares = np.take_along_axis(squares, best, axis=1)
      indices = np.take_along_axis(indices, best, axis=1)
  return SearchCandidates(indices, squares.max(axis=1, initial=0.0))


def search_by_tiles(
  queries: np.ndarray,
  gallery: np.ndarray,
  offset: np.ndarray,
  *,
  num_neighbours: int,
  max_queries: int = _MIN_TILE_QUERIES,
  max_items: int = _MIN_TILE_ITEMS,
) -> tuple[np.ndarray, np.ndarray]:
  """Returns indices [Q, k] int64 and squared distances [Q, k] float64, nearest first.

  The matrix of all distances is never in memory: the products of a tile are reduced to
  the k best before the next tile. Items are compared by q·g − ‖g‖²/2 in float32; among
  equal ones the lower index comes first. The replicas share the queries.

  Args:
    queries: [Q, D] float, Q > 0.
    gallery: [G, D] float; may be memory-mapped.
    offset: [D] float32, subtracted from both.
    num_neighbours: k <= G.
    max_queries: of a tile on one replica.
    max_items: T.
  """
  num_replicas = tf.distribute.get_strategy().num_replicas_in_sync
  rows = min(max_queries, -(-len(queries) // num_replicas))
  parts = [
    _search_part(part, gallery, offset, num_neighbours, max_items)
    for part in _padded_parts(queries, offset, rows * num_replicas)
  ]
  indices, squares = (np.concatenate(each)[: len(queries)] for each in zip(*parts))
  return indices, squares


@functools.cache
def _merge_fn(
  strategy: tf.distribute.Strategy,
) -> Callable[..., tuple[tf.Tensor, tf.Tensor]]:
  """Returns the merge function, cached so that it is traced once per shape."""
  return tf.function(
    lambda *arguments: strategy.run(_merge_tile, arguments), autograph=False
  )


def _padded_parts(
  queries: np.ndarray, offset: np.ndarray, num_rows: int
) -> Iterator[np.ndarray]:
  """Yields parts of [num_rows, D], the last padded with zeros."""
  for start in range(0, len(queries), num_rows):
    yield _pad(queries[start : start + num_rows], offset, num_rows)


def _pad(rows: np.ndarray, offset: np.ndarray, num_rows: int) -> np.ndarray:
  padding = [(0, num_rows - len(rows)), (0, 0)]
  return np.pad(np.asarray(rows, np.float32) - offset, padding)


def _search_part(
  queries: np.ndarray,
  gallery: np.ndarray,
  offset: np.ndarray,
  num_neighbours: int,
  max_items: int,
) -> tuple[np.ndarray, np.ndarray]:
  """Returns indices and squared distances [Q, k]; the replicas divide the queries.

  Args:
    queries: [Q, D] float32, after subtracting the offset.
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
    tile = tf.constant(_pad(items, offset, num_items))
    tile_range = tf.constant([start, len(items)], tf.int32)
    nearness, indices = merge(local, tile, tile_range, nearness, indices)
  found = strategy.gather(nearness, axis=0).numpy()
  norms = np.einsum("qd,qd->q", queries, queries, dtype=np.float64)
  squares = norms[:, None] - 2.0 * found.astype(np.float64)
  return strategy.gather(indices, axis=0).numpy().astype(np.int64), squares


def _merge_tile(
  queries: tf.Tensor,
  tile: tf.Tensor,
  tile_range: tf.Tensor,
  nearness: tf.Tensor,
  indices: tf.Tensor,
) -> tuple[tf.Tensor, tf.Tensor]:
  """Merges the best items so far with those of a tile.

  Args:
    queries: [Q, D] float32.
    tile: [T, D] float32.
    tile_range: [2] int32, the gallery index of the tile's first item, and its number of
      items; the rest is padding.
    nearness: [Q, k] float32 of the best items so far, best first.
    indices: [Q, k] int32.

  Returns:
    Nearness and indices, [Q, k].
  """
  first_item, num_items = tf.unstack(tile_range)
  is_item = tf.range(tile.shape[0]) < num_items
  half_norms = tf.reduce_sum(tile**2, axis=1) / 2.0
  half_norms = tf.where(is_item, half_norms, np.inf)
  found = tf.matmul(queries, tile, transpose_b=True) - half_norms
  found, columns = _best_windows(found, nearness.shape[1])
  # Earlier items have lower indices; among equals, top_k takes the first.
  both = tf.concat([nearness, found], axis=1)
  both_indices = tf.concat([indices, first_item + columns], axis=1)
  nearness, columns_of_best = tf.math.top_k(both, nearness.shape[1])
  return nearness, tf.gather(both_indices, columns_of_best, batch_dims=1)


def _best_windows(found: tf.Tensor, num_neighbours: int) -> tuple[tf.Tensor, tf.Tensor]:
  """Returns columns that include the k best of each row, in ascending order.

  Of windows of W columns, the k windows with the best maximum contain the k best
  columns: a column of another window is no better than these k maxima, and comes after
  those it equals.

  Args:
    found: [Q, T] float32, larger is better.
    num_neighbours: k.

  Returns:
    Values [Q, n] float32 and their columns [Q, n] int32; n is k · W, or T.
  """
  num_rows, num_columns = found.shape
  # Balance the number of windows and the k · W columns.
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
