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
from trainer.mining.round_folder import MiningRound, OtherDataError

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
    # By what tells a round from one that was made anew: whether it is whole.
    self._looked_at: dict[tuple[int, int], bool] = {}

  def newest(self, step: int, held: Optional[int]) -> Optional[int]:
    """The newest whole round that is not after a step; waits if it is too old.

    Args:
      step: number of steps done.
      held: the round that holds, which was looked at already; None if none does.

    Returns:
      Its step; None where there is none.

    Raises:
      UserError: it is too old, and no other came in time; or it is of other data.
    """
    deadline_s = time.monotonic() + self._options.max_wait_s
    while True:
      newest = self._newest_whole(step, held)
      try:
        self._options.check_age(step, newest)
        return newest
      except UserError:
        if time.monotonic() >= deadline_s:
          raise
      heartbeat.beat()
      time.sleep(_POLL_S)

  def _newest_whole(self, step: int, held: Optional[int]) -> Optional[int]:
    for round_step in round_folder.steps(self._model_dir):
      if round_step > step:
        continue
      if round_step == held or self._is_whole(round_step):
        return round_step
    return None

  def _is_whole(self, round_step: int) -> bool:
    made = round_step, round_folder.time_of(self._model_dir, round_step)
    if made not in self._looked_at:
      try:
        MiningRound(self._model_dir, round_step, self._made_of)
        self._looked_at[made] = True
      except OtherDataError:
        raise
      except UserError as error:
        logging.warning("%s The round before is taken.", error)
        self._looked_at[made] = False
    return self._looked_at[made]
