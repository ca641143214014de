"""Data of a page's figures: curves, histograms and the map of embeddings.

`figures.html` draws them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Optional

from trainer.retrieval.report_data import DistanceHistogram, EmbeddingMap

_STEPS = (1.0, 2.0, 5.0, 10.0)

# For longer curves, the lowest and the highest point of each interval are drawn.
_MAX_POINTS = 400
# With more classes on a map, only the class of the hovered item is coloured.
_COLORS = 10

_MAP_WIDTH, _MAP_MARGIN = 1000, 30
_SPAN = _MAP_WIDTH - 2 * _MAP_MARGIN
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
    points: x and y, by ascending x; at least one.
    color: number of its colour.
    kind: "curve", or "bars" for a filled outline.
  """

  name: str
  points: Sequence[tuple[float, float]]
  color: int = 0
  kind: str = "curve"


@dataclasses.dataclass(frozen=True)
class Plot:
  """A plot of curves over common axes.

  Attributes:
    title: shown above it.
    series: curves, at least one.
    x_axis: common x axis.
    y_axis: common y axis.
    x_name: name of x, such as "step".
    note: shown below it.
    medians: x of vertical lines, by number of their colour.
  """

  title: str
  series: Sequence[Series]
  x_axis: Axis
  y_axis: Axis
  x_name: str
  note: str = ""
  medians: Mapping[int, float] = dataclasses.field(default_factory=dict)

  @property
  def last_value(self) -> str:
    """The last value, if there is one curve."""
    return short_number(self.series[0].points[-1][1]) if len(self.series) == 1 else ""

  @property
  def label(self) -> str:
    """The first and the last value of each curve, in words."""
    parts = []
    for each in self.series:
      (x0, y0), (x1, y1) = each.points[0], each.points[-1]
      ends = [
        f"{short_number(y)} at {short_number(x)}" for x, y in ((x0, y0), (x1, y1))
      ]
      parts.append(f"{each.name} {' to '.join(ends)}".strip())
    return f"{self.title} by {self.x_name}: {'; '.join(parts)}"

  @property
  def hover_data(self) -> dict[str, Any]:
    """Position and text of each curve's value at each x, for the script."""
    values = sorted({x for each in self.series for x, _ in each.points})
    series = []
    for each in self.series:
      by_x = dict(each.points)
      known = [by_x.get(x) for x in values]
      series.append(
        {
          "name": each.name,
          "y": [
            None if y is None else round(100 - self.y_axis.place(y), 1) for y in known
          ],
          "texts": ["" if y is None else short_number(y) for y in known],
        }
      )
    return {
      "x": [self.x_axis.place(x) for x in values],
      "heads": [f"{self.x_name} {short_number(x)}" for x in values],
      "series": series,
    }

  def path(self, series: Series) -> str:
    """Returns the SVG path of a curve in a box of 100 by 100."""
    places = [
      f"{self.x_axis.place(x)} {100 - self.y_axis.place(y):.2f}"
      for x, y in series.points
    ]
    if len(places) == 1:  # A stroke of zero length is drawn as a dot.
      places *= 2
    if series.kind == "bars":  # The filled outline starts and ends at the x axis.
      ends = (f"{self.x_axis.place(series.points[i][0])} 100" for i in (0, -1))
      places = [next(ends), *places, next(ends)]
    return f"M{'L'.join(places)}"


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


def curve_points(
  rows: Sequence[Mapping[str, float]], name: str
) -> list[tuple[float, float]]:
  """Returns step and value of a metric, where it was logged and is finite.

  Args:
    rows: of `metrics.jsonl`.
    name: of the metric.
  """
  return [
    (row["step"], row[name]) for row in rows if math.isfinite(row.get(name, math.nan))
  ]


def training_plots(
  rows_by_run: Mapping[str, Sequence[Mapping[str, float]]],
) -> list[Plot]:
  """Returns one plot per metric that was logged.

  Args:
    rows_by_run: rows of `metrics.jsonl` by the name of the run; one run needs no name.
  """
  plots = []
  for name, title in CURVE_TITLES.items():
    series = [
      Series(run, thinned_points(points), color % _COLORS)
      for color, (run, rows) in enumerate(rows_by_run.items())
      if (points := curve_points(rows, name))
    ]
    if series:
      both = [point for each in series for point in each.points]
      x_axis = linear_axis([x for x, _ in both])
      y_axis = linear_axis([y for _, y in both], 3, is_rounded=True)
      plots.append(Plot(title, series, x_axis, y_axis, "step"))
  return plots


def recall_plot(recall_at: Mapping[str, Sequence[float]]) -> Optional[Plot]:
  """Returns a plot of recall@k for every k, of one or several runs; None for none.

  Args:
    recall_at: for k = 1, 2, ..., by the name of the run; one run needs no name.
  """
  if not recall_at:
    return None
  last = max(map(len, recall_at.values()))
  lowest = min(map(min, recall_at.values()))
  return Plot(
    f"Recall@k to k = {last}",
    [
      Series(
        name, [(float(k), value) for k, value in enumerate(values, 1)], i % _COLORS
      )
      for i, (name, values) in enumerate(recall_at.items())
    ],
    x_axis=logarithmic_axis(1, max(2.0, last)),
    y_axis=linear_axis([1.0, lowest if lowest < 1.0 else 0.9], 3, is_rounded=True),
    x_name="k",
    note="Share of queries with an item of their class among the k nearest.",
  )


def histogram_plot(found: DistanceHistogram) -> Optional[Plot]:
  """Returns a plot of the distances of sampled pairs; None without pairs.

  Args:
    found: the counts.
  """
  kinds = {"same class": found.positive, "different classes": found.negative}
  series = [
    Series(name, _shares(found, counts), color, "bars")
    for color, (name, counts) in enumerate(kinds.items())
    if sum(counts)
  ]
  if not series:
    return None
  medians = dict(enumerate((found.positive_median, found.negative_median)))
  num_pairs = max(map(sum, kinds.values()))
  return Plot(
    "Distances of pairs",
    series,
    x_axis=linear_axis([found.low, found.high]),
    y_axis=linear_axis([0.0, *(y for each in series for _, y in each.points)], 3),
    x_name="distance",
    note=f"Share of {num_pairs:,} pairs of each kind, drawn at random, in each of "
    f"{len(found.positive)} bins; dotted: medians.",
    medians={color: x for color, x in medians.items() if x is not None},
  )


def _shares(
  found: DistanceHistogram, counts: Sequence[int]
) -> list[tuple[float, float]]:
  """Returns the middle of each bin and its share of pairs."""
  width = (found.high - found.low) / len(counts)
  return [
    (found.low + (i + 0.5) * width, count / sum(counts))
    for i, count in enumerate(counts)
  ]


class MapLayout:
  """The map of embeddings in the pixels of an SVG.

  Attributes:
    width: of the SVG.
    height: of the SVG, so that all items fit.
    class_names: sorted.
    color_of: number of each class's colour; empty for more classes than colours.
    circles: item, class name, x, y and whether it is a mistake, for each item.

  Args:
    found: positions and classes.
  """

  width = _MAP_WIDTH

  def __init__(self, found: EmbeddingMap):
    self.class_names = sorted(set(found.class_names))
    has_colors = len(self.class_names) <= _COLORS
    self.color_of = dict(zip(self.class_names, range(_COLORS))) if has_colors else {}
    span = max(found.y) - min(found.y)
    missing = max(0.0, _LEAST_HEIGHT - span)
    self.height = (span + missing) * _SPAN + 2 * _MAP_MARGIN
    top = max(found.y) + missing / 2
    self.circles = list(
      zip(
        found.items,
        found.class_names,
        (_MAP_MARGIN + _SPAN * x for x in found.x),
        (_MAP_MARGIN + _SPAN * (top - y) for y in found.y),
        found.is_mistake,
      )
    )
