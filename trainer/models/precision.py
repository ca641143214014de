"""In which type a network computes, set layer by layer and not for the process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import tensorflow as tf

from trainer.errors import UserError

PRECISIONS = ("float32", "mixed_bfloat16", "mixed_float16")


def set_precision(layer: tf.keras.layers.Layer, precision: str) -> None:
  """Sets the type in which a layer and all inside of it compute.

  Args:
    layer: its variables are float32, whether they exist or will be created.
    precision: one of `PRECISIONS`.

  Raises:
    UserError: variables exist, and can't be read in another type than their own.
  """
  layers = [
    each
    for each in [layer, *layer.submodules]
    if isinstance(each, tf.keras.layers.Layer)
  ]
  for each in layers:
    has_variables = bool(each._trainable_weights or each._non_trainable_weights)
    if has_variables and each.dtype_policy.name != precision != "float32":
      raise UserError(
        f"Encoder.precision={precision!r}: the backbone's layer {each.name!r} has its "
        f"variables already and computes in {each.dtype_policy.name}; build it with "
        f"dtype={precision!r}, or set 'float32'."
      )
  for each in layers:
    each._set_dtype_policy(precision)


@contextlib.contextmanager
def precision_of(layer: tf.keras.layers.Layer) -> Iterator[None]:
  """Makes layers that are created inside compute as this one does.

  Args:
    layer: whose policy is taken over.

  Yields:
    Nothing.
  """
  before = tf.keras.mixed_precision.global_policy()
  tf.keras.mixed_precision.set_global_policy(layer.dtype_policy)
  try:
    yield
  finally:
    tf.keras.mixed_precision.set_global_policy(before)
