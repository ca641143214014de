"""Lists of triplets from files: clicks, judgements, what a miner of one's own found.

Shapes: n triplets.
"""

from __future__ import annotations

import array
import csv
import io
from collections.abc import Mapping

import numpy as np
from absl import logging

from trainer.data import paths
from trainer.data.record_names import record_names
from trainer.data.records import RecordIndex
from trainer.errors import UserError

COLUMNS = ("anchor", "positive", "negative")
_UNKNOWN = -1
_ADVICE = "TripletSchedule.bad_triplets='leave_out' goes without them"


def read_triplets(file: str, index: RecordIndex, *, is_strict: bool) -> np.ndarray:
  """Reads a list, and leaves out what can't be learned from.

  That is a triplet of which a key is unknown, the negative is of the anchor's own
  class, or the positive is the anchor or the negative.

  Args:
    file: CSV, or TSV by its name, with the columns anchor, positive and negative, of
      keys; or an .npy array [n, 3] of record numbers.
    index: the records; all are read once where there are keys to be found.
    is_strict: whether such triplets are an error.

  Returns:
    [n, 3] int64 record numbers: anchors, positives, negatives.

  Raises:
    UserError: the file can't be read, is no such list, or has such triplets.
  """
  try:
    content = paths.read_bytes(file)
  except OSError as error:
    raise UserError(f"{file} can't be read: {error.strerror or error}.") from error
  if file.endswith(".npy"):
    triplets = _numbers_of_array(file, content)
    is_known = (triplets >= 0) & (triplets < index.num_records)
    triplets = np.where(is_known, triplets, _UNKNOWN)
  else:
    keys, triplets = _keys_of_table(file, content)
    triplets = _numbers_of_keys(file, keys, index)[triplets]
  return _without_bad(file, triplets, index.labels, is_strict)


def _numbers_of_array(file: str, content: bytes) -> np.ndarray:
  try:
    numbers = np.load(io.BytesIO(content), allow_pickle=False)
  except (ValueError, EOFError, OSError) as error:
    raise UserError(f"{file} is no array: {error}.") from error
  if not isinstance(numbers, np.ndarray):
    raise UserError(f"{file} is no array, but several.")
  if numbers.ndim != 2 or numbers.shape[1] != 3 or numbers.dtype.kind not in "iu":
    raise UserError(
      f"{file} has shape {numbers.shape} and type {numbers.dtype}; needed are record "
      "numbers, integers [n, 3]."
    )
  return numbers.astype(np.int64)


def _keys_of_table(file: str, content: bytes) -> tuple[dict[str, int], np.ndarray]:
  """Each key once, numbered as they come; and rows of these numbers, [n, 3]."""
  delimiter = "\t" if file.endswith(".tsv") else ","
  text = io.TextIOWrapper(
    io.BytesIO(content), encoding="utf-8-sig", errors="replace", newline=""
  )
  rows = csv.reader(text, delimiter=delimiter, strict=True)
  keys: dict[str, int] = {}
  numbers = array.array("i")
  try:
    header = next(rows, [])
    missing = [name for name in COLUMNS if name not in header]
    if missing:
      raise UserError(
        f"{file} has no column {missing[0]!r} in its first row; it needs "
        f"{', '.join(COLUMNS)}."
      )
    columns = [header.index(name) for name in COLUMNS]
    for row in rows:
      if not row:
        continue
      if len(row) <= max(columns) or not all(row[column] for column in columns):
        raise UserError(f"{file}: line {rows.line_num} lacks a key.")
      numbers.extend(keys.setdefault(row[column], len(keys)) for column in columns)
  except csv.Error as error:
    raise UserError(f"{file}: after line {rows.line_num}: {error}.") from error
  return keys, np.array(numbers, np.int32).reshape(-1, len(COLUMNS))


def _numbers_of_keys(
  file: str, keys: Mapping[str, int], index: RecordIndex
) -> np.ndarray:
  """[number of keys] int64, the record number of each; −1 for none."""
  numbers = np.full(len(keys), _UNKNOWN, np.int64)
  logging.info("Reading %d records for the keys of %s.", index.num_records, file)
  for number, name in enumerate(record_names(index, np.arange(index.num_records))):
    key = keys.get(name)
    if key is None:
      continue
    if numbers[key] != _UNKNOWN:
      raise UserError(
        f"The key {name!r} of {file} is that of two records: "
        f"{index.describe(int(numbers[key]))} and {index.describe(number)}."
      )
    numbers[key] = number
  unknown = np.flatnonzero(numbers == _UNKNOWN)
  if len(unknown):
    first = min(name for name, key in keys.items() if numbers[key] == _UNKNOWN)
    logging.warning(
      "%s has %d keys that no record has, such as %r.", file, len(unknown), first
    )
  return numbers


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
