"""Windows of negatives, and items that are probably mislabelled.

Shapes: R anchors, k neighbours, nearest first, n negatives.

Shapes: N items, k neighbours, q of them that are asked.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Protocol

import gin
import numpy as np

from trainer.errors import UserError

_ROWS_AT_ONCE = 4_096


class NegativeWindow(Protocol):
  """Chooses negatives among neighbours."""

  @property
  def num_negatives(self) -> int:
    """N, of an anchor at most."""

  @property
  def depth(self) -> int:
    """How many of the nearest of other labels are looked at."""

  def choose(
    self,
    distances: np.ndarray,
    is_candidate: np.ndarray,
    farthest_positive: np.ndarray,
  ) -> np.ndarray:
    """[R, n] int64 columns of the neighbours, nearest first; −1 where there are fewer.

    Args:
      distances: [R, k] float32, ascending.
      is_candidate: [R, k] bool, which neighbours may be negatives.
      farthest_positive: [R] float32, distance of the anchor's farthest positive.
    """


@gin.register
class RankWindow:
  """The neighbours of other labels from one rank to another; 1 is the nearest.

  What is nearest of all is often of the anchor's class in truth, hence a first rank
  above 1 (as in Xiong et al., 2021, https://arxiv.org/abs/2007.00808, who draw from the
  first 200, and Qu et al., 2021, https://arxiv.org/abs/2010.08191, on such negatives).

  Attributes:
    num_negatives: last − first + 1.
    depth: last.

  Args:
    first: the first rank.
    last: the last rank.

  Raises:
    UserError: there is no rank from the first to the last.
  """

  def __init__(self, *, first: int, last: int):
    if not 1 <= first <= last:
      raise UserError(
        f"RankWindow of ranks {first} to {last} has none; 1 is the nearest negative."
      )
    self._first = first
    self.num_negatives = last - first + 1
    self.depth = last

  def choose(
    self,
    distances: np.ndarray,
    is_candidate: np.ndarray,
    farthest_positive: np.ndarray,
  ) -> np.ndarray:
    """As `NegativeWindow.choose`; distances are not looked at."""
    ranks = np.cumsum(is_candidate, axis=1)
    is_inside = is_candidate & (ranks >= self._first) & (ranks <= self.depth)
    return first_columns(is_inside, self.num_negatives)


@gin.register
class MarginWindow:
  """Semi-hard: d_ap < d_an < d_ap + margin, p the farthest of the anchor's positives.

  Source: Schroff et al., "FaceNet", 2015, https://arxiv.org/abs/1503.03832, where each
  anchor has one positive.

  Args:
    margin: Euclidean distance.
    num_negatives: n; of more inside of the window the nearest.
    depth: how many of the nearest of other labels are looked at.

  Raises:
    UserError: the margin is not above 0, or fewer are looked at than are wanted.
  """

  def __init__(self, *, margin: float, num_negatives: int, depth: int = 100):
    if margin <= 0:
      raise UserError(f"MarginWindow.margin={margin} must be above 0.")
    if not 1 <= num_negatives <= depth:
      raise UserError(
        f"MarginWindow.num_negatives={num_negatives} must be from 1 to depth={depth}."
      )
    self._margin = margin
    self.num_negatives = num_negatives
    self.depth = depth

  def choose(
    self,
    distances: np.ndarray,
    is_candidate: np.ndarray,
    farthest_positive: np.ndarray,
  ) -> np.ndarray:
    """As `NegativeWindow.choose`."""
    nearest, farthest = farthest_positive, farthest_positive + self._margin
    is_inside = (distances > nearest[:, None]) & (distances < farthest[:, None])
    is_seen = np.cumsum(is_candidate, axis=1) <= self.depth
    return first_columns(is_candidate & is_seen & is_inside, self.num_negatives)


def first_columns(is_chosen: np.ndarray, num_columns: int) -> np.ndarray:
  """The first chosen columns of each row.

  Args:
    is_chosen: [R, k] bool.
    num_columns: n.

  Returns:
    [R, n] int64 columns, ascending; −1 where a row has fewer.
  """
  columns = np.argsort(~is_chosen, axis=1, kind="stable")[:, :num_columns]
  columns[~np.take_along_axis(is_chosen, columns, axis=1)] = -1
  padding = [(0, 0), (0, num_columns - columns.shape[1])]
  return np.pad(columns, padding, constant_values=-1)


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

  def suspected_mislabelled(
    self, neighbours: np.ndarray, labels: np.ndarray, contents: np.ndarray
  ) -> np.ndarray:
    """Which items are suspected_mislabelled.

    Args:
      neighbours: [N, k] int32 items, nearest first; −1 for none.
      labels: [N] int32.
      contents: [N] uint64, alike for copies.

    Returns:
      [N] bool.
    """
    is_suspected = np.zeros(len(labels), bool)
    needed = math.ceil(self.num_neighbours * self.min_share)
    for start in range(0, len(labels), _ROWS_AT_ONCE):
      rows = slice(start, start + _ROWS_AT_ONCE)
      asked = neighbours[rows, : self.num_neighbours]
      says = (asked >= 0) & (contents[asked] != contents[rows, None])
      said = np.where(says & (labels[asked] != labels[rows, None]), labels[asked], -1)
      num_alike = (said[:, :, None] == said[:, None, :]).sum(axis=2)
      is_suspected[rows] = (np.where(said >= 0, num_alike, 0) >= needed).any(axis=1)
    return is_suspected
