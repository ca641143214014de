"""`sweep.html`, and the folder of a sweep."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from trainer.config import run_config
from trainer.errors import UserError
from trainer.report import page
from trainer.runtime import filesystem
from trainer.sweep import sweep_results
from trainer.sweep.spec import Spec, SweepOptions
from trainer.sweep.sweep_results import SweepRow

# Parallel coordinates, in pixels of their SVG.
_FRAME = {"height": 260, "top": 34, "bottom": 240}
_AXIS_WIDTH = 150
# For an axis with more values, the ends are labelled.
_MAX_LABELS = 6

_SPEC_FILE = "sweep.json"
CSV_FILE = "sweep.csv"
PAGE_FILE = "sweep.html"
_NUM_SHOWN = 3


class _Axis:
  """A vertical axis of parallel coordinates: numbers by size, other values by order.

  Attributes:
    name: above the axis.
    x: of the axis.
    texts: value of each row.
    places: y of each value.
    labels: as many values as fit.
  """

  def __init__(self, number: int, name: str, texts: Sequence[str]):
    self.name, self.texts = name, texts
    self.x = _AXIS_WIDTH * (number + 0.5)
    distinct = set(texts)
    self._is_number = len(distinct) > 1 and None not in map(
      sweep_results.number, distinct
    )
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
  swept = sweep_results.swept_names(found)
  short_names = {name: sweep_results.short_name(name, swept) for name in swept}
  page.write_document(
    path,
    "sweep/sweep.html",
    title=f"Sweep {spec.name}",
    summary=f"{_search_words(spec.options)}. {sweep_results.count_states(found)}.",
    metric=spec.options.metric,
    finished=finished,
    failed=[run for run in runs if run.state == sweep_results.FAILED],
    short_names=short_names,
    short_value=sweep_results.short_value,
    scale=(min(values), max(values) - min(values) or 1.0) if values else None,
    links={run.path: page.report_link(run.path, folder) for run in runs},
    importances=sweep_results.importances(found),
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
      more = [f"and {len(lines) - _NUM_SHOWN} more"] if len(lines) > _NUM_SHOWN else []
      raise UserError(
        f"{folder} has another sweep: {'; '.join(lines[:_NUM_SHOWN] + more)}. Choose "
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
  sweep_results.write_csv(found, spec.options, os.path.join(folder, CSV_FILE))
  write_sweep_page(found, spec, os.path.join(folder, PAGE_FILE))
