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
  lists_of_pairs,
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
      "(B, L); squeeze (B, 1) labels, take argmax of one-hot ones, cast floats."
    )
  if num_embeddings is not None and labels.shape[0] not in (None, num_embeddings):
    raise UserError(
      f"{labels.shape[0]} labels were given for {num_embeddings} embeddings; "
      "give one label for each embedding."
    )


def positive_lists(anchors: Anchors, candidates: Candidates) -> PositiveLists:
  """The positives of each anchor one after the other; see `relevance`."""
  if candidates.is_relevant is None and candidates.labels.dtype != tf.bool:
    return lists_of_classes(anchors, candidates)
  return lists_of_pairs(relevance(anchors, candidates).is_positive)


def relevance(
  anchors: Anchors, candidates: Candidates, lists: Optional[PositiveLists] = None
) -> Relevance:
  """Positives share a label with the anchor, or are given; the rest are negatives."""
  is_self = tf.equal(
    candidates.positions[:, None], tf.range(tf.shape(candidates.is_valid)[0])[None, :]
  )
  is_eligible = tf.logical_and(candidates.is_valid[None, :], ~is_self)
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
