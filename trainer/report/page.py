"""`report.html`: the report page of a run."""

from __future__ import annotations

import html
import math
import os
import string
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import NamedTuple, Optional

from trainer.report import figures, measured_runs
from trainer.report.figures import short_number
from trainer.report.measured_runs import BEFORE, LATEST, Moment, Value
from trainer.retrieval.report_data import Confusion, Neighbour, ReportData, ShownQuery
from trainer.runtime import filesystem
from trainer.training.callbacks import MetricsFile

_HEADS = {BEFORE: "before training", LATEST: "after training"}
_NUM_WORST = 12
_BY_CLASS = ("recall_at_1", "map_at_r", "r_precision")
_RANGE_HEAD = '<th class="range" aria-hidden="true"><span><i>0</i><i>1</i></span></th>'

REPORT_FILE = "report.html"
_NUM_QUERIES = "eval/num_queries"


class Section(NamedTuple):
  """One section of a page.

  Attributes:
    name: its title, from which its anchor is made.
    content: HTML; an empty section is left out.
  """

  name: str
  content: str

  @property
  def place(self) -> str:
    """Its anchor in the page."""
    return self.name.lower().replace(" ", "-")


def write_document(
  path: str, title: str, summary: str, sections: Sequence[Section]
) -> None:
  """Writes a page atomically.

  Args:
    path: of the file.
    title: plain text.
    summary: HTML below the title.
    sections: in order.
  """
  there = [section for section in sections if section.content]
  page = string.Template(_asset("document.html")).substitute(
    title=html.escape(title),
    style=_asset("document.css"),
    script=_asset("document.js"),
    summary=summary,
    links="".join(f'<a href="#{s.place}">{html.escape(s.name)}</a>' for s in there),
    sections="\n".join(_section(section) for section in there),
  )
  filesystem.replace_file(path, page)


def _section(section: Section) -> str:
  heading = f'<h2 id="{section.place}-title">{html.escape(section.name)}</h2>'
  return (
    f'<section id="{section.place}" aria-labelledby="{section.place}-title">'
    f"{heading}{section.content}</section>"
  )


def _asset(name: str) -> str:
  return resources.files("trainer.report").joinpath(name).read_text(encoding="utf-8")


def results_table(moments: Mapping[str, Moment]) -> str:
  """Returns a table of all metrics with intervals and change; empty without metrics.

  Args:
    moments: by name.
  """
  names = [name for moment in moments.values() for name in moment.values]
  first, others = measured_runs.ordered_metrics(names)
  if not first + others:
    return ""
  table = _table(moments, first)
  if any(
    value.interval for moment in moments.values() for value in moment.values.values()
  ):
    table += (
      "<p>In small print and as bars: 95% intervals, by bootstrap over queries.</p>"
    )
  if others:
    table += f"<details><summary>{len(others)} more figures</summary>"
    table += f"{_table(moments, others)}</details>"
  return table


def worst_classes_table(moment: Moment, shown: Sequence[ShownQuery]) -> str:
  """Returns a table of the worst classes; empty if they are unknown.

  Args:
    moment: the evaluation.
    shown: queries on the page, as link targets.
  """
  rows = moment.worst_classes[:_NUM_WORST]
  if not rows:
    return ""
  item_of = {query.class_name: query.item for query in reversed(shown)}
  keys = [key for key in _BY_CLASS if key in rows[0]]
  heads = "".join(f"<th scope=col>{_title(key)}</th>" for key in keys)
  lines = []
  for row in rows:
    name = html.escape(str(row["class"]))
    if str(row["class"]) in item_of:
      name = f'<a href="#query-{item_of[str(row["class"])]}">{name}</a>'
    cells = "".join(f"<td>{_number(row.get(key))}</td>" for key in keys)
    lines.append(
      f"<tr><th scope=row>{name}</th><td>{row['num_queries']:,}</td>{cells}</tr>"
    )
  return (
    '<h3>Worst classes</h3><div class="scroll"><table><thead><tr><th scope=col>class'
    f"</th><th scope=col>queries</th>{heads}</tr></thead>"
    f"<tbody>{''.join(lines)}</tbody></table></div>"
  )


def _number(value: float | None) -> str:
  is_known = value is not None and math.isfinite(value)
  return f"{value:.4f}" if is_known else "&ndash;"


def _title(name: str) -> str:
  # Narrow screens may break the line after the sign.
  return html.escape(measured_runs.metric_title(name)).replace("=", "=<wbr>")


def _table(moments: Mapping[str, Moment], names: Sequence[str]) -> str:
  heads = "".join(f"<th scope=col>{_HEADS[moment]}</th>" for moment in moments)
  has_change = len(moments) == 2
  has_range = any(_shares(moments, name) for name in names)
  heads += "<th scope=col>change</th>" if has_change else ""
  heads += _RANGE_HEAD if has_range else ""
  rows = "".join(_row(moments, name, has_change, has_range) for name in names)
  return (
    '<div class="scroll"><table class="results"><thead><tr><th scope=col></th>'
    f"{heads}</tr></thead><tbody>{rows}</tbody></table></div>"
  )


def _row(
  moments: Mapping[str, Moment], name: str, has_change: bool, has_range: bool
) -> str:
  values = {m: moment.values.get(name) for m, moment in moments.items()}
  cells = "".join(f"<td>{_cell(v, m == LATEST)}</td>" for m, v in values.items())
  if has_change:
    before, after = values[BEFORE], values[LATEST]
    change = after.value - before.value if before and after else None
    is_worse = change is not None and change < 0 and _shares(moments, name)
    kind = ' class="worse"' if is_worse else ""
    cells += f"<td{kind}>{_change(change)}</td>"
  if has_range:
    cells += f'<td class="range">{_range(_shares(moments, name))}</td>'
  return f"<tr><th scope=row>{_title(name)}</th>{cells}</tr>"


def _cell(value: Value | None, is_latest: bool) -> str:
  if value is None:
    return "&ndash;"
  text = f"<b>{value.text()}</b>" if is_latest else value.text()
  interval = value.interval_text("&ndash;")
  return text + (f"<small>{interval}</small>" if interval else "")


def _change(change: float | None) -> str:
  if change is None:
    return "&ndash;"
  text = f"{change:+.4f}" if isinstance(change, float) else f"{change:+,}"
  return text.replace("-", "&minus;")


def _shares(moments: Mapping[str, Moment], name: str) -> dict[str, Value]:
  """Returns the values if all are between 0 and 1, otherwise none."""
  values = {
    m: moment.values[name] for m, moment in moments.items() if name in moment.values
  }
  return values if all(value.is_share for value in values.values()) else {}


def _range(values: Mapping[str, Value]) -> str:
  """Draws a scale from 0 to 1: a ring before training, a dot and interval after."""
  parts = []
  for moment, value in values.items():
    if moment == LATEST and value.interval:
      low, high = value.interval
      parts.append(
        f'<span class="interval" style="left:{low:.2%};width:{high - low:.2%}"></span>'
      )
    kind = "dot" if moment == LATEST else "dot before"
    parts.append(f'<span class="{kind}" style="left:{value.value:.2%}"></span>')
  return f'<i aria-hidden="true">{"".join(parts)}</i>' if parts else ""


def query_grid(evidence: ReportData) -> str:
  """Returns one row per query: itself, then its neighbours, framed by correctness.

  Args:
    evidence: with the shown queries and their pictures.
  """
  rows = "".join(_query(query, evidence.pictures) for query in evidence.queries)
  num_mistakes = sum(query.is_mistake for query in evidence.queries)
  return (
    f"<p>{num_mistakes} whose nearest neighbour is wrong, with the most wrong ones "
    f"first, then {len(evidence.queries) - num_mistakes} others; drawn at random, and "
    "with an example of each confused pair. A thick frame marks a neighbour of another "
    "class, which is named below it.</p>"
    f'<div class="queries">{rows}</div>'
  )


def confusion_grid(found: Sequence[Confusion], pictures: Mapping[str, str]) -> str:
  """Returns the most confused pairs, each with an example; empty if there are none.

  Args:
    found: the most frequent first.
    pictures: data URIs by item.
  """
  rows = "".join(_confusion(each, pictures) for each in found)
  return f'<ul class="confusions">{rows}</ul>' if rows else ""


def _query(query: ShownQuery, pictures: Mapping[str, str]) -> str:
  num_right = sum(n.is_right for n in query.neighbours)
  name = html.escape(query.class_name)
  asked = (
    f'<li class="asked"><span class="frame">'
    f"{_picture(query.item, f'query, {query.class_name}', pictures)}</span></li>"
  )
  answers = "".join(
    _answer(neighbour, i, pictures) for i, neighbour in enumerate(query.neighbours)
  )
  return (
    f'<article class="query" id="query-{query.item}"><h3>{name} '
    f"<small>{num_right} of {len(query.neighbours)} right</small>"
    f'<a href="#item-{query.item}">on the map</a></h3>'
    f'<ol class="answers">{asked}{answers}</ol></article>'
  )


def _answer(neighbour: Neighbour, rank: int, pictures: Mapping[str, str]) -> str:
  judgement = "right" if neighbour.is_right else "wrong"
  words = (
    f"{neighbour.class_name}, {judgement}, distance {short_number(neighbour.distance)}"
  )
  name = (
    "" if neighbour.is_right else f"<small>{html.escape(neighbour.class_name)}</small>"
  )
  return (
    f'<li class="{judgement}" tabindex="{-1 if rank else 0}" '
    f'data-words="{html.escape(words, quote=True)}"><span class="frame">'
    f"{_picture(neighbour.item, words, pictures)}</span>{name}</li>"
  )


def _confusion(confusion: Confusion, pictures: Mapping[str, str]) -> str:
  shown = (
    _picture(confusion.query, confusion.class_name, pictures),
    _picture(confusion.neighbour, confusion.taken_for, pictures),
  )
  return (
    f'<li><a href="#query-{confusion.query}">{"".join(shown)}'
    f"<span><b>{html.escape(confusion.class_name)}</b> taken for "
    f"<b>{html.escape(confusion.taken_for)}</b>"
    f"<small>{confusion.num_mistakes:,} of {confusion.num_queries:,} queries, "
    f"{_share(confusion.num_mistakes / confusion.num_queries)}</small></span></a></li>"
  )


def _share(share: float) -> str:
  return "under 0.1%" if share < 0.001 else f"{share:.1%}"


def _picture(item: int, words: str, pictures: Mapping[str, str]) -> str:
  words = html.escape(words, quote=True)
  picture = pictures.get(str(item))
  if picture is None:
    return f'<span class="nopicture">{words.split(",")[0]}</span>'
  return f'<img class="item small" src="{picture}" alt="{words}">'


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
  measured = measured_runs.read_moments(model_dir)
  evidence = ReportData.read(model_dir)
  curves = figures.training_figures({"": list(MetricsFile(model_dir).rows())})
  path = os.path.join(model_dir, REPORT_FILE)
  write_document(
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


def _summary(
  measured: dict[str, measured_runs.Moment], evidence: Optional[ReportData]
) -> str:
  if measured_runs.LATEST not in measured:
    return "<p>Not measured yet.</p>"
  latest = measured[measured_runs.LATEST]
  words = [f"Trained for {latest.step:,} steps."]
  asked, first = latest.values.get(_NUM_QUERIES), latest.values.get("eval/recall_at_1")
  if asked and first:
    classes = f" of {evidence.num_classes:,} classes" if evidence else ""
    words.append(
      f"Of {asked.value:,} queries{classes} never seen in training, {first.value:.1%} "
      "find their own class first."
    )
  return f"<p>{' '.join(words)}</p>"


def _results(
  measured: dict[str, measured_runs.Moment], evidence: Optional[ReportData]
) -> str:
  parts = [results_table(measured)]
  if evidence is not None:
    recall = figures.recall_figure({"": evidence.recall_at})
    histogram = figures.histogram_figure(evidence.histogram)
    parts.append(f'<div class="pair tall">{recall}{histogram}</div>')
  if measured_runs.LATEST in measured:
    shown = evidence.queries if evidence else ()
    parts.append(worst_classes_table(measured[measured_runs.LATEST], shown))
  return "".join(parts)


def _evidence_sections(
  measured: dict[str, measured_runs.Moment], evidence: Optional[ReportData]
) -> list[Section]:
  if evidence is None:
    return []
  asked = _asked(measured, evidence)
  pairs = confusion_grid(evidence.confusions, evidence.pictures)
  placed = figures.embedding_map(evidence.embedding_map, evidence.num_items)
  return [
    Section(
      "Confused classes",
      f"<p>{asked}: {evidence.num_mistakes:,} have a nearest neighbour of another "
      f"class. The most frequent pairs:</p>{pairs}"
      if pairs
      else f"<p>{asked}: none has a nearest neighbour of another class.</p>",
    ),
    Section("Queries", query_grid(evidence)),
    Section("Map", placed),
  ]


def _asked(measured: dict[str, measured_runs.Moment], evidence: ReportData) -> str:
  """Returns a text on the queries that the evidence covers."""
  num = f"{evidence.num_queries:,}"
  known = (
    measured[measured_runs.LATEST].values if measured_runs.LATEST in measured else {}
  )
  if _NUM_QUERIES in known and known[_NUM_QUERIES].value > evidence.num_queries:
    return f"{num} of {known[_NUM_QUERIES].value:,} queries, drawn at random"
  return f"{num} queries"
