"""What metrics are called, and which are shown first."""

from __future__ import annotations

import pytest

from trainer.report import measured_runs


@pytest.mark.parametrize(
  ("name", "title"),
  [
    ("eval/recall_at_1", "recall@1"),
    ("recall_at_1", "recall@1"),
    ("eval/map_at_r", "MAP@R"),
    ("eval/map_at_10", "mAP@10"),
    ("eval/ndcg_at_5", "nDCG@5"),
    ("eval/set_recall_at_5", "set recall@5"),
    ("eval/best_threshold", "best threshold"),
  ],
)
def test_metrics_are_called_as_the_field_does(name, title):
  assert measured_runs.metric_title(name) == title


def test_what_is_no_metric_is_left_out_and_the_main_ones_come_first():
  names = ["step", "eval/num_queries", "eval/map_at_r", "eval/recall_at_1"]
  assert measured_runs.ordered_metrics(names) == (
    ["eval/recall_at_1", "eval/map_at_r"],
    ["eval/num_queries"],
  )
