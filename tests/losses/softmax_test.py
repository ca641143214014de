from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from tests.losses import batches, oracles, pair_oracles
from trainer import losses
from trainer.errors import UserError

_LOSSES = [
  (
    losses.InfoNCELoss,
    oracles.cosine_similarity,
    pair_oracles.one_positive_softmax,
  ),
  (
    losses.SupervisedContrastiveLoss,
    oracles.cosine_similarity,
    pair_oracles.supervised_contrastive,
  ),
  (
    losses.SoftNearestNeighbourLoss,
    oracles.squared_euclidean,
    pair_oracles.soft_nearest_neighbour,
  ),
]


@pytest.mark.parametrize(("loss_class", "compare", "oracle"), _LOSSES)
@pytest.mark.parametrize("rows_per_tile", [None, 4])
def test_learned_temperature_has_the_gradient_of_the_definition(
  loss_class, compare, oracle, rows_per_tile
):
  embeddings, labels = batches.random_batch("unbalanced")
  loss = loss_class(
    temperature=losses.LearnedTemperature(initial=0.5), rows_per_tile=rows_per_tile
  )
  (variable,) = loss.trainable_variables
  with tf.GradientTape() as tape:
    total = loss(*batches.arguments(embeddings, labels)).total

  def expected_total(logarithm):
    terms = oracle(np.exp(logarithm))
    ones, related = np.ones(len(labels)), oracles.relevance(labels)
    return oracles.loss_terms(compare, terms, np.float64(embeddings), related, ones)[0]

  start = np.log(0.5)
  slope = (expected_total(start + 1e-6) - expected_total(start - 1e-6)) / 2e-6
  np.testing.assert_allclose(tape.gradient(total, variable), slope, rtol=1e-4)


@pytest.mark.parametrize("loss_class", [row[0] for row in _LOSSES])
def test_temperature_not_above_zero_is_refused(loss_class):
  with pytest.raises(UserError, match="temperature=0 is not above 0"):
    loss_class(temperature=0)


def test_tiny_temperature_does_not_overflow():
  embeddings, labels = batches.random_batch("unbalanced")
  total, _, gradient = batches.evaluate(
    losses.InfoNCELoss(temperature=1e-3), embeddings, labels
  )
  assert np.isfinite(total)
  assert np.isfinite(gradient).all()
