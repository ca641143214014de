"""`metrics.jsonl` and `eval/history.jsonl`: one JSON object a logged step.

Both can be read without this package.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping

from absl import logging

from trainer.data import paths
from trainer.errors import UnwritableError, UserError, reason_of

FILE_NAME = "metrics.jsonl"
EVALUATIONS_NAME = os.path.join("eval", "history.jsonl")


class MetricsFile:
  """Appends rows; after a resume, drops those that will be written again.

  A row that finds no room on the disk is kept, and written before the next one.

  Args:
    model_dir: folder of the run.
    name: of the file in it.
  """

  def __init__(self, model_dir: str, name: str = FILE_NAME):
    self._path = os.path.join(model_dir, name)
    self._waiting: list[str] = []

  def append(self, step: int, metrics: Mapping[str, float]) -> None:
    """Writes one row, whole, and on the disk itself, or keeps it.

    Args:
      step: number of steps done.
      metrics: by metric name.
    """
    row = {"step": step, "time": round(time.time(), 3), **metrics}
    self._waiting.append(json.dumps(row) + "\n")
    try:
      self.write_waiting()
    except UnwritableError as error:
      logging.warning("%s.", error)

  def write_waiting(self) -> None:
    """Writes the rows that are kept.

    Raises:
      UnwritableError: they can't be written, and stay kept.
    """
    if not self._waiting:
      return
    try:
      os.makedirs(os.path.dirname(self._path), exist_ok=True)
      _append(self._path, "".join(self._waiting).encode())
    except OSError as error:
      raise UnwritableError(
        f"{self._path} can't be written: {reason_of(error)}"
      ) from error
    self._waiting.clear()

  def rows(self) -> Iterator[dict[str, float]]:
    """Returns the rows; skips a last line that a killed process left torn.

    Raises:
      UserError: another line is damaged.
    """
    if not os.path.exists(self._path):
      return
    with open(self._path, encoding="utf-8") as file:
      for number, line in enumerate(file, 1):
        if line.endswith("\n"):
          yield _row(self._path, number, line)

  def drop_after(self, step: int) -> None:
    """Keeps the rows up to that step, so that each step is there once.

    Args:
      step: the last step to keep.

    Raises:
      UnwritableError: the file can't be written; it is as it was.
      UserError: a line is damaged.
    """
    kept = [row for row in self.rows() if row["step"] <= step]
    try:
      os.makedirs(os.path.dirname(self._path), exist_ok=True)
      paths.replace_file(self._path, "".join(json.dumps(row) + "\n" for row in kept))
    except OSError as error:
      raise UnwritableError(
        f"{self._path} can't be written: {reason_of(error)}"
      ) from error


def _append(path: str, content: bytes) -> None:
  """Adds content at the end of a file, and on the disk itself, whole or not at all."""
  descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
  try:
    size = os.fstat(descriptor).st_size
    try:
      while content:
        content = content[os.write(descriptor, content) :]
      os.fsync(descriptor)
    except OSError:
      os.ftruncate(descriptor, size)
      raise
  finally:
    os.close(descriptor)


def _row(path: str, number: int, line: str) -> dict[str, float]:
  try:
    row = json.loads(line)
    if isinstance(row, dict) and isinstance(row["step"], int):
      return row
  except (ValueError, KeyError, RecursionError):
    pass
  raise UserError(
    f"line {number} of {path} is damaged: it is no JSON object with a step; remove it."
  )
