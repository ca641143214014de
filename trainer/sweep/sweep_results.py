"""Results of a sweep: rows, importance of parameters, the table and `sweep.html`.

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
import json
import math
import os
import re
import shutil
import statistics
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Optional

from trainer.config import run_config
from trainer.errors import UserError
from trainer.report import page
from trainer.runtime import filesystem
from trainer.sweep.points import Point
from trainer.sweep.run_process import RunFolder
from trainer.sweep.spec import Spec, SweepOptions

FINISHED, RUNNING, FAILED = "finished", "running", "failed"
HALF_DONE, WAITING = "half done", "waiting"

_NUM_SHOWN = 10

# Parallel coordinates, in pixels of their SVG.
_FRAME = {"height": 260, "top": 34, "bottom": 240}
_AXIS_WIDTH = 150
# For an axis with more values, the ends are labelled.
_MAX_LABELS = 6

_SPEC_FILE = "sweep.json"
CSV_FILE = "sweep.csv"
PAGE_FILE = "sweep.html"
_NUM_CHANGES = 3


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


class _Axis:
  """A vertical axis of parallel coordinates: numbers by size, other values by order.

  Attributes:
    name: above the axis.
    x: of the axis.
    texts: value of each row.
    places: y of each value.
    labels: as many values as fit.
  """

  def __init__(self, index: int, name: str, texts: Sequence[str]):
    self.name, self.texts = name, texts
    self.x = _AXIS_WIDTH * (index + 0.5)
    distinct = set(texts)
    self._is_number = len(distinct) > 1 and None not in map(number, distinct)
    self._order = sorted(distinct, key=float if self._is_number else None)
    self.labels = (
      self._order if len(distinct) <= _MAX_LABELS else self._order[:: len(distinct) - 1]
    )
    self.places = {text: self._place(text) for text in distinct}

  def _place(self, text: str) -> float:
    if self._is_number:
      low, high = float(self._order[0]), float(self._order[-1])
      share = (float(text) - low) / (high - low or 1.0)  # 0.1 and 0.10 are equal.
    else:
      share = (self._order.index(text) + 0.5) / len(self._order)
    return _FRAME["bottom"] - (_FRAME["bottom"] - _FRAME["top"]) * share


def _coordinates(
  finished: Sequence[SweepRow], short_names: Mapping[str, str], metric: str
) -> dict[str, Any]:
  """Returns values of the template: an axis per swept name and one for the metric."""
  columns = {
    short: [row.settings.get(name, "-") for row in finished]
    for name, short in short_names.items()
  }
  columns[metric] = [repr(row.mean) for row in finished]
  axes = [_Axis(i, name, texts) for i, (name, texts) in enumerate(columns.items())]
  return {"axes": axes, "width": _AXIS_WIDTH * len(axes), **_FRAME}


def write_sweep_page(found: Sequence[SweepRow], spec: Spec, path: str) -> None:
  """Writes the sweep page.

  Args:
    found: best first, those without value last.
    spec: the sweep file.
    path: of the page; links in it are relative to its folder.
  """
  folder = os.path.dirname(os.path.abspath(path))
  finished = [row for row in found if row.mean is not None]
  runs = [run for row in found for run in row.runs]
  values = [value for row in finished for value in row.values]
  swept = swept_names(found)
  short_names = {name: short_name(name, swept) for name in swept}
  page.write_document(
    path,
    "sweep/sweep.html",
    title=f"Sweep {spec.name}",
    summary=f"{_search_words(spec.options)}. {count_states(found)}.",
    metric=spec.options.metric,
    finished=finished,
    failed=[run for run in runs if run.state == FAILED],
    short_names=short_names,
    short_value=short_value,
    scale=(min(values), max(values) - min(values) or 1.0) if values else None,
    links={run.path: page.report_link(run.path, folder) for run in runs},
    importances=importances(found),
    **_coordinates(finished, short_names, spec.options.metric),
  )


def _search_words(options: SweepOptions) -> str:
  goal = "highest" if options.goal == "maximize" else "lowest"
  repeats = f", {len(options.seeds)} seeds each" if options.seeds else ""
  return f"{options.method}{repeats}; the {goal} {options.metric} is best"


def open_sweep_folder(spec: Spec, folder: str) -> None:
  """Creates the folder, or checks that it has the same sweep.

  Args:
    spec: the sweep file.
    folder: is created if it is missing.

  Raises:
    UserError: it has another sweep, or cannot be written to.
  """
  path = os.path.join(folder, _SPEC_FILE)
  if os.path.exists(path):
    lines = run_config.diff(_read(path), spec.identity)
    if lines:
      more = (
        [f"and {len(lines) - _NUM_CHANGES} more"] if len(lines) > _NUM_CHANGES else []
      )
      raise UserError(
        f"{folder} has another sweep: {'; '.join(lines[:_NUM_CHANGES] + more)}. Choose "
        "another --sweep_dir; runs that are in both are not repeated."
      )
  try:
    os.makedirs(folder, exist_ok=True)
    filesystem.replace_file(path, json.dumps(spec.identity, indent=2))
  except OSError as error:
    raise UserError(
      f"--sweep_dir={folder} can't be written to: {error.strerror}."
    ) from error


def _read(path: str) -> dict[str, str]:
  try:
    with open(path, encoding="utf-8") as file:
      content = json.load(file)
  except (ValueError, RecursionError) as error:
    raise UserError(f"{path} is damaged ({error}); remove it.") from error
  if not isinstance(content, dict):
    raise UserError(f"{path} is damaged (it is not a JSON object); remove it.")
  return content


def write_results(found: Sequence[SweepRow], spec: Spec, folder: str) -> None:
  """Writes `sweep.csv` and `sweep.html`.

  Args:
    found: best first.
    spec: the sweep file.
    folder: of the sweep.
  """
  write_csv(found, spec.options, os.path.join(folder, CSV_FILE))
  write_sweep_page(found, spec, os.path.join(folder, PAGE_FILE))
