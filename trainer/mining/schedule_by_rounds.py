"""The schedule of a whole training: plain at first, then of one round after another.

Shapes: S steps, B records in a batch.
"""

from __future__ import annotations

import numpy as np

from trainer.data.schedule import Schedule, draw


class ScheduleByRounds:
  """A pure function of the step, given from which steps which rounds hold.

  The one that holds and the one before it are kept: what is read ahead may still be of
  that. Older ones are let go, so that the disk space of rounds that were removed is
  free again.

  Attributes:
    shape: that of the plain schedule; batches of all rounds have as many records.

  Args:
    plain: holds from step 0.
  """

  def __init__(self, plain: Schedule):
    self.shape = plain.shape
    # Replaced and never changed: what reads ahead may draw in another thread.
    self._held: tuple[tuple[int, Schedule], ...] = ((0, plain),)

  def hold(self, first_step: int, schedule: Schedule) -> None:
    """Lets a schedule hold from a step, which is not before that of an earlier one."""
    self._held = (self._held[-1], (first_step, schedule))

  def batch(self, step: int) -> np.ndarray:
    """The record numbers of a step, in the shape of the plain schedule."""
    return self.batches(np.array([step]))[0]

  def batches(self, steps: np.ndarray) -> np.ndarray:
    """[S, ...] int64, the record numbers of steps [S] int64.

    Raises:
      ValueError: a step is before those of the schedules that are kept.
    """
    firsts, schedules = zip(*self._held)
    if (steps < firsts[0]).any():
      raise ValueError(
        f"Schedules from step {firsts[0]} on are kept; got {min(steps)}."
      )
    holding = np.searchsorted(firsts, steps, side="right") - 1
    records = np.empty((len(steps), *self.shape), np.int64)
    for number in np.unique(holding).tolist():
      rows = np.flatnonzero(holding == number)
      drawn = draw(schedules[number], steps[rows])
      records[rows] = drawn.reshape(len(rows), *self.shape)
    return records
