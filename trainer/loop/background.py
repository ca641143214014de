"""One piece of work at a time beside the training."""

from __future__ import annotations

import threading
from typing import Callable, Optional


class Background:
  """Runs a function in a thread; a second one waits for the first to end."""

  def __init__(self):
    self._thread: Optional[threading.Thread] = None
    self._error: Optional[BaseException] = None

  def start(self, work: Callable[[], None]) -> None:
    """Waits for the work before, and begins this.

    Args:
      work: what is to be done.
    """
    self.wait()
    self._thread = threading.Thread(target=self._run, args=(work,), daemon=True)
    self._thread.start()

  def wait(self) -> None:
    """Waits until nothing is under way.

    Raises:
      BaseException: what the work raised.
    """
    if self._thread is not None:
      self._thread.join()
      self._thread = None
    error, self._error = self._error, None
    if error is not None:
      raise error

  def _run(self, work):
    try:
      work()
    except BaseException as error:
      self._error = error
