"""Conversion of labels from callers' encodings to those of the losses.

Keras passes labels of shape (B, 1), as integers or floats; a classifier's data set has
them one-hot. Losses take [B] integer or [B, L] bool.

Shapes: B examples, L classes or labels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import tensorflow as tf

from trainer.errors import UserError

INTEGER, ONE_HOT, MULTI_HOT = "integer", "one_hot", "multi_hot"
LABEL_ENCODINGS = (INTEGER, ONE_HOT, MULTI_HOT)

# Below this limit all whole numbers are distinct in the type; from it on neighbours are
# equal.
_FIRST_SHARED = {
  tf.bfloat16: 2.0**8,
  tf.float16: 2.0**11,
  tf.float32: 2.0**24,
  tf.float64: 2.0**53,
}


class Labels(NamedTuple):
  """Labels in the form that losses take.

  Attributes:
    values: [B] integer, or [B, L] bool.
    is_sound: [] bool, whether the given values are valid in the encoding.
  """

  values: tf.Tensor
  is_sound: tf.Tensor


def check_label_encoding(label_encoding: str) -> None:
  """Raises if an encoding is unknown.

  Raises:
    UserError: it is not one of `LABEL_ENCODINGS`.
  """
  if label_encoding not in LABEL_ENCODINGS:
    raise UserError(
      f"label_encoding={label_encoding!r} is unknown; use one of {LABEL_ENCODINGS}."
    )


def read_labels(
  labels: Any, num_embeddings: tf.Tensor, label_encoding: str = INTEGER
) -> Labels:
  """Reads labels, and rejects those that would be compared incorrectly.

  Args:
    labels: for "integer" [B] or [B, 1]: integers, whole floats or strings; or [B, L]
      bool, which is "multi_hot". For "one_hot" [B, L], one 1 in each row. For
      "multi_hot" [B, L] of zeros and ones; examples with a common 1 are positives.
    num_embeddings: B, [] int32; static if known.
    label_encoding: "integer", "one_hot" or "multi_hot".

  Raises:
    UserError: shape, type or, if executed eagerly, values do not match the encoding, or
      the number of labels is not B. For values, a graph raises
      `tf.errors.InvalidArgumentError`. XLA drops assertions; there, only `is_sound`
      reports invalid values.
  """
  check_label_encoding(label_encoding)
  labels = tf.convert_to_tensor(labels)
  if label_encoding == INTEGER and not _is_bool_matrix(labels):
    read = _classes(labels)
  else:
    read = _matrix(labels, label_encoding)
  return read._replace(values=of_batch("labels", read.values, num_embeddings))


def _is_bool_matrix(labels: tf.Tensor) -> bool:
  return labels.dtype == tf.bool and labels.shape.rank == 2 and labels.shape[1] != 1


def _classes(labels: tf.Tensor) -> Labels:
  """Converts [B] or [B, 1] labels to [B] integers."""
  dtype, shape = labels.dtype, labels.shape
  is_column = shape.rank == 2 and shape[1] in (None, 1)
  if not (shape.rank in (None, 1) or is_column):
    raise UserError(
      f"labels have shape {shape} and type {dtype.name}; needed is one integer for "
      'each embedding, shape (B,) or (B, 1). Set label_encoding="one_hot" for one-hot '
      'labels, "multi_hot" for several labels of an example, in '
      "the loss function's arguments or by KerasLoss(loss, label_encoding=...)."
    )
  flat = labels if shape.rank == 1 else tf.reshape(labels, [-1])
  if dtype == tf.string:
    return Labels(tf.unique(flat).idx, tf.constant(True))
  if dtype.is_floating:
    return _whole(flat)
  if not dtype.is_integer:
    raise UserError(
      f"labels have shape {shape} and type {dtype.name}; give integers, or several "
      'labels of an example as (B, L) with label_encoding="multi_hot".'
    )
  return Labels(_signed(flat), tf.constant(True))


def _signed(labels: tf.Tensor) -> tf.Tensor:
  """Converts classes to a type that sorts on every device."""
  if labels.dtype in (tf.int32, tf.int64):
    return labels
  if labels.dtype == tf.uint64:
    return tf.bitcast(labels, tf.int64)  # The values change but stay distinct.
  return tf.cast(labels, tf.int64 if labels.dtype == tf.uint32 else tf.int32)


def _whole(labels: tf.Tensor) -> Labels:
  """Converts floats that are whole, and small enough to be distinct, to integers."""
  limit = _FIRST_SHARED[labels.dtype]
  integer = tf.int64 if labels.dtype == tf.float64 else tf.int32
  # False for NaN.
  is_whole = tf.logical_and(tf.equal(labels, tf.round(labels)), tf.abs(labels) < limit)
  return _sound(
    tf.cast(tf.where(is_whole, labels, tf.zeros_like(labels)), integer),
    tf.reduce_all(is_whole),
    f"labels of type {labels.dtype.name} must be whole numbers below {limit:.0f}, from "
    "where this type no longer tells them apart; give integers.",
  )


def _matrix(labels: tf.Tensor, label_encoding: str) -> Labels:
  """Converts one-hot labels to [B] int32, and multi-hot ones to [B, L] bool."""
  is_number = labels.dtype.is_floating or labels.dtype.is_integer
  if labels.shape.rank != 2 or not (is_number or labels.dtype == tf.bool):
    raise UserError(
      f"labels have shape {labels.shape} and type {labels.dtype.name}; label_encoding="
      f'"{label_encoding}" needs zeros and ones of shape (B, L). For one integer an '
      f'example leave it at "{INTEGER}".'
    )
  if labels.dtype != tf.bool:
    is_one = tf.equal(labels, tf.ones_like(labels))
    is_binary = tf.reduce_all(
      tf.logical_or(is_one, tf.equal(labels, tf.zeros_like(labels)))
    )
  else:
    is_one, is_binary = labels, tf.constant(True)
  if label_encoding != ONE_HOT:
    message = "multi-hot labels must be zeros and ones."
    return _sound(is_one, is_binary, message)
  num_ones = tf.reduce_sum(tf.cast(is_one, tf.int32), 1)
  return _sound(
    tf.argmax(tf.cast(is_one, tf.int32), 1, output_type=tf.int32),
    tf.logical_and(is_binary, tf.reduce_all(tf.equal(num_ones, 1))),
    "one-hot labels must have one 1 in each row, and zeros: no smoothing, and no row "
    'of zeros; for several labels of an example set label_encoding="multi_hot".',
  )


def of_batch(name: str, values: tf.Tensor, num_embeddings: tf.Tensor) -> tf.Tensor:
  """Returns the values after checking their number: a single one would be broadcast.

  Args:
    name: name of the values, for the error.
    values: [B, ...].
    num_embeddings: B, [] int32; static if known.

  Raises:
    UserError: the number of values is not B.
  """
  size, num = values.shape[0], tf.get_static_value(num_embeddings)
  if size is not None and num is not None:
    if size != num:
      raise UserError(
        f"{size} {name} were given for {num} embeddings; give one for each embedding."
      )
    return values
  is_equal = tf.equal(tf.shape(values)[0], num_embeddings)
  message = f"{name} and embeddings differ in number; give one for each embedding."
  return checked_in_graph(is_equal, values, message)


def checked_in_graph(
  condition: tf.Tensor, values: tf.Tensor, message: str
) -> tf.Tensor:
  """Returns the values if the condition holds.

  Args:
    condition: [] bool.
    values: of any shape.
    message: the requirement, and what to do.

  Raises:
    UserError: the condition is false, if executed eagerly; a graph raises
      `tf.errors.InvalidArgumentError`, unless XLA compiles it.
  """
  if tf.executing_eagerly():
    if not condition:
      raise UserError(message)
    return values
  with tf.control_dependencies([tf.debugging.Assert(condition, [message])]):
    return tf.identity(values)


def _sound(values: tf.Tensor, is_sound: tf.Tensor, message: str) -> Labels:
  return Labels(checked_in_graph(is_sound, values, message), is_sound)
