"""Losses and gradients against those that PyTorch Metric Learning gave.

Recorded by the version in the file, for embeddings and labels of the golden vectors:
its losses with their default distance and reducer, after its miners where named.
"""

from __future__ import annotations

import pathlib

import numpy as np
import pytest

from tests.losses import batches, golden
from trainer import losses
from trainer.losses import presets

_RECORDED = np.load(pathlib.Path(__file__).parents[1] / "golden" / "pml_losses.npz")
_CASES = ("pk_4x4x8", "unit_norm", "unbalanced", "lone_anchor", "large_labels")
# What it was: TripletMarginLoss(margin) alone, after BatchHardMiner(), and after
# TripletMarginMiner(margin, "semihard"); NTXentLoss(0.5); SupConLoss(0.5);
# CircleLoss(0.4, 16); MultiSimilarityLoss(2, 10, 0.5) after MultiSimilarityMiner(0.1).
_LOSSES = {
  "batch_all/margin=0.05": presets.pml_batch_all(margin=0.05),
  "batch_all/margin=0.2": presets.pml_batch_all(margin=0.2),
  "batch_hard/margin=0.05": presets.pml_batch_hard(margin=0.05),
  "batch_hard/margin=0.2": presets.pml_batch_hard(margin=0.2),
  "semi_hard/margin=0.05": presets.pml_semi_hard(margin=0.05),
  "semi_hard/margin=0.2": presets.pml_semi_hard(margin=0.2),
  "info_nce/temperature=0.5": losses.InfoNCELoss(temperature=0.5),
  "supervised_contrastive/temperature=0.5": losses.SupervisedContrastiveLoss(
    temperature=0.5
  ),
  "circle": losses.CircleLoss(margin=0.4, scale=16.0),
  "multi_similarity": losses.MultiSimilarityLoss(
    positive_scale=2.0, negative_scale=10.0, threshold=0.5, mining_margin=0.1
  ),
}


@pytest.mark.golden
@pytest.mark.parametrize("name", _LOSSES)
def test_value_and_gradient_are_those_recorded(name):
  for case in _CASES:
    total, count, gradient = batches.evaluate(
      _LOSSES[name],
      golden.VECTORS[f"{case}/embeddings"],
      golden.VECTORS[f"{case}/labels"].astype(np.int32),
    )
    wanted, slopes = (
      _RECORDED[f"{case}/{name}/{each}"] for each in ("loss", "gradient")
    )
    np.testing.assert_allclose(total / count, wanted, rtol=1e-5)
    atol = 2e-6 * np.abs(slopes).max()
    np.testing.assert_allclose(gradient / count, slopes, rtol=0, atol=atol)
