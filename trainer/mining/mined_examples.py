"""Mined examples: anchors with positives and windows of negatives.

Shapes: N items, D dimensions, A mined anchors, R anchors of one call, k neighbours, m
candidates for p positives, n negatives.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import NamedTuple, Optional

import gin
import numpy as np

from trainer.distribute.workers import current_workers
from trainer.errors import TooFewExamplesError, UserError, check_choice
from trainer.mining.corpus import CorpusItems
from trainer.mining.corpus_search import (
  NearestItems,
  empty_neighbours,
  neighbours_on_disk,
)
from trainer.mining.negative_windows import (
  MislabelledFilter,
  NegativeWindow,
  first_columns,
)
from trainer.retrieval.knn import Neighbours
from trainer.runtime import watchdog

_CHOICES = ("random", "hardest", "easiest")
# Limit on the bytes of embeddings and their differences at once.
_BYTES_AT_ONCE = 2**26
_ROWS_AT_ONCE = 2_048
# Factor by which the search widens if most neighbours have the anchor's label, and the
# limit on its bytes at once, about 20 per neighbour.
_WIDER, _WIDER_BYTES = 4, 2**27


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
