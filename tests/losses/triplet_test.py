from __future__ import annotations

import numpy as np
import pytest

from tests.losses import batches
from trainer import losses
from trainer.errors import UserError

_CLASSES = [losses.BatchAllTripletLoss, losses.BatchHardTripletLoss]
_each_class = pytest.mark.parametrize("loss_class", _CLASSES)


@_each_class
@pytest.mark.parametrize("margin", [0, -0.2])
def test_margin_not_above_zero_is_refused(loss_class, margin):
  with pytest.raises(UserError, match="not above 0"):
    loss_class(margin=margin)


@_each_class
def test_unknown_reduction_is_refused(loss_class):
  with pytest.raises(UserError, match="'sum' is unknown"):
    loss_class(margin=0.2, reduction="sum")


@_each_class
def test_unknown_distance_is_refused(loss_class):
  with pytest.raises(UserError, match="'manhattan' is unknown"):
    loss_class(margin=0.2, distance="manhattan")


@_each_class
def test_column_of_labels_is_refused(loss_class):
  embeddings, labels = batches.random_batch("balanced")
  with pytest.raises(UserError, match="one integer for each"):
    loss_class(margin=0.2)(*batches.arguments(embeddings, labels[:, None]))


def test_embedding_without_negative_has_the_margin_for_batch_hard_loss():
  embeddings, labels = batches.random_batch("one_class")
  total, count, gradient = batches.evaluate(
    losses.BatchHardTripletLoss(margin=0.25), embeddings, labels
  )
  assert total / count == pytest.approx(0.25)
  np.testing.assert_array_equal(gradient, 0)
