"""Pair and softmax losses from their definitions; see tests/losses/oracles.py."""

from __future__ import annotations

import math

import numpy as np


def inner_product(x, y):
  return np.dot(x, y)


def log_sum_exp(values):
  """Returns log Σ exp(value) without overflow."""
  largest = max(values)
  return largest + math.log(sum(math.exp(value - largest) for value in values))


def contrastive(margin):
  def terms(positives, negatives, at):
    del at
    costs = [d * d / 2 for d in positives]
    costs += [max(margin - d, 0) ** 2 / 2 for d in negatives]
    return sum(costs), sum(cost > 0 for cost in costs), len(costs)

  return terms


def lifted_structure(margin):
  def terms(positives, negatives, at):
    del at
    if not positives or not negatives:
      return 0, 0, 0
    pull = log_sum_exp(positives)
    push = log_sum_exp([margin - d for d in negatives])
    cost = max(pull + push, 0)
    return cost, cost > 0, 1

  return terms


def multi_similarity(alpha, beta, threshold, epsilon):
  def terms(positives, negatives, at):
    del at
    highest = max(negatives, default=-math.inf)
    lowest = min(positives, default=math.inf)
    pull = sum(
      math.exp(-alpha * (s - threshold)) for s in positives if s < highest + epsilon
    )
    push = sum(
      math.exp(beta * (s - threshold)) for s in negatives if s > lowest - epsilon
    )
    cost = math.log1p(pull) / alpha + math.log1p(push) / beta
    return cost, cost > 0, 1

  return terms


def circle(margin, scale):
  def terms(positives, negatives, at):
    if not positives or not negatives:
      return 0, 0, 0
    pull = sum(
      math.exp(-scale * max(1 + margin - fixed, 0) * (s - (1 - margin)))
      for s, fixed in zip(positives, at[0])
    )
    push = sum(
      math.exp(scale * max(fixed + margin, 0) * (s - margin))
      for s, fixed in zip(negatives, at[1])
    )
    return math.log1p(pull * push), 1, 1

  return terms


def one_positive_softmax(temperature):
  """InfoNCE; n-pairs at temperature 1."""

  def terms(positives, negatives, at):
    del at
    logits = [s / temperature for s in negatives]
    costs = [log_sum_exp([p, *logits]) - p for p in np.divide(positives, temperature)]
    return sum(costs), sum(cost > 0 for cost in costs), len(costs)

  return terms


def supervised_contrastive(temperature):
  def terms(positives, negatives, at):
    del at
    if not positives:
      return 0, 0, 0
    everyone = sum(math.exp(s / temperature) for s in positives + negatives)
    logs = [math.log(math.exp(s / temperature) / everyone) for s in positives]
    return -sum(logs) / len(logs), 1, 1

  return terms


def soft_nearest_neighbour(temperature):
  def terms(positives, negatives, at):
    del at
    if not positives:
      return 0, 0, 0
    own = log_sum_exp([-d / temperature for d in positives])
    everyone = log_sum_exp([-d / temperature for d in positives + negatives])
    return everyone - own, 1, 1

  return terms
