"""Collects the data of a report, and writes the files of TensorBoard's projector.

The data has sampled queries, distances of pairs, and embeddings in the plane.
`tensorboard --logdir=MODEL_DIR` finds the files by `projector_config.pbtxt`.

Shapes: G items, of which M are in the map, D dimensions, Q queries, k neighbours, P
pairs.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping, Sequence
from typing import Callable, Optional, Union

import numpy as np
import tensorflow as tf
from threadpoolctl import threadpool_limits

from trainer.errors import UserError
from trainer.retrieval import pictures, report_data
from trainer.retrieval.ranking import check_finite
from trainer.retrieval.report_data import (
  DistanceHistogram,
  EmbeddingMap,
  QueryResults,
  ReportData,
  ShownQuery,
  Sprite,
)
from trainer.runtime import filesystem

NUM_MAPPED = 1_000
_MAX_CURVE_K = 100
_THUMBNAIL_SIDE, _SPRITE_SIDE = 64, 40

PicturesFn = Callable[[np.ndarray], Sequence[bytes]]

# With fewer items, t-SNE has too few neighbours.
_LEAST_ITEMS = 12
_PERPLEXITY = 30.0
# Principal components used as input of t-SNE, as by its authors.
_NUM_COMPONENTS = 50
# Half of the usual number: 500 more lower the divergence of 1,000 items by 4 %.
_NUM_ITERATIONS = 500

NUM_PAIRS = 50_000
_NUM_BINS = 60
# Pairs with embeddings in memory at once.
_PAIRS_AT_A_TIME = 4_096

CONFIG_FILE = "projector_config.pbtxt"
_FOLDER = "projector"
_NEAREST = {True: "wrong", False: "right", None: "not asked"}
_VECTORS, _METADATA, _SPRITE = "vectors.tsv", "metadata.tsv", "sprite.png"


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
    histogram=distance_histogram(embeddings, labels, random),
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
  method, places = lay_out(results.embeddings[items])
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


def lay_out(embeddings: np.ndarray) -> tuple[str, np.ndarray]:
  """Projects items by t-SNE of principal components, or by the latter alone.

  Principal components alone are used for fewer than 12 items, or without variance in
  two directions.

  Args:
    embeddings: [M, D] float32, finite.

  Returns:
    "t-SNE" or "PCA", and [M, 2] float64 within 0 to 1, both axes at the same scale.

  Source: van der Maaten & Hinton 2008, https://jmlr.org/papers/v9/vandermaaten08a.html
  """
  components = _principal_components(embeddings)
  num_items = len(components)
  if num_items < _LEAST_ITEMS or not components[:, :2].any(axis=0).all():
    return "PCA", _scaled(components[:, :2])
  from sklearn.manifold import TSNE  # Imported late: report pages do not need it.

  estimator = TSNE(
    perplexity=min(_PERPLEXITY, (num_items - 1) / 3),
    init="pca",
    max_iter=_NUM_ITERATIONS,
    random_state=0,
  )
  # Its threads wait for each other at every step. If other threads, such as
  # TensorFlow's, occupy the cores, two threads take ten times as long as one.
  with threadpool_limits(1):
    places = estimator.fit_transform(components.astype(np.float32))
  return "t-SNE", _scaled(places.astype(np.float64))


def _principal_components(embeddings: np.ndarray) -> np.ndarray:
  """Returns [M, >= 2] float64, the largest first; 0 where there is no variance."""
  centred = embeddings.astype(np.float64)
  centred -= centred.mean(axis=0)
  left, sizes, _ = np.linalg.svd(centred, full_matrices=False)
  # Smaller ones are rounding errors.
  sizes = np.where(sizes > 1e-6 * max(np.abs(embeddings).max(), 1e-30), sizes, 0.0)
  components = (left * sizes)[:, :_NUM_COMPONENTS]
  return np.pad(components, ((0, 0), (0, max(0, 2 - components.shape[1]))))


def _scaled(places: np.ndarray) -> np.ndarray:
  low, high = places.min(axis=0), places.max(axis=0)
  span = (high - low).max() or 1.0
  return 0.5 + (places - (low + high) / 2) / span


def distance_histogram(
  embeddings: np.ndarray, labels: np.ndarray, random: np.random.Generator
) -> DistanceHistogram:
  """Samples pairs uniformly with replacement, and counts their distances.

  Args:
    embeddings: [G, D] float32.
    labels: [G] int.
    random: draws them.

  Returns:
    Counts of `NUM_PAIRS` pairs of each kind; none of a kind that does not exist.
  """
  _, class_of, sizes = np.unique(labels, return_inverse=True, return_counts=True)
  pairs = [
    _positive_pairs(class_of, sizes, random),
    _negative_pairs(class_of, sizes, random),
  ]
  positive, negative = (_distances(embeddings, *pair) for pair in pairs)
  both = np.concatenate([positive, negative])
  low, high = float(both.min(initial=np.inf)), float(both.max(initial=0.0))
  low = min(low, high)
  high = high if high > low else low + 1.0
  counts = [np.histogram(d, _NUM_BINS, (low, high))[0] for d in (positive, negative)]
  return DistanceHistogram(
    low=low,
    high=high,
    positive=counts[0].tolist(),
    negative=counts[1].tolist(),
    positive_median=_median(positive),
    negative_median=_median(negative),
  )


def _positive_pairs(
  class_of: np.ndarray, sizes: np.ndarray, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
  """Draws pairs of different items of one class: two arrays [P] int64."""
  weights = sizes * (sizes - 1.0)
  if not weights.any():
    return np.empty(0, np.int64), np.empty(0, np.int64)
  by_class = np.argsort(class_of, kind="stable")
  starts = np.cumsum(sizes) - sizes
  chosen = random.choice(len(sizes), NUM_PAIRS, p=weights / weights.sum())
  first = random.integers(sizes[chosen])
  second = random.integers(sizes[chosen] - 1)
  second += second >= first  # Any but the first.
  return by_class[starts[chosen] + first], by_class[starts[chosen] + second]


def _negative_pairs(
  class_of: np.ndarray, sizes: np.ndarray, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
  """Draws pairs of items of two classes: two arrays [P] int64."""
  num_items = len(class_of)
  weights = sizes * (num_items - sizes.astype(np.float64))
  if not weights.any():
    return np.empty(0, np.int64), np.empty(0, np.int64)
  by_class = np.argsort(class_of, kind="stable")
  starts = np.cumsum(sizes) - sizes
  chosen = random.choice(len(sizes), NUM_PAIRS, p=weights / weights.sum())
  first = random.integers(sizes[chosen])
  # Items of other classes, numbered as if the class were removed from the order.
  second = random.integers(num_items - sizes[chosen])
  second = np.where(second >= starts[chosen], second + sizes[chosen], second)
  return by_class[starts[chosen] + first], by_class[second]


def _distances(
  embeddings: np.ndarray, first: np.ndarray, second: np.ndarray
) -> np.ndarray:
  """Computes Euclidean distances, [P] float64."""
  parts = [
    np.linalg.norm(
      embeddings[first[i : i + _PAIRS_AT_A_TIME]].astype(np.float64)
      - embeddings[second[i : i + _PAIRS_AT_A_TIME]],
      axis=1,
    )
    for i in range(0, len(first), _PAIRS_AT_A_TIME)
  ]
  return np.concatenate([np.empty(0), *parts])


def _median(distances: np.ndarray) -> Optional[float]:
  return float(np.median(distances)) if len(distances) else None


def write_projector(
  model_dir: str, sample: EmbeddingMap, embeddings: np.ndarray
) -> None:
  """Writes the projector's files, the config last, so that it names existing files.

  Args:
    model_dir: folder of the run.
    sample: items with their classes and pictures.
    embeddings: [G, D] float32, of all items.
  """
  os.makedirs(os.path.join(model_dir, _FOLDER), exist_ok=True)
  vectors = embeddings[np.asarray(sample.items)]
  lines = ["\t".join(f"{value:.6g}" for value in vector) for vector in vectors]
  _write_vectors(model_dir, _VECTORS, "\n".join(lines).encode())
  # TensorBoard treats the first line as a header only if there are two columns.
  rows = zip(sample.items, sample.class_names, sample.is_mistake)
  lines = [f"{item}\t{_one_cell(name)}\t{_NEAREST[no]}" for item, name, no in rows]
  _write_vectors(
    model_dir, _METADATA, "\n".join(["item\tclass\tnearest", *lines]).encode()
  )
  config = (
    'embeddings {\n  tensor_name: "embeddings"\n'
    f'  tensor_path: "{_FOLDER}/{_VECTORS}"\n'
    f'  metadata_path: "{_FOLDER}/{_METADATA}"\n'
  )
  if sample.sprite is not None:
    _write_vectors(model_dir, _SPRITE, _png(sample.sprite))
    sizes = f"{sample.sprite.width} single_image_dim: {sample.sprite.height}"
    config += (
      f'  sprite {{ image_path: "{_FOLDER}/{_SPRITE}" single_image_dim: {sizes} }}\n'
    )
  filesystem.replace_file(os.path.join(model_dir, CONFIG_FILE), config + "}\n")


def _write_vectors(model_dir: str, name: str, content: bytes) -> None:
  filesystem.replace_file(os.path.join(model_dir, _FOLDER, name), content)


def _one_cell(text: str) -> str:
  """Returns the text without characters that end a cell or a line."""
  return " ".join(text.split()) or "-"


def _png(sprite: Sprite) -> bytes:
  """Returns the sprite as PNG, whatever its format."""
  _, _, content = sprite.picture.partition("base64,")
  image = tf.io.decode_image(base64.b64decode(content), expand_animations=False)
  return tf.io.encode_png(image).numpy()
