"""Which candidates are positives, and which negatives, of which anchor.

Shapes: A anchors, C candidates, L labels an example may have.
"""

from __future__ import annotations

from typing import NamedTuple, Optional

import tensorflow as tf

from trainer.errors import UserError
from trainer.losses.positive_lists import (
  PositiveLists,
  lists_of_classes,
)
from trainer.losses.terms import Anchors, Candidates


class Relevance(NamedTuple):
  """The two kinds of pairs; an anchor itself and padding are neither.

  Attributes:
    is_positive: [A, C] bool.
    is_negative: [A, C] bool.
    lists: the positives by anchor, for losses that take one after the other.
  """

  is_positive: tf.Tensor
  is_negative: tf.Tensor
  lists: Optional[PositiveLists] = None

  @property
  def is_either(self) -> tf.Tensor:
    """[A, C] bool."""
    return tf.logical_or(self.is_positive, self.is_negative)

  @property
  def has_both(self) -> tf.Tensor:
    """[A] bool, whether an anchor has a positive and a negative."""
    return tf.logical_and(
      tf.reduce_any(self.is_positive, 1), tf.reduce_any(self.is_negative, 1)
    )


def check_batch(anchors: Anchors, candidates: Candidates) -> None:
  """Refuses what would silently broadcast to nonsense, when traced.

  Args:
    anchors: A of them.
    candidates: C of them.

  Raises:
    UserError: embeddings are not of rank 2; labels are neither [B] integer nor [B, L]
      bool, or not of one kind; weights, validity, positions or relevance have another
      shape than they need.
  """
  check_embeddings(anchors.embeddings)
  check_embeddings(candidates.embeddings)
  num_anchors, num_candidates = anchors.embeddings.shape[0], _num_embeddings(candidates)
  check_labels(anchors.labels, num_anchors)
  check_labels(candidates.labels, num_candidates)
  if anchors.labels.shape.rank != candidates.labels.shape.rank:
    raise UserError("anchors and candidates have labels of different kinds.")
  _check_shape("weights", anchors.weights, [num_anchors])
  _check_shape("is_valid", candidates.is_valid, [num_candidates])
  _check_shape("positions", candidates.positions, [num_anchors])
  for name in ("is_relevant", "is_compared"):
    if getattr(candidates, name) is not None:
      _check_shape(name, getattr(candidates, name), [num_anchors, num_candidates])


def _num_embeddings(candidates: Candidates) -> Optional[int]:
  num, fixed = candidates.embeddings.shape[0], candidates.fixed_embeddings
  return num if num is None or fixed is None else num + fixed.shape[0]


def _check_shape(name: str, tensor: tf.Tensor, shape: list[Optional[int]]) -> None:
  if not tensor.shape.is_compatible_with(shape):
    raise UserError(f"{name} have shape {tensor.shape}; needed is {tuple(shape)}.")


def check_embeddings(embeddings: tf.Tensor) -> None:
  """Refuses embeddings that are not one vector an example, when traced.

  Raises:
    UserError: their rank is known, and is not 2.
  """
  if embeddings.shape.rank not in (None, 2):
    raise UserError(
      f"embeddings have shape {tuple(embeddings.shape)}; needed is one vector for each "
      "example, shape (B, D): pool or flatten the other dimensions."
    )


def check_labels(labels: tf.Tensor, num_embeddings: Optional[int]) -> None:
  """Refuses labels that would silently broadcast to nonsense, when traced.

  Raises:
    UserError: the labels are neither [B] integer nor [B, L] bool.
  """
  is_classes = labels.dtype.is_integer and labels.shape.rank == 1
  is_several = labels.dtype == tf.bool and labels.shape.rank == 2
  if not (is_classes or is_several):
    raise UserError(
      f"labels have shape {labels.shape} and type {labels.dtype.name}; needed is one "
      "integer for each embedding, shape (B,), or several labels as bool, shape "
      "(B, L)."
    )
  if num_embeddings is not None and labels.shape[0] not in (None, num_embeddings):
    raise UserError(
      f"{labels.shape[0]} labels were given for {num_embeddings} embeddings; "
      "give one label for each embedding."
    )


def positive_lists(anchors: Anchors, candidates: Candidates) -> Optional[PositiveLists]:
  """The positives of each anchor by one sort of all labels.

  Args:
    anchors: A of them.
    candidates: C of them.

  Returns:
    None where an example has several labels or the pairs are given: then a sort of
    every row is needed, which is for a tile to do, by `lists_of_pairs`.
  """
  is_given = candidates.is_relevant is not None or candidates.is_compared is not None
  if is_given or candidates.labels.dtype == tf.bool:
    return None
  return lists_of_classes(anchors, candidates)


def relevance(
  anchors: Anchors, candidates: Candidates, lists: Optional[PositiveLists] = None
) -> Relevance:
  """Positives share a label with the anchor, or are given; the rest are negatives.

  Of what the anchor is compared with: padding and itself are neither.
  """
  is_self = tf.equal(
    candidates.positions[:, None], tf.range(tf.shape(candidates.is_valid)[0])[None, :]
  )
  is_eligible = tf.logical_and(candidates.is_valid[None, :], ~is_self)
  if candidates.is_compared is not None:
    is_eligible = tf.logical_and(is_eligible, candidates.is_compared)
  is_relevant = shares_label(anchors, candidates)
  return Relevance(
    is_positive=tf.logical_and(is_relevant, is_eligible),
    is_negative=tf.logical_and(~is_relevant, is_eligible),
    lists=lists,
  )


def shares_label(anchors: Anchors, candidates: Candidates) -> tf.Tensor:
  """[A, C] bool: the given relevance, or whether a label is in common."""
  if candidates.is_relevant is not None:
    return candidates.is_relevant
  if candidates.labels.dtype == tf.bool:
    # Counts of common labels are whole numbers, exact in float32 up to 2²⁴.
    common = tf.matmul(
      tf.cast(anchors.labels, tf.float32),
      tf.cast(candidates.labels, tf.float32),
      transpose_b=True,
    )
    return common > 0.5
  return tf.equal(anchors.labels[:, None], candidates.labels[None, :])
