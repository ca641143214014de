"""Losses from their definitions: plain loops in float64, independent of the package.

A term function is given the compared values of one anchor to its positives and to its
negatives (distances or similarities), and the same values `at` the point where a
gradient is taken, for the weights that a paper holds constant. It returns the sum of
the anchor's terms, how many are above 0 and how many there are.
"""

from __future__ import annotations

import math

import numpy as np


def euclidean(x, y):
  return np.sqrt(np.sum((x - y) ** 2))


def squared_euclidean(x, y):
  return np.sum((x - y) ** 2)


def normalized_euclidean(x, y):
  return euclidean(x / np.sqrt(np.dot(x, x)), y / np.sqrt(np.dot(y, y)))


def cosine(x, y):
  return 1.0 - cosine_similarity(x, y)


def cosine_similarity(x, y):
  return np.dot(x, y) / np.sqrt(np.dot(x, x) * np.dot(y, y))


def relevance(labels):
  """Returns which examples share a label, for [B] classes or [B, L] label sets."""
  if np.ndim(labels) == 1:
    return [[one == other for other in labels] for one in labels]
  return [[bool(np.any(one & other)) for other in labels] for one in labels]


def loss_terms(compare, terms, embeddings, is_relevant, weights, at=None):
  """Sums over anchors of weight × (total, number active, number of terms)."""
  at = embeddings if at is None else at
  sums = np.zeros(3)
  for a in range(len(weights)):
    others = [c for c in range(len(weights)) if c != a and weights[c] > 0]
    positives = [c for c in others if is_relevant[a][c]]
    negatives = [c for c in others if not is_relevant[a][c]]
    if weights[a] > 0:
      values = [
        [compare(points[a], points[c]) for c in members]
        for points in (embeddings, at)
        for members in (positives, negatives)
      ]
      sums += weights[a] * np.array(terms(values[0], values[1], values[2:]))
  return sums


def batch_all(margin):
  def terms(positives, negatives, at):
    del at
    hinges = [max(p - n + margin, 0) for p in positives for n in negatives]
    return sum(hinges), sum(h > 0 for h in hinges), len(hinges)

  return terms


def harder(margin, hardness):
  """Returns triplets of the harder fraction of positives and negatives."""

  def terms(positives, negatives, at):
    if not positives or not negatives:
      return 0, 0, 0
    far, near = at
    least = max(far) - (1 - hardness) * (max(far) - min(far)) - 1e-9
    most = min(near) + (1 - hardness) * (max(near) - min(near)) + 1e-9
    return batch_all(margin)(
      [p for p, value in zip(positives, far) if value >= least],
      [n for n, value in zip(negatives, near) if value <= most],
      None,
    )

  return terms


def batch_hard(margin):
  def terms(positives, negatives, at):
    del at
    farthest = max(positives, default=0)
    hinge = max(farthest - min(negatives, default=farthest) + margin, 0)
    return hinge, hinge > 0, 1

  return terms


def hinge(margin):
  return lambda p, n: max(p - n + margin, 0)


def soft(p, n):
  return math.log1p(math.exp(p - n))


def semi_hard_of_pair(p, positives, negatives):
  del positives
  return min((n for n in negatives if n > p), default=max(negatives))


def semi_hard_of_anchor(p, positives, negatives):
  return semi_hard_of_pair(max(positives), positives, negatives)


def chosen(penalty, positives_of, negatives_of):
  """Returns triplets of `positives_of(...)`, each with `negatives_of(p, pos, neg)`."""

  def terms(positives, negatives, at):
    del at
    if not positives or not negatives:
      return 0, 0, 0
    costs = [
      penalty(p, n)
      for p in positives_of(positives)
      for n in negatives_of(p, positives, negatives)
    ]
    return sum(costs), sum(cost > 0 for cost in costs), len(costs)

  return terms


def semi_hard(margin):
  """Returns one triplet per positive pair; a missing negative has distance 0."""

  def terms(positives, negatives, at):
    del at
    costs = [
      max(p - semi_hard_of_pair(p, positives, negatives or [0]) + margin, 0)
      for p in positives
    ]
    return sum(costs), sum(cost > 0 for cost in costs), len(costs)

  return terms


def inside_margin(margin):
  def terms(positives, negatives, at):
    del at
    pairs = [(p, n) for p in positives for n in negatives]
    costs = [p - n + margin for p, n in pairs if p < n < p + margin]
    return sum(costs), len(costs), len(pairs)

  return terms


def distance_weighted(margin, num_dimensions, nearest, farthest):
  """Returns all positives, with negatives weighted by their probabilities."""

  def terms(positives, negatives, at):
    weights = []
    for d in at[1]:
      c = max(d, nearest)
      density = c ** (num_dimensions - 2)
      density *= (1 - c * c / 4) ** ((num_dimensions - 3) / 2)
      weights.append(1 / density if d < farthest else 0)
    if not positives or sum(weights) == 0:
      return 0, 0, 0
    sums = np.zeros(3)
    for p in positives:
      for n, weight in zip(negatives, weights):
        cost = max(p - n + margin, 0)
        sums += np.array([cost, cost > 0, 1]) * weight / sum(weights)
    return sums

  return terms
