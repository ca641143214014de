"""Keras interface of the losses: compile and fit, model files, sample weights.

Under a strategy each replica mines its own batch, and Keras takes the mean of loss and
gradients over the replicas: L = 1/R Σ_r total_r / count_r, as `local_negatives` does.
It depends on R: on more replicas an anchor of the same global batch has fewer
candidates.

Shapes: B embeddings of one replica, D dimensions, L labels, R replicas.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from trainer.distribute.collectives import Collectives
from trainer.errors import UserError
from trainer.losses.class_centres import CentreRows, ClassCentres
from trainer.losses.labels import (
  INTEGER,
  check_label_encoding,
  checked_in_graph,
  of_batch,
  read_labels,
)
from trainer.losses.loss_terms import (
  Anchors,
  Candidates,
  LossOutput,
  MiningBatch,
  ReplicaLoss,
  check_embeddings,
)


class KerasSerializable:
  """Base of objects that Keras can save in a model file and load again.

  The configuration is the constructor's arguments. Each argument is an attribute of the
  same name with a leading underscore.
  """

  def __init_subclass__(cls, **arguments: Any):
    super().__init_subclass__(**arguments)
    if cls.__module__.startswith("trainer."):  # Others register their own.
      tf.keras.utils.register_keras_serializable("trainer")(cls)

  def get_config(self) -> dict[str, Any]:
    """Returns the constructor's arguments as JSON types."""
    names = inspect.signature(type(self)).parameters
    return {name: _plain(getattr(self, f"_{name}")) for name in names}

  @classmethod
  def from_config(cls, config: Mapping[str, Any]) -> Any:
    """Returns the object that has this configuration.

    Args:
      config: as returned by `get_config`.
    """
    return cls(**{name: _revived(value) for name, value in config.items()})


class InBatchLoss(KerasSerializable, tf.Module, tf.keras.losses.Loss):
  """Base of the losses: called by training in this package, or by Keras.

  Attributes:
    reduction: how Keras combines replicas: by the mean.
  """

  reduction = tf.keras.losses.Reduction.SUM_OVER_BATCH_SIZE

  def terms(self, anchors: Anchors, candidates: Candidates) -> LossOutput:
    """Computes this replica's sum, count and statistics.

    Args:
      anchors: A of them.
      candidates: C of them, the anchors among them.
    """
    raise NotImplementedError

  @property
  def needs_norms(self) -> bool:
    """Whether the norms of the embeddings must differ."""
    return False

  @property
  def tables(self) -> list[ClassCentres]:
    """Tables of class centres of which rows are read in each step; none here."""
    return []

  def replica_loss(
    self, pairs: MiningBatch, rows: Sequence[CentreRows], collectives: Collectives
  ) -> ReplicaLoss:
    """Computes this replica's share of the loss.

    Args:
      pairs: anchors and candidates of a step.
      rows: read from each of `tables`.
      collectives: connect the replicas.
    """
    del rows
    return pairs.replica_loss(self(pairs.anchors, pairs.candidates), collectives)

  def check_is_complete(self) -> None:
    """Checks that the loss needs nothing but embeddings and labels.

    Raises:
      UserError: the loss must be updated after each step, which only training in this
        package does.
    """

  @tf.autograph.experimental.do_not_convert
  def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
    """Computes `terms` of anchors and candidates, or the loss value for Keras.

    Args:
      y_true: `Anchors`; or labels, [B] or [B, 1], as in `read_labels`.
      y_pred: `Candidates`; or embeddings [B, D].
      sample_weight: weights of labels and embeddings, [B] or [B, 1] >= 0; None for 1.
        An anchor's terms are multiplied by its weight in the sum and in the count. An
        example of weight 0 is not a candidate either.

    Returns:
      `LossOutput` for anchors; for labels the mean, [] float32, 0 if there are no
      terms.
    """
    if isinstance(y_true, Anchors):
      return self.terms(y_true, y_pred)
    return mean_of_batch(self, y_true, y_pred, sample_weight)

  def call(self, y_true: Any, y_pred: Any) -> tf.Tensor:
    """Computes the loss of labels [B] and embeddings [B, D], [] float32."""
    return mean_of_batch(self, y_true, y_pred)


class KerasLoss(KerasSerializable, tf.keras.losses.Loss):
  """A loss of this package for labels in another encoding.

  Args:
    loss: a loss of this package.
    label_encoding: "integer" for [B] or [B, 1], which every loss accepts without this
      class; "one_hot" for [B, L] with one 1 per row; "multi_hot" for [B, L] of zeros
      and ones, where examples with a common label are positives.

  Raises:
    UserError: the encoding is unknown, or the loss is not from this package.
  """

  def __init__(self, loss: InBatchLoss, *, label_encoding: str):
    if not isinstance(loss, InBatchLoss):
      raise UserError(
        f"KerasLoss has loss={loss!r}; give one of this package, such as "
        "BatchHardTripletLoss(margin=0.2)."
      )
    check_label_encoding(label_encoding)
    super().__init__(InBatchLoss.reduction, loss.name)
    self._loss = loss
    self._label_encoding = label_encoding

  @tf.autograph.experimental.do_not_convert
  def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> tf.Tensor:
    """Computes the loss of labels and embeddings [B, D]; see `InBatchLoss`."""
    return mean_of_batch(
      self._loss, y_true, y_pred, sample_weight, self._label_encoding
    )


def mean_of_batch(
  loss: InBatchLoss,
  labels: Any,
  embeddings: Any,
  weights: Any = None,
  label_encoding: str = INTEGER,
) -> tf.Tensor:
  """Computes total / count of one replica's batch, [] float32; 0 if there are no terms.

  Args:
    loss: a loss of this package.
    labels: as in `terms_of_batch`.
    embeddings: [B, D] float.
    weights: [B] or [B, 1] >= 0; None for 1.
    label_encoding: as in `read_labels`.
  """
  loss.check_is_complete()
  terms = terms_of_batch(loss, labels, embeddings, weights, label_encoding)
  return tf.math.divide_no_nan(terms.total, terms.count)


def terms_of_batch(
  loss: InBatchLoss,
  labels: Any,
  embeddings: Any,
  weights: Any = None,
  label_encoding: str = INTEGER,
) -> LossOutput:
  """Computes the terms of all embeddings of a batch against each other.

  Args:
    loss: a loss of this package.
    labels: as in `read_labels`. Total and count are NaN for invalid labels if XLA has
      dropped the assertion.
    embeddings: [B, D] float.
    weights: [B] or [B, 1] >= 0; None for 1.
    label_encoding: as in `read_labels`.

  Raises:
    UserError: embeddings are not of rank 2, or as in `read_labels`.
  """
  embeddings = tf.convert_to_tensor(embeddings)
  check_embeddings(embeddings)
  num_embeddings = tf.shape(embeddings)[0]
  read = read_labels(labels, num_embeddings, label_encoding)
  weights = _weights(weights, num_embeddings)
  terms = loss.terms(
    Anchors(embeddings, read.values, weights),
    Candidates(
      embeddings=embeddings,
      labels=read.values,
      is_valid=weights > 0.0,
      positions=tf.range(num_embeddings),
    ),
  )
  # Both become NaN: with a count of 0 the mean would be 0.
  total, count = (
    tf.where(read.is_sound, each, float("nan")) for each in (terms.total, terms.count)
  )
  return terms._replace(total=total, count=count)


def _weights(weights: Any, num_embeddings: tf.Tensor) -> tf.Tensor:
  """Converts sample weights in any shape that Keras passes to [B] float32."""
  if weights is None:
    return tf.ones([num_embeddings])
  weights = tf.cast(tf.convert_to_tensor(weights), tf.float32)
  shape = weights.shape
  if shape.rank == 0:
    weights = tf.fill([num_embeddings], weights)
  elif not (shape.rank in (None, 1) or (shape.rank == 2 and shape[1] in (None, 1))):
    raise UserError(
      f"sample_weight has shape {shape}; needed is one weight for each embedding, "
      "shape (B,) or (B, 1)."
    )
  weights = of_batch("sample_weight", tf.reshape(weights, [-1]), num_embeddings)
  # False for NaN.
  is_usable = tf.reduce_all(weights >= 0.0)
  return checked_in_graph(is_usable, weights, "sample_weight must be at least 0.")


def _plain(value: Any) -> Any:
  """Converts an argument to JSON types."""
  if hasattr(value, "get_config"):
    name = tf.keras.utils.get_registered_name(type(value))
    return {"registered_name": name, "config": value.get_config()}
  if isinstance(value, (tf.Variable, tf.Tensor)):
    value = value.numpy()
  if isinstance(value, (np.ndarray, np.generic)):
    return value.tolist()
  if isinstance(value, (list, tuple)):
    return [_plain(each) for each in value]
  return value


def _revived(value: Any) -> Any:
  """Restores the argument from the result of `_plain`."""
  if not isinstance(value, Mapping):
    return value
  name = value["registered_name"]
  part = tf.keras.utils.get_registered_object(name)
  if part is None:
    raise UserError(
      f"a loss was saved with a part {name!r}, which is not registered; import the "
      "module that has it, registered by tf.keras.utils.register_keras_serializable."
    )
  return part.from_config(value["config"])
