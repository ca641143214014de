"""The page of a sweep: rows, lines, labels and escaped text."""

from __future__ import annotations

import re

import pytest

from tests.sweep.example_sweep import row, write_page


@pytest.fixture
def text_of(tmp_path):
  """Writes the page of rows and returns its text."""

  def write(rows, **options):
    path = tmp_path / "sweep.html"
    write_page(rows, path, **options)
    return path.read_text(encoding="utf-8")

  return write


def _points(text):
  """Returns the height of each line at each axis, the best line last."""
  lines = re.findall(r'<polyline [^>]* points="([^"]*)"', text)
  return [[float(point.split(",")[1]) for point in line.split()] for line in lines]


def test_leaderboard_has_means_spreads_and_seeds_of_finished_rows(text_of):
  rows = [row({"a": "1"}, 0.75, 0.25), row({"a": "2"}, 0.25, 0.25)]
  text = text_of([*rows, row({"a": "3"}, None)])
  table = text.partition("<tbody>")[2].partition("</tbody>")[0]
  lines = [line for line in table.split("<tr>") if line.strip()]
  cells = [re.findall(r"<td[^>]*>([^<]*)", line)[:4] for line in lines]
  assert cells == [["1", "0.5000", "1", "0.3536"], ["2", "0.2500", "2", "0.0000"]]
  assert 'aria-label="0.7500, 0.2500"' in lines[0]


def test_line_of_a_row_crosses_all_axes_at_its_values(text_of):
  rows = [row({"a": "1e-3", "b": "x"}, 0.5), row({"a": "0.003", "b": "y"}, 0.25)]
  text = text_of([*rows, row({"a": "0.002", "b": "x"}, 0.0)])
  assert _points(text) == [[137, 188.5, 240], [34, 85.5, 137], [240, 188.5, 34]]
  titles = re.findall(r"<title>(0\.\d{4}: [^<]*)</title>", text)
  assert titles == [
    "0.0000: a=0.002, b=x",
    "0.2500: a=0.003, b=y",
    "0.5000: a=1e-3, b=x",
  ]


def test_equal_numbers_in_two_notations_share_a_position(text_of):
  text = text_of([row({"a": "0.1"}, 0.5), row({"a": "0.10"}, 0.25)])
  assert [line[0] for line in _points(text)] == [240, 240]


def test_axis_of_many_values_labels_its_ends_and_no_label_is_too_long(text_of):
  name = "train.loss." + 30 * "n"
  text = text_of([row({name: str(i), "b": i * "v"}, 1 - i / 9) for i in range(1, 9)])
  labels = re.findall(r'<text class="halo"[^>]*>([^<]*)<title>([^<]*)', text)
  assert labels[:4] == [("1", "1"), ("8", "8"), ("v", "v"), (8 * "v", 8 * "v")]
  assert 19 * "n" + "…<title>" + 30 * "n" + "</title>" in text


def test_page_of_one_run_and_of_none_has_its_sections(text_of):
  headings = r'<section id="([^"]*)"'
  assert re.findall(headings, text_of([row({"a": "1"}, 0.5)])) == [
    *("leaderboard", "settings-and-results", "importance")
  ]
  text = text_of([row({"a": "1"}, None, note="status 1: no")])
  assert re.findall(headings, text) == ["leaderboard", "failed"]
  assert "No run is finished." in text and "status 1: no" in text


def test_names_values_and_errors_are_escaped(text_of):
  hostile = "'<script>alert(\"ü\")</script>'"
  rows = [row({hostile: hostile}, 0.5), row({hostile: "1"}, None, note=hostile)]
  text = text_of(rows, name=hostile, metric=hostile)
  assert "<script" not in text
  # Title and heading, one label of three, table, line, importance and failure.
  assert text.count("&lt;script&gt;alert(&#34;ü&#34;)&lt;/script&gt;") >= 8


def test_page_is_self_contained_and_deterministic(text_of):
  rows = [row({"a": "1"}, 0.5, 0.25), row({"a": "2"}, 0.25)]
  text = text_of(rows)
  assert not re.search(r"https?:|@import|url\(|\bsrc=", text)
  assert text_of(rows) == text
