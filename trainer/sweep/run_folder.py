"""The folder of one run of a sweep: how far it is, what came of it, who works on it."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from typing import Any, NamedTuple, Optional

from trainer.data import folder_lock, paths
from trainer.errors import FAILURE
from trainer.loop.metrics_file import MetricsFile
from trainer.retrieval.results import Results
from trainer.sweep.points import Point

POINT_FILE = "point.gin"
LOG_FILE = "log.txt"
_FAILURE_FILE = "failure.json"
_LOCK_FILE = "lock"


class Failure(NamedTuple):
  """Why a run ended without result.

  Attributes:
    exit_status: of the task; negative for a signal.
    message: its last line.
  """

  exit_status: int
  message: str


class RunFolder:
  """One point's folder; all sweeps that share the parent share it.

  Args:
    parent: folder of all runs.
    point: what is run there.
    mode: what is done there.
  """

  def __init__(self, parent: str, point: Point, mode: str):
    self.path = os.path.join(parent, point.run_id)
    self.log_path = os.path.join(self.path, LOG_FILE)
    self._point = point
    self._mode = mode

  def prepare(self) -> str:
    """Makes the folder, and writes the run file.

    Returns:
      Path of the run file.
    """
    os.makedirs(self.path, exist_ok=True)
    path = os.path.join(self.path, POINT_FILE)
    paths.replace_file(path, f"# {self._point}\n{self._point.config.text}")
    return path

  @property
  def is_finished(self) -> bool:
    """Whether the last step was made, and measured where the mode measures."""
    if self._mode == "train":
      return self.step == self._point.num_steps
    measured = Results(self.path).by_moment.get("latest", {}).get("step")
    ends_early = "train_and_evaluate.selection.patience" in self._point.config.values
    last = self.step if ends_early else self._point.num_steps
    return measured is not None and measured == last

  @property
  def step(self) -> int:
    """The last step logged; 0 before any."""
    last = self.last_row()
    return int(last["step"]) if last else 0

  def rows(self) -> list[dict[str, float]]:
    """The rows of `metrics.jsonl`."""
    return list(MetricsFile(self.path).rows())

  def last_row(self) -> Optional[dict[str, float]]:
    """The last row of `metrics.jsonl`; None before any."""
    rows = self.rows()
    return rows[-1] if rows else None

  def metric(self, name: str) -> Optional[float]:
    """The last value of a metric, measured or logged; None where there is none."""
    measured: dict[str, Any] = Results(self.path).by_moment.get("latest", {})
    value = measured.get(name, (self.last_row() or {}).get(name))
    return None if value is None else float(value)

  @property
  def failure(self) -> Optional[Failure]:
    """Why it failed; None if it did not."""
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
    """Remembers why it failed."""
    path = os.path.join(self.path, _FAILURE_FILE)
    paths.replace_file(path, json.dumps(failure._asdict()))

  def forget_failure(self) -> None:
    """Forgets a failure, since it is tried again."""
    with contextlib.suppress(FileNotFoundError):
      os.remove(os.path.join(self.path, _FAILURE_FILE))

  @contextlib.contextmanager
  def lock(self) -> Iterator[Optional[int]]:
    """Keeps other sweeps, on this machine or another that shares the disk, off the run.

    Yields:
      The lock's file, for the run's process to inherit: should the sweep be killed, the
      run that goes on still holds it. None if another holds it; `is_locked` never does.
    """
    os.makedirs(self.path, exist_ok=True)
    file = folder_lock.try_lock(os.path.join(self.path, _LOCK_FILE))
    if file is None:
      yield None
      return
    with file:
      yield file.fileno()

  @property
  def is_locked(self) -> bool:
    """Whether some sweep works on it now."""
    return folder_lock.is_locked(os.path.join(self.path, _LOCK_FILE))
