"""Figures against those that PyTorch Metric Learning's calculator gave.

Recorded: `AccuracyCalculator(k=N - 1, knn_func=CustomKNN(LpDistance(
normalize_embeddings=False)))` of the version in the file, each item asking all others.
"""

from __future__ import annotations

import pathlib

import numpy as np
import pytest

from trainer.retrieval.ground_truth import ItemLabels, LabelGroundTruth
from trainer.retrieval.ranking import rank

_RECORDED = np.load(pathlib.Path(__file__).parents[1] / "golden" / "pml_metrics.npz")
# Its mean reciprocal rank is added up in float32.
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
  judged = LabelGroundTruth(items, items, ItemLabels(labels))
  got = rank(embeddings, judged, ks=(1,)).means()
  for name, tolerance in _TOLERANCES.items():
    wanted = float(_RECORDED[f"{data}/{name}"])
    assert got[f"eval/{name}"] == pytest.approx(wanted, rel=tolerance), name
