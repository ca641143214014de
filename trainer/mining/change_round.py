"""An action of the loop that goes over to the next mining round."""

from __future__ import annotations

from typing import Callable

from trainer.loop.actions import Report
from trainer.mining.rounds import Rounds


class ChangeRound:
  """Decides after so many steps; on every worker alike.

  Args:
    rounds: of the training.
    save_fn: saves a checkpoint of a step, if it isn't there yet: mining takes longer
      than a machine that is taken away may leave.
    go_on_fn: takes other batches from a step on; what was read ahead is not used.
  """

  def __init__(
    self,
    rounds: Rounds,
    *,
    save_fn: Callable[[int], None],
    go_on_fn: Callable[[int], None],
  ):
    self._rounds = rounds
    self._save_fn = save_fn
    self._go_on_fn = go_on_fn

  def __call__(self, report: Report) -> None:
    """Decides, if it is time and steps are left."""
    if report.step == report.num_steps or not self._rounds.is_due(report.step):
      return
    self._save_fn(report.step)
    if self._rounds.decide(report.step):
      self._go_on_fn(report.step)
