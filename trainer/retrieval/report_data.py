"""The data of a report, `eval/report_data.json`.

Items are identified by their position among the evaluated items. Pictures are data
URIs.

Shapes: G items, Q queries, k neighbours.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, Optional, Union

import numpy as np

from trainer.errors import UserError
from trainer.runtime import filesystem

REPORT_DATA_FILE = os.path.join("eval", "report_data.json")

NUM_QUERIES = 24
NUM_NEIGHBOURS = 8
_NUM_CONFUSIONS = 12
# Among the shown queries; the others are correct, so that both kinds are shown.
_MOST_MISTAKES = 18


@dataclasses.dataclass(frozen=True)
class DistanceHistogram:
  """Distances of sampled pairs, in bins of equal width.

  Attributes:
    low: lower edge of the first bin, distance units.
    high: upper edge of the last bin.
    positive: number of positive pairs per bin.
    negative: number of negative pairs per bin.
    positive_median: of the sampled pairs; None if there are no such pairs.
    negative_median: likewise.
  """

  low: float
  high: float
  positive: Sequence[int]
  negative: Sequence[int]
  positive_median: Optional[float]
  negative_median: Optional[float]


@dataclasses.dataclass(frozen=True)
class Neighbour:
  """One neighbour of a query.

  Attributes:
    item: position of the item.
    class_name: its class.
    distance: Euclidean distance from the query.
    is_right: whether it is of the query's class.
  """

  item: int
  class_name: str
  distance: float
  is_right: bool


@dataclasses.dataclass(frozen=True)
class ShownQuery:
  """A query with its nearest neighbours.

  Attributes:
    item: position of the item.
    class_name: its class.
    neighbours: nearest first.
  """

  item: int
  class_name: str
  neighbours: Sequence[Neighbour]

  @property
  def is_mistake(self) -> bool:
    """Whether its nearest neighbour is of another class."""
    return not self.neighbours[0].is_right


@dataclasses.dataclass(frozen=True)
class Confusion:
  """Queries of one class whose nearest neighbour is of one other class.

  Attributes:
    class_name: of the queries.
    taken_for: class of the nearest neighbour.
    num_mistakes: number of these queries.
    num_queries: number of all queries of the class.
    query: item of one of them, which is among the shown queries.
    neighbour: its nearest item.
  """

  class_name: str
  taken_for: str
  num_mistakes: int
  num_queries: int
  query: int
  neighbour: int


@dataclasses.dataclass(frozen=True)
class Sprite:
  """Many small pictures in one, row by row.

  Attributes:
    picture: the data URI.
    columns: pictures per row.
    rows: number of rows.
    width: of one picture, pixels.
    height: likewise.
  """

  picture: str
  columns: int
  rows: int
  width: int
  height: int


@dataclasses.dataclass(frozen=True)
class EmbeddingMap:
  """A sample of items in the plane.

  Attributes:
    method: projection method, "t-SNE" or "PCA".
    items: positions of the items.
    class_names: of each item.
    x: of each item, 0 to 1, left to right.
    y: of each item, 0 to 1, upwards.
    is_mistake: whether the nearest neighbour is of another class; None if the item was
      not a query.
    sprite: their pictures, in their order; None if inputs are not pictures.
  """

  method: str
  items: Sequence[int]
  class_names: Sequence[str]
  x: Sequence[float]
  y: Sequence[float]
  is_mistake: Sequence[Optional[bool]]
  sprite: Optional[Sprite]


@dataclasses.dataclass(frozen=True)
class ReportData:
  """The data of a report.

  Attributes:
    num_items: number of evaluated items.
    num_queries: number of given queries with another item of their class.
    num_mistakes: number of these whose nearest neighbour is of another class.
    num_classes: classes of the items.
    histogram: distances of sampled pairs.
    recall_at: recall@k for k = 1, 2, ...
    queries: shown queries, errors first.
    confusions: the most frequent first.
    embedding_map: a sample in the plane.
    pictures: data URIs by item, as text.
  """

  num_items: int
  num_queries: int
  num_mistakes: int
  num_classes: int
  histogram: DistanceHistogram
  recall_at: Sequence[float]
  queries: Sequence[ShownQuery]
  confusions: Sequence[Confusion]
  embedding_map: EmbeddingMap
  pictures: Mapping[str, str]

  def write(self, model_dir: str) -> None:
    """Writes `eval/report_data.json` atomically.

    Args:
      model_dir: folder of the run.
    """
    path = os.path.join(model_dir, REPORT_DATA_FILE)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    filesystem.replace_file(path, json.dumps(dataclasses.asdict(self)))

  @classmethod
  def read(cls, model_dir: str) -> Optional[ReportData]:
    """Reads the report data of a run; returns None if there is none.

    Args:
      model_dir: folder of the run.

    Raises:
      UserError: the file is damaged, or was written by another version of this package.
    """
    path = os.path.join(model_dir, REPORT_DATA_FILE)
    if not os.path.exists(path):
      return None
    try:
      with open(path, encoding="utf-8") as file:
        return _of_json(json.load(file))
    except (ValueError, KeyError, TypeError) as error:
      raise UserError(
        f"{path} can't be read ({error}); run --mode=evaluate again."
      ) from error


def _of_json(content: dict[str, Any]) -> ReportData:
  place = content["embedding_map"]
  sprite = place["sprite"] and Sprite(**place["sprite"])
  queries = [
    ShownQuery(**{**query, "neighbours": [Neighbour(**n) for n in query["neighbours"]]})
    for query in content["queries"]
  ]
  parts = {
    "histogram": DistanceHistogram(**content["histogram"]),
    "queries": queries,
    "confusions": [Confusion(**each) for each in content["confusions"]],
    "embedding_map": EmbeddingMap(**{**place, "sprite": sprite}),
  }
  return ReportData(**{**content, **parts})


@dataclasses.dataclass(frozen=True)
class QueryResults:
  """Queries with a relevant item, and their neighbours.

  Attributes:
    embeddings: [G, D] float32.
    labels: [G] int.
    queries: [Q] int64, items.
    neighbours: [Q, k] int64, items, nearest first.
    is_right: [Q, k] bool, whether a neighbour is relevant to the query.
    class_names: name of each label.
  """

  embeddings: np.ndarray
  labels: np.ndarray
  queries: np.ndarray
  neighbours: np.ndarray
  is_right: np.ndarray
  class_names: Union[Sequence[str], Mapping[int, str]]

  def name(self, item: int) -> str:
    """Returns the name of an item's class."""
    return self.class_names[int(self.labels[item])]


def confused_classes(results: QueryResults) -> list[Confusion]:
  """Returns the most frequent pairs of a query's class and its nearest item's class.

  Args:
    results: results of all queries.

  Returns:
    At most 12, the most frequent first; among equals the lower labels. The example
    query of a pair is the one nearest to its wrong neighbour.
  """
  of_another = (
    results.labels[results.neighbours[:, 0]] != results.labels[results.queries]
  )
  mistakes = np.flatnonzero(~results.is_right[:, 0] & of_another)
  queries, found = (results.queries[mistakes], results.neighbours[mistakes, 0])
  pairs, pair_of, counts = np.unique(
    np.stack([results.labels[queries], results.labels[found]]),
    axis=1,
    return_inverse=True,
    return_counts=True,
  )
  pair_of = np.ravel(pair_of)  # Only NumPy 2.0 returns another shape.
  distances = np.linalg.norm(
    results.embeddings[queries] - results.embeddings[found], axis=1
  )
  labels, sizes = np.unique(results.labels[results.queries], return_counts=True)
  num_queries = dict(zip(labels.tolist(), sizes.tolist()))
  most = []
  for pair in np.argsort(-counts, kind="stable")[:_NUM_CONFUSIONS]:
    members = np.flatnonzero(pair_of == pair)
    example = members[np.argmin(distances[members])]
    most.append(
      Confusion(
        class_name=results.name(queries[example]),
        taken_for=results.name(found[example]),
        num_mistakes=int(counts[pair]),
        num_queries=num_queries[int(pairs[0, pair])],
        query=int(queries[example]),
        neighbour=int(found[example]),
      )
    )
  return most


def shown_queries(
  results: QueryResults, wanted: Sequence[int], random: np.random.Generator
) -> list[ShownQuery]:
  """Selects queries to show: those wanted, then random wrong and correct ones.

  Args:
    results: results of all queries.
    wanted: items of wrong queries that must be included.
    random: draws the others.

  Returns:
    At most 24; wrong ones first, those with the most wrong neighbours at the top.
  """
  is_right = results.is_right
  rows = random.permutation(len(results.queries))
  is_first = ~np.isin(results.queries[rows], wanted)
  rows = rows[np.argsort(is_first, kind="stable")]  # Wanted queries come first.
  mistakes, right = rows[~is_right[rows, 0]], rows[is_right[rows, 0]]
  num_mistakes = min(len(mistakes), max(_MOST_MISTAKES, NUM_QUERIES - len(right)))
  chosen = [*mistakes[:num_mistakes], *right[: NUM_QUERIES - num_mistakes]]
  num_wrong = (~is_right[:, :NUM_NEIGHBOURS]).sum(axis=1)
  chosen.sort(key=lambda row: (is_right[row, 0], -num_wrong[row], row))
  return [_query(results, row) for row in chosen]


def _query(results: QueryResults, row: int) -> ShownQuery:
  item = int(results.queries[row])
  neighbours = [
    Neighbour(
      item=int(other),
      class_name=results.name(other),
      distance=float(
        np.linalg.norm(results.embeddings[item] - results.embeddings[other])
      ),
      is_right=bool(is_right),
    )
    for other, is_right in zip(
      results.neighbours[row, :NUM_NEIGHBOURS], results.is_right[row]
    )
  ]
  return ShownQuery(item=item, class_name=results.name(item), neighbours=neighbours)
