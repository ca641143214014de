"""FAISS indexes: built by size, measured, and stored with a manifest.

    index.faiss      as written by FAISS
    manifest.json    kind, provenance and measured recall; written last

Shapes: N items, D dimensions, Q queries, k neighbours.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from trainer.errors import UserError
from trainer.retrieval import knn
from trainer.retrieval.exact_distances import common_offset, squared_distances
from trainer.retrieval.knn import Neighbours, check_sizes, nearest
from trainer.runtime import filesystem
from trainer.runtime.filesystem import sha256_of

FILE_NAME, MANIFEST_NAME = "index.faiss", "manifest.json"
KINDS_WITH_CELLS = ("ivf_flat", "ivf_pq")
KINDS = ("flat", *KINDS_WITH_CELLS, "hnsw")
# Up to the first number of items a flat search is fast; from the second, codes save
# memory.
_MAX_FLAT, _MIN_CODES = 20_000, 1_000_000
_HNSW_LINKS, _HNSW_EFFORT = 32, 128
_BITS_A_DIMENSION = 4
# Training items per cell, sampled by FAISS, which warns below the minimum.
MIN_PER_CELL, _MAX_PER_CELL = 39, 64
_NUM_MEASURED, _MEASURED_K = 1_000, 10
# Items added at once, and candidates in addition to k.
_NUM_ADDED, _NUM_MORE = 262_144, 16


def choose_kind(num_items: int) -> str:
  """Returns the kind of index for a size: "flat", "ivf_flat" or "ivf_pq"."""
  if num_items <= _MAX_FLAT:
    return "flat"
  return "ivf_flat" if num_items < _MIN_CODES else "ivf_pq"


def build_index(embeddings: np.ndarray, kind: str) -> Any:
  """Builds an index sized by the number of items.

  - flat: compares every item, exactly.
  - ivf_flat: 4√N cells, of which 1/16 are searched, at least 8.
  - ivf_pq: the same, with 4 bits per dimension instead of 32, scanned 32 items at once.
  - hnsw: a graph with 32 links per item, searched with effort 128.

  The index subtracts the common offset of all items from items and queries, because
  FAISS compares in float32.

  Args:
    embeddings: [N, D] float32, finite.
    kind: one of `KINDS`.

  Returns:
    A FAISS index for Euclidean distance.

  Raises:
    UserError: the kind is unknown or there are too few items for it, or FAISS is not
      installed.
  """
  faiss = knn.load_faiss()
  num_items, num_dimensions = embeddings.shape
  if kind == "flat":
    index = faiss.IndexFlatL2(num_dimensions)
  elif kind == "hnsw":
    index = faiss.IndexHNSWFlat(num_dimensions, _HNSW_LINKS)
    index.hnsw.efSearch = _HNSW_EFFORT
  elif kind in KINDS_WITH_CELLS:
    index = _cells(faiss, num_items, num_dimensions, has_codes=kind == "ivf_pq")
  else:
    raise UserError(f"kind={kind!r} must be one of {', '.join(KINDS)}.")
  offset = common_offset(embeddings)
  if kind in KINDS_WITH_CELLS:
    index.train(_training_vectors(embeddings, offset, index.nlist))
  if offset.any():
    index = _less_offset(faiss, index, offset)
  for start in range(0, num_items, _NUM_ADDED):
    index.add(embeddings[start : start + _NUM_ADDED])
  return index


def _training_vectors(
  embeddings: np.ndarray, offset: np.ndarray, num_cells: int
) -> np.ndarray:
  """Returns the vectors to train cells with, of which FAISS draws a sample."""
  if not offset.any():
    return embeddings
  num_drawn = min(len(embeddings), num_cells * _MAX_PER_CELL)
  drawn = np.random.default_rng(0).permutation(len(embeddings))[:num_drawn]
  return embeddings[np.sort(drawn)] - offset


def _less_offset(faiss: Any, index: Any, offset: np.ndarray) -> Any:
  """Returns an index that subtracts an offset from items and queries."""
  centring = faiss.CenteringTransform(len(offset))
  faiss.copy_array_to_vector(offset, centring.mean)
  centring.is_trained = True
  return faiss.IndexPreTransform(centring, index)


def _cells(faiss: Any, num_items: int, num_dimensions: int, *, has_codes: bool) -> Any:
  num_cells = min(round(4 * math.sqrt(num_items)), num_items // MIN_PER_CELL)
  if num_cells < 1:
    raise UserError(
      f"{num_items} items are too few for an index with cells; set kind to 'flat'."
    )
  quantizer = faiss.IndexFlatL2(num_dimensions)
  if has_codes:
    index = faiss.IndexIVFPQFastScan(
      quantizer, num_dimensions, num_cells, num_dimensions, _BITS_A_DIMENSION
    )
  else:
    index = faiss.IndexIVFFlat(quantizer, num_dimensions, num_cells)
  index.cp.max_points_per_centroid = _MAX_PER_CELL
  index.nprobe = min(num_cells, max(8, num_cells // 16))
  return index


def measure_index(
  index: Any, embeddings: np.ndarray, *, seed: int = 0
) -> dict[str, float]:
  """Measures an index against exact search, without the query itself.

  Args:
    index: of these embeddings.
    embeddings: [N, D] float32.
    seed: random seed for drawing query items.

  Returns:
    "recall_at_10", the share of the 10 nearest other items that it finds, and
    "queries_per_second"; empty for a single item.
  """
  num_items = len(embeddings)
  k = min(_MEASURED_K, num_items - 1)
  if k < 1:
    return {}
  drawn = np.random.default_rng(seed).permutation(num_items)[:_NUM_MEASURED]
  items = np.sort(drawn)
  queries = np.asarray(embeddings[items], np.float32)
  exact = nearest(queries, embeddings, num_neighbours=k + 1).indices
  start = time.perf_counter()
  _, found = index.search(queries, k + 1)
  seconds = time.perf_counter() - start
  others = (
    [row[row != item][:k] for row in rows] for item, *rows in zip(items, exact, found)
  )
  hits = [len(np.intersect1d(*rows)) for rows in others]
  return {
    f"recall_at_{k}": float(np.mean(hits) / k),
    "queries_per_second": len(queries) / seconds,
  }


def write_index(folder: str, index: Any, manifest: Mapping[str, Any]) -> None:
  """Writes an index, and its manifest last.

  Args:
    folder: is created if it is missing; an existing index is replaced.
    index: of FAISS.
    manifest: description of the index; size and hash are added.
  """
  os.makedirs(folder, exist_ok=True)
  path = os.path.join(folder, FILE_NAME)
  manifest_path = os.path.join(folder, MANIFEST_NAME)
  # Write both before replacing either, so that a full disk leaves the old index valid.
  with (
    filesystem.replacing(manifest_path) as new_manifest,
    filesystem.replacing(path) as new,
  ):
    knn.load_faiss().write_index(index, new)
    content = {
      **manifest,
      "num_items": index.ntotal,
      "num_dimensions": index.d,
      "distance": "euclidean",
      "sha256": sha256_of(new),
    }
    filesystem.write_bytes(new_manifest, json.dumps(content, indent=2).encode())


class StoredIndex:
  """An index on disk.

  Attributes:
    manifest: description of the index.

  Args:
    folder: written by `write_index`.

  Raises:
    UserError: there is no index, its file does not match its manifest, or FAISS is not
      installed.
  """

  def __init__(self, folder: str):
    path = os.path.join(folder, FILE_NAME)
    try:
      with open(os.path.join(folder, MANIFEST_NAME), encoding="utf-8") as file:
        self.manifest: dict[str, Any] = json.load(file)
      is_same = self.manifest["sha256"] == sha256_of(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
      raise UserError(f"{folder} has no index; run --mode=index first.") from error
    if not is_same:
      raise UserError(
        f"{path} is not the index that {MANIFEST_NAME} describes; run --mode=index "
        "again."
      )
    self._index = knn.load_faiss().read_index(path)

  def nearest(
    self, queries: np.ndarray, embeddings: np.ndarray, *, num_neighbours: int
  ) -> Neighbours:
    """Finds the approximately nearest items; index −1 where cells hold fewer.

    The results of the index and a few more are ordered by true distance. A flat index
    compares all items, so it is replaced by the exact search.

    Args:
      queries: [Q, D] float32, finite.
      embeddings: [N, D] float32, the embeddings of the index; may be memory-mapped.
      num_neighbours: k <= N.

    Raises:
      UserError: k exceeds the gallery size, or the dimensions differ.
    """
    check_sizes(queries, (self._index.ntotal, self._index.d), num_neighbours)
    if self.manifest.get("kind") == "flat":
      return nearest(queries, embeddings, num_neighbours=num_neighbours)
    num_found = min(num_neighbours + _NUM_MORE, self._index.ntotal)
    found = np.sort(self._index.search(queries, num_found)[1], axis=1)
    squares = squared_distances(queries, embeddings, np.maximum(found, 0))
    squares[found < 0] = np.inf
    order = np.argsort(squares, axis=1, kind="stable")[:, :num_neighbours]
    indices, squares = (
      np.take_along_axis(each, order, axis=1) for each in (found, squares)
    )
    return Neighbours(indices, np.sqrt(squares).astype(np.float32))
