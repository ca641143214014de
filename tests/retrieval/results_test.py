"""`eval/metrics.json`: metrics as plain JSON."""

from __future__ import annotations

import json

from trainer.retrieval.results import Measurement, Results

_BEFORE = {"eval/recall_at_1": 0.25, "eval/map_at_r": 0.125}
_AFTER = {"eval/recall_at_1": 0.75, "eval/map_at_r": 0.5}
_INTERVALS = {"eval/map_at_r": [0.45, 0.55]}


def _results(tmp_path):
  results = Results(str(tmp_path))
  results.write_before_training(Measurement(_BEFORE))
  results.write_latest(30, Measurement(_AFTER, _INTERVALS))
  return results


def test_results_are_plain_json(tmp_path):
  results = _results(tmp_path)
  content = json.loads((tmp_path / "eval" / "metrics.json").read_text())
  assert content["latest"] == {"step": 30, **_AFTER, "intervals": _INTERVALS}
  assert Results(str(tmp_path)).by_moment == content == results.by_moment


def test_table_has_a_column_per_evaluation(tmp_path):
  assert _results(tmp_path).rows() == [
    ["", "before training", "after training"],
    ["recall@1", "0.2500", "0.7500"],
    ["MAP@R", "0.1250", "0.5000 [0.4500, 0.5500]"],
  ]
