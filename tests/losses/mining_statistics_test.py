"""Mining statistics, against loops over all pairs and triplets."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from tests.losses import batches
from trainer import losses
from trainer.errors import UserError
from trainer.losses.loss_terms import Anchors
from trainer.losses.metric_accumulators import summarize

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
  """Of each example, its distances to positives and to negatives."""
  for a in range(len(labels)):
    distances = np.linalg.norm(embeddings - embeddings[a], axis=1)
    others = np.arange(len(labels)) != a
    same = labels == labels[a]
    yield distances[same & others], distances[~same]


def test_shares_of_triplets_are_those_of_a_loop():
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


def test_hardest_distances_and_violations_are_those_of_a_loop():
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


def test_padding_changes_nothing():
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


def test_sample_is_every_so_many_of_the_batch():
  embeddings, labels = _batch(40)
  got = _summary(embeddings, labels, statistics=_EIGHT)
  nearest = [ns.min() for _, ns in list(_rows(embeddings, labels))[::5]]
  assert got["mining/hardest_negative_distance"] == pytest.approx(np.mean(nearest))


def test_triplets_are_told_by_the_comparison_of_the_loss():
  embeddings, labels = _batch()
  unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
  loss = losses.BatchAllTripletLoss(margin=0.3, distance="cosine")
  pairs = [(p, n) for ps, ns in _rows(unit, labels) for p in ps for n in ns]
  violated = [p**2 / 2 + 0.3 > n**2 / 2 for p, n in pairs]
  summary = _summary(embeddings, labels, loss=loss)
  assert 1 - summary["mining/easy_fraction"] == pytest.approx(np.mean(violated))


def test_loss_without_margin_has_no_share_of_semi_hard_triplets():
  summary = _summary(*_batch(), loss=losses.InfoNCELoss(temperature=0.1))
  assert "mining/hard_fraction" in summary
  assert "mining/semi_hard_fraction" not in summary


@pytest.mark.parametrize("is_traced", [False, True])
def test_observed_loss_looks_at_one_of_so_many_steps(is_traced):
  statistics = losses.MiningStatistics(every_steps=3)
  arguments = batches.arguments(*batches.random_batch("unbalanced"))
  step = tf.Variable(0)
  observed = statistics.observing(_LOSS, lambda: step)
  call = (
    tf.function(lambda: observed(*arguments))
    if is_traced
    else (lambda: observed(*arguments))
  )
  plain = _LOSS(*arguments)
  expected = statistics(_LOSS, *arguments)["mining/hardest_positive_distance"]
  for number in range(5):
    step.assign(number)
    terms = call()
    assert terms.total == plain.total
    assert terms.statistics.keys() > plain.statistics.keys()
    got = terms.statistics["mining/hardest_positive_distance"]
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
