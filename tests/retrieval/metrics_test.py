"""Retrieval metrics against loops from their definitions, and against scikit-learn.

Recorded: `AccuracyCalculator(k=N - 1, knn_func=CustomKNN(LpDistance(
normalize_embeddings=False)))` of the version in the file, each item asking all others.
"""

from __future__ import annotations

import pathlib

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, ndcg_score

from tests.retrieval import rank_oracles
from trainer.retrieval import metrics
from trainer.retrieval.ground_truth import ItemLabels, LabelGroundTruth
from trainer.retrieval.ranking import rank

_RNG = np.random.default_rng(1)
_HITS = [[bool(hit) for hit in _RNG.random(12) < 0.4] for _ in range(40)]
_HITS = [hits for hits in _HITS if any(hits)]


def _ranks(hits):
  return np.flatnonzero(hits) + 1


@pytest.mark.parametrize("k", [1, 3, 12, 30])
@pytest.mark.parametrize(
  "name",
  [
    "recall_at_k",
    "precision_at_k",
    "set_recall_at_k",
    "average_precision_at_k",
    "ndcg_at_k",
  ],
)
def test_metrics_at_k_equal_their_definitions(name, k):
  oracle, function = getattr(rank_oracles, name), getattr(metrics, name)
  for hits in _HITS:
    assert function(_ranks(hits), k) == pytest.approx(oracle(hits, k), rel=1e-12)


def test_metrics_of_whole_rankings_equal_their_definitions():
  for hits in _HITS:
    wanted = rank_oracles.expected(hits, ())
    ranks = _ranks(hits)
    got = {
      "eval/map": metrics.average_precision(ranks),
      "eval/map_at_r": metrics.average_precision_at_r(ranks),
      "eval/r_precision": metrics.r_precision(ranks),
      "eval/mrr": metrics.reciprocal_rank(ranks),
    }
    assert got == pytest.approx(wanted, rel=1e-12)


def test_average_precision_at_r_of_a_worked_example():
  # R = 3: hits at ranks 1 and 3 give (1/1 + 2/3) / 3; the hit at rank 4 is beyond R.
  assert metrics.average_precision_at_r(np.array([1, 3, 4])) == pytest.approx(5 / 9)


def test_ndcg_of_a_worked_example():
  # Hits at ranks 1 and 3: 1 + 1/2; the maximum is 1 + 1/log2(3).
  best = 1 + 1 / np.log2(3)
  assert metrics.ndcg_at_k(np.array([1, 3]), 5) == pytest.approx(1.5 / best)


def test_average_precision_and_ndcg_equal_scikit_learn():
  for hits in _HITS:
    scores = -np.arange(len(hits), dtype=float)
    ranks = _ranks(hits)
    assert metrics.average_precision(ranks) == pytest.approx(
      average_precision_score(hits, scores)
    )
    assert metrics.ndcg_at_k(ranks, 5) == pytest.approx(
      ndcg_score([hits], [scores], k=5)
    )


_RECORDED = np.load(pathlib.Path(__file__).parents[1] / "golden" / "pml_metrics.npz")
# Its mean reciprocal rank is summed in float32.
_TOLERANCES = {
  "recall_at_1": 1e-12,
  "r_precision": 1e-12,
  "map_at_r": 1e-12,
  "map": 1e-12,
  "mrr": 2e-7,
}


@pytest.mark.golden
@pytest.mark.parametrize("data", ["even", "uneven"])
def test_figures_are_those_of_its_calculator(data):
  embeddings, labels = (
    _RECORDED[f"{data}/{name}"] for name in ("embeddings", "labels")
  )
  items = np.arange(len(labels))
  ground_truth = LabelGroundTruth(items, items, ItemLabels(labels))
  got = rank(embeddings, ground_truth, ks=(1,)).means()
  for name, tolerance in _TOLERANCES.items():
    wanted = float(_RECORDED[f"{data}/{name}"])
    assert got[f"eval/{name}"] == pytest.approx(wanted, rel=tolerance), name
