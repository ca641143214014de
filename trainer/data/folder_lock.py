"""Keeps two processes from writing into the same folder, or doing the same work.

Folders of data and results are kept by claims, on any file system. Work that is shared
out between processes, as by sweeps, is kept by locks of files (`flock`), which a child
process can inherit.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from typing import Optional, TextIO

from trainer.data import claim
from trainer.errors import UserError

_READ_ONLY = (errno.EROFS, errno.EACCES)


@contextlib.contextmanager
def alone_in(folder: str, doing: str) -> Iterator[None]:
  """Keeps other processes from writing into a folder, on any file system.

  A folder that this process can't write to is not claimed: whatever the block writes
  there fails by itself.

  Args:
    folder: it exists.
    doing: what this process does, as in "is ingesting into".

  Yields:
    Nothing.

  Raises:
    UserError: another process writes into it.
    OSError: the claim can't be written.
  """
  with contextlib.ExitStack() as claimed:
    try:
      claimed.enter_context(claim.claiming(folder, doing))
    except OSError as error:
      if error.errno not in _READ_ONLY:
        raise
    yield


@contextlib.contextmanager
def locked(path: str) -> Iterator[None]:
  """Waits for the lock of a file, and holds it inside the block.

  Args:
    path: of the file; is made if it is missing.

  Yields:
    Nothing.

  Raises:
    UserError: the file system has no locks.
    OSError: the file can't be made.
  """
  with open(path, "a", encoding="utf-8") as file:
    _flock(file, fcntl.LOCK_EX)
    try:
      yield
    finally:
      fcntl.flock(file, fcntl.LOCK_UN)


def try_lock(path: str) -> Optional[TextIO]:
  """Locks a file without waiting for whoever holds it.

  `is_locked`, in this process or another, never keeps the lock from it.

  Args:
    path: of the file; is made if it is missing.

  Returns:
    The open file, locked until it is closed, here and in each process that inherited
    it; None if another holds it.

  Raises:
    UserError: the file system has no locks.
    OSError: the file can't be made.
  """
  with locked(_gate(path)):
    return _try(path)


def is_locked(path: str) -> bool:
  """Returns whether somebody holds the lock of a file; false where there is no file.

  `flock` shows a lock only to who asks for it. So it is taken for a moment, behind a
  gate that `try_lock` waits for.

  Args:
    path: of the file.

  Raises:
    UserError: the file system has no locks.
  """
  if not os.path.exists(path):
    return False
  with locked(_gate(path)):
    file = _try(path)
    if file is None:
      return True
    # A process that is being started may have a copy: closing ours is not enough.
    fcntl.flock(file, fcntl.LOCK_UN)
    file.close()
    return False


def _gate(path: str) -> str:
  return f"{path}.gate"


def _try(path: str) -> Optional[TextIO]:
  file = open(path, "a", encoding="utf-8")  # noqa: SIM115  Open as long as locked.
  try:
    _flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    file.close()
    return None
  except BaseException:
    file.close()
    raise
  return file


def _flock(file: TextIO, operation: int) -> None:
  try:
    fcntl.flock(file, operation)
  except BlockingIOError:
    raise
  except OSError as error:
    raise UserError(
      f"{file.name} can't be locked ({error.strerror}): its file system has no locks "
      "(flock); choose a folder on one that has."
    ) from error
