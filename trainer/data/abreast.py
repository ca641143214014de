"""A function of one file, for many files side by side in the graph.

Shapes: B files.
"""

from __future__ import annotations

from collections.abc import Callable

import tensorflow as tf

# Calls of the function in one graph: more make it slow to build.
_MAX_ABREAST = 128


def each(
  file_fn: Callable[[tf.Tensor], tf.Tensor], files: tf.Tensor, spec: tf.TensorSpec
) -> tf.Tensor:
  """What a function makes of each file; a loop would cost more than decoding a PNG.

  Args:
    file_fn: of one file, [] string.
    files: [B] string.
    spec: of what the function makes.

  Returns:
    [B, ...].
  """
  # One trace, called for each file: tracing it for each took most of a run's start.
  file_fn = tf.function(
    file_fn, input_signature=[tf.TensorSpec([], tf.string)], autograph=False
  )
  num_files = files.shape[0]
  if not num_files:
    return tf.map_fn(file_fn, files, fn_output_signature=spec)
  num_abreast = max(n for n in range(1, _MAX_ABREAST + 1) if num_files % n == 0)

  def of_some(some: tf.Tensor) -> tf.Tensor:
    return tf.stack([file_fn(file) for file in tf.unstack(some)])

  if num_abreast == num_files:
    return of_some(files)
  parts = tf.map_fn(
    of_some,
    tf.reshape(files, [-1, num_abreast]),
    fn_output_signature=tf.TensorSpec([num_abreast, *spec.shape], spec.dtype),
  )
  return tf.reshape(parts, [num_files, *spec.shape])
