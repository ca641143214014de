from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from tests.losses import batches, oracles, pair_oracles
from trainer import losses
from trainer.errors import UserError
from trainer.losses import softmax
from trainer.losses.softmax import (
  LOG_ZERO,
  LearnedTemperature,
  log_sum_exp,
  num_members,
  temperature_value,
)

_VALUES = tf.constant([[1.0, 2.0, 500.0], [-900.0, -901.0, 3.0], [0.0, 1.0, 2.0]])
_IS_MEMBER = tf.constant(
  [[True, True, False], [True, True, False], [False, False, False]]
)


def test_log_sum_exp_is_over_members_only():
  expected = [np.logaddexp(1, 2), np.logaddexp(-900, -901), LOG_ZERO]
  np.testing.assert_allclose(log_sum_exp(_VALUES, _IS_MEMBER), expected, rtol=1e-6)


def test_gradient_is_the_softmax_of_members_and_zero_without_one():
  with tf.GradientTape() as tape:
    tape.watch(_VALUES)
    value = log_sum_exp(_VALUES, _IS_MEMBER)
  near = 1 / (1 + np.exp(-1))
  expected = [[1 - near, near, 0], [near, 1 - near, 0], [0, 0, 0]]
  np.testing.assert_allclose(tape.gradient(value, _VALUES), expected, rtol=1e-5)


def test_members_are_counted_per_anchor():
  np.testing.assert_array_equal(num_members(_IS_MEMBER), [2, 2, 0])


def test_learned_temperature_starts_at_the_initial_value():
  np.testing.assert_allclose(temperature_value(LearnedTemperature(initial=0.07)), 0.07)


def test_learned_temperature_has_one_trainable_variable():
  assert len(LearnedTemperature(initial=0.07).trainable_variables) == 1


def test_learned_temperature_never_falls_to_zero():
  temperature = LearnedTemperature(initial=0.07)
  temperature.trainable_variables[0].assign_sub(20.0)
  assert temperature().numpy() > 0


@pytest.mark.parametrize("initial", [0, -0.1])
def test_temperature_not_above_zero_is_refused(initial):
  with pytest.raises(UserError, match="not above 0"):
    LearnedTemperature(initial=initial)


_LOSSES = [
  (
    losses.InfoNCELoss,
    oracles.cosine_similarity,
    pair_oracles.one_positive_softmax,
  ),
  (
    losses.SupervisedContrastiveLoss,
    oracles.cosine_similarity,
    pair_oracles.supervised_contrastive,
  ),
  (
    losses.SoftNearestNeighbourLoss,
    oracles.squared_euclidean,
    pair_oracles.soft_nearest_neighbour,
  ),
]


@pytest.mark.parametrize(("loss_class", "compare", "oracle"), _LOSSES)
@pytest.mark.parametrize("rows_per_tile", [None, 4])
def test_learned_temperature_has_the_gradient_of_the_definition(
  loss_class, compare, oracle, rows_per_tile
):
  embeddings, labels = batches.random_batch("unbalanced")
  loss = loss_class(
    temperature=losses.LearnedTemperature(initial=0.5), rows_per_tile=rows_per_tile
  )
  (variable,) = loss.trainable_variables
  with tf.GradientTape() as tape:
    total = loss(*batches.arguments(embeddings, labels)).total

  def expected_total(logarithm):
    terms = oracle(np.exp(logarithm))
    ones, related = np.ones(len(labels)), oracles.relevance(labels)
    return oracles.loss_terms(compare, terms, np.float64(embeddings), related, ones)[0]

  start = np.log(0.5)
  slope = (expected_total(start + 1e-6) - expected_total(start - 1e-6)) / 2e-6
  np.testing.assert_allclose(tape.gradient(total, variable), slope, rtol=1e-4)


@pytest.mark.parametrize("loss_class", [row[0] for row in _LOSSES])
def test_temperature_not_above_zero_is_refused_softmax(loss_class):
  with pytest.raises(UserError, match="temperature=0 is not above 0"):
    loss_class(temperature=0)


@pytest.mark.parametrize("name", batches.LABELS)
@pytest.mark.parametrize("temperature", [0.5, 1e-3])
def test_loop_over_positives_equals_all_pairs(monkeypatch, name, temperature):
  embeddings, labels = batches.random_batch(name)
  weights = np.ones(len(labels), np.float32)
  weights[-1] = len(labels) == 1  # Padding, unless it is the only example.
  by_way = {}
  for way, least in (("lists", 0), ("pairs", 10**9)):
    monkeypatch.setattr(softmax, "_MIN_PAIRS_OF_LISTS", least)
    variable = losses.LearnedTemperature(initial=temperature)
    with tf.GradientTape() as tape:
      loss = losses.InfoNCELoss(temperature=variable)
      terms = loss(*batches.arguments(embeddings, labels, weights))
    to_temperature = tape.gradient(terms.total, variable.trainable_variables)[0]
    active = terms.statistics["mining/active_fraction"]
    evaluated = batches.evaluate(loss, embeddings, labels, weights)
    by_way[way] = [*evaluated, to_temperature, *active]
  for by_lists, by_pairs in zip(by_way["lists"], by_way["pairs"]):
    np.testing.assert_allclose(by_lists, by_pairs, rtol=1e-5, atol=1e-5)
  assert np.isfinite(by_way["lists"][2]).all()


def test_tiny_temperature_does_not_overflow():
  embeddings, labels = batches.random_batch("unbalanced")
  total, _, gradient = batches.evaluate(
    losses.InfoNCELoss(temperature=1e-3), embeddings, labels
  )
  assert np.isfinite(total)
  assert np.isfinite(gradient).all()
