"""Which round holds from which step of a training: written before it is used.

`mining/rounds.jsonl` has an object a decision, {"step": 400, "round": 200}: from step
400 on the batches are of the round of step 200; of the plain schedule where it is null.
"""

from __future__ import annotations

import json
import os
from typing import Optional

from trainer.data import paths
from trainer.errors import UnwritableError, UserError, reason_of
from trainer.mining.round_folder import FOLDER

FILE_NAME = os.path.join(FOLDER, "rounds.jsonl")


class Ledger:
  """The decisions of a run.

  Args:
    model_dir: folder of the run.
  """

  def __init__(self, model_dir: str):
    self.path = os.path.join(model_dir, FILE_NAME)

  def decisions(self) -> dict[int, Optional[int]]:
    """By the step, ascending, which round holds from there; None for plain batches.

    Raises:
      UserError: the file can't be read.
    """
    if not os.path.exists(self.path):
      return {}
    try:
      with open(self.path, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
      found = {int(row["step"]): _round_of(row["round"]) for row in rows}
    except (OSError, ValueError, TypeError, KeyError) as error:
      raise UserError(
        f"{self.path} is damaged ({type(error).__name__}: {error}); put it back, or "
        f"remove {os.path.dirname(self.path)} to go on with new rounds."
      ) from error
    return dict(sorted(found.items()))

  def add(self, step: int, round_step: Optional[int]) -> None:
    """Writes a decision, so that it is on the disk when this returns.

    Args:
      step: from which it holds.
      round_step: the round; None for the plain schedule.

    Raises:
      UnwritableError: it can't be written.
    """
    decisions = sorted({**self.decisions(), step: round_step}.items())
    rows = (json.dumps({"step": s, "round": r}) + "\n" for s, r in decisions)
    try:
      os.makedirs(os.path.dirname(self.path), exist_ok=True)
      paths.replace_file(self.path, "".join(rows))
    except OSError as error:
      raise UnwritableError(
        f"{self.path} can't be written: {reason_of(error)}."
      ) from error


def _round_of(value: object) -> Optional[int]:
  if value is None or type(value) is int:
    return value
  raise ValueError(f"{value!r:.40} is no step of a round")
