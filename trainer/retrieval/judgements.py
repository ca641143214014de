"""What is relevant to a query: items with one of its labels, but for excluded pairs.

Shapes: N items, M pairs of an item and a label (N where each has one), Q queries, G
gallery items.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Optional

import numpy as np

from trainer.data.members import MemberTable, from_labels


class ItemLabels:
  """The labels of each item: one, several or none.

  Args:
    labels: [M] int label ids; ids below 0 are relevant to nothing.
    items: [M] int64, whose they are, ascending; None where item i has labels[i].
    num_items: N; None for as many as there are labels.
  """

  def __init__(
    self,
    labels: np.ndarray,
    items: Optional[np.ndarray] = None,
    num_items: Optional[int] = None,
  ):
    labels = np.asarray(labels)
    items = np.arange(len(labels)) if items is None else np.asarray(items)
    self.num_items = len(labels) if num_items is None else num_items
    self._labels, self._items = labels[labels >= 0], items[labels >= 0]
    self._starts = np.searchsorted(self._items, np.arange(self.num_items + 1))

  def of(self, item: int) -> np.ndarray:
    """[n] int label ids of an item."""
    return self._labels[self._starts[item] : self._starts[item + 1]]

  def holders(self) -> MemberTable:
    """The items of each label."""
    num_labels = int(self._labels.max(initial=-1)) + 1
    table = from_labels(self._labels, num_labels)
    return table._replace(records=self._items[table.records].astype(np.int64))


@dataclasses.dataclass(frozen=True)
class LabelJudgements:
  """Judgements by shared labels.

  An item is never in its own gallery.

  Attributes:
    queries: [Q] int64, the items that ask.
    gallery: [G] int64, the items that are found, ascending.
    labels: of all items.
    groups: [N] int; a pair of items that share a label and a group is excluded, such as
      one identity seen by one camera; None for no such pairs.
  """

  queries: np.ndarray
  gallery: np.ndarray
  labels: ItemLabels
  groups: Optional[np.ndarray] = None

  def relevant(self, query: int) -> np.ndarray:
    """[R] int64, places in the gallery of the items that query q should find."""
    sharing, is_excluded = self._sharing(int(self.queries[query]))
    return sharing[~is_excluded]

  def excluded(self, query: int) -> np.ndarray:
    """Int64 places in the gallery of what doesn't count for query q."""
    item = int(self.queries[query])
    sharing, is_excluded = self._sharing(item)
    place = self._places[item]
    own = [place] if place >= 0 else []
    return np.union1d(sharing[is_excluded], own).astype(np.int64)

  def num_relevant(self) -> np.ndarray:
    """[Q] int64, how many items are relevant to each query."""
    return np.array([len(self.relevant(q)) for q in range(len(self.queries))], np.int64)

  def _sharing(self, item: int) -> tuple[np.ndarray, np.ndarray]:
    """Places of items that share a label with one, and which of them are excluded."""
    holders = [self._holders.members(label) for label in self.labels.of(item)]
    items = np.unique(np.concatenate([np.empty(0, np.int64), *holders]))
    items = items[self._places[items] >= 0]
    is_excluded = items == item
    if self.groups is not None:
      is_excluded |= self.groups[items] == self.groups[item]
    return self._places[items], is_excluded

  @functools.cached_property
  def _holders(self) -> MemberTable:
    return self.labels.holders()

  @functools.cached_property
  def _places(self) -> np.ndarray:
    """[N] int64, the place of each item in the gallery; −1 where it is not in it."""
    places = np.full(self.labels.num_items, -1, np.int64)
    places[self.gallery] = np.arange(len(self.gallery))
    return places
