"""Evaluates the oracles of a row of the table on a batch."""

from __future__ import annotations

import numpy as np

from tests.losses import oracles

_COUNT = {
  "mean_active": lambda sums, weights: sums[1],
  "mean_terms": lambda sums, weights: sums[2],
  "mean_anchors": lambda sums, weights: weights.sum(),
}


def sums(row, embeddings, is_relevant, weights=None, *, at=None, unit=1.0):
  """Returns total, active terms and all terms of [B, D] float64 embeddings."""
  weights = np.ones(len(embeddings)) if weights is None else weights
  terms = row.terms_of(unit)
  return oracles.loss_terms(row.compare, terms, embeddings, is_relevant, weights, at)


def total_and_count(row, embeddings, is_relevant, weights=None, *, unit=1.0):
  """Returns total and count, as a loss does."""
  weights = np.ones(len(embeddings)) if weights is None else weights
  values = sums(row, np.float64(embeddings), is_relevant, weights, unit=unit)
  return values[0], _COUNT[row.reduction](values, weights)


def slope(row, points, direction, step, is_relevant, weights=None, *, unit=1.0):
  """Central difference of the total along a direction, from [B, D] float64 points."""
  ends = [
    sums(row, points + move, is_relevant, weights, at=points, unit=unit)[0]
    for move in (step * direction, -step * direction)
  ]
  return (ends[0] - ends[1]) / (2 * step)


def gradient(row, embeddings, is_relevant, weights=None):
  """Central differences of the total along each coordinate."""
  points = np.float64(embeddings)
  slopes = np.zeros_like(points)
  for index in np.ndindex(*points.shape):
    direction = np.zeros_like(points)
    direction[index] = 1
    slopes[index] = slope(row, points, direction, 1e-6, is_relevant, weights)
  return slopes
