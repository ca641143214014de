"""Optimizers, schedules, weight averages and per-part rates, by their definitions."""

from __future__ import annotations

import functools
import sys

import numpy as np
import pytest
import tensorflow as tf

from tests.distribute.parity_test import LOSSES, _batches, _maker
from tests.thorough import thorough_except
from trainer.errors import UserError
from trainer.models.backbones import Perceptron
from trainer.models.encoder import Encoder
from trainer.training import learning_rates, optimizers, parity
from trainer.training.checkpoint import Checkpoints, TrainingState
from trainer.training.learning_rates import Constant
from trainer.training.optimizers import AveragedWeights, Lamb, MultiOptimizer


def _encoder(**options):
  backbone = Perceptron(hidden_units=(5,))
  encoder = Encoder(backbone=backbone, embedding_size=3, **options)
  encoder.create_variables((4,))
  return encoder


def _variables():
  rng = np.random.default_rng(4)
  return [tf.Variable(rng.normal(size=shape), dtype="float32") for shape in ((4, 3), 3)]


def _gradients(num_steps, variables):
  rng = np.random.default_rng(5)
  return [
    [rng.normal(size=v.shape).astype(np.float32) for v in variables]
    for _ in range(num_steps)
  ]


def _run(optimizer, num_steps=4):
  variables = _variables()
  for gradients in _gradients(num_steps, variables):
    optimizer.apply_gradients(
      zip(map(tf.constant, gradients), variables), skip_gradients_aggregation=True
    )
  return [variable.numpy() for variable in variables]


def _lamb_by_definition(rate, decay, num_steps=4):
  variables = [v.numpy().astype(np.float64) for v in _variables()]
  means, squares = ([np.zeros_like(v) for v in variables] for _ in range(2))
  for t, gradients in enumerate(_gradients(num_steps, variables), start=1):
    for i, gradient in enumerate(gradients):
      means[i] = 0.9 * means[i] + 0.1 * gradient
      squares[i] = 0.999 * squares[i] + 0.001 * gradient**2
      update = means[i] / (1 - 0.9**t) / (np.sqrt(squares[i] / (1 - 0.999**t)) + 1e-6)
      update += decay * variables[i] if variables[i].ndim > 1 else 0
      ratio = np.linalg.norm(variables[i]) / np.linalg.norm(update)
      variables[i] = variables[i] - rate * ratio * update
  return variables


def test_lamb_equals_its_definition():
  expected = _lamb_by_definition(0.01, 0.1)
  got = _run(optimizers.lamb(learning_rate=0.01, weight_decay_rate=0.1))
  for one, other in zip(got, expected):
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_lamb_equals_tensorflow_addons():
  if sys.version_info >= (3, 12):
    with pytest.raises(ImportError):
      import tensorflow_addons  # noqa: F401
    return
  import tensorflow_addons as tfa

  variables = _variables()
  theirs = tfa.optimizers.LAMB(0.01, weight_decay=0.0)
  for gradients in _gradients(4, variables):
    theirs.apply_gradients(zip(map(tf.constant, gradients), variables))
  for one, other in zip(_run(optimizers.lamb(learning_rate=0.01)), variables):
    np.testing.assert_allclose(one, other.numpy(), rtol=1e-4, atol=1e-5)


def test_lamb_trains_a_weight_that_starts_at_zero():
  variable = tf.Variable([0.0, 0.0])
  Lamb(0.1).apply_gradients([(tf.constant([1.0, -1.0]), variable)])
  np.testing.assert_allclose(variable, [-0.1, 0.1], rtol=1e-3)


def test_adamw_shrinks_weights_that_have_no_gradient():
  variable = tf.Variable([[1.0]])
  optimizer = optimizers.adamw(learning_rate=0.1, weight_decay=0.5)
  optimizer.apply_gradients([(tf.constant([[0.0]]), variable)])
  np.testing.assert_allclose(variable, [[0.95]])


@pytest.mark.parametrize("num_replicas", [1, 2])
def test_adamw_decays_neither_biases_nor_scales(mirrored, num_replicas):
  with mirrored(num_replicas).scope():
    variables = [tf.Variable(np.ones(shape)) for shape in ((2, 2), (2,), ())]
    optimizer = optimizers.adamw(learning_rate=0.1, weight_decay=0.5)
    optimizer.build(variables)
  pairs = [(tf.zeros_like(variable), variable) for variable in variables]

  @tf.function
  def update():
    mirrored(num_replicas).run(
      lambda: optimizer.apply_gradients(pairs, skip_gradients_aggregation=True)
    )

  update()
  got = [float(np.max(variable.numpy())) for variable in variables]
  assert got == pytest.approx([0.95, 1.0, 1.0])


def _rates(schedule, steps):
  return [float(schedule(step)) for step in steps]


def test_rate_warms_up_and_decays_along_a_cosine():
  schedule = learning_rates.Cosine(peak=2.0, num_steps=14, warmup_steps=4, end=1.0)
  steps = (0, 1, 3, 4, 9, 14, 99)
  assert _rates(schedule, steps) == pytest.approx([0.5, 1, 2, 2, 1.5, 1, 1])


def test_rate_decays_in_steps():
  schedule = learning_rates.Steps(peak=1.0, at_steps=(5, 8), factor=0.5, warmup_steps=2)
  steps = (0, 1, 4, 5, 7, 8, 20)
  assert _rates(schedule, steps) == pytest.approx([0.5, 1, 1, 0.5, 0.5, 0.25, 0.25])


def test_rate_without_warmup_is_constant():
  assert _rates(learning_rates.Constant(peak=0.3), (0, 9)) == pytest.approx([0.3, 0.3])


def test_optimizers_follow_a_schedule():
  optimizer = optimizers.sgd(
    learning_rate=learning_rates.Steps(peak=1.0, at_steps=(1,), factor=0.1)
  )
  variable = tf.Variable([0.0])
  for _ in range(2):
    optimizer.apply_gradients([(tf.constant([1.0]), variable)])
  np.testing.assert_allclose(variable, [-1.1], rtol=1e-6)


def test_rate_scales_with_the_batch_size():
  rate = learning_rates.scaled_to_batch(
    rate=0.1, reference_batch_size=256, classes_per_batch=64, samples_per_class=8
  )
  assert rate == pytest.approx(0.2)


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: learning_rates.Constant(peak=0.0), "peak must be above 0"),
    (lambda: learning_rates.Constant(peak=1.0, warmup_steps=-1), "0 or more"),
    (lambda: learning_rates.Cosine(peak=1.0, num_steps=5, warmup_steps=5), "more than"),
    (lambda: learning_rates.Steps(peak=1.0, at_steps=(5, 3)), "must be increasing"),
    (lambda: optimizers.lamb(learning_rate=0.0), "lamb.learning_rate=0.0 must be"),
    (lambda: optimizers.adamw(learning_rate=-1, weight_decay=0.0), "greater than 0"),
    (lambda: AveragedWeights([], decay=1.0), "must be between 0 and 1"),
  ],
)
def test_invalid_arguments_are_refused(make, message):
  with pytest.raises(UserError, match=message):
    make()


def test_each_part_has_its_own_rate():
  encoder = _encoder()
  before = [variable.numpy() for variable in encoder.trainable_variables]
  optimizer = MultiOptimizer(
    backbone=optimizers.sgd(learning_rate=0.25), head=optimizers.sgd(learning_rate=1.0)
  )
  optimizer.divide(encoder.backbone_variables)
  optimizer.build(encoder.trainable_variables)
  gradients = [tf.ones_like(variable) for variable in encoder.trainable_variables]
  optimizer.apply_gradients(zip(gradients, encoder.trainable_variables))
  moved = [
    float(np.max(old - new.numpy()))
    for old, new in zip(before, encoder.trainable_variables)
  ]
  assert moved == pytest.approx([0.25, 0.25, 1.0, 1.0])
  assert optimizer.iterations.numpy() == 1
  assert optimizer.learning_rate.numpy() == 1.0


def test_averages_follow_the_weights_as_defined():
  weight = tf.Variable([0.0])
  averages = AveragedWeights([weight], decay=0.9)
  expected = 0.0
  for step in (1, 2, 100):
    weight.assign_add([1.0])
    averages.update(tf.constant(step))
    decay = min(0.9, (1 + step) / (10 + step))
    expected = decay * expected + (1 - decay) * weight.numpy()[0]
  np.testing.assert_allclose(averages.averages[0], [expected], rtol=1e-6)


def test_averages_replace_the_weights_temporarily():
  weight = tf.Variable([0.0])
  averages = AveragedWeights([weight], decay=0.9)
  weight.assign([5.0])
  with averages.in_use():
    assert weight.numpy() == 0.0
  assert weight.numpy() == 5.0


def test_encoder_is_restored_with_its_averaged_weights(tmp_path):
  trained, read = _encoder(), _encoder()
  averages = AveragedWeights(trained.trainable_variables, decay=0.9)
  expected = [average.numpy() for average in averages.averages]
  for variable in trained.trainable_variables:
    variable.assign_add(tf.ones_like(variable))
  optimizer = tf.keras.optimizers.SGD(0.1)
  optimizer.build(trained.trainable_variables)
  training = TrainingState(optimizer, averages=averages)
  checkpoints = Checkpoints(model_dir=str(tmp_path), encoder=trained, training=training)
  checkpoints.save(3)
  checkpoints.wait()
  assert Checkpoints(model_dir=str(tmp_path), encoder=read).restore() == 3
  for got, wanted in zip(read.trainable_variables, expected):
    np.testing.assert_array_equal(got.numpy(), wanted)


def test_frozen_backbone_is_not_trained():
  encoder = _encoder(is_backbone_frozen=True)
  assert len(encoder.trainable_variables) == 2
  assert encoder.backbone_variables == []


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
def test_missing_addons_is_reported_in_one_line(monkeypatch, name):
  monkeypatch.setitem(sys.modules, "tensorflow_addons", None)
  with pytest.raises(UserError, match=f"^{name} needs TensorFlow Addons.*use lamb or"):
    _MAKERS[name]()


@pytest.mark.parametrize("make", ["novograd", "rectified_adam"])
def test_zero_learning_rate_is_refused(make):
  with pytest.raises(UserError, match=f"{make}.learning_rate=0"):
    getattr(optimizers, make)(learning_rate=0.0)


if _HAS_ADDONS:

  def _make_step(name):
    step = _maker(LOSSES["NPairsLoss"], "gathered", "sgd", mining_statistics=None)()
    step.optimizer = _MAKERS[name]()
    step.optimizer.build(step.trainable_variables)
    return step

  @pytest.mark.parity
  @pytest.mark.parametrize("name", thorough_except([*_MAKERS][:1], _MAKERS))
  def test_two_replicas_train_like_one(mirrored, name):
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
  def test_resumed_training_is_bit_identical(tmp_path, name):
    def parts():
      tf.keras.utils.set_random_seed(1)
      encoder = Encoder(backbone=Perceptron(hidden_units=()), embedding_size=2)
      encoder.create_variables((2,))
      optimizer = _MAKERS[name]()
      optimizer.build(encoder.trainable_variables[:1])
      checkpoints = Checkpoints(
        model_dir=str(tmp_path), encoder=encoder, training=TrainingState(optimizer)
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
