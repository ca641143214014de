"""Axes and curves: positions, labels and omitted values."""

from __future__ import annotations

import pytest

from trainer.report import figures
from trainer.retrieval.report_data import DistanceHistogram


def test_linear_axis_labels_round_numbers():
  axis = figures.linear_axis([0.0, 300.0])
  assert axis.ticks == [0, 100, 200, 300]
  assert [axis.place(value) for value in (0, 150, 300)] == [0, 50, 100]


def test_rounded_axis_starts_and_ends_at_round_numbers():
  axis = figures.linear_axis([0.181, 0.189], 3, is_rounded=True)
  assert (axis.low, axis.high) == pytest.approx((0.18, 0.19))
  assert list(axis.ticks) == pytest.approx([0.18, 0.185, 0.19])


@pytest.mark.parametrize("value", [0.0, -3.0, 1e-12, 5e9])
def test_axis_of_one_value_contains_it(value):
  axis = figures.linear_axis([value, value], is_rounded=True)
  assert axis.low < value < axis.high
  assert 0 <= axis.place(value) <= 100


def test_logarithmic_axis_has_equal_lengths_for_equal_ratios():
  axis = figures.logarithmic_axis(1, 100)
  assert list(axis.ticks) == pytest.approx([1, 2, 5, 10, 20, 50, 100])
  assert [axis.place(value) for value in (1, 10, 100)] == [0, 50, 100]


@pytest.mark.parametrize(
  ("value", "text"), [(0, "0"), (0.00012345, "0.0001234"), (12345.6, "12,346")]
)
def test_numbers_are_short(value, text):
  assert figures.short_number(value) == text


def test_long_curve_keeps_its_endpoints_and_spikes():
  points = [(float(x), 1.0) for x in range(10_000)]
  points[4321] = (4321.0, 9.0)
  points[8765] = (8765.0, -9.0)
  kept = figures.thinned_points(points)
  assert len(kept) <= 400
  assert {points[0], points[4321], points[8765], points[-1]} <= set(kept)
  assert kept == sorted(kept)


def test_short_curve_is_kept_whole():
  points = [(0.0, 1.0), (1.0, 3.0)]
  assert figures.thinned_points(points) == points


def test_missing_values_of_a_curve_are_empty_on_hover():
  plot = figures.Plot(
    "Loss",
    [figures.Series("a", [(1, 0.5), (2, 0.25)]), figures.Series("b<", [(2, 1.0)])],
    x_axis=figures.linear_axis([1, 2]),
    y_axis=figures.linear_axis([0, 1]),
    x_name="step",
  )
  assert plot.hover_data == {
    "x": [0, 100],
    "heads": ["step 1", "step 2"],
    "series": [
      {"name": "a", "y": [50.0, 75.0], "texts": ["0.5", "0.25"]},
      {"name": "b<", "y": [None, 0.0], "texts": ["", "1"]},
    ],
  }


def test_curve_of_one_point_is_drawn_as_a_dot():
  [plot] = figures.training_plots({"": [{"step": 3, "train/loss": 0.5}]})
  assert plot.path(plot.series[0]) == "M50.0 50.00L50.0 50.00"
  assert plot.label == "Loss by step: 0.5 at 3 to 0.5 at 3"


def test_histogram_of_one_kind_of_pairs_has_one_curve_and_one_median():
  found = DistanceHistogram(0.0, 2.0, [0, 0], [1, 3], None, 1.5)
  plot = figures.histogram_plot(found)
  assert [(each.name, each.points) for each in plot.series] == [
    ("different classes", [(0.5, 0.25), (1.5, 0.75)])
  ]
  assert plot.medians == {plot.series[0].color: 1.5}


def test_histogram_without_pairs_is_omitted():
  none = DistanceHistogram(0.0, 1.0, [0, 0], [0, 0], None, None)
  assert figures.histogram_plot(none) is None


def test_filled_outline_of_a_histogram_starts_and_ends_at_the_axis():
  found = DistanceHistogram(0.0, 2.0, [1, 3], [0, 0], 1.5, None)
  plot = figures.histogram_plot(found)
  assert plot.path(plot.series[0]) == "M25.0 100L25.0 66.67L75.0 0.00L75.0 100"


@pytest.mark.parametrize(
  ("recall_at", "ticks"),
  [([1.0, 1.0], [0.9, 0.95, 1.0]), ([0.98, 1.0], [0.98, 0.99, 1.0])],
)
def test_axis_of_recall_ends_at_one(recall_at, ticks):
  plot = figures.recall_plot({"": recall_at})
  assert list(plot.y_axis.ticks) == pytest.approx(ticks)


def test_no_recall_has_no_plot():
  assert figures.recall_plot({}) is None
