"""Statistics that are summed over steps and replicas, and their metrics.

All logged values are kept as sums on the devices. They are added over the steps of a
loop, reduced over the replicas once per loop, and only then divided. The result does
not depend on how a batch was split.

Shapes: N values, H bins of a histogram, D dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from trainer.losses.loss_terms import WeightedMean

# Bins of a histogram: 16 per octave, from 2^-20 to 2^20. Values beyond are counted in
# the last bin on their side. A value between the centres of two bins is shared between
# both in proportion, so that sums don't jump when it crosses a boundary.
_BINS_PER_OCTAVE = 16
_NUM_OCTAVES_BELOW_ONE = 20
_BINS_ABOVE_ONE = _NUM_OCTAVES_BELOW_ONE * _BINS_PER_OCTAVE
NUM_BINS = 2 * _BINS_ABOVE_ONE
QUANTILES = (5, 50, 95)


class Moments(NamedTuple):
  """Sums for a mean and a standard deviation.

  Attributes:
    total: [] float32.
    squares: [] float32, the total of the squares.
    count: [] float32.
  """

  total: tf.Tensor
  squares: tf.Tensor
  count: tf.Tensor


class Histogram(NamedTuple):
  """Counts of numbers >= 0 in each bin; see `bins_of`.

  Attributes:
    counts: [H] float32.
  """

  counts: tf.Tensor


class Covariance(NamedTuple):
  """Second moments of vectors, in float64, because variances are small differences.

  Attributes:
    products: [D, D] float64, the total of x xᵀ.
    total: [D] float64, the total of x.
    count: [] float32.
  """

  products: tf.Tensor
  total: tf.Tensor
  count: tf.Tensor


def weighted_mean(values: tf.Tensor, is_counted: tf.Tensor) -> WeightedMean:
  """Returns the mean of values, [N] float32, over those that count, [N] bool."""
  return WeightedMean(
    tf.reduce_sum(tf.where(is_counted, values, 0.0)),
    tf.reduce_sum(tf.cast(is_counted, tf.float32)),
  )


def moments(values: tf.Tensor, is_counted: tf.Tensor) -> Moments:
  """Returns mean and deviation of values, [N] float32, that count, [N] bool."""
  total, count = weighted_mean(values, is_counted)
  return Moments(total, weighted_mean(tf.square(values), is_counted).total, count)


def covariance(vectors: tf.Tensor, is_counted: tf.Tensor) -> Covariance:
  """Returns second moments of vectors, [N, D] float32, that count, [N] bool."""
  counted = tf.cast(tf.where(is_counted[:, None], vectors, 0.0), tf.float64)
  return Covariance(
    tf.matmul(counted, counted, transpose_a=True),
    tf.reduce_sum(counted, 0),
    tf.reduce_sum(tf.cast(is_counted, tf.float32)),
  )


def bins_of(values: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
  """Returns the two bins that a value is between.

  Args:
    values: float32 >= 0, of any shape.

  Returns:
    int32 in 0…H−2, the lower bin; and float32 in [0, 1], the share of the upper bin.
  """
  octaves = tf.math.log(tf.maximum(values, 2.0**-_NUM_OCTAVES_BELOW_ONE)) / np.log(2.0)
  places = tf.minimum(octaves * _BINS_PER_OCTAVE, _BINS_ABOVE_ONE - 1.0)
  lower = tf.minimum(tf.floor(places), _BINS_ABOVE_ONE - 2.0)
  # Count from 1, where most distances are and float32 is finest, then shift.
  return tf.cast(lower, tf.int32) + _BINS_ABOVE_ONE, places - lower


def summarize(statistics: Mapping[str, Any]) -> dict[str, float]:
  """Computes metrics from statistics summed over steps and replicas.

  Args:
    statistics: by metric name, of NumPy values.

  Returns:
    By metric name. `Moments` add a metric with `_std`. A `Histogram` gives one for each
    quantile, with `_p05` and so on. A `Covariance` gives `_spread` and `_rank`.
    Statistics with a count of 0 are left out.
  """
  return {
    _with_suffix(name, suffix): float(value)
    for name, statistic in statistics.items()
    for suffix, value in _metrics(statistic)
  }


def _with_suffix(name: str, suffix: str) -> str:
  """Adds the suffix, before the name of a loss if there is one: group/metric/Loss."""
  group, metric, *loss = name.split("/", 2) if "/" in name else ("", name)
  parts = [group, metric + suffix, *loss] if group else [metric + suffix]
  return "/".join(parts)


def _metrics(statistic: Any) -> Iterator[tuple[str, float]]:
  """Yields the metrics of one statistic: suffixes of its name, each with a value."""
  if isinstance(statistic, Histogram):
    yield from _quantiles(np.asarray(statistic.counts, np.float64))
  elif statistic.count > 0 and isinstance(statistic, Covariance):
    yield from _shape(statistic)
  elif statistic.count > 0:
    mean = float(statistic.total) / float(statistic.count)
    yield "", mean
    if isinstance(statistic, Moments):
      variance = float(statistic.squares) / float(statistic.count) - mean**2
      yield "_std", max(variance, 0.0) ** 0.5


def _quantiles(counts: np.ndarray) -> Iterator[tuple[str, float]]:
  total = counts.sum()
  if total == 0:
    return
  cumulative = np.concatenate([[0], np.cumsum(counts)]) / total
  edges = (np.arange(NUM_BINS + 1) - 0.5) / _BINS_PER_OCTAVE - _NUM_OCTAVES_BELOW_ONE
  for percent in QUANTILES:
    # Interpolate linearly within the bin of the quantile.
    last = np.searchsorted(cumulative, percent / 100)
    position = np.interp(
      percent / 100, cumulative[last - 1 : last + 1], edges[last - 1 : last + 1]
    )
    yield f"_p{percent:02}", float(2.0**position)


def _shape(statistic: Covariance) -> Iterator[tuple[str, float]]:
  """Yields relative spread and effective rank of a set of vectors.

  The spread is the root of the variance over all dimensions, in units of the root mean
  squared norm: 1 for vectors around 0, 0 if all vectors are equal. The effective rank
  is the exponential of the entropy of the covariance's eigenvalues (Roy and Vetterli
  2007, https://doi.org/10.5281/zenodo.40328): between 1 and D.
  """
  mean = np.float64(statistic.total) / statistic.count
  second = np.float64(statistic.products) / statistic.count
  squared_norm = np.trace(second)
  eigenvalues = np.linalg.eigvalsh(second - np.outer(mean, mean)).clip(min=0)
  variance = eigenvalues.sum()
  # Below float32's rounding of the vectors the variance is noise.
  is_spread = variance > 1e-12 * squared_norm
  yield "_spread", float(np.sqrt(variance / squared_norm)) if is_spread else 0.0
  shares = eigenvalues[eigenvalues > 0] / variance if is_spread else np.ones(1)
  yield "_rank", float(np.exp(-(shares * np.log(shares)).sum()))
