"""Trials of a sweep, and those of a list."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Optional, Protocol

from trainer.sweep.points import Point
from trainer.sweep.run_process import Ending


class Trial:
  """Points that are run together; the value of the trial is their mean.

  Args:
    points: the same settings with different seeds; a single one in a list.

  Attributes:
    is_waiting: whether to wait immediately for a run of another sweep, or only when no
      other trial is left.
  """

  is_waiting = False

  def __init__(self, points: Sequence[Point]):
    self.points = points

  def is_hopeless(self, point: Point, step: int, value: float) -> bool:
    """Returns whether to stop a run with this value of `prune_metric` at a step."""
    del point, step, value
    return False


class Trials(Protocol):
  """Protocol of a source of trials, called from several threads."""

  def take(self) -> Optional[Trial]:
    """Returns the next trial; None when there is none left."""

  def finish(self, trial: Trial, ending: Ending, value: Optional[float]) -> None:
    """Records how a trial ended; `value` is the mean of its metric."""

  def points(self) -> list[Point]:
    """Returns all points of the sweep so far."""


class ListedTrials:
  """Points of a grid or a random search, one per trial.

  Args:
    points: all of them, in order.
  """

  def __init__(self, points: Sequence[Point]):
    self._points = list(points)
    self._next = iter(self._points)
    self._lock = threading.Lock()

  def take(self) -> Optional[Trial]:
    """Returns the next point."""
    with self._lock:
      point = next(self._next, None)
    return None if point is None else Trial([point])

  def finish(self, trial: Trial, ending: Ending, value: Optional[float]) -> None:
    """Does nothing: the result of a point is in its folder."""

  def points(self) -> list[Point]:
    """Returns all points."""
    return self._points
