"""Runs and their results as read for a page, and the titles of metrics."""

from __future__ import annotations

import collections
import dataclasses
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Optional

from trainer.config import run_config
from trainer.errors import UserError
from trainer.retrieval import results
from trainer.retrieval.report_data import ReportData
from trainer.retrieval.results import Results
from trainer.training.callbacks import MetricsFile

_PREFIX = "eval/"
_WORDS = {"map": "mAP", "ndcg": "nDCG"}

BEFORE, LATEST = "before_training", "latest"


def metric_title(name: str) -> str:
  """Returns the usual title of a metric, such as recall@1.

  Args:
    name: such as "eval/recall_at_1", with or without "eval/".
  """
  name = name if name.startswith(_PREFIX) else _PREFIX + name
  base, at, k = name[len(_PREFIX) :].rpartition("_at_")
  generic = f"{_WORDS.get(base, base)}@{k}" if at else k
  return results.result_titles([name]).get(name, generic.replace("_", " "))


def ordered_metrics(names: Iterable[str]) -> tuple[list[str], list[str]]:
  """Returns the main metrics and the others, in the order given.

  Args:
    names: such as "eval/recall_at_1"; names without this prefix are left out.
  """
  known = [name for name in dict.fromkeys(names) if name.startswith(_PREFIX)]
  first = list(results.result_titles(known))
  return first, [name for name in known if name not in first]


class Value(NamedTuple):
  """One metric at one moment.

  Attributes:
    value: of the metric.
    interval: lower and upper end, at 95 %; None if none was computed.
  """

  value: float
  interval: Optional[tuple[float, float]]

  @property
  def is_share(self) -> bool:
    """Whether it is between 0 and 1 and not a count."""
    return isinstance(self.value, float) and 0.0 <= self.value <= 1.0

  def text(self) -> str:
    """Formats the value for a table."""
    return f"{self.value:.4f}" if isinstance(self.value, float) else f"{self.value:,}"

  def interval_text(self, separator: str) -> str:
    """Formats the interval for a table; empty if there is none.

    Args:
      separator: text between its ends.
    """
    return separator.join(f"{end:.4f}" for end in self.interval or ())


class Moment:
  """Results of one evaluation.

  Attributes:
    step: number of training steps before it.
    values: of each metric that is a finite number.
    worst_classes: rows of the table by class, worst first.

  Args:
    content: one entry of the file.
  """

  def __init__(self, content: Mapping[str, Any]):
    self.step = int(content.get("step", 0))
    intervals = content.get("intervals", {})
    self.values = {
      name: Value(value, _pair(intervals.get(name)))
      for name, value in content.items()
      if name.startswith("eval/") and _is_number(value)
    }
    self.worst_classes: list[Mapping[str, Any]] = content.get("worst_classes", [])


def read_moments(model_dir: str) -> dict[str, Moment]:
  """Reads the evaluations of a run, by name; empty if there are none.

  Args:
    model_dir: folder of the run.

  Raises:
    UserError: the file is damaged.
  """
  try:
    by_moment = Results(model_dir).by_moment
    return {
      name: Moment(by_moment[name]) for name in (BEFORE, LATEST) if name in by_moment
    }
  except (AttributeError, TypeError) as error:
    raise UserError(
      f"{model_dir}/eval/metrics.json can't be read ({error}); measure again with "
      "--mode=evaluate."
    ) from error


def _is_number(value: Any) -> bool:
  is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
  return is_number and math.isfinite(value)


def _pair(interval: Any) -> Optional[tuple[float, float]]:
  return (float(interval[0]), float(interval[1])) if interval else None


@dataclasses.dataclass(frozen=True)
class MeasuredRun:
  """A run with results.

  Attributes:
    name: name of its folder, or its path if compared folders have equal names.
    model_dir: its folder.
    latest: the last evaluation.
    rows: of `metrics.jsonl`.
    config: values by path.
    report_data: data of the report; None if there are none.
  """

  name: str
  model_dir: str
  latest: Moment
  rows: Sequence[Mapping[str, float]]
  config: Mapping[str, str]
  report_data: Optional[ReportData]


def read_config(model_dir: str) -> str:
  """Returns the text of the run's config.

  Args:
    model_dir: folder of the run.

  Raises:
    UserError: the folder is missing or has no run.
  """
  try:
    with open(
      os.path.join(model_dir, run_config.CONFIG_FILE), encoding="utf-8"
    ) as file:
      return file.read()
  except (FileNotFoundError, NotADirectoryError) as error:
    is_folder = os.path.isdir(model_dir)
    what = (
      f"holds no {run_config.CONFIG_FILE}, so no run" if is_folder else "is no folder"
    )
    raise UserError(f"{model_dir} {what}; give the model_dir of a run.") from error


def read_measured(model_dirs: Sequence[str]) -> list[MeasuredRun]:
  """Reads the runs of folders, in order.

  Args:
    model_dirs: their folders.

  Raises:
    UserError: there are fewer than two folders, a folder is given twice or has no run,
      or a run has no results.
  """
  paths = [os.path.abspath(folder) for folder in model_dirs]
  if len(paths) < 2:
    raise UserError(f"{len(paths)} folders given; two runs or more can be compared.")
  twice = [path for path, number in collections.Counter(paths).items() if number > 1]
  if twice:
    raise UserError(f"{twice[0]} is given twice; give each run once.")
  bases = collections.Counter(os.path.basename(path) for path in paths)
  return [
    _read(folder, base if bases[base] == 1 else os.path.normpath(folder))
    for folder, base in zip(model_dirs, map(os.path.basename, paths))
  ]


def differing_paths(runs: Sequence[MeasuredRun]) -> list[str]:
  """Returns config paths with different values among the runs, sorted.

  Args:
    runs: two or more.
  """
  paths = sorted({path for run in runs for path in run.config})
  return [p for p in paths if len({run.config.get(p) for run in runs}) > 1]


def _read(model_dir: str, name: str) -> MeasuredRun:
  read_config(model_dir)
  measured = read_moments(model_dir)
  if LATEST not in measured:
    raise UserError(
      f"{model_dir} has no results after training; run --mode=evaluate on it first."
    )
  return MeasuredRun(
    name=name,
    model_dir=model_dir,
    latest=measured[LATEST],
    rows=list(MetricsFile(model_dir).rows()),
    config=run_config.read_saved_values(model_dir) or {},
    report_data=ReportData.read(model_dir),
  )
