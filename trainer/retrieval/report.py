"""`report.html`: results, curves and configuration of a run in one page.

The page is one file, asks nothing of any network, and is light or dark as its reader's
screen is.
"""

from __future__ import annotations

import html
import os
import string
from collections.abc import Sequence

from trainer.loop.metrics_file import MetricsFile
from trainer.retrieval.results import Results

FILE_NAME = "report.html"
# Metrics drawn, each with its title; those that a run doesn't log are left out.
_CURVES = {
  "train/loss": "Loss",
  "mining/active_fraction": "Active fraction",
  "mining/hardest_positive_distance": "Mean distance of the hardest positive",
  "mining/hardest_negative_distance": "Mean distance of the hardest negative",
  "mining/hard_fraction": "Share of hard triplets",
  "mining/embedding_rank": "Effective rank of the embeddings",
  "mining/embedding_norm": "Mean norm of the embeddings",
  "train/learning_rate": "Learning rate",
  "train/images_per_second": "Images per second",
}
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 360, 170, 52, 22

_PAGE = string.Template("""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; --ink: #1d2430; --soft: #667085; --line: #d5dae2;
  --page: #ffffff; --card: #f6f7f9; --curve: #0b62d6; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --soft: #98a2b3;
  --line: #333a47; --page: #14171c; --card: #1b2027; --curve: #6ea8ff; } }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 72rem; color: var(--ink);
  background: var(--page); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem 1rem .3rem 0; text-align: right;
  border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
.curves { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); }
figure { margin: 0; padding: .75rem; background: var(--card); border-radius: .5rem; }
figcaption { font-size: .9rem; } figcaption b { float: right; font-weight: 600; }
svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--soft); font-size: 11px; }
.axis { stroke: var(--line); } .curve { stroke: var(--curve); stroke-width: 1.6;
  fill: none; vector-effect: non-scaling-stroke; }
pre { padding: .75rem; overflow-x: auto; background: var(--card); border-radius: .5rem;
  font-size: .85rem; }
</style>
<h1>$title</h1>
<h2>Retrieval on classes never seen in training</h2>
$results
<h2>Training</h2>
<div class="curves">$curves</div>
<h2>Configuration</h2>
<pre>$config</pre>
</html>
""")


def write(model_dir: str) -> str:
  """Writes the report from what the run's folder holds.

  Args:
    model_dir: folder of the run.

  Returns:
    Path of the page.
  """
  with open(os.path.join(model_dir, "config.gin"), encoding="utf-8") as file:
    config = file.read()
  page = _PAGE.substitute(
    title=html.escape(os.path.basename(os.path.abspath(model_dir))),
    results=_results_table(Results(model_dir)),
    curves="".join(_figures(list(MetricsFile(model_dir).rows()))),
    config=html.escape(config),
  )
  path = os.path.join(model_dir, FILE_NAME)
  with open(path, "w", encoding="utf-8") as file:
    file.write(page)
  return path


def _results_table(results: Results) -> str:
  head, *rows = results.rows()
  cells = ["<tr>" + "".join(f"<th>{html.escape(c)}</th>" for c in head) + "</tr>"]
  cells += [
    "<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in r) + "</tr>" for r in rows
  ]
  return f"<table>{''.join(cells)}</table>"


def _figures(rows: Sequence[dict[str, float]]) -> list[str]:
  figures = []
  for name, title in _CURVES.items():
    points = [(row["step"], row[name]) for row in rows if name in row]
    if points:
      last = _short(points[-1][1])
      caption = f"<figcaption>{title} <b>{last}</b></figcaption>"
      figures.append(f"<figure>{caption}{_curve(points, title)}</figure>")
  return figures


def _curve(points: Sequence[tuple[float, float]], title: str) -> str:
  """The points as a line in SVG, with the ends of both axes written out."""
  steps, values = zip(*points)
  low, high = min(values), max(values)
  span_x = (steps[-1] - steps[0]) or 1
  span_y = (high - low) or 1
  width, height = _WIDTH - _LEFT - 6, _HEIGHT - _BOTTOM - 8
  places = [
    (
      _LEFT + width * (step - steps[0]) / span_x,
      8 + height * (1 - (value - low) / span_y),
    )
    for step, value in points
  ]
  line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
  base = 8 + height
  return (
    f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{title} by step">'
    f'<path class="axis" d="M{_LEFT} 8V{base}H{_WIDTH - 6}" fill="none"/>'
    f'<text x="{_LEFT - 6}" y="16" text-anchor="end">{_short(high)}</text>'
    f'<text x="{_LEFT - 6}" y="{base}" text-anchor="end">{_short(low)}</text>'
    f'<text x="{_LEFT}" y="{_HEIGHT - 6}">step {steps[0]:,}</text>'
    f'<text x="{_WIDTH - 6}" y="{_HEIGHT - 6}" text-anchor="end">{steps[-1]:,}</text>'
    f'<polyline class="curve" points="{line}"/></svg>'
  )


def _short(value: float) -> str:
  return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
