"""Losses from their definitions: plain loops in float64, which import nothing of ours.

A term function is given the compared values of one anchor to its positives and to its
negatives (distances or similarities), and the same values `at` the point where a
gradient is taken, for the weights that a paper holds constant. It returns the sum of
the anchor's terms, how many are above 0 and how many there are.
"""

from __future__ import annotations

import numpy as np


def euclidean(x, y):
  return np.sqrt(np.sum((x - y) ** 2))


def squared_euclidean(x, y):
  return np.sum((x - y) ** 2)


def cosine(x, y):
  return 1.0 - cosine_similarity(x, y)


def cosine_similarity(x, y):
  return np.dot(x, y) / np.sqrt(np.dot(x, x) * np.dot(y, y))


def loss_terms(compare, terms, embeddings, labels, weights, at=None):
  """Sums over anchors of weight × (total, number active, number of terms)."""
  at = embeddings if at is None else at
  sums = np.zeros(3)
  for a in range(len(labels)):
    others = [c for c in range(len(labels)) if c != a and weights[c] > 0]
    positives = [c for c in others if labels[c] == labels[a]]
    negatives = [c for c in others if labels[c] != labels[a]]
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


def batch_hard(margin):
  def terms(positives, negatives, at):
    del at
    farthest = max(positives, default=0)
    hinge = max(farthest - min(negatives, default=farthest) + margin, 0)
    return hinge, hinge > 0, 1

  return terms
