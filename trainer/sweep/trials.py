"""What a sweep tries next: the points of a list."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Optional, Protocol

from trainer.sweep.points import Point
from trainer.sweep.process import Ending


class Trial:
  """Points that are tried together; the value of the trial is their mean.

  Args:
    points: the same settings with different seeds; one in a list.

  Attributes:
    is_waiting: whether to wait at once for a run on which another sweep works, or only
      when no other trial is left.
  """

  is_waiting = False

  def __init__(self, points: Sequence[Point]):
    self.points = points

  def is_hopeless(self, point: Point, step: int, value: float) -> bool:
    """Whether to stop a run that has this value of `prune_metric` at a step."""
    del point, step, value
    return False


class Trials(Protocol):
  """Where trials come from; called from several threads."""

  def take(self) -> Optional[Trial]:
    """The next trial; None when there is none left."""

  def finish(self, trial: Trial, ending: Ending, value: Optional[float]) -> None:
    """Notes how a trial ended; `value` is the mean of its metric."""

  def points(self) -> list[Point]:
    """All points of the sweep so far."""


class ListedTrials:
  """The points of a grid or of a random search, one a trial.

  Args:
    points: all of them, in order.
  """

  def __init__(self, points: Sequence[Point]):
    self._points = list(points)
    self._next = iter(self._points)
    self._lock = threading.Lock()

  def take(self) -> Optional[Trial]:
    """The next point."""
    with self._lock:
      point = next(self._next, None)
    return None if point is None else Trial([point])

  def finish(self, trial: Trial, ending: Ending, value: Optional[float]) -> None:
    """Nothing: what came of a point stands in its folder."""

  def points(self) -> list[Point]:
    """All of them."""
    return self._points
