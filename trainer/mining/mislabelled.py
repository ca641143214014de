"""Items that probably have a wrong label, by the labels of what is nearest to them.

Shapes: N items, k neighbours, q of them that are asked.
"""

from __future__ import annotations

import dataclasses
import math

import gin
import numpy as np

from trainer.errors import UserError

_ROWS_AT_ONCE = 4_096


@gin.register
@dataclasses.dataclass(frozen=True)
class MislabelledFilter:
  """An item is doubted where nearly all of its nearest are of one other label.

  That is: of its q nearest other items at least ⌈q·min_share⌉ have one and the same
  label, which is not its own. Copies of the item say nothing, and count as of no label.
  What is doubted is no anchor, no positive and no negative.

  Attributes:
    num_neighbours: q.
    min_share: above 0.5, at most 1.

  Raises:
    UserError: none is asked, or half of them would be enough.
  """

  num_neighbours: int = 10
  min_share: float = 0.9

  def __post_init__(self):
    if self.num_neighbours < 1 or not 0.5 < self.min_share <= 1:
      raise UserError(
        f"MislabelledFilter of {self.num_neighbours} neighbours and a share of "
        f"{self.min_share} doubts too easily; ask at least 1, and more than half."
      )

  def doubted(
    self, neighbours: np.ndarray, labels: np.ndarray, contents: np.ndarray
  ) -> np.ndarray:
    """Which items are doubted.

    Args:
      neighbours: [N, k] int32 items, nearest first; −1 for none.
      labels: [N] int32.
      contents: [N] uint64, alike for copies.

    Returns:
      [N] bool.
    """
    is_doubted = np.zeros(len(labels), bool)
    needed = math.ceil(self.num_neighbours * self.min_share)
    for start in range(0, len(labels), _ROWS_AT_ONCE):
      rows = slice(start, start + _ROWS_AT_ONCE)
      asked = neighbours[rows, : self.num_neighbours]
      says = (asked >= 0) & (contents[asked] != contents[rows, None])
      said = np.where(says & (labels[asked] != labels[rows, None]), labels[asked], -1)
      num_alike = (said[:, :, None] == said[:, None, :]).sum(axis=2)
      is_doubted[rows] = (np.where(said >= 0, num_alike, 0) >= needed).any(axis=1)
    return is_doubted
