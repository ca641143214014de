"""The order of distances, exact where float32 products can't tell it.

A matrix product gives, for a query q and an item g, the nearness ‖g‖² / 2 − ⟨q, g⟩,
which orders as the distance does. Its error is bounded, so most of the order is proven;
what lies within the error is compared by float64 differences of the vectors.

Shapes: Q queries, G gallery items, D dimensions, k neighbours, n items of a query.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Union

import numpy as np

from trainer.runtime import watchdog

ROUNDOFF_32, ROUNDOFF_64 = 2.0**-24, 2.0**-53
# Items of which mean and spread are taken.
_NUM_SAMPLED = 4_096
# Rows that are looked at first, as nearly all data are on no grid.
_NUM_LOOKED_AT = 256
# Differences that are held at once, 512 KB, which a cache holds.
_MAX_NUMBERS = 65_536
# Items that are converted to float64 at once, and queries they are compared with.
_NUM_CONVERTED, _NUM_QUERIES = 8_192, 512
# What is smaller may be flushed to zero.
_SMALLEST_NORMAL = 2.0**-126

Floats = Union[float, np.ndarray]


def common_offset(gallery: np.ndarray) -> np.ndarray:
  """[D] float32, about the mean of the items, to be subtracted before products.

  Far from zero, what all items have in common takes the digits in which they differ. In
  each dimension the mean is rounded to a power of 2 about as large as the spread: what
  lies around zero, or on a grid, stays as it is.

  Args:
    gallery: [G, D] float; may be mapped.
  """
  step = max(1, -(-len(gallery) // _NUM_SAMPLED))
  sample = np.asarray(gallery[::step], np.float64)
  mean = sample.mean(axis=0)
  # Units below the last place of the mean are of no use.
  spread = np.maximum(sample.std(axis=0), 2.0**-22 * np.abs(mean))
  unit = np.ldexp(1.0, np.frexp(np.maximum(spread, _SMALLEST_NORMAL))[1] - 1)
  return (np.round(mean / unit) * unit).astype(np.float32)


def product_error(
  num_dimensions: int, query_norms: Floats, item_norms: Floats, roundoff: float
) -> Floats:
  """The largest error of a nearness whose product is summed in any order.

  It is (D + 6) u ‖q‖‖g‖ + 3 u ‖g‖² for a unit roundoff u: D of the product, the rest of
  the offset's subtraction, the norms and the difference. Beyond float32's range it is
  infinite. With ‖q‖ + d for the item's norm the bound also holds for comparisons with
  an item at distance d: what is longer is farther by more than its larger error.

  Args:
    num_dimensions: D.
    query_norms: norms of queries, less the offset.
    item_norms: norms of items, less the offset.
    roundoff: u of the products.

  Returns:
    As large as the norms, in units of the nearness.
  """
  products = query_norms * item_norms
  error = roundoff * ((num_dimensions + 6) * products + 3 * item_norms**2)
  error = 1.01 * error + (num_dimensions + 6) * _SMALLEST_NORMAL
  return np.where(products + item_norms**2 < 1e37, error, np.inf)


def is_exact_in_float32(offset: np.ndarray, *parts: np.ndarray) -> bool:
  """Whether every nearness of these vectors is computed without any rounding.

  That holds on a grid that is coarse beside the vectors' norms, as that of binary codes
  and of small integers.

  Args:
    offset: [D] float32, is subtracted.
    *parts: [n, D] float each; may be mapped.
  """
  # Nearly all data are on no grid, which the first rows show.
  return all(
    _are_on_coarse_grid([np.float32(part[:end]) - offset for part in parts])
    for end in (_NUM_LOOKED_AT, None)
  )


def _are_on_coarse_grid(parts: Sequence[np.ndarray]) -> bool:
  largest = max(float(np.max(np.abs(part), initial=0.0)) for part in parts)
  if largest == 0.0:
    return True
  # D products of half units add up to less than 2^24, and none leaves float32's range.
  num_numbers = 2.0**22 / parts[0].shape[1]
  exponent = np.floor(0.5 * np.log2(num_numbers) - np.log2(largest))
  if abs(exponent) > 60:
    return False
  scaled = (part * np.float32(2.0**exponent) for part in parts)
  return all(bool((part == np.rint(part)).all()) for part in scaled)


def squared_distances(
  queries: np.ndarray, gallery: np.ndarray, indices: np.ndarray
) -> np.ndarray:
  """[Q, n] float64 squared distances, from float64 differences.

  Args:
    queries: [Q, D] float.
    gallery: [G, D] float; may be mapped.
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
  """Nearness by products in float64, of one part of the gallery after the other.

  Args:
    queries: [Q, D] float.
    gallery: [G, D] float; may be mapped.
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
  """Indices and squared distances [Q, k] of the nearest items, proven for each query.

  Every item whose nearness may be among the k best is compared by float64 differences;
  among equal ones the lower index comes first.

  Args:
    queries: [Q, D] float.
    gallery: [G, D] float; may be mapped.
    offset: [D] float32, subtracted from both before products.
    num_neighbours: k <= G.
    at_most: [Q] float64, squared distances that some k items do not exceed.
  """
  size = (len(queries), num_neighbours)
  indices, squares = np.empty(size, np.int64), np.empty(size)
  for start in range(0, len(queries), _NUM_QUERIES):
    watchdog.beat()
    rows = slice(start, start + _NUM_QUERIES)
    candidates = _perhaps_nearest(
      queries[rows], gallery, offset, num_neighbours, at_most[rows]
    )
    for row, found in enumerate(candidates, start):
      exact = squared_distances(queries[row, None], gallery, found[None])[0]
      order = np.argsort(exact, kind="stable")[:num_neighbours]
      indices[row], squares[row] = found[order], exact[order]
  return indices, squares


def _perhaps_nearest(
  queries: np.ndarray,
  gallery: np.ndarray,
  offset: np.ndarray,
  num_neighbours: int,
  at_most: np.ndarray,
) -> Iterator[np.ndarray]:
  """For each query the items that may be among its k nearest, [n] int64 ascending."""
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
