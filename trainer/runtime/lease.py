"""Exclusive use of a folder by one process.

Who writes keeps a claim in the folder, a file of its own that says who it is, and
touches it while it goes on. Whoever comes puts down its own first and looks for others
then, so that of two that come in the same moment at least one sees the other. Of claims
that are not settled yet the one whose file's name comes first stays, and the others are
withdrawn: exactly one process gets the folder. No lock is asked of the file system:
those of networks grant them badly, or not at all.

A claim ends with its process: at once where this machine knows it to be gone, else when
it was not touched for a while, by the clock of the folder's own file system.

Folders of data and results are kept by claims, on any file system. Work that is shared
out between processes, as by sweeps, is kept by locks of files (`flock`), which a child
process can inherit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import functools
import itertools
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any, Optional, TextIO

from absl import logging

from trainer.errors import UserError
from trainer.runtime import filesystem

_PREFIX, _ENDING = ".in-use-", ".json"
_TOUCH_S = 5.0
# Who has not touched its claim for so long is gone, or stands still.
_SILENCE_S = 30.0
_LOOK_S = 0.2
_MAX_BYTES = 10_000


@dataclasses.dataclass(frozen=True)
class Lease:
  """Who writes into a folder.

  Attributes:
    host: its name.
    machine: within which a process's number means the same: a host since it was
      started, or a container of it.
    pid: number of the process.
    since: when it began.
    doing: what it does, such as "training in".
    num_touches: how often it was written again; only elsewhere, where a store may date
      its files or not.
    is_settled: whether its process has the folder, as no other claim was left.
  """

  host: str
  machine: str
  pid: int
  since: str
  doing: str
  num_touches: int = 0
  is_settled: bool = True


# The claims of this process, by path, with its number: a fork has none of them.
_held: dict[str, int] = {}


@contextlib.contextmanager
def holding_lease(folder: str, doing: str) -> Iterator[None]:
  """Keeps other processes from writing into a folder.

  A process that stood still for so long that another took the folder is ended once it
  goes on, with the exit status of a user's mistake.

  Args:
    folder: it exists.
    doing: what this process does, as in "is training in".

  Yields:
    Nothing.

  Raises:
    UserError: another process writes into it.
    OSError: the claim can't be written.
  """
  own = _OwnClaim(folder, doing)
  is_over = threading.Event()
  touching = threading.Thread(target=_touch, args=(own, is_over), daemon=True)
  _held[own.path] = os.getpid()
  try:
    own.write()
    began_ns = filesystem.status(own.path).modified_ns
    touching.start()
    for other in _others(own.path):
      _outlast(other, own.path, began_ns)
    own.write(is_settled=True)
    yield
  finally:
    is_over.set()
    if touching.is_alive():
      touching.join()
    with contextlib.suppress(OSError):
      filesystem.remove(own.path)
    _held.pop(own.path, None)


class _OwnClaim:
  """The claim of this process on a folder.

  Args:
    folder: it exists.
    doing: what this process does there.
  """

  def __init__(self, folder: str, doing: str):
    self.path = os.path.join(folder, f"{_PREFIX}{secrets.token_hex(8)}{_ENDING}")
    self._claim = Lease(
      socket.gethostname(), _machine(), os.getpid(), _now(), doing, is_settled=False
    )
    self._lock = threading.Lock()

  def write(self, **changes: Any) -> None:
    """Writes the claim with some of its attributes changed."""
    with self._lock:
      self._claim = dataclasses.replace(self._claim, **changes)
      _write(self.path, self._claim)


def _outlast(path: str, own_path: str, began_ns: int) -> None:
  """Waits until it is clear that another's claim has ended, and removes it.

  Args:
    path: of the other's claim.
    own_path: of our own, which is not settled yet.
    began_ns: when our own was written, by the clock that dates the other's.

  Raises:
    UserError: the other has the folder, or comes first.
  """
  start_s = time.monotonic()
  first: Optional[tuple[Lease, int]] = None
  while True:
    try:
      claim, touched_ns = _read(path), filesystem.status(path).modified_ns
    except FileNotFoundError:
      return
    first = first or (claim, touched_ns)
    silence_s = (began_ns - touched_ns) / 1e9 + time.monotonic() - start_s
    is_here = claim.machine == _machine()
    is_ended = is_here and not _is_running(path, claim.pid)
    if is_ended or silence_s > _SILENCE_S:
      logging.warning("%s is of a process that is gone: %s.", path, _named(claim))
      with contextlib.suppress(FileNotFoundError):
        filesystem.remove(path)
      return
    gives_way = not claim.is_settled and path > own_path
    if not gives_way and (is_here or (claim, touched_ns) != first):
      raise UserError(_in_use(path, claim))
    time.sleep(_LOOK_S)


def _touch(own: _OwnClaim, is_over: threading.Event) -> None:
  """The thread of a claim."""
  for number in itertools.count(1):
    if is_over.wait(_TOUCH_S):
      return
    try:
      is_there = filesystem.exists(own.path)
      if not is_there:
        _leave_to_others(own.path)
      if is_there and not filesystem.is_remote(own.path):
        os.utime(own.path)  # Also where the disk is full.
      else:
        own.write(num_touches=number)
    except OSError as error:
      logging.warning("%s can't be touched: %s.", own.path, error.strerror)


def _leave_to_others(path: str) -> None:
  """Ends this process if there is a claim of another, who has removed ours."""
  for other in _others(path):
    with contextlib.suppress(FileNotFoundError):
      owner = _in_use(other, _read(other))
      line = f"error: this process was suspended and its lease expired: {owner}\n"
      os.write(2, line.encode())
      os._exit(UserError.exit_status)


def _others(path: str) -> list[str]:
  """The paths of the claims beside ours."""
  folder, own_name = os.path.split(path)
  return [
    os.path.join(folder, name)
    for name in filesystem.list_folder(folder)
    if name.startswith(_PREFIX) and name.endswith(_ENDING) and name != own_name
  ]


def _read(path: str) -> Lease:
  """A claim; one of nobody known, where it can't be understood.

  Raises:
    FileNotFoundError: it is gone.
    OSError: it can't be read.
  """
  with contextlib.suppress(ValueError, TypeError):
    if filesystem.status(path).num_bytes <= _MAX_BYTES:
      content = json.loads(filesystem.read_bytes(path))
      return Lease(**{**content, "pid": int(content["pid"])})
  return Lease("an unknown host", "", 0, "an unknown time", "writing into")


def _write(path: str, own: Lease) -> None:
  content = json.dumps(dataclasses.asdict(own)).encode()
  # Stores show an object whole or not at all.
  write_fn = (
    filesystem.write_bytes if filesystem.is_remote(path) else filesystem.replace_file
  )
  write_fn(path, content)


def _named(claim: Lease) -> str:
  return f"process {claim.pid} of {claim.host}"


def _in_use(path: str, claim: Lease) -> str:
  return (
    f"{_named(claim)} is {claim.doing} {os.path.dirname(path)} since {claim.since}; "
    "wait for its end, or choose another folder."
  )


def _now() -> str:
  return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())


def _is_running(path: str, pid: int) -> bool:
  """Whether a process of this machine, or a thread of this one, has the claim."""
  if pid == os.getpid():
    return _held.get(path) == pid
  try:
    os.kill(pid, 0)
  except (ProcessLookupError, OverflowError):
    return False
  except PermissionError:
    pass
  return True


@functools.cache
def _machine() -> str:
  facts = [socket.gethostname()]
  with contextlib.suppress(OSError):  # Linux alone tells them.
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
      facts.append(file.read().strip())
    facts.append(os.readlink("/proc/self/ns/pid"))
  return " ".join(facts)


_READ_ONLY = (errno.EROFS, errno.EACCES)


@contextlib.contextmanager
def locked_folder(folder: str, doing: str) -> Iterator[None]:
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
      claimed.enter_context(holding_lease(folder, doing))
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
