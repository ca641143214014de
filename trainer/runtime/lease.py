"""Exclusive use of a folder or a file by one process.

A process that writes into a folder holds a lease: a file of its own in the folder that
identifies the process and is touched regularly. A new process first writes its own
lease and then looks for others. Of two that start at the same moment, at least one
therefore sees the other. Of leases that are not settled yet, the one with the first
file name stays and the others are withdrawn. Exactly one process gets the folder. No
file-system locks are used, because network file systems implement them unreliably or
not at all.

A lease ends with its process. It ends at once if this machine can tell that the process
is gone. Otherwise it expires when it was not touched for a while, by the clock of the
folder's file system.

Leases protect folders of data and results, on any file system. Work that is divided
between processes, as in sweeps, uses file locks (`flock`), which a child process can
inherit.
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
# A lease that was not touched for this long has expired.
_EXPIRY_S = 30.0
_POLL_S = 0.2
_MAX_BYTES = 10_000

_READ_ONLY = (errno.EROFS, errno.EACCES)


@dataclasses.dataclass(frozen=True)
class Lease:
  """The content of a lease: which process writes into a folder.

  Attributes:
    host: name of the host.
    machine: scope in which process ids are unique: a host since its boot, or a
      container on it.
    pid: process id.
    since: start time of the process's work.
    doing: the activity, such as "training in".
    num_touches: number of rewrites; only for remote folders, where a store may not
      date its files.
    is_settled: whether the process has the folder, because no other lease was left.
  """

  host: str
  machine: str
  pid: int
  since: str
  doing: str
  num_touches: int = 0
  is_settled: bool = True


# Leases of this process: path to process id, so that a forked child holds none of them.
_held: dict[str, int] = {}


@contextlib.contextmanager
def holding_lease(folder: str, doing: str) -> Iterator[None]:
  """Keeps other processes from writing into a folder.

  A process that was suspended for so long that another process took the folder is ended
  when it resumes, with the exit status of a user error.

  Args:
    folder: an existing folder.
    doing: what this process does, as in "is training in".

  Raises:
    UserError: another process writes into it.
    OSError: the lease can't be written.
  """
  own = _OwnLease(folder, doing)
  is_over = threading.Event()
  touching = threading.Thread(target=_touch, args=(own, is_over), daemon=True)
  _held[own.path] = os.getpid()
  try:
    own.write()
    began_ns = filesystem.status(own.path).modified_ns
    touching.start()
    for other in _others(own.path):
      _wait_for_expiry(other, own.path, began_ns)
    own.write(is_settled=True)
    yield
  finally:
    is_over.set()
    if touching.is_alive():
      touching.join()
    with contextlib.suppress(OSError):
      filesystem.remove(own.path)
    _held.pop(own.path, None)


class _OwnLease:
  """The lease of this process on a folder.

  Args:
    folder: an existing folder.
    doing: what this process does there.
  """

  def __init__(self, folder: str, doing: str):
    self.path = os.path.join(folder, f"{_PREFIX}{secrets.token_hex(8)}{_ENDING}")
    now = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    self._lease = Lease(
      socket.gethostname(), _machine(), os.getpid(), now, doing, is_settled=False
    )
    self._lock = threading.Lock()

  def write(self, **changes: Any) -> None:
    """Writes the lease with some of its attributes changed."""
    with self._lock:
      self._lease = dataclasses.replace(self._lease, **changes)
      _write(self.path, self._lease)


def _wait_for_expiry(path: str, own_path: str, began_ns: int) -> None:
  """Waits until another process's lease has clearly ended, and removes it.

  Args:
    path: path of the other lease.
    own_path: path of our own lease, which is not settled yet.
    began_ns: when our own lease was written, by the same file system's clock.

  Raises:
    UserError: the other process has the folder, or takes precedence.
  """
  start_s = time.monotonic()
  first: Optional[tuple[Lease, int]] = None
  while True:
    try:
      lease, touched_ns = _read(path), filesystem.status(path).modified_ns
    except FileNotFoundError:
      return
    first = first or (lease, touched_ns)
    silence_s = (began_ns - touched_ns) / 1e9 + time.monotonic() - start_s
    is_here = lease.machine == _machine()
    is_ended = is_here and not _is_running(path, lease.pid)
    if is_ended or silence_s > _EXPIRY_S:
      logging.warning(
        "Removing the lease %s of an ended process: %s.", path, _describe(lease)
      )
      with contextlib.suppress(FileNotFoundError):
        filesystem.remove(path)
      return
    must_yield = not lease.is_settled and path > own_path
    if not must_yield and (is_here or (lease, touched_ns) != first):
      raise UserError(_in_use(path, lease))
    time.sleep(_POLL_S)


def _touch(own: _OwnLease, is_over: threading.Event) -> None:
  """Touches a lease regularly, in a thread."""
  for number in itertools.count(1):
    if is_over.wait(_TOUCH_S):
      return
    try:
      is_there = filesystem.exists(own.path)
      if not is_there:
        _exit_if_replaced(own.path)
      if is_there and not filesystem.is_remote(own.path):
        os.utime(own.path)  # Works even if the disk is full.
      else:
        own.write(num_touches=number)
    except OSError as error:
      logging.warning("%s can't be touched: %s.", own.path, error.strerror)


def _exit_if_replaced(path: str) -> None:
  """Ends this process if another process has removed our lease and holds one."""
  for other in _others(path):
    with contextlib.suppress(FileNotFoundError):
      owner = _in_use(other, _read(other))
      line = f"error: this process was suspended and its lease expired: {owner}\n"
      os.write(2, line.encode())
      os._exit(UserError.exit_status)


def _others(path: str) -> list[str]:
  """Returns the paths of all leases except ours."""
  folder, own_name = os.path.split(path)
  return [
    os.path.join(folder, name)
    for name in filesystem.list_folder(folder)
    if name.startswith(_PREFIX) and name.endswith(_ENDING) and name != own_name
  ]


def _read(path: str) -> Lease:
  """Reads a lease; an unreadable one is attributed to an unknown process.

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
  # Stores replace an object atomically.
  write_fn = (
    filesystem.write_bytes if filesystem.is_remote(path) else filesystem.replace_file
  )
  write_fn(path, content)


def _describe(lease: Lease) -> str:
  return f"process {lease.pid} of {lease.host}"


def _in_use(path: str, lease: Lease) -> str:
  return (
    f"{_describe(lease)} is {lease.doing} {os.path.dirname(path)} since {lease.since}; "
    "wait until it ends, or choose another folder."
  )


def _is_running(path: str, pid: int) -> bool:
  """Returns whether a process of this machine, or a thread here, has the lease."""
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
  parts = [socket.gethostname()]
  with contextlib.suppress(OSError):  # Only Linux has these files.
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
      parts.append(file.read().strip())
    parts.append(os.readlink("/proc/self/ns/pid"))
  return " ".join(parts)


@contextlib.contextmanager
def locked_folder(folder: str, doing: str) -> Iterator[None]:
  """Keeps other processes from writing into a folder, on any file system.

  A folder that this process can't write to gets no lease: any write in the block fails
  by itself.

  Args:
    folder: an existing folder.
    doing: what this process does, as in "is ingesting into".

  Raises:
    UserError: another process writes into it.
    OSError: the lease can't be written.
  """
  with contextlib.ExitStack() as stack:
    try:
      stack.enter_context(holding_lease(folder, doing))
    except OSError as error:
      if error.errno not in _READ_ONLY:
        raise
    yield


@contextlib.contextmanager
def locked(path: str) -> Iterator[None]:
  """Waits for the lock of a file, and holds it inside the block.

  Args:
    path: path of the file; created if missing.

  Raises:
    UserError: the file system has no locks.
    OSError: the file can't be created.
  """
  with open(path, "a", encoding="utf-8") as file:
    _flock(file, fcntl.LOCK_EX)
    try:
      yield
    finally:
      fcntl.flock(file, fcntl.LOCK_UN)


def try_lock(path: str) -> Optional[TextIO]:
  """Locks a file without waiting for a process that holds the lock.

  A concurrent `is_locked`, in this process or another, never makes this call fail.

  Args:
    path: path of the file; created if missing.

  Returns:
    The open file, locked until it is closed here and in each process that inherited
    it; None if another process holds the lock.

  Raises:
    UserError: the file system has no locks.
    OSError: the file can't be created.
  """
  with locked(_gate(path)):
    return _try(path)


def is_locked(path: str) -> bool:
  """Returns whether a process holds the lock of a file; false if there is no file.

  `flock` can only be tested by taking the lock. It is therefore taken for a moment,
  guarded by a second lock that `try_lock` waits for.

  Args:
    path: path of the file.

  Raises:
    UserError: the file system has no locks.
  """
  if not os.path.exists(path):
    return False
  with locked(_gate(path)):
    file = _try(path)
    if file is None:
      return True
    # A process being started may have inherited the file: closing it is not enough.
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
      f"{file.name} can't be locked ({error.strerror}): its file system does not "
      "support flock; choose a folder on a file system that does."
    ) from error
