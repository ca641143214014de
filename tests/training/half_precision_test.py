"""Half precision: deviation of its gradients from those of single precision.

The network is smooth: at a kink of a rectifier or maximum, the rounding of one number
redirects a gradient, and the precision implies no bound.
"""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from tests.thorough import thorough_except
from trainer.data.pipeline import Batch
from trainer.distribute.collectives import OneReplica
from trainer.losses import SupervisedContrastiveLoss
from trainer.losses.loss_terms import Anchors
from trainer.losses.objectives import global_negatives
from trainer.models.encoder import Encoder
from trainer.training import parity
from trainer.training.options import StepOptions
from trainer.training.step import TrainStep

_EPSILONS = {"mixed_bfloat16": 2.0**-7, "mixed_float16": 2.0**-10}
_PRECISIONS = sorted(_EPSILONS)
# Per layer, of two: kernel, sum, bias and tanh, and their gradients.
_NUM_ROUNDINGS = 16
_SHAPE = (8, 8, 1)


def _batch():
  rng = np.random.default_rng(6)
  labels = np.repeat(np.arange(4, dtype=np.int32), 3)
  images = rng.normal(size=(4, *_SHAPE))[labels] + rng.normal(size=(12, *_SHAPE))
  weights = np.ones(len(labels), np.float32)
  return Batch(images.astype(np.float32), labels, weights, labels)


def _step(precision, *, temperature=0.5, loss_scale=256.0, num_micro_batches=1):
  tf.keras.utils.set_random_seed(1)
  backbone = tf.keras.Sequential(
    [
      tf.keras.layers.Conv2D(4, 3, activation="tanh"),
      tf.keras.layers.Conv2D(6, 3, strides=2, activation="tanh"),
    ]
  )
  step = TrainStep(
    encoder=Encoder(backbone=backbone, embedding_size=5, precision=precision),
    loss=SupervisedContrastiveLoss(temperature=temperature),
    objective_fn=global_negatives,
    optimizer=tf.keras.optimizers.SGD(0.02),
    mining_statistics=None,
    options=StepOptions(num_micro_batches=num_micro_batches),
  )
  step.create_variables(_SHAPE)
  if precision == "mixed_float16":
    step.optimizer._loss_scale._current_loss_scale.assign(loss_scale)
  return step


def _error(got, expected):
  """Relative L2 error of all gradients, concatenated."""
  got, expected = (
    np.concatenate([np.ravel(g) for g in each]) for each in (got, expected)
  )
  return np.linalg.norm(got - expected) / np.linalg.norm(expected)


def _gradients(precision, **options):
  batch = Batch(*map(tf.constant, _batch()))
  step = _step(precision, **options)
  return step.compute_update(batch, OneReplica()).update.gradients


def _bound(precision):
  """Returns the accumulated error of independent roundings."""
  return _EPSILONS[precision] * np.sqrt(_NUM_ROUNDINGS)


@pytest.mark.parametrize("num_micro_batches", [1, 3])
@pytest.mark.parametrize("precision", _PRECISIONS)
def test_gradients_equal_single_precision_up_to_rounding(precision, num_micro_batches):
  got = _gradients(precision, num_micro_batches=num_micro_batches)
  error = _error(got, _gradients("float32"))
  assert _EPSILONS[precision] / 10 < error < _bound(precision)


def test_loss_scaling_keeps_gradients_too_small_for_float16():
  small = {"temperature": 1e5}
  expected = _gradients("float32", **small)
  assert max(np.abs(each).max() for each in expected) < 1e-5
  scaled, unscaled = (
    _gradients("mixed_float16", loss_scale=scale, **small) for scale in (2.0**15, 1.0)
  )
  assert _error(scaled, expected) < _bound("mixed_float16")
  assert _error(unscaled, expected) > 0.1


@pytest.mark.parametrize("precision", _PRECISIONS)
def test_layers_after_the_backbone_use_single_precision(precision):
  step, batch = _step(precision), _batch()
  encoder = step.encoder
  features = encoder._backbone(batch.inputs)
  assert features.dtype == precision.replace("mixed_", "")
  assert {v.dtype for v in step.trainable_variables} == {tf.float32}
  kernel, bias = (v.numpy().astype(np.float64) for v in encoder._projection.variables)
  flat = tf.cast(features, tf.float64).numpy().reshape(len(batch.labels), -1)
  exact = flat @ kernel + bias
  exact /= np.linalg.norm(exact, axis=1, keepdims=True)
  embeddings = encoder(batch.inputs)
  np.testing.assert_allclose(embeddings, exact, atol=1e-6)
  result = step.compute_update(Batch(*map(tf.constant, batch)), OneReplica())
  anchors = Anchors(embeddings, *map(tf.constant, (batch.labels, batch.weights)))
  pairs = global_negatives(anchors, OneReplica())
  output = step.loss(pairs.anchors, pairs.candidates)
  expected = pairs.replica_loss(output, OneReplica()).value
  got = result.statistics["train/loss"].total
  np.testing.assert_allclose(got, expected, rtol=1e-6)


# The processor decides which sums are computed in half precision, and so how many
# roundings there are. Replicas differ from one replica like two results that each
# deviate from single precision by the same bound.
@pytest.mark.parametrize(
  ("precision", "num_replicas"),
  thorough_except(
    [("mixed_float16", 2)],
    [(precision, num) for precision in _PRECISIONS for num in (2, 4)],
  ),
)
def test_replicas_train_like_one_of_the_same_precision(
  mirrored, precision, num_replicas
):
  steps = [lambda: _step(precision), [_batch()]]
  wanted = parity.expected(*steps, 1)
  got = parity.trained(mirrored(num_replicas), *steps)
  exact = [gradient.numpy() for gradient in _gradients("float32")]
  roundings = _error(wanted.gradients, exact)
  assert roundings < _bound(precision)
  limit = np.sqrt(2) * roundings
  assert _error(got.gradients, wanted.gradients) < limit
  found = parity.errors(got, wanted)
  assert found["loss"] <= parity.TOLERANCE
  # The learning rate of SGD is 0.02.
  length = np.linalg.norm([np.linalg.norm(gradient) for gradient in wanted.gradients])
  largest = max(np.abs(weight).max() for weight in wanted.weights)
  assert found["weights"] < 0.02 * limit * length / largest
