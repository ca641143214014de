"""`metrics.jsonl` and `eval/history.jsonl`: one JSON object a logged step.

Both can be read without this package.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping

from absl import logging

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
    os.makedirs(os.path.dirname(self._path), exist_ok=True)
    descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    size = os.fstat(descriptor).st_size
    content = "".join(self._waiting).encode()
    try:
      while content:
        content = content[os.write(descriptor, content) :]
      os.fsync(descriptor)
      self._waiting.clear()
    except OSError as error:
      os.ftruncate(descriptor, size)
      logging.warning("%s can't be written: %s.", self._path, error.strerror)
    finally:
      os.close(descriptor)

  def rows(self) -> Iterator[dict[str, float]]:
    """The rows; a last line that a killed process left torn is passed over."""
    if not os.path.exists(self._path):
      return
    with open(self._path, encoding="utf-8") as file:
      for line in file:
        if line.endswith("\n"):
          yield json.loads(line)

  def drop_after(self, step: int) -> None:
    """Keeps the rows up to that step, so that each step is there once.

    Args:
      step: the last step to keep.
    """
    kept = [row for row in self.rows() if row["step"] <= step]
    aside = self._path + ".new"
    os.makedirs(os.path.dirname(self._path), exist_ok=True)
    with open(aside, "w", encoding="utf-8") as file:
      file.writelines(json.dumps(row) + "\n" for row in kept)
      file.flush()
      os.fsync(file.fileno())
    os.replace(aside, self._path)
