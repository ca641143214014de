"""The seed's functions, against values and gradients recorded from the seed itself."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from tests.losses import golden
from trainer import losses
from trainer.errors import UserError


@pytest.mark.golden
@pytest.mark.parametrize("key", golden.keys("batch_all"))
def test_batch_all_equals_the_seed(key):
  (loss, fraction), gradient = golden.value_and_gradient(
    losses.batch_all_triplet_loss, key
  )
  golden.assert_value_equals(loss, f"{key}/loss")
  golden.assert_value_equals(fraction, f"{key}/fraction_positive")
  golden.assert_gradient_equals(gradient, key)


@pytest.mark.golden
@pytest.mark.parametrize("key", golden.keys("batch_hard") + golden.keys("tfa_hard"))
def test_batch_hard_equals_the_seed_and_addons(key):
  loss, gradient = golden.value_and_gradient(losses.batch_hard_triplet_loss, key)
  golden.assert_value_equals(loss, f"{key}/loss")
  golden.assert_gradient_equals(gradient, key)


@pytest.mark.golden
@pytest.mark.parametrize(
  "key", [key for key in golden.keys("batch_all") if key.startswith("collapsed")]
)
def test_gradient_of_a_collapsed_batch_is_exactly_zero(key):
  _, gradient = golden.value_and_gradient(losses.batch_all_triplet_loss, key)
  assert not gradient.any()


_FUNCTIONS = [losses.batch_all_triplet_loss, losses.batch_hard_triplet_loss]


@pytest.mark.parametrize("loss_fn", _FUNCTIONS)
@pytest.mark.parametrize(
  "labels",
  [np.zeros((6, 2), int), np.eye(6, dtype=int), np.full(6, 0.5), np.zeros(5, int)],
  ids=["matrix", "one_hot", "half", "too_few"],
)
def test_labels_that_would_broadcast_are_refused(loss_fn, labels):
  with pytest.raises(UserError, match="label"):
    loss_fn(labels, np.zeros((6, 3), np.float32), 0.2)


@pytest.mark.parametrize("loss_fn", _FUNCTIONS)
@pytest.mark.parametrize("shape", [(4,), (4, 1, 3)])
def test_embeddings_that_are_not_vectors_are_refused(loss_fn, shape):
  with pytest.raises(UserError, match=r"needed is one vector for each example"):
    loss_fn(np.zeros(4, int), np.zeros(shape, np.float32), 0.2)


@pytest.mark.parametrize("loss_fn", _FUNCTIONS)
@pytest.mark.parametrize("margin", [0, -0.5])
def test_margin_not_above_zero_is_refused(loss_fn, margin):
  with pytest.raises(UserError, match="margin"):
    loss_fn(np.zeros(4, int), np.zeros((4, 3), np.float32), margin)


@pytest.mark.parametrize("loss_fn", _FUNCTIONS)
def test_batch_of_unknown_size_is_traced_once(loss_fn):
  traced = tf.function(
    lambda labels, embeddings: loss_fn(labels, embeddings, 0.5),
    input_signature=[
      tf.TensorSpec([None], tf.int64),
      tf.TensorSpec([None, 6], tf.float32),
    ],
  )
  labels = golden.VECTORS["duplicates/labels"]
  embeddings = golden.VECTORS["duplicates/embeddings"]
  for size in (len(labels), 7):
    np.testing.assert_allclose(
      traced(labels[:size], embeddings[:size]),
      loss_fn(labels[:size], embeddings[:size], 0.5),
      rtol=1e-6,
    )


def test_pairwise_distances_are_zero_between_duplicates():
  embeddings = np.random.default_rng(0).normal(size=(7, 33)).astype(np.float32)
  embeddings[3] = embeddings[1]
  distances = losses.pairwise_distances(embeddings).numpy()
  expected = np.linalg.norm(embeddings[:, None] - embeddings[None], axis=-1)
  np.testing.assert_allclose(distances, expected, rtol=1e-5)
  assert distances[1, 3] == 0
  assert (np.diag(distances) == 0).all()
  np.testing.assert_allclose(
    losses.pairwise_distances(embeddings, squared=True), expected**2, rtol=1e-5
  )
