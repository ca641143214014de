"""Axes and curves: where values stand, what is written out, what is left out."""

from __future__ import annotations

import html
import json
import re

import pytest

from trainer.report import figures


def test_linear_axis_writes_out_round_numbers():
  axis = figures.linear_axis([0.0, 300.0])
  assert axis.ticks == [0, 100, 200, 300]
  assert [axis.place(value) for value in (0, 150, 300)] == [0, 50, 100]


def test_rounded_axis_begins_and_ends_at_round_numbers():
  axis = figures.linear_axis([0.181, 0.189], 3, is_rounded=True)
  assert (axis.low, axis.high) == pytest.approx((0.18, 0.19))
  assert list(axis.ticks) == pytest.approx([0.18, 0.185, 0.19])


@pytest.mark.parametrize("value", [0.0, -3.0, 1e-12, 5e9])
def test_axis_of_one_value_has_it_within(value):
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


def test_long_curve_keeps_its_ends_and_its_spikes():
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


def test_curves_that_lack_a_value_where_another_has_one_say_so():
  text = figures.curve_figure(
    "Loss",
    [figures.Series("a", [(1, 0.5), (2, 0.25)]), figures.Series("b<", [(2, 1.0)])],
    x_axis=figures.linear_axis([1, 2]),
    y_axis=figures.linear_axis([0, 1]),
    x_name="step",
  )
  data = json.loads(html.unescape(re.search('data-plot="([^"]*)"', text).group(1)))
  assert data["x"] == [0, 100]
  assert data["heads"] == ["step 1", "step 2"]
  assert [each["y"] for each in data["series"]] == [[50.0, 75.0], [None, 0.0]]
  assert "<li>" in text and "b&lt;</li>" in text
