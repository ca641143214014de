"""Which classes are near each other, by the means of their embeddings.

Shapes: N items, D dimensions, C classes of the items, L of the data, m neighbours.
"""

from __future__ import annotations

import numpy as np

from trainer.errors import UserError
from trainer.mining.items import Items
from trainer.mining.nearest_items import NearestItems, room_for
from trainer.retrieval.exact_distances import common_offset

# Items whose embeddings are added up at once.
_NUM_ADDED = 65_536


def centroids(embeddings: np.ndarray, items: Items) -> np.ndarray:
  """[C, D] float64, the mean of each class's embeddings.

  Args:
    embeddings: [N, D] float32.
    items: N of them, of C classes.
  """
  sizes = np.diff(items.starts)
  sums = np.zeros((len(sizes), embeddings.shape[1]))
  for start in range(0, len(items.by_class), _NUM_ADDED):
    rows = items.by_class[start : start + _NUM_ADDED]
    first = np.searchsorted(items.starts, start, side="right") - 1
    last = np.searchsorted(items.starts, start + len(rows), side="left")
    cuts = np.maximum(items.starts[first:last] - start, 0)
    added = np.add.reduceat(embeddings[rows], cuts, axis=0, dtype=np.float64)
    sums[first:last] += added
  return sums / sizes[:, None]


def find(
  means: np.ndarray,
  class_ids: np.ndarray,
  *,
  num_classes: int,
  num_neighbours: int,
  kind: str,
) -> np.ndarray:
  """The classes nearest to each class.

  Args:
    means: [C, D] float64.
    class_ids: [C] int32, whose they are.
    num_classes: L.
    num_neighbours: m.
    kind: of the search, as `NearestItems` has them.

  Returns:
    [L, m] int32 class ids, nearest first; −1 where there are fewer, and in the rows of
    classes that have no mean.

  Raises:
    UserError: there is one class only.
  """
  if len(means) < 2:
    raise UserError("Neighbours of classes need at least 2 classes.")
  num_found = min(num_neighbours, len(means) - 1)
  # Means of collapsed embeddings differ in digits that float32 has no room for.
  means = (means - common_offset(means)).astype(np.float32)
  room = room_for(len(means), num_found)
  found = NearestItems(means, kind).search(np.arange(len(means)), num_found, room)
  neighbours = np.full((num_classes, num_neighbours), -1, np.int32)
  is_there = found.indices >= 0
  neighbours[class_ids, :num_found] = np.where(is_there, class_ids[found.indices], -1)
  return neighbours
