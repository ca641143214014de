"""Resuming with another configuration: immediate changes and refused changes."""

from __future__ import annotations

import sys

import pytest
import tensorflow as tf

from tests.thorough import thorough_except
from trainer.errors import UserError
from trainer.models.backbones import Perceptron
from trainer.models.encoder import Encoder
from trainer.training import checkpoint as checkpoint_lib
from trainer.training import optimizers
from trainer.training.checkpoint import Checkpoints, TrainingState
from trainer.training.learning_rates import Cosine
from trainer.training.optimizers import MultiOptimizer


def _adam(learning_rate):
  return optimizers.adam(learning_rate=learning_rate)


def _keras_adam(learning_rate):
  return tf.keras.optimizers.Adam(learning_rate)


def _per_part(learning_rate):
  return MultiOptimizer(
    backbone=_keras_adam(learning_rate / 10), head=_keras_adam(learning_rate)
  )


def _scaled(learning_rate):
  return tf.keras.mixed_precision.LossScaleOptimizer(_keras_adam(learning_rate))


def _novograd(learning_rate):
  from trainer.training import optimizers

  return optimizers.novograd(
    learning_rate=learning_rate, weight_decay=learning_rate / 5, beta_1=0.9
  )


def _rectified_adam(learning_rate):
  from trainer.training import optimizers

  return optimizers.rectified_adam(
    learning_rate=learning_rate, weight_decay=learning_rate / 5, lookahead_steps=2
  )


_OPTIMIZERS = {
  "adam": _adam,
  "sgd": lambda rate: optimizers.sgd(learning_rate=rate, momentum=rate),
  "adamw": lambda rate: optimizers.adamw(learning_rate=rate, weight_decay=rate),
  "lamb": lambda rate: optimizers.lamb(learning_rate=rate, weight_decay_rate=rate),
  "keras adam": _keras_adam,
  "per part": _per_part,
  "loss scale": _scaled,
}
if sys.version_info < (3, 12):
  _OPTIMIZERS.update({"novograd": _novograd, "rectified adam": _rectified_adam})


def _trained(optimizer, checkpoints_of, tmp_path, num_steps):
  """Returns the encoder trained with a fixed gradient from the newest checkpoint."""
  tf.keras.utils.set_random_seed(1)
  encoder = Encoder(backbone=Perceptron(hidden_units=(5,)), embedding_size=3)
  encoder.create_variables((4,))
  weights = encoder.trainable_variables
  if isinstance(optimizer, MultiOptimizer):
    optimizer.divide(encoder.backbone_variables)
  optimizer.build(weights)
  checkpoints = Checkpoints(
    model_dir=str(tmp_path), encoder=encoder, training=TrainingState(optimizer)
  )
  if checkpoints_of:
    checkpoints.restore()
  before = [weight.numpy() for weight in weights]
  for _ in range(num_steps):
    gradients = [tf.ones_like(weight) * 0.1 for weight in weights]
    optimizer.apply_gradients(list(zip(gradients, weights)))
  checkpoints.save(int(optimizer.iterations.numpy()))
  checkpoints.wait()
  changes = [weight.numpy() - old for weight, old in zip(weights, before)]
  return sum(abs(change).sum() for change in changes)


_KINDS = [
  n for n in _OPTIMIZERS if n in ("keras adam", "per part", "loss scale", "novograd")
]


@pytest.mark.resume
@pytest.mark.parametrize("name", thorough_except(_KINDS, _OPTIMIZERS))
def test_new_learning_rate_applies_from_the_first_resumed_step(tmp_path, caplog, name):
  make = _OPTIMIZERS[name]
  _trained(make(1e-4), False, tmp_path / "slow", 3)
  changed = make(1e-2)
  with caplog.at_level("INFO", logger="absl"):
    fast = _trained(changed, True, tmp_path / "slow", 1)
  _trained(make(1e-4), False, tmp_path / "same", 3)
  slow = _trained(make(1e-4), True, tmp_path / "same", 1)
  assert fast > 20 * slow  # The rate is 100 times as large.
  assert float(changed.learning_rate) == pytest.approx(1e-2)
  for hyperparameter, variable in optimizers.hyperparameters(changed).items():
    reference = optimizers.hyperparameters(make(1e-2))
    if hyperparameter in reference:
      assert float(variable) == pytest.approx(float(reference[hyperparameter]))
  if optimizers.hyperparameters(changed):
    assert "of this configuration is used after step 3" in caplog.text


def test_constant_rate_and_schedule_replace_each_other(tmp_path):
  _trained(_adam(1e-4), False, tmp_path, 2)
  cosine = _adam(Cosine(peak=1e-2, num_steps=6))
  _trained(cosine, True, tmp_path, 1)
  assert float(cosine.learning_rate) == pytest.approx(
    7.5e-3
  )  # The rate of the third of 6 steps.
  constant = _adam(3e-4)
  _trained(constant, True, tmp_path, 1)
  assert float(constant.learning_rate) == pytest.approx(3e-4)
  assert int(constant.iterations) == 4


def test_other_optimizer_is_refused_naming_its_part(tmp_path):
  _trained(_adam(1e-3), False, tmp_path, 2)
  with pytest.raises(UserError, match=r"differs in optimizer \(it has \d+ other"):
    _trained(optimizers.sgd(learning_rate=1e-3), True, tmp_path, 1)


@pytest.mark.parametrize("name", _OPTIMIZERS)
def test_variable_paths_match_the_checkpoint_files(tmp_path, name):
  encoder = Encoder(backbone=Perceptron(hidden_units=(5,)), embedding_size=3)
  encoder.create_variables((4,))
  optimizer = _OPTIMIZERS[name](0.1)
  if isinstance(optimizer, MultiOptimizer):
    optimizer.divide(encoder.backbone_variables)
  optimizer.build(encoder.trainable_variables)
  checkpoint = tf.train.Checkpoint(encoder=encoder, optimizer=optimizer)
  path = checkpoint.write(str(tmp_path / "all"))
  assert checkpoint_lib.variable_paths(checkpoint) == checkpoint_lib.saved_paths(path)
