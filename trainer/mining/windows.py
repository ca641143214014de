"""Which of an anchor's neighbours of other labels become its negatives.

Shapes: R anchors, k neighbours, nearest first, n negatives.
"""

from __future__ import annotations

from typing import Protocol

import gin
import numpy as np

from trainer.errors import UserError


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
