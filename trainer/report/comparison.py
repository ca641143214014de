"""Several runs side by side, as text: results, curves, and where configs differ."""

from __future__ import annotations

import math
from collections.abc import Sequence

from trainer.report import metric_names, training_curves
from trainer.report.axes import short
from trainer.report.runs import MeasuredRun, differing_paths

_CURVES = ("train/loss", "mining/active_fraction")
_BLOCKS = "▁▂▃▄▅▆▇█"
_MAX_WIDTH = 48
# Longer values don't stand in columns.
_MAX_CELL = 32
UNSET = "unset"


def text(runs: Sequence[MeasuredRun]) -> str:
  """All three, to be printed.

  Args:
    runs: two or more.
  """
  parts = ["\n".join(_aligned(_results(runs))), *_curves(runs)]
  parts += _differences(runs) or ["The configs are the same."]
  return "\n\n".join(parts)


def best(runs: Sequence[MeasuredRun], name: str) -> set[str]:
  """Names of the runs with the highest value; none where all have one value.

  Args:
    runs: two or more.
    name: of a metric of which more is better.
  """
  values = {
    r.name: r.latest.values[name].value for r in runs if name in r.latest.values
  }
  if len(set(values.values())) < 2:
    return set()
  return {run for run, value in values.items() if value == max(values.values())}


def _results(runs: Sequence[MeasuredRun]) -> list[list[str]]:
  """A row a metric; the best value has a star."""
  first, others = metric_names.ordered([n for run in runs for n in run.latest.values])
  rows = [["", *(run.name for run in runs)]]
  rows.append(["step", *(f"{run.latest.step:,}" for run in runs)])
  for name in first + others:
    winners = best(runs, name) if name in first else set()
    rows.append(
      [
        metric_names.title(name),
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
  """Of each metric a line a run, all on one scale."""
  parts = []
  for name in _CURVES:
    by_run = {run.name: training_curves.points(run.rows, name) for run in runs}
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
        short(points[-1][1]) if points else "not logged",
      ]
      for run, points in by_run.items()
    ]
    title = training_curves.TITLES[name]
    head = f"{title} by step, to {short(last_step)}; {short(low)} to {short(high)}"
    parts.append("\n".join([head, *_aligned(rows)]))
  return parts


def _sparkline(
  points: Sequence[tuple[float, float]], width: int, low: float, high: float
) -> str:
  """The mean of each stretch as a block; a gap where nothing was logged.

  Args:
    points: place, 0 to 1, and value.
    width: how many blocks.
    low: value of the lowest block.
    high: value of the highest.
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
  """A table of the values that are short, and of each other path a line a run."""
  rows, blocks = [["config", *(run.name for run in runs)]], []
  for path in differing_paths(runs):
    values = [run.config.get(path, UNSET) for run in runs]
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
