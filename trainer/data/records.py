"""Random access to records by number, record names, and bad records.

Shapes: N records of the index, n record numbers, C classes.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import itertools
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import BinaryIO, Optional

import numpy as np
import tensorflow as tf
from absl import logging

from trainer.data import index_arrays, manifest, tfrecord
from trainer.data.images import Decoder
from trainer.data.index_arrays import ClassNames, MemberTable
from trainer.errors import UserError
from trainer.runtime import filesystem, watchdog

# Number, shard, offset and length of a record.
_Location = tuple[int, int, int, int]

# Records checked at once; small ones fit into the processor's cache.
_MAX_RECORDS_AT_A_TIME, _MAX_BYTES_AT_A_TIME = 512, 4 << 20

# Well below the usual limit of 1,024 open files, for data sets of thousands of shards.
_MAX_OPEN_SHARDS = 256

_READ_AT_ONCE = 4_096

_UNKNOWN, _GOOD, _BAD = 0, 1, 2


def locate(folder_or_pattern: str) -> tuple[str, str]:
  """Returns the folders of shards and of their index.

  Args:
    folder_or_pattern: a folder, whose index is its subfolder `index`, or a pattern such
      as `data/train-*.tfrecord`, whose index is named after the pattern.

  Returns:
    The folder of the shards and the folder of the index, absolute.
  """
  path = filesystem.absolute(folder_or_pattern)
  if not glob.has_magic(path) or filesystem.is_folder(path):
    return path, os.path.join(path, "index")
  folder, pattern = os.path.split(path)
  return folder, os.path.join(folder, re.sub(r"[^\w.-]+", "_", pattern) + ".index")


def locate_folder(folder: str) -> tuple[str, str]:
  """Does the same as `locate` for an output folder that may not exist yet.

  Raises:
    UserError: it is a pattern, and there is no folder of that name.
  """
  path = filesystem.absolute(folder)
  if glob.has_magic(path) and not filesystem.is_folder(path):
    raise UserError(
      f"{folder} is a pattern; records are written into a folder: name one, or create "
      "a folder of this name first."
    )
  return path, os.path.join(path, "index")


class UnreadableError(UserError):
  """A record can't be accessed, for a reason other than its content."""


class RecordIndex:
  """Records by number, and classes with their members; all arrays are memory-mapped.

  Attributes:
    labels: [N] int32, class id of each record.
    member_table: the members of each class.
    class_names: class names by class id.
    manifest: manifest of the indexed shards.
    arrays: all memory-mapped arrays.
  """

  def __init__(
    self, folder: str, description: manifest.Manifest, arrays: index_arrays.IndexArrays
  ):
    self.manifest = description
    self.labels: np.ndarray = arrays.labels
    self.member_table: MemberTable = arrays.member_table
    self.class_names: ClassNames = arrays.class_names
    self.arrays = arrays
    self._paths = [os.path.join(folder, shard.name) for shard in description.shards]
    sizes = [shard.num_bytes for shard in description.shards]
    self._shard_bytes = np.array(sizes, np.int64)
    self._is_remote = filesystem.is_remote(folder)
    firsts = np.cumsum([0] + [shard.num_records for shard in description.shards])
    self._first_records: list[int] = firsts.tolist()
    self._open_shard: Callable[[int], BinaryIO] = functools.lru_cache(
      maxsize=_MAX_OPEN_SHARDS
    )(self._open_uncached)

  @classmethod
  def open(cls, folder_or_pattern: str) -> RecordIndex:
    """Opens the index of a folder of shards, or of the shards of a pattern.

    Raises:
      UserError: there is no index, it is damaged, or a shard is missing or changed.
    """
    folder, index_folder = locate(folder_or_pattern)
    description = manifest.read(index_folder)
    if description is None:
      raise UserError(f"{folder_or_pattern} has no index; run --mode=ingest first.")
    manifest.check_shards(folder, description)
    arrays = index_arrays.read_arrays(
      index_folder,
      num_records=description.num_records,
      num_classes=description.num_classes,
    )
    return cls(folder, description, arrays)

  @property
  def num_records(self) -> int:
    """N, over all shards."""
    return len(self.labels)

  @property
  def num_classes(self) -> int:
    """C."""
    return self.member_table.num_classes

  def fingerprint(self) -> dict[str, str]:
    """Returns named values that identify this index, for comparison between workers."""
    contents = hashlib.sha256()
    for array in (self.labels, self.arrays.lengths, self.class_names.hashes):
      contents.update(np.ascontiguousarray(array).data)
    return {
      "the number of records": str(self.num_records),
      "the number of classes": str(self.num_classes),
      "the hash of the index": contents.hexdigest()[:16],
    }

  def members(self, class_id: int) -> np.ndarray:
    """Returns the record numbers of a class, [n] int64."""
    return self.member_table.members(class_id)

  def read(self, record_numbers: Sequence[int] | np.ndarray) -> list[bytes]:
    """Reads records, and verifies each against its checksums.

    Args:
      record_numbers: [n] int64.

    Returns:
      n serialized examples, in the order of the numbers.

    Raises:
      UserError: a record or the index is damaged; names file and record.
      UnreadableError: a record can't be read; names file and record.
    """
    numbers = np.asarray(record_numbers, np.int64)
    self._check(numbers)
    if self._is_remote:
      return filesystem.in_parallel(self._read_one, self._locations(numbers))
    try:
      return self._read_local(numbers)
    except (tfrecord.FramingError, OSError):  # Reads one by one to name the bad record.
      return [self._read_one(*position) for position in self._locations(numbers)]

  def describe(self, record_number: int) -> str:
    """Returns the file of a record and its number in that file, for messages."""
    shard = int(self.arrays.shards[record_number])
    return f"{self._paths[shard]}: record {record_number - self._first_records[shard]}"

  def _check(self, numbers: np.ndarray) -> None:
    """Checks that records lie inside their shards, before memory is allocated.

    The check is made per read, because there may be too many records to check at first.
    """
    arrays = self.arrays
    is_inside = ((numbers >= 0) & (numbers < self.num_records)).all()
    if is_inside:
      shards, labels = arrays.shards[numbers], arrays.labels[numbers]
      is_inside = ((shards >= 0) & (shards < len(self._paths))).all()
      is_inside &= ((labels >= 0) & (labels < self.num_classes)).all()
    if is_inside:
      num_bytes = arrays.lengths[numbers].astype(np.int64) + tfrecord.OVERHEAD_BYTES
      offsets = arrays.offsets[numbers]
      is_inside = (offsets >= 0).all()
      is_inside &= (offsets <= self._shard_bytes[shards] - num_bytes).all()
    if not is_inside:
      raise UserError(
        f"The index of {os.path.dirname(self._paths[0])} is damaged (a record lies "
        "outside its shard, or has no class); delete it and rebuild it with "
        "--mode=ingest."
      )

  def _locations(self, numbers: np.ndarray) -> list[_Location]:
    columns = (self.arrays.shards, self.arrays.offsets, self.arrays.lengths)
    return list(zip(numbers.tolist(), *(each[numbers].tolist() for each in columns)))

  def _read_local(self, numbers: np.ndarray) -> list[bytes]:
    # In file order, with one file held open. A Python call per record costs as much as
    # reading it, so each operation processes many records.
    order = np.argsort(numbers, kind="stable")
    ordered = numbers[order]
    records: list[bytes] = []
    for part in _parts(self.arrays.shards[ordered], self.arrays.lengths[ordered]):
      records += self._read_part(ordered[part])
    inverse = np.empty_like(order)
    inverse[order] = np.arange(len(order))
    return list(map(records.__getitem__, inverse.tolist()))

  def _read_part(self, numbers: np.ndarray) -> list[bytes]:
    """Reads records of one shard, which is held open meanwhile."""
    file = self._open_shard(int(self.arrays.shards[numbers[0]]))
    lengths = self.arrays.lengths[numbers].astype(np.int64)
    sizes = (lengths + tfrecord.OVERHEAD_BYTES).tolist()
    offsets = self.arrays.offsets[numbers].tolist()
    frames = list(map(os.pread, itertools.repeat(file.fileno()), sizes, offsets))
    return tfrecord.unframe_all(frames, lengths.tolist())

  def _read_one(self, number: int, shard: int, offset: int, length: int) -> bytes:
    try:
      return tfrecord.unframe(self._read_range(shard, offset, length), length)
    except tfrecord.FramingError as error:
      raise UserError(
        f"{self.describe(number)} {error}; restore the file, or delete it and ingest "
        "again."
      ) from error
    except OSError as error:
      raise UnreadableError(
        f"{self.describe(number)} can't be read: {error.strerror}."
      ) from error

  def _read_range(self, shard: int, offset: int, length: int) -> bytes:
    num_bytes = length + tfrecord.OVERHEAD_BYTES
    if self._is_remote:
      return filesystem.read_range(self._paths[shard], offset, num_bytes)
    # The local variable keeps the file open even if the cache evicts it.
    file = self._open_shard(shard)
    return os.pread(file.fileno(), num_bytes, offset)

  def _open_uncached(self, shard: int) -> BinaryIO:
    return open(self._paths[shard], "rb", buffering=0)


def _parts(shards: np.ndarray, lengths: np.ndarray) -> Iterator[slice]:
  """Splits rows, ordered by shard, into slices of one shard and limited size."""
  is_other = np.concatenate([np.ones(1, bool), np.diff(shards) != 0])
  # Preceding bytes in units of the limit: a slice starts where the count increases.
  num_before = np.cumsum(lengths, dtype=np.int64) - lengths
  is_other[1:] |= np.diff(num_before // _MAX_BYTES_AT_A_TIME) > 0
  ends = [*np.flatnonzero(is_other)[1:].tolist(), len(shards)]
  first = 0
  for end in ends if len(shards) else ():
    for start in range(first, end, _MAX_RECORDS_AT_A_TIME):
      yield slice(start, min(end, start + _MAX_RECORDS_AT_A_TIME))
    first = end


def read_records(
  index: RecordIndex, numbers: np.ndarray
) -> Iterator[tuple[int, bytes]]:
  """Yields records, which are read in large batches.

  Args:
    index: the records.
    numbers: [n] int64.

  Yields:
    Number and record, in the order of the numbers.
  """
  for start in range(0, len(numbers), _READ_AT_ONCE):
    watchdog.beat()
    some = numbers[start : start + _READ_AT_ONCE]
    yield from zip(some.tolist(), index.read(some))


def record_names(index: RecordIndex, numbers: np.ndarray) -> Iterator[str]:
  """Yields the names of records: the feature "key", or file and number without it.

  Args:
    index: the records.
    numbers: [n] int64.

  Yields:
    A name, in the order of the numbers.
  """
  for number, record in read_records(index, numbers):
    position = index.describe(number)
    values = tfrecord.feature_values(record, position).get("key")
    yield str(tfrecord.feature_text(values[0])) if values else position


def record_error(index: RecordIndex, decoder: Decoder, number: int) -> Optional[str]:
  """Returns why a record can't be used, with its name; None if it can.

  Raises:
    UnreadableError: it can't be accessed, so its state is unknown.
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
    return f"{index.describe(number)} can't be decoded: {reason}"
  return None


def record_errors(
  index: RecordIndex, decoder: Decoder, numbers: Sequence[int] | np.ndarray
) -> dict[int, str]:
  """Returns why records can't be used, by number; tests all at once first."""
  try:
    decoder(tf.constant(index.read(numbers)))
  except UnreadableError:
    raise
  except (UserError, tf.errors.OpError, UnicodeDecodeError):
    found = {int(n): record_error(index, decoder, int(n)) for n in numbers}
    return {number: reason for number, reason in found.items() if reason is not None}
  return {}


class Replacements:
  """Replacement of bad records by other records of the same class.

  Each record is tested when it is first drawn, which costs as much as decoding it. The
  result is stored in one byte per record. The replacement is the next good member of
  the class, so it is the same on every worker and in every run.

  Attributes:
    num_bad: number of bad records found so far.

  Args:
    index: the records.
    decoder: decoder that a good record must pass.
  """

  def __init__(self, index: RecordIndex, decoder: Decoder):
    self.num_bad = 0
    self._index = index
    self._decoder = decoder
    self._states = np.zeros(index.num_records, np.uint8)
    self._lock = threading.Lock()

  def replace(self, numbers: np.ndarray) -> np.ndarray:
    """Returns record numbers [n] int64, all of which can be read and decoded.

    Raises:
      UserError: a class has no good record.
    """
    with self._lock:
      self._try(numbers)
      bad = np.flatnonzero(self._states[numbers] == _BAD)
      if not len(bad):
        return numbers
      replaced = numbers.copy()
      for position in bad.tolist():
        replaced[position] = self._next_good(int(numbers[position]))
      return replaced

  def _next_good(self, number: int) -> int:
    class_id = int(self._index.labels[number])
    members = self._index.members(class_id)
    position = int(np.searchsorted(members, number))
    for candidate in np.roll(members, -position - 1).tolist():
      self._try(np.array([candidate]))
      if self._states[candidate] == _GOOD:
        return candidate
    name = self._index.class_names[class_id]
    raise UserError(f"Class {name!r} has no record that can be read and decoded.")

  def _try(self, numbers: np.ndarray) -> None:
    unknown = np.unique(numbers[self._states[numbers] == _UNKNOWN])
    if not len(unknown):
      return
    reasons = record_errors(self._index, self._decoder, unknown)
    self._states[unknown] = _GOOD
    for number, reason in reasons.items():
      self._states[number] = _BAD
      self.num_bad += 1
      logging.warning(
        "%s Another record of its class replaces it (bad records so far: %d).",
        reason,
        self.num_bad,
      )
