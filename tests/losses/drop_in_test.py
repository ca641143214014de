"""The seed's functions, against values and gradients recorded from the seed itself."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest
import tensorflow as tf

from trainer import losses
from trainer.errors import UserError

_GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "golden" / "triplet.npz")
_KEYS = sorted(key[: -len("/loss")] for key in _GOLDEN if key.endswith("/loss"))


def _keys(kind):
  return [key for key in _KEYS if key.split("/")[1] == kind]


def _value_and_gradient(loss_fn, key):
  case, _, margin, squared = key.split("/")
  labels = tf.constant(_GOLDEN[f"{case}/labels"])
  embeddings = tf.constant(_GOLDEN[f"{case}/embeddings"])
  with tf.GradientTape() as tape:
    tape.watch(embeddings)
    value = loss_fn(
      labels, embeddings, float(margin.split("=")[1]), squared=squared.endswith("True")
    )
    loss = value[0] if isinstance(value, tuple) else value
  return value, tape.gradient(loss, embeddings).numpy()


def assert_close(value, expected):
  """Within 1e-5 of the largest expected value; the seed rounds a gradient of 0 to 5e-8."""
  scale = max(np.abs(expected).max(), 1e-2)
  np.testing.assert_allclose(value, expected, rtol=0, atol=1e-5 * scale)


@pytest.mark.golden
@pytest.mark.parametrize("key", _keys("batch_all"))
def test_batch_all_equals_the_seed(key):
  (loss, fraction), gradient = _value_and_gradient(losses.batch_all_triplet_loss, key)
  assert_close(loss, _GOLDEN[f"{key}/loss"])
  assert_close(fraction, _GOLDEN[f"{key}/fraction_positive"])
  assert_close(gradient, _GOLDEN[f"{key}/gradient"])


@pytest.mark.golden
@pytest.mark.parametrize("key", _keys("batch_hard"))
def test_batch_hard_equals_the_seed(key):
  loss, gradient = _value_and_gradient(losses.batch_hard_triplet_loss, key)
  assert_close(loss, _GOLDEN[f"{key}/loss"])
  assert_close(gradient, _GOLDEN[f"{key}/gradient"])


_FUNCTIONS = [losses.batch_all_triplet_loss, losses.batch_hard_triplet_loss]


@pytest.mark.parametrize("loss_fn", _FUNCTIONS)
@pytest.mark.parametrize(
  "labels",
  [np.zeros((6, 1), int), np.eye(6, dtype=int), np.zeros(6), np.zeros(5, int)],
  ids=["column", "one_hot", "float", "too_few"],
)
def test_labels_that_would_broadcast_are_refused(loss_fn, labels):
  with pytest.raises(UserError, match="label"):
    loss_fn(labels, np.zeros((6, 3), np.float32), 0.2)


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
  labels = _GOLDEN["duplicates/labels"]
  embeddings = _GOLDEN["duplicates/embeddings"]
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
