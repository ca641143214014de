"""2·N steps equal N steps, a checkpoint and N more steps: bit for bit, 2 replicas."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from tests.thorough import thorough_except
from trainer.data.pipeline import Batch
from trainer.distribute.collectives import current_collectives
from trainer.losses import SupervisedContrastiveLoss
from trainer.losses.cross_batch_memory import CrossBatchMemory
from trainer.losses.objectives import global_negatives
from trainer.losses.softmax import LearnedTemperature
from trainer.models.backbones import ConvNet, Perceptron
from trainer.models.encoder import Encoder
from trainer.training import optimizers
from trainer.training.checkpoint import Checkpoints, TrainingState
from trainer.training.optimizers import MultiOptimizer
from trainer.training.options import StepOptions
from trainer.training.step import TrainStep

_NUM_STEPS = 3
_SHAPE = (6, 6, 1)


def _per_part():
  return MultiOptimizer(
    backbone=optimizers.adam(learning_rate=0.01),
    head=optimizers.sgd(learning_rate=0.1, momentum=0.9),
  )


_CASES = {
  "adam": {},
  "averages": {"averaging_decay": 0.9},
  "batch norm": {"normalization": "batch"},
  "dropout": {"dropout_rate": 0.5},
  "lamb": {"optimizer": lambda: optimizers.lamb(learning_rate=0.01)},
  "learned temperature": {"temperature": lambda: LearnedTemperature(initial=0.2)},
  "loss scale": {"precision": "mixed_float16"},
  "memory bank": {
    "cross_batch_memory": lambda: CrossBatchMemory(size=20, warm_up_steps=1)
  },
  "per part": {"optimizer": _per_part},
}
# Together these two have every state of the other cases.
_TOGETHER = {
  "all of single precision": {
    **_CASES["averages"],
    **_CASES["batch norm"],
    **_CASES["learned temperature"],
    **_CASES["memory bank"],
    **_CASES["per part"],
  },
  "all of half precision": {
    **_CASES["dropout"],
    **_CASES["lamb"],
    **_CASES["loss scale"],
  },
}
_CASES.update(_TOGETHER)


def _make_step(
  *,
  normalization="none",
  dropout_rate=0.0,
  precision="float32",
  optimizer=lambda: optimizers.adam(learning_rate=0.01),
  temperature=lambda: 0.2,
  cross_batch_memory=lambda: None,
  **options,
):
  tf.keras.utils.set_random_seed(1)
  backbone = ConvNet(filters=(4,), normalization=normalization)
  if dropout_rate:
    backbone = Perceptron(hidden_units=(8,), dropout_rate=dropout_rate)
  step = TrainStep(
    encoder=Encoder(backbone=backbone, embedding_size=5, precision=precision),
    loss=SupervisedContrastiveLoss(temperature=temperature()),
    objective_fn=global_negatives,
    optimizer=optimizer(),
    mining_statistics=None,
    cross_batch_memory=cross_batch_memory(),
    options=StepOptions(**options),
  )
  step.create_variables(_SHAPE)
  return step


class _Written(Checkpoints):
  def save(self, step):
    super().save(step)
    self.wait()


def _checkpoints(step, folder):
  return _Written(
    model_dir=str(folder),
    encoder=step.encoder,
    training=TrainingState(
      step.optimizer, step.loss, step.averages, step.cross_batch_memory
    ),
  )


def _batch(number, replica):
  rng = np.random.default_rng([number, replica])
  labels = np.repeat(np.arange(2, dtype=np.int32), 3) + 2 * replica
  images = rng.random((6, *_SHAPE)) + labels[:, None, None, None]
  numbers = tf.range(6) + 6 * replica  # Each epoch repeats the images.
  rows = (tf.constant(labels), tf.ones([6]), numbers)
  return Batch(tf.constant(images, tf.float32), *rows)


def _train(strategy, step, first, last):
  def on_replica(batch):
    step(batch, current_collectives())

  @tf.function
  def update(batch):
    strategy.run(on_replica, (batch,))

  for number in range(first, last):
    update(
      strategy.experimental_distribute_values_from_function(
        lambda context, number=number: _batch(number, context.replica_id_in_sync_group)
      )
    )


def _tensors(folder):
  reader = tf.train.load_checkpoint(str(folder / "checkpoints"))
  names = reader.get_variable_to_shape_map()
  return {
    name: reader.get_tensor(name)
    for name in names
    if name != "_CHECKPOINTABLE_OBJECT_GRAPH" and "save_counter" not in name
  }


@pytest.mark.resume
@pytest.mark.parametrize("case", thorough_except([*_TOGETHER][:1], _CASES))
def test_resumed_training_is_bit_identical(mirrored, tmp_path, case):
  strategy = mirrored(2)
  with strategy.scope():
    whole, resumed = (_make_step(**_CASES[case]) for _ in range(2))
    _train(strategy, whole, 0, _NUM_STEPS)
    _checkpoints(whole, tmp_path / "half").save(_NUM_STEPS)
    assert _checkpoints(resumed, tmp_path / "half").restore() == _NUM_STEPS
    for step, name in ((whole, "whole"), (resumed, "resumed")):
      _train(strategy, step, _NUM_STEPS, 2 * _NUM_STEPS)
      _checkpoints(step, tmp_path / name).save(2 * _NUM_STEPS)
  half, expected, got = (_tensors(tmp_path / n) for n in ("half", "whole", "resumed"))
  assert got.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_array_equal(got[name], value, err_msg=name)
  assert any(np.any(half[name] != value) for name, value in expected.items())


def test_replicas_have_the_same_moving_averages_after_a_checkpoint(mirrored, tmp_path):
  strategy = mirrored(2)
  images = _batch(9, 0).inputs

  def embeddings(step):
    run = tf.function(lambda: strategy.run(lambda: step.encoder(images)))
    return [each.numpy() for each in strategy.experimental_local_results(run())]

  with strategy.scope():
    step, restored = (_make_step(normalization="batch") for _ in range(2))
    _train(strategy, step, 0, _NUM_STEPS)
    one, other = embeddings(step)
    assert np.any(one != other)
    _checkpoints(step, tmp_path).save(_NUM_STEPS)
    _checkpoints(restored, tmp_path).restore()
    one, other = embeddings(step)
    np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(embeddings(restored), [one, one])
