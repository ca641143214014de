"""Embeddings in the plane, distances of pairs, and files of TensorBoard's projector.

`tensorboard --logdir=MODEL_DIR` finds these files by `projector_config.pbtxt`.

Shapes: M items of the map, G evaluated items, D dimensions, P pairs.
"""

from __future__ import annotations

import base64
import os
from typing import Optional

import numpy as np
import tensorflow as tf
from threadpoolctl import threadpool_limits

from trainer.retrieval.report_data import DistanceHistogram, EmbeddingMap, Sprite
from trainer.runtime import filesystem

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
