"""Tells a second writer of a folder elsewhere, where nothing can be locked.

A note in the folder says who writes into it, and is written again while that goes on.
It detects a second writer and excludes none: two that begin in the same moment may both
see only their own.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any, Optional

from absl import logging

from trainer.data import paths
from trainer.errors import UserError

_FILE_NAME = ".ingest-lock.json"
_REFRESH_S = 30.0
# A writer that has written its note so long ago is gone.
_STALE_S = 300.0


@contextlib.contextmanager
def noted_in(folder: str) -> Iterator[None]:
  """Keeps a note in a folder elsewhere that this process writes into it.

  Raises:
    UserError: another writes into it.
    OSError: the note can't be written.
  """
  path = os.path.join(folder, _FILE_NAME)
  _check_free(path, None)
  token = secrets.token_hex(8)
  _write(path, token)
  _check_free(path, token)
  is_over = threading.Event()
  refresher = threading.Thread(
    target=_refresh, args=(path, token, is_over), name="lock", daemon=True
  )
  refresher.start()
  try:
    yield
  finally:
    is_over.set()
    refresher.join()
    with contextlib.suppress(OSError):
      paths.remove(path)


def _check_free(path: str, token: Optional[str]) -> None:
  """Makes sure that a note is not there, or is this writer's, or of one that is gone.

  Raises:
    UserError: it is another's.
  """
  note = _read(path)
  if note is None or note.get("token") == token:
    return
  host, pid = str(note.get("host")), note.get("pid")
  age_s = time.time() - float(note.get("time", 0))
  if age_s > _STALE_S or (host == socket.gethostname() and not _is_running(pid)):
    logging.warning("%s is of a process that is gone (%s of %s).", path, pid, host)
    return
  raise UserError(
    f"Another process is ingesting into {os.path.dirname(path)} ({pid} on {host}, "
    f"seen {max(0, age_s):.0f} s ago); wait for it, or delete {path} if it is gone."
  )


def _is_running(pid: Any) -> bool:
  try:
    os.kill(int(pid), 0)
  except (ProcessLookupError, OverflowError, TypeError, ValueError):
    return False
  except PermissionError:
    pass
  return True


def _read(path: str) -> Optional[dict[str, Any]]:
  """A note; None where there is none, or none that says anything."""
  try:
    note = json.loads(paths.read_bytes(path))
    float(note.get("time", 0))
    return note
  except (FileNotFoundError, ValueError, TypeError, AttributeError):
    return None


def _write(path: str, token: str) -> None:
  note = {
    "token": token,
    "host": socket.gethostname(),
    "pid": os.getpid(),
    "time": time.time(),
  }
  paths.write_bytes(path, json.dumps(note).encode())


def _refresh(path: str, token: str, is_over: threading.Event) -> None:
  while not is_over.wait(_REFRESH_S):
    try:
      _write(path, token)
    except OSError as error:
      logging.warning("%s can't be written: %s.", path, error.strerror)
