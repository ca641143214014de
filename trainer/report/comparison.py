"""Comparison of several runs, as text and as a page."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

from trainer.report import figures, measured_runs, page
from trainer.report.figures import short_number
from trainer.report.measured_runs import MeasuredRun, differing_paths

_CURVES = ("train/loss", "mining/active_fraction")
_BLOCKS = "▁▂▃▄▅▆▇█"
_MAX_WIDTH = 48
# Longer values are not shown in columns.
_MAX_CELL = 32
_UNSET = "unset"


def comparison_text(runs: Sequence[MeasuredRun]) -> str:
  """Returns results, curves and config differences as printable text.

  Args:
    runs: two or more.
  """
  parts = ["\n".join(_aligned(_results(runs))), *_curves(runs)]
  parts += _differences(runs) or ["The configs are the same."]
  return "\n\n".join(parts)


def best_value(runs: Sequence[MeasuredRun], name: str) -> set[str]:
  """Returns the names of the runs with the highest value; empty if all are equal.

  Args:
    runs: two or more.
    name: of a metric for which larger is better.
  """
  values = {
    r.name: r.latest.values[name].value for r in runs if name in r.latest.values
  }
  if len(set(values.values())) < 2:
    return set()
  return {run for run, value in values.items() if value == max(values.values())}


def _results(runs: Sequence[MeasuredRun]) -> list[list[str]]:
  """Returns one row per metric; the best value has a star."""
  first, others = measured_runs.ordered_metrics(
    [n for run in runs for n in run.latest.values]
  )
  rows = [["", *(run.name for run in runs)]]
  rows.append(["step", *(f"{run.latest.step:,}" for run in runs)])
  for name in first + others:
    winners = best_value(runs, name) if name in first else set()
    rows.append(
      [
        measured_runs.metric_title(name),
        *(_cell(run, name, run.name in winners) for run in runs),
      ]
    )
  return rows


def _cell(run: MeasuredRun, name: str, is_best: bool) -> str:
  value = run.latest.values.get(name)
  if value is None:
    return "-"
  interval = value.interval_text(" to ")
  return (
    value.text() + (f" ({interval})" if interval else "") + (" *" if is_best else "")
  )


def _curves(runs: Sequence[MeasuredRun]) -> list[str]:
  """Returns, per metric, one line per run, all on one scale."""
  parts = []
  for name in _CURVES:
    by_run = {run.name: figures.curve_points(run.rows, name) for run in runs}
    values = [y for points in by_run.values() for _, y in points]
    if not values:
      continue
    last_step = max(x for points in by_run.values() for x, _ in points)
    width = min(_MAX_WIDTH, max(map(len, by_run.values())))
    low, high = min(values), max(values)
    rows = [
      [
        f"  {run}",
        _sparkline([(x / last_step, y) for x, y in points], width, low, high),
        short_number(points[-1][1]) if points else "not logged",
      ]
      for run, points in by_run.items()
    ]
    title = figures.CURVE_TITLES[name]
    span = f"{short_number(low)} to {short_number(high)}"
    head = f"{title} by step, to {short_number(last_step)}; {span}"
    parts.append("\n".join([head, *_aligned(rows)]))
  return parts


def _sparkline(
  points: Sequence[tuple[float, float]], width: int, low: float, high: float
) -> str:
  """Returns one block per interval with its mean; a gap where nothing was logged.

  Args:
    points: position, 0 to 1, and value.
    width: number of blocks.
    low: value of the lowest block.
    high: value of the highest block.
  """
  stretches: list[list[float]] = [[] for _ in range(width)]
  for place, value in points:
    at = min(width - 1, max(0, math.ceil(place * width) - 1))
    stretches[at].append((value - low) / ((high - low) or 1))
  blocks = []
  for stretch in stretches:
    share = sum(stretch) / len(stretch) if stretch else None
    blocks.append(" " if share is None else _BLOCKS[round(share * (len(_BLOCKS) - 1))])
  return "".join(blocks)


def _differences(runs: Sequence[MeasuredRun]) -> list[str]:
  """Returns a table of short values, and for other paths one line per run."""
  rows, blocks = [["config", *(run.name for run in runs)]], []
  for path in differing_paths(runs):
    values = [run.config.get(path, _UNSET) for run in runs]
    if max(map(len, values)) <= _MAX_CELL:
      rows.append([path, *values])
    else:
      lines = _aligned([[f"  {run.name}", v] for run, v in zip(runs, values)])
      blocks.append("\n".join([path, *lines]))
  return ["\n".join(_aligned(rows))] * (len(rows) > 1) + blocks


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
  widths = [max(map(len, column)) for column in zip(*rows)]
  return [
    "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()
    for row in rows
  ]


def write_comparison_page(runs: Sequence[MeasuredRun], path: str) -> None:
  """Writes the comparison page.

  Args:
    runs: two or more.
    path: of the page; links in it are relative to its folder.
  """
  folder = os.path.dirname(os.path.abspath(path))
  values = [value for run in runs for value in run.latest.values.items()]
  main, others = measured_runs.ordered_metrics(name for name, _ in values)
  page.write_document(
    path,
    "report/comparison.html",
    title=f"{len(runs)} runs compared",
    summary=", ".join(run.name for run in runs),
    runs=runs,
    links={run.name: page.report_link(run.model_dir, folder) for run in runs},
    main_metrics=main,
    other_metrics=others,
    best={name: best_value(runs, name) for name in main},
    has_intervals=any(value.interval for _, value in values),
    recall=figures.recall_plot(
      {run.name: run.report_data.recall_at for run in runs if run.report_data}
    ),
    training=figures.training_plots({run.name: run.rows for run in runs}),
    differing=differing_paths(runs),
    unset=_UNSET,
  )
