"""The inner loop: where it ends, what it leaves as it was, what it tells."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from trainer.data.pipeline import Batch
from trainer.distribute.strategy import ReplicaBatches
from trainer.losses import SupervisedContrastiveLoss
from trainer.losses.cross_batch_memory import CrossBatchMemory
from trainer.losses.objectives import global_negatives
from trainer.models.backbones import ConvNet
from trainer.models.encoder import Encoder
from trainer.training.loop import InnerLoop
from trainer.training.step import TrainStep

_NUM_STEPS, _SIZE, _BAD_STEP = 4, 6, 2


class _Statistics(tf.keras.layers.Layer):
  """Counts calls and sums up inputs in variables of every kind that replicas have."""

  def __init__(self):
    super().__init__()
    kinds = [("AUTO", "MEAN"), ("AUTO", "SUM"), ("ON_READ", "SUM"), ("ON_READ", "MEAN")]
    self.statistics = [
      self.add_weight(
        name=f"{synchronization}_{aggregation}",
        initializer="ones",
        trainable=False,
        synchronization=getattr(tf.VariableSynchronization, synchronization),
        aggregation=getattr(tf.VariableAggregation, aggregation),
      )
      for synchronization, aggregation in kinds
    ]

  def call(self, inputs):
    for each in self.statistics:
      each.assign(0.5 * tf.reduce_sum(inputs))
    return inputs


def _step(backbone=None):
  tf.keras.utils.set_random_seed(1)
  backbone = backbone or ConvNet(filters=(3,), normalization="batch")
  step = TrainStep(
    encoder=Encoder(backbone=backbone, embedding_size=4),
    loss=SupervisedContrastiveLoss(temperature=0.2),
    objective_fn=global_negatives,
    optimizer=tf.keras.optimizers.Adam(0.01),
    mining_statistics=None,
    cross_batch_memory=CrossBatchMemory(size=20, warm_up_steps=1),
  )
  step.create_variables((4, 4, 1))
  return step


def _images(bad_replica, bad_value):
  """[steps, replicas, B, 4, 4, 1], one number of one replica of one step spoilt."""
  images = np.random.default_rng(0).random((_NUM_STEPS, 2, _SIZE, 4, 4, 1), np.float32)
  images[_BAD_STEP, bad_replica, 3, 0, 0, 0] = bad_value
  return images


def _dataset(images):
  num_steps, num_replicas = images.shape[:2]
  count = num_steps * num_replicas
  labels = np.tile(np.repeat(np.arange(2, dtype=np.int32), 3), (count, 1))
  labels += 2 * (np.arange(count, dtype=np.int32)[:, None] % num_replicas)
  flat = images.reshape(count, *images.shape[2:])
  weights = np.ones((count, _SIZE), np.float32)
  numbers = np.arange(count * _SIZE, dtype=np.int32).reshape(count, _SIZE)
  batches = Batch(flat, labels, weights, numbers)
  return tf.data.Dataset.from_tensor_slices(batches)


def _loop(strategy, step, images, words=(0, 0)):
  dataset = _dataset(images)
  return InnerLoop(
    step=step,
    strategy=strategy,
    batches=ReplicaBatches(strategy, dataset),
    zero_statistics=step.zero_statistics(dataset.element_spec),
    words_fn=lambda: np.array(words, np.int32),
  )


def _values(step):
  parts = (step.encoder, step.optimizer, step.cross_batch_memory)
  return [variable.numpy() for part in parts for variable in part.variables]


# The last two overflow inside: the convolution's outputs, or the variance alone, whose
# reciprocal root is 0, so that embeddings, loss and gradients are finite.
@pytest.mark.parametrize(
  ("bad_replica", "bad_value", "normalization"),
  [
    (0, np.nan, "batch"),
    (1, np.inf, "batch"),
    (1, 3e38, "batch"),
    (0, 3e38, "synchronized_batch"),
    (1, 1e25, "batch"),
    (0, 1e25, "synchronized_batch"),
  ],
)
def test_an_update_that_is_not_finite_on_one_replica_is_made_on_none(
  mirrored, bad_replica, bad_value, normalization
):
  strategy = mirrored(2)
  with strategy.scope():
    step = _step(ConvNet(filters=(3,), normalization=normalization))
    loop = _loop(strategy, step, _images(bad_replica, bad_value))
    first = loop.run(_BAD_STEP)
    before = _values(step)
    none = loop.run(_NUM_STEPS)
    after = _values(step)
    behind = loop.run(1)
  assert [done.num_steps for done in (first, none, behind)] == [_BAD_STEP, 0, 1]
  assert first.statistics["train/loss"].count == _BAD_STEP
  assert none.statistics["train/loss"].count == 0
  for got, expected in zip(after, before):
    np.testing.assert_array_equal(got, expected)
  assert all(np.isfinite(value).all() for value in _values(step))
  assert any(np.any(now != then) for now, then in zip(_values(step), after))


@pytest.mark.parametrize("num_replicas", [1, 2])
def test_statistics_of_a_layer_of_ones_own_are_restored(mirrored, num_replicas):
  strategy = mirrored(num_replicas)
  images = _images(0, 1e38)[:, :num_replicas]
  with strategy.scope():
    layers = [_Statistics(), tf.keras.layers.Rescaling(1e3), tf.keras.layers.Flatten()]
    step = _step(tf.keras.Sequential(layers))
    loop = _loop(strategy, step, images)
    loop.run(_BAD_STEP)
    results = strategy.experimental_local_results
    before = [[v.numpy() for v in results(each)] for each in step.forward_state]
    assert loop.run(1).num_steps == 0
    after = [[v.numpy() for v in results(each)] for each in step.forward_state]
    assert loop.run(1).num_steps == 1
    behind = [[v.numpy() for v in results(each)] for each in step.forward_state]
  assert len(before) == 4 and before == after and after != behind
  assert all(0 < value < 1e3 for values in before for value in values)


def test_what_the_host_says_comes_back_over_all_replicas(mirrored):
  strategy = mirrored(2)
  with strategy.scope():
    loop = _loop(strategy, _step(), _images(0, 0.0), words=(1, 0))
    done = loop.run(1)
    assert done.words.tolist() == [2, 0]
    # Other batches are taken, from their first on, and nothing is traced again.
    dataset = _dataset(_images(0, 0.0))
    loop.go_on_with(ReplicaBatches(strategy, dataset))
    assert loop.run(_NUM_STEPS).num_steps == _NUM_STEPS
    assert loop._run.experimental_get_tracing_count() == 1
