"""Folder and process of one run of a sweep."""

from __future__ import annotations

import contextlib
import enum
import json
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Optional

from trainer.errors import DONE, FAILURE, PreemptedError, StalledError
from trainer.retrieval.results import Results
from trainer.runtime import filesystem, lease
from trainer.sweep.points import Point
from trainer.training.callbacks import MetricsFile

POINT_FILE = "point.gin"
LOG_FILE = "log.txt"
_FAILURE_FILE = "failure.json"
_LOCK_FILE = "lock"

_POLL_S = 0.2
_GRACE_S = 60.0  # Time to save a checkpoint.
_AGAIN = (PreemptedError.exit_status, StalledError.exit_status)
_MAX_RESTARTS = 5


class Failure(NamedTuple):
  """Why a run ended without a result.

  Attributes:
    exit_status: of the task; negative for a signal.
    message: its last line.
  """

  exit_status: int
  message: str


class RunFolder:
  """Folder of one point, shared by all sweeps with the same parent folder.

  Args:
    parent: folder of all runs.
    point: point of the run.
    mode: mode of the task.
  """

  def __init__(self, parent: str, point: Point, mode: str):
    self.path = os.path.join(parent, point.run_id)
    self.log_path = os.path.join(self.path, LOG_FILE)
    self._point = point
    self._mode = mode

  def prepare(self) -> str:
    """Creates the folder, and writes the run file.

    Returns:
      Path of the run file.
    """
    os.makedirs(self.path, exist_ok=True)
    path = os.path.join(self.path, POINT_FILE)
    filesystem.replace_file(path, f"# {self._point}\n{self._point.config.text}")
    return path

  @property
  def is_finished(self) -> bool:
    """Returns whether the last step is done, and evaluated if the mode evaluates."""
    if self._mode == "train":
      return self.step == self._point.num_steps
    measured = Results(self.path).by_moment.get("latest", {}).get("step")
    ends_early = (
      "train_and_evaluate.early_stopping.patience" in self._point.config.values
    )
    last = self.step if ends_early else self._point.num_steps
    return measured is not None and measured == last

  @property
  def step(self) -> int:
    """Returns the last step logged; 0 before any."""
    return int(self.last_row().get("step", 0))

  def last_row(self) -> dict[str, float]:
    """Returns the last row of `metrics.jsonl`; empty before any."""
    return [{}, *MetricsFile(self.path).rows()][-1]

  def metric(self, name: str) -> Optional[float]:
    """Returns the last value of a metric, evaluated or logged; None without any."""
    measured: dict[str, Any] = Results(self.path).by_moment.get("latest", {})
    value = measured.get(name, self.last_row().get(name))
    return None if value is None else float(value)

  @property
  def failure(self) -> Optional[Failure]:
    """Returns why the run failed; None if it did not."""
    path = os.path.join(self.path, _FAILURE_FILE)
    try:
      with open(path, encoding="utf-8") as file:
        content = json.load(file)
      return Failure(int(content["exit_status"]), str(content["message"]))
    except FileNotFoundError:
      return None
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
      return Failure(FAILURE, f"{path} is damaged")

  def mark_failed(self, failure: Failure) -> None:
    """Records why the run failed."""
    path = os.path.join(self.path, _FAILURE_FILE)
    filesystem.replace_file(path, json.dumps(failure._asdict()))

  def forget_failure(self) -> None:
    """Removes the record of a failure, before a retry."""
    with contextlib.suppress(FileNotFoundError):
      os.remove(os.path.join(self.path, _FAILURE_FILE))

  @contextlib.contextmanager
  def lock(self) -> Iterator[Optional[int]]:
    """Keeps other sweeps away from the run, on all machines that share the disk.

    Yields:
      The lock's file, inherited by the run's process: if the sweep is killed, the
      running process still holds the lock. None if another process holds it, which
      `is_locked` never does.
    """
    os.makedirs(self.path, exist_ok=True)
    file = lease.try_lock(os.path.join(self.path, _LOCK_FILE))
    if file is None:
      yield None
      return
    with file:
      yield file.fileno()

  @property
  def is_locked(self) -> bool:
    """Returns whether a sweep currently works on the run."""
    return lease.is_locked(os.path.join(self.path, _LOCK_FILE))


class Ending(enum.Enum):
  """How a process ended."""

  DONE = "done"
  FAILED = "failed"
  STOPPED = "stopped"
  PRUNED = "pruned"
  BUSY = "busy"  # Another sweep is running it.


def run_process(
  command: Sequence[str],
  *,
  environment: Mapping[str, str],
  log_path: str,
  inherited: Sequence[int],
  stop: threading.Event,
  is_hopeless: Callable[[], bool],
) -> tuple[Ending, int]:
  """Runs a command to its end, and restarts it on certain exit statuses.

  Args:
    command: program and arguments.
    environment: of the process.
    log_path: its output is appended there.
    inherited: files that it keeps open.
    stop: set to end it early.
    is_hopeless: polled; ends the process early when it returns true.

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
        start_new_session=True,  # Ctrl-C reaches only the sweep, which passes it on.
      )
    ending = _watch(process, stop, is_hopeless)
    if ending is not None:
      return ending, process.returncode
    if process.returncode not in _AGAIN:
      break
  is_done = process.returncode == DONE
  return (Ending.DONE if is_done else Ending.FAILED), process.returncode


def failure_of(exit_status: int, log_path: str) -> Failure:
  """Returns the failure given by a run's exit status and the last line of its log."""
  if exit_status < 0:
    return Failure(exit_status, f"killed by {signal.Signals(-exit_status).name}")
  with open(log_path, encoding="utf-8", errors="replace") as file:
    lines = [line.strip() for line in file if line.strip()]
  return Failure(exit_status, lines[-1] if lines else "no output")


def _watch(
  process: subprocess.Popen, stop: threading.Event, is_hopeless: Callable[[], bool]
) -> Optional[Ending]:
  """Waits; returns how the process was ended early, or None if it ended by itself."""
  while True:
    with contextlib.suppress(subprocess.TimeoutExpired):
      process.wait(_POLL_S)
      return None
    if stop.is_set() or is_hopeless():
      _end(process)
      return Ending.STOPPED if stop.is_set() else Ending.PRUNED


def _end(process: subprocess.Popen) -> None:
  """Asks the process and its children to end, and kills them after a while."""
  for number, patience_s in ((signal.SIGTERM, _GRACE_S), (signal.SIGKILL, None)):
    with contextlib.suppress(ProcessLookupError):
      os.killpg(process.pid, number)
    with contextlib.suppress(subprocess.TimeoutExpired):
      process.wait(patience_s)
      return
