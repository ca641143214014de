"""Exact order of distances, including pairs that float32 products cannot distinguish.

For a query q and an item g, a matrix product computes ‖g‖² / 2 − ⟨q, g⟩, called the
nearness here. It has the same order as the distance. Its error is bounded, so most of
the order is proven; pairs closer than the error are compared by float64 differences of
the vectors.

Shapes: Q queries, G gallery items, D dimensions, k neighbours, n items of a query.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Union

import numpy as np

from trainer.runtime import watchdog

ROUNDOFF_32, ROUNDOFF_64 = 2.0**-24, 2.0**-53
# Items sampled for mean and spread.
_NUM_SAMPLED = 4_096
# Rows checked first, since nearly all data lie on no grid.
_NUM_LOOKED_AT = 256
# Differences held at once, 512 KB, which fits into a cache.
_MAX_NUMBERS = 65_536
# Items converted to float64 at once, and queries they are compared with.
_NUM_CONVERTED, _NUM_QUERIES = 8_192, 512
# Smaller numbers may be flushed to zero.
_SMALLEST_NORMAL = 2.0**-126

Floats = Union[float, np.ndarray]


def common_offset(gallery: np.ndarray) -> np.ndarray:
  """Returns the approximate mean of the items, [D] float32, to centre them.

  Far from zero, the part that all items share uses up the digits in which they differ.
  In each dimension the mean is rounded to a multiple of a power of 2 about as large as
  the spread. Vectors around zero or on a grid stay unchanged.

  Args:
    gallery: [G, D] float; may be memory-mapped.
  """
  step = max(1, -(-len(gallery) // _NUM_SAMPLED))
  sample = np.asarray(gallery[::step], np.float64)
  mean = sample.mean(axis=0)
  # Units below the last place of the mean have no effect.
  spread = np.maximum(sample.std(axis=0), 2.0**-22 * np.abs(mean))
  unit = np.ldexp(1.0, np.frexp(np.maximum(spread, _SMALLEST_NORMAL))[1] - 1)
  return (np.round(mean / unit) * unit).astype(np.float32)


def product_error(
  num_dimensions: int, query_norms: Floats, item_norms: Floats, roundoff: float
) -> Floats:
  """Returns the largest error of a nearness, for any order of summation.

  It is (D + 6) u ‖q‖‖g‖ + 3 u ‖g‖² for a unit roundoff u: D from the product, the rest
  from subtracting the offset, the norms and the difference. Beyond float32's range it
  is infinite. With ‖q‖ + d for the item's norm the bound also holds for comparisons
  with an item at distance d: longer items are farther by more than their larger error.

  Args:
    num_dimensions: D.
    query_norms: norms of queries, after subtracting the offset.
    item_norms: norms of items, after subtracting the offset.
    roundoff: u of the products.

  Returns:
    Error in units of the nearness, in the shape of the norms.
  """
  products = query_norms * item_norms
  error = roundoff * ((num_dimensions + 6) * products + 3 * item_norms**2)
  error = 1.01 * error + (num_dimensions + 6) * _SMALLEST_NORMAL
  return np.where(products + item_norms**2 < 1e37, error, np.inf)


def is_exact_in_float32(offset: np.ndarray, *parts: np.ndarray) -> bool:
  """Returns whether every nearness of these vectors is computed without rounding.

  This holds on a grid that is coarse relative to the vectors' norms, such as that of
  binary codes and small integers.

  Args:
    offset: [D] float32, is subtracted.
    *parts: [n, D] float each; may be memory-mapped.
  """
  # Nearly all data lie on no grid, which the first rows show.
  return all(
    _are_on_coarse_grid([np.float32(part[:end]) - offset for part in parts])
    for end in (_NUM_LOOKED_AT, None)
  )


def _are_on_coarse_grid(parts: Sequence[np.ndarray]) -> bool:
  largest = max(float(np.max(np.abs(part), initial=0.0)) for part in parts)
  if largest == 0.0:
    return True
  # D products of half units sum to less than 2^24, and none exceeds float32's range.
  num_numbers = 2.0**22 / parts[0].shape[1]
  exponent = np.floor(0.5 * np.log2(num_numbers) - np.log2(largest))
  if abs(exponent) > 60:
    return False
  scaled = (part * np.float32(2.0**exponent) for part in parts)
  return all(bool((part == np.rint(part)).all()) for part in scaled)


def squared_distances(
  queries: np.ndarray, gallery: np.ndarray, indices: np.ndarray
) -> np.ndarray:
  """Computes squared distances [Q, n] float64 from float64 differences.

  Args:
    queries: [Q, D] float.
    gallery: [G, D] float; may be memory-mapped.
    indices: [Q, n] int64, items of each query.
  """
  squares = np.empty(indices.shape)
  num_columns = max(1, _MAX_NUMBERS // gallery.shape[1])
  num_rows = max(1, num_columns // max(1, indices.shape[1]))
  for row in range(0, len(queries), num_rows):
    rows = slice(row, row + num_rows)
    own = queries[rows, None].astype(np.float64)
    for column in range(0, indices.shape[1], num_columns):
      columns = slice(column, column + num_columns)
      differences = gallery.take(indices[rows, columns], axis=0).astype(np.float64)
      differences -= own
      np.einsum("qnd,qnd->qn", differences, differences, out=squares[rows, columns])
  return squares


def nearness_in_float64(
  queries: np.ndarray, gallery: np.ndarray, offset: np.ndarray
) -> Iterator[np.ndarray]:
  """Computes the nearness by float64 products, one part of the gallery at a time.

  Args:
    queries: [Q, D] float.
    gallery: [G, D] float; may be memory-mapped.
    offset: [D] float32, subtracted from both.

  Yields:
    [Q, n] float64.
  """
  centred = queries.astype(np.float64) - offset
  for start in range(0, len(gallery), _NUM_CONVERTED):
    items = gallery[start : start + _NUM_CONVERTED].astype(np.float64) - offset
    half_norms = 0.5 * np.einsum("gd,gd->g", items, items)
    yield half_norms - centred @ items.T


def nearest_in_float64(
  queries: np.ndarray,
  gallery: np.ndarray,
  offset: np.ndarray,
  *,
  num_neighbours: int,
  at_most: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
  """Returns indices and squared distances [Q, k] of the proven nearest items.

  Every item whose nearness may be among the k best is compared by float64 differences.
  Among equal distances the lower index comes first.

  Args:
    queries: [Q, D] float.
    gallery: [G, D] float; may be memory-mapped.
    offset: [D] float32, subtracted from both before products.
    num_neighbours: k <= G.
    at_most: [Q] float64, upper bounds on the k-th smallest squared distance.
  """
  size = (len(queries), num_neighbours)
  indices, squares = np.empty(size, np.int64), np.empty(size)
  for start in range(0, len(queries), _NUM_QUERIES):
    watchdog.beat()
    rows = slice(start, start + _NUM_QUERIES)
    candidates = _possibly_nearest(
      queries[rows], gallery, offset, num_neighbours, at_most[rows]
    )
    for row, found in enumerate(candidates, start):
      exact = squared_distances(queries[row, None], gallery, found[None])[0]
      order = np.argsort(exact, kind="stable")[:num_neighbours]
      indices[row], squares[row] = found[order], exact[order]
  return indices, squares


def _possibly_nearest(
  queries: np.ndarray,
  gallery: np.ndarray,
  offset: np.ndarray,
  num_neighbours: int,
  at_most: np.ndarray,
) -> Iterator[np.ndarray]:
  """Yields the items that may be among each query's k nearest, [n] int64 ascending."""
  norms = np.linalg.norm(queries.astype(np.float64) - offset, axis=1)
  reach = norms + np.sqrt(at_most)
  error = product_error(gallery.shape[1], norms, reach, ROUNDOFF_64)
  limits = 0.5 * (at_most - norms**2) + 2.0 * error
  best = np.full([len(queries), num_neighbours], np.inf)
  found: list[tuple[np.ndarray, ...]] = []
  start = 0
  for nearness in nearness_in_float64(queries, gallery, offset):
    is_near = nearness <= limits[:, None]
    if np.count_nonzero(is_near) > best.size:
      both = np.concatenate([best, nearness], axis=1)
      best = np.partition(both, num_neighbours - 1, axis=1)[:, :num_neighbours]
      limits = np.minimum(limits, best.max(axis=1) + 2.0 * error)
      is_near = nearness <= limits[:, None]
    rows, columns = np.nonzero(is_near)
    found.append((rows, start + columns, nearness[is_near]))
    start += nearness.shape[1]
  all_rows, items, values = (np.concatenate(each) for each in zip(*found))
  is_near = values <= limits[all_rows]
  all_rows, items = all_rows[is_near], items[is_near]
  order = np.argsort(all_rows, kind="stable")
  ends = np.cumsum(np.bincount(all_rows, minlength=len(queries)))
  return iter(np.split(items[order], ends[:-1]))
