"""Lists of triplets from files: clicks, judgements, what a miner of one's own found.

Shapes: n triplets.
"""

from __future__ import annotations

import array
import collections
import io
import posixpath
from collections.abc import Mapping

import numpy as np
from absl import logging

from trainer.data import paths
from trainer.data.csv_file import CsvFile
from trainer.data.record_names import record_names
from trainer.data.records import RecordIndex
from trainer.errors import UserError, reason_of

COLUMNS = ("anchor", "positive", "negative")
_UNKNOWN = -1
_ADVICE = "TripletSchedule.bad_triplets='leave_out' goes without them"


def read_triplets(file: str, index: RecordIndex, *, is_strict: bool) -> np.ndarray:
  """Reads a list, and leaves out what can't be learned from.

  That is a triplet of which a key is unknown, the negative is of the anchor's own
  class, or the positive is the anchor or the negative.

  Args:
    file: a table as `CsvFile` reads it, with the columns anchor, positive and negative,
      of keys; or an .npy array [n, 3] of record numbers.
    index: the records; all are read once where there are keys to be found.
    is_strict: whether such triplets are an error.

  Returns:
    [n, 3] int64 record numbers: anchors, positives, negatives.

  Raises:
    UserError: the file can't be read, is no such list, or has such triplets.
  """
  if file.lower().endswith(".npy"):
    triplets = _numbers_of_array(file)
    is_known = (triplets >= 0) & (triplets < index.num_records)
    triplets = np.where(is_known, triplets, _UNKNOWN)
  else:
    keys, triplets = _keys_of_table(file)
    triplets = _numbers_of_keys(file, keys, index)[triplets]
  return _without_bad(file, triplets, index.labels, is_strict)


def _numbers_of_array(file: str) -> np.ndarray:
  try:
    content = paths.read_bytes(file)
  except OSError as error:
    raise UserError(f"{file} can't be read: {error.strerror or error}.") from error
  try:
    numbers = np.load(io.BytesIO(content), allow_pickle=False)
  except Exception as error:  # Python's parser reads the head, and has many.
    raise UserError(f"{file} is no array: {reason_of(error)}.") from error
  if not isinstance(numbers, np.ndarray):
    raise UserError(f"{file} is no array, but several.")
  if numbers.ndim != 2 or numbers.shape[1] != 3 or numbers.dtype.kind not in "iu":
    raise UserError(
      f"{file} has shape {numbers.shape} and type {numbers.dtype}; needed are record "
      "numbers, integers [n, 3]."
    )
  return numbers.astype(np.int64)


def _keys_of_table(file: str) -> tuple[dict[str, int], np.ndarray]:
  """Each key once, numbered as they come; and rows of these numbers, [n, 3]."""
  # A key that is no UTF-8 is known by the text that stands for it.
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
  """[number of keys] int64, the record number of each; −1 for none."""
  numbers = np.full(len(keys), _UNKNOWN, np.int64)
  meant = np.full(len(keys), _UNKNOWN, np.int64)
  respelt = _respelt(keys)
  logging.info("Reading %d records for the keys of %s.", index.num_records, file)
  for number, name in enumerate(record_names(index, np.arange(index.num_records))):
    for found, named in ((numbers, keys.get(name)), (meant, respelt.get(name))):
      if named is None:
        continue
      first = int(np.max(found[named]))
      if first != _UNKNOWN:
        raise UserError(
          f"The key {name!r} of {file} is that of two records: "
          f"{index.describe(first)} and {index.describe(number)}."
        )
      found[named] = number
  is_meant = (numbers == _UNKNOWN) & (meant != _UNKNOWN)
  _warn_of_keys(file, keys, is_meant, "keys are read without blanks or as plain paths")
  numbers = np.where(is_meant, meant, numbers)
  is_unknown = numbers == _UNKNOWN
  _warn_of_keys(file, keys, is_unknown, "keys are those of no record")
  return numbers


def _respelt(keys: Mapping[str, int]) -> dict[str, list[int]]:
  """Numbers of the keys that have another, plain spelling, by that spelling."""
  respelt = collections.defaultdict(list)
  for key, number in keys.items():
    plain = posixpath.normpath(key.strip().replace("\\", "/"))
    if plain != key and plain not in keys:
      respelt[plain].append(number)
  return respelt


def _warn_of_keys(
  file: str, keys: Mapping[str, int], is_wanted: np.ndarray, what: str
) -> None:
  if is_wanted.any():
    first = next(name for name, key in keys.items() if is_wanted[key])
    num_wanted = np.count_nonzero(is_wanted)
    logging.warning("%s: %d %s, such as %r.", file, num_wanted, what, first)


def _without_bad(
  file: str, triplets: np.ndarray, labels: np.ndarray, is_strict: bool
) -> np.ndarray:
  anchors, positives, negatives = triplets.T
  is_known = (triplets != _UNKNOWN).all(axis=1)
  reasons = {
    "a record that there is not": ~is_known,
    "a negative of the anchor's own class": is_known
    & (labels[anchors] == labels[negatives]),
    "the anchor for its positive": is_known & (anchors == positives),
    "one record for positive and negative": is_known & (positives == negatives),
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
    logging.warning("%s; they are left out.", message)
  return triplets[~np.any(list(reasons.values()), axis=0)]
