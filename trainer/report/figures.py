"""Figures of a page as SVG: curves, histograms and the map of embeddings."""

from __future__ import annotations

import dataclasses
import html
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Optional

from trainer.retrieval.report_data import DistanceHistogram, EmbeddingMap

_STEPS = (1.0, 2.0, 5.0, 10.0)

# For longer curves, the lowest and the highest point of each interval are drawn.
_MAX_POINTS = 400
_COLORS = 10

_POSITIVE, _NEGATIVE = 0, 1

# With more classes than distinguishable colours, only the hovered class is coloured.
_MAX_COLORS = 10
_RADIUS = 7
_WIDTH, _MARGIN = 1000, 30
_SPAN = _WIDTH - 2 * _MARGIN
# Share of the width, so that items on one line have space.
_LEAST_HEIGHT = 0.4

# Metrics and their titles; metrics that no run logs are left out.
CURVE_TITLES = {
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


@dataclasses.dataclass(frozen=True)
class Axis:
  """An interval of numbers.

  Attributes:
    low: value at its start.
    high: value at its end.
    ticks: labelled values.
    is_logarithmic: whether the axis is logarithmic.
  """

  low: float
  high: float
  ticks: Sequence[float]
  is_logarithmic: bool = False

  def place(self, value: float) -> float:
    """Returns the position of a value, in per cent of the axis's length."""
    low, high = self.low, self.high
    if self.is_logarithmic:
      low, high, value = math.log(low), math.log(high), math.log(value)
    return round(100 * (value - low) / (high - low), 2)


def linear_axis(
  values: Iterable[float], num_steps: int = 4, *, is_rounded: bool = False
) -> Axis:
  """Returns an axis that covers all values, with round numbers as ticks.

  Args:
    values: finite, at least one.
    num_steps: approximate number of ticks.
    is_rounded: whether it starts and ends at a tick.
  """
  values = list(values)
  low, high = min(values), max(values)
  if low == high:
    margin = abs(low) / 2 or 1.0
    low, high = low - margin, high + margin
  step = _round_step((high - low) / num_steps)
  first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
  if is_rounded:
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    low, high = first * step, last * step
  return Axis(low, high, [i * step for i in range(first, last + 1)])


def logarithmic_axis(low: float, high: float) -> Axis:
  """Returns a logarithmic axis with ticks at 1, 2, 5, 10, 20, ...

  Args:
    low: above 0.
    high: above `low`.
  """
  powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
  ticks = [10.0**power * step for power in powers for step in _STEPS[:-1]]
  return Axis(low, high, [t for t in ticks if low <= t <= high], True)


def short_number(value: float) -> str:
  """Formats a number with few digits."""
  if value == 0 or abs(value) >= 1000:
    return f"{value:,.0f}"
  return f"{value:.4g}"


def _round_step(least: float) -> float:
  """Returns 1, 2 or 5 times a power of ten, the smallest not below `least`."""
  power = 10.0 ** math.floor(math.log10(least))
  return next(step * power for step in _STEPS if step * power >= least * (1 - 1e-9))


@dataclasses.dataclass(frozen=True)
class Series:
  """One curve.

  Attributes:
    name: shown with its values; empty if a plot has only one curve.
    points: x and y, by ascending x.
    kind: "curve", or "bars" for a filled outline.
    color: number of its colour; None for its position among the curves.
  """

  name: str
  points: Sequence[tuple[float, float]]
  kind: str = "curve"
  color: Optional[int] = None


def curve_figure(
  title: str,
  series: Sequence[Series],
  *,
  x_axis: Axis,
  y_axis: Axis,
  x_name: str,
  note: str = "",
  extra: str = "",
) -> str:
  """Returns the plot as an HTML figure.

  Args:
    title: plain text, above the plot.
    series: curves; at most ten colours.
    x_axis: common x axis.
    y_axis: common y axis.
    x_name: name of x, such as "step".
    note: HTML below the plot.
    extra: SVG in a box of 100 by 100, drawn under the curves.
  """
  shown = [dataclasses.replace(s, points=thinned_points(s.points)) for s in series]
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


def thinned_points(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
  """Returns the points; of very many, the extremes of each interval and the ends.

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


def finite_points(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
  """Returns the points with a finite value."""
  return [(x, y) for x, y in points if math.isfinite(y)]


def _path(series: Series, number: int, x_axis: Axis, y_axis: Axis) -> str:
  places = [f"{x_axis.place(x)} {100 - y_axis.place(y):.2f}" for x, y in series.points]
  if len(places) == 1:  # A stroke of zero length is drawn as a dot.
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
    f'<span class="y" style="top:{100 - y_axis.place(t):.1f}%">{short_number(t)}</span>'
    for t in y_axis.ticks
  ]
  spans += [
    f'<span class="x" style="left:{x_axis.place(t):.1f}%">'
    f"{html.escape(x_name) + ' ' if i == 0 else ''}{short_number(t)}</span>"
    for i, t in enumerate(x_axis.ticks)
  ]
  return "".join(spans)


def _pointing(
  series: Sequence[Series], x_axis: Axis, y_axis: Axis, x_name: str
) -> dict[str, object]:
  """Returns the data of the script: at each x, position and value of each curve."""
  values = sorted({x for each in series for x, _ in each.points})
  told = []
  for each in series:
    by_x = dict(each.points)
    there = [by_x.get(x) for x in values]
    told.append(
      {
        "name": each.name,
        "y": [None if y is None else round(100 - y_axis.place(y), 1) for y in there],
        "texts": ["" if y is None else short_number(y) for y in there],
      }
    )
  return {
    "x": [x_axis.place(x) for x in values],
    "heads": [f"{x_name} {short_number(x)}" for x in values],
    "series": told,
  }


def _at_rest(series: Sequence[Series]) -> str:
  """Returns the last value, if there is one curve."""
  return short_number(series[0].points[-1][1]) if len(series) == 1 else ""


def _in_words(series: Sequence[Series]) -> str:
  parts = []
  for each in series:
    if each.points:
      (x0, y0), (x1, y1) = each.points[0], each.points[-1]
      first = f"{short_number(y0)} at {short_number(x0)}"
      last = f"{short_number(y1)} at {short_number(x1)}"
      parts.append(f"{each.name} {first} to {last}".strip())
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


def histogram_figure(found: DistanceHistogram) -> str:
  """Returns a figure of the distances of sampled pairs.

  Args:
    found: the counts.
  """
  series = [
    Series("same class", _outline(found, found.positive), "bars", _POSITIVE),
    Series("different classes", _outline(found, found.negative), "bars", _NEGATIVE),
  ]
  series = [each for each in series if each.points]
  if not series:
    return ""
  x_axis = linear_axis([found.low, found.high])
  medians = {_POSITIVE: found.positive_median, _NEGATIVE: found.negative_median}
  lines = "".join(
    f'<path class="median" style="--color:var(--c{color})" '
    f'd="M{x_axis.place(median)} 0V100"/>'
    for color, median in medians.items()
    if median is not None
  )
  num_pairs = max(sum(found.positive), sum(found.negative))
  return curve_figure(
    "Distances of pairs",
    series,
    x_axis=x_axis,
    y_axis=linear_axis([0.0, *(y for each in series for _, y in each.points)], 3),
    x_name="distance",
    note=f"Share of {num_pairs:,} pairs of each kind, drawn at random, in each of "
    f"{len(found.positive)} bins; dotted: medians.",
    extra=lines,
  )


def recall_figure(recall_at: Mapping[str, Sequence[float]]) -> str:
  """Returns a figure of recall@k for every k, of one or several runs; empty for none.

  Args:
    recall_at: for k = 1, 2, ..., by the name of the run; one run needs no name.
  """
  if not recall_at:
    return ""
  series = [
    Series(
      name if len(recall_at) > 1 else "",
      [(float(k), value) for k, value in enumerate(values, 1)],
    )
    for name, values in recall_at.items()
  ]
  points = [point for each in series for point in each.points]
  last = max(k for k, _ in points)
  return curve_figure(
    f"Recall@k to k = {last:.0f}",
    series,
    x_axis=logarithmic_axis(1, max(2.0, last)),
    y_axis=linear_axis([1.0, *(value for _, value in points)], 3, is_rounded=True),
    x_name="k",
    note="Share of queries with an item of their class among the k nearest.",
  )


def _outline(
  found: DistanceHistogram, counts: Sequence[int]
) -> list[tuple[float, float]]:
  """Returns the middle of each bin and its share of pairs."""
  total = sum(counts)
  width = (found.high - found.low) / len(counts)
  return [
    (found.low + (i + 0.5) * width, count / total)
    for i, count in enumerate(counts)
    if total
  ]


def embedding_map(found: EmbeddingMap, num_items: int) -> str:
  """Returns the map with a legend and a card for the selected item.

  Args:
    found: positions, classes and pictures.
    num_items: number of all items.
  """
  names = sorted(set(found.class_names))
  has_colors = len(names) <= _MAX_COLORS
  color_of = {name: i for i, name in enumerate(names)} if has_colors else {}
  top, height = _frame(found)
  circles = "".join(_circle(found, i, top, color_of) for i in range(len(found.items)))
  sheet, sprite = "", ""
  if found.sprite is not None:
    sheet = f'<img class="sheet" hidden alt="" src="{found.sprite.picture}">'
    sizes = {
      k: v for k, v in dataclasses.asdict(found.sprite).items() if k != "picture"
    }
    sprite = f" data-sprite='{json.dumps(sizes)}'"
  label = (
    f"Map of {len(found.items)} items of {len(names)} classes. The arrow keys go from "
    "item to item."
  )
  return (
    f"<p>{len(found.items):,} of {num_items:,} items, laid out by {found.method}: what "
    "is near here is near in the embedding, though not always the other way round."
    "</p>"
    f'<div class="map{"" if has_colors else " plain"}"{sprite}>{sheet}'
    f'<div class="canvas" tabindex="0" role="group" aria-label="{label}">'
    f'<svg viewBox="0 0 {_WIDTH} {height:.0f}" aria-hidden="true">{circles}</svg></div>'
    '<div class="side"><div class="card empty" aria-live="polite"><p>Point at an '
    "item, or focus the map and use the arrow keys.</p></div>"
    f"{_map_legend(names if has_colors else [], len(names))}</div></div>"
  )


def _frame(found: EmbeddingMap) -> tuple[float, float]:
  """Returns the y of the uppermost item, and the height that fits all items."""
  top, span = max(found.y), max(found.y) - min(found.y)
  missing = max(0.0, _LEAST_HEIGHT - span)
  return top + missing / 2, (span + missing) * _SPAN + 2 * _MARGIN


def _circle(found: EmbeddingMap, i: int, top: float, color_of: dict[str, int]) -> str:
  name = found.class_names[i]
  color = f' style="--color:var(--c{color_of[name]})"' if name in color_of else ""
  kind = ' class="mistake"' if found.is_mistake[i] else ""
  return (
    f'<circle id="item-{found.items[i]}" cx="{_MARGIN + _SPAN * found.x[i]:.1f}" '
    f'cy="{_MARGIN + _SPAN * (top - found.y[i]):.1f}" r="{_RADIUS}"{kind}{color} '
    f'data-name="{html.escape(name, quote=True)}"/>'
  )


def _map_legend(names: list[str], num_classes: int) -> str:
  lines = [
    f'<li><span class="key" style="--color:var(--c{i})"></span>{html.escape(name)}</li>'
    for i, name in enumerate(names)
  ]
  if not names:
    lines.append(f"<li>{num_classes:,} classes; the one pointed at is coloured</li>")
  lines.append(
    '<li><span class="key ring"></span>nearest neighbour is of another class</li>'
  )
  return f'<ul class="legend">{"".join(lines)}</ul>'


def curve_points(
  rows: Sequence[Mapping[str, float]], name: str
) -> list[tuple[float, float]]:
  """Returns step and value of a metric, where it was logged and is finite.

  Args:
    rows: of `metrics.jsonl`.
    name: of the metric.
  """
  return finite_points([(row["step"], row[name]) for row in rows if name in row])


def training_figures(rows_by_run: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
  """Returns one figure per metric; empty if nothing was logged.

  Args:
    rows_by_run: rows of `metrics.jsonl` by the name of the run; one run needs no name.
  """
  drawn = []
  for name, title in CURVE_TITLES.items():
    series = [
      Series(run if len(rows_by_run) > 1 else "", curve_points(rows, name), color=i)
      for i, (run, rows) in enumerate(rows_by_run.items())
    ]
    series = [each for each in series if each.points]
    if series:
      both = [point for each in series for point in each.points]
      drawn.append(
        curve_figure(
          title,
          series,
          x_axis=linear_axis([x for x, _ in both]),
          y_axis=linear_axis([y for _, y in both], 3, is_rounded=True),
          x_name="step",
        )
      )
  return f'<div class="curves">{"".join(drawn)}</div>' if drawn else ""
