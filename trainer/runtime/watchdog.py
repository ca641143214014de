"""A watchdog thread that ends a process without progress.

A suspended peer or a hanging input makes TensorFlow wait for ever. Progress is counted
by `beat`: steps, batches of an evaluation, and work between them.
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
_MIN_DEADLINE_S = 60.0
_MEDIAN_FACTOR = 20.0
_NUM_MEASURED = 101
_SHARE_OF_DEADLINE = 20
_JOIN_S = 5.0  # A hanging device may block the thread that reads from it.

_beats = itertools.count(1)
_last = 0


def beat() -> None:
  """Records progress."""
  global _last
  _last = next(_beats)


def num_beats() -> int:
  """Returns how often progress was recorded."""
  return _last


class Watchdog:
  """A watchdog for a block that should make progress.

  Args:
    path: file for the stack of every thread when the process is ended.
    start_deadline_s: longest time without progress before the first steps are done and
      outside of training, seconds.
    step_deadline_s: longest time of a step, seconds; None for 20 times the measured
      median step, at least a minute.
  """

  def __init__(
    self, path: str, *, start_deadline_s: float, step_deadline_s: Optional[float]
  ):
    self._start_s = start_deadline_s
    self._step_s = step_deadline_s
    self._path = path
    self._device_step_fn: Callable[[], int] = lambda: 0
    self._device_step = 0
    self._num_calls = 0
    self._is_acting = False
    self._seconds_per_step: collections.deque[float] = collections.deque(
      maxlen=_NUM_MEASURED
    )
    self._ended = threading.Event()

  @property
  def deadline_s(self) -> float:
    """Longest time without progress that is allowed now, seconds."""
    if self._num_calls == 0 or self._is_acting:
      return max(self._start_s, self._step_s or 0.0)
    if self._step_s is not None:
      return self._step_s
    if not self._seconds_per_step:
      return self._start_s
    measured_s = statistics.median(self._seconds_per_step)
    return max(_MIN_DEADLINE_S, _MEDIAN_FACTOR * measured_s)

  @contextlib.contextmanager
  def stepping(self, device_step_fn: Callable[[], int]) -> Iterator[None]:
    """Marks a block of steps, whose deadline follows from the measured step times.

    Args:
      device_step_fn: reads a number from the device that changes with each step.
    """
    self._device_step_fn = device_step_fn
    try:
      yield
    finally:
      self._device_step_fn = lambda: 0
      self._num_calls = 0
      self._seconds_per_step.clear()

  @contextlib.contextmanager
  def acting(self) -> Iterator[None]:
    """Marks work between steps, such as an evaluation; the start deadline applies."""
    self._is_acting = True
    try:
      yield
    finally:
      beat()
      self._is_acting = False

  def record_step_time(self, seconds_per_step: float) -> None:
    """Records the measured step time.

    Args:
      seconds_per_step: mean over one call of the inner loop. The first call also
        compiles, and is ignored.
    """
    if self._num_calls:
      self._seconds_per_step.append(seconds_per_step)
    self._num_calls += 1
    beat()

  @contextlib.contextmanager
  def watching(self) -> Iterator[None]:
    """Watches the block."""
    threads = [
      threading.Thread(target=target, daemon=True)
      for target in (self._watch, self._poll_device)
    ]
    for thread in threads:
      thread.start()
    try:
      yield
    finally:
      self._ended.set()
      for thread in threads:
        thread.join(_JOIN_S)

  def _poll_device(self) -> None:
    """Reads from the device in a separate thread, which a hanging device may block."""
    while not self._ended.wait(self._interval_s):
      self._device_step = self._device_step_fn()

  def _watch(self) -> None:
    seen, since_s = None, time.monotonic()
    while not self._ended.wait(self._interval_s):
      progress = (num_beats(), self._device_step)
      if progress != seen:
        seen, since_s = progress, time.monotonic()
      elif time.monotonic() - since_s > self.deadline_s:
        self._end(time.monotonic() - since_s)

  @property
  def _interval_s(self) -> float:
    return min(1.0, self.deadline_s / _SHARE_OF_DEADLINE)

  def _end(self, idle_s: float) -> NoReturn:
    line = (
      f"error: no progress for {idle_s:.0f} s (deadline {self.deadline_s:.0f} s): "
      "another worker, the input or a device hangs; the stacks of all threads are in "
      f"{self._path}; run the same command to resume from the newest checkpoint."
    )
    # A hanging thread may hold any lock, including that of logging.
    os.write(2, f"{line}\n".encode())
    with contextlib.suppress(OSError), open(self._path, "w", encoding="utf-8") as file:
      file.write(f"{line}\n")
      file.flush()
      faulthandler.dump_traceback(file, all_threads=True)
    with contextlib.suppress(Exception):
      faulthandler.dump_traceback(2, all_threads=True)
    os._exit(StalledError.exit_status)
