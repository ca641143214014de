"""Nearest items and nearest classes of the whole training corpus.

Shapes: N items, k neighbours.

Shapes: N items, D dimensions, R items that ask, k neighbours.

Shapes: N items, D dimensions, C classes of the items, L of the data, m neighbours.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator

import numpy as np
from absl import logging

from trainer.errors import UserError, reason_of
from trainer.mining.corpus import CorpusItems
from trainer.retrieval import faiss_index, knn
from trainer.retrieval.exact_distances import common_offset
from trainer.retrieval.knn import Neighbours, faiss_serves, nearest
from trainer.runtime import watchdog

# Up to so many items all are compared.
_MAX_EXACT = 50_000
KINDS = ("auto", "exact", *faiss_index.KINDS)
# Items that ask at once: at most so many, and by codes as many as have so many bytes of
# tables, 80 a dimension.
_MAX_ASKING, _MIN_ASKING, _TABLE_BYTES = 16_384, 256, 2**27
# Codes find so many times as many, of which the nearest by true distances are kept.
_REFINED = 2

# Items whose embeddings are added up at once.
_NUM_ADDED = 65_536


@contextlib.contextmanager
def neighbours_on_disk(num_items: int, num_neighbours: int) -> Iterator[Neighbours]:
  """Arrays that a search can fill, mapped from a file that goes with the context.

  Args:
    num_items: N.
    num_neighbours: k.

  Yields:
    Indices [N, k] int32 and distances [N, k] float32.

  Raises:
    UserError: the temporary folder has no room for them, 8·N·k bytes.
  """
  shape = (num_items, num_neighbours)
  num_bytes = 4 * num_items * num_neighbours
  with contextlib.ExitStack() as opened:
    try:
      file = opened.enter_context(tempfile.TemporaryFile())
      _claim(file.fileno(), 2 * num_bytes)
      found = Neighbours(
        np.memmap(file, np.int32, "r+", 0, shape),
        np.memmap(file, np.float32, "r+", num_bytes, shape),
      )
    except OSError as error:
      folder = tempfile.tempdir or os.environ.get("TMPDIR", "the temporary folder")
      raise UserError(
        f"{folder} has no room for {2 * num_bytes:,} bytes of neighbours "
        f"({reason_of(error)}); set TMPDIR to a folder that has, or mine among fewer "
        "(Miner.records_per_class)."
      ) from error
    yield found


def _claim(descriptor: int, num_bytes: int) -> None:
  """Gives a file its size on the disk: a full one kills who writes into a map of it."""
  if hasattr(os, "posix_fallocate"):
    os.posix_fallocate(descriptor, 0, num_bytes)
  else:  # macOS has none.
    os.truncate(descriptor, num_bytes)


class NearestItems:
  """Answers which items are nearest to an item.

  Attributes:
    kind: "exact", or the kind of FAISS's index.

  Args:
    embeddings: [N, D] float32, finite.
    kind: one of `KINDS`; "auto" compares all up to 50,000 items, and beyond takes
      IVF-PQ, where FAISS is installed. Fewer items than a cell of an index has are all
      compared. "flat" and "exact" both compare all, by FAISS on the processor of one
      replica where it is installed, else by the devices.

  Raises:
    UserError: the kind is unknown, or FAISS is not installed.
  """

  def __init__(self, embeddings: np.ndarray, kind: str):
    check_kind(kind)
    self._embeddings = embeddings
    self.kind = kind = _chosen(kind, len(embeddings))
    is_exact = kind in ("exact", "flat")
    self._index = None if is_exact else faiss_index.build_index(embeddings, kind)

  def search(
    self, items: np.ndarray, num_neighbours: int, out: Neighbours
  ) -> Neighbours:
    """The nearest other items of each item, nearest first.

    Args:
      items: [R] int64.
      num_neighbours: k < N.
      out: gets them: indices [R, k] int32, where a cell of the index had no more −1;
        and distances [R, k] float32, there infinite. Order and distances of what an
        index finds are computed from the embeddings; codes find twice as many.

    Returns:
      `out`.
    """
    num_asking = _MAX_ASKING
    if self.kind == "ivf_pq":
      by_bytes = _TABLE_BYTES // (80 * self._embeddings.shape[1])
      num_asking = min(_MAX_ASKING, max(_MIN_ASKING, by_bytes))
    for start in range(0, len(items), num_asking):
      watchdog.beat()
      part = slice(start, start + num_asking)
      found = self._found(items[part], num_neighbours + 1)
      out.indices[part], out.distances[part] = _without_self(found, items[part])
    return out

  def _found(self, items: np.ndarray, num_neighbours: int) -> Neighbours:
    queries = self._embeddings[items]
    if self._index is None:
      if not faiss_serves():
        # In few sizes: the devices trace each of them anew.
        size = min(_MAX_ASKING, _power_of_two(len(items)))
        queries = np.resize(queries, [size, queries.shape[1]])
      found = nearest(queries, self._embeddings, num_neighbours=num_neighbours)
      return Neighbours(*(each[: len(items)] for each in found))
    num_asked = num_neighbours
    if self.kind == "ivf_pq":
      num_asked = min(_REFINED * num_neighbours, len(self._embeddings))
    _, indices = self._index.search(queries, num_asked)
    return _refined(queries, self._embeddings, indices, num_neighbours)


def check_kind(kind: str) -> None:
  """Checks that there is such a kind of search, here.

  Raises:
    UserError: there is not, or it needs FAISS, which is not installed.
  """
  if kind not in KINDS:
    raise UserError(f"Miner.index_kind={kind!r} is none of {', '.join(KINDS)}.")
  if kind in faiss_index.KINDS and not knn.is_faiss_installed():
    raise UserError(
      f"Miner.index_kind={kind!r} needs FAISS: pip install "
      "'retrieval-trainer[search]', or take 'exact', which compares all on the devices."
    )


def _chosen(kind: str, num_items: int) -> str:
  if kind in faiss_index.KINDS_WITH_CELLS and num_items < faiss_index.LEAST_A_CELL:
    return "flat"
  if kind != "auto":
    return kind
  if num_items > _MAX_EXACT:
    if knn.is_faiss_installed():
      return "ivf_pq"
    logging.warning(
      "Without FAISS all %d items are compared with each other; for an index: pip "
      "install 'retrieval-trainer[search]'.",
      num_items,
    )
    return "exact"
  return "flat" if faiss_serves() else "exact"


def room_for(num_items: int, num_neighbours: int) -> Neighbours:
  """Arrays that a search can fill."""
  shape = (num_items, num_neighbours)
  return Neighbours(np.empty(shape, np.int32), np.empty(shape, np.float32))


def _power_of_two(number: int) -> int:
  """The next one, at least 256."""
  return max(256, 1 << (number - 1).bit_length())


def _without_self(found: Neighbours, items: np.ndarray) -> Neighbours:
  """Neighbours [R, k + 1] without the item that asks; else without the last."""
  is_self = found.indices == items[:, None]
  is_self[:, -1] |= ~is_self.any(axis=1)
  shape = (len(items), found.indices.shape[1] - 1)
  return Neighbours(*(each[~is_self].reshape(shape) for each in found))


def _refined(
  queries: np.ndarray, embeddings: np.ndarray, indices: np.ndarray, num_neighbours: int
) -> Neighbours:
  """The k nearest of those found [R, more], by true distances and in their order."""
  faiss = knn.load_faiss()
  squares = np.full(indices.shape, np.inf, np.float32)  # So it stays at an index of −1.
  faiss.fvec_L2sqr_by_idx(
    *map(faiss.swig_ptr, (squares, queries, embeddings, indices)),
    embeddings.shape[1],
    *indices.shape,
  )
  order = np.argsort(squares, axis=1, kind="stable")[:, :num_neighbours]
  indices, squares = (np.take_along_axis(each, order, 1) for each in (indices, squares))
  return Neighbours(indices, np.sqrt(squares))


def class_centroids(embeddings: np.ndarray, items: CorpusItems) -> np.ndarray:
  """[C, D] float64, the mean of each class's embeddings.

  Args:
    embeddings: [N, D] float32.
    items: N of them, of C classes.
  """
  sizes = np.diff(items.starts)
  sums = np.zeros((len(sizes), embeddings.shape[1]))
  for start in range(0, len(items.by_class), _NUM_ADDED):
    rows = items.by_class[start : start + _NUM_ADDED]
    first = np.searchsorted(items.starts, start, side="right") - 1
    last = np.searchsorted(items.starts, start + len(rows), side="left")
    cuts = np.maximum(items.starts[first:last] - start, 0)
    added = np.add.reduceat(embeddings[rows], cuts, axis=0, dtype=np.float64)
    sums[first:last] += added
  return sums / sizes[:, None]


def find_class_neighbours(
  means: np.ndarray,
  class_ids: np.ndarray,
  *,
  num_classes: int,
  num_neighbours: int,
  kind: str,
) -> np.ndarray:
  """The classes nearest to each class.

  Args:
    means: [C, D] float64.
    class_ids: [C] int32, whose they are.
    num_classes: L.
    num_neighbours: m.
    kind: of the search, as `NearestItems` has them.

  Returns:
    [L, m] int32 class ids, nearest first; −1 where there are fewer, and in the rows of
    classes that have no mean.

  Raises:
    UserError: there is one class only.
  """
  if len(means) < 2:
    raise UserError("Neighbours of classes need at least 2 classes.")
  num_found = min(num_neighbours, len(means) - 1)
  # Means of collapsed embeddings differ in digits that float32 has no room for.
  means = (means - common_offset(means)).astype(np.float32)
  room = room_for(len(means), num_found)
  found = NearestItems(means, kind).search(np.arange(len(means)), num_found, room)
  neighbours = np.full((num_classes, num_neighbours), -1, np.int32)
  is_there = found.indices >= 0
  neighbours[class_ids, :num_found] = np.where(is_there, class_ids[found.indices], -1)
  return neighbours
