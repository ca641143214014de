"""Tables of what was measured: before and after training, and by class."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

from trainer.report import metric_names
from trainer.report.moments import BEFORE, LATEST, Moment, Value
from trainer.retrieval.evidence import Query

_HEADS = {BEFORE: "before training", LATEST: "after training"}
_NUM_WORST = 12
_BY_CLASS = ("recall_at_1", "map_at_r", "r_precision")
_RANGE_HEAD = '<th class="range" aria-hidden="true"><span><i>0</i><i>1</i></span></th>'


def results(moments: Mapping[str, Moment]) -> str:
  """The metrics of all moments with intervals and the change; empty without any.

  Args:
    moments: by name.
  """
  names = [name for moment in moments.values() for name in moment.values]
  first, others = metric_names.ordered(names)
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


def worst_classes(moment: Moment, shown: Sequence[Query]) -> str:
  """The classes that do worst; empty if they are not known.

  Args:
    moment: what was measured.
    shown: queries on the page, to be linked to.
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
  # A narrow screen may break it after the sign.
  return html.escape(metric_names.title(name)).replace("=", "=<wbr>")


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
  """The values that lie between 0 and 1; none if one doesn't."""
  values = {
    m: moment.values[name] for m, moment in moments.items() if name in moment.values
  }
  return values if all(value.is_share for value in values.values()) else {}


def _range(values: Mapping[str, Value]) -> str:
  """From 0 to 1: a ring before training, a dot and its interval after."""
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
