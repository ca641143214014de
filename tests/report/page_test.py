"""The page of a run: contents, and no network access."""

from __future__ import annotations

import json
import os
import re

import numpy as np
import pytest
import tensorflow as tf

from tests.report import example_run
from trainer.errors import UserError
from trainer.report import __main__ as command
from trainer.report import page
from trainer.retrieval import report_collector
from trainer.retrieval.report_data import ReportData
from trainer.training.callbacks import MetricsFile


def _page(model_dir):
  with open(page.write_page(model_dir), encoding="utf-8") as file:
    return file.read()


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
  return example_run.make(tmp_path_factory.mktemp("runs") / "a run")


@pytest.fixture(scope="module")
def text(model_dir):
  return _page(model_dir)


def _row(text, title):
  [row] = re.findall(rf"<tr><th scope=row>{re.escape(title)}</th>(.*?)</tr>", text)
  cells = re.findall(r"<td[^>]*>(.*?)</td>", row)
  return [re.sub(r"<[^>]*>", " ", cell).split() for cell in cells]


def test_results_have_intervals_and_the_change_against_before_training(text):
  assert _row(text, "recall@1")[:3] == [
    ["0.2500"],
    ["0.7500", "0.7000\N{EN DASH}0.8000"],
    ["+0.5000"],
  ]
  assert _row(text, "MAP@R")[2] == ["\N{MINUS SIGN}0.0625"]


def test_every_section_exists_and_is_linked(text):
  links = re.findall(r'<a href="#([^"]*)">', text.partition("</nav>")[0])
  expected = ["results", "confused-classes", "queries", "map", "training"]
  assert links == [*expected, "configuration"]
  for place in links:
    assert f'<section id="{place}"' in text


def test_ids_are_unique(text):
  ids = re.findall(r'\bid="([^"]*)"', text.partition("<script>")[0])
  assert len(ids) == len(set(ids)) > 60


def test_page_is_the_same_for_the_same_files(model_dir, text):
  assert _page(model_dir) == text


def test_every_internal_link_resolves(text):
  places = set(re.findall(r'id="([^"]*)"', text))
  links = re.findall(r'href="#([^"]*)"', text)
  assert any(link.startswith("query-") for link in links)
  assert any(link.startswith("item-") for link in links)
  assert set(links) <= places


def test_confused_classes_link_to_their_query(text, model_dir):
  for confusion in ReportData.read(model_dir).confusions:
    assert f'<li><a href="#query-{confusion.query}">' in text
    assert f"{confusion.num_mistakes:,} of {confusion.num_queries:,} queries" in text


def test_wrong_and_right_neighbours_are_distinguished(text, model_dir):
  shown = [n for q in ReportData.read(model_dir).queries for n in q.neighbours]
  assert text.count('<li class="wrong"') == sum(not n.is_right for n in shown) > 0
  assert text.count('<li class="right"') == sum(n.is_right for n in shown) > 0


def test_worst_classes_have_their_metrics(text):
  [row] = re.findall(r"<tr><th scope=row><a [^>]*>a&lt;b</a></th>(.*?)</tr>", text)
  assert re.findall("<td>(.*?)</td>", row) == ["20", "0.5000", "0.2500"]


def test_curve_names_include_first_and_last_values(text):
  assert 'aria-label="Loss by step: 0.02 at 10 to 0.006667 at 30"' in text


def test_user_text_is_escaped(text):
  assert "&lt;script&gt;" in text and "'<script>'" not in text
  assert "a&lt;b" in text and "a<b" not in text


def test_page_has_no_external_links(text):
  addresses = re.findall(r"""(?:src|href)\s*=\s*["']?([^"'\s>]*)""", text)
  assert addresses
  assert all(a.startswith(("data:", "#")) for a in addresses if not a.startswith("`"))
  assert not re.search(r"https?://|@import|url\((?!\$)", text)


def test_sampled_queries_are_reported_as_a_sample(tmp_path):
  model_dir = example_run.make(tmp_path / "run")
  path = tmp_path / "run" / "eval" / "metrics.json"
  results = json.loads(path.read_text())
  results["latest"]["eval/num_queries"] = 12_345
  path.write_text(json.dumps(results))
  assert "60 of 12,345 queries, drawn at random" in _page(model_dir)


def test_a_run_without_report_data_and_intervals_has_a_page(tmp_path):
  model_dir = example_run.make(tmp_path / "run", has_report_data=False)
  path = tmp_path / "run" / "eval" / "metrics.json"
  path.write_text(json.dumps({"latest": {"step": 5, "eval/recall_at_1": 0.5}}))
  text = _page(model_dir)
  assert _row(text, "recall@1")[0] == ["0.5000"]
  assert 'id="queries"' not in text


def test_run_without_evaluation_has_a_page(tmp_path):
  (tmp_path / "config.gin").write_text("", encoding="utf-8")
  MetricsFile(str(tmp_path)).append(10, {"train/loss": 1.0})
  text = _page(str(tmp_path))
  assert "Not measured yet" in text
  assert 'class="curve dot"' in text


def test_nonfinite_values_are_omitted_from_curves(tmp_path):
  (tmp_path / "config.gin").write_text("", encoding="utf-8")
  file = MetricsFile(str(tmp_path))
  for step, loss in ((1, 1.0), (2, float("nan")), (3, 3.0), (4, float("inf"))):
    file.append(step, {"train/loss": loss})
  assert "Loss by step: 1 at 1 to 3 at 3" in _page(str(tmp_path))


def test_classes_beyond_the_palette_are_coloured_on_hover(tmp_path):
  text = _page(example_run.make(tmp_path / "run", num_classes=20))
  assert 'class="map plain"' in text
  assert "20 classes; the class of the selected item is coloured" in text


def test_inputs_without_pictures_are_shown_by_class(tmp_path):
  text = _page(example_run.make(tmp_path / "run", has_pictures=False))
  assert "<img" not in text
  assert '<span class="nopicture">a&lt;b</span>' in text


def test_page_is_below_three_megabytes_for_any_pictures(tmp_path):
  """Noise cannot be compressed by any format."""
  random = np.random.default_rng(0)

  def noise(items):
    images = random.integers(256, size=(len(items), 64, 64, 3)).astype(np.uint8)
    return [tf.io.encode_png(image).numpy() for image in images]

  (tmp_path / "config.gin").write_text("", encoding="utf-8")
  report_collector.collect_report_data(
    random.normal(size=(1200, 2)).astype(np.float32),
    random.integers(50, size=1200),
    random.integers(1200, size=(1200, 8)),
    np.arange(1200),
    class_names=[str(label) for label in range(50)],
    pictures_fn=noise,
  ).write(str(tmp_path))
  assert os.path.getsize(page.write_page(str(tmp_path))) < 3e6


def test_no_other_files_are_written(model_dir, text):
  assert text
  assert not [name for name in os.listdir(model_dir) if name.endswith(".new")]


def test_command_rewrites_the_page(tmp_path, capsys):
  model_dir = example_run.make(tmp_path / "run")
  assert command.main(["report", model_dir]) == 0
  path = os.path.join(model_dir, "report.html")
  assert capsys.readouterr().out.strip() == path
  assert os.path.exists(path)


def test_missing_folder_is_refused(tmp_path):
  with pytest.raises(UserError, match="nowhere is no folder; give the model_dir"):
    page.write_page(str(tmp_path / "nowhere"))


def test_folder_without_a_run_is_reported_in_one_line(tmp_path, capsys):
  assert command.main(["report", str(tmp_path)]) == 2
  [line] = capsys.readouterr().err.splitlines()
  assert line.startswith("error: ") and "holds no config.gin, so no run" in line


def test_command_needs_exactly_one_folder(capsys):
  assert command.main(["report"]) == 2
  assert "0 folders given" in capsys.readouterr().err


def test_damaged_results_are_named(tmp_path):
  model_dir = example_run.make(tmp_path / "run")
  (tmp_path / "run" / "eval" / "metrics.json").write_text('{"latest": {')
  with pytest.raises(UserError, match=r"eval/metrics.json can't be read"):
    page.write_page(model_dir)


def test_damaged_report_data_is_named(tmp_path):
  model_dir = example_run.make(tmp_path / "run")
  (tmp_path / "run" / "eval" / "report_data.json").write_text('{"num_items": 3}')
  with pytest.raises(UserError, match=r"eval/report_data.json can't be read"):
    page.write_page(model_dir)
