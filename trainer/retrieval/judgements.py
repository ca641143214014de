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

  def is_labelled(self) -> np.ndarray:
    """[N] bool, whether an item has a label."""
    return np.diff(self._starts) > 0

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

  def judge(self, query: int) -> tuple[np.ndarray, np.ndarray]:
    """What a query should find, and what doesn't count.

    Returns:
      [R] int64, places in the gallery of the items that are relevant; and int64 places
      of those that don't count: the query itself, and excluded pairs.
    """
    item = int(self.queries[query])
    own = self._places[item]
    sharing = self._sharing(item)
    is_excluded = sharing == own
    if self.groups is not None:
      is_excluded |= self.groups[self.gallery[sharing]] == self.groups[item]
    excluded = sharing[is_excluded]
    if own >= 0 and own not in excluded:
      excluded = np.append(excluded, own)
    return sharing[~is_excluded], excluded

  def _sharing(self, item: int) -> np.ndarray:
    """Places of the gallery's items that share a label with an item, ascending."""
    places = [self._places_with(int(label)) for label in self.labels.of(item)]
    if len(places) == 1:
      return places[0]
    return np.unique(np.concatenate([np.empty(0, np.int64), *places]))

  def _places_with(self, label: int) -> np.ndarray:
    """Places of the gallery's items with a label, ascending; looked up once."""
    if label not in self._known:
      places = self._places[self._holders.members(label)]
      self._known[label] = np.sort(places[places >= 0])
    return self._known[label]

  @functools.cached_property
  def _known(self) -> dict[int, np.ndarray]:
    return {}

  @functools.cached_property
  def _holders(self) -> MemberTable:
    return self.labels.holders()

  @functools.cached_property
  def _places(self) -> np.ndarray:
    """[N] int64, the place of each item in the gallery; −1 where it is not in it."""
    places = np.full(self.labels.num_items, -1, np.int64)
    places[self.gallery] = np.arange(len(self.gallery))
    return places
