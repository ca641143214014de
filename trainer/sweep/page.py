"""`sweep.html`: the results of a sweep on one page that needs no network."""

from __future__ import annotations

import html
import os
import string
from collections.abc import Sequence

from trainer.data import paths
from trainer.report import page as report_page
from trainer.sweep import charts, rows, table
from trainer.sweep.importance import importances
from trainer.sweep.rows import Row
from trainer.sweep.spec import Options, Spec

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


def write(found: Sequence[Row], spec: Spec, path: str) -> None:
  """Writes the page.

  Args:
    found: best first.
    spec: the sweep file.
    path: of the page; links in it are relative to its folder.
  """
  folder = os.path.dirname(os.path.abspath(path))
  none = "<p>Nothing has finished.</p>"
  has_values = any(row.mean is not None for row in found)
  shares = charts.bars(importances(found))
  page = _PAGE.substitute(
    title=html.escape(f"Sweep {spec.name}"),
    summary=html.escape(f"{_search_words(spec.options)}. {table.counts(found)}."),
    leaderboard=_leaderboard(found, spec.options, folder) if has_values else none,
    coordinates=charts.parallel_coordinates(found, spec.options.metric)
    if has_values
    else none,
    importance=shares or "<tr><td>It takes two settings that differ.</td></tr>",
    failures=_failures(found),
  )
  paths.replace_file(path, page)


def _search_words(options: Options) -> str:
  goal = "highest" if options.goal == "maximize" else "lowest"
  repeats = f", {len(options.seeds)} seeds each" if options.seeds else ""
  return f"{options.method}{repeats}; the {goal} {options.metric} wins"


def _leaderboard(found: Sequence[Row], options: Options, folder: str) -> str:
  swept = rows.names(found)
  short = [rows.short_name(name, swept) for name in swept]
  heads = ["", options.metric, *short, "± over seeds", "seeds", "runs"]
  values = [value for row in found for value in row.values]
  lines = []
  for rank, row in enumerate(found, 1):
    if row.mean is None:
      continue
    spread = "" if row.spread is None else f"{row.spread:.4f}"
    settings = [rows.short_value(row.settings.get(name, "-")) for name in swept]
    cells = [
      str(rank),
      f"{row.mean:.4f}",
      *(html.escape(text) for text in settings),
      spread,
      charts.seeds(row.values, row.mean, min(values), max(values)),
      _links(row, folder),
    ]
    lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
  head = "".join(f"<th>{html.escape(text)}</th>" for text in heads)
  return (
    f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
    f"<tbody>{''.join(lines)}</tbody></table></div>"
  )


def _links(row: Row, folder: str) -> str:
  """The report of each run that has one; the name of its folder otherwise."""
  links = []
  for run in row.runs:
    name = html.escape(
      run.point.run_id[:8] if run.point.seed is None else f"seed {run.point.seed}"
    )
    page = os.path.join(run.path, report_page.FILE_NAME)
    if os.path.exists(page):
      target = html.escape(os.path.relpath(page, folder), quote=True)
      name = f'<a href="{target}">{name}</a>'
    links.append(name)
  return " ".join(links)


def _failures(found: Sequence[Row]) -> str:
  lines = [
    f"<tr><td>{html.escape(str(run.point))}</td>"
    f'<td class="note">{html.escape(run.note)}</td></tr>'
    for row in found
    for run in row.runs
    if run.state == rows.FAILED
  ]
  if not lines:
    return ""
  return f'<h2>Failed</h2><div class="scroll"><table>{"".join(lines)}</table></div>'
