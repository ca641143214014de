"""Exact nearest neighbours in bounded memory.

By FAISS on the processor of one replica, where it is installed; else by tiles on the
devices. Both find the same, because what rounding errors leave open is compared again.

Shapes: Q queries, G gallery items, D dimensions, k neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from trainer.errors import UserError
from trainer.retrieval import faiss_library
from trainer.retrieval.certain_search import (
  Candidates,
  candidates_of_faiss,
  prove,
)
from trainer.retrieval.exact_distances import (
  ROUNDOFF_32,
  common_offset,
  is_exact_in_float32,
  nearest_in_float64,
)
from trainer.retrieval.tiled_search import search_by_tiles

# Items found beside those asked for: room between the last of these and all others.
# More take more time; fewer leave more queries to be compared with all items again.
_NUM_MORE_OF_FAISS, _NUM_MORE_OF_TILES = 16, 2


class Neighbours(NamedTuple):
  """The gallery items nearest to each query.

  Attributes:
    indices: [Q, k] int64, nearest first.
    distances: [Q, k] float32, Euclidean.
  """

  indices: np.ndarray
  distances: np.ndarray


def nearest(
  queries: np.ndarray, gallery: np.ndarray, *, num_neighbours: int
) -> Neighbours:
  """For each query its nearest gallery items, among equal ones the lower index first.

  A [queries, items] matrix of distances never exists. Products in float32 find a few
  more items than are asked for. Differences in float64 put these in order, and an
  answer is taken where no rounding error can have left out another item. Other queries
  are compared with all items in float64. So order and distances are those of float64
  differences, for near-duplicates as well, and the same on all devices.

  Args:
    queries: [Q, D] float, finite.
    gallery: [G, D] float, finite; may be mapped. Both are taken as float32.
    num_neighbours: k <= G.

  Returns:
    Indices and distances. Without a query: nothing, [0, k].

  Raises:
    UserError: k exceeds the gallery, or the dimensions differ.
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
    # As of binary codes, of which many are equally near.
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
  is_open = ~found.is_certain
  if is_open.any():
    found.indices[is_open], found.squares[is_open] = nearest_in_float64(
      queries[is_open],
      gallery,
      offset,
      num_neighbours=num_neighbours,
      at_most=found.squares[is_open, -1],
    )
  return Neighbours(found.indices, _roots(found.squares))


def _candidates(
  queries: np.ndarray, gallery: np.ndarray, offset: np.ndarray, num_neighbours: int
) -> Candidates:
  """A few more than k, from FAISS or from the devices."""
  by_faiss = faiss_serves()
  num_more = _NUM_MORE_OF_FAISS if by_faiss else _NUM_MORE_OF_TILES
  num_found = min(num_neighbours + num_more, len(gallery))
  if by_faiss:
    return candidates_of_faiss(queries, gallery, offset, num_found=num_found)
  indices, squares = search_by_tiles(queries, gallery, offset, num_neighbours=num_found)
  return Candidates(indices, squares[:, -1])


def _roots(squares: np.ndarray) -> np.ndarray:
  return np.sqrt(np.maximum(squares, 0.0)).astype(np.float32)


def _unit_roundoff() -> float:
  """Of products of float32 numbers on the devices, at most."""
  kinds = {device.device_type for device in tf.config.list_logical_devices()}
  if kinds == {"CPU"}:
    return ROUNDOFF_32
  if tf.config.experimental.tensor_float_32_execution_enabled():
    # TensorFloat-32 has 11 bits, and bfloat16 8.
    return 2.0**-11 if kinds <= {"CPU", "GPU"} else 2.0**-8
  # A TPU adds up products of bfloat16 parts, which is a little less than float32.
  return ROUNDOFF_32 if kinds <= {"CPU", "GPU"} else 2.0**-21


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


def faiss_serves() -> bool:
  """Whether this is one replica on a processor, and FAISS is installed."""
  is_one = tf.distribute.get_strategy().num_replicas_in_sync == 1
  kinds = {device.device_type for device in tf.config.list_logical_devices()}
  return is_one and kinds == {"CPU"} and faiss_library.is_installed()
