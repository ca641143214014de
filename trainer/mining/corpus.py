"""The training corpus of a mining round: its items, copies among them, and search.

Shapes: N items, one record each, D dimensions, R query items, k neighbours of an item,
C classes with at least one item, L classes of the data, m neighbours of a class.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Optional

import numpy as np
import tensorflow as tf
from absl import logging

from trainer.data import permutation
from trainer.data.images import Decoder
from trainer.data.index_arrays import MemberTable
from trainer.data.records import RecordIndex, Replacements
from trainer.errors import UserError, check_choice, short_reason
from trainer.retrieval import faiss_index, knn
from trainer.retrieval.exact_distances import common_offset
from trainer.retrieval.knn import Neighbours, is_faiss_used, nearest
from trainer.runtime import watchdog

# Records read at once, and records checked at once, which decodes them.
_READ_AT_ONCE, _TRIED_AT_ONCE = 4_096, 256

KINDS = ("auto", "exact", *faiss_index.KINDS)
# The largest number of items that "auto" compares exhaustively.
_MAX_EXACT = 50_000
# Limits on query items per search call. With PQ codes, lookup tables of 80 bytes per
# dimension and query also have to fit in `_TABLE_BYTES`.
_MAX_QUERIES, _MIN_QUERIES, _TABLE_BYTES = 16_384, 256, 2**27
# PQ codes return this many times k items; the k nearest by true distance are kept.
_RERANK_FACTOR = 2
# Items whose embeddings are summed at once.
_NUM_SUMMED = 65_536


def dedup_features(decoder: Decoder) -> Sequence[str]:
  """Returns the names of the features that a decoder reads.

  Raises:
    UserError: the decoder has no attribute `features`.
  """
  features = getattr(decoder, "features", None)
  if not features:
    raise UserError(
      f"{type(decoder).__name__} needs an attribute `features`, the names of the "
      "features that it reads; they identify copies of a record."
    )
  return features


def content_hashes(
  index: RecordIndex,
  record_numbers: np.ndarray,
  *,
  features: Sequence[str],
  replacements: Optional[Replacements] = None,
) -> np.ndarray:
  """Returns a hash of the decoded features of each record.

  Args:
    index: of the records.
    record_numbers: [N] int64.
    features: names of the decoded features, which exclude features that differ between
      copies, such as file names and addresses.
    replacements: of bad records, which count as copies of their replacements; None to
      refuse bad records.

  Returns:
    [N] uint64; equal where all bytes of these features are equal.

  Raises:
    UserError: a record cannot be read, or is not an example.
  """
  found = np.empty(len(record_numbers), np.uint64)
  for start in range(0, len(found), _READ_AT_ONCE):
    watchdog.beat()
    numbers = record_numbers[start : start + _READ_AT_ONCE]
    if replacements is not None:
      parts = np.array_split(numbers, -(-len(numbers) // _TRIED_AT_ONCE))
      numbers = np.concatenate([replacements.replace(part) for part in parts])
    for position, (number, record) in enumerate(
      zip(numbers, index.read(numbers)), start
    ):
      found[position] = _hash(record, features, index, int(number))
  return found


def _hash(
  record: bytes, features: Sequence[str], index: RecordIndex, number: int
) -> int:
  try:
    example = tf.train.Example.FromString(record)
  except Exception as error:  # protobuf raises its own type.
    raise UserError(f"{index.describe(number)} is not a tf.train.Example.") from error
  content = tf.train.Example()
  for name in features:
    if name in example.features.feature:
      content.features.feature[name].CopyFrom(example.features.feature[name])
  serialized = content.SerializeToString(deterministic=True)
  return int.from_bytes(hashlib.blake2b(serialized, digest_size=8).digest(), "little")


class CorpusItems(NamedTuple):
  """Records with their classes.

  Attributes:
    record_numbers: [N] int64, ascending.
    labels: [N] int32 class ids.
    by_class: [N] int64, items grouped by class, in random order within a class.
    positions: [N] int64, the position of each item in `by_class`.
    starts: [C + 1] int64, where the items of each class start in `by_class`.
    class_ids: [C] int32, ascending.
  """

  record_numbers: np.ndarray
  labels: np.ndarray
  by_class: np.ndarray
  positions: np.ndarray
  starts: np.ndarray
  class_ids: np.ndarray

  @property
  def largest_class(self) -> int:
    """Number of items of the largest class; 0 if there are none."""
    return int(np.diff(self.starts).max(initial=0))


def draw_items(
  table: MemberTable, classes: np.ndarray, records_per_class: Optional[int], key: int
) -> CorpusItems:
  """Draws the items of a round; takes about 60 bytes per record temporarily.

  Args:
    table: the members of all classes.
    classes: int32 ids of the classes to mine.
    records_per_class: the largest number of records per class; None for all.
    key: random key of the records and of their order within the classes.
  """
  classes = np.sort(classes)
  sizes = table.starts[classes + 1] - table.starts[classes]
  ends = np.cumsum(sizes)
  positions = np.arange(sizes.sum()) - np.repeat(ends - sizes, sizes)
  records = table.records[np.repeat(table.starts[classes], sizes) + positions]
  ranks = np.repeat(np.arange(len(classes)), sizes)
  order = np.lexsort((permutation.mix(key, records), ranks))
  # In this order the places of a class are again 0, 1, 2, …
  if records_per_class is not None:
    order = order[positions < records_per_class]
  records, labels = records[order], classes[ranks[order]]
  ascending = np.argsort(records)
  by_class = np.empty(len(records), np.int64)
  by_class[ascending] = np.arange(len(records))
  class_ids, starts = np.unique(labels, return_index=True)
  return CorpusItems(
    records[ascending],
    labels[ascending].astype(np.int32),
    by_class,
    ascending,
    np.append(starts, len(records)).astype(np.int64),
    class_ids.astype(np.int32),
  )


@contextlib.contextmanager
def neighbours_on_disk(num_items: int, num_neighbours: int) -> Iterator[Neighbours]:
  """Yields arrays for search results, mapped from a temporary file.

  The file is removed when the context ends.

  Args:
    num_items: N.
    num_neighbours: k.

  Yields:
    Indices [N, k] int32 and distances [N, k] float32.

  Raises:
    UserError: the temporary folder has no space for 8·N·k bytes.
  """
  shape = (num_items, num_neighbours)
  num_bytes = 4 * num_items * num_neighbours
  with contextlib.ExitStack() as stack:
    try:
      file = stack.enter_context(tempfile.TemporaryFile())
      _allocate(file.fileno(), 2 * num_bytes)
      found = Neighbours(
        np.memmap(file, np.int32, "r+", 0, shape),
        np.memmap(file, np.float32, "r+", num_bytes, shape),
      )
    except OSError as error:
      folder = tempfile.tempdir or os.environ.get("TMPDIR", "the temporary folder")
      raise UserError(
        f"{folder} has no space for {2 * num_bytes:,} bytes of neighbours "
        f"({short_reason(error)}); set TMPDIR to a larger disk, or lower "
        "Miner.records_per_class."
      ) from error
    yield found


def _allocate(descriptor: int, num_bytes: int) -> None:
  """Allocates disk space: writing to a map of a full disk kills the process."""
  if hasattr(os, "posix_fallocate"):
    os.posix_fallocate(descriptor, 0, num_bytes)
  else:  # macOS has none.
    os.truncate(descriptor, num_bytes)


class NearestItems:
  """Search for the nearest items of an item.

  Attributes:
    kind: "exact", or the kind of FAISS's index.

  Args:
    embeddings: [N, D] float32, finite.
    kind: one of `KINDS`. "auto" compares all items up to 50,000, and uses IVF-PQ beyond
      if FAISS is installed. If there are fewer items than an index cell needs, all are
      compared. "flat" and "exact" both compare all items: by FAISS on the CPU of one
      replica if it is installed, otherwise on the devices.

  Raises:
    UserError: the kind is unknown, or FAISS is not installed.
  """

  def __init__(self, embeddings: np.ndarray, kind: str):
    check_kind(kind)
    self._embeddings = embeddings
    self.kind = kind = _resolve_kind(kind, len(embeddings))
    is_exact = kind in ("exact", "flat")
    self._index = None if is_exact else faiss_index.build_index(embeddings, kind)

  def search(
    self, items: np.ndarray, num_neighbours: int, out: Neighbours
  ) -> Neighbours:
    """Finds the nearest other items of each item, nearest first.

    Args:
      items: [R] int64.
      num_neighbours: k < N.
      out: arrays to fill: indices [R, k] int32, −1 if an index cell had no more items;
        and distances [R, k] float32, infinite there. Order and distances of index
        results are computed from the embeddings; PQ codes return twice as many
        candidates.

    Returns:
      `out`.
    """
    num_queries = _MAX_QUERIES
    if self.kind == "ivf_pq":
      by_bytes = _TABLE_BYTES // (80 * self._embeddings.shape[1])
      num_queries = min(_MAX_QUERIES, max(_MIN_QUERIES, by_bytes))
    for start in range(0, len(items), num_queries):
      watchdog.beat()
      part = slice(start, start + num_queries)
      found = self._search(items[part], num_neighbours + 1)
      out.indices[part], out.distances[part] = _remove_self(found, items[part])
    return out

  def _search(self, items: np.ndarray, num_neighbours: int) -> Neighbours:
    queries = self._embeddings[items]
    if self._index is None:
      if not is_faiss_used():
        # Use powers of two, because each size is retraced on the devices.
        size = min(_MAX_QUERIES, max(256, 1 << (len(items) - 1).bit_length()))
        queries = np.resize(queries, [size, queries.shape[1]])
      found = nearest(queries, self._embeddings, num_neighbours=num_neighbours)
      return Neighbours(*(each[: len(items)] for each in found))
    num_candidates = num_neighbours
    if self.kind == "ivf_pq":
      num_candidates = min(_RERANK_FACTOR * num_neighbours, len(self._embeddings))
    _, indices = self._index.search(queries, num_candidates)
    return _rerank(queries, self._embeddings, indices, num_neighbours)


def check_kind(kind: str) -> None:
  """Checks that a kind of search is available.

  Raises:
    UserError: the kind is unknown, or needs FAISS, which is not installed.
  """
  check_choice("Miner.index_kind", kind, KINDS)
  if kind in faiss_index.KINDS and not knn.is_faiss_installed():
    raise UserError(
      f"Miner.index_kind={kind!r} needs FAISS: pip install "
      "'retrieval-trainer[search]', or set 'exact', which compares all items on the "
      "devices."
    )


def _resolve_kind(kind: str, num_items: int) -> str:
  if kind in faiss_index.KINDS_WITH_CELLS and num_items < faiss_index.MIN_PER_CELL:
    return "flat"
  if kind != "auto":
    return kind
  if num_items > _MAX_EXACT:
    if knn.is_faiss_installed():
      return "ivf_pq"
    logging.warning(
      "FAISS is not installed, so all %d items are compared with each other; for an "
      "index: pip install 'retrieval-trainer[search]'.",
      num_items,
    )
    return "exact"
  return "flat" if is_faiss_used() else "exact"


def empty_neighbours(num_items: int, num_neighbours: int) -> Neighbours:
  """Returns empty arrays for search results."""
  shape = (num_items, num_neighbours)
  return Neighbours(np.empty(shape, np.int32), np.empty(shape, np.float32))


def _remove_self(found: Neighbours, items: np.ndarray) -> Neighbours:
  """Removes the query item from neighbours [R, k + 1], or else the last neighbour."""
  is_self = found.indices == items[:, None]
  is_self[:, -1] |= ~is_self.any(axis=1)
  shape = (len(items), found.indices.shape[1] - 1)
  return Neighbours(*(each[~is_self].reshape(shape) for each in found))


def _rerank(
  queries: np.ndarray, embeddings: np.ndarray, indices: np.ndarray, num_neighbours: int
) -> Neighbours:
  """Returns the k nearest of the candidates [R, more], ordered by true distance."""
  faiss = knn.load_faiss()
  squares = np.full(indices.shape, np.inf, np.float32)  # Stays infinite at index −1.
  faiss.fvec_L2sqr_by_idx(
    *map(faiss.swig_ptr, (squares, queries, embeddings, indices)),
    embeddings.shape[1],
    *indices.shape,
  )
  order = np.argsort(squares, axis=1, kind="stable")[:, :num_neighbours]
  indices, squares = (np.take_along_axis(each, order, 1) for each in (indices, squares))
  return Neighbours(indices, np.sqrt(squares))


def class_centroids(embeddings: np.ndarray, items: CorpusItems) -> np.ndarray:
  """Returns the mean embedding of each class, [C, D] float64.

  Args:
    embeddings: [N, D] float32.
    items: N items of C classes.
  """
  sizes = np.diff(items.starts)
  sums = np.zeros((len(sizes), embeddings.shape[1]))
  for start in range(0, len(items.by_class), _NUM_SUMMED):
    rows = items.by_class[start : start + _NUM_SUMMED]
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
  """Finds the nearest classes of each class.

  Args:
    means: [C, D] float64.
    class_ids: [C] int32, the classes of the means.
    num_classes: L.
    num_neighbours: m.
    kind: of the search, as in `NearestItems`.

  Returns:
    [L, m] int32 class ids, nearest first; −1 where there are fewer, and in the rows of
    classes without a mean.

  Raises:
    UserError: there is only one class.
  """
  if len(means) < 2:
    raise UserError(
      "Neighbours of classes need at least 2 classes in the training split."
    )
  num_found = min(num_neighbours, len(means) - 1)
  # Means of collapsed embeddings differ in digits beyond the precision of float32.
  means = (means - common_offset(means)).astype(np.float32)
  out = empty_neighbours(len(means), num_found)
  found = NearestItems(means, kind).search(np.arange(len(means)), num_found, out)
  neighbours = np.full((num_classes, num_neighbours), -1, np.int32)
  is_found = found.indices >= 0
  neighbours[class_ids, :num_found] = np.where(is_found, class_ids[found.indices], -1)
  return neighbours
