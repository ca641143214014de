"""Display names and order of metrics."""

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
def test_metrics_have_their_usual_names(name, title):
  assert measured_runs.metric_title(name) == title


def test_main_metrics_are_first_and_other_values_are_omitted():
  names = ["step", "eval/num_queries", "eval/map_at_r", "eval/recall_at_1"]
  assert measured_runs.ordered_metrics(names) == (
    ["eval/recall_at_1", "eval/map_at_r"],
    ["eval/num_queries"],
  )
