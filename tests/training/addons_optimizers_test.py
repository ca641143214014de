"""Optimizers of TensorFlow Addons, and what is said where it isn't there."""

from __future__ import annotations

import functools
import sys

import numpy as np
import pytest
import tensorflow as tf

from tests.distribute.parity_test import LOSSES, _batches, _maker
from trainer.errors import UserError
from trainer.models.backbones import Perceptron
from trainer.models.encoder import Encoder
from trainer.training import optimizers, parity
from trainer.training.checkpoint import Checkpoints
from trainer.training.learning_rates import Constant

_MAKERS = {
  "novograd": lambda **more: optimizers.novograd(
    learning_rate=0.01, weight_decay=1e-3, **more
  ),
  "rectified_adam": lambda **more: optimizers.rectified_adam(
    learning_rate=Constant(peak=0.01), lookahead_steps=2, **more
  ),
}
_HAS_ADDONS = sys.version_info < (3, 12)


@pytest.mark.parametrize("name", _MAKERS)
def test_without_addons_one_line_says_what_to_do(monkeypatch, name):
  monkeypatch.setitem(sys.modules, "tensorflow_addons", None)
  with pytest.raises(UserError, match=f"^{name} needs TensorFlow Addons.*use lamb or"):
    _MAKERS[name]()


@pytest.mark.parametrize("make", ["novograd", "rectified_adam"])
def test_a_rate_of_nothing_is_refused(make):
  with pytest.raises(UserError, match=f"{make}.learning_rate=0"):
    getattr(optimizers, make)(learning_rate=0.0)


if _HAS_ADDONS:

  def _make_step(name):
    step = _maker(LOSSES["NPairsLoss"], "gathered", "sgd", mining_statistics=None)()
    step.optimizer = _MAKERS[name]()
    step.optimizer.build(step.trainable_variables)
    return step

  @pytest.mark.parity
  @pytest.mark.parametrize("name", _MAKERS)
  def test_two_replicas_train_as_one(mirrored, name):
    make_step = functools.partial(_make_step, name)
    wanted = parity.expected(make_step, _batches(), 1)
    found = parity.errors(parity.trained(mirrored(2), make_step, _batches()), wanted)
    assert parity.is_equal(found), parity.table([(name, found)])
    step = make_step()
    before = [v.numpy() for v in step.trainable_variables]
    moved = [np.abs(a - b).max() for a, b in zip(before, wanted.weights)]
    assert max(moved) > 1e-3
    assert float(step.optimizer.learning_rate) == pytest.approx(0.01)

  def _trained(optimizer, variable, num_steps):
    for number in range(num_steps):
      gradient = tf.constant([[1.0, -2.0], [3.0, 0.5 * number]])
      optimizer.apply_gradients([(gradient, variable)], skip_gradients_aggregation=True)

  @pytest.mark.parametrize("name", _MAKERS)
  def test_a_resumed_training_has_every_bit_of_one_that_went_on(tmp_path, name):
    def parts():
      tf.keras.utils.set_random_seed(1)
      encoder = Encoder(backbone=Perceptron(hidden_units=()), embedding_size=2)
      encoder.create_variables((2,))
      optimizer = _MAKERS[name]()
      optimizer.build(encoder.trainable_variables[:1])
      checkpoints = Checkpoints(
        model_dir=str(tmp_path), encoder=encoder, optimizer=optimizer
      )
      return encoder.trainable_variables[0], optimizer, checkpoints

    whole, optimizer, checkpoints = parts()
    _trained(optimizer, whole, 3)
    checkpoints.save(3)
    checkpoints.wait()
    _trained(optimizer, whole, 3)
    resumed, optimizer, checkpoints = parts()
    assert checkpoints.restore() == 3
    assert int(optimizer.iterations) == 3
    _trained(optimizer, resumed, 3)
    np.testing.assert_array_equal(resumed.numpy(), whole.numpy())

  def test_gradients_are_clipped_together():
    variables = [tf.Variable([0.0]), tf.Variable([0.0])]
    optimizer = optimizers.LegacyOptimizerAdapter(
      tf.keras.optimizers.legacy.SGD(1.0, global_clipnorm=1.0)
    )
    optimizer.build(variables)
    gradients = [tf.constant([3.0]), tf.constant([4.0])]
    optimizer.apply_gradients(
      zip(gradients, variables), skip_gradients_aggregation=True
    )
    moved = [float(v[0]) for v in variables]
    assert moved == pytest.approx([-0.6, -0.8])
    assert len(optimizer.variables) == 1
