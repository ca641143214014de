"""The rounds that a process beside the training makes: the newest, waited for."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Optional

from absl import logging

from trainer import heartbeat
from trainer.errors import UserError
from trainer.mining import round_folder
from trainer.mining.offline_mining import OfflineMining
from trainer.mining.round_folder import MiningRound

_POLL_S = 1.0


class RoundsBeside:
  """Looks for rounds in the folder of a run.

  Args:
    options: how old a round may be, and how long to wait for another.
    model_dir: folder of the run.
    made_of: what tells the records and the classes from others, by name.
  """

  def __init__(
    self, options: OfflineMining, model_dir: str, made_of: Mapping[str, Any]
  ):
    self._options = options
    self._model_dir = model_dir
    self._made_of = made_of
    self._damaged: set[int] = set()

  def newest(self, step: int, held: Optional[int]) -> Optional[int]:
    """The newest whole round that is not after a step; waits if it is too old.

    Args:
      step: number of steps done.
      held: the round that holds, which was looked at already; None if none does.

    Returns:
      Its step; None where there is none.

    Raises:
      UserError: it is too old, and no other came in time.
    """
    deadline_s = time.monotonic() + self._options.max_wait_s
    while True:
      newest = self._newest_whole(step, held)
      age = step - (newest or 0)
      if self._options.max_age_steps is None or age <= self._options.max_age_steps:
        return newest
      if time.monotonic() >= deadline_s:
        raise UserError(_too_old(self._options, step, newest))
      heartbeat.beat()
      time.sleep(_POLL_S)

  def _newest_whole(self, step: int, held: Optional[int]) -> Optional[int]:
    for round_step in round_folder.steps(self._model_dir):
      if round_step > step or round_step in self._damaged:
        continue
      if round_step == held:
        return held
      try:
        MiningRound(self._model_dir, round_step, self._made_of)
        return round_step
      except UserError as error:
        logging.warning("%s The round before is taken.", error)
        self._damaged.add(round_step)
    return None


def _too_old(options: OfflineMining, step: int, newest: Optional[int]) -> str:
  what = "there is no mining round"
  if newest is not None:
    what = f"the newest mining round is of step {newest}"
  waited = f" after {options.max_wait_s:g} s" if options.max_wait_s else ""
  return (
    f"step {step}: {what}{waited}, more than "
    f"OfflineMining.max_age_steps={options.max_age_steps} behind; is --mode=mine "
    "running? Raise max_age_steps or max_wait_s, or set OfflineMining.miner to mine in "
    "the training."
  )
