"""Properties of every loss against class centres, for each row of the table."""

from __future__ import annotations

import copy
import pathlib
import types

import numpy as np
import pytest
import tensorflow as tf

from tests.losses.centre_table import (
  ROWS,
  CentreBatch,
  class_centres,
  each_kind,
  each_row,
  evaluate,
  expected_gradients,
  expected_value,
)
from trainer import losses
from trainer.distribute.collectives import OneReplica
from trainer.errors import UserError
from trainer.losses import centre_products
from trainer.losses import class_centres as class_centres_lib
from trainer.losses.centre_losses import ArcOptions, ClassCentreLoss
from trainer.losses.loss_terms import Anchors
from trainer.losses.metric_accumulators import summarize
from trainer.losses.objectives import (
  WithinGroups,
  global_negatives,
  local_negatives,
)
from trainer.models.backbones import Perceptron
from trainer.models.encoder import Encoder
from trainer.training import checks
from trainer.training.step import TrainStep


def _are_same(got, expected, tolerance=1e-5):
  """Returns whether arrays agree, relative to their largest entries."""
  return len(got) == len(expected) and all(
    np.allclose(one, other, rtol=0, atol=tolerance * (np.abs(other).max() + 1e-3))
    for one, other in zip(got, expected)
  )


def _are_finite(found):
  return all(np.isfinite(each).all() for each in found)


def test_table_has_every_public_loss_against_centres():
  public = {
    name
    for name in losses.__all__
    if isinstance(getattr(losses, name), type)
    and issubclass(getattr(losses, name), ClassCentreLoss)
  }
  assert public == {type(row.make(class_centres(5, 3))).__name__ for row in ROWS}


@each_row
def test_value_equals_the_definition(row):
  batch = CentreBatch(row.centres_per_class)
  value, _, _ = evaluate(row.make, batch)
  np.testing.assert_allclose(value, expected_value(row.oracle, batch), rtol=1e-5)


@each_row
def test_gradients_equal_finite_differences_of_the_definition(row):
  batch = CentreBatch(row.centres_per_class)
  _, *gradients = evaluate(row.make, batch)
  assert _are_same(gradients, expected_gradients(row.oracle, batch))


@each_row
def test_value_for_two_classes_equals_the_definition(row):
  batch = CentreBatch(row.centres_per_class, num_classes=2)
  value, *gradients = evaluate(row.make, batch)
  np.testing.assert_allclose(value, expected_value(row.oracle, batch), rtol=1e-5)
  assert _are_same(gradients, expected_gradients(row.oracle, batch))


@each_kind
@pytest.mark.parametrize("label", [-1, 2])
def test_padding_does_not_change_the_loss(row, label):
  batch = CentreBatch(row.centres_per_class)
  value, to_embeddings, to_centres = evaluate(row.make, batch)
  padded = copy.deepcopy(batch)
  padded.embeddings = np.pad(batch.embeddings, [[0, 2], [0, 0]])
  padded.embeddings[6:] = np.nan
  padded.labels = np.append(batch.labels, [label, label]).astype(np.int32)
  padded.weights = np.pad(batch.weights, [0, 2])
  got, *gradients = evaluate(row.make, padded)
  np.testing.assert_allclose(got, value, rtol=1e-6)
  assert _are_same(
    gradients, [np.pad(to_embeddings, [[0, 2], [0, 0]]), to_centres], 1e-6
  )


@each_kind
def test_batch_of_padding_has_only_the_regularizer(row):
  batch = CentreBatch(row.centres_per_class)
  batch.embeddings[:], batch.labels[:], batch.weights[:] = np.nan, -1, 0
  value, to_embeddings, to_centres = evaluate(row.make, batch)
  expected = expected_value(row.oracle, batch)
  np.testing.assert_allclose(value, expected, rtol=1e-6)
  assert not np.any(to_embeddings)
  assert np.any(to_centres) == (expected > 0)


@each_kind
def test_order_of_the_batch_does_not_matter(row):
  batch = CentreBatch(row.centres_per_class)
  value, to_embeddings, to_centres = evaluate(row.make, batch)
  order = np.array([3, 5, 0, 1, 4, 2])
  batch.embeddings, batch.labels = batch.embeddings[order], batch.labels[order]
  batch.weights = batch.weights[order]
  got, *gradients = evaluate(row.make, batch)
  np.testing.assert_allclose(got, value, rtol=1e-6)
  assert _are_same(gradients, [to_embeddings[order], to_centres], 1e-6)


@each_row
@pytest.mark.parametrize("sign", [1, -1])
def test_embedding_parallel_to_its_centre_is_finite(row, sign):
  batch = CentreBatch(row.centres_per_class)
  # All centres of the class, so that it is the nearest.
  batch.centres[1] = batch.centres[1, :1]
  batch.embeddings[0] = 3 * sign * batch.centres[1, 0]
  found = evaluate(row.make, batch)
  np.testing.assert_allclose(found[0], expected_value(row.oracle, batch), rtol=1e-4)
  assert _are_finite(found)


@each_row
def test_zero_embeddings_and_centres_are_finite(row):
  batch = CentreBatch(row.centres_per_class)
  batch.embeddings[0], batch.centres[3], batch.centres[4] = 0, 0, 0
  found = evaluate(row.make, batch)
  np.testing.assert_allclose(found[0], expected_value(row.oracle, batch), rtol=1e-5)
  assert _are_finite(found)
  assert not found[1][0].any()
  assert not found[2][3].any()


@each_kind
def test_equal_embeddings_and_centres_are_finite(row):
  batch = CentreBatch(row.centres_per_class)
  batch.embeddings[:], batch.centres[:] = 1, 1
  assert _are_finite(evaluate(row.make, batch))


@each_kind
@pytest.mark.parametrize("dtype", [tf.float16, tf.bfloat16])
def test_half_precision_embeddings_are_compared_in_float32(row, dtype):
  batch = CentreBatch(row.centres_per_class)
  batch.embeddings = tf.cast(batch.embeddings, dtype)
  half = evaluate(row.make, batch)
  batch.embeddings = tf.cast(batch.embeddings, tf.float32)
  whole = evaluate(row.make, batch)
  np.testing.assert_equal([half[0], half[2]], [whole[0], whole[2]])
  assert _are_same([half[1]], [whole[1]], 1e-2)


@each_kind
@pytest.mark.parametrize("norm", [1e-3, 1e4])
def test_norm_of_the_centres_does_not_matter(row, norm):
  batch = CentreBatch(row.centres_per_class)
  value, to_embeddings, to_centres = evaluate(row.make, batch)
  batch.centres *= norm
  found = evaluate(row.make, batch)
  assert _are_same(found, [value, to_embeddings, to_centres / norm], 1e-4)


def _large_batch(centres_per_class):
  random = np.random.default_rng(1)
  batch = CentreBatch()
  batch.embeddings = random.normal(size=(48, 8)).astype(np.float32)
  batch.centres = random.normal(size=(3000, centres_per_class, 8)).astype(np.float32)
  batch.labels = random.integers(0, 3000, 48).astype(np.int32)
  batch.weights = random.uniform(0.5, 2, 48).astype(np.float32)
  return batch


@each_kind
def test_large_batch_is_compiled_to_the_values_of_one_uncompiled_tile(row, monkeypatch):
  batch = _large_batch(row.centres_per_class)
  compiled = evaluate(row.make, batch)
  monkeypatch.setattr(centre_products, "_MIN_PAIRS_TO_COMPILE", 2**60)
  monkeypatch.setattr(class_centres_lib, "_ROWS_PER_TILE", 10_000)
  assert _are_same(compiled, evaluate(row.make, batch))


def _loss_of(objective_fn, labels):
  table = class_centres(5, 3)
  anchors = Anchors(tf.ones([6, 3]), tf.constant(labels), tf.ones([6]))
  pairs = objective_fn(anchors, OneReplica())
  rows = table.read(tf.zeros([6], tf.int32), tf.constant(0), OneReplica())
  return losses.NormFaceLoss(centres=table, scale=9.0).replica_loss(
    pairs, [rows], OneReplica()
  )


@pytest.mark.parametrize("loss_class", [losses.ArcFaceLoss, losses.ProxyAnchorLoss])
def test_cross_batch_memory_does_not_change_the_loss(loss_class):
  table = class_centres(5, 3)
  loss = loss_class(centres=table)
  labels = tf.constant([1, 0, 4])
  embeddings = tf.constant(CentreBatch().embeddings[:3])
  pairs = global_negatives(Anchors(embeddings, labels, tf.ones([3])), OneReplica())
  rows = table.read(labels, tf.constant(0), OneReplica())
  expected = loss.replica_loss(pairs, [rows], OneReplica()).value
  candidates = pairs.candidates._replace(
    labels=tf.constant([1, 0, 4, 2, 2]),
    is_valid=tf.ones([5], tf.bool),
    fixed_embeddings=tf.ones([2, 3]),
  )
  pairs = pairs._replace(candidates=candidates)
  value = loss.replica_loss(pairs, [rows], OneReplica()).value
  np.testing.assert_array_equal(value, expected)


def test_local_negatives_are_refused():
  with pytest.raises(UserError, match=r"set TrainStep\.objective_fn = @global"):
    _loss_of(local_negatives, np.zeros(6, np.int32))


def test_groups_of_which_the_first_alone_is_compared_are_refused():
  objective = WithinGroups()
  objective.check_groups((1, 1), "sampler")
  with pytest.raises(UserError, match="only the first of each group"):
    _loss_of(objective, np.arange(6, dtype=np.int32) // 2)


def test_ada_face_refuses_an_encoder_whose_embeddings_have_norm_1():
  step = TrainStep(
    encoder=Encoder(backbone=Perceptron(hidden_units=()), embedding_size=3),
    loss=losses.AdaFaceLoss(centres=class_centres(5, 3)),
    objective_fn=global_negatives,
    optimizer=tf.keras.optimizers.SGD(0.1),
  )
  sampler = types.SimpleNamespace(shape=(4, 1))
  with pytest.raises(UserError, match=r"set Encoder\.is_normalized = False"):
    checks.check_batch(sampler, step, 2)


def test_several_labels_of_an_example_are_refused():
  with pytest.raises(UserError, match="one label of an example"):
    _loss_of(global_negatives, np.ones([6, 4], bool))


@pytest.mark.parametrize(
  ("loss_class", "arguments", "message"),
  [
    (losses.ArcFaceLoss, {"margin": -0.1}, "ArcFaceLoss.margin=-0.1"),
    (losses.ArcFaceLoss, {"margin": 3.2}, "ArcFaceLoss.margin=3.2"),
    (losses.CosFaceLoss, {"margin": -0.1}, "CosFaceLoss.margin=-0.1"),
    (losses.CombinedMarginLoss, {"angle_factor": 0.5}, "angle_factor=0.5"),
    (
      losses.CombinedMarginLoss,
      {"angle_factor": 2.0, "arc": ArcOptions("easy")},
      "ArcOptions.beyond_pi='easy' needs 1",
    ),
    (losses.NormFaceLoss, {"scale": 0.0}, "NormFaceLoss.scale=0.0 is not above 0"),
    (losses.ArcFaceLoss, {"scale": -1.0}, "ArcFaceLoss.scale=-1.0 is not above 0"),
    (losses.NormFaceLoss, {"scale": float("nan")}, "scale=nan is not above 0"),
    (
      losses.insightface_combined,
      {"ignored_above": 1.0},
      "ClassFilter.above=1.0 is not a cosine",
    ),
    (losses.AdaFaceLoss, {"margin": -0.1}, "margin=-0.1, concentration=0.333"),
    (losses.AdaFaceLoss, {"concentration": 0.0}, "concentration=0.0"),
    (losses.AdaFaceLoss, {"update_rate": 0.0}, "update_rate=0.0"),
    (losses.DynamicMarginLoss, {"factor": -0.1}, "factor=-0.1"),
    (losses.DynamicMarginLoss, {"power": -1.0}, "power=-1.0"),
    (losses.DynamicMarginLoss, {"power": float("nan")}, "power=nan"),
    (losses.DynamicMarginLoss, {"offset": 3.1}, "sum of factor and offset below"),
    (losses.SoftTripleLoss, {"softness": 0.0}, "softness=0.0"),
    (losses.SoftTripleLoss, {"regularization": -0.1}, "regularization=-0.1"),
    (losses.SoftTripleLoss, {"margin": -0.1}, "margin=-0.1"),
    (losses.SoftTripleLoss, {"margin": float("nan")}, "margin=nan"),
    (losses.ProxyAnchorLoss, {"margin": -0.1}, "ProxyAnchorLoss.margin=-0.1"),
    (losses.ProxyAnchorLoss, {"scale": 0.0}, "ProxyAnchorLoss.scale=0.0"),
    (losses.pml_norm_face, {"temperature": 0.0}, "pml_norm_face.temperature=0.0"),
    (losses.proxy_nca_plus_plus, {"temperature": -1.0}, "temperature=-1.0"),
    (losses.insightface_combined, {"cosine_margin": 0.4}, "set the other to 0"),
  ],
)
def test_argument_out_of_range_is_reported_in_one_line(loss_class, arguments, message):
  with pytest.raises(UserError, match=message) as raised:
    loss_class(centres=class_centres(5, 3), **arguments)
  assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
  "arguments", [{"beyond_pi": "no"}, {"gradient": "no"}], ids=["beyond_pi", "gradient"]
)
def test_unknown_choice_for_the_arc_is_reported(arguments):
  [name] = arguments
  with pytest.raises(UserError, match=rf"ArcOptions\.{name}='no' must be one of"):
    ArcOptions(**arguments)


def test_class_centres_are_not_saved_by_keras():
  with pytest.raises(UserError, match="in Keras use a loss of pairs"):
    losses.ArcFaceLoss(centres=class_centres(5, 3)).get_config()


def test_proxy_anchor_refuses_several_centres_of_a_class():
  with pytest.raises(UserError, match="one centre for each class"):
    losses.ProxyAnchorLoss(centres=class_centres(5, 3, 2))


def test_keras_is_refused():
  loss = losses.NormFaceLoss(centres=class_centres(5, 3), scale=9.0)
  with pytest.raises(UserError, match="which only a training by `TrainStep`"):
    loss(np.zeros(6, np.int32), np.ones((6, 3), np.float32))


_RECORDED = np.load(pathlib.Path(__file__).parents[1] / "golden" / "pml_centres.npz")
_PML = {
  "arcface": losses.pml_arcface,
  "sub_center_arcface": losses.pml_arcface,
  "cosface": losses.pml_cosface,
  "norm_face": losses.pml_norm_face,
  "proxy_anchor": losses.pml_proxy_anchor,
  "soft_triple": losses.pml_soft_triple,
}


@pytest.mark.golden
@pytest.mark.parametrize("name", _PML)
def test_preset_equals_pytorch_metric_learning(name):
  batch = CentreBatch()
  batch.embeddings, batch.labels = _RECORDED["embeddings"], _RECORDED["labels"]
  batch.centres = _RECORDED[f"{name}/centres"]
  batch.weights = np.ones(len(batch.labels), np.float32)
  value, *gradients = evaluate(lambda table: _PML[name](centres=table), batch)
  np.testing.assert_allclose(value, _RECORDED[f"{name}/loss"], rtol=1e-5)
  expected = [_RECORDED[f"{name}/{of}"] for of in ("to_embeddings", "to_centres")]
  assert _are_same(gradients, expected)


def test_ada_face_updates_its_moving_mean_and_deviation():
  batch = CentreBatch()
  table = class_centres(5, 3)
  loss = losses.AdaFaceLoss(centres=table, update_rate=0.5)
  evaluate(lambda _: loss, batch)
  norms = np.linalg.norm(batch.embeddings, axis=1)
  mean, deviation = (norms.mean() + 20) / 2, (norms.std(ddof=1) + 100) / 2
  np.testing.assert_allclose(
    [each.numpy() for each in loss.variables], [deviation, mean]
  )


@pytest.mark.parametrize("centres_per_class", [1, 2])
def test_statistics_describe_the_cosines_with_the_centres(centres_per_class):
  random = np.random.default_rng(0)
  table = class_centres(20, 4, centres_per_class)
  labels = np.append(random.integers(20, size=99), -1).astype(np.int32)
  embeddings = random.normal(size=(100, 4)).astype(np.float32)
  weights = (labels >= 0).astype(np.float32)
  anchors = Anchors(*map(tf.constant, (embeddings, labels, weights)))
  pairs = global_negatives(anchors, OneReplica())
  rows = [table.read(pairs.candidates.labels, tf.constant(0), OneReplica())]
  loss = losses.NormFaceLoss(centres=table, scale=16.0)
  found = summarize(
    tf.nest.map_structure(
      lambda value: value.numpy(),
      dict(loss.replica_loss(pairs, rows, OneReplica()).statistics),
    )
  )
  centres = table.gather_centres()
  norms = np.linalg.norm(centres, axis=2)
  unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
  cosines = np.einsum("nd,ckd->nck", unit, centres / norms[:, :, None]).max(2)[:99]
  own = cosines[np.arange(99), labels[:99]]
  cosines[np.arange(99), labels[:99]] = -np.inf
  nearest = cosines.max(1)
  expected = {
    "own_cosine": own.mean(),
    "own_cosine_std": own.std(),
    "own_cosine_p05": np.sort(own)[5],
    "own_cosine_p50": np.sort(own)[49],
    "own_cosine_p95": np.sort(own)[93],
    "nearest_other_cosine": nearest.mean(),
    "accuracy": (own > nearest).mean(),
    "norm": norms[labels[:99]].mean(),
  }
  for name, value in expected.items():
    np.testing.assert_allclose(found[f"centres/{name}"], value, atol=1e-5)
