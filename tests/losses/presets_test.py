"""Presets against their references, and config files of losses."""

from __future__ import annotations

import pathlib

import gin
import numpy as np
import pytest
import tensorflow as tf

import trainer.training.row_optimizers
import trainer.training.step  # noqa: F401  Registers TrainStep.
from tests.losses import batches, golden
from trainer import losses
from trainer.distribute.collectives import OneReplica
from trainer.errors import UserError
from trainer.losses import presets
from trainer.losses.class_centres import TrainingClasses
from trainer.losses.loss_terms import MiningBatch

_CONFIGS = sorted((pathlib.Path(__file__).parents[2] / "configs/losses").glob("*.gin"))


def _mean(loss, embeddings, labels):
  terms = loss(*batches.arguments(embeddings, labels))
  return tf.math.divide_no_nan(terms.total, terms.count)


@pytest.mark.golden
@pytest.mark.parametrize("margin", [0.2, 1.0])
@pytest.mark.parametrize(
  ("preset", "kind"),
  [
    (presets.omoindrot_batch_all, "batch_all"),
    (presets.omoindrot_batch_hard, "batch_hard"),
    (presets.omoindrot_batch_hard, "tfa_hard"),
    (presets.tfa_semi_hard, "tfa_semihard"),
  ],
)
def test_preset_has_the_recorded_value(preset, kind, margin):
  key = f"unbalanced/{kind}/margin={margin}/squared=False"
  embeddings = golden.VECTORS["unbalanced/embeddings"]
  labels = golden.VECTORS["unbalanced/labels"]
  value = _mean(preset(margin=margin), embeddings, labels)
  golden.assert_value_equals(value, f"{key}/loss")


def _triplets():
  embeddings, labels = batches.random_batch("unbalanced")
  unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
  for a in range(len(labels)):
    distances = np.linalg.norm(unit - unit[a], axis=1)
    others = np.arange(len(labels)) != a
    same = labels == labels[a]
    yield distances[same & others], distances[~same]


def _mean_of_non_zero(costs):
  return np.mean([cost for cost in costs if cost > 0])


def test_pml_batch_all_is_the_mean_of_non_zero_triplets_of_unit_vectors():
  costs = [p - n + 0.05 for ps, ns in _triplets() for p in ps for n in ns]
  value = _mean(presets.pml_batch_all(), *batches.random_batch("unbalanced"))
  np.testing.assert_allclose(value, _mean_of_non_zero(costs), rtol=1e-5)


def test_pml_batch_hard_drops_anchors_without_a_positive():
  costs = [ps.max() - ns.min() + 0.05 for ps, ns in _triplets() if len(ps)]
  value = _mean(presets.pml_batch_hard(), *batches.random_batch("unbalanced"))
  np.testing.assert_allclose(value, _mean_of_non_zero(costs), rtol=1e-5)


def test_pml_semi_hard_has_no_fallback():
  pairs = [(p, n) for ps, ns in _triplets() for p in ps for n in ns]
  costs = [p - n + 0.4 for p, n in pairs if n > p]
  loss = presets.pml_semi_hard(margin=0.4)
  value = _mean(loss, *batches.random_batch("unbalanced"))
  np.testing.assert_allclose(value, _mean_of_non_zero(costs), rtol=1e-5)


def test_hermans_batch_hard_is_the_soft_margin_of_the_hardest():
  embeddings, labels = batches.random_batch("balanced")
  distances = np.linalg.norm(embeddings[:, None] - embeddings[None], axis=2)
  same = labels[:, None] == labels[None, :]
  farthest = np.where(same, distances, -np.inf).max(1)
  nearest = np.where(same, np.inf, distances).min(1)
  value = _mean(presets.hermans_batch_hard(), embeddings, labels)
  expected = np.log1p(np.exp(farthest - nearest)).mean()
  np.testing.assert_allclose(value, expected, rtol=1e-5)


@pytest.mark.parametrize("path", _CONFIGS, ids=lambda path: path.stem)
def test_config_file_builds_a_loss(path):
  gin.parse_config_file(str(path))
  loss = gin.query_parameter("TrainStep.loss").scoped_configurable_fn()
  embeddings, labels = batches.random_batch("balanced")
  for table in loss.tables:
    classes = TrainingClasses(range(6), range(1, 7))
    table.create_variables(embeddings.shape[1], classes)
  rows = [table.read(labels, tf.constant(0), OneReplica()) for table in loss.tables]
  pairs = MiningBatch(*batches.arguments(embeddings, labels), is_global=True)
  assert np.isfinite(loss.replica_loss(pairs, rows, OneReplica()).value)


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
