"""In which type a network computes, set layer by layer and not for the process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import tensorflow as tf

PRECISIONS = ("float32", "mixed_bfloat16", "mixed_float16")


def set_precision(layer: tf.keras.layers.Layer, precision: str) -> None:
  """Sets the type in which a layer and all inside of it compute.

  Args:
    layer: not yet built; its variables will be float32.
    precision: one of `PRECISIONS`.
  """
  for each in [layer, *layer.submodules]:
    if isinstance(each, tf.keras.layers.Layer):
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
