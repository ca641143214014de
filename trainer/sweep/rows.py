"""What came of a sweep: a row for each of its settings, the seeds together."""

from __future__ import annotations

import csv
import dataclasses
import io
import re
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Optional

from trainer.data import paths
from trainer.sweep.points import Point
from trainer.sweep.run_folder import RunFolder
from trainer.sweep.spec import Options

FINISHED, RUNNING, FAILED = "finished", "running", "failed"
HALF_DONE, WAITING = "half done", "waiting"


@dataclasses.dataclass(frozen=True)
class RunRow:
  """One run of a sweep.

  Attributes:
    point: what it computes.
    path: its folder.
    state: "finished", "running", "failed", "half done" or "waiting".
    step: the last one logged.
    value: of the sweep's metric; None as long as it is not finished.
    note: why it failed.
  """

  point: Point
  path: str
  state: str
  step: int
  value: Optional[float]
  note: str


@dataclasses.dataclass(frozen=True)
class Row:
  """The runs of the same settings.

  Attributes:
    settings: by gin name.
    runs: one a seed.
  """

  settings: Mapping[str, str]
  runs: Sequence[RunRow]

  @property
  def values(self) -> list[float]:
    """Of the runs that have finished."""
    return [run.value for run in self.runs if run.value is not None]

  @property
  def mean(self) -> Optional[float]:
    """Mean over the finished seeds; None if there is none."""
    return statistics.fmean(self.values) if self.values else None

  @property
  def spread(self) -> Optional[float]:
    """Standard deviation over seeds (n - 1); None for fewer than two."""
    return statistics.stdev(self.values) if len(self.values) > 1 else None


def collect(
  points: Sequence[Point],
  folder_fn: Callable[[Point], RunFolder],
  options: Options,
  running: Collection[str],
) -> list[Row]:
  """The rows, best first, those without value last.

  Args:
    points: all points of the sweep.
    folder_fn: the folder of a point.
    options: of the sweep; metric and goal.
    running: ids of the runs that are being made here.
  """
  groups: dict[tuple, list[RunRow]] = {}
  for point in points:
    run = _run_row(point, folder_fn(point), options.metric, point.run_id in running)
    groups.setdefault(tuple(point.settings.items()), []).append(run)
  rows = [Row(dict(settings), runs) for settings, runs in groups.items()]
  sign = -1.0 if options.goal == "maximize" else 1.0
  return sorted(rows, key=lambda row: (row.mean is None, sign * (row.mean or 0.0)))


def names(rows: Sequence[Row]) -> list[str]:
  """The swept names, in the order of the sweep file as far as points have them."""
  return list(dict.fromkeys(name for row in rows for name in row.settings))


def short_name(name: str, among: Sequence[str]) -> str:
  """The parameter alone where it is clear which is meant."""
  last = name.rpartition(".")[2]
  return last if sum(n.rpartition(".")[2] == last for n in among) == 1 else name


def short_value(text: str) -> str:
  """A value as a person would write it, without gin's marks."""
  value = number(text)
  if value is not None:
    return f"{value:.4g}"
  return re.sub(r"^@|\(\)$", "", text).strip("'\"")


def number(text: str) -> Optional[float]:
  """The number that a text is; None if it is none."""
  is_number = re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", text)
  return float(text) if is_number else None


def write_csv(rows: Sequence[Row], options: Options, path: str) -> None:
  """One line a run: rank, settings, seed, state, step, the metric, folder, note."""
  swept = names(rows)
  text = io.StringIO(newline="")
  writer = csv.writer(text)
  writer.writerow(
    ["rank", *swept, "seed", "state", "step", options.metric, "folder", "note"]
  )
  for rank, row in enumerate(rows, 1):
    settings = [row.settings.get(name, "") for name in swept]
    for run in row.runs:
      seed = "" if run.point.seed is None else run.point.seed
      value = "" if run.value is None else run.value
      writer.writerow(
        [rank, *settings, seed, run.state, run.step, value, run.path, run.note]
      )
  paths.replace_file(path, text.getvalue())


def _run_row(point: Point, folder: RunFolder, metric: str, is_running: bool) -> RunRow:
  failure, step, is_finished = folder.failure, folder.step, folder.is_finished
  if is_finished:
    state = FINISHED
  elif is_running or folder.is_locked:
    state = RUNNING
  elif failure:
    state = FAILED
  else:
    state = HALF_DONE if step else WAITING
  return RunRow(
    point,
    folder.path,
    state,
    step,
    folder.metric(metric) if is_finished else None,
    f"status {failure.exit_status}: {failure.message}" if failure else "",
  )
