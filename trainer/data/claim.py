"""Keeps two processes from writing into one folder, whatever file system it is on.

Who writes keeps a claim in the folder, a file of its own that says who it is, and
touches it while it goes on. Whoever comes puts down its own first and looks for others
then, so that of two that come in the same moment at least one sees the other, and gives
way. No lock is asked of the file system: those of networks grant them badly, or not at
all.

A claim ends with its process: at once where this machine knows it to be gone, else when
it was not touched for a while, by the clock of the folder's own file system.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from typing import Optional

from absl import logging

from trainer.data import paths
from trainer.errors import UserError

_PREFIX, _ENDING = ".in-use-", ".json"
_TOUCH_S = 5.0
# Who has not touched its claim for so long is gone, or stands still.
_SILENCE_S = 30.0
_LOOK_S = 0.2
_MAX_BYTES = 10_000


@dataclasses.dataclass(frozen=True)
class Claim:
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
  """

  host: str
  machine: str
  pid: int
  since: str
  doing: str
  num_touches: int = 0


@contextlib.contextmanager
def claiming(folder: str, doing: str) -> Iterator[None]:
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
  own = Claim(socket.gethostname(), _machine(), os.getpid(), _now(), doing)
  path = os.path.join(folder, f"{_PREFIX}{secrets.token_hex(8)}{_ENDING}")
  is_over = threading.Event()
  touching = threading.Thread(target=_touch, args=(path, own, is_over), daemon=True)
  try:
    _write(path, own)
    began_ns = paths.status(path).modified_ns
    touching.start()
    for other in _others(path):
      _outlast(other, began_ns)
    yield
  finally:
    is_over.set()
    if touching.is_alive():
      touching.join()
    with contextlib.suppress(OSError):
      paths.remove(path)


def _outlast(path: str, began_ns: int) -> None:
  """Waits until it is clear that another's claim has ended, and removes it.

  Args:
    path: of the other's claim.
    began_ns: when our own was written, by the clock that dates the other's.

  Raises:
    UserError: the other goes on.
  """
  start_s = time.monotonic()
  first: Optional[tuple[Claim, int]] = None
  while True:
    try:
      claim, touched_ns = _read(path), paths.status(path).modified_ns
    except FileNotFoundError:
      return
    first = first or (claim, touched_ns)
    silence_s = (began_ns - touched_ns) / 1e9 + time.monotonic() - start_s
    is_here = claim.machine == _machine()
    if (is_here and not _is_another_running(claim.pid)) or silence_s > _SILENCE_S:
      logging.warning("%s is of a process that is gone: %s.", path, _named(claim))
      with contextlib.suppress(FileNotFoundError):
        paths.remove(path)
      return
    if is_here or (claim, touched_ns) != first:
      raise UserError(_in_use(path, claim))
    time.sleep(_LOOK_S)


def _touch(path: str, own: Claim, is_over: threading.Event) -> None:
  """The thread of a claim."""
  for number in itertools.count(1):
    if is_over.wait(_TOUCH_S):
      return
    try:
      is_there = paths.exists(path)
      if not is_there:
        _leave_to_others(path)
      if is_there and not paths.is_remote(path):
        os.utime(path)  # Also where the disk is full.
      else:
        _write(path, dataclasses.replace(own, num_touches=number))
    except OSError as error:
      logging.warning("%s can't be touched: %s.", path, error.strerror)


def _leave_to_others(path: str) -> None:
  """Ends this process if there is a claim of another, who has removed ours."""
  for other in _others(path):
    with contextlib.suppress(FileNotFoundError):
      line = f"error: this process stood still, and {_in_use(other, _read(other))}\n"
      os.write(2, line.encode())
      os._exit(UserError.exit_status)


def _others(path: str) -> list[str]:
  """The paths of the claims beside ours."""
  folder, own_name = os.path.split(path)
  return [
    os.path.join(folder, name)
    for name in paths.list_folder(folder)
    if name.startswith(_PREFIX) and name.endswith(_ENDING) and name != own_name
  ]


def _read(path: str) -> Claim:
  """A claim; one of nobody known, where it can't be understood.

  Raises:
    FileNotFoundError: it is gone.
    OSError: it can't be read.
  """
  with contextlib.suppress(ValueError, TypeError):
    if paths.status(path).num_bytes <= _MAX_BYTES:
      content = json.loads(paths.read_bytes(path))
      return Claim(**{**content, "pid": int(content["pid"])})
  return Claim("an unknown host", "", 0, "an unknown time", "writing into")


def _write(path: str, own: Claim) -> None:
  paths.write_bytes(path, json.dumps(dataclasses.asdict(own)).encode())


def _named(claim: Claim) -> str:
  return f"process {claim.pid} of {claim.host}"


def _in_use(path: str, claim: Claim) -> str:
  return (
    f"{_named(claim)} is {claim.doing} {os.path.dirname(path)} since {claim.since}; "
    "wait for its end, or choose another folder."
  )


def _now() -> str:
  return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())


def _is_another_running(pid: int) -> bool:
  """Whether there is such a process of this machine, other than this one."""
  if pid == os.getpid():
    return False
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
