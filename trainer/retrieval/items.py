"""The items that an evaluation embeds.

Shapes: N items, D dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Optional

import numpy as np

from trainer.data import examples
from trainer.data.record_names import read_records, record_names
from trainer.data.records import RecordIndex
from trainer.errors import UserError


class RecordItems:
  """Items that are records.

  Attributes:
    record_numbers: [N] int64.
    labels: [N] int32 class ids.
    class_names: name of each class id.

  Args:
    index: the records.
    record_numbers: [N] int64, which of them.
  """

  def __init__(self, index: RecordIndex, record_numbers: np.ndarray):
    self._index = index
    self.record_numbers = record_numbers
    self.labels = index.labels[record_numbers]
    self.class_names: Sequence[str] = index.class_names

  def feature(self, name: str) -> list[list[Any]]:
    """The values of a feature of each item's record; text as `str`.

    Raises:
      UserError: a record doesn't have it.
    """
    return [
      self._values(number, record, name)
      for number, record in read_records(self._index, self.record_numbers)
    ]

  def names(self, items: Optional[np.ndarray] = None) -> Iterator[str]:
    """What a person knows items by: their keys, or their places in a file.

    Args:
      items: [n] int64; None for all.
    """
    numbers = self.record_numbers if items is None else self.record_numbers[items]
    return record_names(self._index, numbers)

  def _values(self, number: int, record: bytes, name: str) -> list[Any]:
    place = self._index.describe(number)
    features = examples.values(record, place)
    if name not in features:
      raise UserError(
        f"{place} has no feature {name!r}; it has {', '.join(sorted(features))}."
      )
    return [examples.text(value) for value in features[name]]
