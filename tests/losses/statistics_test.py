from __future__ import annotations

import numpy as np
import pytest

from tests.losses import batches
from trainer.losses.relevance import relevance
from trainer.losses.statistics import mining_sums, named, summarize
from trainer.losses.terms import Ratio

_POINTS = np.array([[0, 0], [3, 4], [0, 2], [6, 8]], np.float32)


def _summary(labels, weights=None):
  arguments = batches.arguments(_POINTS, np.array(labels), weights)
  return summarize(named(mining_sums(*arguments, relevance(*arguments))))


def test_hardest_distances_and_norm_are_means_over_anchors():
  summary = _summary([0, 0, 1, 1])
  # Positives: 5, 5, √72, √72. Nearest negatives: 2, √13, 2, 5.
  assert summary["mining/hardest_positive_distance"] == pytest.approx(
    (10 + 2 * 72**0.5) / 4
  )
  assert summary["mining/hardest_negative_distance"] == pytest.approx((9 + 13**0.5) / 4)
  assert summary["mining/embedding_norm"] == pytest.approx((0 + 5 + 2 + 10) / 4)


def test_anchor_without_a_positive_is_left_out():
  summary = _summary([0, 0, 1, 2])
  assert summary["mining/hardest_positive_distance"] == pytest.approx(5)


def test_padding_is_left_out():
  summary = _summary([0, 0, 1, 1], np.array([1, 1, 1, 0], np.float32))
  assert summary["mining/embedding_norm"] == pytest.approx(7 / 3)
  assert summary["mining/hardest_positive_distance"] == pytest.approx(5)


def test_summary_divides_what_was_added_up():
  assert summarize({"a": Ratio(np.float32(6), np.float32(4))}) == {"a": 1.5}


def test_statistic_of_nothing_is_left_out():
  assert "mining/hardest_positive_distance" not in _summary([0, 1, 2, 3])
