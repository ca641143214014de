"""Accumulated sums and their metrics, against NumPy on the values."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from trainer.losses import metric_accumulators
from trainer.losses.loss_terms import WeightedMean

_COUNTED = np.array([1, 1, 0, 1, 1, 1], bool)


def _summary(statistic):
  return metric_accumulators.summarize(
    {"a": tf.nest.map_structure(lambda each: each.numpy(), statistic)}
  )


def _numbers(seed=0):
  return np.random.default_rng(seed).gamma(2, 3, 6).astype(np.float32)


def test_ratio_is_the_weighted_mean():
  numbers = _numbers()
  summary = _summary(
    metric_accumulators.weighted_mean(tf.constant(numbers), tf.constant(_COUNTED))
  )
  assert summary == {"a": pytest.approx(numbers[_COUNTED].mean(), rel=1e-6)}


def test_moments_are_mean_and_standard_deviation():
  numbers = _numbers()
  summary = _summary(
    metric_accumulators.moments(tf.constant(numbers), tf.constant(_COUNTED))
  )
  assert summary["a"] == pytest.approx(numbers[_COUNTED].mean(), rel=1e-6)
  assert summary["a_std"] == pytest.approx(numbers[_COUNTED].std(), rel=1e-5)


def _histogram(numbers):
  lower, share = metric_accumulators.bins_of(tf.constant(numbers, tf.float32))
  counts = np.zeros(metric_accumulators.NUM_BINS, np.float32)
  np.add.at(counts, lower.numpy(), 1 - share.numpy())
  np.add.at(counts, lower.numpy() + 1, share.numpy())
  return metric_accumulators.Histogram(tf.constant(counts))


@pytest.mark.parametrize("scale", [1e-5, 1.0, 1e5])
def test_error_of_quantiles_is_at_most_half_a_bin(scale):
  numbers = scale * np.random.default_rng(1).gamma(2, 1, 5000)
  summary = _summary(_histogram(numbers))
  for percent in metric_accumulators.QUANTILES:
    expected = np.percentile(numbers, percent)
    assert summary[f"a_p{percent:02}"] == pytest.approx(expected, rel=0.022)


def test_suffix_stands_before_the_name_of_a_loss():
  moments = metric_accumulators.Moments(2.0, 6.0, 2.0)
  found = metric_accumulators.summarize({"centres/own_cosine/ArcFaceLoss": moments})
  assert set(found) == {
    "centres/own_cosine/ArcFaceLoss",
    "centres/own_cosine_std/ArcFaceLoss",
  }


def test_crossing_a_bin_edge_barely_changes_the_sums():
  near = [_histogram([2.0**3 * (1 + delta)]).counts for delta in (-1e-6, 1e-6)]
  np.testing.assert_allclose(*near, atol=1e-4)


def test_values_outside_the_histogram_are_in_its_last_bins():
  counts = _histogram([0.0, 1e-30, 1e30]).counts.numpy()
  assert (counts[0], counts[-1]) == (2, 1)


def _covariance(vectors, is_counted=None):
  counted = np.ones(len(vectors), bool) if is_counted is None else is_counted
  return metric_accumulators.covariance(
    tf.constant(vectors, tf.float32), tf.constant(counted)
  )


def test_effective_rank_is_the_entropy_of_the_eigenvalues():
  vectors = np.random.default_rng(2).normal(size=(500, 6)) * [4, 3, 2, 1, 1, 0] + 3
  eigenvalues = np.linalg.eigvalsh(np.cov(vectors.T, bias=True))[1:]
  shares = eigenvalues / eigenvalues.sum()
  summary = _summary(_covariance(vectors))
  assert summary["a_rank"] == pytest.approx(
    np.exp(-(shares * np.log(shares)).sum()), rel=1e-3
  )
  norms = np.mean(np.sum(vectors**2, axis=1))
  assert summary["a_spread"] == pytest.approx(
    np.sqrt(eigenvalues.sum() / norms), rel=1e-3
  )


def test_equal_vectors_have_spread_zero_and_rank_one():
  summary = _summary(_covariance(np.full((50, 4), 0.3)))
  assert (summary["a_spread"], summary["a_rank"]) == (0, 1)


def test_vectors_of_weight_zero_are_ignored():
  vectors = np.random.default_rng(3).normal(size=(6, 2))
  assert _summary(_covariance(vectors, _COUNTED)) == pytest.approx(
    _summary(_covariance(vectors[_COUNTED]))
  )


def test_summary_divides_the_accumulated_sums():
  assert metric_accumulators.summarize(
    {"a": WeightedMean(np.float32(6), np.float32(4))}
  ) == {"a": 1.5}


@pytest.mark.parametrize(
  "nothing",
  [
    metric_accumulators.weighted_mean(tf.zeros([2]), tf.zeros([2], tf.bool)),
    metric_accumulators.moments(tf.zeros([2]), tf.zeros([2], tf.bool)),
    _histogram(np.zeros(0)),
    _covariance(np.zeros((3, 2)), np.zeros(3, bool)),
  ],
)
def test_statistic_without_values_is_omitted(nothing):
  assert _summary(nothing) == {}
