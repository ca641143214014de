"""Which of the evaluated items ask, which are found, and which pairs don't count.

Shapes: N items, Q queries, G gallery items.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Optional, Protocol

import gin
import numpy as np

from trainer.errors import UserError
from trainer.retrieval.judgements import ItemLabels, LabelJudgements


class Items(Protocol):
  """What is evaluated, as protocols see it."""

  @property
  def labels(self) -> np.ndarray:
    """[N] int class ids."""

  @property
  def class_names(self) -> Sequence[str]:
    """Name of each class id."""

  def feature(self, name: str) -> list[list[Any]]:
    """The values of a feature of each item's record.

    Raises:
      UserError: a record doesn't have it.
    """


class EvaluationProtocol(Protocol):
  """Divides items into queries and gallery."""

  def judge(self, items: Items) -> LabelJudgements:
    """Queries, gallery, and what is relevant to whom."""


@gin.register
@dataclasses.dataclass(frozen=True)
class Relevance:
  """What is relevant to what: items of one class, if nothing else is said.

  Attributes:
    labels_feature: name of a feature that holds several labels of an item; items that
      share one are relevant to each other. None: the class of the record.
    excluded_feature: name of a feature, such as a camera or a source; pairs that share
      a label and its value count neither as hits nor as misses.
    distractor_classes: names of classes whose items are in the gallery, and relevant to
      nothing.
  """

  labels_feature: Optional[str] = None
  excluded_feature: Optional[str] = None
  distractor_classes: Sequence[str] = ()

  def labels(self, items: Items) -> ItemLabels:
    """The labels of each item.

    Raises:
      UserError: an unknown class, or a record without the feature.
    """
    labels = np.array(items.labels, np.int64)
    names = {name: number for number, name in enumerate(items.class_names)}
    for name in self.distractor_classes:
      if name not in names:
        raise UserError(f"Relevance.distractor_classes: there is no class {name!r}.")
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
    """[N] int, the group of each item; None where no pairs are excluded."""
    if self.excluded_feature is None:
      return None
    return _numbered(items.feature(self.excluded_feature))


_SAME_CLASS = Relevance()


@gin.register
@dataclasses.dataclass(frozen=True)
class LeaveOneOut:
  """Each item looks for the others that are relevant to it, in all others.

  Distractors ask nothing.

  Attributes:
    relevance: what is relevant to what.
  """

  relevance: Relevance = _SAME_CLASS

  def judge(self, items: Items) -> LabelJudgements:
    """Queries, gallery, and what is relevant to whom."""
    labels = self.relevance.labels(items)
    everything = np.arange(labels.num_items)
    asks = everything[labels.is_labelled()]
    return LabelJudgements(asks, everything, labels, self.relevance.groups(items))


@gin.register
@dataclasses.dataclass(frozen=True)
class QueryAndGallery:
  """Some items ask, others are found, as a feature of the records says.

  Attributes:
    role_feature: name of the feature.
    query_role: its value for items that ask.
    gallery_role: its value for items that are found; items of another value are in
      neither. The same as `query_role` is not possible: that is `LeaveOneOut`.
    relevance: what is relevant to what.
  """

  role_feature: str = "role"
  query_role: str = "query"
  gallery_role: str = "gallery"
  relevance: Relevance = _SAME_CLASS

  def judge(self, items: Items) -> LabelJudgements:
    """Queries, gallery, and what is relevant to whom.

    Raises:
      UserError: nothing asks, or there is nothing to find.
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
          f"No item has {self.role_feature}={role!r}; there is "
          f"{', '.join(sorted(found)[:5]) or 'none'}."
        )
    return LabelJudgements(
      sides[self.query_role],
      sides[self.gallery_role],
      self.relevance.labels(items),
      self.relevance.groups(items),
    )


def _numbered(values: Sequence[Sequence[Any]]) -> np.ndarray:
  """[N] int64, equal where the values are; an item without a value is like no other."""
  numbers: dict[tuple, int] = {}
  return np.array(
    [
      numbers.setdefault(tuple(each), len(numbers)) if each else -1 - item
      for item, each in enumerate(values)
    ]
  )
