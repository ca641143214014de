"""N replicas train as one: the same loss, gradients and weights from the same batch."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from trainer.data.pipeline import Batch
from trainer.distribute.collectives import OneReplica, current_collectives
from trainer.distribute.objective import across_replicas, per_replica
from trainer.loop.step import TrainStep
from trainer.losses import BatchAllTripletLoss, BatchHardTripletLoss
from trainer.losses.statistics import summarize
from trainer.models.backbones import ConvNet
from trainer.models.encoder import Encoder

pytestmark = pytest.mark.parity

_NUM_CLASSES, _NUM_SAMPLES, _IMAGE_SHAPE = 8, 3, (8, 8, 1)
_LOSSES = {
  "batch_all": lambda: BatchAllTripletLoss(margin=0.3),
  "batch_hard": lambda: BatchHardTripletLoss(margin=0.3),
}
_OPTIMIZERS = {
  "adam": lambda: tf.keras.optimizers.Adam(1e-3),
  "sgd": lambda: tf.keras.optimizers.SGD(0.1, momentum=0.9, global_clipnorm=0.5),
}


def _global_batch(seed):
  rng = np.random.default_rng(seed)
  labels = np.repeat(np.arange(_NUM_CLASSES, dtype=np.int32), _NUM_SAMPLES)
  centres = rng.random((_NUM_CLASSES, *_IMAGE_SHAPE))
  images = centres[labels] + 0.5 * rng.random((len(labels), *_IMAGE_SHAPE))
  return Batch(images.astype(np.float32), labels, np.ones(len(labels), np.float32))


def _make_step(loss, objective_fn, optimizer):
  tf.keras.utils.set_random_seed(11)
  encoder = Encoder(backbone=ConvNet(filters=(4, 8)), embedding_size=6)
  step = TrainStep(
    encoder=encoder,
    loss=_LOSSES[loss](),
    objective_fn=objective_fn,
    optimizer=_OPTIMIZERS[optimizer](),
  )
  step.create_variables(_IMAGE_SHAPE)
  return step


def _parts(strategy, batch):
  """The global batch, a part for each replica."""
  num_replicas = strategy.num_replicas_in_sync

  def part(context):
    rows = np.split(np.arange(len(batch.labels)), num_replicas)
    mine = rows[context.replica_id_in_sync_group]
    return Batch(*(tf.constant(each[mine]) for each in batch))

  return strategy.experimental_distribute_values_from_function(part)


def _results(strategy, loss, objective_fn, optimizer, num_steps=3):
  """Gradients of the first batch, and metrics and weights after some steps."""
  with strategy.scope():
    step = _make_step(loss, objective_fn, optimizer)

  @tf.function
  def gradients(batch):
    return strategy.run(lambda b: step.gradients(b, current_collectives())[1], (batch,))

  @tf.function
  def update(batch):
    statistics = strategy.run(lambda b: step(b, current_collectives()), (batch,))
    return tf.nest.map_structure(
      lambda value: strategy.reduce("SUM", value, axis=None), statistics
    )

  first = gradients(_parts(strategy, _global_batch(0)))
  local = [strategy.experimental_local_results(gradient) for gradient in first]
  metrics = [update(_parts(strategy, _global_batch(seed))) for seed in range(num_steps)]
  return {
    "gradients": [[part.numpy() for part in parts] for parts in local],
    "metrics": [
      summarize(tf.nest.map_structure(lambda v: v.numpy(), m)) for m in metrics
    ],
    "weights": [variable.numpy() for variable in step.encoder.trainable_variables],
  }


def _assert_close(got, expected):
  """Within 1e-5, relative to the largest number of the tensor."""
  np.testing.assert_allclose(
    got, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max()
  )


@pytest.mark.parametrize("optimizer", sorted(_OPTIMIZERS))
@pytest.mark.parametrize("loss", sorted(_LOSSES))
def test_replicas_give_the_gradients_metrics_and_weights_of_one(
  mirrored, loss, optimizer
):
  one = _results(mirrored(1), loss, across_replicas, optimizer)
  for num_replicas in (2, 4):
    many = _results(mirrored(num_replicas), loss, across_replicas, optimizer)
    for parts, [expected] in zip(many["gradients"], one["gradients"]):
      for part in parts:
        _assert_close(part, expected)
    for got, expected in zip(many["metrics"], one["metrics"]):
      assert got.keys() == expected.keys()
      for name in expected:
        assert got[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-7)
    for got, expected in zip(many["weights"], one["weights"]):
      _assert_close(got, expected)


@pytest.mark.parametrize("loss", sorted(_LOSSES))
def test_without_gathering_the_loss_is_the_mean_of_the_replicas_losses(mirrored, loss):
  batch, num_replicas = _global_batch(0), 2
  got = _results(mirrored(num_replicas), loss, per_replica, "sgd", num_steps=1)
  step = _make_step(loss, per_replica, "sgd")
  alone = []
  for rows in np.split(np.arange(len(batch.labels)), num_replicas):
    part = Batch(*(tf.constant(each[rows]) for each in batch))
    share, gradients = step.gradients(part, OneReplica())
    alone.append((share.loss.numpy(), [g.numpy() for g in gradients]))
  mean_loss = np.mean([loss for loss, _ in alone])
  assert got["metrics"][0]["train/loss"] == pytest.approx(mean_loss, rel=1e-5)
  for parts, *grads in zip(got["gradients"], *(grads for _, grads in alone)):
    _assert_close(parts[0], np.mean(grads, axis=0))


def test_gathering_and_not_gathering_differ(mirrored):
  # The table above would pass for a gather that does nothing, if they didn't.
  gathered = _results(mirrored(2), "batch_hard", across_replicas, "sgd", num_steps=1)
  alone = _results(mirrored(2), "batch_hard", per_replica, "sgd", num_steps=1)
  losses = [each["metrics"][0]["train/loss"] for each in (gathered, alone)]
  assert abs(losses[0] - losses[1]) > 1e-3
