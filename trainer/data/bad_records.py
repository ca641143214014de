"""Records that can't be read or decoded: found, named, and replaced where wanted.

Shapes: N records of the index, n record numbers.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Optional

import numpy as np
import tensorflow as tf
from absl import logging

from trainer.data.decode import Decoder
from trainer.data.records import RecordIndex, UnreadableError
from trainer.errors import UserError

_UNKNOWN, _GOOD, _BAD = 0, 1, 2


def reason_of(index: RecordIndex, decoder: Decoder, number: int) -> Optional[str]:
  """Why a record can't be used, with its name; None where it can.

  Raises:
    UnreadableError: it can't be got at, so that nothing can be said of it.
  """
  try:
    [record] = index.read([number])
  except UnreadableError:
    raise
  except UserError as error:
    return str(error)
  try:
    decoder(tf.constant([record]))
  except (tf.errors.OpError, UnicodeDecodeError) as error:
    reason = str(getattr(error, "message", error)).splitlines()[0]
    return f"{index.describe(number)} cannot be decoded: {reason}"
  return None


def reasons_of(
  index: RecordIndex, decoder: Decoder, numbers: Sequence[int] | np.ndarray
) -> dict[int, str]:
  """Why records can't be used, by their numbers; all at once where all can."""
  try:
    decoder(tf.constant(index.read(numbers)))
  except UnreadableError:
    raise
  except (UserError, tf.errors.OpError, UnicodeDecodeError):
    found = {int(n): reason_of(index, decoder, int(n)) for n in numbers}
    return {number: reason for number, reason in found.items() if reason is not None}
  return {}


class Replacements:
  """Puts another record of its class in the place of each bad one.

  Each record is tried when it is first drawn, which costs as much again as decoding it;
  what was found is kept, in a byte a record. The replacement is the next good member of
  the class, so it is the same on every worker and in every run.

  Attributes:
    num_bad: how many bad records were met.

  Args:
    index: the records.
    decoder: what they must pass.
  """

  def __init__(self, index: RecordIndex, decoder: Decoder):
    self.num_bad = 0
    self._index = index
    self._decoder = decoder
    self._states = np.zeros(index.num_records, np.uint8)
    self._lock = threading.Lock()

  def replace(self, numbers: np.ndarray) -> np.ndarray:
    """Record numbers [n] int64, all of which can be read and decoded.

    Raises:
      UserError: a class has no good record.
    """
    with self._lock:
      self._try(numbers)
      bad = np.flatnonzero(self._states[numbers] == _BAD)
      if not len(bad):
        return numbers
      replaced = numbers.copy()
      for place in bad.tolist():
        replaced[place] = self._next_good(int(numbers[place]))
      return replaced

  def _next_good(self, number: int) -> int:
    class_id = int(self._index.labels[number])
    members = self._index.members(class_id)
    place = int(np.searchsorted(members, number))
    for candidate in np.roll(members, -place - 1).tolist():
      self._try(np.array([candidate]))
      if self._states[candidate] == _GOOD:
        return candidate
    name = self._index.class_names[class_id]
    raise UserError(f"Class {name!r} has no record that can be read and decoded.")

  def _try(self, numbers: np.ndarray) -> None:
    unknown = np.unique(numbers[self._states[numbers] == _UNKNOWN])
    if not len(unknown):
      return
    reasons = reasons_of(self._index, self._decoder, unknown)
    self._states[unknown] = _GOOD
    for number, reason in reasons.items():
      self._states[number] = _BAD
      self.num_bad += 1
      logging.warning(
        "%s Another of its class takes its place (bad records so far: %d).",
        reason,
        self.num_bad,
      )
