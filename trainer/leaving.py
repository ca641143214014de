"""Letting go of what takes long to end; ending the process without a wait for it."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
from typing import Any, NoReturn

_NAME = "let_go"


def let_go(held: list[Any]) -> None:
  """Empties a list in another thread.

  Args:
    held: what is in it is held by nobody else.
  """
  # No daemon: one that ends after the interpreter aborts the process.
  with contextlib.suppress(RuntimeError):  # The interpreter ends already.
    threading.Thread(target=held.clear, name=_NAME).start()


def leave(status: int) -> NoReturn:
  """Ends the process with a status.

  After S3 was used, tensorflow-io aborts the process while Python tears it down, so
  that a run that succeeded would end with status 134; and Python waits for threads. So
  where there is either, it is not torn down.

  Args:
    status: of the process.
  """
  is_letting_go = any(thread.name == _NAME for thread in threading.enumerate())
  if is_letting_go or "tensorflow_io" in sys.modules:
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
  sys.exit(status)
