"""`eval/metrics.json`: what was measured, before training and last."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from trainer.data import paths
from trainer.errors import UserError

FILE_NAME = os.path.join("eval", "metrics.json")
_HEADS = {"before_training": "before training", "latest": "after training"}
# Patterns of the names that are shown, in this order, and their titles.
_TITLES = {
  r"recall_at_(\d+)": r"recall@\1",
  "map_at_r": "MAP@R",
  "map": "MAP",
  "r_precision": "R-precision",
  "mrr": "MRR",
  "roc_auc": "ROC-AUC",
  r"tpr_at_fpr_(.+)": r"TPR@FPR=\1",
  "nmi": "NMI",
}


class Measurement(NamedTuple):
  """What one evaluation found.

  Attributes:
    metrics: by metric name, such as "eval/recall_at_1".
    intervals: low and high of those that are means over queries.
    worst_classes: {"class": name, "num_queries": n, metrics}, the worst first.
    categories: metrics by category.
    queries_without_relevant: the first names of those that have nothing to find.
  """

  metrics: Mapping[str, float]
  intervals: Mapping[str, Sequence[float]] = {}
  worst_classes: Sequence[Mapping[str, Any]] = ()
  categories: Mapping[str, Mapping[str, float]] = {}
  queries_without_relevant: Sequence[str] = ()


class Results:
  """The evaluation results of a run: {"before_training": {...}, "latest": {...}}.

  Each has "step", the metrics by name, and the rest of a `Measurement`.

  Args:
    model_dir: folder of the run; results that it holds are read.

  Raises:
    UserError: the results in it are damaged.
  """

  def __init__(self, model_dir: str):
    self.path = os.path.join(model_dir, FILE_NAME)
    self.by_moment: dict[str, dict[str, Any]] = {}
    if os.path.exists(self.path):
      self.by_moment = _read(self.path)

  def write_before_training(self, found: Measurement) -> None:
    """Writes what the untrained encoder gives.

    Args:
      found: by evaluation.
    """
    self.by_moment = {"before_training": _moment(0, found)}
    self._write()

  def write_latest(self, step: int, found: Measurement) -> None:
    """Writes what the encoder gives now.

    Args:
      step: number of steps it was trained.
      found: by evaluation.
    """
    self.by_moment["latest"] = _moment(step, found)
    self._write()

  def rows(self) -> list[list[str]]:
    """The main metrics of all moments, a column each; the first row is the heads."""
    moments = [self.by_moment[m] for m in _HEADS if m in self.by_moment]
    heads = [head for m, head in _HEADS.items() if m in self.by_moment]
    rows = [["", *heads]]
    for name, title in titles(moments[0] if moments else ()).items():
      if all(name in moment for moment in moments):
        rows.append([title, *(_cell(moment, name) for moment in moments)])
    return rows

  def table(self) -> str:
    """The rows as text, to be printed."""
    return "\n".join(
      f"{row[0]:<14}" + "".join(f"{cell:>26}" for cell in row[1:])
      for row in self.rows()
    )

  def _write(self):
    os.makedirs(os.path.dirname(self.path), exist_ok=True)
    paths.replace_file(self.path, json.dumps(self.by_moment, indent=2))


def _read(path: str) -> dict[str, dict[str, Any]]:
  try:
    with open(path, encoding="utf-8") as file:
      content = json.load(file)
  except (ValueError, RecursionError) as error:
    raise UserError(
      f"{path} can't be read ({error}); remove it, and measure again with "
      "--mode=evaluate."
    ) from error
  is_whole = isinstance(content, dict) and all(
    isinstance(moment, dict) for moment in content.values()
  )
  if not is_whole:
    raise UserError(
      f"{path} has no object for each moment; remove it, and measure again with "
      "--mode=evaluate."
    )
  return content


def titles(names) -> dict[str, str]:
  """The names that are shown, in the order to show them, with their titles.

  Args:
    names: of metrics, such as "eval/recall_at_1".
  """
  found = {}
  for pattern, title in _TITLES.items():
    for name in names:
      match = re.fullmatch(f"eval/{pattern}", name)
      if match:
        found[name] = match.expand(title)
  return found


def _moment(step: int, found: Measurement) -> dict[str, Any]:
  rest = {name: value for name, value in found._asdict().items() if value}
  return {"step": step, **rest.pop("metrics"), **rest}


def _cell(moment: Mapping[str, Any], name: str) -> str:
  interval = moment.get("intervals", {}).get(name)
  between = f" [{interval[0]:.4f}, {interval[1]:.4f}]" if interval else ""
  return f"{moment[name]:.4f}{between}"
