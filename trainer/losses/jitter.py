"""Recovery from collapse by adding small vectors to the embeddings.

Shapes: A anchors, C candidates, D dimensions.
"""

from __future__ import annotations

from typing import Any, Optional

import gin
import tensorflow as tf

from trainer.errors import UserError
from trainer.losses.distances import PairwiseMetric
from trainer.losses.keras_loss import InBatchLoss
from trainer.losses.loss_terms import Anchors, Candidates, LossOutput

_SEED = (20_260, 1_124)


@gin.register
class JitteredLoss(InBatchLoss):
  """A loss of embeddings that are each moved by a different small vector.

  If all embeddings are equal, every distance and its gradient are 0, so a loss of
  distances never leaves that state. Moved embeddings have gradient directions. An
  example's vector depends on its position in the global batch, so that any number of
  replicas gives the same loss. The cost is noise of this size in every distance.

  Args:
    loss: a loss of this package.
    scale: length of the vectors, in units of the embeddings; about 1 % of their norm.

  Raises:
    UserError: the scale is not above 0, or the loss has class centres.
  """

  def __init__(self, *, loss: Any, scale: float = 0.01):
    if not scale > 0:
      raise UserError(f"JitteredLoss.scale={scale} is not above 0; try 0.01.")
    if getattr(loss, "tables", None):
      raise UserError(
        "JitteredLoss moves embeddings that are compared with each other, and "
        f"{type(loss).__name__} has class centres; leave JitteredLoss out."
      )
    super().__init__()
    self._loss = loss
    self._scale = scale

  @property
  def needs_positives(self) -> bool:
    """That of the wrapped loss."""
    return self._loss.needs_positives

  @property
  def comparison(self) -> PairwiseMetric:
    """That of the wrapped loss."""
    return self._loss.comparison

  @property
  def margin(self) -> Optional[float]:
    """That of the wrapped loss."""
    return self._loss.margin

  def check_is_complete(self) -> None:
    """Checks the wrapped loss; see the base class."""
    if isinstance(self._loss, InBatchLoss):
      self._loss.check_is_complete()

  def terms(self, anchors: Anchors, candidates: Candidates) -> LossOutput:
    """Computes the loss of the moved embeddings, with gradients to the embeddings."""
    embeddings = tf.cast(candidates.embeddings, tf.float32)
    shape = tf.shape(embeddings)
    directions = tf.random.stateless_normal(shape, _SEED)
    lengths = tf.sqrt(tf.cast(shape[1], tf.float32))
    moves = tf.ensure_shape(self._scale * directions / lengths, embeddings.shape)
    own = tf.gather(moves, candidates.positions)
    return self._loss(
      anchors._replace(embeddings=tf.cast(anchors.embeddings, tf.float32) + own),
      candidates._replace(embeddings=embeddings + moves),
    )
