"""`sweep.html`, and the folder of a sweep."""

from __future__ import annotations

import html
import json
import os
import string
from collections.abc import Mapping, Sequence

from trainer.config import run_config
from trainer.config.gin_statements import Binding
from trainer.errors import UserError
from trainer.report import page as report_page
from trainer.runtime import filesystem
from trainer.sweep import sweep_results
from trainer.sweep.spec import Spec, SweepOptions
from trainer.sweep.sweep_results import (
  SweepRow,
  importances,
  number,
  short_name,
  short_value,
  swept_names,
)

_HEIGHT, _TOP, _BOTTOM = 260, 34, 20
_AXIS_WIDTH = 150
_BEST, _OTHERS = 1.0, 0.25

_PAGE = string.Template("""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; --ink: #1d2430; --soft: #667085; --line: #d5dae2;
  --page: #ffffff; --card: #f6f7f9; --curve: #0b62d6; --best: #d6480b; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --soft: #98a2b3;
  --line: #333a47; --page: #14171c; --card: #1b2027; --curve: #6ea8ff;
  --best: #ff9a62; } }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 72rem; color: var(--ink);
  background: var(--page); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; margin-bottom: .2rem; }
h2 { font-size: 1.1rem; margin-top: 2rem; }
p { color: var(--soft); margin: .2rem 0 .8rem; }
.scroll { overflow-x: auto; background: var(--card); border-radius: .5rem;
  padding: .75rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem 1.2rem .3rem 0; text-align: left; white-space: nowrap;
  border-bottom: 1px solid var(--line); font-weight: 400; }
thead th { color: var(--soft); font-size: .85rem; }
tbody tr:first-child td:nth-child(2) { color: var(--best); font-weight: 600; }
td.note { white-space: normal; min-width: 16rem; overflow-wrap: anywhere; }
td.wide { width: 60%; min-width: 6rem; } table.full { width: 100%; }
a { color: var(--curve); }
svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--soft); font-size: 12px; } svg text.name { fill: var(--ink); }
svg text.halo { paint-order: stroke; stroke: var(--card); stroke-width: 4px; }
.axis { stroke: var(--soft); } .line { stroke: var(--curve); fill: none;
  stroke-width: 1.6; opacity: var(--share); } .line:hover { stroke-width: 4; }
.best { stroke: var(--best); stroke-width: 3; }
.bar { display: block; height: .8rem; background: var(--curve); border-radius: .2rem;
  min-width: 1px; }
svg.seeds { width: 120px; } .seeds path { stroke: var(--line); }
.seeds path.mean { stroke: var(--best); stroke-width: 2; }
.seeds circle { fill: var(--curve); opacity: .7; }
</style>
<h1>$title</h1>
<p>$summary</p>
<h2>Leaderboard</h2>
$leaderboard
<h2>Settings and what came of them</h2>
<p>A line a setting; the best is orange, and fainter is worse.</p>
<div class="scroll">$coordinates</div>
<h2>What matters</h2>
<p>Share of the spread between settings that the means by one name explain.</p>
<div class="scroll"><table class="full">$importance</table></div>
$failures
</html>
""")

_SPEC_FILE = "sweep.json"
CSV_FILE = "sweep.csv"
PAGE_FILE = "sweep.html"
_NUM_SHOWN = 3
# A sweep with more trials of the same search is the same sweep.
_MAY_CHANGE = ("sweep.num_trials",)


def parallel_coordinates(rows: Sequence[SweepRow], metric: str) -> str:
  """Draws one line per setting across one axis per swept name and the metric's axis.

  Args:
    rows: best first; rows without value are left out.
    metric: title of the last axis.
  """
  finished = [row for row in rows if row.mean is not None]
  swept = swept_names(finished)
  axes = [
    _Axis(short_name(name, swept), [row.settings.get(name, "-") for row in finished])
    for name in swept
  ]
  axes.append(_Axis(metric, [f"{row.mean!r}" for row in finished]))
  width = _AXIS_WIDTH * len(axes)
  parts = [
    f'<svg viewBox="0 0 {width} {_HEIGHT}" style="min-width:{width * 3 // 4}px" '
    f'role="img" aria-label="Settings and {html.escape(metric)}">'
  ]
  for row_number in reversed(range(len(finished))):
    points = " ".join(
      f"{_axis_x(i)},{axis.y(row_number):.1f}" for i, axis in enumerate(axes)
    )
    kind = "line best" if row_number == 0 else "line"
    parts.append(
      f'<polyline class="{kind}" style="--share:{_share(row_number, finished):.2f}" '
      f'points="{points}"><title>{html.escape(_words(finished[row_number]))}</title>'
      "</polyline>"
    )
  for i, axis in enumerate(axes):
    parts.append(axis.svg(_axis_x(i)))
  return "".join([*parts, "</svg>"])


def bars(shares: Mapping[str, float]) -> str:
  """Draws a bar for each share of 0 to 1, with its name and its per cent."""
  return "".join(
    f"<tr><th>{html.escape(short_name(name, list(shares)))}</th>"
    f'<td class="wide"><span class="bar" style="width:{share:.1%}"></span></td>'
    f"<td>{share:.0%}</td></tr>"
    for name, share in shares.items()
  )


def seeds(values: Sequence[float], mean: float, low: float, high: float) -> str:
  """Draws a dot per seed and a stroke at their mean, on the scale of all rows."""

  def x(value: float) -> float:
    return 5 + 110 * (value - low) / ((high - low) or 1)

  dots = "".join(f'<circle cx="{x(v):.1f}" cy="8" r="3"/>' for v in values)
  words = ", ".join(f"{value:.4f}" for value in values)
  return (
    f'<svg class="seeds" viewBox="0 0 120 16" role="img" aria-label="{words}">'
    f'<path d="M5 8H115"/>{dots}<path class="mean" d="M{x(mean):.1f} 2V14"/></svg>'
  )


class _Axis:
  """A vertical axis: numbers by size, other values by their order."""

  def __init__(self, name: str, texts: Sequence[str]):
    self._name = name
    distinct = list(dict.fromkeys(texts))
    numbers = [number(text) for text in distinct]
    self._is_number = None not in numbers and len(distinct) > 1
    self._order: Sequence[str] = (
      sorted(distinct, key=float) if self._is_number else sorted(distinct)
    )
    self._places = {text: self._place(text) for text in distinct}
    self._texts = texts

  def y(self, row_number: int) -> float:
    """Returns the height of a row's value."""
    return self._places[self._texts[row_number]]

  def svg(self, x: float) -> str:
    """Draws the axis with its name and as many values as fit."""
    shown = self._order
    if len(shown) > 6:
      shown = [shown[0], shown[-1]]
    base = _HEIGHT - _BOTTOM
    labels = "".join(
      f'<text class="halo" x="{x + 5}" y="{self._places[text] + 4:.1f}">'
      f"{html.escape(short_value(text))}</text>"
      for text in shown
    )
    return (
      f'<path class="axis" d="M{x} {_TOP}V{base}"/>'
      f'<text class="name" x="{x}" y="14" text-anchor="middle">'
      f"{html.escape(self._name)}</text>{labels}"
    )

  def _place(self, text: str) -> float:
    if self._is_number:
      low, high = float(self._order[0]), float(self._order[-1])
      share = (float(text) - low) / (high - low)
    else:
      share = (self._order.index(text) + 0.5) / len(self._order)
    return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (1 - share)


def _axis_x(number: int) -> float:
  return _AXIS_WIDTH * (number + 0.5)


def _share(row_number: int, rows: Sequence[SweepRow]) -> float:
  """Returns the opacity of a row's line, higher for better rows."""
  last = max(len(rows) - 1, 1)
  return _BEST - (_BEST - _OTHERS) * row_number / last


def _words(row: SweepRow) -> str:
  settings = ", ".join(f"{name}={value}" for name, value in row.settings.items())
  return f"{row.mean:.4f}: {settings}"


def write_sweep_page(found: Sequence[SweepRow], spec: Spec, path: str) -> None:
  """Writes the sweep page.

  Args:
    found: best first.
    spec: the sweep file.
    path: of the page; links in it are relative to its folder.
  """
  folder = os.path.dirname(os.path.abspath(path))
  none = "<p>Nothing has finished.</p>"
  has_values = any(row.mean is not None for row in found)
  shares = bars(importances(found))
  page = _PAGE.substitute(
    title=html.escape(f"Sweep {spec.name}"),
    summary=html.escape(
      f"{_search_words(spec.options)}. {sweep_results.count_states(found)}."
    ),
    leaderboard=_leaderboard(found, spec.options, folder) if has_values else none,
    coordinates=parallel_coordinates(found, spec.options.metric)
    if has_values
    else none,
    importance=shares or "<tr><td>It takes two settings that differ.</td></tr>",
    failures=_failures(found),
  )
  filesystem.replace_file(path, page)


def _search_words(options: SweepOptions) -> str:
  goal = "highest" if options.goal == "maximize" else "lowest"
  repeats = f", {len(options.seeds)} seeds each" if options.seeds else ""
  return f"{options.method}{repeats}; the {goal} {options.metric} wins"


def _leaderboard(found: Sequence[SweepRow], options: SweepOptions, folder: str) -> str:
  swept = sweep_results.swept_names(found)
  short = [sweep_results.short_name(name, swept) for name in swept]
  heads = ["", options.metric, *short, "± over seeds", "seeds", "runs"]
  values = [value for row in found for value in row.values]
  lines = []
  for rank, row in enumerate(found, 1):
    if row.mean is None:
      continue
    spread = "" if row.spread is None else f"{row.spread:.4f}"
    settings = [
      sweep_results.short_value(row.settings.get(name, "-")) for name in swept
    ]
    cells = [
      str(rank),
      f"{row.mean:.4f}",
      *(html.escape(text) for text in settings),
      spread,
      seeds(row.values, row.mean, min(values), max(values)),
      _links(row, folder),
    ]
    lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
  head = "".join(f"<th>{html.escape(text)}</th>" for text in heads)
  return (
    f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
    f"<tbody>{''.join(lines)}</tbody></table></div>"
  )


def _links(row: SweepRow, folder: str) -> str:
  """Returns a link to the report of each run, or else the name of its folder."""
  links = []
  for run in row.runs:
    name = html.escape(
      run.point.run_id[:8] if run.point.seed is None else f"seed {run.point.seed}"
    )
    page = os.path.join(run.path, report_page.REPORT_FILE)
    if os.path.exists(page):
      target = html.escape(os.path.relpath(page, folder), quote=True)
      name = f'<a href="{target}">{name}</a>'
    links.append(name)
  return " ".join(links)


def _failures(found: Sequence[SweepRow]) -> str:
  lines = [
    f"<tr><td>{html.escape(str(run.point))}</td>"
    f'<td class="note">{html.escape(run.note)}</td></tr>'
    for row in found
    for run in row.runs
    if run.state == sweep_results.FAILED
  ]
  if not lines:
    return ""
  return f'<h2>Failed</h2><div class="scroll"><table>{"".join(lines)}</table></div>'


def open_sweep_folder(spec: Spec, folder: str) -> None:
  """Creates the folder, or checks that it has the same sweep.

  Args:
    spec: the sweep file.
    folder: is created if it is missing.

  Raises:
    UserError: it has another sweep, or cannot be written to.
  """
  said = _said(spec)
  path = os.path.join(folder, _SPEC_FILE)
  if os.path.exists(path):
    before = _read(path)
    lines = run_config.diff(_fixed(before), _fixed(said))
    if lines:
      more = [f"and {len(lines) - _NUM_SHOWN} more"] if len(lines) > _NUM_SHOWN else []
      raise UserError(
        f"{folder} holds another sweep: {'; '.join(lines[:_NUM_SHOWN] + more)}. Take "
        "another --sweep_dir; runs that are in both are not made twice."
      )
  try:
    os.makedirs(folder, exist_ok=True)
    filesystem.replace_file(path, json.dumps(said, indent=2))
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
    raise UserError(f"{path} is damaged (it has no object); remove it.")
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


def _said(spec: Spec) -> dict[str, str]:
  """Returns all values of the sweep file, by name."""
  options = {f"sweep.{k}": repr(v) for k, v in vars(spec.options).items()}
  swept = {name: repr(domain) for name, domain in spec.domains.items()}
  base = {s.key: repr(s.value) for s in spec.base if isinstance(s, Binding)}
  return {**base, **swept, **options}


def _fixed(said: Mapping[str, str]) -> dict[str, str]:
  return {name: value for name, value in said.items() if name not in _MAY_CHANGE}
