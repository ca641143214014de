"""The values of a checkpoint on the host, apart from the variables they come from.

So that they can be written while the variables go on changing.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import tensorflow as tf

Snapshot = dict[str, np.ndarray]


def take(checkpoint: tf.train.Checkpoint) -> Snapshot:
  """Copies all values to the host; on every worker, as replicas may have to be asked.

  Args:
    checkpoint: what is saved.

  Returns:
    Values by the names that they have in TensorFlow's files.
  """
  # The public way to these names and values writes them to a file at once.
  gathered, *_ = checkpoint._saver._gather_serialized_tensors(None)
  values = {}
  for tensors in gathered.values():
    for name, tensor in tensors.items():
      values[name] = _on_host(tensor)
  return values


def variable_paths(checkpoint: tf.train.Checkpoint) -> set[str]:
  """Returns the paths of the variables that a checkpoint would save, without values.

  Args:
    checkpoint: what is saved.

  Returns:
    Such as "encoder/_head/kernel", as in TensorFlow's files.
  """
  view = tf.train.TrackableView(checkpoint)
  # Breadth first, as TensorFlow names what can be reached in several ways.
  queue: list[tuple[str, Any]] = [("", checkpoint)]
  seen = {id(checkpoint)}
  paths = set()
  for path, each in queue:
    for name, child in view.children(each).items():
      if id(child) not in seen:
        seen.add(id(child))
        queue.append((f"{path}/{name}" if path else name, child))
    if isinstance(each, tf.Variable):
      paths.add(path)
  return paths


def saved_paths(prefix: str) -> set[str]:
  """Returns the paths of the variables that a checkpoint file has.

  Args:
    prefix: path of the files, without their endings.
  """
  names = tf.train.load_checkpoint(prefix).get_variable_to_shape_map()
  return {name.split("/.", 1)[0] for name in names if "/." in name}


def not_finite(snapshot: Snapshot) -> list[str]:
  """Returns the paths of the values that hold NaN or an infinity, sorted.

  Args:
    snapshot: the values.
  """
  return sorted(
    name.split("/.", 1)[0]
    for name, value in snapshot.items()
    if np.issubdtype(value.dtype, np.floating)
    and value.size
    # NaN is passed on by both, and no array of flags is made.
    and not (np.isfinite(value.min()) and np.isfinite(value.max()))
  )


def write(snapshot: Snapshot, prefix: str) -> None:
  """Writes TensorFlow's two files.

  Args:
    snapshot: the values.
    prefix: path of the files, without their endings.

  Raises:
    tf.errors.OpError: they can't be written.
  """
  names = sorted(snapshot)
  with tf.device("CPU:0"):
    tf.raw_ops.SaveV2(
      prefix=prefix,
      tensor_names=names,
      shape_and_slices=[""] * len(names),
      tensors=[tf.constant(snapshot[name]) for name in names],
    )


def claimed_bytes(prefix: str) -> int:
  """How much memory the tensors would take that a checkpoint says it has.

  Args:
    prefix: path of the files, without their endings.
  """
  reader = tf.train.load_checkpoint(prefix)
  dtypes = reader.get_variable_to_dtype_map()
  shapes = reader.get_variable_to_shape_map()
  return sum(
    int(np.prod(shape, dtype=object)) * dtypes[name].size
    for name, shape in shapes.items()
  )


def data_bytes(prefix: str) -> int:
  """Size of the file that has them."""
  return os.path.getsize(f"{prefix}.data-00000-of-00001")


def _on_host(tensor) -> np.ndarray:
  # Variables that replicas keep apart are described, and read when they are asked.
  value = getattr(tensor, "tensor", tensor)
  # A view of the CPU's own memory would change with the variable.
  return np.array(value.numpy())
