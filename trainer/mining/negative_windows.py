"""Windows of negatives, and a filter for items that are probably mislabelled.

Shapes: N items, R anchors, k neighbours (nearest first), n negatives, q neighbours that
the filter compares.
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
  """Protocol of a rule that chooses negatives among neighbours."""

  @property
  def num_negatives(self) -> int:
    """n, the largest number of negatives of an anchor."""

  @property
  def depth(self) -> int:
    """Number of nearest neighbours with other labels that are considered."""

  def choose(
    self, distances: np.ndarray, is_candidate: np.ndarray, farthest_positive: np.ndarray
  ) -> np.ndarray:
    """Chooses negatives among the neighbours.

    Args:
      distances: [R, k] float32, ascending.
      is_candidate: [R, k] bool, which neighbours may be negatives.
      farthest_positive: [R] float32, distance of the anchor's farthest positive.

    Returns:
      [R, n] int64 columns of the neighbours, nearest first; −1 where there are fewer.
    """


@gin.register
class RankWindow:
  """Neighbours with other labels within a range of ranks; 1 is the nearest.

  The nearest of all often belong to the anchor's true class, hence a first rank above
  1. Xiong et al., 2021, https://arxiv.org/abs/2007.00808, draw from the first 200; Qu
  et al., 2021, https://arxiv.org/abs/2010.08191, discuss such negatives.

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
        f"RankWindow: ranks {first} to {last} are empty; it needs 1 <= first <= last."
      )
    self._first = first
    self.num_negatives = last - first + 1
    self.depth = last

  def choose(
    self, distances: np.ndarray, is_candidate: np.ndarray, farthest_positive: np.ndarray
  ) -> np.ndarray:
    """Chooses as `NegativeWindow.choose`; distances are ignored."""
    ranks = np.cumsum(is_candidate, axis=1)
    is_inside = is_candidate & (ranks >= self._first) & (ranks <= self.depth)
    return first_columns(is_inside, self.num_negatives)


@gin.register
class MarginWindow:
  """Semi-hard: d_ap < d_an < d_ap + margin, with p the anchor's farthest positive.

  Source: Schroff et al., "FaceNet", 2015, https://arxiv.org/abs/1503.03832, where each
  anchor has one positive.

  Args:
    margin: Euclidean distance.
    num_negatives: n; if more are inside the window, the nearest are chosen.
    depth: number of nearest neighbours with other labels that are considered.

  Raises:
    UserError: the margin is not above 0, or `num_negatives` is not from 1 to `depth`.
  """

  def __init__(self, *, margin: float, num_negatives: int, depth: int = 100):
    if margin <= 0:
      raise UserError(f"MarginWindow.margin={margin} must be greater than 0.")
    if not 1 <= num_negatives <= depth:
      raise UserError(
        f"MarginWindow.num_negatives={num_negatives} must be from 1 to depth={depth}."
      )
    self._margin = margin
    self.num_negatives = num_negatives
    self.depth = depth

  def choose(
    self, distances: np.ndarray, is_candidate: np.ndarray, farthest_positive: np.ndarray
  ) -> np.ndarray:
    """Chooses as `NegativeWindow.choose`."""
    nearest, farthest = farthest_positive, farthest_positive + self._margin
    is_inside = (distances > nearest[:, None]) & (distances < farthest[:, None])
    is_seen = np.cumsum(is_candidate, axis=1) <= self.depth
    return first_columns(is_candidate & is_seen & is_inside, self.num_negatives)


def first_columns(is_chosen: np.ndarray, num_columns: int) -> np.ndarray:
  """Returns the first chosen columns of each row.

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
  """Filter for items whose nearest neighbours nearly all share one other label.

  An item is suspected of a wrong label if at least ⌈q·min_fraction⌉ of its q nearest
  other items have the same label, which is not its own. Copies of the item do not
  count. A suspected item is used neither as an anchor nor as a positive or negative.

  Attributes:
    num_neighbours: q.
    min_fraction: above 0.5, at most 1.

  Raises:
    UserError: `num_neighbours` is below 1, or `min_fraction` is not above 0.5.
  """

  num_neighbours: int = 10
  min_fraction: float = 0.9

  def __post_init__(self):
    if self.num_neighbours < 1 or not 0.5 < self.min_fraction <= 1:
      raise UserError(
        f"MislabelledFilter.num_neighbours={self.num_neighbours}, "
        f"min_fraction={self.min_fraction}: it needs at least 1 neighbour and a "
        "fraction above 0.5, at most 1."
      )

  def suspected_mislabelled(
    self, neighbours: np.ndarray, labels: np.ndarray, contents: np.ndarray
  ) -> np.ndarray:
    """Returns which items are suspected of a wrong label.

    Args:
      neighbours: [N, k] int32 items, nearest first; −1 for none.
      labels: [N] int32.
      contents: [N] uint64, equal for copies.

    Returns:
      [N] bool.
    """
    is_suspected = np.zeros(len(labels), bool)
    needed = math.ceil(self.num_neighbours * self.min_fraction)
    for start in range(0, len(labels), _ROWS_AT_ONCE):
      rows = slice(start, start + _ROWS_AT_ONCE)
      near = neighbours[rows, : self.num_neighbours]
      is_valid = (near >= 0) & (contents[near] != contents[rows, None])
      is_valid &= labels[near] != labels[rows, None]
      others = np.where(is_valid, labels[near], -1)
      counts = (others[:, :, None] == others[:, None, :]).sum(axis=2)
      is_suspected[rows] = (np.where(others >= 0, counts, 0) >= needed).any(axis=1)
    return is_suspected
