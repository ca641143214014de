"""Evaluation protocols: queries, gallery and relevant items.

Shapes: N items, M pairs of an item and a label (N if each item has one label), Q
queries, G gallery items, D dimensions.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Optional, Protocol

import gin
import numpy as np

from trainer.data import tfrecord
from trainer.data.index_arrays import MemberTable, members_from_labels
from trainer.data.records import RecordIndex, read_records, record_names
from trainer.errors import UserError


class ItemLabels:
  """The labels of each item: one, several or none.

  Args:
    labels: [M] int label ids; ids below 0 are relevant to nothing.
    items: [M] int64, the item of each label, ascending; None if item i has labels[i].
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

  def labels_of(self, item: int) -> np.ndarray:
    """Returns the label ids of an item, [n] int."""
    return self._labels[self._starts[item] : self._starts[item + 1]]

  def is_labelled(self) -> np.ndarray:
    """Returns whether each item has a label, [N] bool."""
    return np.diff(self._starts) > 0

  def items_by_label(self) -> MemberTable:
    """Returns the items of each label."""
    num_labels = int(self._labels.max(initial=-1)) + 1
    table = members_from_labels(self._labels, num_labels)
    return table._replace(records=self._items[table.records].astype(np.int64))


@dataclasses.dataclass(frozen=True)
class LabelGroundTruth:
  """Ground truth by shared labels.

  An item is never in its own gallery.

  Attributes:
    queries: [Q] int64, the query items.
    gallery: [G] int64, the gallery items, ascending.
    labels: of all items.
    groups: [N] int; pairs of items that share a label and a group are excluded, such as
      one identity seen by one camera; None to exclude no pairs.
  """

  queries: np.ndarray
  gallery: np.ndarray
  labels: ItemLabels
  groups: Optional[np.ndarray] = None

  def relevant_and_excluded(self, query: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the relevant and the excluded items of a query.

    Returns:
      [R] int64, gallery positions of the relevant items; and int64 positions of the
      excluded items: the query itself, and excluded pairs.
    """
    item = int(self.queries[query])
    own_position = self._positions[item]
    positions = self._positions_sharing(item)
    is_excluded = positions == own_position
    if self.groups is not None:
      is_excluded |= self.groups[self.gallery[positions]] == self.groups[item]
    excluded = positions[is_excluded]
    if own_position >= 0 and own_position not in excluded:
      excluded = np.append(excluded, own_position)
    return positions[~is_excluded], excluded

  def _positions_sharing(self, item: int) -> np.ndarray:
    """Returns the gallery positions that share a label with an item, ascending."""
    positions = [
      self._positions_with(int(label)) for label in self.labels.labels_of(item)
    ]
    if len(positions) == 1:
      return positions[0]
    return np.unique(np.concatenate([np.empty(0, np.int64), *positions]))

  def _positions_with(self, label: int) -> np.ndarray:
    """Returns the gallery positions with a label, ascending; cached."""
    if label not in self._known:
      positions = self._positions[self._items_by_label.members(label)]
      self._known[label] = np.sort(positions[positions >= 0])
    return self._known[label]

  @functools.cached_property
  def _known(self) -> dict[int, np.ndarray]:
    return {}

  @functools.cached_property
  def _items_by_label(self) -> MemberTable:
    return self.labels.items_by_label()

  @functools.cached_property
  def _positions(self) -> np.ndarray:
    """The position of each item in the gallery, [N] int64; −1 if it is not in it."""
    positions = np.full(self.labels.num_items, -1, np.int64)
    positions[self.gallery] = np.arange(len(self.gallery))
    return positions


class Items(Protocol):
  """Protocol of evaluated items."""

  @property
  def labels(self) -> np.ndarray:
    """[N] int class ids."""

  @property
  def class_names(self) -> Sequence[str]:
    """Name of each class id."""

  def feature(self, name: str) -> list[list[Any]]:
    """Returns the values of a feature of each item's record.

    Raises:
      UserError: a record lacks the feature.
    """


class EvaluationProtocol(Protocol):
  """Protocol that divides items into queries and gallery."""

  def make_ground_truth(self, items: Items) -> LabelGroundTruth:
    """Returns queries, gallery and ground truth."""


@gin.register
@dataclasses.dataclass(frozen=True)
class Relevance:
  """Rule of relevance; by default, items of the same class are relevant to each other.

  Attributes:
    labels_feature: name of a feature that holds several labels of an item; items that
      share one are relevant to each other. None for the class of the record.
    excluded_feature: name of a feature, such as a camera or a source; pairs that share
      a label and its value count neither as hits nor as misses.
    distractor_classes: names of classes whose items are in the gallery but relevant to
      no query.
  """

  labels_feature: Optional[str] = None
  excluded_feature: Optional[str] = None
  distractor_classes: Sequence[str] = ()

  def labels(self, items: Items) -> ItemLabels:
    """Returns the labels of each item.

    Raises:
      UserError: a class is unknown, or a record lacks the feature.
    """
    labels = np.array(items.labels, np.int64)
    names = {name: number for number, name in enumerate(items.class_names)}
    for name in self.distractor_classes:
      if name not in names:
        raise UserError(
          f"Relevance.distractor_classes: {name!r} is not a class of the data."
        )
      labels[labels == names[name]] = -1
    if self.labels_feature is None:
      return ItemLabels(labels)
    values = items.feature(self.labels_feature)
    is_distractor = labels < 0
    counts = [0 if is_distractor[i] else len(each) for i, each in enumerate(values)]
    kept = [v for v, count in zip(values, counts) if count]
    flat = np.array([str(value) for each in kept for value in each])
    _, ids = np.unique(flat, return_inverse=True)
    return ItemLabels(ids, np.repeat(np.arange(len(values)), counts), len(values))

  def groups(self, items: Items) -> Optional[np.ndarray]:
    """Returns the group of each item, [N] int; None if no pairs are excluded."""
    if self.excluded_feature is None:
      return None
    return _number_values(items.feature(self.excluded_feature))


_SAME_CLASS = Relevance()


@gin.register
@dataclasses.dataclass(frozen=True)
class LeaveOneOut:
  """Protocol in which each item is a query against all other items.

  Distractors are not queries.

  Attributes:
    relevance: rule of relevance.
  """

  relevance: Relevance = _SAME_CLASS

  def make_ground_truth(self, items: Items) -> LabelGroundTruth:
    """Returns queries, gallery and ground truth."""
    labels = self.relevance.labels(items)
    all_items = np.arange(labels.num_items)
    queries = all_items[labels.is_labelled()]
    return LabelGroundTruth(queries, all_items, labels, self.relevance.groups(items))


@gin.register
@dataclasses.dataclass(frozen=True)
class QueryAndGallery:
  """Protocol in which a feature of the records assigns queries and gallery.

  Attributes:
    role_feature: name of the feature.
    query_role: its value for query items.
    gallery_role: its value for gallery items, which must differ from `query_role` (for
      equal roles use `LeaveOneOut`); items with another value are in neither.
    relevance: rule of relevance.
  """

  role_feature: str = "role"
  query_role: str = "query"
  gallery_role: str = "gallery"
  relevance: Relevance = _SAME_CLASS

  def make_ground_truth(self, items: Items) -> LabelGroundTruth:
    """Returns queries, gallery and ground truth.

    Raises:
      UserError: there are no queries or no gallery items.
    """
    roles = items.feature(self.role_feature)
    sides = {}
    for role in (self.query_role, self.gallery_role):
      sides[role] = np.array(
        [number for number, values in enumerate(roles) if role in values], np.int64
      )
      if not len(sides[role]):
        found: Mapping[str, None] = dict.fromkeys(str(v) for r in roles for v in r)
        raise UserError(
          f"No item has {self.role_feature}={role!r}; the values are "
          f"{', '.join(sorted(found)[:5]) or 'none'}."
        )
    return LabelGroundTruth(
      sides[self.query_role],
      sides[self.gallery_role],
      self.relevance.labels(items),
      self.relevance.groups(items),
    )


def _number_values(values: Sequence[Sequence[Any]]) -> np.ndarray:
  """Numbers the values, [N] int64; an item without a value equals no other."""
  numbers: dict[tuple, int] = {}
  return np.array(
    [
      numbers.setdefault(tuple(each), len(numbers)) if each else -1 - item
      for item, each in enumerate(values)
    ]
  )


class RecordItems:
  """Evaluated items that are records.

  Attributes:
    record_numbers: [N] int64.
    labels: [N] int32 class ids.
    class_names: name of each class id.

  Args:
    index: of the records.
    record_numbers: [N] int64, the selected records.
  """

  def __init__(self, index: RecordIndex, record_numbers: np.ndarray):
    self._index = index
    self.record_numbers = record_numbers
    self.labels = index.labels[record_numbers]
    self.class_names: Sequence[str] = index.class_names

  def feature(self, name: str) -> list[list[Any]]:
    """Returns the values of a feature of each item's record; text as `str`.

    Raises:
      UserError: a record lacks the feature.
    """
    return [
      self._values(number, record, name)
      for number, record in read_records(self._index, self.record_numbers)
    ]

  def names(self, items: Optional[np.ndarray] = None) -> Iterator[str]:
    """Returns readable names of items: their keys, or their places in a file.

    Args:
      items: [n] int64; None for all.
    """
    numbers = self.record_numbers if items is None else self.record_numbers[items]
    return record_names(self._index, numbers)

  def _values(self, number: int, record: bytes, name: str) -> list[Any]:
    place = self._index.describe(number)
    features = tfrecord.feature_values(record, place)
    if name not in features:
      raise UserError(
        f"{place} has no feature {name!r}; it has {', '.join(sorted(features))}."
      )
    return [tfrecord.feature_text(value) for value in features[name]]
