"""An anchor's positives: other items of its class, hard, easy or any.

Shapes: N items, D dimensions, R anchors, m candidates and p positives of each.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import gin
import numpy as np

from trainer.errors import UserError
from trainer.mining.items import Items
from trainer.mining.windows import first_columns

_CHOICES = ("random", "hardest", "easiest")
# Of embeddings and their differences.
_BYTES_AT_ONCE = 2**26


class ChosenPositives(NamedTuple):
  """The positives of some anchors.

  Attributes:
    items: [R, p] int64; −1 where there are fewer.
    distances: [R, p] float32; −inf there.
  """

  items: np.ndarray
  distances: np.ndarray


@gin.register
@dataclasses.dataclass(frozen=True)
class Positives:
  """Which items of an anchor's class become its positives.

  Attributes:
    num_positives: p.
    choice: "random"; "hardest", the farthest; or "easiest", the nearest.
    num_candidates: m, among how many of the class, drawn at random, they are chosen.

  Raises:
    UserError: a number is below 1, there are fewer candidates than positives, or the
      choice is unknown.
  """

  num_positives: int = 1
  choice: str = "random"
  num_candidates: int = 32

  def __post_init__(self):
    if not 1 <= self.num_positives <= self.num_candidates:
      raise UserError(
        f"Positives.num_positives={self.num_positives} must be from 1 to "
        f"num_candidates={self.num_candidates}."
      )
    if self.choice not in _CHOICES:
      raise UserError(
        f"Positives.choice={self.choice!r} is none of {', '.join(_CHOICES)}."
      )

  def choose(
    self,
    anchors: np.ndarray,
    embeddings: np.ndarray,
    items: Items,
    is_allowed: np.ndarray,
    contents: np.ndarray,
  ) -> ChosenPositives:
    """The positives of some anchors; never a copy of the anchor.

    Args:
      anchors: [R] int64.
      embeddings: [N, D] float32.
      items: N of them.
      is_allowed: [N] bool, false for what is probably of another class.
      contents: [N] uint64, alike for copies.
    """
    candidates, is_there = self._candidates(anchors, items)
    is_there &= is_allowed[candidates]
    is_there &= contents[candidates] != contents[anchors, None]
    if self.choice != "random":
      distances = _distances(embeddings, anchors, candidates)
      order = distances if self.choice == "easiest" else -distances
      order = np.argsort(order, axis=1, kind="stable")
      candidates, is_there = (
        np.take_along_axis(each, order, axis=1) for each in (candidates, is_there)
      )
    columns = first_columns(is_there, self.num_positives)
    chosen = np.take_along_axis(candidates, np.maximum(columns, 0), axis=1)
    distances = _distances(embeddings, anchors, chosen)
    is_chosen = columns >= 0
    return ChosenPositives(
      np.where(is_chosen, chosen, -1), np.where(is_chosen, distances, -np.inf)
    )

  def _candidates(
    self, anchors: np.ndarray, items: Items
  ) -> tuple[np.ndarray, np.ndarray]:
    """The next m of each anchor's class, in its random order: all others, if so few.

    Returns:
      [R, m] int64 items, and [R, m] bool, which of them are there.
    """
    num_candidates = min(self.num_candidates, max(1, items.largest_class - 1))
    classes = np.searchsorted(items.class_ids, items.labels[anchors])
    starts = items.starts[classes]
    sizes = items.starts[classes + 1] - starts
    steps = np.arange(1, num_candidates + 1)
    places = items.places[anchors] - starts
    places = (places[:, None] + steps) % sizes[:, None]
    return items.by_class[starts[:, None] + places], steps < sizes[:, None]


def _distances(
  embeddings: np.ndarray, anchors: np.ndarray, items: np.ndarray
) -> np.ndarray:
  """[R, m] float32, from anchors [R] to items [R, m]."""
  distances = np.empty(items.shape, np.float32)
  bytes_a_row = 2 * 4 * items.shape[1] * embeddings.shape[1]
  num_rows = max(1, _BYTES_AT_ONCE // bytes_a_row)
  for start in range(0, len(items), num_rows):
    rows = slice(start, start + num_rows)
    difference = embeddings[items[rows]] - embeddings[anchors[rows], None]
    distances[rows] = np.sqrt(np.einsum("rmd,rmd->rm", difference, difference))
  return distances
