"""One call of the task as a process of its own, watched until it ends."""

from __future__ import annotations

import contextlib
import enum
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Optional

from trainer.errors import DONE, PreemptedError, StalledError
from trainer.sweep.run_folder import Failure

_POLL_S = 0.2
_GRACE_S = 60.0  # To save a checkpoint in.
_AGAIN = (PreemptedError.exit_status, StalledError.exit_status)
_MAX_RESTARTS = 5


class Ending(enum.Enum):
  """How a process ended."""

  DONE = "done"
  FAILED = "failed"
  STOPPED = "stopped"
  PRUNED = "pruned"
  BUSY = "busy"  # Another sweep runs it.


def run(
  command: Sequence[str],
  *,
  environment: Mapping[str, str],
  log_path: str,
  inherited: Sequence[int],
  stop: threading.Event,
  is_hopeless: Callable[[], bool],
) -> tuple[Ending, int]:
  """Runs a command to its end, again where its exit status asks for that.

  Args:
    command: program and arguments.
    environment: of the process.
    log_path: its output is appended there.
    inherited: files that it keeps open.
    stop: set to end it early.
    is_hopeless: asked all the time; true ends it early.

  Returns:
    How it ended, and its exit status; negative for a signal.
  """
  for _ in range(_MAX_RESTARTS + 1):
    with open(log_path, "ab") as log:
      process = subprocess.Popen(
        command,
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        pass_fds=inherited,
        start_new_session=True,  # Ctrl-C reaches the sweep alone, which passes it on.
      )
    ending = _watch(process, stop, is_hopeless)
    if ending is not None:
      return ending, process.returncode
    if process.returncode not in _AGAIN:
      break
  is_done = process.returncode == DONE
  return (Ending.DONE if is_done else Ending.FAILED), process.returncode


def failure_of(exit_status: int, log_path: str) -> Failure:
  """The failure that a run's exit status and the last line of its log tell."""
  if exit_status < 0:
    return Failure(exit_status, f"killed by {signal.Signals(-exit_status).name}")
  with open(log_path, encoding="utf-8", errors="replace") as file:
    lines = [line.strip() for line in file if line.strip()]
  return Failure(exit_status, lines[-1] if lines else "no word of why")


def _watch(
  process: subprocess.Popen, stop: threading.Event, is_hopeless: Callable[[], bool]
) -> Optional[Ending]:
  """Waits; how the process was ended early, or None if it ended by itself."""
  while True:
    with contextlib.suppress(subprocess.TimeoutExpired):
      process.wait(_POLL_S)
      return None
    if stop.is_set() or is_hopeless():
      _end(process)
      return Ending.STOPPED if stop.is_set() else Ending.PRUNED


def _end(process: subprocess.Popen) -> None:
  """Asks the process and its children to end, and insists after a while."""
  for number, patience_s in ((signal.SIGTERM, _GRACE_S), (signal.SIGKILL, None)):
    with contextlib.suppress(ProcessLookupError):
      os.killpg(process.pid, number)
    with contextlib.suppress(subprocess.TimeoutExpired):
      process.wait(patience_s)
      return
