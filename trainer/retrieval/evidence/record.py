"""`eval/evidence.json`: from which the page of a run can be written again.

Items are named by their position among those evaluated. Pictures are data URIs.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, Optional

from trainer.data import paths
from trainer.errors import UserError

FILE_NAME = os.path.join("eval", "evidence.json")


@dataclasses.dataclass(frozen=True)
class Histogram:
  """Distances of sampled pairs, in bins of equal width.

  Attributes:
    low: lower edge of the first bin, distance units.
    high: upper edge of the last bin.
    positive: number of pairs of one class, by bin.
    negative: number of pairs of two classes, by bin.
    positive_median: of the sampled pairs; None if there is no such pair.
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
  """One answer to a query.

  Attributes:
    item: which item it is.
    class_name: its class.
    distance: from the query, Euclidean.
    is_right: whether it is of the query's class.
  """

  item: int
  class_name: str
  distance: float
  is_right: bool


@dataclasses.dataclass(frozen=True)
class Query:
  """A query with its nearest neighbours.

  Attributes:
    item: which item it is.
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
  """Queries of one class whose nearest neighbour is of one other.

  Attributes:
    class_name: of the queries.
    taken_for: class of the nearest neighbour.
    num_mistakes: how many queries.
    num_queries: how many the class has in all.
    query: item of one of them, which is among the shown queries.
    neighbour: item that is nearest to it.
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
    columns: pictures in a row.
    rows: how many rows.
    width: of one of them, pixels.
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
    method: what laid it out, "t-SNE" or "PCA".
    items: which items they are.
    class_names: of each.
    x: of each, 0 to 1, left to right.
    y: of each, 0 to 1, upwards.
    is_mistake: of each, whether its nearest neighbour is of another class; None if it
      was no query.
    sprite: their pictures, in their order; None if inputs are no pictures.
  """

  method: str
  items: Sequence[int]
  class_names: Sequence[str]
  x: Sequence[float]
  y: Sequence[float]
  is_mistake: Sequence[Optional[bool]]
  sprite: Optional[Sprite]


@dataclasses.dataclass(frozen=True)
class Evidence:
  """All of it.

  Attributes:
    num_items: how many items were evaluated.
    num_queries: how many of the queries given have another item of their class.
    num_mistakes: how many of these have a nearest neighbour of another class.
    num_classes: classes of the items.
    histogram: distances of sampled pairs.
    recall_at: recall@k for k = 1, 2, ...
    queries: shown ones, mistakes first.
    confusions: the most frequent first.
    embedding_map: a sample in the plane.
    pictures: data URIs by item, as text.
  """

  num_items: int
  num_queries: int
  num_mistakes: int
  num_classes: int
  histogram: Histogram
  recall_at: Sequence[float]
  queries: Sequence[Query]
  confusions: Sequence[Confusion]
  embedding_map: EmbeddingMap
  pictures: Mapping[str, str]

  def write(self, model_dir: str) -> None:
    """Writes `eval/evidence.json`, whole.

    Args:
      model_dir: folder of the run.
    """
    path = os.path.join(model_dir, FILE_NAME)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    paths.replace_file(path, json.dumps(dataclasses.asdict(self)))

  @classmethod
  def read(cls, model_dir: str) -> Optional[Evidence]:
    """The evidence of a run; None where none was collected.

    Args:
      model_dir: folder of the run.

    Raises:
      UserError: the file is damaged, or of another version of this package.
    """
    path = os.path.join(model_dir, FILE_NAME)
    if not os.path.exists(path):
      return None
    try:
      with open(path, encoding="utf-8") as file:
        return _of_json(json.load(file))
    except (ValueError, KeyError, TypeError) as error:
      raise UserError(
        f"{path} can't be read ({error}); measure again with --mode=evaluate."
      ) from error


def _of_json(content: dict[str, Any]) -> Evidence:
  place = content["embedding_map"]
  sprite = place["sprite"] and Sprite(**place["sprite"])
  queries = [
    Query(**{**query, "neighbours": [Neighbour(**n) for n in query["neighbours"]]})
    for query in content["queries"]
  ]
  parts = {
    "histogram": Histogram(**content["histogram"]),
    "queries": queries,
    "confusions": [Confusion(**each) for each in content["confusions"]],
    "embedding_map": EmbeddingMap(**{**place, "sprite": sprite}),
  }
  return Evidence(**{**content, **parts})
