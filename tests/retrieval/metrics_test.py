"""Retrieval metrics against loops written from their definitions."""

from __future__ import annotations

import numpy as np
import pytest

from trainer.retrieval import metrics


def _average_precision_at_r(relevant, num_relevant):
  found, total = 0, 0.0
  for rank in range(1, num_relevant + 1):
    if relevant[rank - 1]:
      found += 1
      total += found / rank
  return total / num_relevant


def _random_rankings(rng, num_queries=50, depth=12):
  is_relevant = rng.random((num_queries, depth)) < 0.4
  num_relevant = rng.integers(1, depth + 1, num_queries)
  return is_relevant, num_relevant


def test_average_precision_at_r_is_that_of_the_definition():
  is_relevant, num_relevant = _random_rankings(np.random.default_rng(1))
  expected = [_average_precision_at_r(*row) for row in zip(is_relevant, num_relevant)]
  got = metrics.average_precision_at_r(is_relevant, num_relevant)
  np.testing.assert_allclose(got, expected, rtol=1e-12)


def test_average_precision_at_r_of_a_worked_example():
  # R = 3: hits at ranks 1 and 3 give (1/1 + 2/3) / 3; the hit at rank 4 is beyond R.
  is_relevant = np.array([[True, False, True, True]])
  got = metrics.average_precision_at_r(is_relevant, np.array([3]))
  np.testing.assert_allclose(got, [(1 + 2 / 3) / 3])


def test_r_precision_is_that_of_the_definition():
  is_relevant, num_relevant = _random_rankings(np.random.default_rng(2))
  expected = [sum(row[:r]) / r for row, r in zip(is_relevant, num_relevant)]
  np.testing.assert_allclose(metrics.r_precision(is_relevant, num_relevant), expected)


@pytest.mark.parametrize("k", [1, 5, 12])
def test_recall_at_k_asks_for_any_relevant_among_the_nearest(k):
  is_relevant, _ = _random_rankings(np.random.default_rng(3))
  expected = [float(any(row[:k])) for row in is_relevant]
  np.testing.assert_array_equal(metrics.recall_at_k(is_relevant, k), expected)
