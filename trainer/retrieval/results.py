"""`eval/metrics.json`: what was measured, before training and last."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

FILE_NAME = os.path.join("eval", "metrics.json")
_HEADS = {"before_training": "before training", "latest": "after training"}
_TITLES = {
  "recall_at_1": "recall@1",
  "recall_at_5": "recall@5",
  "recall_at_10": "recall@10",
  "map_at_r": "MAP@R",
  "r_precision": "R-precision",
}


class Results:
  """The evaluation results of a run: {"before_training": {...}, "latest": {...}}.

  Each has "step" and the metrics by name.

  Args:
    model_dir: folder of the run; results that it holds are read.
  """

  def __init__(self, model_dir: str):
    self.path = os.path.join(model_dir, FILE_NAME)
    self.by_moment: dict[str, dict[str, Any]] = {}
    if os.path.exists(self.path):
      with open(self.path, encoding="utf-8") as file:
        self.by_moment = json.load(file)

  def write_before_training(self, metrics: Mapping[str, float]) -> None:
    """Writes what the untrained encoder gives.

    Args:
      metrics: by metric name.
    """
    self.by_moment = {"before_training": {"step": 0, **metrics}}
    self._write()

  def write_latest(self, step: int, metrics: Mapping[str, float]) -> None:
    """Writes what the encoder gives now.

    Args:
      step: number of steps it was trained.
      metrics: by metric name.
    """
    self.by_moment["latest"] = {"step": step, **metrics}
    self._write()

  def rows(self) -> list[list[str]]:
    """The metrics of all moments, a column each; the first row is the heads."""
    moments = [m for m in _HEADS if m in self.by_moment]
    rows = [["", *(_HEADS[m] for m in moments)]]
    for name, title in _TITLES.items():
      values = [self.by_moment[m].get(f"eval/{name}") for m in moments]
      if None not in values:
        rows.append([title, *(f"{value:.4f}" for value in values)])
    return rows

  def table(self) -> str:
    """The rows as text, to be printed."""
    return "\n".join(
      f"{row[0]:<13}" + "".join(f"{cell:>17}" for cell in row[1:])
      for row in self.rows()
    )

  def _write(self):
    os.makedirs(os.path.dirname(self.path), exist_ok=True)
    aside = self.path + ".new"
    with open(aside, "w", encoding="utf-8") as file:
      json.dump(self.by_moment, file, indent=2)
    os.replace(aside, self.path)
