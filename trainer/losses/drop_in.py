"""The functions of omoindrot/tensorflow-triplet-loss: same names, same values.

On a GPU call tf.config.experimental.enable_tensor_float_32_execution(False) first, as a
training of this package does: TensorFloat-32 has distances right to a hundredth only.

Shapes: B embeddings of one device, D dimensions.
"""

from __future__ import annotations

import functools

import tensorflow as tf

from trainer.losses.relevance import check_labels
from trainer.losses.terms import Anchors, Candidates, LossTerms
from trainer.losses.triplet import BatchAllTripletLoss, BatchHardTripletLoss


def batch_all_triplet_loss(
  labels: tf.Tensor, embeddings: tf.Tensor, margin: float, squared: bool = False
) -> tuple[tf.Tensor, tf.Tensor]:
  """The mean of max(d_ap − d_an + margin, 0) over the triplets where it is above 0.

  Args:
    labels: [B] integer.
    embeddings: [B, D] float.
    margin: above 0, in the distances' units.
    squared: squared instead of Euclidean distances.

  Returns:
    [] float32 loss, and [] float32 fraction of the valid triplets that are above 0;
    both 0 where there is none.

  Raises:
    UserError: the margin is not above 0, or labels are not one integer an embedding.
  """
  loss = _loss(BatchAllTripletLoss, margin, squared)
  terms = _of_one_device(loss, labels, embeddings)
  active = terms.statistics["mining/active_fraction"]
  return (
    tf.math.divide_no_nan(terms.total, terms.count),
    tf.math.divide_no_nan(active.total, active.count),
  )


def batch_hard_triplet_loss(
  labels: tf.Tensor, embeddings: tf.Tensor, margin: float, squared: bool = False
) -> tf.Tensor:
  """The mean over anchors of max(hardest d_ap − hardest d_an + margin, 0), [] float32.

  An anchor without a positive counts with d_ap = 0. A batch of one class has for loss
  the margin, with gradient 0.

  Args:
    labels: [B] integer.
    embeddings: [B, D] float.
    margin: above 0, in the distances' units.
    squared: squared instead of Euclidean distances.

  Raises:
    UserError: the margin is not above 0, or labels are not one integer an embedding.
  """
  loss = _loss(BatchHardTripletLoss, margin, squared)
  terms = _of_one_device(loss, labels, embeddings)
  return tf.math.divide_no_nan(terms.total, terms.count)


@functools.lru_cache(maxsize=64)
def _loss(loss_class, margin: float, squared: bool):  # type: ignore[no-untyped-def]
  """The loss, kept: each new one is compiled anew."""
  distance = "squared_euclidean" if squared else "euclidean"
  return loss_class(margin=margin, distance=distance)


def _of_one_device(loss, labels, embeddings) -> LossTerms:  # type: ignore[no-untyped-def]
  labels = tf.convert_to_tensor(labels)
  embeddings = tf.convert_to_tensor(embeddings)
  check_labels(labels, embeddings.shape[0])
  num_embeddings = tf.shape(embeddings)[0]
  candidates = Candidates(
    embeddings=embeddings,
    labels=labels,
    is_valid=tf.ones([num_embeddings], tf.bool),
    positions=tf.range(num_embeddings),
  )
  return loss(Anchors(embeddings, labels, tf.ones([num_embeddings])), candidates)
