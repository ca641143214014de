"""Labels of every supported type and encoding."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from trainer.errors import UserError
from trainer.losses.labels import read_labels

_CLASSES = np.array([3, 1, 3, 0, 1])


def _same_classes(values):
  values = np.asarray(values)
  return values[:, None] == values[None, :]


def _read(labels, encoding="integer", num=5):
  return read_labels(labels, tf.constant(num), encoding).values


_FORMS = {
  "list": _CLASSES.tolist(),
  "column": _CLASSES[:, None],
  "strings": [f"class {each}" for each in _CLASSES],
  "hashes": _CLASSES.astype(np.int64) * 2**40 + 5,
  "unsigned_hashes": np.uint64(2**63) + _CLASSES.astype(np.uint64),
  **{
    name: _CLASSES.astype(name)
    for name in ("int8", "uint8", "int16", "uint16", "int32", "uint32", "float16")
  },
  "float32_column": np.float32(_CLASSES)[:, None],
  "float64": np.float64(_CLASSES),
  "negative": -np.float32(_CLASSES),
}


@pytest.mark.parametrize("form", _FORMS)
def test_every_label_type_distinguishes_classes(form):
  values = _read(_FORMS[form])
  assert values.dtype in (tf.int32, tf.int64)
  np.testing.assert_array_equal(_same_classes(values), _same_classes(_CLASSES))


@pytest.mark.parametrize(
  "labels",
  [
    [0.5, 1.0, 2.0, 3.0, 4.0],
    [float("nan"), 1.0, 2.0, 3.0, 4.0],
    [float("inf"), 1.0, 2.0, 3.0, 4.0],
    np.array([2**24, 2**24 + 1, 0, 0, 0], np.float32),
    np.array([2048, 2049, 0, 0, 0], np.float16),
  ],
  ids=["half", "nan", "inf", "float32_beyond_2_24", "float16_beyond_2_11"],
)
def test_non_integer_floats_are_refused(labels):
  with pytest.raises(UserError, match="must be whole numbers below"):
    _read(labels)


@pytest.mark.parametrize("kind", [np.float32, np.int64, bool])
def test_one_hot_labels_are_the_classes(kind):
  values = _read(np.eye(4, dtype=kind)[_CLASSES], "one_hot")
  np.testing.assert_array_equal(values, _CLASSES)


@pytest.mark.parametrize("kind", [np.float32, np.int64, bool])
def test_multi_hot_labels_are_unchanged(kind):
  several = np.random.default_rng(0).random((5, 3)) < 0.5
  np.testing.assert_array_equal(_read(several.astype(kind), "multi_hot"), several)


def test_bool_matrix_needs_no_encoding():
  several = np.random.default_rng(0).random((5, 3)) < 0.5
  np.testing.assert_array_equal(_read(several), several)


_SMOOTH = np.full((5, 4), 0.1, np.float32)


@pytest.mark.parametrize(
  ("labels", "encoding", "message"),
  [
    (np.eye(4)[_CLASSES], "integer", "label_encoding"),
    (np.zeros((5, 1, 1), int), "integer", r"shape \(B,\) or \(B, 1\)"),
    (np.zeros((), int), "integer", r"shape \(B,\) or \(B, 1\)"),
    (np.zeros((5, 1), bool), "integer", "multi_hot"),
    (np.zeros(5, np.complex64), "integer", "give integers"),
    (_SMOOTH, "one_hot", "no smoothing"),
    (np.zeros((5, 4)), "one_hot", "no row of zeros"),
    (np.ones((5, 4)), "one_hot", "one 1 in each row"),
    (_CLASSES, "one_hot", r"shape \(B, L\)"),
    (_SMOOTH, "multi_hot", "zeros and ones"),
    (np.full((5, 3), "a"), "multi_hot", r"shape \(B, L\)"),
    (_CLASSES[:4], "integer", "4 labels were given for 5 embeddings"),
    (_CLASSES, "sparse", "is unknown"),
  ],
)
def test_labels_of_another_encoding_are_refused(labels, encoding, message):
  with pytest.raises(UserError, match=message):
    _read(labels, encoding)


@pytest.mark.parametrize("num", [1, 4])
def test_number_of_labels_is_compared_in_a_graph_of_unknown_size(num):
  read_fn = tf.function(
    lambda labels, num: read_labels(labels, num).values,
    input_signature=[
      tf.TensorSpec([None, None], tf.int64),
      tf.TensorSpec([], tf.int32),
    ],
  )
  np.testing.assert_array_equal(read_fn(_CLASSES[:, None], 5), _CLASSES)
  with pytest.raises(tf.errors.InvalidArgumentError, match="differ in number"):
    read_fn(_CLASSES[:num, None], 5)
