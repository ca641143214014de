"""`report.html`: what a run's folder tells, on one page."""

from __future__ import annotations

import html
import os
from typing import Optional

from trainer.loop.metrics_file import MetricsFile
from trainer.report import (
  distance_figures,
  document,
  map_figure,
  moments,
  neighbour_grid,
  results_table,
  runs,
  training_curves,
)
from trainer.report.document import Section
from trainer.retrieval.evidence import Evidence

FILE_NAME = "report.html"
_NUM_QUERIES = "eval/num_queries"


def write(model_dir: str) -> str:
  """Writes the report from what the run's folder holds.

  Args:
    model_dir: folder of the run.

  Returns:
    Path of the page.

  Raises:
    UserError: the folder holds no run, or a damaged one.
  """
  config = runs.read_config(model_dir)
  measured = moments.read(model_dir)
  evidence = Evidence.read(model_dir)
  curves = training_curves.figures({"": list(MetricsFile(model_dir).rows())})
  path = os.path.join(model_dir, FILE_NAME)
  document.write(
    path,
    title=os.path.basename(os.path.abspath(model_dir)),
    summary=_summary(measured, evidence),
    sections=[
      Section("Results", _results(measured, evidence)),
      *_evidence_sections(measured, evidence),
      Section("Training", curves),
      Section("Configuration", f'<pre tabindex="0">{html.escape(config)}</pre>'),
    ],
  )
  return path


def _summary(measured: dict[str, moments.Moment], evidence: Optional[Evidence]) -> str:
  if moments.LATEST not in measured:
    return "<p>Not measured yet.</p>"
  latest = measured[moments.LATEST]
  words = [f"Trained for {latest.step:,} steps."]
  asked, first = latest.values.get(_NUM_QUERIES), latest.values.get("eval/recall_at_1")
  if asked and first:
    classes = f" of {evidence.num_classes:,} classes" if evidence else ""
    words.append(
      f"Of {asked.value:,} queries{classes} never seen in training, {first.value:.1%} "
      "find their own class first."
    )
  return f"<p>{' '.join(words)}</p>"


def _results(measured: dict[str, moments.Moment], evidence: Optional[Evidence]) -> str:
  parts = [results_table.results(measured)]
  if evidence is not None:
    recall = distance_figures.recall_curves({"": evidence.recall_at})
    histogram = distance_figures.histogram(evidence.histogram)
    parts.append(f'<div class="pair tall">{recall}{histogram}</div>')
  if moments.LATEST in measured:
    shown = evidence.queries if evidence else ()
    parts.append(results_table.worst_classes(measured[moments.LATEST], shown))
  return "".join(parts)


def _evidence_sections(
  measured: dict[str, moments.Moment], evidence: Optional[Evidence]
) -> list[Section]:
  if evidence is None:
    return []
  asked = _asked(measured, evidence)
  pairs = neighbour_grid.confusions(evidence.confusions, evidence.pictures)
  placed = map_figure.embedding_map(evidence.embedding_map, evidence.num_items)
  return [
    Section(
      "Confused classes",
      f"<p>{asked}: {evidence.num_mistakes:,} have a nearest neighbour of another "
      f"class. The most frequent pairs:</p>{pairs}"
      if pairs
      else f"<p>{asked}: none has a nearest neighbour of another class.</p>",
    ),
    Section("Queries", neighbour_grid.queries(evidence)),
    Section("Map", placed),
  ]


def _asked(measured: dict[str, moments.Moment], evidence: Evidence) -> str:
  """Which queries the evidence is of."""
  num = f"{evidence.num_queries:,}"
  known = measured[moments.LATEST].values if moments.LATEST in measured else {}
  if _NUM_QUERIES in known and known[_NUM_QUERIES].value > evidence.num_queries:
    return f"{num} of {known[_NUM_QUERIES].value:,} queries, drawn at random"
  return f"{num} queries"
