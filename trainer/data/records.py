"""Random access to records by number, their names, and unreadable ones.

Shapes: N records, C classes.

Shapes: N records of the index, n record numbers.
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
_Place = tuple[int, int, int, int]

# Checked at once; few enough for the processor's cache, if they are small.
_MAX_ABREAST, _MAX_ABREAST_BYTES = 512, 4 << 20

# Well under the usual limit of 1,024 open files, for shards by the thousand.
_MAX_OPEN_SHARDS = 256


def locate(folder_or_pattern: str) -> tuple[str, str]:
  """Where shards lie and where their index belongs.

  Args:
    folder_or_pattern: a folder, whose index is `index` in it, or a pattern such as
      `data/train-*.tfrecord`, whose index is named after the pattern.

  Returns:
    The folder of the shards and the folder of the index, absolute.
  """
  path = filesystem.absolute(folder_or_pattern)
  if not glob.has_magic(path) or filesystem.is_folder(path):
    return path, os.path.join(path, "index")
  folder, pattern = os.path.split(path)
  return folder, os.path.join(folder, re.sub(r"[^\w.-]+", "_", pattern) + ".index")


def locate_folder(folder: str) -> tuple[str, str]:
  """As `locate`, for a folder that is written into and may not be there yet.

  Raises:
    UserError: it is a pattern, and there is no folder of that name.
  """
  path = filesystem.absolute(folder)
  if glob.has_magic(path) and not filesystem.is_folder(path):
    raise UserError(
      f"{folder} is a pattern, and records are written into a folder; name one, or "
      "make one of this very name first."
    )
  return path, os.path.join(path, "index")


class UnreadableError(UserError):
  """A record that can't be got at, which is no fault of the record."""


class RecordIndex:
  """Records by number, and classes with their members; all arrays are mapped.

  Attributes:
    labels: [N] int32, class id of each record.
    member_table: which records belong to which class.
    class_names: the name of each class.
    manifest: what was indexed.
    arrays: all that is mapped.
  """

  def __init__(
    self,
    folder: str,
    description: manifest.Manifest,
    arrays: index_arrays.IndexArrays,
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
      UserError: if there is no index, it is damaged, or a shard is missing or changed.
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
    """What tells this index from another, by name: for workers to compare."""
    contents = hashlib.sha256()
    for array in (self.labels, self.arrays.lengths, self.class_names.hashes):
      contents.update(np.ascontiguousarray(array).data)
    return {
      "the number of records": str(self.num_records),
      "the number of classes": str(self.num_classes),
      "the hash of the index": contents.hexdigest()[:16],
    }

  def members(self, class_id: int) -> np.ndarray:
    """[n] int64, the numbers of the records of a class."""
    return self.member_table.members(class_id)

  def read(self, record_numbers: Sequence[int] | np.ndarray) -> list[bytes]:
    """The data of records, each checked against its checksums.

    Args:
      record_numbers: [n] int64.

    Returns:
      n serialized examples, in the order of the numbers.

    Raises:
      UserError: naming file and record, if one is corrupt, or if the index is.
      UnreadableError: likewise, if one cannot be read.
    """
    numbers = np.asarray(record_numbers, np.int64)
    self._check(numbers)
    if self._is_remote:
      return filesystem.in_parallel(self._read_one, self._places(numbers))
    try:
      return self._read_local(numbers)
    except (tfrecord.FramingError, OSError):  # Names the bad one.
      return [self._read_one(*place) for place in self._places(numbers)]

  def describe(self, record_number: int) -> str:
    """Names a record for a message: its file and its number in that file."""
    shard = int(self.arrays.shards[record_number])
    return f"{self._paths[shard]}: record {record_number - self._first_records[shard]}"

  def _check(self, numbers: np.ndarray) -> None:
    """Makes sure that records lie in their shards, before memory for them is taken.

    It is looked at when they are read: there may be too many to look at all at first.
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
        "outside its shard, or has no class); delete it and make it again with "
        "--mode=ingest."
      )

  def _places(self, numbers: np.ndarray) -> list[_Place]:
    columns = (self.arrays.shards, self.arrays.offsets, self.arrays.lengths)
    return list(zip(numbers.tolist(), *(each[numbers].tolist() for each in columns)))

  def _read_local(self, numbers: np.ndarray) -> list[bytes]:
    # In the order of the files, of which one is held open. A step of Python costs as
    # much as reading a record, so that each is taken for many at once.
    order = np.argsort(numbers, kind="stable")
    ordered = numbers[order]
    records: list[bytes] = []
    for part in _parts(self.arrays.shards[ordered], self.arrays.lengths[ordered]):
      records += self._read_part(ordered[part])
    places = np.empty_like(order)
    places[order] = np.arange(len(order))
    return list(map(records.__getitem__, places.tolist()))

  def _read_part(self, numbers: np.ndarray) -> list[bytes]:
    """Records of one shard, which is held open meanwhile."""
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
        f"{self.describe(number)} {error}; restore the file, or delete it and "
        "ingest again."
      ) from error
    except OSError as error:
      raise UnreadableError(
        f"{self.describe(number)} cannot be read: {error.strerror}."
      ) from error

  def _read_range(self, shard: int, offset: int, length: int) -> bytes:
    num_bytes = length + tfrecord.OVERHEAD_BYTES
    if self._is_remote:
      return filesystem.read_range(self._paths[shard], offset, num_bytes)
    # The local name keeps the file open while it is read, whatever the cache drops.
    file = self._open_shard(shard)
    return os.pread(file.fileno(), num_bytes, offset)

  def _open_uncached(self, shard: int) -> BinaryIO:
    return open(self._paths[shard], "rb", buffering=0)


def _parts(shards: np.ndarray, lengths: np.ndarray) -> Iterator[slice]:
  """Cuts rows, ordered by their shards, into few enough of one shard each."""
  is_other = np.concatenate([np.ones(1, bool), np.diff(shards) != 0])
  # Bytes before a row, in parts: a new one begins where the count has gone up.
  num_before = np.cumsum(lengths, dtype=np.int64) - lengths
  is_other[1:] |= np.diff(num_before // _MAX_ABREAST_BYTES) > 0
  ends = [*np.flatnonzero(is_other)[1:].tolist(), len(shards)]
  first = 0
  for end in ends if len(shards) else ():
    for start in range(first, end, _MAX_ABREAST):
      yield slice(start, min(end, start + _MAX_ABREAST))
    first = end


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
    watchdog.beat()
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
    values = tfrecord.feature_values(record, place).get("key")
    yield str(tfrecord.feature_text(values[0])) if values else place


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
