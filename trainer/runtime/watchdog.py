"""A watchdog thread that ends a process without progress.

A peer that was stopped, or an input that hangs, keeps TensorFlow waiting for ever. What
counts as moving is told by `heartbeat`: steps, batches of an evaluation, work between.
"""

from __future__ import annotations

import collections
import contextlib
import faulthandler
import itertools
import os
import statistics
import threading
import time
from collections.abc import Iterator
from typing import Callable, NoReturn, Optional

from trainer.errors import StalledError

STALL_FILE = "stalled-worker-{}.txt"
_LEAST_S = 60.0
_TIMES_MEDIAN = 20.0
_NUM_MEASURED = 101
_SHARE_OF_DEADLINE = 20
_JOIN_S = 5.0  # A device that hangs may hold the thread that reads it.

_beats = itertools.count(1)
_last = 0


def beat() -> None:
  """Says that something was done."""
  global _last
  _last = next(_beats)


def num_beats() -> int:
  """How often something was done."""
  return _last


class Watchdog:
  """Watches a block that should move.

  Args:
    path: file that gets the stack of every thread when the process is ended.
    start_deadline_s: seconds without progress, until the first steps are done and
      outside of training.
    step_deadline_s: seconds a step may take; None for 20 times the median step that was
      measured, and at least a minute.
  """

  def __init__(
    self, path: str, *, start_deadline_s: float, step_deadline_s: Optional[float]
  ):
    self._start_s = start_deadline_s
    self._step_s = step_deadline_s
    self._path = path
    self._pulse_fn: Callable[[], int] = lambda: 0
    self._pulse = 0
    self._num_calls = 0
    self._is_acting = False
    self._seconds_per_step: collections.deque[float] = collections.deque(
      maxlen=_NUM_MEASURED
    )
    self._ended = threading.Event()

  @property
  def deadline_s(self) -> float:
    """How long the run may stand still now, seconds."""
    if self._num_calls == 0 or self._is_acting:
      return max(self._start_s, self._step_s or 0.0)
    if self._step_s is not None:
      return self._step_s
    if not self._seconds_per_step:
      return self._start_s
    measured_s = statistics.median(self._seconds_per_step)
    return max(_LEAST_S, _TIMES_MEDIAN * measured_s)

  @contextlib.contextmanager
  def stepping(self, pulse_fn: Callable[[], int]) -> Iterator[None]:
    """A block of steps: they are expected as fast as they are found to be.

    Args:
      pulse_fn: reads a number that changes with each step from the device.

    Yields:
      Nothing.
    """
    self._pulse_fn = pulse_fn
    try:
      yield
    finally:
      self._pulse_fn = lambda: 0
      self._num_calls = 0
      self._seconds_per_step.clear()

  @contextlib.contextmanager
  def acting(self) -> Iterator[None]:
    """A block between steps, such as an evaluation, which may take as long as a start.

    Yields:
      Nothing.
    """
    self._is_acting = True
    try:
      yield
    finally:
      beat()
      self._is_acting = False

  def learn(self, seconds_per_step: float) -> None:
    """Takes in how long steps take.

    Args:
      seconds_per_step: measured over a call of the inner loop, of which the first also
        compiles, and is left out.
    """
    if self._num_calls:
      self._seconds_per_step.append(seconds_per_step)
    self._num_calls += 1
    beat()

  @contextlib.contextmanager
  def watching(self) -> Iterator[None]:
    """Watches the block.

    Yields:
      Nothing.
    """
    threads = [
      threading.Thread(target=target, daemon=True)
      for target in (self._watch, self._feel_pulse)
    ]
    for thread in threads:
      thread.start()
    try:
      yield
    finally:
      self._ended.set()
      for thread in threads:
        thread.join(_JOIN_S)

  def _feel_pulse(self) -> None:
    """Reads the device in a thread of its own, which a device that hangs may hold."""
    while not self._ended.wait(self._interval_s):
      self._pulse = self._pulse_fn()

  def _watch(self) -> None:
    seen, since_s = None, time.monotonic()
    while not self._ended.wait(self._interval_s):
      moving = (num_beats(), self._pulse)
      if moving != seen:
        seen, since_s = moving, time.monotonic()
      elif time.monotonic() - since_s > self.deadline_s:
        self._end(time.monotonic() - since_s)

  @property
  def _interval_s(self) -> float:
    return min(1.0, self.deadline_s / _SHARE_OF_DEADLINE)

  def _end(self, stood_s: float) -> NoReturn:
    line = (
      f"error: no progress for {stood_s:.0f} s (deadline {self.deadline_s:.0f} s): "
      "another worker, the input or a device hangs; where every thread stood is in "
      f"{self._path}; the same command continues from the newest checkpoint."
    )
    # What hangs may hold any lock, of logging too.
    os.write(2, f"{line}\n".encode())
    with contextlib.suppress(OSError), open(self._path, "w", encoding="utf-8") as file:
      file.write(f"{line}\n")
      file.flush()
      faulthandler.dump_traceback(file, all_threads=True)
    with contextlib.suppress(Exception):
      faulthandler.dump_traceback(2, all_threads=True)
    os._exit(StalledError.exit_status)
