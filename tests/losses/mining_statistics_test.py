"""Mining statistics, and collapse: its detection and the recovery by jitter."""

from __future__ import annotations

import re

import numpy as np
import pytest
import tensorflow as tf

from tests.losses import batches
from trainer import losses
from trainer.errors import UserError
from trainer.losses.loss_terms import Anchors
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
def test_collapse_is_described(embeddings, words):
  assert re.search(words, describe_collapse(_metrics(embeddings)))


def test_spread_embeddings_are_not_a_collapse():
  assert describe_collapse(_metrics(_random())) is None


def test_two_separated_classes_are_not_a_collapse():
  labels = np.arange(24, dtype=np.int32) % 2
  apart = np.where(labels[:, None] == 0, 1.0, -1.0) * np.ones(5) + 1e-3 * _random()
  arguments = batches.arguments(np.float32(apart), labels)
  sums = _STATISTICS(_PLAIN["batch_all"], *arguments)
  metrics = summarize(tf.nest.map_structure(lambda each: each.numpy(), dict(sums)))
  assert metrics["mining/embedding_rank"] < 1.2
  assert describe_collapse(metrics) is None


def test_collapse_is_not_detected_without_mining_statistics():
  assert describe_collapse({"train/loss": 1.0}) is None


def _trained(loss, num_steps=60):
  """Returns embeddings of a linear encoder that starts collapsed."""
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
def test_collapsed_encoder_stays_collapsed(name):
  embeddings = _trained(_PLAIN[name]).numpy()
  assert (embeddings == embeddings[0]).all()


@pytest.mark.parametrize("name", _PLAIN)
def test_jitter_recovers_from_collapse(name):
  embeddings = _trained(losses.JitteredLoss(loss=_PLAIN[name], scale=0.01))
  metrics = _metrics(embeddings)
  assert describe_collapse(metrics) is None
  assert metrics["mining/hard_fraction"] < 0.3


def test_jitter_of_slices_equals_that_of_the_whole_batch():
  embeddings, labels = batches.random_batch("unbalanced")
  loss = losses.JitteredLoss(loss=_PLAIN["batch_all"])
  whole = batches.evaluate(loss, embeddings, labels)
  parts = [
    batches.evaluate(loss, embeddings, labels, rows=rows)
    for rows in ([0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11])
  ]
  for got, expected in zip(map(sum, zip(*parts)), whole):
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_jittered_loss_has_the_interface_of_a_loss():
  loss = losses.JitteredLoss(loss=_PLAIN["batch_all"])
  assert (loss.margin, loss.needs_positives) == (0.5, True)
  assert loss.comparison is _PLAIN["batch_all"].comparison


def test_scale_not_above_zero_is_refused():
  with pytest.raises(UserError, match="scale=0 is not above 0"):
    losses.JitteredLoss(loss=_PLAIN["batch_all"], scale=0)


_MARGIN = 0.8
_LOSS = losses.BatchAllTripletLoss(margin=_MARGIN)
_ALL = losses.MiningStatistics(num_anchors=1000)
_EIGHT = losses.MiningStatistics(num_anchors=8)


def _summary(embeddings, labels, weights=None, statistics=_ALL, loss=_LOSS, **options):
  arguments = batches.arguments(
    np.float32(embeddings), np.array(labels, np.int32), weights, **options
  )
  sums = statistics(loss, *arguments)
  return summarize(tf.nest.map_structure(lambda each: each.numpy(), dict(sums)))


def _batch(num=37, seed=0):
  random = np.random.default_rng(seed)
  return random.normal(size=(num, 4)), random.integers(0, 6, num)


def _rows(embeddings, labels):
  """Yields distances to positives and to negatives for each example."""
  for a in range(len(labels)):
    distances = np.linalg.norm(embeddings - embeddings[a], axis=1)
    others = np.arange(len(labels)) != a
    same = labels == labels[a]
    yield distances[same & others], distances[~same]


def test_triplet_fractions_equal_those_of_a_loop():
  embeddings, labels = _batch()
  pairs = [(p, n) for ps, ns in _rows(embeddings, labels) for p in ps for n in ns]
  summary = _summary(embeddings, labels)
  kinds = {
    "hard": [n < p for p, n in pairs],
    "semi_hard": [p <= n < p + _MARGIN for p, n in pairs],
    "easy": [n >= p + _MARGIN for p, n in pairs],
  }
  for name, is_kind in kinds.items():
    assert summary[f"mining/{name}_fraction"] == pytest.approx(np.mean(is_kind))


def test_hardest_distances_and_violations_equal_those_of_a_loop():
  embeddings, labels = _batch()
  rows = [(ps, ns) for ps, ns in _rows(embeddings, labels) if len(ps)]
  summary = _summary(embeddings, labels)
  farthest = np.array([ps.max() for ps, _ in rows])
  nearest = np.array([ns.min() for _, ns in _rows(embeddings, labels)])
  assert summary["mining/hardest_positive_distance"] == pytest.approx(farthest.mean())
  assert summary["mining/hardest_negative_distance"] == pytest.approx(nearest.mean())
  violated = [ps.max() + _MARGIN > ns.min() for ps, ns in rows]
  assert summary["mining/margin_violations"] == pytest.approx(np.mean(violated))


def test_quantiles_of_distances_are_those_of_all_pairs():
  embeddings, labels = _batch(200)
  rows = list(_rows(embeddings, labels))
  summary = _summary(embeddings, labels)
  for column, name in enumerate(("positive", "negative")):
    distances = np.concatenate([row[column] for row in rows])
    for percent in (5, 50, 95):
      got = summary[f"mining/{name}_distance_p{percent:02}"]
      assert got == pytest.approx(np.percentile(distances, percent), rel=0.03)


def test_duplicates_and_lone_anchors_are_counted():
  embeddings = np.float32([[1, 0], [1, 0], [0, 1], [2, 2]])
  summary = _summary(embeddings, [0, 0, 1, 2])
  assert summary["mining/duplicate_fraction"] == pytest.approx(2 / 12)
  assert summary["mining/anchors_without_positive"] == pytest.approx(2 / 4)


def test_padding_does_not_change_the_statistics():
  embeddings, labels = _batch()
  weights = np.ones(len(labels) + 3, np.float32)
  weights[5], weights[-2:] = 0, 0
  padded = np.insert(np.r_[embeddings, embeddings[:2]], 5, embeddings[7], axis=0)
  got = _summary(padded, np.insert(np.r_[labels, labels[:2]], 5, labels[7]), weights)
  assert got == pytest.approx(_summary(embeddings, labels), rel=1e-5)


@pytest.mark.parametrize("num_replicas", [2, 3, 4])
@pytest.mark.parametrize("statistics", [_ALL, _EIGHT], ids=["all", "sample"])
def test_parts_of_a_batch_add_up_to_the_whole(num_replicas, statistics):
  embeddings, labels = _batch(36)
  parts = [
    statistics(
      _LOSS,
      *batches.arguments(
        np.float32(embeddings), np.array(labels, np.int32), None, rows
      ),
    )
    for rows in np.split(np.arange(36), num_replicas)
  ]
  added = tf.nest.map_structure(lambda *each: sum(v.numpy() for v in each), *parts)
  whole = _summary(embeddings, labels, statistics=statistics)
  assert summarize(added) == pytest.approx(whole, rel=1e-5)


def test_sample_takes_rows_at_a_regular_interval():
  embeddings, labels = _batch(40)
  got = _summary(embeddings, labels, statistics=_EIGHT)
  nearest = [ns.min() for _, ns in list(_rows(embeddings, labels))[::5]]
  assert got["mining/hardest_negative_distance"] == pytest.approx(np.mean(nearest))


def test_triplets_are_classified_by_the_distance_of_the_loss():
  embeddings, labels = _batch()
  unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
  loss = losses.BatchAllTripletLoss(margin=0.3, distance="cosine")
  pairs = [(p, n) for ps, ns in _rows(unit, labels) for p in ps for n in ns]
  violated = [p**2 / 2 + 0.3 > n**2 / 2 for p, n in pairs]
  summary = _summary(embeddings, labels, loss=loss)
  assert 1 - summary["mining/easy_fraction"] == pytest.approx(np.mean(violated))


def test_loss_without_margin_has_no_semi_hard_fraction():
  summary = _summary(*_batch(), loss=losses.InfoNCELoss(temperature=0.1))
  assert "mining/hard_fraction" in summary
  assert "mining/semi_hard_fraction" not in summary


@pytest.mark.parametrize("is_traced", [False, True])
def test_statistics_are_computed_every_n_steps(is_traced):
  statistics = losses.MiningStatistics(every_steps=3)
  arguments = batches.arguments(*batches.random_batch("unbalanced"))
  step = tf.Variable(0)

  def compute():
    return statistics.at_step(step, _LOSS, *arguments)

  call = tf.function(compute) if is_traced else compute
  expected = statistics(_LOSS, *arguments)["mining/hardest_positive_distance"]
  for number in range(5):
    step.assign(number)
    got = call()["mining/hardest_positive_distance"]
    wanted = expected if number % 3 == 0 else (0, 0)
    np.testing.assert_allclose(got, wanted, rtol=1e-6)


def test_statistics_have_no_gradient():
  anchors, candidates = batches.arguments(*batches.random_batch("balanced"))
  with tf.GradientTape() as tape:
    tape.watch(anchors.embeddings)
    sums = _ALL(_LOSS, Anchors(*anchors), candidates)
  assert tape.gradient(tf.nest.flatten(dict(sums)), anchors.embeddings) is None


@pytest.mark.parametrize("options", [{"num_anchors": 0}, {"every_steps": 0}])
def test_no_anchors_and_no_steps_are_refused(options):
  with pytest.raises(UserError, match="no statistics set TrainStep"):
    losses.MiningStatistics(**options)
