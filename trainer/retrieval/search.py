"""Exact nearest neighbours in bounded memory.

By FAISS on the processor of one replica, where it is installed; else by tiles on the
devices. Both find the same, to what differs by a rounding error.

Shapes: Q queries, G gallery items, D dimensions, k neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from trainer.errors import UserError
from trainer.retrieval import faiss_library
from trainer.retrieval.certain_search import search_by_faiss
from trainer.retrieval.tiled_search import search_by_tiles

# Items of which the mean is taken.
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
  queries: np.ndarray, gallery: np.ndarray, *, num_neighbours: int
) -> Neighbours:
  """For each query its nearest gallery items, among equal ones the lower index first.

  A [queries, items] matrix of distances never exists. What FAISS finds is put in order
  by distances in float64, and is taken where no rounding error can have left out
  another item. All else, and all on other devices than one processor, goes by float32:
  what differs by a rounding error may change places. What all items have in common is
  subtracted before, as far from zero it would take the digits in which they differ.

  Args:
    queries: [Q, D] float, finite; may be mapped.
    gallery: [G, D] float, finite; may be mapped.
    num_neighbours: k <= G.

  Returns:
    Indices and distances. Without a query: nothing, [0, k].

  Raises:
    UserError: k exceeds the gallery, or the dimensions differ.
  """
  check_sizes(queries, gallery.shape, num_neighbours)
  indices = np.zeros([len(queries), num_neighbours], np.int64)
  squares = np.zeros([len(queries), num_neighbours])
  is_open = np.ones(len(queries), bool)
  offset = _common_offset(gallery)
  if faiss_serves():
    found = search_by_faiss(queries, gallery, offset, num_neighbours=num_neighbours)
    indices, squares, is_open = found.indices, found.squares, ~found.is_certain
  if is_open.any():
    indices[is_open], squares[is_open] = search_by_tiles(
      queries[is_open], gallery, offset, num_neighbours=num_neighbours
    )
  return Neighbours(indices, np.sqrt(np.maximum(squares, 0.0)).astype(np.float32))


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
