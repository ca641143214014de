"""Results and report: what a run's folder tells a reader."""

from __future__ import annotations

import json
import re

from trainer.loop.metrics_file import MetricsFile
from trainer.retrieval import report
from trainer.retrieval.results import Measurement, Results

_BEFORE = {"eval/recall_at_1": 0.25, "eval/map_at_r": 0.125}
_AFTER = {"eval/recall_at_1": 0.75, "eval/map_at_r": 0.5}


def _run_folder(tmp_path):
  (tmp_path / "config.gin").write_text("A.b = '<script>'\n", encoding="utf-8")
  results = Results(str(tmp_path))
  results.write_before_training(Measurement(_BEFORE))
  results.write_latest(30, Measurement(_AFTER, {"eval/map_at_r": [0.45, 0.55]}))
  file = MetricsFile(str(tmp_path))
  for step in (10, 20, 30):
    file.append(step, {"train/loss": 1.0 / step})
  return str(tmp_path)


def test_results_are_plain_json(tmp_path):
  model_dir = _run_folder(tmp_path)
  content = json.loads((tmp_path / "eval" / "metrics.json").read_text())
  intervals = {"eval/map_at_r": [0.45, 0.55]}
  assert content["latest"] == {"step": 30, **_AFTER, "intervals": intervals}
  assert Results(model_dir).by_moment == content


def test_the_table_has_a_column_for_each_moment(tmp_path):
  assert Results(_run_folder(tmp_path)).rows() == [
    ["", "before training", "after training"],
    ["recall@1", "0.2500", "0.7500"],
    ["MAP@R", "0.1250", "0.5000 [0.4500, 0.5500]"],
  ]


def test_the_report_has_results_and_curves_and_escapes_the_configuration(tmp_path):
  with open(report.write(_run_folder(tmp_path)), encoding="utf-8") as file:
    page = file.read()
  assert "0.7500" in page
  assert 'aria-label="Loss by step"' in page
  assert "&lt;script&gt;" in page


def test_the_report_asks_nothing_of_a_network(tmp_path):
  with open(report.write(_run_folder(tmp_path)), encoding="utf-8") as file:
    page = file.read()
  assert not re.findall(r"(?:src|href)\s*=|url\(|https?://", page)


def test_a_run_of_one_row_can_be_drawn(tmp_path):
  (tmp_path / "config.gin").write_text("", encoding="utf-8")
  MetricsFile(str(tmp_path)).append(10, {"train/loss": 1.0})
  with open(report.write(str(tmp_path)), encoding="utf-8") as file:
    assert "polyline" in file.read()
