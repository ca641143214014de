"""Losses in `model.fit`, against the definition in float64 NumPy."""

from __future__ import annotations

import pathlib
import re

import numpy as np
import pytest
import tensorflow as tf

from tests.losses import batches, definition, oracles
from tests.losses.table import ROWS, each_loss
from tests.thorough import thorough_except
from trainer import losses
from trainer.errors import UserError

_HARD = next(row for row in ROWS if row.name == "BatchHardTripletLoss-0.7")
_EMBEDDINGS, _LABELS = batches.random_batch("unbalanced")
_ROOT = pathlib.Path(__file__).parents[2]


def _model(loss, rate=0.0, **options):
  """Returns a network whose initial embeddings are its inputs."""
  model = tf.keras.Sequential(
    [tf.keras.layers.Dense(5, use_bias=False, kernel_initializer="identity")]
  )
  model.build([None, 5])
  model.compile(tf.keras.optimizers.SGD(rate), loss=loss, **options)
  return model


def _fit(loss, labels=_LABELS, *, size=12, inputs=_EMBEDDINGS, weights=None, **options):
  model = _model(loss, **options)
  history = model.fit(
    inputs,
    labels,
    batch_size=size,
    sample_weight=weights,
    shuffle=False,
    verbose=0,
  )
  return history.history["loss"][0]


def _mean(row, rows=slice(None), weights=None, embeddings=_EMBEDDINGS):
  """Returns the loss of some rows by its definition."""
  related = np.array(oracles.relevance(_LABELS[rows]))
  total, count = definition.total_and_count(row, embeddings[rows], related, weights)
  return total / count if count else 0.0


def _slope(row, rows=slice(None)):
  """Returns the gradient of some rows to the kernel."""
  related = np.array(oracles.relevance(_LABELS[rows]))
  _, count = definition.total_and_count(row, _EMBEDDINGS[rows], related)
  gradient = definition.gradient(row, _EMBEDDINGS[rows], related)
  return _EMBEDDINGS[rows].T @ gradient / count


def _batch_all(labels, embeddings):
  return losses.batch_all_triplet_loss(labels, embeddings, margin=0.7)[0]


def _batch_hard(labels, embeddings):
  return losses.batch_hard_triplet_loss(labels, embeddings, margin=0.7)


@each_loss
def test_keras_value_of_every_loss_equals_its_definition(row):
  labels = np.float32(_LABELS)[:, None]
  np.testing.assert_allclose(row.make()(labels, _EMBEDDINGS), _mean(row), rtol=2e-5)


@each_loss
def test_every_loss_is_restored_from_its_config(row):
  loss = row.make()
  again = type(loss).from_config(loss.get_config())
  np.testing.assert_array_equal(again(_LABELS, _EMBEDDINGS), loss(_LABELS, _EMBEDDINGS))
  assert again.get_config() == loss.get_config()


@pytest.mark.parametrize(
  "loss", [_HARD.make(), _batch_hard], ids=["object", "function"]
)
@pytest.mark.parametrize("num_replicas", thorough_except([2], [1, 2]))
def test_replicas_train_with_the_mean_of_their_losses(loss, num_replicas, mirrored):
  parts = np.split(np.arange(12), num_replicas)
  with mirrored(num_replicas).scope():
    model = _model(loss, rate=1.0)
  history = model.fit(_EMBEDDINGS, _LABELS, batch_size=12, shuffle=False, verbose=0)
  expected = np.mean([_mean(_HARD, rows) for rows in parts])
  np.testing.assert_allclose(history.history["loss"], expected, rtol=2e-5)
  slope = np.mean([_slope(_HARD, rows) for rows in parts], 0)
  change = np.eye(5) - model.get_weights()[0]
  np.testing.assert_allclose(change, slope, atol=1e-4 * np.abs(slope).max())


def test_last_batch_may_be_empty_on_a_replica(mirrored):
  with mirrored(2).scope():
    model = _model(_HARD.make(), rate=1.0)
  model.fit(_EMBEDDINGS[:9], _LABELS[:9], batch_size=8, verbose=0)
  assert np.isfinite(model.get_weights()[0]).all()


@pytest.mark.parametrize(
  "options",
  [{}, {"run_eagerly": True}, {"jit_compile": True}],
  ids=["graph", "eager", "xla"],
)
@pytest.mark.parametrize(
  "loss",
  [_HARD.make(), pytest.param(_batch_hard, marks=pytest.mark.thorough)],
  ids=["object", "function"],
)
def test_last_batch_is_weighted_by_its_size(loss, options):
  expected = (8 * _mean(_HARD, slice(8)) + 4 * _mean(_HARD, slice(8, 12))) / 12
  got = _fit(loss, np.float32(_LABELS), size=8, **options)
  np.testing.assert_allclose(got, expected, rtol=2e-5)


def test_validation_loss_is_that_of_the_validation_data():
  model = _model(_HARD.make())
  data = _EMBEDDINGS[:7], _LABELS[:7]
  history = model.fit(*data, validation_data=(_EMBEDDINGS, _LABELS), verbose=0)
  np.testing.assert_allclose(history.history["val_loss"], _mean(_HARD), rtol=2e-5)


@each_loss
def test_sample_weights_are_weights_of_the_anchors(row):
  weights = np.linspace(0.5, 2, 12)
  weights[[2, 9]] = 0
  got = row.make()(_LABELS, _EMBEDDINGS, weights[:, None])
  np.testing.assert_allclose(got, _mean(row, weights=weights), rtol=2e-5)


def test_sample_weights_reach_the_loss_in_fit():
  weights = np.linspace(0.5, 2, 12)
  expected = _mean(_HARD, weights=weights)
  np.testing.assert_allclose(_fit(_HARD.make(), weights=weights), expected, rtol=2e-5)
  assert abs(expected - _mean(_HARD)) > 1e-3


@pytest.mark.parametrize("weights", [np.full(12, -1.0), np.full(12, np.nan)])
def test_sample_weight_that_is_not_at_least_0_is_refused(weights):
  with pytest.raises(UserError, match="sample_weight must be at least 0"):
    _HARD.make()(_LABELS, _EMBEDDINGS, weights)


@pytest.mark.parametrize("shape", [(11,), (12, 2), (12, 1, 1)])
def test_sample_weight_of_another_shape_is_refused(shape):
  with pytest.raises(UserError, match="sample_weight"):
    _HARD.make()(_LABELS, _EMBEDDINGS, np.ones(shape))


def test_half_precision_network_is_trained():
  tf.keras.mixed_precision.set_global_policy("mixed_float16")
  try:
    got = _fit(_HARD.make(), np.float32(_LABELS))
  finally:
    tf.keras.mixed_precision.set_global_policy("float32")
  rounded = np.float64(np.float16(_EMBEDDINGS))
  np.testing.assert_allclose(got, _mean(_HARD, embeddings=rounded), rtol=1e-3)


_WITH_PARTS = {
  "of_selection": ROWS[13].make(),
  "wrapped": losses.KerasLoss(losses.NPairsLoss(), label_encoding="integer"),
  "of_variable": losses.JitteredLoss(
    loss=losses.BatchAllTripletLoss(margin=tf.Variable(0.5))
  ),
}


@pytest.mark.parametrize(
  ("name", "loss"),
  [
    *((name, _HARD.make()) for name in ("m.keras", "saved_model")),
    ("m.h5", _WITH_PARTS["wrapped"]),
    *(
      pytest.param("m.h5", loss, marks=pytest.mark.thorough)
      for loss in (_HARD.make(), *_WITH_PARTS.values())
    ),
  ],
  ids=["keras", "saved_model", "h5_wrapped", "h5", *_WITH_PARTS],
)
def test_saved_model_continues_training_with_its_loss(name, loss, tmp_path):
  model = _model(loss, rate=0.1)
  model.fit(_EMBEDDINGS, _LABELS, verbose=0)
  model.save(tmp_path / name)
  loaded = tf.keras.models.load_model(tmp_path / name)
  assert type(loaded.loss) is type(loss)
  assert loaded.evaluate(_EMBEDDINGS, _LABELS, verbose=0) == pytest.approx(
    model.evaluate(_EMBEDDINGS, _LABELS, verbose=0), rel=1e-6
  )


@pytest.mark.parametrize("encoding", ["one_hot", "multi_hot"])
def test_wrapper_reads_labels_in_other_encodings(encoding):
  labels = np.eye(8, dtype=np.float32)[_LABELS]
  if encoding == "multi_hot":
    labels[0, 1] = 1  # Shares a second label with others.
  loss = losses.KerasLoss(_HARD.make(), label_encoding=encoding)
  related = labels @ labels.T > 0
  total, count = definition.total_and_count(_HARD, _EMBEDDINGS, related)
  np.testing.assert_allclose(_fit(loss, labels), total / count, rtol=2e-5)


@pytest.mark.parametrize(
  ("loss", "encoding", "message"),
  [
    (_HARD.make(), "onehot", "is unknown"),
    (_batch_hard, "one_hot", "give one of this"),
  ],
)
def test_wrapper_of_a_non_loss_is_refused(loss, encoding, message):
  with pytest.raises(UserError, match=message):
    losses.KerasLoss(loss, label_encoding=encoding)


@pytest.mark.parametrize(
  ("loss", "message"),
  [
    (
      losses.CurriculumTripletLoss(
        margin=0.2, pace=losses.LinearPace(first_step=0, last_step=9)
      ),
      "has a pace, LinearPace",
    ),
    (
      losses.InfoNCELoss(temperature=losses.LearnedTemperature(initial=0.1)),
      "has a LearnedTemperature",
    ),
  ],
)
def test_loss_with_trainable_state_is_refused(loss, message):
  assert type(loss).from_config(loss.get_config()).get_config() == loss.get_config()
  for each in (loss, losses.JitteredLoss(loss=loss)):
    with pytest.raises(UserError, match=message):
      each(_LABELS, _EMBEDDINGS)


def test_tuple_of_loss_and_fraction_is_refused():
  def loss_fn(labels, embeddings):
    return losses.batch_all_triplet_loss(labels, embeddings, margin=0.7)

  with pytest.raises(ValueError, match=r"give Keras the first alone"):
    _fit(loss_fn, run_eagerly=True)


@pytest.mark.parametrize("loss", [_batch_all, ROWS[0].make()])
def test_invalid_labels_raise_in_a_graph_and_give_nan_in_xla(loss):
  labels = _LABELS + np.float32(0.5)
  with pytest.raises(tf.errors.InvalidArgumentError, match="must be whole numbers"):
    _fit(loss, labels)
  assert np.isnan(_fit(loss, labels, jit_compile=True))


@pytest.mark.parametrize("form", [np.float32, tf.constant, tf.Variable, np.array])
def test_margin_may_be_of_any_numeric_type(form):
  margin = form(np.float32(0.7))
  for got in (
    losses.batch_hard_triplet_loss(_LABELS, _EMBEDDINGS, margin),
    losses.BatchHardTripletLoss(margin=margin)(_LABELS, _EMBEDDINGS),
  ):
    np.testing.assert_allclose(got, _mean(_HARD), rtol=2e-5)


@pytest.mark.parametrize(
  "row",
  [row for row in ROWS if "margin" in row.make().get_config()],
  ids=lambda r: r.name,
)
def test_variable_margin_is_read_at_each_call(row):
  config = row.make().get_config()
  if config["margin"] == "soft" or "hardness" in config:
    return  # Not numeric, or changed by a curriculum.
  margin = tf.Variable(0.123)
  loss = type(row.make()).from_config({**config, "margin": margin})
  value_fn = tf.function(lambda: loss(_LABELS, _EMBEDDINGS))
  for each in (0.123, config["margin"]):
    margin.assign(each)
    fixed = type(loss).from_config({**config, "margin": each})
    np.testing.assert_allclose(value_fn(), fixed(_LABELS, _EMBEDDINGS), rtol=1e-6)


def test_tensor_margin_is_read_at_each_call():
  value_fn = tf.function(
    lambda margin: losses.batch_all_triplet_loss(_LABELS, _EMBEDDINGS, margin)[0]
  )
  for margin in (0.3, 1.1):
    np.testing.assert_allclose(
      value_fn(tf.constant(margin)),
      losses.batch_all_triplet_loss(_LABELS, _EMBEDDINGS, margin)[0],
      rtol=1e-6,
    )


@pytest.mark.parametrize(
  ("margin", "message"),
  [
    (np.nan, "not above 0"),
    (np.inf, "not finite"),
    (tf.Variable(-1.0), "not above 0"),
    ("0.2x", "is not a number"),
    (np.array([0.2, 0.3]), r"has shape \(2,\)"),
  ],
)
def test_margin_that_is_not_positive_and_finite_is_refused(margin, message):
  for make in (losses.BatchHardTripletLoss, losses.ContrastiveLoss):
    with pytest.raises(UserError, match=message):
      make(margin=margin)


def test_example_of_the_page_trains():
  page = (_ROOT / "trainer" / "losses" / "README.md").read_text(encoding="utf-8")
  [example] = re.findall(r"^```python\n(# Keras\n.*?)^```", page, re.M | re.DOTALL)
  names = {"images": _EMBEDDINGS, "labels": _LABELS, "network": _model(None)}
  exec(example, names)
  assert len(names["network"].history.history["val_loss"]) == 1
