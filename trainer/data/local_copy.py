"""Copies of files elsewhere, one on this machine for all its processes."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import stat
import tempfile
from collections.abc import Iterator

from trainer.data import manifest, paths, retry
from trainer.data.folder_lock import locked

_CHUNK_BYTES = 16 << 20
_SMALL_BYTES = 1 << 20


def of(path: str) -> str:
  """The local path of a copy of a file, which is made where there is none yet.

  It is taken for the same file while size, time and some of its bytes are the same.
  Another copy of the same path is removed; who has it mapped goes on with it.

  Raises:
    OSError: the file can't be read, or the copy can't be written.
  """
  name, state = _digest(path.encode()), _state(path)
  start = os.path.join(_folder(), name)
  copy = f"{start}-{state}"
  with locked(start + ".lock"):
    if not os.path.exists(copy):
      for old in glob.glob(glob.escape(start) + "-*"):
        os.remove(old)
      retry.patiently(path, lambda: _copy(path, copy + ".partial"))
      os.replace(copy + ".partial", copy)
  return copy


@contextlib.contextmanager
def temporary(path: str) -> Iterator[str]:
  """The local path of a copy of a file that is read once; it is removed in the end.

  Raises:
    OSError: the file can't be read, or the copy can't be written.
  """
  with tempfile.TemporaryDirectory(prefix="retrieval-trainer-") as folder:
    copy = os.path.join(folder, "copy")
    retry.patiently(path, lambda: _copy(path, copy))
    yield copy


def _state(path: str) -> str:
  """What tells a file from another of the same path."""
  status = paths.status(path)
  if status.num_bytes <= _SMALL_BYTES:  # One request, where a sample takes many.
    return _digest(paths.read_bytes(path))
  sample = retry.patiently(path, lambda: manifest.sample(path, status.num_bytes))
  return _digest(f"{status} {sample}".encode())


def _digest(content: bytes) -> str:
  return hashlib.blake2b(content, digest_size=8).hexdigest()


def _folder() -> str:
  """A folder of this user alone: others could put what they like into the copies."""
  folder = os.path.join(tempfile.gettempdir(), f"retrieval-trainer-{os.getuid()}")
  with contextlib.suppress(FileExistsError):
    os.mkdir(folder, 0o700)
  found = os.lstat(folder)
  is_own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
  if not is_own or found.st_mode & 0o022:
    raise PermissionError(13, "it is not of this user alone; set TMPDIR", folder)
  return folder


def _copy(path: str, target: str) -> None:
  with (
    paths.as_os_errors(path),
    paths.open_file(path, "rb") as source,
    open(target, "wb") as copy,
  ):
    while chunk := source.read(_CHUNK_BYTES):
      copy.write(chunk)
