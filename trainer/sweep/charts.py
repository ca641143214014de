"""Pictures of a sweep as SVG: parallel coordinates, bars, and seeds."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

from trainer.sweep.rows import Row, names, number, short_name, short_value

_HEIGHT, _TOP, _BOTTOM = 260, 34, 20
_AXIS_WIDTH = 150
_BEST, _OTHERS = 1.0, 0.25


def parallel_coordinates(rows: Sequence[Row], metric: str) -> str:
  """A line a setting across an axis a swept name, and one for the metric.

  Args:
    rows: best first; those without value are left out.
    metric: title of the last axis.
  """
  finished = [row for row in rows if row.mean is not None]
  swept = names(finished)
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
  """A bar for each share of 0 to 1, with its name and its per cent."""
  return "".join(
    f"<tr><th>{html.escape(short_name(name, list(shares)))}</th>"
    f'<td class="wide"><span class="bar" style="width:{share:.1%}"></span></td>'
    f"<td>{share:.0%}</td></tr>"
    for name, share in shares.items()
  )


def seeds(values: Sequence[float], mean: float, low: float, high: float) -> str:
  """A dot a seed and a stroke at their mean, between the lowest and highest of all."""

  def x(value: float) -> float:
    return 5 + 110 * (value - low) / ((high - low) or 1)

  dots = "".join(f'<circle cx="{x(v):.1f}" cy="8" r="3"/>' for v in values)
  words = ", ".join(f"{value:.4f}" for value in values)
  return (
    f'<svg class="seeds" viewBox="0 0 120 16" role="img" aria-label="{words}">'
    f'<path d="M5 8H115"/>{dots}<path class="mean" d="M{x(mean):.1f} 2V14"/></svg>'
  )


class _Axis:
  """A vertical axis: numbers by size, anything else by its order."""

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
    """Height of a row's value."""
    return self._places[self._texts[row_number]]

  def svg(self, x: float) -> str:
    """The axis with its name and as many values as there is place for."""
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


def _share(row_number: int, rows: Sequence[Row]) -> float:
  """How strongly a row's line is drawn: the better the more."""
  last = max(len(rows) - 1, 1)
  return _BEST - (_BEST - _OTHERS) * row_number / last


def _words(row: Row) -> str:
  settings = ", ".join(f"{name}={value}" for name, value in row.settings.items())
  return f"{row.mean:.4f}: {settings}"
