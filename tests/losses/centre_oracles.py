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
    return total / sum(weights) if sum(weights) else 0.0

  return loss


def ada_face(m, h, scale, update_rate):
  """AdaFace after one update of the moving mean 20 and deviation 100 of the norms."""

  def loss(embeddings, centres, labels, weights, at):
    norms = {
      i: min(max(math.sqrt(np.dot(at[0][i], at[0][i])), 1e-3), 100)
      for i in np.flatnonzero(weights)
    }
    if not norms:
      return 0.0
    batch_mean = sum(norms.values()) / len(norms)
    squares = sum((norm - batch_mean) ** 2 for norm in norms.values())
    batch_deviation = math.sqrt(squares / (len(norms) - 1))
    mean = update_rate * batch_mean + (1 - update_rate) * 20
    deviation = update_rate * batch_deviation + (1 - update_rate) * 100
    total = 0.0
    for i, norm in norms.items():
      z = min(max((norm - mean) / (deviation + 1e-3) * h, -1), 1)
      cosines = [nearest(embeddings[i], each) for each in centres]
      theta = math.acos(min(max(cosines[labels[i]], 1e-3 - 1), 1 - 1e-3))
      theta = min(max(theta - m * z, 1e-3), math.pi - 1e-3)
      others = [scale * c for j, c in enumerate(cosines) if j != labels[i]]
      own = scale * (math.cos(theta) - (m + m * z))
      total += weights[i] * negative_log_share(own, others)
    return total / sum(weights)

  return loss


def soft_triple(delta, scale, softness, regularization):
  of_examples = softmax(cosine_margin(delta), scale, similarity=relaxed(softness))

  def loss(embeddings, centres, labels, weights, at):
    total = 0.0
    k = len(centres[0])
    for each in centres:
      for t in range(k):
        for s in range(t):
          total += math.sqrt(2 + 1e-5 - 2 * cosine(each[s], each[t]))
    regularizer = total / (len(centres) * k * (k - 1)) if k > 1 else 0.0
    value = of_examples(embeddings, centres, labels, weights, at)
    return value + regularization * regularizer

  return loss


def proxy_anchor(alpha, delta):
  """Returns the loss; an example of weight w counts as w examples."""

  def loss(embeddings, centres, labels, weights, at):
    counted = np.flatnonzero(weights)
    with_positives = {labels[i] for i in counted}
    positive = negative = 0.0
    for p in range(len(centres)):
      sums = [0.0, 0.0]
      for i in counted:
        c = cosine(embeddings[i], centres[p][0])
        if labels[i] == p:
          sums[0] += weights[i] * math.exp(-alpha * (c - delta))
        else:
          sums[1] += weights[i] * math.exp(alpha * (c + delta))
      positive += math.log1p(sums[0])
      negative += math.log1p(sums[1])
    return positive / max(len(with_positives), 1) + negative / len(centres)

  return loss
