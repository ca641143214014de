"""Results of a sweep: rows, importance of parameters, and the table.

The importance of a name is the share of the variance between settings that is due to
this name alone (fANOVA: a random forest predicts the metric from the settings). The
interactions of names are not attributed, so that the sum may be below 1.

Source: Hutter et al., An Efficient Approach for Assessing Hyperparameter Importance,
2014, http://proceedings.mlr.press/v32/hutter14.html, as implemented by Optuna.
"""

from __future__ import annotations

import collections
import csv
import dataclasses
import io
import math
import re
import shutil
import statistics
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Optional

from trainer.runtime import filesystem
from trainer.sweep.points import Point
from trainer.sweep.run_process import RunFolder
from trainer.sweep.spec import SweepOptions

FINISHED, RUNNING, FAILED = "finished", "running", "failed"
HALF_DONE, WAITING = "half done", "waiting"

_NUM_SHOWN = 10


@dataclasses.dataclass(frozen=True)
class RunRow:
  """One run of a sweep.

  Attributes:
    point: of the run.
    path: its folder.
    state: "finished", "running", "failed", "half done" or "waiting".
    step: the last step logged.
    value: of the sweep's metric; None until it is finished.
    note: why it failed.
  """

  point: Point
  path: str
  state: str
  step: int
  value: Optional[float]
  note: str


@dataclasses.dataclass(frozen=True)
class SweepRow:
  """Runs with the same settings.

  Attributes:
    settings: by gin name.
    runs: one per seed.
  """

  settings: Mapping[str, str]
  runs: Sequence[RunRow]

  @property
  def values(self) -> list[float]:
    """Values of the finished runs."""
    return [run.value for run in self.runs if run.value is not None]

  @property
  def mean(self) -> Optional[float]:
    """Mean over the finished seeds; None if there are none."""
    return statistics.fmean(self.values) if self.values else None

  @property
  def spread(self) -> Optional[float]:
    """Standard deviation over seeds (n - 1); None for fewer than two."""
    return statistics.stdev(self.values) if len(self.values) > 1 else None


def collect_rows(
  points: Sequence[Point],
  folder_fn: Callable[[Point], RunFolder],
  options: SweepOptions,
  running: Collection[str],
) -> list[SweepRow]:
  """Returns the rows, best first, those without value last.

  Args:
    points: all points of the sweep.
    folder_fn: returns the folder of a point.
    options: of the sweep; metric and goal.
    running: ids of the runs in progress in this process.
  """
  groups: dict[tuple, list[RunRow]] = {}
  for point in points:
    run = _run_row(point, folder_fn(point), options.metric, point.run_id in running)
    groups.setdefault(tuple(point.settings.items()), []).append(run)
  rows = [SweepRow(dict(settings), runs) for settings, runs in groups.items()]
  sign = -1.0 if options.goal == "maximize" else 1.0
  return sorted(rows, key=lambda row: (row.mean is None, sign * (row.mean or 0.0)))


def swept_names(rows: Sequence[SweepRow]) -> list[str]:
  """Returns the swept names of the points, in the order of the sweep file."""
  return list(dict.fromkeys(name for row in rows for name in row.settings))


def short_name(name: str, among: Sequence[str]) -> str:
  """Returns the parameter alone if it is unambiguous."""
  last = name.rpartition(".")[2]
  return last if sum(n.rpartition(".")[2] == last for n in among) == 1 else name


def short_value(text: str) -> str:
  """Formats a value without gin's syntax."""
  value = number(text)
  if value is not None:
    return f"{value:.4g}"
  return re.sub(r"^@|\(\)$", "", text).strip("'\"")


def number(text: str) -> Optional[float]:
  """Parses a number; returns None if the text is not one."""
  is_number = re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", text)
  return float(text) if is_number else None


def write_csv(rows: Sequence[SweepRow], options: SweepOptions, path: str) -> None:
  """Writes a line per run: rank, settings, seed, state, step, metric, folder, note."""
  swept = swept_names(rows)
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
  filesystem.replace_file(path, text.getvalue())


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
  value = folder.metric(metric) if is_finished else None
  return RunRow(
    point,
    folder.path,
    state,
    step,
    value if value is not None and math.isfinite(value) else None,
    f"status {failure.exit_status}: {failure.message}" if failure else "",
  )


def importances(rows: Sequence[SweepRow]) -> dict[str, float]:
  """Returns the importance of each swept name, the largest first.

  Args:
    rows: in any order; rows without value are left out.

  Returns:
    By name, 0 to 1; empty if fewer than two settings have a value, or all are equal.
  """
  finished = [row for row in rows if row.mean is not None]
  if len({row.mean for row in finished}) < 2:
    return {}
  import optuna  # Late: Optuna is an extra.

  columns: dict[str, Sequence[Any]] = {}
  space: dict[str, optuna.distributions.BaseDistribution] = {}
  for name in swept_names(finished):
    texts = [row.settings.get(name, "-") for row in finished]
    numbers = [value for value in map(number, texts) if value is not None]
    if len(set(numbers)) > 1 and len(numbers) == len(texts):
      columns[name] = numbers
      space[name] = optuna.distributions.FloatDistribution(min(numbers), max(numbers))
    else:
      columns[name] = texts
      space[name] = optuna.distributions.CategoricalDistribution(sorted(set(texts)))
  study = optuna.create_study()
  for row, values in zip(finished, zip(*columns.values())):
    params = dict(zip(columns, values))
    study.add_trial(
      optuna.trial.create_trial(params=params, distributions=space, value=row.mean)
    )
  evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
  return optuna.importance.get_param_importances(
    study, evaluator=evaluator, normalize=False
  )


def table_text(
  rows: Sequence[SweepRow], metric: str, num_shown: int = _NUM_SHOWN
) -> str:
  """Returns a table of the best rows, running and failed ones, and the counts by state.

  Args:
    rows: best first.
    metric: title of the value.
    num_shown: the largest number of rows.
  """
  busy = [row for row in rows if row.mean is None and _state(row) != WAITING]
  shown = [row for row in rows if row.mean is not None][:num_shown] + busy[:num_shown]
  swept = swept_names(rows)
  head = [
    "",
    *(short_name(name, swept) for name in swept),
    metric,
    "± seeds",
    "",
  ]
  cells = [head] if shown else []
  for rank, row in enumerate(shown, 1):
    cells.append(
      [
        str(rank) if row.mean is not None else "",
        *(short_value(row.settings.get(name, "-")) for name in swept),
        "" if row.mean is None else f"{row.mean:.4f}",
        "" if row.spread is None else f"{row.spread:.4f} ({len(row.values)})",
        _state(row),
      ]
    )
  widths = (
    [max(len(row[i]) for row in cells) for i in range(len(head))] if cells else []
  )
  lines = [
    "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()
    for row in cells
  ]
  return "\n".join([*lines, count_states(rows)])


def count_states(rows: Sequence[SweepRow]) -> str:
  """Returns the number of runs in each state."""
  states = collections.Counter(run.state for row in rows for run in row.runs)
  words = ", ".join(f"{number} {state}" for state, number in states.most_common())
  return f"{sum(states.values())} runs: {words}"


class LiveTable:
  """Table redrawn in place on a terminal; elsewhere, a line when counts change."""

  def __init__(self, metric: str):
    self._metric = metric
    self._num_lines = 0
    self._last = ""

  def show(self, rows: Sequence[SweepRow]) -> None:
    """Shows the progress of the sweep."""
    if not sys.stderr.isatty():
      line = count_states(rows)
      if line != self._last:
        print(line, file=sys.stderr, flush=True)
      self._last = line
      return
    width = shutil.get_terminal_size().columns
    lines = [line[: width - 1] for line in table_text(rows, self._metric).splitlines()]
    up = f"\x1b[{self._num_lines}A" if self._num_lines else ""
    sys.stderr.write(up + "".join(f"\x1b[2K{line}\n" for line in lines) + "\x1b[J")
    sys.stderr.flush()
    self._num_lines = len(lines)


def _state(row: SweepRow) -> str:
  """Returns the state of the unfinished runs of a row."""
  words = []
  for run in row.runs:
    if run.state == RUNNING:
      words.append(f"running, step {run.step}/{run.point.num_steps}")
    elif run.state == FAILED:
      words.append(f"failed, {run.note}")
    elif run.state == HALF_DONE:
      words.append(f"half done, step {run.step}/{run.point.num_steps}")
  return "; ".join(words) or (WAITING if row.mean is None else "")
