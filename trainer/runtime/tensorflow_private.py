"""Private attributes of TensorFlow and Keras, each behind one function.

The package uses no others. Each function names the attribute it needs, and was written
against TensorFlow 2.15 with Keras 2.15, and TensorFlow 2.21 with tf-keras 2.21. A later
version may rename them without notice.
"""

from __future__ import annotations

from typing import Any, Optional

# TensorFlow is imported late: programs that only read local files don't need it.


def open_unbuffered(path: str, num_bytes: int) -> Any:
  """Opens a remote file with a buffer of a given size.

  `tf.io.GFile` always reads 512 kB at once. `_pywrap_file_io.BufferedInputStream`, in
  2.15 and 2.21.

  Args:
    path: a path of `tf.io.gfile`.
    num_bytes: size of the buffer.

  Returns:
    A stream with `seek(offset)` and `read(num_bytes)`.
  """
  from tensorflow.python.lib.io import _pywrap_file_io

  return _pywrap_file_io.BufferedInputStream(path, num_bytes)


def serialized_tensors(checkpoint: Any) -> dict[str, Any]:
  """Returns the tensors that a `tf.train.Checkpoint` would write, by name in the file.

  The public API writes them to a file at once.
  `Checkpoint._saver._gather_serialized_tensors`, in 2.15 and 2.21.

  Args:
    checkpoint: its values are not read yet where they are per-replica variables.

  Returns:
    Tensors, or objects with an attribute `tensor` that reads the value.
  """
  gathered, *_ = checkpoint._saver._gather_serialized_tensors(None)
  return {name: tensor for each in gathered.values() for name, tensor in each.items()}


def number_collectives_from(first_key: int) -> None:
  """Sets the first collective key of the next `tf.distribute.MirroredStrategy`.

  Strategies of one process number their collectives equally, and would collide.
  `MirroredStrategy._collective_key_base`, in 2.15 and 2.21.

  Args:
    first_key: at least 0.
  """
  import tensorflow as tf

  tf.distribute.MirroredStrategy._collective_key_base = first_key


def xla_replica_id() -> Any:
  """Returns the replica's number inside an XLA program, [] uint32.

  `tensorflow.compiler.tf2xla.python.xla.replica_id`, in 2.15 and 2.21.
  """
  from tensorflow.compiler.tf2xla.python import xla

  return xla.replica_id()


def is_random_layer(layer: Any) -> bool:
  """Returns whether a Keras layer draws random numbers from a generator of its own.

  `tf.keras.__internal__.layers.BaseRandomLayer`, in Keras 2.15 and tf-keras 2.21.

  Args:
    layer: any object.
  """
  import tensorflow as tf

  return isinstance(layer, tf.keras.__internal__.layers.BaseRandomLayer)


def has_own_variables(layer: Any) -> bool:
  """Returns whether a Keras layer has variables that are not of a sublayer.

  `Layer._trainable_weights` and `Layer._non_trainable_weights`, in Keras 2.15 and
  tf-keras 2.21.

  Args:
    layer: a `tf.keras.layers.Layer`.
  """
  return bool(layer._trainable_weights or layer._non_trainable_weights)


def set_dtype_policy(layer: Any, policy: str) -> None:
  """Sets the dtype policy of a Keras layer that exists already.

  `Layer._set_dtype_policy`, in Keras 2.15 and tf-keras 2.21.

  Args:
    layer: a `tf.keras.layers.Layer`.
    policy: name of the policy.
  """
  layer._set_dtype_policy(policy)


def set_learning_rate(optimizer: Any, learning_rate: Any) -> None:
  """Sets the learning rate in the constructor of a Keras optimizer of our own.

  `Optimizer._learning_rate` and `Optimizer._build_learning_rate`, in Keras 2.15 and
  tf-keras 2.21.

  Args:
    optimizer: a `tf.keras.optimizers.Optimizer`.
    learning_rate: a number or a schedule.
  """
  optimizer._learning_rate = optimizer._build_learning_rate(learning_rate)


def learning_rate_config(optimizer: Any) -> Any:
  """Returns the learning rate of a Keras optimizer for its `get_config`.

  `Optimizer._serialize_hyperparameter` and `Optimizer._learning_rate`, in Keras 2.15
  and tf-keras 2.21.

  Args:
    optimizer: a `tf.keras.optimizers.Optimizer`.
  """
  return optimizer._serialize_hyperparameter(optimizer._learning_rate)


def learning_rate_variable(optimizer: Any) -> Optional[Any]:
  """Returns the variable of an optimizer's constant learning rate.

  `Optimizer._learning_rate`, in Keras 2.15 and tf-keras 2.21; the public property
  returns a value where the rate is a schedule.

  Args:
    optimizer: a `tf.keras.optimizers.Optimizer`.

  Returns:
    None if the learning rate is a schedule, or the optimizer has none.
  """
  import tensorflow as tf

  rate = getattr(optimizer, "_learning_rate", None)
  return rate if isinstance(rate, tf.Variable) else None


def variable_position(optimizer: Any, variable: Any) -> int:
  """Returns the position of a variable in the list that an optimizer was built with.

  `Optimizer._index_dict` and `Optimizer._var_key`, in Keras 2.15 and tf-keras 2.21. A
  replica updates its own part of a variable, which is not in the list by itself.

  Args:
    optimizer: a `tf.keras.optimizers.Optimizer`, built.
    variable: as `update_step` receives it.
  """
  return optimizer._index_dict[optimizer._var_key(variable)]


def build_legacy_optimizer(optimizer: Any, variables: Any) -> None:
  """Creates the variables of a legacy Keras optimizer before its first step.

  `legacy.Optimizer._create_all_weights`, in Keras 2.15 and tf-keras 2.21.

  Args:
    optimizer: a `tf.keras.optimizers.legacy.Optimizer`.
    variables: the variables that it will update.
  """
  optimizer._create_all_weights(variables)


def legacy_learning_rate(optimizer: Any) -> Any:
  """Returns the learning rate of the next step of a legacy optimizer, [] float32.

  `legacy.Optimizer._decayed_lr`, in Keras 2.15 and tf-keras 2.21.

  Args:
    optimizer: a `tf.keras.optimizers.legacy.Optimizer`.
  """
  return optimizer._decayed_lr("float32")


def legacy_hyperparameters(optimizer: Any) -> dict[str, Any]:
  """Returns the hyperparameters of a legacy optimizer that are variables, by name.

  `legacy.Optimizer._hyper`, in Keras 2.15 and tf-keras 2.21.

  Args:
    optimizer: a `tf.keras.optimizers.legacy.Optimizer`, built.
  """
  import tensorflow as tf

  values = optimizer._hyper.items()
  return {name: value for name, value in values if isinstance(value, tf.Variable)}
