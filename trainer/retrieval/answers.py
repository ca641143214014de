"""Answers to what a person asks: image files, vectors, or keys of what is embedded.

Shapes: N items, D dimensions, n vectors of a file, k neighbours.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Callable, NamedTuple, Optional

import numpy as np

from trainer.errors import UserError
from trainer.retrieval.embedding_folder import EmbeddingFolder
from trainer.retrieval.rankings import check_finite
from trainer.retrieval.search import Neighbours

# Embeds the bytes of an image file: [D] float32.
EmbedFn = Callable[[bytes], np.ndarray]
# The nearest items of queries [Q, D] and their number.
NearestFn = Callable[[np.ndarray, int], Neighbours]


class Hit(NamedTuple):
  """An item that was found.

  Attributes:
    item: its row.
    key: its name.
    class_name: its class.
    distance: from the query, Euclidean.
  """

  item: int
  key: str
  class_name: str
  distance: float


class Answer(NamedTuple):
  """What was found for a query, or why nothing was.

  Attributes:
    query: as it was asked.
    hits: nearest first.
    error: what is wrong with the query; None if nothing is.
  """

  query: str
  hits: Sequence[Hit] = ()
  error: Optional[str] = None

  def items(self) -> list[int]:
    """The rows of the hits."""
    return [hit.item for hit in self.hits]


class Query(NamedTuple):
  """A query as a vector.

  Attributes:
    name: as it was asked.
    vector: [D] float32.
    row: of the item that it is itself; None if it is none.
  """

  name: str
  vector: np.ndarray
  row: Optional[int] = None


def answer(
  asked: Sequence[str],
  kept: EmbeddingFolder,
  *,
  embed_fn: EmbedFn,
  nearest_fn: NearestFn,
  num_neighbours: int,
) -> list[Answer]:
  """Answers each query; one that can't be answered holds up none of the others.

  Args:
    asked: paths of image files, paths of `.npy` files with vectors [n, D] or [D], or
      keys. What a key names is not its own neighbour.
    kept: the embeddings that are searched.
    embed_fn: embeds an image.
    nearest_fn: searches.
    num_neighbours: k.

  Returns:
    An answer for each query, in order; n for a file of n vectors.

  Raises:
    UserError: nothing is asked, or there are not so many neighbours.
  """
  if not asked:
    raise UserError("Nothing is asked; name an image, a .npy file or a key by --query.")
  answers = []
  for name in asked:
    try:
      queries = _queries(name, kept, embed_fn)
    except UserError as error:
      answers.append(Answer(name, error=str(error)))
      continue
    answers += [_found(query, kept, nearest_fn, num_neighbours) for query in queries]
  return answers


def _queries(name: str, kept: EmbeddingFolder, embed_fn: EmbedFn) -> list[Query]:
  if name.endswith(".npy") and os.path.exists(name):
    vectors = np.atleast_2d(_vectors(name))
    return [Query(f"{name}[{row}]", vector) for row, vector in enumerate(vectors)]
  if os.path.exists(name):
    with open(name, "rb") as file:
      return [Query(name, embed_fn(file.read()))]
  row = kept.position(name)
  if row is None:
    raise UserError(f"{name} is neither a file nor a key of what is embedded.")
  return [Query(name, np.asarray(kept.embeddings[row], np.float32), row)]


def _vectors(path: str) -> np.ndarray:
  try:
    vectors = np.load(path, allow_pickle=False)
    vectors = vectors.astype(np.float32)
  except (OSError, ValueError) as error:
    raise UserError(f"{path} holds no array of numbers.") from error
  if vectors.ndim not in (1, 2):
    raise UserError(f"{path} holds an array of {vectors.shape}, not one of vectors.")
  return vectors


def _found(
  query: Query, kept: EmbeddingFolder, nearest_fn: NearestFn, num_neighbours: int
) -> Answer:
  try:
    check_finite(query.vector[None])
    num_wanted = num_neighbours + (query.row is not None)
    found = nearest_fn(query.vector[None], num_wanted)
  except UserError as error:
    return Answer(query.name, error=str(error))
  pairs = zip(found.indices[0].tolist(), found.distances[0].tolist())
  hits = [
    Hit(item, kept.keys[item], kept.class_names[int(kept.labels[item])], distance)
    for item, distance in pairs
    if item >= 0 and item != query.row
  ]
  return Answer(query.name, hits[:num_neighbours])
