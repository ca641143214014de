"""The arrays of an index, one plain .npy file each, opened by mapping.

Shapes: N records, C classes, B bytes of all class names together.
"""

from __future__ import annotations

import io
import os
from typing import NamedTuple

import numpy as np

from trainer.data import local_copy, paths
from trainer.data.class_names import ClassNames
from trainer.data.members import MemberTable
from trainer.errors import UserError


class IndexArrays(NamedTuple):
  """Where every record lies, what it is, and which records a class has.

  Attributes:
    offsets: [N] int64, where the frame of a record starts in its shard, bytes.
    lengths: [N] uint32, length of its data, bytes.
    shards: [N] int32, number of its shard.
    labels: [N] int32, class id.
    member_records: [N] int64, record numbers sorted by class.
    member_starts: [C + 1] int64, where the members of each class start.
    name_text: [B] uint8, class names in UTF-8.
    name_starts: [C + 1] int64, where each name starts in the text.
    name_hashes: [C] uint64, stable hash of each name.
  """

  offsets: np.ndarray
  lengths: np.ndarray
  shards: np.ndarray
  labels: np.ndarray
  member_records: np.ndarray
  member_starts: np.ndarray
  name_text: np.ndarray
  name_starts: np.ndarray
  name_hashes: np.ndarray

  @property
  def member_table(self) -> MemberTable:
    """Which records belong to which class."""
    return MemberTable(self.member_records, self.member_starts)

  @property
  def class_names(self) -> ClassNames:
    """The names of the classes, by class id."""
    return ClassNames(self.name_text, self.name_starts, self.name_hashes)


# Looked at at once, to hold little of what is mapped.
_NUM_AT_A_TIME = 1_000_000

_DTYPES: dict[str, type[np.generic]] = {
  "offsets": np.int64,
  "lengths": np.uint32,
  "shards": np.int32,
  "labels": np.int32,
  "member_records": np.int64,
  "member_starts": np.int64,
  "name_text": np.uint8,
  "name_starts": np.int64,
  "name_hashes": np.uint64,
}


def write(folder: str, arrays: IndexArrays) -> None:
  """Writes every array as a file of its own into an existing folder."""
  for name, array in arrays._asdict().items():
    array = array.astype(_DTYPES[name], copy=False)
    if not paths.is_remote(folder):
      np.save(_path(folder, name), array, allow_pickle=False)
      continue
    content = io.BytesIO()
    np.save(content, array, allow_pickle=False)
    paths.write_bytes(_path(folder, name), content.getvalue())


def read(folder: str, *, num_records: int, num_classes: int) -> IndexArrays:
  """Maps the arrays of an index and checks that they fit its manifest.

  Args:
    folder: where they lie.
    num_records: N.
    num_classes: C.

  Returns:
    The arrays, mapped read-only.

  Raises:
    UserError: naming the first file that is missing, cut short, or of another index.
  """
  arrays = IndexArrays(*(_map(folder, name) for name in IndexArrays._fields))
  per_class = ("member_starts", "name_starts")
  for name, array in arrays._asdict().items():
    size = num_classes + 1 if name in per_class else num_records
    if name == "name_hashes":
      size = num_classes
    if name == "name_text":
      size = int(arrays.name_starts[-1]) if len(arrays.name_starts) else 0
    if array.shape != (size,) or array.dtype != _DTYPES[name]:
      raise _damaged(
        _path(folder, name), f"{array.dtype}{list(array.shape)} where [{size}] belongs"
      )
  for name, end in (
    ("member_starts", num_records),
    ("name_starts", arrays.name_text.size),
  ):
    starts = arrays._asdict()[name]
    if starts[0] != 0 or starts[-1] != end or not _is_ascending(starts):
      raise _damaged(_path(folder, name), f"no parts from 0 to {end}")
  return arrays


def _is_ascending(starts: np.ndarray) -> bool:
  firsts = range(0, len(starts) - 1, _NUM_AT_A_TIME)
  parts = (starts[first : first + _NUM_AT_A_TIME + 1] for first in firsts)
  return all((part[1:] >= part[:-1]).all() for part in parts)


def _map(folder: str, name: str) -> np.ndarray:
  path = _path(folder, name)
  try:
    mapped = local_copy.of(path) if paths.is_remote(path) else path
    array = np.lib.format.open_memmap(mapped, mode="r")
  except FileNotFoundError as error:
    raise _damaged(path, "missing") from error
  except Exception as error:  # Python's parser reads the head, and has many.
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    raise _damaged(path, reason) from error
  return array


def _damaged(path: str, what: str) -> UserError:
  return UserError(
    f"{path} of the index is damaged ({what}); delete the index and make it again "
    "with --mode=ingest."
  )


def _path(folder: str, name: str) -> str:
  return os.path.join(folder, f"{name}.npy")
