"""Search by image, vector or key, and sampled queries of an evaluation.

Shapes: N items, D dimensions, Q sampled queries, n vectors of a file, k neighbours.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Callable, NamedTuple, Optional

import numpy as np

from trainer.errors import UserError
from trainer.retrieval.embedding_store import EmbeddingFolder
from trainer.retrieval.ground_truth import LabelGroundTruth
from trainer.retrieval.knn import Neighbours, check_sizes, nearest

_MAX_QUERIES, _MAX_NEIGHBOURS = 2_000, 100
# Queries with more excluded items would need a much deeper search.
_MAX_EXCLUDED = 200

# Below this squared norm, squared distances fit into float32.
_MAX_SQUARE = float(np.finfo(np.float32).max) / 8.0


class SampledResults(NamedTuple):
  """Sampled queries and their nearest items, without excluded items.

  Attributes:
    queries: [Q] int64, items.
    neighbours: [Q, k] int64, items, nearest first.
    is_right: [Q, k] bool, whether they are relevant.
  """

  queries: np.ndarray
  neighbours: np.ndarray
  is_right: np.ndarray


def sample_results(
  embeddings: np.ndarray,
  ground_truth: LabelGroundTruth,
  items: np.ndarray,
  *,
  seed: int = 0,
) -> SampledResults:
  """Samples queries at random and finds their neighbours, on all replicas.

  Args:
    embeddings: [N, D] float32, finite.
    ground_truth: queries, gallery and ground truth.
    items: [n] int64, the items to draw from; each has relevant items.
    seed: random seed of the drawing.

  Returns:
    At most 2,000 queries with at most 100 neighbours each.
  """
  rng = np.random.default_rng(seed)
  rows = np.flatnonzero(np.isin(ground_truth.queries, items))
  drawn = np.sort(rng.permutation(rows)[:_MAX_QUERIES])
  pairs = [ground_truth.relevant_and_excluded(query) for query in drawn]
  num_excluded = np.array([len(excluded) for _, excluded in pairs])
  is_kept = num_excluded <= max(_MAX_EXCLUDED, num_excluded.min())
  drawn, most = drawn[is_kept], int(num_excluded[is_kept].max())
  num_neighbours = min(_MAX_NEIGHBOURS, len(ground_truth.gallery) - most)
  found = nearest(
    embeddings[ground_truth.queries[drawn]],
    embeddings[ground_truth.gallery],
    num_neighbours=num_neighbours + most,
  ).indices
  neighbours = np.empty([len(drawn), num_neighbours], np.int64)
  is_right = np.empty([len(drawn), num_neighbours], bool)
  for position, row in enumerate(np.flatnonzero(is_kept)):
    relevant, excluded = pairs[row]
    counting = found[position][~np.isin(found[position], excluded)]
    neighbours[position] = counting[:num_neighbours]
    is_right[position] = np.isin(neighbours[position], relevant)
  return SampledResults(
    ground_truth.queries[drawn], ground_truth.gallery[neighbours], is_right
  )


# Embeds the bytes of an image file; returns [D] float32.
EmbedFn = Callable[[bytes], np.ndarray]
# Returns the nearest items of queries [Q, D], given k.
NearestFn = Callable[[np.ndarray, int], Neighbours]


class Hit(NamedTuple):
  """An item that was found.

  Attributes:
    item: its row.
    key: its name.
    class_name: its class.
    distance: Euclidean distance from the query.
  """

  item: int
  key: str
  class_name: str
  distance: float


class QueryResult(NamedTuple):
  """Result of a query, or its error.

  Attributes:
    query: the query as given.
    hits: nearest first.
    error: why the query is invalid; None if it is valid.
  """

  query: str
  hits: Sequence[Hit] = ()
  error: Optional[str] = None

  def items(self) -> list[int]:
    """Returns the rows of the hits."""
    return [hit.item for hit in self.hits]


class Query(NamedTuple):
  """A query as a vector.

  Attributes:
    name: the query as given.
    vector: [D] float32.
    row: row of the item with this key; None if the query is not an item.
  """

  name: str
  vector: np.ndarray
  row: Optional[int] = None


def search(
  queries: Sequence[str],
  stored: EmbeddingFolder,
  *,
  embed_fn: EmbedFn,
  nearest_fn: NearestFn,
  num_neighbours: int,
) -> list[QueryResult]:
  """Searches for each query; an invalid query does not affect the others.

  Args:
    queries: paths of image files, paths of `.npy` files with vectors [n, D] or [D], or
      keys. The item of a key is excluded from its own neighbours.
    stored: the embeddings that are searched.
    embed_fn: embeds an image.
    nearest_fn: searches.
    num_neighbours: k.

  Returns:
    One result per query, in order; n for a file of n vectors.

  Raises:
    UserError: there are no queries.
  """
  if not queries:
    raise UserError(
      "No query is given; add --query with an image, a .npy file or a key."
    )
  results: list[QueryResult] = []
  valid: dict[int, Query] = {}
  for name in queries:
    try:
      loaded = _load_queries(name, stored, embed_fn)
    except UserError as error:
      results.append(QueryResult(name, error=str(error)))
      continue
    for query in loaded:
      problem = _find_error(query, stored.embeddings.shape, num_neighbours)
      if problem is None:
        valid[len(results)] = query
      results.append(QueryResult(query.name, error=problem))
  if valid:
    found = _search_all(list(valid.values()), stored, nearest_fn, num_neighbours)
    for position, result in zip(valid, found):
      results[position] = result
  return results


def _load_queries(name: str, stored: EmbeddingFolder, embed_fn: EmbedFn) -> list[Query]:
  row = None if os.path.isfile(name) else stored.position(name)
  if row is None and os.path.exists(name):
    if name.lower().endswith(".npy"):
      vectors = np.atleast_2d(_vectors(name))
      return [Query(f"{name}[{row}]", vector) for row, vector in enumerate(vectors)]
    return [Query(name, embed_fn(_content(name)))]
  if row is None:
    raise UserError(f"{name} is neither a file nor a key of the embeddings.")
  return [Query(name, np.asarray(stored.embeddings[row], np.float32), row)]


def _content(path: str) -> bytes:
  try:
    with open(path, "rb") as file:
      return file.read()
  except OSError as error:
    raise UserError(f"It can't be read: {error.strerror}.") from error


def _vectors(path: str) -> np.ndarray:
  try:
    vectors = np.load(path, allow_pickle=False)
  except Exception as error:  # Python's parser of the header raises many types.
    raise UserError(f"{path} does not hold an array of numbers.") from error
  if not isinstance(vectors, np.ndarray) or vectors.dtype.kind not in "fiub":
    raise UserError(f"{path} does not hold an array of numbers.")
  if vectors.ndim not in (1, 2) or not vectors.size:
    raise UserError(
      f"{path} holds an array of shape {vectors.shape}; it must be one vector or a "
      "matrix of vectors."
    )
  with np.errstate(over="ignore"):  # Infinities are reported later.
    return vectors.astype(np.float32)


def _find_error(
  query: Query, gallery_shape: Sequence[int], num_neighbours: int
) -> Optional[str]:
  """Returns why a query has no result; None if it is valid."""
  num_others = gallery_shape[0] - (query.row is not None)
  try:
    check_sizes(query.vector[None], (num_others, gallery_shape[1]), num_neighbours)
  except UserError as error:
    return str(error)
  if not np.isfinite(query.vector).all():
    return "The vector has values that are not finite."
  if not np.square(query.vector, dtype=np.float64).sum() < _MAX_SQUARE:
    return "The vector is too long for distances in float32."
  return None


def _search_all(
  queries: Sequence[Query],
  stored: EmbeddingFolder,
  nearest_fn: NearestFn,
  num_neighbours: int,
) -> Iterator[QueryResult]:
  """Searches for all queries at once; omits a query's own item from its results."""
  num_wanted = num_neighbours + any(query.row is not None for query in queries)
  vectors = np.stack([query.vector for query in queries])
  found = nearest_fn(vectors, min(num_wanted, len(stored.keys)))
  for query, items, distances in zip(queries, *map(np.ndarray.tolist, found)):
    hits = [
      Hit(
        item, stored.keys[item], stored.class_names[int(stored.labels[item])], distance
      )
      for item, distance in zip(items, distances)
      if item >= 0 and item != query.row
    ]
    yield QueryResult(query.name, hits[:num_neighbours])
