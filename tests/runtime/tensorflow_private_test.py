"""Private attributes of TensorFlow: each exists, and no other module uses one."""

from __future__ import annotations

import ast
import importlib
import inspect
import pathlib

import pytest
import tensorflow as tf

from trainer.models.layers import SynchronizedBatchNormalization
from trainer.runtime import tensorflow_private

ROOT = pathlib.Path(__file__).parents[2]


def _built(optimizer, *variables):
  optimizer.build(list(variables))
  return optimizer


def test_a_stream_reads_from_an_offset(tmp_path):
  (tmp_path / "file").write_bytes(b"0123456789")
  stream = tensorflow_private.open_unbuffered(str(tmp_path / "file"), 4)
  stream.seek(3)
  assert stream.read(4) == b"3456"


def test_checkpoint_tensors_have_the_names_in_its_file(tmp_path):
  checkpoint = tf.train.Checkpoint(weight=tf.Variable([1.0, 2.0]))
  found = tensorflow_private.serialized_tensors(checkpoint)
  prefix = checkpoint.save(str(tmp_path / "ckpt"))
  names = {name for name, _ in tf.train.list_variables(prefix)}
  assert names - set(found) == {"save_counter/.ATTRIBUTES/VARIABLE_VALUE"}
  value = found["weight/.ATTRIBUTES/VARIABLE_VALUE"]
  assert getattr(value, "tensor", value).numpy().tolist() == [1.0, 2.0]


def test_collective_keys_of_strategies_start_at_the_given_key(monkeypatch):
  kind = tf.distribute.MirroredStrategy
  monkeypatch.setattr(kind, "_collective_key_base", kind._collective_key_base)
  tensorflow_private.number_collectives_from(123_000)
  extended = kind(["CPU:0"]).extended
  assert extended._collective_key_base == 123_000


def test_replica_of_an_xla_program_has_its_number():
  program = tf.function(lambda: tensorflow_private.xla_replica_id() + 0)
  operations = program.get_concrete_function().graph.get_operations()
  assert "XlaReplicaId" in {operation.type for operation in operations}


@pytest.mark.parametrize(
  ("layer", "is_random"),
  [
    (tf.keras.layers.Dropout(0.5), True),
    (tf.keras.layers.GaussianNoise(0.5), True),
    (tf.keras.layers.Dense(1), False),
  ],
)
def test_layers_with_random_numbers_are_detected(layer, is_random):
  assert tensorflow_private.is_random_layer(layer) == is_random


def test_variables_of_sublayers_are_not_the_layers_own():
  network = tf.keras.Sequential([tf.keras.layers.Dense(2)])
  network.build([1, 3])
  assert not tensorflow_private.has_own_variables(network)
  assert tensorflow_private.has_own_variables(network.layers[0])
  norm = tf.keras.layers.BatchNormalization(center=False, scale=False)
  norm.build([1, 3])
  assert tensorflow_private.has_own_variables(norm)


def test_the_policy_of_an_existing_layer_is_changed():
  layer = tf.keras.layers.Dense(2)
  tensorflow_private.set_dtype_policy(layer, "mixed_bfloat16")
  assert layer.dtype_policy.name == "mixed_bfloat16"
  assert layer(tf.ones([1, 3])).dtype == tf.bfloat16


class _Optimizer(tf.keras.optimizers.Optimizer):
  def __init__(self, learning_rate):
    super().__init__(name="test")
    tensorflow_private.set_learning_rate(self, learning_rate)

  def update_step(self, gradient, variable):
    position = tensorflow_private.variable_position(self, variable)
    variable.assign_sub(self.learning_rate * gradient * (position + 1))

  def get_config(self):
    rate = tensorflow_private.learning_rate_config(self)
    return {"learning_rate": rate}


def test_custom_optimizer_has_a_rate_and_tracks_its_variables():
  weights = [tf.Variable(1.0), tf.Variable(1.0)]
  optimizer = _built(_Optimizer(0.25), *weights)
  optimizer.apply_gradients([(tf.constant(1.0), weight) for weight in weights])
  assert [weight.numpy() for weight in weights] == [0.75, 0.5]
  assert optimizer.get_config() == {"learning_rate": 0.25}


def test_constant_rate_is_a_variable_and_a_schedule_is_not():
  weight = tf.Variable(1.0)
  constant = _built(tf.keras.optimizers.Adam(0.25), weight)
  assert tensorflow_private.learning_rate_variable(constant).numpy() == 0.25
  schedule = tf.keras.optimizers.schedules.ExponentialDecay(0.25, 1, 0.5)
  scheduled = _built(tf.keras.optimizers.Adam(schedule), weight)
  assert tensorflow_private.learning_rate_variable(scheduled) is None


def test_legacy_optimizer_has_variables_and_rate_before_the_first_step():
  weight = tf.Variable([1.0, 2.0])
  optimizer = tf.keras.optimizers.legacy.Adam(0.25)
  assert optimizer.iterations == 0
  tensorflow_private.build_legacy_optimizer(optimizer, [weight])
  assert len(optimizer.variables()) == 3
  assert tensorflow_private.legacy_learning_rate(optimizer).numpy() == 0.25
  found = tensorflow_private.legacy_hyperparameters(optimizer)
  assert set(found) == {"learning_rate", "decay", "beta_1", "beta_2"}


def test_batch_normalisation_uses_the_overridden_moments():
  calls = []

  class Norm(SynchronizedBatchNormalization):
    def _calculate_mean_and_var(self, *arguments, **options):
      calls.append(arguments)
      return super()._calculate_mean_and_var(*arguments, **options)

  Norm()(tf.random.normal([4, 3]), training=True)
  assert calls


# Public attributes with an underscore, and those of other packages.
_PUBLIC = {"_replace", "_asdict", "_fields", "_make", "_exit"}
_OF_OTHERS = {"_REGISTRY", "_CONSTANTS", "_run_exitfuncs"}  # Of gin and atexit.
_OVERRIDDEN = {"SynchronizedBatchNormalization": {"_calculate_mean_and_var"}}


def _modules():
  for path in sorted((ROOT / "trainer").rglob("*.py")):
    if path.stem != "tensorflow_private":
      yield path, ast.parse(path.read_text("utf-8"))


def _is_private(name):
  return (name.startswith("_") and not name.endswith("__")) or name == "__internal__"


def _defined(tree):
  """Returns names that a module defines or assigns."""
  for node in ast.walk(tree):
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
      yield node.name
    elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
      if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
        yield node.attr
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
      yield node.id


def _attributes(tree):
  """Returns private names that a module reads or sets, also by `getattr` etc."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Attribute):
      yield node.attr
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
      is_by_name = node.func.id in ("getattr", "setattr", "hasattr")
      yield from (
        a.value for a in node.args if isinstance(a, ast.Constant) and is_by_name
      )


def _private_uses(tree, defined):
  known = defined | _PUBLIC | _OF_OTHERS
  for name in _attributes(tree):
    if isinstance(name, str) and _is_private(name) and name not in known:
      yield name
  for node in ast.walk(tree):
    names = []
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      names = [f"{node.module}.{alias.name}" for alias in node.names]
    roots = ("tensorflow.", "keras.", "tf_keras.")
    yield from (name for name in names if name.startswith(roots))


def test_no_other_module_uses_a_private_attribute():
  defined = {name for _, tree in _modules() for name in _defined(tree)}
  found = {
    f"{path.relative_to(ROOT)}: {name}"
    for path, tree in _modules()
    for name in _private_uses(tree, defined)
  }
  assert not found


@pytest.mark.parametrize(
  "source",
  [
    "layer._set_dtype_policy('float32')",
    "getattr(optimizer, '_hyper')",
    "tf.keras.__internal__.layers",
    "from tensorflow.python.eager import context",
    "import keras.src.layers",
  ],
)
def test_private_attribute_in_another_module_is_detected(source):
  assert list(_private_uses(ast.parse(source), set()))


def _foreign_bases(kind):
  """Returns base classes from TensorFlow and Keras."""
  roots = ("tensorflow", "keras", "tf_keras")
  return [base for base in kind.__mro__ if base.__module__.split(".")[0] in roots]


def _own_classes():
  """Returns classes of the package in modules that use TensorFlow."""
  for path, tree in _modules():
    names = [node.name for node in tree.body if isinstance(node, ast.ClassDef)]
    if names and "tf." in path.read_text("utf-8"):
      module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
      yield from (getattr(importlib.import_module(module), name) for name in names)


def test_classes_of_the_package_override_no_private_method_by_accident():
  found = {}
  for kind in _own_classes():
    inherited = {name for base in _foreign_bases(kind) for name in vars(base)}
    own = {name for name, value in vars(kind).items() if inspect.isfunction(value)}
    if overridden := {name for name in own & inherited if _is_private(name)}:
      found[kind.__name__] = overridden
  assert found == _OVERRIDDEN
