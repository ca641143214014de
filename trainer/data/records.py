"""Random access to the records of TFRecord shards through the index beside them.

Shapes: N records, C classes.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import itertools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import BinaryIO

import numpy as np

from trainer.data import framing, index_arrays, manifest, paths, remote
from trainer.data.class_names import ClassNames
from trainer.data.members import MemberTable
from trainer.errors import UserError

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
  path = paths.absolute(folder_or_pattern)
  if not glob.has_magic(path) or paths.is_folder(path):
    return path, os.path.join(path, "index")
  folder, pattern = os.path.split(path)
  return folder, os.path.join(folder, re.sub(r"[^\w.-]+", "_", pattern) + ".index")


def locate_folder(folder: str) -> tuple[str, str]:
  """As `locate`, for a folder that is written into and may not be there yet.

  Raises:
    UserError: it is a pattern, and there is no folder of that name.
  """
  path = paths.absolute(folder)
  if glob.has_magic(path) and not paths.is_folder(path):
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
    self._is_remote = paths.is_remote(folder)
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
    arrays = index_arrays.read(
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

  def facts(self) -> dict[str, str]:
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
      return remote.in_parallel(self._read_one, self._places(numbers))
    try:
      return self._read_local(numbers)
    except (framing.FramingError, OSError):  # Names the bad one.
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
      num_bytes = arrays.lengths[numbers].astype(np.int64) + framing.OVERHEAD_BYTES
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
    sizes = (lengths + framing.OVERHEAD_BYTES).tolist()
    offsets = self.arrays.offsets[numbers].tolist()
    frames = list(map(os.pread, itertools.repeat(file.fileno()), sizes, offsets))
    return framing.unframe_all(frames, lengths.tolist())

  def _read_one(self, number: int, shard: int, offset: int, length: int) -> bytes:
    try:
      return framing.unframe(self._read_range(shard, offset, length), length)
    except framing.FramingError as error:
      raise UserError(
        f"{self.describe(number)} {error}; restore the file, or delete it and "
        "ingest again."
      ) from error
    except OSError as error:
      raise UnreadableError(
        f"{self.describe(number)} cannot be read: {error.strerror}."
      ) from error

  def _read_range(self, shard: int, offset: int, length: int) -> bytes:
    num_bytes = length + framing.OVERHEAD_BYTES
    if self._is_remote:
      return remote.read_range(self._paths[shard], offset, num_bytes)
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
