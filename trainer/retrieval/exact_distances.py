"""The order of distances, exact where float32 products can't tell it.

A matrix product gives, for a query q and an item g, the nearness ‖g‖² / 2 − ⟨q, g⟩,
which orders as the distance does. Its error is bounded, so most of the order is proven;
what lies within the error is compared by float64 differences of the vectors.

Shapes: Q queries, G gallery items, D dimensions, k neighbours, n items of a query.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Union

import numpy as np

from trainer import heartbeat

ROUNDOFF_32, ROUNDOFF_64 = 2.0**-24, 2.0**-53
# Items of which mean and spread are taken.
_NUM_SAMPLED = 4_096
# Rows that are looked at first, as nearly all data are on no grid.
_NUM_LOOKED_AT = 256
# Numbers in float64 that are held at once, 32 MB and 128 MB.
_MAX_NUMBERS, _MAX_NEARNESSES = 4_000_000, 16_000_000
# Items that are converted to float64 at once: a part that a cache holds.
_NUM_CONVERTED = 8_192
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
    for column in range(0, indices.shape[1], num_columns):
      columns = slice(column, column + num_columns)
      differences = gallery[indices[rows, columns]].astype(np.float64)
      differences -= queries[rows, None]
      squares[rows, columns] = np.einsum("qnd,qnd->qn", differences, differences)
  return squares


def nearness_in_float64(
  queries: np.ndarray, gallery: np.ndarray, offset: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Nearness by products in float64.

  Args:
    queries: [Q, D] float.
    gallery: [G, D] float; may be mapped.
    offset: [D] float32, subtracted from both.

  Returns:
    [Q, G] float64; the norms [Q] of the queries, less the offset; and the largest norm
    of an item.
  """
  centred = queries.astype(np.float64) - offset
  nearness = np.empty([len(queries), len(gallery)])
  largest = 0.0
  for start in range(0, len(gallery), _NUM_CONVERTED):
    items = gallery[start : start + _NUM_CONVERTED].astype(np.float64) - offset
    squares = np.einsum("gd,gd->g", items, items)
    largest = max(largest, float(squares.max()))
    part = nearness[:, start : start + _NUM_CONVERTED]
    np.subtract(0.5 * squares, centred @ items.T, out=part)
  return nearness, np.linalg.norm(centred, axis=1), largest**0.5


def nearest_in_float64(
  queries: np.ndarray, gallery: np.ndarray, offset: np.ndarray, *, num_neighbours: int
) -> tuple[np.ndarray, np.ndarray]:
  """Indices and squared distances [Q, k] of the nearest items, proven for each query.

  Every item whose nearness is within two errors of the k-th is compared by float64
  differences; among equal ones the lower index comes first.

  Args:
    queries: [Q, D] float.
    gallery: [G, D] float; may be mapped.
    offset: [D] float32, subtracted from both before products.
    num_neighbours: k <= G.
  """
  size = (len(queries), num_neighbours)
  indices, squares = np.empty(size, np.int64), np.empty(size)
  num_rows = max(1, _MAX_NEARNESSES // len(gallery))
  for start in range(0, len(queries), num_rows):
    heartbeat.beat()
    rows = queries[start : start + num_rows]
    nearness, norms, largest = nearness_in_float64(rows, gallery, offset)
    last = np.partition(nearness, num_neighbours - 1, axis=1)[:, num_neighbours - 1]
    reach = norms + np.sqrt(np.maximum(2.0 * last + norms**2, 0.0))
    reach = np.minimum(1.01 * reach, largest)
    error = product_error(gallery.shape[1], norms, reach, ROUNDOFF_64)
    for row, limit in enumerate(last + 2.0 * error):
      found = np.flatnonzero(nearness[row] <= limit)
      exact = squared_distances(rows[row, None], gallery, found[None])[0]
      order = np.argsort(exact, kind="stable")[:num_neighbours]
      indices[start + row], squares[start + row] = found[order], exact[order]
  return indices, squares
