"""`report.html`, the report page of a run, and the templates of all pages."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Mapping
from typing import Any, Optional

import jinja2

from trainer.report import figures, measured_runs
from trainer.report.measured_runs import BEFORE, LATEST, Moment, Value
from trainer.retrieval.report_data import ReportData
from trainer.runtime import filesystem
from trainer.training.callbacks import MetricsFile

REPORT_FILE = "report.html"
_HEADINGS = {BEFORE: "before training", LATEST: "after training"}
_NUM_WORST = 12
_BY_CLASS = ("recall_at_1", "map_at_r", "r_precision")
_NUM_QUERIES = "eval/num_queries"
_MISSING = "\N{EN DASH}"


def write_document(path: str, template: str, **values: Any) -> None:
  """Writes a page atomically.

  Args:
    path: of the file.
    template: its path in the package; all values are escaped.
    **values: names of the template.
  """
  filesystem.replace_file(path, _templates().get_template(template).render(values))


def report_link(model_dir: str, folder: str) -> Optional[str]:
  """Returns the relative address of a run's report; None if there is none.

  Args:
    model_dir: folder of the run.
    folder: of the page with the link.
  """
  page = os.path.join(model_dir, REPORT_FILE)
  if not os.path.exists(page):
    return None
  return os.path.relpath(page, folder).replace(os.sep, "/")


@functools.cache
def _templates() -> jinja2.Environment:
  templates = jinja2.Environment(
    loader=jinja2.PackageLoader("trainer", "."),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
  )
  templates.filters.update(
    anchor=lambda heading: heading.lower().replace(" ", "-"),
    four_digits=_four_digits,
    metric_title=measured_runs.metric_title,
    short_number=figures.short_number,
    thousands="{:,}".format,
  )
  return templates


def _four_digits(value: Optional[float]) -> str:
  is_known = value is not None and math.isfinite(value)
  return f"{value:.4f}" if is_known else _MISSING


@dataclasses.dataclass(frozen=True)
class _MetricRow:
  """A metric before and after training.

  Attributes:
    name: of the metric.
    by_moment: its values; None where it was not measured.
  """

  name: str
  by_moment: Mapping[str, Optional[Value]]

  @property
  def shares(self) -> dict[str, Value]:
    """The values if all are between 0 and 1, otherwise none."""
    known = {m: value for m, value in self.by_moment.items() if value is not None}
    return known if all(value.is_share for value in known.values()) else {}

  @property
  def is_worse(self) -> bool:
    """Whether a share has decreased."""
    return bool(self.shares and (self._change or 0) < 0)

  @property
  def change_text(self) -> str:
    """The change by training, with its sign."""
    if self._change is None:
      return _MISSING
    number_format = "+.4f" if isinstance(self._change, float) else "+,"
    return format(self._change, number_format).replace("-", "\N{MINUS SIGN}")

  @property
  def _change(self) -> Optional[float]:
    before, after = self.by_moment.get(BEFORE), self.by_moment.get(LATEST)
    return after.value - before.value if before and after else None


def write_page(model_dir: str) -> str:
  """Writes the report from the files in a run's folder.

  Args:
    model_dir: folder of the run.

  Returns:
    Path of the page.

  Raises:
    UserError: the folder has no run, or a damaged one.
  """
  config = measured_runs.read_config(model_dir)
  moments = measured_runs.read_moments(model_dir)
  report_data = ReportData.read(model_dir)
  path = os.path.join(model_dir, REPORT_FILE)
  write_document(
    path,
    "report/run.html",
    title=os.path.basename(os.path.abspath(model_dir)),
    summary=_summary(moments.get(LATEST), report_data),
    config=config,
    training=figures.training_plots({"": list(MetricsFile(model_dir).rows())}),
    **_metrics(moments),
    **_worst_classes(moments.get(LATEST), report_data),
    report_data=report_data,
    **(_report_values(moments.get(LATEST), report_data) if report_data else {}),
  )
  return path


def _summary(latest: Optional[Moment], report_data: Optional[ReportData]) -> str:
  if latest is None:
    return "Not measured yet."
  words = f"Trained for {latest.step:,} steps."
  num_queries, recall = map(latest.values.get, (_NUM_QUERIES, "eval/recall_at_1"))
  if num_queries and recall:
    classes = f" of {report_data.num_classes:,} classes" if report_data else ""
    words += (
      f" Of {num_queries.value:,} queries{classes} never seen in training, "
      f"{recall.value:.1%} find their own class first."
    )
  return words


def _metrics(moments: Mapping[str, Moment]) -> dict[str, Any]:
  """Returns values of the template: the rows of the tables of metrics."""
  values = [value for moment in moments.values() for value in moment.values.items()]
  main, others = (
    [
      _MetricRow(name, {m: moment.values.get(name) for m, moment in moments.items()})
      for name in names
    ]
    for names in measured_runs.ordered_metrics(name for name, _ in values)
  )
  return {
    "moments": moments,
    "headings": _HEADINGS,
    "main_metrics": main,
    "other_metrics": others,
    "has_intervals": any(value.interval for _, value in values),
  }


def _worst_classes(
  latest: Optional[Moment], report_data: Optional[ReportData]
) -> dict[str, Any]:
  """Returns values of the template: worst classes, with links to shown queries."""
  rows = latest.worst_classes[:_NUM_WORST] if latest else []
  shown = report_data.queries if report_data else ()
  return {
    "worst_classes": rows,
    "class_metrics": [key for key in _BY_CLASS if rows and key in rows[0]],
    "query_of": {query.class_name: query.item for query in reversed(shown)},
  }


def _report_values(latest: Optional[Moment], report_data: ReportData) -> dict[str, Any]:
  """Returns values of the template: figures, and the number of queries covered."""
  coverage = f"{report_data.num_queries:,}"
  num_queries = latest.values.get(_NUM_QUERIES) if latest else None
  if num_queries and num_queries.value > report_data.num_queries:
    coverage += f" of {num_queries.value:,} queries, drawn at random"
  else:
    coverage += " queries"
  return {
    "coverage": coverage,
    "layout": figures.MapLayout(report_data.embedding_map),
    "plots": [
      figures.recall_plot({"": report_data.recall_at}),
      figures.histogram_plot(report_data.histogram),
    ],
  }
