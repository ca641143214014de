"""What a person knows records by: their keys, or their places in a file."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from trainer import heartbeat
from trainer.data import examples
from trainer.data.records import RecordIndex

_READ_AT_ONCE = 4_096


def read_records(
  index: RecordIndex, numbers: np.ndarray
) -> Iterator[tuple[int, bytes]]:
  """Records with their numbers, many read at once.

  Args:
    index: the records.
    numbers: [n] int64.

  Yields:
    Number and record, in the order of the numbers.
  """
  for start in range(0, len(numbers), _READ_AT_ONCE):
    heartbeat.beat()
    some = numbers[start : start + _READ_AT_ONCE]
    yield from zip(some.tolist(), index.read(some))


def record_names(index: RecordIndex, numbers: np.ndarray) -> Iterator[str]:
  """The feature "key" of each record, or where it stands if it has none.

  Args:
    index: the records.
    numbers: [n] int64.

  Yields:
    A name, in the order of the numbers.
  """
  for number, record in read_records(index, numbers):
    place = index.describe(number)
    values = examples.values(record, place).get("key")
    yield str(examples.text(values[0])) if values else place
