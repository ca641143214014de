"""Several runs side by side, as a page of the same look as a run's own."""

from __future__ import annotations

import html
import os
from collections.abc import Sequence

from trainer.report import (
  comparison,
  distance_figures,
  document,
  metric_names,
  training_curves,
)
from trainer.report import page as report_page
from trainer.report.document import Section
from trainer.report.runs import MeasuredRun, differing_paths


def write(runs: Sequence[MeasuredRun], path: str) -> None:
  """Writes the page.

  Args:
    runs: two or more.
    path: of the page; links in it are relative to its folder.
  """
  recall = distance_figures.recall_curves(
    {run.name: run.evidence.recall_at for run in runs if run.evidence}
  )
  rows_by_run = {run.name: run.rows for run in runs}
  folder = os.path.dirname(os.path.abspath(path))
  document.write(
    path,
    title=f"{len(runs)} runs compared",
    summary=f"<p>{html.escape(', '.join(run.name for run in runs))}</p>",
    sections=[
      Section(
        "Results",
        _results(runs, folder) + (recall and f'<div class="pair tall">{recall}</div>'),
      ),
      Section("Training", training_curves.figures(rows_by_run)),
      Section("Configuration", _differences(runs)),
    ],
  )


def _results(runs: Sequence[MeasuredRun], folder: str) -> str:
  first, others = metric_names.ordered([n for run in runs for n in run.latest.values])
  table = _table(runs, first, folder)
  if any(value.interval for run in runs for value in run.latest.values.values()):
    table += "<p>In small print: 95% intervals, by bootstrap over queries.</p>"
  if others:
    table += f"<details><summary>{len(others)} more figures</summary>"
    table += f"{_table(runs, others, folder, has_best=False)}</details>"
  return table


def _table(
  runs: Sequence[MeasuredRun], names: Sequence[str], folder: str, has_best: bool = True
) -> str:
  """A row a run; the best value of a column is bold."""
  heads = "".join(
    f"<th scope=col>{html.escape(metric_names.title(name))}</th>" for name in names
  )
  winners = {name: comparison.best(runs, name) if has_best else set() for name in names}
  lines = []
  for number, run in enumerate(runs):
    cells = "".join(_cell(run, name, run.name in winners[name]) for name in names)
    lines.append(
      f'<tr><th scope=row><span class="key" style="--color:var(--c{number % 10})">'
      f"</span>{_link(run, folder)}</th><td>{run.latest.step:,}</td>{cells}</tr>"
    )
  return (
    '<div class="scroll" tabindex="0" role="group" aria-label="Results"><table '
    f'class="runs"><thead><tr><th scope=col>run</th><th scope=col>step</th>{heads}'
    f"</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
  )


def _cell(run: MeasuredRun, name: str, is_best: bool) -> str:
  value = run.latest.values.get(name)
  if value is None:
    return "<td>&ndash;</td>"
  text = f"<b>{value.text()}</b>" if is_best else value.text()
  interval = value.interval_text("&ndash;")
  return f"<td>{text}{interval and f'<small>{interval}</small>'}</td>"


def _link(run: MeasuredRun, folder: str) -> str:
  """The run's name, as a link to its report if it has one."""
  page = os.path.join(run.model_dir, report_page.FILE_NAME)
  name = html.escape(run.name)
  if not os.path.exists(page):
    return name
  target = html.escape(os.path.relpath(page, folder).replace(os.sep, "/"), quote=True)
  return f'<a href="{target}">{name}</a>'


def _differences(runs: Sequence[MeasuredRun]) -> str:
  differing = differing_paths(runs)
  if not differing:
    return "<p>The configs are the same.</p>"
  heads = "".join(f"<th scope=col>{html.escape(run.name)}</th>" for run in runs)
  lines = []
  for path in differing:
    values = [run.config.get(path, comparison.UNSET) for run in runs]
    cells = "".join(
      f'<td class="text"><code>{html.escape(value)}</code></td>' for value in values
    )
    lines.append(f"<tr><th scope=row><code>{html.escape(path)}</code></th>{cells}</tr>")
  return (
    "<p>Only what differs.</p>"
    '<div class="scroll" tabindex="0" role="group" aria-label="Configuration"><table '
    f'class="config"><thead><tr><th scope=col></th>{heads}</tr></thead>'
    f"<tbody>{''.join(lines)}</tbody></table></div>"
  )
