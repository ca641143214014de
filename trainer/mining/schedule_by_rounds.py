"""The schedule of a whole training: plain at first, then of one round after another.

Shapes: S steps, B records in a batch.
"""

from __future__ import annotations

import numpy as np

from trainer.data.schedule import Schedule, draw


class ScheduleByRounds:
  """A pure function of the step, given from which steps which rounds hold.

  Attributes:
    shape: that of the plain schedule; batches of all rounds have as many records.

  Args:
    plain: holds from step 0.
  """

  def __init__(self, plain: Schedule):
    self.shape = plain.shape
    # Replaced and never changed: what reads ahead may draw in another thread.
    self._firsts: tuple[int, ...] = (0,)
    self._schedules: tuple[Schedule, ...] = (plain,)

  def hold(self, first_step: int, schedule: Schedule) -> None:
    """Lets a schedule hold from a step, which is not before that of an earlier one."""
    self._schedules = (*self._schedules, schedule)
    self._firsts = (*self._firsts, first_step)

  def batch(self, step: int) -> np.ndarray:
    """The record numbers of a step, in the shape of the plain schedule."""
    return self.batches(np.array([step]))[0]

  def batches(self, steps: np.ndarray) -> np.ndarray:
    """[S, ...] int64, the record numbers of steps [S] int64."""
    firsts, schedules = self._firsts, self._schedules
    holding = np.searchsorted(firsts, steps, side="right") - 1
    records = np.empty((len(steps), *self.shape), np.int64)
    for number in np.unique(holding).tolist():
      rows = np.flatnonzero(holding == number)
      drawn = draw(schedules[number], steps[rows])
      records[rows] = drawn.reshape(len(rows), *self.shape)
    return records
