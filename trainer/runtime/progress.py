"""Progress of long work: a bar on a terminal, or periodic lines in a log."""

from __future__ import annotations

import sys
import time
from typing import Optional

from absl import logging

_TERMINAL_INTERVAL_S, _LOG_INTERVAL_S = 0.2, 10.0
_BAR_WIDTH = 30


class Progress:
  """A progress display for long work.

  Args:
    title: name of the work.
    unit: what is counted, in the plural.
    total: total count; None if unknown.
    done: count that was already done before.
  """

  def __init__(
    self, title: str, unit: str, total: Optional[int] = None, *, done: int = 0
  ):
    self._title = title
    self._unit = unit
    self._total = total
    self._done = self._done_before = done
    self._start_s = self._shown_s = time.monotonic()
    self._is_terminal = sys.stderr.isatty()

  def advance(self, count: int) -> None:
    """Adds to the count, and updates the display at most once per interval."""
    self._done += count
    interval_s = _TERMINAL_INTERVAL_S if self._is_terminal else _LOG_INTERVAL_S
    if time.monotonic() - self._shown_s >= interval_s:
      self._shown_s = time.monotonic()
      self._show()

  def finish(self) -> None:
    """Clears the bar."""
    if self._is_terminal:
      sys.stderr.write("\r\x1b[K")
      sys.stderr.flush()

  def line(self) -> str:
    """Returns title, bar, count, speed and time left."""
    num_new = self._done - self._done_before
    per_second = num_new / max(time.monotonic() - self._start_s, 1e-9)
    speed = f"{per_second:,.0f} {self._unit}/s"
    if not self._total:
      return f"{self._title}  {self._done:,} {self._unit}  {speed}"
    filled = min(_BAR_WIDTH, _BAR_WIDTH * self._done // self._total)
    bar = "#" * filled + "." * (_BAR_WIDTH - filled)
    left_s = max(0, self._total - self._done) / max(per_second, 1e-9)
    return (
      f"{self._title}  [{bar}] {self._done:,}/{self._total:,} {self._unit}  "
      f"{speed}  {left_s:.0f} s left"
    )

  def _show(self) -> None:
    if self._is_terminal:
      sys.stderr.write(f"\r\x1b[K{self.line()}")
      sys.stderr.flush()
    else:
      logging.info("%s", self.line())
