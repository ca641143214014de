"""Embeddings with distances below float32 resolution, and their true order.

Shapes: N items, D dimensions, Q queries, G gallery items.
"""

from __future__ import annotations

import numpy as np

NUM_ITEMS, NUM_DIMENSIONS = 240, 32
SPREADS = (1e-2, 1e-3, 1e-4, 1e-5)


def _normal(shape, seed):
  return np.random.default_rng(seed).normal(size=shape) / NUM_DIMENSIONS**0.5


def _unit(vectors):
  return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def collapsed(spread, num_items=NUM_ITEMS):
  """Returns [N, D] float32 unit vectors around one point."""
  point = _unit(_normal([1, NUM_DIMENSIONS], 1))
  moved = point + spread * _normal([num_items, NUM_DIMENSIONS], 2)
  return _unit(moved).astype(np.float32)


def scattered(spread, num_items=NUM_ITEMS, num_points=6):
  """Returns [N, D] float32 vectors around a few distant points."""
  points = _unit(_normal([num_points, NUM_DIMENSIONS], 3))
  chosen = np.random.default_rng(4).integers(0, num_points, num_items)
  moves = _normal([num_items, NUM_DIMENSIONS], 5)
  return (points[chosen] + spread * moves).astype(np.float32)


def _with_outliers():
  vectors = 1.0 + 1e-3 * _normal([NUM_ITEMS, NUM_DIMENSIONS], 6)
  vectors[::100] *= 1e4
  return vectors


def _of_unequal_dimensions():
  vectors = 1.0 + 1e-4 * _normal([NUM_ITEMS, NUM_DIMENSIONS], 7)
  vectors[:, 0] = 1e3 * _normal([NUM_ITEMS], 8)
  return vectors


def _copies():
  rows = np.random.default_rng(9).integers(0, 12, NUM_ITEMS)
  return _unit(_normal([12, NUM_DIMENSIONS], 10))[rows]


def _cases():
  shape = [NUM_ITEMS, NUM_DIMENSIONS]
  cases = {f"collapsed to {spread:g}": collapsed(spread) for spread in SPREADS}
  cases.update({f"scattered by {spread:g}": scattered(spread) for spread in SPREADS})
  return {
    **cases,
    "ordinary": _unit(_normal(shape, 11)),
    "with outliers": _with_outliers(),
    "of unequal dimensions": _of_unequal_dimensions(),
    "copies": _copies(),
    "one point": np.repeat(_unit(_normal([1, NUM_DIMENSIONS], 12)), NUM_ITEMS, axis=0),
    "binary codes": np.sign(_normal(shape, 13)),
    "zeros": np.zeros(shape),
    "far from zero": 1e6 + _normal(shape, 14),
    "huge": 1e18 * _normal(shape, 15),
    "tiny": 1e-22 * _normal(shape, 16),
    "below the normal range": 1e-40 * _normal(shape, 17),
  }


CASES = {name: vectors.astype(np.float32) for name, vectors in _cases().items()}


def true_distances(queries, gallery):
  """Returns [Q, G] float64 distances from float64 differences."""
  differences = queries[:, None].astype(np.float64) - gallery[None].astype(np.float64)
  return np.sqrt(np.einsum("qgd,qgd->qg", differences, differences))


def true_order(queries, gallery):
  """Returns [Q, G] int64 items, nearest first, ties by index."""
  return np.argsort(true_distances(queries, gallery), axis=1, kind="stable")
