"""Mined examples: anchors with positives and windows of negatives.

A filter finds items that are probably mislabelled.

Shapes: N items, D dimensions, A mined anchors, R anchors of one call, k neighbours
(nearest first), m candidates for p positives, n negatives, q neighbours that the filter
compares.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from typing import NamedTuple, Optional, Protocol

import gin
import numpy as np

from trainer.distribute.workers import current_workers
from trainer.errors import TooFewExamplesError, UserError, check_choice
from trainer.mining.corpus import (
  CorpusItems,
  NearestItems,
  empty_neighbours,
  neighbours_on_disk,
)
from trainer.retrieval.knn import Neighbours
from trainer.runtime import watchdog

_FILTERED_AT_ONCE = 4_096
_CHOICES = ("random", "hardest", "easiest")
# Limit on the bytes of embeddings and their differences at once.
_BYTES_AT_ONCE = 2**26
_ROWS_AT_ONCE = 2_048
# Factor by which the search widens if most neighbours have the anchor's label, and the
# limit on its bytes at once, about 20 per neighbour.
_WIDER, _WIDER_BYTES = 4, 2**27


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
    for start in range(0, len(labels), _FILTERED_AT_ONCE):
      rows = slice(start, start + _FILTERED_AT_ONCE)
      near = neighbours[rows, : self.num_neighbours]
      is_valid = (near >= 0) & (contents[near] != contents[rows, None])
      is_valid &= labels[near] != labels[rows, None]
      others = np.where(is_valid, labels[near], -1)
      counts = (others[:, :, None] == others[:, None, :]).sum(axis=2)
      is_suspected[rows] = (np.where(others >= 0, counts, 0) >= needed).any(axis=1)
    return is_suspected


class ChosenPositives(NamedTuple):
  """Positives of some anchors.

  Attributes:
    items: [R, p] int64; −1 where there are fewer.
    distances: [R, p] float32; −inf there.
  """

  items: np.ndarray
  distances: np.ndarray


@gin.register
@dataclasses.dataclass(frozen=True)
class Positives:
  """Rule that chooses positives among the items of an anchor's class.

  Attributes:
    num_positives: p.
    choice: "random"; "hardest", the farthest; or "easiest", the nearest.
    num_candidates: m, the number of items of the class, drawn at random, to choose
      from.

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
    check_choice("Positives.choice", self.choice, _CHOICES)

  def choose(
    self,
    anchors: np.ndarray,
    embeddings: np.ndarray,
    items: CorpusItems,
    is_allowed: np.ndarray,
    contents: np.ndarray,
  ) -> ChosenPositives:
    """Chooses the positives of some anchors; never a copy of the anchor.

    Args:
      anchors: [R] int64.
      embeddings: [N, D] float32.
      items: N items.
      is_allowed: [N] bool, false for items that are probably mislabelled.
      contents: [N] uint64, equal for copies.
    """
    candidates, is_valid = self._candidates(anchors, items)
    is_valid &= is_allowed[candidates]
    is_valid &= contents[candidates] != contents[anchors, None]
    if self.choice != "random":
      distances = _distances(embeddings, anchors, candidates)
      order = distances if self.choice == "easiest" else -distances
      order = np.argsort(order, axis=1, kind="stable")
      candidates, is_valid = (
        np.take_along_axis(each, order, axis=1) for each in (candidates, is_valid)
      )
    columns = first_columns(is_valid, self.num_positives)
    chosen = np.take_along_axis(candidates, np.maximum(columns, 0), axis=1)
    distances = _distances(embeddings, anchors, chosen)
    is_chosen = columns >= 0
    return ChosenPositives(
      np.where(is_chosen, chosen, -1), np.where(is_chosen, distances, -np.inf)
    )

  def _candidates(
    self, anchors: np.ndarray, items: CorpusItems
  ) -> tuple[np.ndarray, np.ndarray]:
    """Returns the next m items of each anchor's class in its random order.

    If the class has no more than m others, these are all of them.

    Returns:
      [R, m] int64 items, and [R, m] bool, which of them exist.
    """
    num_candidates = min(self.num_candidates, max(1, items.largest_class - 1))
    classes = np.searchsorted(items.class_ids, items.labels[anchors])
    starts = items.starts[classes]
    sizes = items.starts[classes + 1] - starts
    steps = np.arange(1, num_candidates + 1)
    positions = items.positions[anchors] - starts
    positions = (positions[:, None] + steps) % sizes[:, None]
    return items.by_class[starts[:, None] + positions], steps < sizes[:, None]


def _distances(
  embeddings: np.ndarray, anchors: np.ndarray, items: np.ndarray
) -> np.ndarray:
  """Returns distances [R, m] float32 from anchors [R] to items [R, m]."""
  distances = np.empty(items.shape, np.float32)
  bytes_a_row = 2 * 4 * items.shape[1] * embeddings.shape[1]
  num_rows = max(1, _BYTES_AT_ONCE // bytes_a_row)
  for start in range(0, len(items), num_rows):
    rows = slice(start, start + num_rows)
    difference = embeddings[items[rows]] - embeddings[anchors[rows], None]
    distances[rows] = np.sqrt(np.einsum("rmd,rmd->rm", difference, difference))
  return distances


_POSITIVES = Positives()


class MinedExamples(NamedTuple):
  """Result of mining.

  Attributes:
    anchors: [A] int64 items.
    positives: [A, p] int64 items; −1 where there are fewer, at the end.
    negatives: [A, n] int64 items, nearest first; likewise.
    suspected_mislabelled: items that are probably mislabelled, ascending.
    counts: number of items by outcome.
    distances: means over anchors, by name.
  """

  anchors: np.ndarray
  positives: np.ndarray
  negatives: np.ndarray
  suspected_mislabelled: np.ndarray
  counts: dict[str, int]
  distances: dict[str, float]


@gin.register
@dataclasses.dataclass(frozen=True)
class ExampleMining:
  """Options for mining positives and hard negatives of each possible anchor.

  A negative has another label than its anchor and is not a copy of it. If neighbours
  with the anchor's own label leave fewer others than the depth of the window, the
  search is repeated once with 4 times as many neighbours. An anchor that still has no
  negative is skipped and counted.

  Attributes:
    window: which neighbours with other labels are negatives.
    positives: which items of the anchor's class are positives.
    mislabelled: excludes items that are probably mislabelled; None to trust all labels.
  """

  window: NegativeWindow
  positives: Positives = _POSITIVES
  mislabelled: Optional[MislabelledFilter] = None

  def mine(
    self,
    embeddings: np.ndarray,
    items: CorpusItems,
    contents: np.ndarray,
    nearest: NearestItems,
  ) -> MinedExamples:
    """Mines among items.

    Neighbours are kept in a temporary file of 8·k bytes per item, with k at most twice
    the window's depth. Memory is 8·(p + n) bytes per item.

    Args:
      embeddings: [N, D] float32, finite.
      items: N items.
      contents: [N] uint64, equal for copies.
      nearest: searches the embeddings.

    Raises:
      UserError: no anchor has a positive and a negative, or the temporary folder has no
        space.
    """
    num_items = len(items.labels)
    num_neighbours = min(self._num_neighbours(items), num_items - 1)
    if num_neighbours < 1:
      raise UserError(f"{num_items} items are too few for mining.")
    with contextlib.ExitStack() as stack:
      # If one worker has no space, all end.
      found = current_workers().run_on_all(
        lambda: stack.enter_context(neighbours_on_disk(num_items, num_neighbours))
      )
      nearest.search(np.arange(num_items), num_neighbours, found)
      is_suspected = np.zeros(num_items, bool)
      if self.mislabelled is not None:
        is_suspected = self.mislabelled.suspected_mislabelled(
          found.indices, items.labels, contents
        )
      builder = _ExampleBuilder(self, embeddings, items, contents, ~is_suspected)
      builder.add(np.arange(num_items), found)
    num_wider = min(_WIDER * num_neighbours, num_items - 1)
    anchors = (
      builder.anchors_with_few_others()
      if num_wider > num_neighbours
      else np.empty(0, np.int64)
    )
    num_rows = max(1, _WIDER_BYTES // (20 * num_wider))
    for start in range(0, len(anchors), num_rows):
      rows = anchors[start : start + num_rows]
      builder.add(
        rows, nearest.search(rows, num_wider, empty_neighbours(len(rows), num_wider))
      )
    return builder.build(num_searched_again=len(anchors), num_wider=num_wider)

  def _num_neighbours(self, items: CorpusItems) -> int:
    """Returns k: enough for the window, for the own label and for the filter."""
    depth = self.window.depth
    num_filtered = (
      self.mislabelled.num_neighbours if self.mislabelled is not None else 0
    )
    return max(depth + min(depth, items.largest_class), num_filtered)


class _ExampleBuilder:
  """Examples under construction, filled for one part of the items after another."""

  def __init__(
    self,
    mining: ExampleMining,
    embeddings: np.ndarray,
    items: CorpusItems,
    contents: np.ndarray,
    is_allowed: np.ndarray,
  ):
    self._mining = mining
    self._embeddings = embeddings
    self._items = items
    self._contents = contents
    self._is_allowed = is_allowed
    num_items = len(items.labels)
    self._positives = np.full((num_items, mining.positives.num_positives), -1, np.int32)
    self._negatives = np.full((num_items, mining.window.num_negatives), -1, np.int32)
    self._num_others = np.zeros(num_items, np.int32)
    self._to_positives = np.zeros(num_items, np.float32)
    self._to_negatives = np.zeros(num_items, np.float32)
    self._has_copy = np.zeros(num_items, bool)

  def add(self, anchors: np.ndarray, found: Neighbours) -> None:
    """Chooses examples for anchors [R] among their neighbours [R, k]."""
    for start in range(0, len(anchors), _ROWS_AT_ONCE):
      watchdog.beat()
      rows = slice(start, start + _ROWS_AT_ONCE)
      self._add(anchors[rows], Neighbours(*(np.asarray(each[rows]) for each in found)))

  def _add(self, anchors: np.ndarray, found: Neighbours) -> None:
    positives = self._mining.positives.choose(
      anchors, self._embeddings, self._items, self._is_allowed, self._contents
    )
    farthest = positives.distances.max(axis=1)
    is_candidate = self._is_candidate(anchors, found.indices)
    self._num_others[anchors] = np.count_nonzero(is_candidate, axis=1)
    columns = self._mining.window.choose(found.distances, is_candidate, farthest)
    chosen, distances = (
      np.take_along_axis(each, np.maximum(columns, 0), axis=1) for each in found
    )
    self._positives[anchors] = positives.items
    self._negatives[anchors] = np.where(columns >= 0, chosen, -1)
    self._to_positives[anchors] = farthest
    self._to_negatives[anchors] = distances[:, 0]

  def _is_candidate(self, anchors: np.ndarray, neighbours: np.ndarray) -> np.ndarray:
    """Returns which neighbours may be negatives, [R, k] bool."""
    labels, contents = self._items.labels, self._contents
    is_other = (neighbours >= 0) & (labels[neighbours] != labels[anchors, None])
    is_copy = is_other & (contents[neighbours] == contents[anchors, None])
    self._has_copy[anchors] = is_copy.any(axis=1)
    return is_other & ~is_copy & self._is_allowed[neighbours]

  def anchors_with_few_others(self) -> np.ndarray:
    """Returns items with a positive and fewer other-label neighbours than the depth."""
    has_few = self._num_others < self._mining.window.depth
    return np.flatnonzero(self._has_positive() & has_few)

  def _has_positive(self) -> np.ndarray:
    return self._is_allowed & (self._positives[:, 0] >= 0)

  def build(self, *, num_searched_again: int, num_wider: int) -> MinedExamples:
    """Returns the mined examples.

    Args:
      num_searched_again: number of anchors that were searched again.
      num_wider: number of neighbours in that search.

    Raises:
      UserError: no anchor has a positive and a negative.
    """
    has_positive, has_negative = self._has_positive(), self._negatives[:, 0] >= 0
    anchors = np.flatnonzero(has_positive & has_negative)
    num_with_positive = int(np.count_nonzero(has_positive))
    num_suspected = int(np.count_nonzero(~self._is_allowed))
    counts = {
      "anchors": len(anchors),
      "anchors_without_negative": num_with_positive - len(anchors),
      "anchors_without_positive": len(has_positive) - num_with_positive - num_suspected,
      "anchors_searched_again": num_searched_again,
      "with_copy_of_another_label": int(np.count_nonzero(self._has_copy)),
      "suspected_mislabelled": num_suspected,
    }
    if not len(anchors):
      kind = TooFewExamplesError if counts["anchors_without_negative"] else UserError
      raise kind(self._explain_no_examples(counts, num_wider))
    return MinedExamples(
      anchors,
      self._positives[anchors],
      self._negatives[anchors],
      np.flatnonzero(~self._is_allowed),
      counts,
      {
        "farthest_positive": float(self._to_positives[anchors].mean(dtype=np.float64)),
        "nearest_negative": float(self._to_negatives[anchors].mean(dtype=np.float64)),
      },
    )

  def _explain_no_examples(self, counts: dict[str, int], num_wider: int) -> str:
    if not counts["anchors_without_negative"]:
      return (
        f"none of {len(self._items.labels)} items has a positive to mine: "
        f"{counts['suspected_mislabelled']} are probably mislabelled, the others are "
        "the only item of their class, or copies; raise Miner.records_per_class."
      )
    return (
      f"none of {counts['anchors_without_negative']} anchors has a negative among its "
      f"{num_wider} nearest: all have the anchor's label or are outside the window; "
      "widen the window, or end mining: no hard negatives are left."
    )
