"""Curricula from all triplets to the hardest: by step or by active fraction."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from tests.losses import batches
from tests.thorough import thorough_except
from trainer.data.pipeline import Batch
from trainer.errors import UserError
from trainer.losses import (
  AdaptivePace,
  BatchAllTripletLoss,
  CurriculumTripletLoss,
  JitteredLoss,
  LinearPace,
  MiningStatistics,
  TripletLoss,
)
from trainer.losses.loss_terms import WeightedMean
from trainer.losses.metric_accumulators import summarize
from trainer.losses.objectives import global_negatives
from trainer.models.backbones import Perceptron
from trainer.models.encoder import Encoder
from trainer.training import parity
from trainer.training.step import TrainStep

_HARDEST = {"positives": "hardest", "negatives": "hardest", "reduction": "mean_active"}


def _progress(pace, progress=0.0, step=0, active=(0.0, 0.0)):
  active = WeightedMean(*map(tf.constant, active))
  return float(pace(tf.constant(progress), tf.constant(step), active))


@pytest.mark.parametrize(
  ("step", "wanted"), [(0, 0.0), (10, 0.0), (15, 0.25), (30, 1.0), (99, 1.0)]
)
def test_linear_pace_depends_on_the_step(step, wanted):
  assert _progress(LinearPace(first_step=10, last_step=30), step=step) == wanted


@pytest.mark.parametrize(
  ("active", "wanted"),
  [
    ((1.0, 100.0), 0.6),  # Too few active: harder.
    ((95.0, 100.0), 0.4),  # Nearly all active: easier.
    ((50.0, 100.0), 0.5),
    ((0.0, 0.0), 0.5),  # Without terms: unchanged.
  ],
)
def test_active_pace_depends_on_the_active_fraction(active, wanted):
  pace = AdaptivePace(lowest=0.1, highest=0.9, change=0.1)
  assert _progress(pace, 0.5, active=active) == pytest.approx(wanted)


@pytest.mark.parametrize("active", [(0.0, 9.0), (9.0, 9.0)])
def test_active_pace_stays_between_begin_and_end(active):
  pace = AdaptivePace(lowest=0.1, highest=0.9, change=0.3)
  assert _progress(pace, 0.1 if active[0] else 0.9, active=active) == float(
    not active[0]
  )


@pytest.mark.parametrize(
  ("hardness", "other"),
  [
    (0.0, BatchAllTripletLoss(margin=0.7)),
    (1.0, TripletLoss(margin=0.7, **_HARDEST)),
  ],
)
def test_curriculum_starts_at_batch_all_and_ends_at_batch_hard(hardness, other):
  embeddings, labels = batches.random_batch("unbalanced")
  loss = CurriculumTripletLoss(margin=0.7, hardness=hardness)
  got = batches.evaluate(loss, embeddings, labels)
  for value, wanted in zip(got, batches.evaluate(other, embeddings, labels)):
    np.testing.assert_allclose(value, wanted, rtol=1e-5, atol=1e-6)


def _batches(num_steps=4):
  rng = np.random.default_rng(1)
  labels = np.repeat(np.arange(8, dtype=np.int32), 3)
  numbers = np.arange(24, dtype=np.int32)
  return [
    Batch(
      rng.normal(size=(24, 5)).astype(np.float32) + labels[:, None] / 8,
      labels,
      np.ones(24, np.float32),
      numbers,
    )
    for _ in range(num_steps)
  ]


def _step(pace, wrap=lambda loss: loss, **options):
  tf.keras.utils.set_random_seed(1)
  loss = CurriculumTripletLoss(margin=(0.2, 0.6), hardness=(0.0, 1.0), pace=pace)
  options = {"mining_statistics": None, **options}
  step = TrainStep(
    encoder=Encoder(backbone=Perceptron(hidden_units=()), embedding_size=4),
    loss=wrap(loss),
    objective_fn=global_negatives,
    optimizer=tf.keras.optimizers.SGD(0.1),
    **options,
  )
  step.create_variables((5,))
  return step


@pytest.mark.parity
@pytest.mark.parametrize("num_replicas", thorough_except([2], [2, 4]))
def test_replicas_train_with_a_curriculum_like_one(mirrored, num_replicas):
  def make_step():
    # In some steps the fraction lies between the two thresholds.
    return _step(AdaptivePace(lowest=0.3, highest=0.5, change=0.3))

  wanted = parity.expected(make_step, _batches(), num_replicas)
  got = parity.trained(mirrored(num_replicas), make_step, _batches())
  found = parity.errors(got, wanted)
  assert parity.is_equal(found), parity.table([("curriculum", found)])


def _jittered(loss):
  return JitteredLoss(loss=loss, scale=1e-4)


@pytest.mark.parametrize("wrap", thorough_except([_jittered], [lambda x: x, _jittered]))
def test_step_advances_and_logs_the_curriculum(wrap):
  step = _step(
    LinearPace(first_step=0, last_step=2),
    wrap,
    mining_statistics=MiningStatistics(every_steps=1),
  )
  logged = []
  for batch in _batches(4):
    batch = tf.nest.map_structure(tf.constant, batch)
    logged.append(summarize(step(batch, parity.OneReplica())))
  assert [row["curriculum/hardness"] for row in logged] == [0.0, 0.5, 1.0, 1.0]
  np.testing.assert_allclose(
    [row["curriculum/margin"] for row in logged], [0.2, 0.4, 0.6, 0.6], rtol=1e-6
  )


def test_unapplied_updates_do_not_advance_the_curriculum():
  step = _step(LinearPace(first_step=0, last_step=2))
  batch = tf.nest.map_structure(tf.constant, _batches(1)[0])
  for _ in range(3):
    statistics = step.compute_update(batch, parity.OneReplica()).statistics
  assert summarize(statistics)["curriculum/hardness"] == 0.0


def test_curriculum_is_saved_in_checkpoints(tmp_path):
  step, other = (_step(LinearPace(first_step=0, last_step=8)) for _ in range(2))
  for batch in _batches(3):
    step(tf.nest.map_structure(tf.constant, batch), parity.OneReplica())
  path = tf.train.Checkpoint(loss=step.loss).save(str(tmp_path / "saved"))
  tf.train.Checkpoint(loss=other.loss).restore(path).assert_consumed()
  assert float(other.loss.parameters()[0]) == 3 / 8


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"margin": 0.2, "hardness": (0.0, 1.5)}, "hardness=.* must be in 0 to 1"),
    ({"margin": (0.2, -0.1)}, "margin=-0.1 is not above 0"),
    ({"margin": 0.2}, "no pace; set one"),
    ({"margin": (0.1, 0.2, 0.3), "hardness": 0.0}, "or first and last value"),
    (
      {"margin": 0.2, "hardness": 0.5, "pace": LinearPace(first_step=0, last_step=1)},
      "a pace, but both are constant",
    ),
  ],
)
def test_values_out_of_range_are_refused(arguments, message):
  with pytest.raises(UserError, match=message):
    CurriculumTripletLoss(**arguments)


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: LinearPace(first_step=5, last_step=5), "below the last"),
    (lambda: AdaptivePace(lowest=0.9, highest=0.2), "lowest=0.9, highest=0.2"),
    (lambda: AdaptivePace(change=0.0), r"change=0\.0"),
  ],
)
def test_invalid_pace_is_refused(make, message):
  with pytest.raises(UserError, match=message):
    make()


@pytest.mark.thorough
def test_curriculum_recovers_from_a_collapse():
  def train(loss, num_steps):
    step = TrainStep(
      encoder=encoder,
      loss=loss,
      objective_fn=global_negatives,
      optimizer=tf.keras.optimizers.Adam(0.05),
      mining_statistics=None,
    )
    step.create_variables((20,))
    update = tf.function(lambda batch: step(batch, parity.OneReplica()))
    for _ in range(num_steps):
      update(_clouds(rng))
    return encoder(_clouds(rng).inputs).numpy().std(axis=0).mean()

  tf.keras.utils.set_random_seed(1)
  rng = np.random.default_rng(1)
  encoder = Encoder(
    backbone=Perceptron(hidden_units=(64,)), embedding_size=16, is_normalized=False
  )
  hardest = TripletLoss(margin=0.5, **_HARDEST)
  assert train(hardest, 400) < 0.05
  assert train(hardest, 300) < 0.05
  loss = CurriculumTripletLoss(margin=0.5, pace=AdaptivePace(change=0.01))
  for _ in range(101):  # The hardest triplets only.
    loss.advance(tf.constant(0), WeightedMean(tf.constant(0.0), tf.constant(1.0)))
  assert float(loss.parameters()[0]) == 1.0
  assert train(loss, 300) > 0.2


def _clouds(rng):
  """Returns 32 examples of 8 of 64 overlapping classes in 20 dimensions."""
  centres = np.random.default_rng(0).normal(size=(64, 20))
  labels = np.repeat(rng.permutation(64)[:8], 4).astype(np.int32)
  inputs = centres[labels] + rng.normal(size=(32, 20))
  numbers = np.arange(32, dtype=np.int32)
  batch = Batch(inputs.astype(np.float32), labels, np.ones(32, np.float32), numbers)
  return tf.nest.map_structure(tf.constant, batch)
