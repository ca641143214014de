"""Weighted sums of losses: value, gradients, statistics and replicas."""

from __future__ import annotations

import functools
import itertools
import pathlib
import re

import gin
import numpy as np
import pytest
import tensorflow as tf

from tests.losses.centre_table import class_centres
from tests.thorough import thorough_except
from trainer import losses
from trainer.data.pipeline import PADDING_LABEL, Batch
from trainer.distribute.collectives import OneReplica
from trainer.errors import UserError
from trainer.losses.centre_products import ClassFilter
from trainer.losses.class_centres import ClassCentres, TrainingClasses
from trainer.losses.loss_terms import Anchors
from trainer.losses.objectives import global_negatives, local_negatives
from trainer.models.backbones import Perceptron
from trainer.models.encoder import Encoder
from trainer.training import parity
from trainer.training.row_optimizers import RowAdam
from trainer.training.step import TrainStep

_NUM_CLASSES = 12
_ROOT = pathlib.Path(__file__).parents[2]


def _batch_hard(**arguments):
  return losses.BatchHardTripletLoss(margin=0.5, **arguments)


def _evaluate(loss, objective_fn=global_negatives):
  """Returns the loss of the replica and gradients to embeddings and centres."""
  random = np.random.default_rng(0)
  labels = tf.constant([0, 0, 1, 1, 3, 3, 4, -1])
  weights = tf.constant([1.0] * 7 + [0.0])
  embeddings = tf.constant(random.normal(size=(8, 3)), tf.float32)
  rows = [table.read(labels, tf.constant(0), OneReplica()) for table in loss.tables]
  vectors = [each.vectors for each in rows]
  with tf.GradientTape() as tape:
    tape.watch([embeddings, *vectors])
    pairs = objective_fn(Anchors(embeddings, labels, weights), OneReplica())
    found = loss.replica_loss(pairs, rows, OneReplica())
  return found, tape.gradient(found.value, [embeddings, *vectors])


def _parts():
  return [
    losses.ArcFaceLoss(centres=class_centres(5, 3), scale=8.0),
    _batch_hard(),
    losses.CosFaceLoss(centres=class_centres(5, 3, seed=1), scale=4.0),
  ]


def test_value_and_gradients_are_weighted_sums():
  parts, weights = _parts(), [0.5, 2.0, 3.0]
  found, gradients = _evaluate(losses.SumOfLosses(losses=parts, weights=weights))
  alone = [_evaluate(part) for part in parts]
  expected = sum(w * each[0].value for w, each in zip(weights, alone))
  np.testing.assert_allclose(found.value, expected, rtol=1e-6)
  to_embeddings = sum(w * each[1][0] for w, each in zip(weights, alone))
  expected = [to_embeddings, 0.5 * alone[0][1][1], 3.0 * alone[2][1][1]]
  for gradient, wanted in zip(gradients, expected):
    np.testing.assert_allclose(gradient, wanted, rtol=1e-5, atol=1e-6)


def test_both_losses_are_logged_under_their_class_names():
  parts = _parts()
  statistics = _evaluate(losses.SumOfLosses(losses=parts))[0].statistics
  for part in parts:
    logged = statistics[f"train/loss/{type(part).__name__}"]
    alone, _ = _evaluate(part)
    np.testing.assert_allclose(logged.total / logged.count, alone.value, rtol=1e-6)
  active = statistics["mining/active_fraction/ArcFaceLoss"]
  assert statistics["mining/active_fraction"] is active
  assert "centres/accuracy/CosFaceLoss" in statistics


def test_second_loss_of_a_class_has_a_number():
  parts = [_batch_hard(), _batch_hard(distance="cosine")]
  statistics = _evaluate(losses.SumOfLosses(losses=parts))[0].statistics
  assert "train/loss/BatchHardTripletLoss" in statistics
  assert "train/loss/BatchHardTripletLoss_2" in statistics


def test_curriculum_is_paced_by_its_own_active_fraction():
  curriculum = losses.CurriculumTripletLoss(margin=0.2, pace=losses.AdaptivePace())
  loss = losses.SumOfLosses(losses=[_parts()[0], curriculum])
  statistics = _evaluate(loss)[0].statistics
  active = statistics["mining/active_fraction/CurriculumTripletLoss"]
  assert statistics["mining/active_fraction"] is active
  assert curriculum in loss.submodules


def test_mining_statistics_are_those_of_the_loss_with_a_margin():
  loss = losses.SumOfLosses(losses=_parts())
  assert loss.margin == 0.5
  assert loss.comparison is _batch_hard().comparison
  assert loss.needs_positives
  assert not losses.SumOfLosses(losses=_parts()[:1]).needs_positives


def test_pair_losses_may_be_mined_on_each_replica_alone():
  parts = [_batch_hard(), losses.InfoNCELoss(temperature=0.5)]
  found, _ = _evaluate(losses.SumOfLosses(losses=parts), local_negatives)
  alone = [_evaluate(part, local_negatives)[0].value for part in parts]
  np.testing.assert_allclose(found.value, sum(alone), rtol=1e-6)


def test_gin_configures_losses_and_weights():
  gin.parse_config("""
    test/SumOfLosses.losses = [@InfoNCELoss(), @BatchHardTripletLoss()]
    test/SumOfLosses.weights = [1.0, 0.5]
    InfoNCELoss.temperature = 0.5
    BatchHardTripletLoss.margin = 0.2
  """)
  with gin.config_scope("test"):
    loss = gin.get_configurable(losses.SumOfLosses)()
  assert "train/loss/InfoNCELoss" in _evaluate(loss)[0].statistics


def test_example_of_the_page_builds_a_sum():
  page = (_ROOT / "trainer" / "losses" / "README.md").read_text(encoding="utf-8")
  examples = re.findall(r"^```gin\n(.*?)^```", page, re.M | re.DOTALL)
  gin.parse_config([each for each in examples if "ArcFaceLoss" in each])
  gin.bind_parameter("BatchHardTripletLoss.margin", 0.2)
  loss = gin.query_parameter("TrainStep.loss").scoped_configurable_fn()
  assert isinstance(loss, losses.SumOfLosses)
  assert len(loss.tables) == 1


def test_variables_of_each_loss_are_tracked():
  temperature = losses.LearnedTemperature(initial=0.5)
  parts = [
    losses.InfoNCELoss(temperature=temperature),
    losses.AdaFaceLoss(centres=class_centres(5, 3)),
  ]
  loss = losses.SumOfLosses(losses=parts)
  assert len(loss.trainable_variables) == 1
  assert len(loss.non_trainable_variables) == 2


@functools.cache
def _batches():
  random = np.random.default_rng(3)
  labels = np.repeat(np.arange(0, _NUM_CLASSES, 2, dtype=np.int32), 4)
  labels[-1] = PADDING_LABEL
  weights = (labels >= 0).astype(np.float32)
  numbers = np.arange(len(labels), dtype=np.int32)
  return [
    Batch(
      random.normal(size=(len(labels), 5)).astype(np.float32), labels, weights, numbers
    )
    for _ in range(3)
  ]


def _softmax_and_pairs(table_fn):
  return [
    losses.ArcFaceLoss(centres=table_fn(1), scale=8.0, class_filter=ClassFilter(0.7)),
    _batch_hard(),
    losses.DynamicMarginLoss(centres=table_fn(3), scale=8.0),
  ]


def _with_softmax(table_fn):
  return [
    losses.AdaFaceLoss(centres=table_fn(1), scale=8.0, update_rate=0.5),
    losses.ProxyAnchorLoss(centres=table_fn(1), scale=4.0),
    losses.SoftTripleLoss(centres=table_fn(3), scale=8.0),
  ]


def _step(make_losses, rate, tables):
  """Returns a step whose centre tables are appended to a list."""

  def table(centres_per_class):
    tables.append(
      ClassCentres(
        optimizer=RowAdam(learning_rate=0.01),
        sampling_rate=rate,
        centres_per_class=centres_per_class,
        is_corrected=make_losses is _with_softmax,
      )
    )
    return tables[-1]

  tf.keras.utils.set_random_seed(11)
  step = TrainStep(
    encoder=Encoder(backbone=Perceptron(hidden_units=()), embedding_size=6),
    loss=losses.SumOfLosses(losses=make_losses(table), weights=[1.0, 0.5, 0.25]),
    objective_fn=global_negatives,
    optimizer=tf.keras.optimizers.SGD(0.1),
    mining_statistics=None,
  )
  step.create_variables((5,), TrainingClasses(range(_NUM_CLASSES), np.arange(1, 13)))
  return step


def _centres(table):
  """Returns the rows of all classes, from all replicas."""
  parts = getattr(table._tables[0], "values", [table._tables[0]])
  rows = [part.numpy()[: table.classes_per_replica] for part in parts]
  return np.concatenate(rows)[:_NUM_CLASSES]


@pytest.mark.parity
@pytest.mark.parametrize(
  ("make_losses", "rate", "num_replicas"),
  thorough_except(
    [(_softmax_and_pairs, 0.4, 4), (_with_softmax, 1.0, 2)],
    itertools.product((_softmax_and_pairs, _with_softmax), (1.0, 0.4), (2, 4)),
  ),
)
def test_replicas_compute_the_results_of_one_replica(
  mirrored, make_losses, rate, num_replicas
):
  alone, divided = [], []
  make_step = functools.partial(_step, make_losses, rate)
  expected = parity.expected(functools.partial(make_step, alone), _batches(), 1)
  got = parity.trained(
    mirrored(num_replicas), functools.partial(make_step, divided), _batches()
  )
  errors = parity.errors(got, expected)
  assert parity.is_equal(errors), errors
  for one, other in zip(alone, divided):
    wanted = _centres(one)
    np.testing.assert_allclose(
      _centres(other), wanted, rtol=0, atol=1e-5 * np.abs(wanted).max()
    )


def _nested():
  return losses.SumOfLosses(losses=[_batch_hard()])


def _sharing():
  table = class_centres(5, 3)
  return [losses.ArcFaceLoss(centres=table), losses.CosFaceLoss(centres=table)]


def _paced():
  return losses.CurriculumTripletLoss(margin=0.2, pace=losses.AdaptivePace())


@pytest.mark.parametrize(
  ("make_losses", "weights", "message"),
  [
    (list, None, r"SumOfLosses\.losses is empty"),
    (lambda: [_nested()], None, "give losses of this package"),
    (lambda: [len], None, "give losses of this package"),
    (_sharing, None, "share their class centres"),
    (lambda: [_paced(), _paced()], None, "2 losses with a curriculum"),
    (lambda: [_batch_hard()], [1.0, 1.0], r"weights=\[1.0, 1.0\] for 1 losses"),
    (lambda: [_batch_hard()], [-1.0], "number of at least 0"),
    (lambda: [_batch_hard()], [0.0], "one above 0"),
    (lambda: [_batch_hard()], [float("inf")], "number of at least 0"),
  ],
)
def test_argument_out_of_range_is_reported_in_one_line(make_losses, weights, message):
  with pytest.raises(UserError, match=message) as raised:
    losses.SumOfLosses(losses=make_losses(), weights=weights)
  assert "\n" not in str(raised.value)


def test_keras_is_refused():
  with pytest.raises(UserError, match="in Keras add the losses"):
    _nested()(np.zeros(4, np.int32), np.ones((4, 3), np.float32))


def test_jitter_around_a_sum_or_class_centres_is_refused():
  with pytest.raises(UserError, match="put JitteredLoss around its parts"):
    _evaluate(losses.JitteredLoss(loss=_nested()))
  with pytest.raises(UserError, match="JitteredLoss moves embeddings"):
    losses.JitteredLoss(loss=_parts()[0])
