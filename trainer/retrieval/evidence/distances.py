"""Distances of sampled pairs of one class, and of two.

Shapes: G items, D dimensions, P pairs.
"""

from __future__ import annotations

from typing import Optional

import numpy as np

from trainer.retrieval.evidence.record import Histogram

NUM_PAIRS = 50_000
_NUM_BINS = 60
# Pairs whose embeddings are held at once.
_NUM_ABREAST = 4_096


def histogram(
  embeddings: np.ndarray, labels: np.ndarray, random: np.random.Generator
) -> Histogram:
  """Draws pairs with replacement, each as likely as any other, and counts.

  Args:
    embeddings: [G, D] float32.
    labels: [G] int.
    random: draws them.

  Returns:
    `NUM_PAIRS` of each kind; none of a kind that the items don't have.
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
  return Histogram(
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
  """Pairs of different items of one class: two arrays [P] int64."""
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
  """Pairs of items of two classes: two arrays [P] int64."""
  num_items = len(class_of)
  weights = sizes * (num_items - sizes.astype(np.float64))
  if not weights.any():
    return np.empty(0, np.int64), np.empty(0, np.int64)
  by_class = np.argsort(class_of, kind="stable")
  starts = np.cumsum(sizes) - sizes
  chosen = random.choice(len(sizes), NUM_PAIRS, p=weights / weights.sum())
  first = random.integers(sizes[chosen])
  # The others of all classes, as if the class were cut out of the ordered items.
  second = random.integers(num_items - sizes[chosen])
  second = np.where(second >= starts[chosen], second + sizes[chosen], second)
  return by_class[starts[chosen] + first], by_class[second]


def _distances(
  embeddings: np.ndarray, first: np.ndarray, second: np.ndarray
) -> np.ndarray:
  """[P] float64, Euclidean."""
  parts = [
    np.linalg.norm(
      embeddings[first[i : i + _NUM_ABREAST]].astype(np.float64)
      - embeddings[second[i : i + _NUM_ABREAST]],
      axis=1,
    )
    for i in range(0, len(first), _NUM_ABREAST)
  ]
  return np.concatenate([np.empty(0), *parts])


def _median(distances: np.ndarray) -> Optional[float]:
  return float(np.median(distances)) if len(distances) else None
