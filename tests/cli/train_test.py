"""Initial weights of a training: equal for equal seeds."""

from __future__ import annotations

import types

import gin
import numpy as np
import pytest
import tensorflow as tf

import trainer.gin_registrations  # noqa: F401  Registers parts with gin.
from tests.thorough import thorough_except
from trainer.cli import train
from trainer.errors import UserError

_SHAPE = (32, 32, 3)
_DATASET = types.SimpleNamespace(decoder=types.SimpleNamespace(shape=_SHAPE))


@gin.register
def functional():
  inputs = tf.keras.Input(_SHAPE)
  return tf.keras.Model(inputs, tf.keras.layers.Conv2D(4, 3)(inputs))


@gin.register
def sequential():
  layers = [tf.keras.Input(_SHAPE), tf.keras.layers.Conv2D(4, 3)]
  return tf.keras.Sequential(layers)


@gin.register
def subclassed():
  model = Subclassed()
  model(tf.zeros([1, *_SHAPE]))  # Creates the variables before the encoder exists.
  return model


class Subclassed(tf.keras.Model):
  def __init__(self):
    super().__init__()
    self.convolution = tf.keras.layers.Conv2D(4, 3)

  def call(self, images, training=None):
    return self.convolution(images)


@gin.register
def application():
  return tf.keras.applications.MobileNet(
    include_top=False, weights=None, input_shape=_SHAPE, alpha=0.25
  )


@gin.register
def loaded(path):
  model = functional()
  model.load_weights(path)
  return model


_MADE_BEFORE = []


@gin.register
def made_before():
  return _MADE_BEFORE[-1]


def _config(backbone, seed="1"):
  gin.clear_config()
  gin.parse_config(f"""
    SEED = {seed}
    train.seed = %SEED
    train.sampler_fn = None
    train.loop = None
    train.step = @TrainStep()
    TrainStep.encoder = @Encoder()
    TrainStep.loss = @BatchHardTripletLoss()
    TrainStep.objective_fn = @global_negatives
    TrainStep.optimizer = @adam()
    adam.learning_rate = 0.1
    BatchHardTripletLoss.margin = 0.1
    Encoder.embedding_size = 2
    Encoder.pooling = 'average'
    Encoder.backbone = @{backbone}()
    """)


def _variables(num_drawn=0):
  """Returns the encoder's variables, created after other random numbers were drawn."""
  tf.random.normal([num_drawn])
  np.random.rand(num_drawn)
  parts = train.make_parts(_DATASET)
  tf.random.normal([num_drawn])
  parts.create_variables()
  return parts.step.encoder.variables


def _values(variables):
  return [variable.numpy() for variable in variables]


def _are_equal(got, wanted):
  return len(got) == len(wanted) and all(map(np.array_equal, got, wanted))


@pytest.mark.parametrize("num_replicas", thorough_except([1], [1, 2]))
@pytest.mark.parametrize(
  "backbone", ["functional", "sequential", "subclassed", "application"]
)
def test_backbone_built_by_gin_has_the_initial_weights_of_the_seed(
  backbone, num_replicas, mirrored
):
  _config(backbone, seed=1)
  wanted = _values(_variables())
  strategy = mirrored(num_replicas)
  with strategy.scope():
    variables = _variables(num_drawn=3)
  for replica in range(num_replicas):
    local = [strategy.experimental_local_results(v)[replica] for v in variables]
    assert _are_equal(_values(local), wanted)
  _config(backbone, seed=2)
  others = _values(_variables())
  assert any(np.any(one != other) for one, other in zip(others, wanted))


def test_layers_built_at_different_times_have_different_weights():
  _config("functional")
  kernel, _, projection, _ = _values(_variables())
  num = projection.size
  scaled = [each.ravel()[:num] / np.abs(each).max() for each in (kernel, projection)]
  assert np.abs(np.corrcoef(*scaled)[0, 1]) < 0.95


@pytest.mark.parametrize("num_replicas", [1, 2])
def test_loaded_weights_are_unchanged_on_every_replica(
  num_replicas, mirrored, tmp_path
):
  model = functional()
  path = str(tmp_path / "w.h5")
  model.save_weights(path)
  strategy = mirrored(num_replicas)
  for seed in (1, 2):
    _config("loaded", seed=seed)
    gin.bind_parameter("loaded.path", path)
    with strategy.scope():
      variables = _variables()[:2]
    for replica in range(num_replicas):
      local = [strategy.experimental_local_results(v)[replica] for v in variables]
      assert _are_equal(_values(local), model.get_weights())


def test_model_built_before_the_seed_is_set_is_refused(mirrored):
  _MADE_BEFORE.append(functional())
  _config("made_before")
  with mirrored(2).scope(), pytest.raises(UserError, match="create the model in the"):
    _variables()


@pytest.mark.parametrize("seed", ["-1", "1.5", "'1'", "4294967296"])
def test_invalid_seed_is_refused(seed):
  _config("functional", seed=seed)
  with pytest.raises(UserError, match=r"train\.seed=.* must be an integer in \[0, 4"):
    train.make_parts(_DATASET)


def test_hash_of_the_weights_detects_different_initial_weights():
  _config("functional", seed=1)
  one, same = (train.make_parts(_DATASET) for _ in range(2))
  for parts in (one, same):
    parts.create_variables()
  assert train.hash_weights(one.step.encoder) == train.hash_weights(same.step.encoder)
  kernel = same.step.encoder.variables[0]
  kernel.assign(kernel * (1 + 1e-6))
  assert train.hash_weights(one.step.encoder) != train.hash_weights(same.step.encoder)
