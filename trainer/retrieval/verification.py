"""Are two items of one class? How well a threshold on their distance tells.

Shapes: N items, D dimensions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Optional

import gin
import numpy as np

from trainer.errors import UserError

# Of drawing negative pairs.
_MAX_ROUNDS = 20


@gin.register
@dataclasses.dataclass(frozen=True)
class Verification:
  """ROC of pairs, nearer ones first.

  Rates are taken within positive and within negative pairs, so they don't depend on how
  many there are of each; of more than `max_pairs`, so many are drawn.

  Attributes:
    false_positive_rates: at which the true-positive rate is told.
    max_pairs: positive pairs at most, and negative pairs at most.
    seed: of the drawing.
  """

  false_positive_rates: Sequence[float] = (1e-1, 1e-2, 1e-3, 1e-4)
  max_pairs: int = 1_000_000
  seed: int = 0

  def measure(
    self,
    embeddings: np.ndarray,
    labels: np.ndarray,
    groups: Optional[np.ndarray] = None,
  ) -> dict[str, float]:
    """Measures a set of items.

    - roc_auc: share of (positive pair, negative pair) of which the positive is nearer,
      equal ones counted half.
    - tpr_at_fpr_F: largest share of positive pairs below a threshold that has at most
      the share F of the negative pairs below it.
    - best_threshold: the distance up to which pairs are taken as positive, where
      best_balanced_accuracy, (true-positive rate + true-negative rate) / 2, is largest.

    Args:
      embeddings: [N, D] float32, finite.
      labels: [N] int.
      groups: [N] int; pairs of one label and one group don't count; None for no such.

    Returns:
      By name, with "eval/" before; nothing where one kind of pair doesn't exist.
    """
    positives, negatives = self._pairs(np.asarray(labels))
    if groups is not None:
      positives = positives[groups[positives[:, 0]] != groups[positives[:, 1]]]
    if not len(positives) or not len(negatives):
      return {}
    distances = [_distances(embeddings, pairs) for pairs in (positives, negatives)]
    is_positive = np.repeat([1, 0], [len(each) for each in distances])
    nearness = -np.concatenate(distances)
    from sklearn import metrics  # Late: it takes half a second to load.

    false_rates, true_rates, thresholds = metrics.roc_curve(
      is_positive, nearness, drop_intermediate=False
    )
    # The first threshold is below all distances.
    best = 1 + int(np.argmax((true_rates - false_rates)[1:]))
    found = {
      "eval/roc_auc": metrics.auc(false_rates, true_rates),
      "eval/best_threshold": -thresholds[best],
      "eval/best_balanced_accuracy": (1 + true_rates[best] - false_rates[best]) / 2,
    }
    for rate in self.false_positive_rates:
      last = np.searchsorted(false_rates, rate, side="right") - 1
      found[_tpr_at(rate)] = true_rates[last]
    return {name: float(value) for name, value in found.items()}

  def metric_names(self) -> list[str]:
    """The names of what is measured."""
    of_thresholds = ("roc_auc", "best_threshold", "best_balanced_accuracy")
    return [
      *(f"eval/{name}" for name in of_thresholds),
      *map(_tpr_at, self.false_positive_rates),
    ]

  def _pairs(self, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[n, 2] positive and [m, 2] negative pairs of items, each pair once."""
    if self.max_pairs < 1:
      raise UserError(f"Verification.max_pairs={self.max_pairs} must be at least 1.")
    num_items = len(labels)
    rng = np.random.default_rng(self.seed)
    if num_items * (num_items - 1) // 2 <= 2 * self.max_pairs:
      pairs = np.stack(np.triu_indices(num_items, 1), axis=1)
      is_positive = labels[pairs[:, 0]] == labels[pairs[:, 1]]
      sides = (pairs[is_positive], pairs[~is_positive])
    else:
      sides = (
        _positives(labels, self.max_pairs, rng),
        _drawn_negatives(labels, self.max_pairs, rng),
      )
    return sides[0][: self.max_pairs], sides[1][: self.max_pairs]


def _tpr_at(false_positive_rate: float) -> str:
  return f"eval/tpr_at_fpr_{false_positive_rate:g}"


def _drawn_negatives(
  labels: np.ndarray, num_pairs: int, rng: np.random.Generator
) -> np.ndarray:
  """[n, 2] items of two classes; fewer than asked for where one class is nearly all."""
  found: list[np.ndarray] = []
  for _ in range(_MAX_ROUNDS):
    drawn = rng.integers(len(labels), size=[num_pairs, 2])
    found.append(drawn[labels[drawn[:, 0]] != labels[drawn[:, 1]]])
    if sum(map(len, found)) >= num_pairs:
      break
  return np.concatenate(found)


def _positives(
  labels: np.ndarray, num_pairs: int, rng: np.random.Generator
) -> np.ndarray:
  """[n, 2] distinct items of one class: all pairs, or as many drawn, equally likely."""
  order = np.argsort(labels, kind="stable")
  _, starts, sizes = np.unique(labels[order], return_index=True, return_counts=True)
  num_of_class = sizes * (sizes - 1.0)
  if num_of_class.sum() / 2 <= num_pairs:
    of_classes = [
      start + np.stack(np.triu_indices(size, 1), axis=1)
      for start, size in zip(starts, sizes)
    ]
    return order[np.concatenate([np.empty([0, 2], np.int64), *of_classes])]
  classes = rng.choice(len(sizes), num_pairs, p=num_of_class / num_of_class.sum())
  first = rng.integers(sizes[classes])
  others = rng.integers(sizes[classes] - 1)
  second = others + (others >= first)
  return order[starts[classes][:, None] + np.stack([first, second], axis=1)]


def _distances(embeddings: np.ndarray, pairs: np.ndarray) -> np.ndarray:
  """[n] float64 Euclidean distances, without cancellation."""
  parts = np.array_split(pairs, max(1, len(pairs) // 50_000))
  return np.concatenate(
    [np.linalg.norm(embeddings[p[:, 0]] - embeddings[p[:, 1]], axis=1) for p in parts]
  ).astype(np.float64)
