"""Row optimizers against the dense ones of Keras, and the state of unread rows."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from trainer.distribute.collectives import OneReplica
from trainer.errors import UserError
from trainer.losses.class_centres import ClassCentres, RowUpdate, TrainingClasses
from trainer.training.row_optimizers import RowAdam, RowSGD

_NUM_CLASSES, _NUM_DIMENSIONS = 30, 4


def _keras(name, **arguments):
  return lambda: getattr(tf.keras.optimizers, name)(0.05, **arguments)


_PAIRS = {
  "SGD": (RowSGD(learning_rate=0.05, momentum=0.0), _keras("SGD")),
  "momentum": (RowSGD(learning_rate=0.05), _keras("SGD", momentum=0.9)),
  "decay": (
    RowSGD(learning_rate=0.05, momentum=0.9, weight_decay=0.1),
    _keras("SGD", momentum=0.9),
  ),
  "Adam": (RowAdam(learning_rate=0.05), _keras("Adam")),
  "Adam-betas": (
    RowAdam(learning_rate=0.05, beta_1=0.5, beta_2=0.9, epsilon=1e-3),
    _keras("Adam", beta_1=0.5, beta_2=0.9, epsilon=1e-3),
  ),
  "AdamW": (
    RowAdam(learning_rate=0.05, weight_decay=0.1),
    _keras("AdamW", weight_decay=0.1),
  ),
}


def _table(optimizer, **arguments):
  table = ClassCentres(optimizer=optimizer, **arguments)
  table.create_variables(_NUM_DIMENSIONS, TrainingClasses(range(_NUM_CLASSES)))
  return table


def _values(table):
  """Returns centres and moments of all classes."""
  return [each.numpy()[:_NUM_CLASSES] for each in table._tables]


def _read(table, step, labels=(3, 7, 7, -1)):
  labels = tf.constant(labels, tf.int32)
  return table.read(labels, tf.constant(step), OneReplica())


@pytest.mark.parametrize("name", _PAIRS)
def test_ten_steps_on_all_rows_equal_keras(name):
  row_optimizer, make = _PAIRS[name]
  table, optimizer = _table(row_optimizer), make()
  dense = tf.Variable(_values(table)[0])
  random = np.random.default_rng(0)
  for step in range(10):
    rows = _read(table, step)
    gradient = random.normal(size=dense.shape).astype(np.float32)
    table.update(
      RowUpdate(rows.indices, tf.constant(gradient), rows.own_rows), tf.constant(step)
    )
    # Keras has no SGD with a weight decay that is part of the gradient.
    decay = 0.1 * dense if name == "decay" else 0.0
    optimizer.apply_gradients([(gradient + decay, dense)])
  np.testing.assert_allclose(_values(table)[0], dense.numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["momentum", "decay", "AdamW"])
def test_unread_rows_keep_their_values_and_moments(name):
  table = _table(_PAIRS[name][0], sampling_rate=0.2)
  random = np.random.default_rng(0)
  is_ever_left = np.zeros(_NUM_CLASSES, bool)
  for step in range(5):
    before = _values(table)
    rows = _read(table, step)
    read = rows.indices.numpy()[rows.is_used.numpy()]
    gradient = random.normal(size=rows.vectors.shape).astype(np.float32)
    table.update(
      RowUpdate(rows.indices, tf.constant(gradient), rows.own_rows), tf.constant(step)
    )
    is_read = np.isin(np.arange(_NUM_CLASSES), read)
    is_ever_left |= ~is_read
    for old, new in zip(before, _values(table)):
      np.testing.assert_array_equal(old[~is_read], new[~is_read])
      assert (old[is_read] != new[is_read]).all()
  assert is_ever_left.any()


@pytest.mark.parametrize("name", _PAIRS)
def test_update_of_some_rows_equals_a_dense_update_of_those_rows(name):
  optimizer = _PAIRS[name][0]
  table = _table(optimizer, sampling_rate=0.2)
  random = np.random.default_rng(0)
  for step in range(3):
    values, *moments = _values(table)
    rows = _read(table, step)
    gradient = random.normal(size=rows.vectors.shape).astype(np.float32)
    table.update(
      RowUpdate(rows.indices, tf.constant(gradient), rows.own_rows), tf.constant(step)
    )
    is_used = rows.is_used.numpy()
    read = rows.indices.numpy()[is_used]
    expected, changed = optimizer.update(
      tf.constant(values[read]),
      [tf.constant(each[read]) for each in moments],
      tf.constant(gradient[is_used]),
      tf.constant(step),
    )
    for new, wanted in zip(_values(table), [expected, *changed]):
      np.testing.assert_allclose(new[read], wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
  ("optimizer_class", "arguments", "message"),
  [
    (RowSGD, {"momentum": 1.0}, "RowSGD.momentum=1.0"),
    (RowSGD, {"weight_decay": -0.1}, "weight_decay=-0.1"),
    (RowAdam, {"beta_1": 1.0}, "RowAdam.beta_1=1.0"),
    (RowAdam, {"beta_2": -0.1}, "beta_2=-0.1"),
    (RowAdam, {"weight_decay": -0.1}, "weight_decay=-0.1"),
    (RowAdam, {"weight_decay": float("nan")}, "weight_decay=nan"),
    (RowSGD, {"weight_decay": float("nan")}, "weight_decay=nan"),
    (RowAdam, {"epsilon": 0.0}, "epsilon=0.0"),
  ],
)
def test_argument_out_of_range_is_reported_in_one_line(
  optimizer_class, arguments, message
):
  with pytest.raises(UserError, match=message) as raised:
    optimizer_class(learning_rate=0.1, **arguments)
  assert "\n" not in str(raised.value)
