"""The arrays of an index: labels, members of classes and class names.

Arrays of a remote index are copied to this machine once, and memory-mapped from there.

Shapes: N records, C classes, B bytes of all class names together.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import io
import os
import stat
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol, Union, overload

import numpy as np

from trainer.data import manifest
from trainer.errors import UserError
from trainer.runtime import filesystem
from trainer.runtime.lease import locked

_CHUNK_BYTES = 16 << 20
_SMALL_BYTES = 1 << 20

# Elements checked at once, so that little of a mapped array is in memory.
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


class ClassNames(Sequence[str]):
  """A sequence of class names, indexed by class id.

  Attributes:
    text: [B] uint8, all names in UTF-8, concatenated.
    starts: [C + 1] int64, where each name starts in the text.
    hashes: [C] uint64, a stable hash of each name.
  """

  def __init__(self, text: np.ndarray, starts: np.ndarray, hashes: np.ndarray):
    self.text = text
    self.starts = starts
    self.hashes = hashes

  @classmethod
  def from_names(cls, names: Iterable[str]) -> ClassNames:
    """Returns the names unchanged if they are `ClassNames`, otherwise converted."""
    if isinstance(names, cls):
      return names
    encoded = [name.encode() for name in names]
    starts = np.zeros(len(encoded) + 1, np.int64)
    np.cumsum([len(name) for name in encoded], out=starts[1:])
    hashes = np.array([_hash(name) for name in encoded], np.uint64)
    return cls(np.frombuffer(b"".join(encoded), np.uint8), starts, hashes)

  def __len__(self) -> int:
    return len(self.starts) - 1

  @overload
  def __getitem__(self, class_id: int) -> str: ...

  @overload
  def __getitem__(self, class_id: slice) -> list[str]: ...

  def __getitem__(self, class_id: Union[int, slice]) -> Union[str, list[str]]:
    if isinstance(class_id, slice):
      return [self[i] for i in range(*class_id.indices(len(self)))]
    position = range(len(self))[class_id]
    start, end = self.starts[position : position + 2]
    return _text(self.text[start:end].tobytes())

  def __iter__(self) -> Iterator[str]:
    text = self.text.tobytes()
    starts = self.starts.tolist()
    for start, end in zip(starts, starts[1:]):
      yield _text(text[start:end])

  def __eq__(self, other: object) -> bool:
    return isinstance(other, Sequence) and list(self) == list(other)

  def __repr__(self) -> str:
    return f"ClassNames({len(self)} names)"


def _text(name: bytes) -> str:
  try:
    return name.decode()
  except UnicodeDecodeError as error:
    raise UserError(
      f"The index is damaged (a class name {name!r:.60} is not UTF-8); delete it and "
      "rebuild it with --mode=ingest."
    ) from error


def _hash(name: bytes) -> int:
  return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little")


class Classes(Protocol):
  """The interface of an index for a sampler."""

  @property
  def num_classes(self) -> int:
    """Number of classes; their ids are 0 … num_classes − 1."""

  def members(self, class_id: int) -> np.ndarray:
    """Returns the record numbers of a class, [n] int64."""


class MemberTable(NamedTuple):
  """Record numbers sorted by class.

  Attributes:
    records: [N] int64, the members of class 0, then of class 1, and so on.
    starts: [C + 1] int64, where the members of each class start.
  """

  records: np.ndarray
  starts: np.ndarray

  @property
  def num_classes(self) -> int:
    """Number of classes, empty ones included."""
    return len(self.starts) - 1

  def members(self, class_id: int) -> np.ndarray:
    """Returns the record numbers of a class, [n] int64."""
    start, end = self.starts[class_id : class_id + 2]
    return self.records[start:end]


def members_from_labels(labels: np.ndarray, num_classes: int) -> MemberTable:
  """Sorts record numbers by class, and within a class in ascending order.

  Args:
    labels: [N] int32 class ids.
    num_classes: C.

  Returns:
    The table of members.
  """
  starts = np.zeros(num_classes + 1, np.int64)
  np.cumsum(np.bincount(labels, minlength=num_classes), out=starts[1:])
  return MemberTable(np.argsort(labels, kind="stable").astype(np.int64), starts)


def members_of(classes: Classes) -> MemberTable:
  """Returns the member table of an index; built from `members` if it has none."""
  table = getattr(classes, "member_table", classes)
  if isinstance(table, MemberTable):
    return table
  members = [classes.members(class_id) for class_id in range(classes.num_classes)]
  starts = np.zeros(len(members) + 1, np.int64)
  np.cumsum([len(each) for each in members], out=starts[1:])
  records = np.concatenate([np.empty(0, np.int64), *members]).astype(np.int64)
  return MemberTable(records, starts)


def local_copy(path: str) -> str:
  """Returns the path of a local copy of a file; copies it if there is none yet.

  The copy is reused while size, time and a sample of the bytes are unchanged. Outdated
  copies of the same path are removed; processes that have one mapped keep using it.

  Raises:
    OSError: the file can't be read, or the copy can't be written.
  """
  name, state = _digest(path.encode()), _content_key(path)
  start = os.path.join(_folder(), name)
  copy = f"{start}-{state}"
  with locked(start + ".lock"):
    if not os.path.exists(copy):
      for old in glob.glob(glob.escape(start) + "-*"):
        os.remove(old)
      with filesystem.replacing(copy) as staged:
        filesystem.retry_with_backoff(path, lambda: _copy(path, staged))
  return copy


@contextlib.contextmanager
def temporary_copy(path: str) -> Iterator[str]:
  """Copies a file that is read once to a local path; the copy is removed in the end.

  Raises:
    OSError: the file can't be read, or the copy can't be written.
  """
  with tempfile.TemporaryDirectory(prefix="retrieval-trainer-") as folder:
    copy = os.path.join(folder, "copy")
    filesystem.retry_with_backoff(path, lambda: _copy(path, copy))
    yield copy


def _content_key(path: str) -> str:
  """Returns a digest of a file: of its content, or of size, time and a sample."""
  status = filesystem.status(path)
  if status.num_bytes <= _SMALL_BYTES:  # One request, while a sample takes many.
    return _digest(filesystem.read_bytes(path))
  sample = filesystem.retry_with_backoff(
    path, lambda: manifest.hash_sample(path, status.num_bytes)
  )
  return _digest(f"{status} {sample}".encode())


def _digest(content: bytes) -> str:
  return hashlib.blake2b(content, digest_size=8).hexdigest()


def _folder() -> str:
  """Returns a private folder of this user, so that others can't alter the copies."""
  folder = os.path.join(tempfile.gettempdir(), f"retrieval-trainer-{os.getuid()}")
  with contextlib.suppress(FileExistsError):
    os.mkdir(folder, 0o700)
  found = os.lstat(folder)
  is_own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
  if not is_own or found.st_mode & 0o022:
    raise PermissionError(13, "other users can write to it; set TMPDIR", folder)
  return folder


def _copy(path: str, target: str) -> None:
  with (
    filesystem.as_os_errors(path),
    filesystem.open_file(path, "rb") as source,
    open(target, "wb") as copy,
  ):
    while chunk := source.read(_CHUNK_BYTES):
      copy.write(chunk)


class IndexArrays(NamedTuple):
  """All arrays of an index: location and class of each record, members of each class.

  Attributes:
    offsets: [N] int64, start of each record's frame in its shard, bytes.
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
    """Returns the table of the members of each class."""
    return MemberTable(self.member_records, self.member_starts)

  @property
  def class_names(self) -> ClassNames:
    """Returns the class names, by class id."""
    return ClassNames(self.name_text, self.name_starts, self.name_hashes)


def write_arrays(folder: str, arrays: IndexArrays) -> None:
  """Writes every array as a separate file into an existing folder."""
  for name, array in arrays._asdict().items():
    array = array.astype(_DTYPES[name], copy=False)
    if not filesystem.is_remote(folder):
      np.save(_path(folder, name), array, allow_pickle=False)
      continue
    content = io.BytesIO()
    np.save(content, array, allow_pickle=False)
    filesystem.write_bytes(_path(folder, name), content.getvalue())


def read_arrays(folder: str, *, num_records: int, num_classes: int) -> IndexArrays:
  """Maps the arrays of an index and checks them against its manifest.

  Args:
    folder: folder of the arrays.
    num_records: N.
    num_classes: C.

  Returns:
    The arrays, memory-mapped read-only.

  Raises:
    UserError: a file is missing, truncated, or from another index; names the first.
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
        _path(folder, name), f"{array.dtype}{list(array.shape)} instead of [{size}]"
      )
  for name, end in (
    ("member_starts", num_records),
    ("name_starts", arrays.name_text.size),
  ):
    starts = arrays._asdict()[name]
    if starts[0] != 0 or starts[-1] != end or not _is_ascending(starts):
      raise _damaged(_path(folder, name), f"no ascending parts from 0 to {end}")
  return arrays


def _is_ascending(starts: np.ndarray) -> bool:
  firsts = range(0, len(starts) - 1, _NUM_AT_A_TIME)
  parts = (starts[first : first + _NUM_AT_A_TIME + 1] for first in firsts)
  return all((part[1:] >= part[:-1]).all() for part in parts)


def _map(folder: str, name: str) -> np.ndarray:
  path = _path(folder, name)
  try:
    mapped = local_copy(path) if filesystem.is_remote(path) else path
    array = np.lib.format.open_memmap(mapped, mode="r")
  except FileNotFoundError as error:
    raise _damaged(path, "missing") from error
  except Exception as error:  # The header is parsed by Python: many error types.
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    raise _damaged(path, reason) from error
  return array


def _damaged(path: str, what: str) -> UserError:
  return UserError(
    f"{path} of the index is damaged ({what}); delete the index and rebuild it with "
    "--mode=ingest."
  )


def _path(folder: str, name: str) -> str:
  return os.path.join(folder, f"{name}.npy")
