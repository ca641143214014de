"""Tables of class centres: initial values, samples and estimates from samples."""

from __future__ import annotations

import math

import numpy as np
import pytest
import tensorflow as tf

from trainer.distribute.collectives import OneReplica
from trainer.errors import UserError
from trainer.losses.centre_products import CosineOptions, centre_cosines
from trainer.losses.class_centres import ClassCentres, TrainingClasses
from trainer.training.row_optimizers import RowSGD

_SCALE = 5.0


class _ReplicaNumber(OneReplica):
  """Collectives of a replica without communication."""

  def __init__(self, replica_id):
    self.replica_id = replica_id


def _table(num_classes=23, labels=None, **arguments):
  table = ClassCentres(optimizer=RowSGD(learning_rate=0.1), **arguments)
  labels = range(num_classes) if labels is None else labels
  table.create_variables(3, TrainingClasses(labels))
  return table


def _classes(table, labels, step, replica_id=0):
  """Returns the classes read by a replica and the class of each of its examples."""
  rows = table.read(
    tf.constant(labels, tf.int32), tf.constant(step), _ReplicaNumber(replica_id)
  )
  first = replica_id * table.classes_per_replica
  if rows.indices is None:
    numbers = np.arange(len(rows.is_used))
  else:
    numbers = rows.indices.numpy()
  columns = rows.columns.numpy()
  own = np.where(columns >= 0, first + numbers[columns], -1)
  return first + numbers[rows.is_used.numpy()], own


def _of_all_replicas(mirrored, num_replicas, labels, step, **arguments):
  with mirrored(num_replicas).scope():
    table = _table(**arguments)
  parts = [_classes(table, labels, step, number) for number in range(num_replicas)]
  classes = np.concatenate([part[0] for part in parts])
  assert len(set(classes)) == len(classes)
  return set(classes), np.max([part[1] for part in parts], 0)


@pytest.mark.parametrize("rate", [1.0, 0.6, 0.2])
@pytest.mark.parametrize("num_classes", [2, 23, 40])
def test_replicas_read_the_classes_of_one_replica(mirrored, rate, num_classes):
  random = np.random.default_rng(0)
  arguments = {"sampling_rate": rate, "num_classes": num_classes}
  for step in range(3):
    labels = random.integers(-1, num_classes, 8)
    alone, own = _of_all_replicas(mirrored, 1, labels, step, **arguments)
    np.testing.assert_array_equal(own, labels)
    for num_replicas in (2, 4):
      found = _of_all_replicas(mirrored, num_replicas, labels, step, **arguments)
      assert found[0] == alone
      np.testing.assert_array_equal(found[1], labels)


def test_sample_depends_only_on_seed_and_step():
  one, other = (_table(200, sampling_rate=0.1, seed=3) for _ in range(2))
  labels = [5, 6, 5]
  first = _classes(one, labels, 7)[0]
  np.testing.assert_array_equal(first, _classes(other, labels, 7)[0])
  np.testing.assert_array_equal(first, _classes(one, labels, 7)[0])
  assert set(first) != set(_classes(one, labels, 8)[0])
  different = _table(200, sampling_rate=0.1, seed=4)
  assert set(first) != set(_classes(different, labels, 7)[0])


def test_sample_is_the_same_under_xla():
  table = _table(200, sampling_rate=0.1)

  def indices(step):
    return table.read(tf.constant([5, 6, 5]), step, OneReplica()).indices

  compiled = tf.function(indices, jit_compile=True, autograph=False)
  for step in range(3):
    np.testing.assert_array_equal(
      compiled(tf.constant(step)), indices(tf.constant(step))
    )


def test_sample_has_each_class_of_the_batch_and_one_of_each_interval():
  table = _table(200, sampling_rate=0.1)
  for step in range(20):
    classes, _ = _classes(table, [5, 150, 5, 199, -1], step)
    assert {5, 150, 199} <= set(classes)
    # Sampled classes of the batch are read once.
    assert 20 <= len(classes) <= 23
    assert (classes >= 0).all()
    assert (classes < 200).all()


@pytest.mark.parametrize("rate", [0.3, 0.4, 0.9])
def test_each_class_outside_of_the_batch_is_drawn_with_equal_frequency(rate):
  num_steps, num_classes = 3000, 11
  table = _table(num_classes, sampling_rate=rate)

  @tf.function(autograph=False)
  def counts():
    def of_step(step):
      rows = table.read(tf.constant([4, 4, 9, -1]), step, OneReplica())
      taken = tf.where(rows.is_used, rows.indices, num_classes)
      return tf.reduce_max(tf.one_hot(taken, num_classes, dtype=tf.int32), 0)

    return tf.reduce_sum(tf.map_fn(of_step, tf.range(num_steps)), 0)

  found = counts().numpy()
  assert found[4] == found[9] == num_steps
  drawn = np.delete(found, [4, 9]) / num_steps
  expected = math.ceil(rate * num_classes) / num_classes
  deviation = math.sqrt(expected * (1 - expected) / num_steps)
  assert np.abs(drawn - expected).max() < 4 * deviation


def _mean_sums(is_corrected, num_steps=6000):
  """Returns mean sums over other classes per example, and all exponentials."""
  num_classes, labels = 11, [4, 9, 4]
  table = _table(num_classes, sampling_rate=0.35, is_corrected=is_corrected)
  random = np.random.default_rng(0)
  points = random.normal(size=(3, 3))
  centres = random.normal(size=(num_classes, 3))
  points, centres = (
    each / np.linalg.norm(each, axis=1, keepdims=True) for each in (points, centres)
  )
  table._tables[0].assign(np.pad(centres, [[0, 1], [0, 0]]))

  @tf.function(autograph=False)
  def sums():
    def of_step(step):
      rows = table.read(tf.constant(labels), step, OneReplica())
      unit = tf.constant(points, tf.float32)
      cosines = centre_cosines(unit, rows, CosineOptions(_SCALE), OneReplica())
      return tf.exp(cosines.others)

    values = tf.map_fn(of_step, tf.range(num_steps), fn_output_signature=tf.float32)
    error = tf.math.reduce_std(values, 0) / num_steps**0.5
    return tf.reduce_mean(values, 0), error

  exponentials = np.exp(_SCALE * points @ centres.T)
  exponentials[np.arange(3), labels] = 0
  return [each.numpy() for each in sums()], exponentials


def test_sampled_sum_estimates_the_others_by_rate_and_those_of_the_batch_in_full():
  (mean, error), exponentials = _mean_sums(is_corrected=False)
  of_batch = exponentials[:, [4, 9]].sum(1)
  rate = math.ceil(0.35 * 11) / 11
  expected = rate * (exponentials.sum(1) - of_batch) + of_batch
  assert (np.abs(mean - expected) < 4 * error).all()
  assert (error < 0.02 * expected).all()


def test_corrected_sum_estimates_the_sum_over_all_others():
  (mean, error), exponentials = _mean_sums(is_corrected=True)
  expected = exponentials.sum(1)
  assert (np.abs(mean - expected) < 4 * error).all()
  assert (error < 0.02 * expected).all()


def test_correction_does_not_change_the_reported_cosines():
  found = []
  for is_corrected in (False, True):
    table = _table(sampling_rate=0.3, is_corrected=is_corrected)
    rows = table.read(tf.constant([4, 9, 4]), tf.constant(0), OneReplica())
    unit = tf.linalg.l2_normalize(tf.reshape(tf.range(1.0, 10.0), [3, 3]), 1)
    found.append(centre_cosines(unit, rows, CosineOptions(_SCALE), OneReplica()))
  np.testing.assert_array_equal(found[0].own, found[1].own)
  np.testing.assert_allclose(found[0].nearest_other, found[1].nearest_other, rtol=1e-6)
  assert (found[0].others < found[1].others).numpy().all()


def test_initial_values_are_the_same_on_any_number_of_replicas(mirrored):
  def values(num_replicas):
    with mirrored(num_replicas).scope():
      table = _table()
    parts = getattr(table._tables[0], "values", [table._tables[0]])
    rows = [part.numpy()[: table.classes_per_replica] for part in parts]
    return np.concatenate(rows)[:23]

  alone = values(1)
  assert 0.5 < np.linalg.norm(alone, axis=1).mean() < 1.5
  np.testing.assert_array_equal(values(2), alone)
  np.testing.assert_array_equal(values(4), alone)


@pytest.mark.parametrize("rate", [1.0, 0.5])
def test_labels_may_have_gaps(rate):
  table = _table(labels=[3, 10, 11, 2_000_000], sampling_rate=rate)
  _, own = _classes(table, [2_000_000, 3, -1, 11], 0)
  np.testing.assert_array_equal(own, [3, 0, -1, 2])


def test_class_sizes_are_counted_from_the_labels():
  table = ClassCentres(optimizer=RowSGD(learning_rate=0.1))
  table.create_variables(3, TrainingClasses([3, 10, 12], [5, 700, 1]))
  sizes = table.sizes_of(tf.constant([12, 3, -1, 10]))
  np.testing.assert_array_equal(sizes, [1, 5, 1, 700])


def test_missing_class_sizes_are_reported():
  with pytest.raises(UserError, match=r"set TrainingClasses.sizes"):
    _table().sizes_of(tf.constant([0]))


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"sampling_rate": 0.0}, "ClassCentres.sampling_rate=0.0 must be in"),
    ({"sampling_rate": 1.5}, "ClassCentres.sampling_rate=1.5 must be in"),
    ({"sampling_rate": -0.1}, "ClassCentres.sampling_rate=-0.1 must be in"),
    ({"centres_per_class": 0}, "centres_per_class=0 must be at least 1"),
    ({"num_classes": 7}, "num_classes=7, and the training data has 5 classes; set 5"),
  ],
)
def test_argument_out_of_range_is_reported_in_one_line(arguments, message):
  with pytest.raises(UserError, match=message) as raised:
    table = ClassCentres(optimizer=RowSGD(learning_rate=0.1), **arguments)
    table.create_variables(3, TrainingClasses(range(5)))
  assert "\n" not in str(raised.value)


def test_a_single_class_is_refused():
  with pytest.raises(UserError, match="needs at least 2 classes"):
    _table(1)
