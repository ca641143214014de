"""Collapse: detected, never left by a loss of distances, and left with jitter."""

from __future__ import annotations

import re

import numpy as np
import pytest
import tensorflow as tf

from tests.losses import batches
from trainer import losses
from trainer.errors import UserError
from trainer.losses.metric_accumulators import summarize
from trainer.losses.mining_statistics import describe_collapse

_STATISTICS = losses.MiningStatistics()
_LABELS = np.repeat(np.arange(6, dtype=np.int32), 4)
_PLAIN = {
  "batch_all": losses.BatchAllTripletLoss(margin=0.5),
  "batch_hard": losses.BatchHardTripletLoss(margin=0.5),
}


def _metrics(embeddings):
  arguments = batches.arguments(np.float32(embeddings), _LABELS)
  sums = _STATISTICS(_PLAIN["batch_all"], *arguments)
  return summarize(tf.nest.map_structure(lambda each: each.numpy(), dict(sums)))


def _random(seed=0):
  return np.random.default_rng(seed).normal(size=(len(_LABELS), 5))


@pytest.mark.parametrize(
  ("embeddings", "words"),
  [
    (np.full((24, 5), 0.7), "100% of the pairs"),
    (np.zeros((24, 5)), "100% of the pairs"),
    (1e3 + 2.5 * _random(), "differ by .* of their norm"),
    (np.outer(_random()[:, 0], np.ones(5)), "on one line"),
  ],
)
def test_collapse_is_told_in_words(embeddings, words):
  assert re.search(words, describe_collapse(_metrics(embeddings)))


def test_embeddings_apart_are_no_collapse():
  assert describe_collapse(_metrics(_random())) is None


def test_two_classes_well_apart_are_no_collapse():
  labels = np.arange(24, dtype=np.int32) % 2
  apart = np.where(labels[:, None] == 0, 1.0, -1.0) * np.ones(5) + 1e-3 * _random()
  arguments = batches.arguments(np.float32(apart), labels)
  sums = _STATISTICS(_PLAIN["batch_all"], *arguments)
  metrics = summarize(tf.nest.map_structure(lambda each: each.numpy(), dict(sums)))
  assert metrics["mining/embedding_rank"] < 1.2
  assert describe_collapse(metrics) is None


def test_without_mining_statistics_nothing_is_told():
  assert describe_collapse({"train/loss": 1.0}) is None


def _trained(loss, num_steps=60):
  """Embeddings of a linear encoder that starts by giving all inputs the same."""
  inputs = tf.constant(_random(1) + 2.0 * _random(2)[_LABELS], tf.float32)
  weights = tf.Variable(tf.zeros([5, 5]))
  optimizer = tf.keras.optimizers.SGD(0.5)
  offset = tf.constant([1.0, 0.0, 0.0, 0.0, 0.0])

  @tf.function
  def step():
    with tf.GradientTape() as tape:
      embeddings = tf.matmul(inputs, weights) + offset
      anchors, candidates = batches.arguments(embeddings, _LABELS)
      terms = loss(anchors, candidates)
      mean = tf.math.divide_no_nan(terms.total, terms.count)
    optimizer.apply_gradients([(tape.gradient(mean, weights), weights)])

  for _ in range(num_steps):
    step()
  return tf.matmul(inputs, weights) + offset


@pytest.mark.parametrize("name", _PLAIN)
def test_collapsed_encoder_stays_as_it_is(name):
  embeddings = _trained(_PLAIN[name]).numpy()
  assert (embeddings == embeddings[0]).all()


@pytest.mark.parametrize("name", _PLAIN)
def test_jitter_leaves_collapse(name):
  embeddings = _trained(losses.JitteredLoss(loss=_PLAIN[name], scale=0.01))
  metrics = _metrics(embeddings)
  assert describe_collapse(metrics) is None
  assert metrics["mining/hard_fraction"] < 0.3


def test_jitter_of_parts_of_the_batch_is_that_of_the_whole():
  embeddings, labels = batches.random_batch("unbalanced")
  loss = losses.JitteredLoss(loss=_PLAIN["batch_all"])
  whole = batches.evaluate(loss, embeddings, labels)
  parts = [
    batches.evaluate(loss, embeddings, labels, rows=rows)
    for rows in ([0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11])
  ]
  for got, expected in zip(map(sum, zip(*parts)), whole):
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_jitter_keeps_what_the_step_asks_of_a_loss():
  loss = losses.JitteredLoss(loss=_PLAIN["batch_all"])
  assert (loss.margin, loss.needs_positives) == (0.5, True)
  assert loss.comparison is _PLAIN["batch_all"].comparison


def test_scale_not_above_zero_is_refused():
  with pytest.raises(UserError, match="scale=0 is not above 0"):
    losses.JitteredLoss(loss=_PLAIN["batch_all"], scale=0)
