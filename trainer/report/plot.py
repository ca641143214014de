"""Curves in a frame, with the values at the place that is pointed at."""

from __future__ import annotations

import dataclasses
import html
import json
import math
from collections.abc import Sequence
from typing import Optional

from trainer.report.axes import Axis, short

# Of longer curves the lowest and the highest point of each stretch are drawn.
_MAX_POINTS = 400
_COLORS = 10


@dataclasses.dataclass(frozen=True)
class Series:
  """One curve.

  Attributes:
    name: told beside its values; empty where a plot has one curve.
    points: x and y, by ascending x.
    kind: "curve", or "bars" for a filled outline.
    color: number of its colour; None for its place among the curves.
  """

  name: str
  points: Sequence[tuple[float, float]]
  kind: str = "curve"
  color: Optional[int] = None


def figure(
  title: str,
  series: Sequence[Series],
  *,
  x_axis: Axis,
  y_axis: Axis,
  x_name: str,
  note: str = "",
  extra: str = "",
) -> str:
  """The plot as an HTML figure.

  Args:
    title: plain text; stands above it.
    series: curves; at most ten colours.
    x_axis: of the common x.
    y_axis: of the common y.
    x_name: what x is, such as "step".
    note: HTML that stands below it.
    extra: SVG on a field of 100 by 100, drawn under the curves.
  """
  shown = [dataclasses.replace(s, points=thinned(s.points)) for s in series]
  drawn = "".join(
    _path(each, i, x_axis, y_axis) for i, each in enumerate(shown) if each.points
  )
  grid = "".join(
    f'<path class="grid" d="M0 {100 - y_axis.place(tick)}H100"/>'
    for tick in y_axis.ticks
  )
  marks = "".join(
    f'<span class="mark" style="{_color(each, i)}"></span>'
    for i, each in enumerate(shown)
  )
  data = html.escape(json.dumps(_pointing(shown, x_axis, y_axis, x_name)), quote=True)
  label = html.escape(f"{title} by {x_name}: {_in_words(series)}", quote=True)
  return (
    f'<figure class="chart"><figcaption><span>{html.escape(title)}</span>'
    f"<output>{_at_rest(series)}</output></figcaption>"
    f'<div class="plot" tabindex="0" role="img" aria-label="{label}" '
    f'data-plot="{data}">'
    f'<svg viewBox="0 0 100 100" preserveAspectRatio="none" aria-hidden="true">'
    f"{grid}{extra}{drawn}</svg>{_ticks(x_axis, y_axis, x_name)}"
    f'<span class="cursor"></span>{marks}</div>'
    f"{_legend(shown)}{note and f'<p class=note>{note}</p>'}</figure>"
  )


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
  """The points, or of very many the lowest and highest of each stretch, and the ends.

  Args:
    points: x and y, by ascending x.
  """
  if len(points) <= _MAX_POINTS:
    return list(points)
  num_stretches = _MAX_POINTS // 2 - 1
  kept = {0, len(points) - 1}
  for i in range(num_stretches):
    start = i * len(points) // num_stretches
    end = (i + 1) * len(points) // num_stretches
    stretch = range(start, end)
    kept.add(min(stretch, key=lambda at: points[at][1]))
    kept.add(max(stretch, key=lambda at: points[at][1]))
  return [points[i] for i in sorted(kept)]


def finite(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
  """The points whose value is a finite number."""
  return [(x, y) for x, y in points if math.isfinite(y)]


def _path(series: Series, number: int, x_axis: Axis, y_axis: Axis) -> str:
  places = [f"{x_axis.place(x)} {100 - y_axis.place(y):.2f}" for x, y in series.points]
  if len(places) == 1:  # A stroke as long as its width is a dot.
    places *= 2
  return (
    f'<path class="{series.kind}" style="{_color(series, number)}" '
    f'd="M{"L".join(places)}"/>'
  )


def _color(series: Series, number: int) -> str:
  color = number if series.color is None else series.color
  return f"--color:var(--c{color % _COLORS})"


def _ticks(x_axis: Axis, y_axis: Axis, x_name: str) -> str:
  spans = [
    f'<span class="y" style="top:{100 - y_axis.place(t):.1f}%">{short(t)}</span>'
    for t in y_axis.ticks
  ]
  spans += [
    f'<span class="x" style="left:{x_axis.place(t):.1f}%">'
    f"{html.escape(x_name) + ' ' if i == 0 else ''}{short(t)}</span>"
    for i, t in enumerate(x_axis.ticks)
  ]
  return "".join(spans)


def _pointing(
  series: Sequence[Series], x_axis: Axis, y_axis: Axis, x_name: str
) -> dict[str, object]:
  """What the script needs: at each x, where each curve is and what its value is."""
  values = sorted({x for each in series for x, _ in each.points})
  told = []
  for each in series:
    by_x = dict(each.points)
    there = [by_x.get(x) for x in values]
    told.append(
      {
        "name": each.name,
        "y": [None if y is None else round(100 - y_axis.place(y), 1) for y in there],
        "texts": ["" if y is None else short(y) for y in there],
      }
    )
  return {
    "x": [x_axis.place(x) for x in values],
    "heads": [f"{x_name} {short(x)}" for x in values],
    "series": told,
  }


def _at_rest(series: Sequence[Series]) -> str:
  """The last value, where there is one curve."""
  return short(series[0].points[-1][1]) if len(series) == 1 else ""


def _in_words(series: Sequence[Series]) -> str:
  parts = []
  for each in series:
    if each.points:
      (x0, y0), (x1, y1) = each.points[0], each.points[-1]
      words = f"{short(y0)} at {short(x0)} to {short(y1)} at {short(x1)}"
      parts.append(f"{each.name} {words}".strip())
  return "; ".join(parts)


def _legend(series: Sequence[Series]) -> str:
  if len(series) < 2:
    return ""
  lines = "".join(
    f'<li><span class="key line" style="{_color(each, i)}"></span>'
    f"{html.escape(each.name)}</li>"
    for i, each in enumerate(series)
  )
  return f'<ul class="legend">{lines}</ul>'
