"""Sampler of triplets from a list in a file.

Shapes: n triplets in the list, S steps, T triplets per batch.
"""

from __future__ import annotations

import array
import collections
import io
import posixpath
from collections.abc import Mapping
from typing import Optional

import gin
import numpy as np
from absl import logging

from trainer.data import permutation
from trainer.data.csv_file import CsvFile
from trainer.data.records import RecordIndex, record_names
from trainer.errors import (
  UserError,
  check_at_least,
  check_choice,
  reading,
  short_reason,
)
from trainer.runtime import filesystem

COLUMNS = ("anchor", "positive", "negative")
_UNKNOWN = -1
_ADVICE = "TripletSampler.bad_triplets='leave_out' skips them"

# Salt of the hash, so that no two uses of one seed collide (1 to 7: other uses).
_TRIPLETS = 8


def read_triplets(file: str, index: RecordIndex, *, is_strict: bool) -> np.ndarray:
  """Reads a list of triplets, and drops unusable ones.

  A triplet is unusable if a key is unknown, if the negative is of the anchor's class,
  or if the positive is the anchor or the negative.

  Args:
    file: a table as `CsvFile` reads it, with key columns anchor, positive and negative;
      or an .npy array [n, 3] of record numbers.
    index: the records; all are read once if keys must be looked up.
    is_strict: whether unusable triplets are an error.

  Returns:
    [n, 3] int64 record numbers: anchors, positives, negatives.

  Raises:
    UserError: the file can't be read, is not such a list, or has unusable triplets.
  """
  if file.lower().endswith(".npy"):
    triplets = _numbers_of_array(file)
    is_known = (triplets >= 0) & (triplets < index.num_records)
    triplets = np.where(is_known, triplets, _UNKNOWN)
  else:
    keys, triplets = _keys_of_table(file)
    triplets = _numbers_of_keys(file, keys, index)[triplets]
  return _drop_bad_triplets(file, triplets, index.labels, is_strict)


def _numbers_of_array(file: str) -> np.ndarray:
  with reading(file):
    content = filesystem.read_bytes(file)
  try:
    numbers = np.load(io.BytesIO(content), allow_pickle=False)
  except Exception as error:  # The header is parsed by Python: many error types.
    raise UserError(f"{file} is not an array: {short_reason(error)}.") from error
  if not isinstance(numbers, np.ndarray):
    raise UserError(f"{file} holds several arrays; it must hold one.")
  if numbers.ndim != 2 or numbers.shape[1] != 3 or numbers.dtype.kind not in "iu":
    raise UserError(
      f"{file} has shape {numbers.shape} and type {numbers.dtype}; it must be record "
      "numbers, integers [n, 3]."
    )
  return numbers.astype(np.int64)


def _keys_of_table(file: str) -> tuple[dict[str, int], np.ndarray]:
  """Returns distinct keys, numbered by first occurrence, and rows of numbers [n, 3]."""
  # A key that is not UTF-8 is matched by its text with replacement characters.
  table = CsvFile(file, COLUMNS, errors="replace")
  note = table.separator_note()
  if note is not None:
    logging.warning("%s", note)
  columns = [table.columns.index(name) for name in COLUMNS]
  keys: dict[str, int] = {}
  numbers = array.array("i")
  for line, cells in table.rows():
    if len(cells) <= max(columns) or not all(cells[column] for column in columns):
      raise UserError(f"{file}: line {line} lacks a key.")
    numbers.extend(keys.setdefault(cells[column], len(keys)) for column in columns)
  return keys, np.array(numbers, np.int32).reshape(-1, len(COLUMNS))


def _numbers_of_keys(
  file: str, keys: Mapping[str, int], index: RecordIndex
) -> np.ndarray:
  """Returns the record number of each key, [number of keys] int64; −1 for none."""
  numbers = np.full(len(keys), _UNKNOWN, np.int64)
  by_normalized = np.full(len(keys), _UNKNOWN, np.int64)
  normalized = _normalized_keys(keys)
  logging.info("Reading %d records for the keys of %s.", index.num_records, file)
  for number, name in enumerate(record_names(index, np.arange(index.num_records))):
    for found, named in (
      (numbers, keys.get(name)),
      (by_normalized, normalized.get(name)),
    ):
      if named is None:
        continue
      first = int(np.max(found[named]))
      if first != _UNKNOWN:
        raise UserError(
          f"The key {name!r} of {file} belongs to two records: {index.describe(first)} "
          f"and {index.describe(number)}."
        )
      found[named] = number
  is_normalized = (numbers == _UNKNOWN) & (by_normalized != _UNKNOWN)
  _log_keys(
    file, keys, is_normalized, "keys are matched without blanks or as plain paths"
  )
  numbers = np.where(is_normalized, by_normalized, numbers)
  is_unknown = numbers == _UNKNOWN
  _log_keys(file, keys, is_unknown, "keys match no record")
  return numbers


def _normalized_keys(keys: Mapping[str, int]) -> dict[str, list[int]]:
  """Returns the numbers of keys whose normalized spelling differs, by that spelling."""
  normalized = collections.defaultdict(list)
  for key, number in keys.items():
    plain = posixpath.normpath(key.strip().replace("\\", "/"))
    if plain != key and plain not in keys:
      normalized[plain].append(number)
  return normalized


def _log_keys(
  file: str, keys: Mapping[str, int], is_wanted: np.ndarray, what: str
) -> None:
  if is_wanted.any():
    first = next(name for name, key in keys.items() if is_wanted[key])
    num_wanted = np.count_nonzero(is_wanted)
    logging.warning("%s: %d %s, such as %r.", file, num_wanted, what, first)


def _drop_bad_triplets(
  file: str, triplets: np.ndarray, labels: np.ndarray, is_strict: bool
) -> np.ndarray:
  anchors, positives, negatives = triplets.T
  is_known = (triplets != _UNKNOWN).all(axis=1)
  reasons = {
    "a record that does not exist": ~is_known,
    "a negative of the anchor's own class": is_known
    & (labels[anchors] == labels[negatives]),
    "the same record as anchor and positive": is_known & (anchors == positives),
    "the same record as positive and negative": is_known & (positives == negatives),
  }
  for reason, is_bad in reasons.items():
    num_bad = int(np.count_nonzero(is_bad))
    if not num_bad:
      continue
    message = (
      f"{file}: {num_bad} of {len(triplets)} triplets have {reason}, first triplet "
      f"{int(np.argmax(is_bad)) + 1}"
    )
    if is_strict:
      raise UserError(f"{message}; {_ADVICE}.")
    logging.warning("%s; they are skipped.", message)
  return triplets[~np.any(list(reasons.values()), axis=0)]


@gin.register
class TripletSampler:
  """Sampler of the triplets of a list, each once per epoch, in random order.

  Each row of a batch is an anchor, a positive and a negative. Triplets with a record
  whose class is not in the training split are skipped and counted.
  """

  rows_parameter = "TripletSampler.triplets_per_batch"
  # Number of positives and negatives of a row, after its anchor.
  group = (1, 1)

  def __init__(
    self,
    index: RecordIndex,
    *,
    file: str,
    triplets_per_batch: int,
    seed: int,
    bad_triplets: str = "refuse",
    classes: Optional[np.ndarray] = None,
  ):
    """Reads the list.

    Args:
      index: the records; all are read once at the start if the list has keys.
      file: CSV or TSV with columns anchor, positive and negative, which are record
        keys; or an .npy array [n, 3] of record numbers.
      triplets_per_batch: T.
      seed: random seed of the order.
      bad_triplets: "refuse" a list with bad triplets, or "leave_out" these triplets. A
        triplet is bad if it has unknown records, a negative of the anchor's own class,
        or the anchor or the negative as its positive.
      classes: int32 ids of the classes to draw from; None for all.

    Raises:
      UserError: the list can't be read, has bad triplets, or has no other ones; or T is
        below 1.
    """
    check_at_least(self.rows_parameter, triplets_per_batch, 1)
    check_choice("TripletSampler.bad_triplets", bad_triplets, ("refuse", "leave_out"))
    self.shape = (triplets_per_batch, len(COLUMNS))
    self._key = permutation.mix(seed, _TRIPLETS)
    triplets = read_triplets(file, index, is_strict=bad_triplets == "refuse")
    self._triplets = triplets
    if classes is not None:
      is_drawn = np.zeros(index.num_classes, bool)
      is_drawn[classes] = True
      self._triplets = triplets[is_drawn[index.labels[triplets]].all(axis=1)]
    num_drawn = len(self._triplets)
    if not num_drawn:
      reason = "it is empty, or all triplets were skipped"
      if len(triplets):
        reason = f"{len(triplets)} triplets are of classes outside the training split"
      raise UserError(f"{file} has no triplet to train on: {reason}.")
    logging.info(
      "%s: %d triplets, and %d of classes outside the training split.",
      file,
      num_drawn,
      len(triplets) - num_drawn,
    )

  @property
  def num_triplets(self) -> int:
    """Number of triplets to draw from."""
    return len(self._triplets)

  def batch(self, step: int) -> np.ndarray:
    """Returns the record numbers of a step, [T, 3] int64."""
    return self.batches(np.array([step]))[0]

  def batches(self, steps: np.ndarray) -> np.ndarray:
    """Returns the record numbers of steps [S] int64, [S, T, 3] int64."""
    sizes = np.full(steps.shape, self.num_triplets)
    keys = np.broadcast_to(self._key, steps.shape)
    return self._triplets[permutation.distinct_block(steps, sizes, keys, self.shape[0])]
