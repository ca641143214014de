"""`log.txt`: what a run says, kept in its folder beside what the terminal shows."""

from __future__ import annotations

import logging as python_logging
import os

from absl import logging

FILE_NAME = "log.txt"


class _LogFile(python_logging.FileHandler):
  """Goes without what can't be written: the terminal has it."""

  def handleError(self, record):  # noqa: N802  The base class's name.
    del record


def keep_log(model_dir: str) -> None:
  """Appends every line that is logged from now on to the run's log.

  Args:
    model_dir: folder of the run, which exists.
  """
  path = os.path.join(model_dir, FILE_NAME)
  handler = _LogFile(path, encoding="utf-8")
  handler.setFormatter(logging.PythonFormatter())
  logging.get_absl_logger().addHandler(handler)
