"""The items that an evaluation embeds.

Shapes: N items, D dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Optional

import numpy as np

from trainer import heartbeat
from trainer.data import examples
from trainer.data.records import RecordIndex
from trainer.errors import UserError

_READ_AT_ONCE = 4_096


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
      for number, record in self._records(self.record_numbers)
    ]

  def names(self, items: Optional[np.ndarray] = None) -> Iterator[str]:
    """What a person knows items by: their keys, or their places in a file.

    Args:
      items: [n] int64; None for all.
    """
    numbers = self.record_numbers if items is None else self.record_numbers[items]
    for number, record in self._records(numbers):
      place = self._index.describe(number)
      values = examples.values(record, place).get("key")
      yield str(_text(values[0])) if values else place

  def _records(self, numbers: np.ndarray) -> Iterator[tuple[int, bytes]]:
    for start in range(0, len(numbers), _READ_AT_ONCE):
      heartbeat.beat()
      some = numbers[start : start + _READ_AT_ONCE]
      yield from zip(some.tolist(), self._index.read(some))

  def _values(self, number: int, record: bytes, name: str) -> list[Any]:
    place = self._index.describe(number)
    features = examples.values(record, place)
    if name not in features:
      raise UserError(
        f"{place} has no feature {name!r}; it has {', '.join(sorted(features))}."
      )
    return [_text(value) for value in features[name]]


def _text(value: Any) -> Any:
  return value.decode(errors="replace") if isinstance(value, bytes) else value
