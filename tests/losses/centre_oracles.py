"""Losses against class centres from their definitions: loops in float64.

An oracle is a function of embeddings [N, D], centres [C, k, D], labels [N] and weights
[N]. What a paper holds constant in the gradient is computed from `at`, the embeddings
and centres where the gradient is taken.
"""

from __future__ import annotations

import math

import numpy as np


def cosine(x, w):
  norms = math.sqrt(np.dot(x, x) * np.dot(w, w))
  return np.dot(x, w) / norms if norms > 0 else 0.0


def nearest(x, centres):
  return max(cosine(x, w) for w in centres)


def relaxed(softness):
  """The mean of the cosines, each weighted by its softmax (SoftTriple)."""

  def similarity(x, centres):
    cosines = [cosine(x, w) for w in centres]
    shares = [math.exp(c / softness) for c in cosines]
    return sum(share * c for share, c in zip(shares, cosines)) / sum(shares)

  return similarity


def plain(c, fixed, label):
  return c


def cosine_margin(m):
  return lambda c, fixed, label: c - m


def angle_margin(m2, m1=1.0, m3=0.0, beyond_pi="linear", is_straight_through=False):
  """cos(m1·θ + m2) − m3; m2 may be a function of the label."""

  def moved(c, label):
    m = m2(label) if callable(m2) else m2
    theta = math.acos(c)
    if beyond_pi == "easy" and c <= 0:
      return c
    if beyond_pi == "linear" and m1 == 1 and theta > math.pi - m:
      return c - m * math.sin(m)
    return math.cos(m1 * theta + m)

  def own(c, fixed, label):
    if is_straight_through:
      return c + moved(fixed, label) - fixed - m3
    return moved(c, label) - m3

  return own


def size_margin(sizes, factor, power, offset):
  return lambda label: factor * sizes[label] ** -power + offset


def negative_log_share(own, others):
  """−log(e^own / (e^own + Σ e^other))."""
  top = max([own, *others])
  total = sum(math.exp(each - top) for each in [own, *others])
  return top + math.log(total) - own


def softmax(
  own, scale, *, similarity=nearest, ignored_above=None, is_ignored_zero=False
):
  """The mean of −log(e^{s·own} / (e^{s·own} + Σ e^{s·other}))."""

  def loss(embeddings, centres, labels, weights, at):
    total = 0.0
    for i in np.flatnonzero(weights):
      values = [similarity(embeddings[i], each) for each in centres]
      fixed = [similarity(at[0][i], each) for each in at[1]]
      others = []
      for j in range(len(centres)):
        is_ignored = ignored_above is not None and fixed[j] > ignored_above
        if j != labels[i] and not is_ignored:
          others.append(scale * values[j])
        elif j != labels[i] and is_ignored_zero:
          others.append(0.0)
      y = labels[i]
      term = negative_log_share(scale * own(values[y], fixed[y], y), others)
      total += weights[i] * term
    return total / sum(weights)

  return loss
