"""Collects the data of a report from an evaluation.

Shapes: G items, D dimensions, Q queries, k neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Callable, Optional, Union

import numpy as np

from trainer.errors import UserError
from trainer.retrieval import embedding_map, pictures, report_data
from trainer.retrieval.ranking import check_finite
from trainer.retrieval.report_data import (
  EmbeddingMap,
  QueryResults,
  ReportData,
  ShownQuery,
)

NUM_MAPPED = 1_000
_MAX_CURVE_K = 100
_THUMBNAIL_SIDE, _SPRITE_SIDE = 64, 40

PicturesFn = Callable[[np.ndarray], Sequence[bytes]]


def collect_report_data(
  embeddings: np.ndarray,
  labels: np.ndarray,
  neighbours: np.ndarray,
  queries: np.ndarray,
  *,
  class_names: Union[Sequence[str], Mapping[int, str]],
  is_right: Optional[np.ndarray] = None,
  pictures_fn: Optional[PicturesFn] = None,
  seed: int = 0,
) -> ReportData:
  """Samples the data of a report; the same seed gives the same sample.

  Queries whose class has no other item are left out, unless `is_right` is given.

  Args:
    embeddings: [G, D] float32.
    labels: [G] int.
    neighbours: [Q, k] int64, items nearest to each query, nearest first, without the
      query itself.
    queries: [Q] int64, the query items.
    class_names: name of each label.
    is_right: [Q, k] bool, whether a neighbour is relevant; None if the items of the
      query's class are relevant.
    pictures_fn: returns PNG files, all of one size, of items [n] int64; None if inputs
      are not pictures.
    seed: random seed of the samples.

  Raises:
    UserError: an embedding is not finite, no query has a relevant item, or there are no
      neighbours.
  """
  results = _query_results(
    embeddings, labels, neighbours, queries, is_right, class_names
  )
  is_right = results.is_right
  random = np.random.default_rng(seed)
  curve = np.logical_or.accumulate(is_right[:, :_MAX_CURVE_K], axis=1).mean(axis=0)
  confusions = report_data.confused_classes(results)
  wanted = [confusion.query for confusion in confusions]
  shown = report_data.shown_queries(results, wanted, random)
  return ReportData(
    num_items=len(labels),
    num_queries=len(results.queries),
    num_mistakes=int((~is_right[:, 0]).sum()),
    num_classes=len(np.unique(labels)),
    histogram=embedding_map.distance_histogram(embeddings, labels, random),
    recall_at=[float(value) for value in curve],
    queries=shown,
    confusions=confusions,
    embedding_map=_map(results, shown, pictures_fn, random),
    pictures=_pictures(shown, pictures_fn),
  )


def _query_results(
  embeddings: np.ndarray,
  labels: np.ndarray,
  neighbours: np.ndarray,
  queries: np.ndarray,
  is_right: Optional[np.ndarray],
  class_names: Union[Sequence[str], Mapping[int, str]],
) -> QueryResults:
  """Returns the results of the queries with a relevant item."""
  check_finite(embeddings)
  _, class_of, sizes = np.unique(labels, return_inverse=True, return_counts=True)
  has_relevant = sizes[class_of][queries] > 1
  if is_right is None:
    is_right = labels[neighbours] == labels[queries][:, None]
  else:
    has_relevant = np.ones(len(queries), bool)
  if not has_relevant.any() or not neighbours.shape[1]:
    raise UserError(
      f"Report data of {len(queries)} queries with {neighbours.shape[1]} neighbours "
      "each: at least one query must have a neighbour and another item of its class."
    )
  queries, found = queries[has_relevant], neighbours[has_relevant]
  return QueryResults(
    embeddings, labels, queries, found, is_right[has_relevant], class_names
  )


def _map(
  results: QueryResults,
  shown: Sequence[ShownQuery],
  pictures_fn: Optional[PicturesFn],
  random: np.random.Generator,
) -> EmbeddingMap:
  """Returns a map of the shown queries and of other items drawn at random."""
  shown_items = [query.item for query in shown]
  others = np.setdiff1d(np.arange(len(results.labels)), shown_items)
  num_others = min(NUM_MAPPED - len(shown_items), len(others))
  items = np.sort([*shown_items, *random.choice(others, num_others, replace=False)])
  method, places = embedding_map.lay_out(results.embeddings[items])
  is_right = dict(zip(results.queries.tolist(), results.is_right[:, 0].tolist()))
  sprite = None
  if pictures_fn is not None:
    images = pictures.shrink(pictures_fn(items), _SPRITE_SIDE)
    sprite = pictures.sprite(images)
  return EmbeddingMap(
    method=method,
    items=items.tolist(),
    class_names=[results.name(item) for item in items],
    x=[round(x, 4) for x in places[:, 0].tolist()],
    y=[round(y, 4) for y in places[:, 1].tolist()],
    is_mistake=[
      not is_right[item] if item in is_right else None for item in items.tolist()
    ],
    sprite=sprite,
  )


def _pictures(
  shown: Sequence[ShownQuery], pictures_fn: Optional[PicturesFn]
) -> dict[str, str]:
  """Returns thumbnails of shown queries and their neighbours, by item."""
  if pictures_fn is None:
    return {}
  items = sorted(
    {query.item for query in shown} | {n.item for q in shown for n in q.neighbours}
  )
  images = pictures.shrink(pictures_fn(np.array(items)), _THUMBNAIL_SIDE)
  return {str(item): pictures.data_uri(image) for item, image in zip(items, images)}
