"""The scale of the loss that keeps float16's small gradients from being lost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from trainer.errors import UserError


def scaling_where_needed(optimizer: Any, encoder: tf.keras.Model) -> Any:
  """The optimizer, with a dynamic scale of the loss if the encoder is mixed_float16.

  Raises:
    UserError: it would be needed, and the optimizer can't have it.
  """
  if getattr(encoder, "precision", None) != "mixed_float16":
    return optimizer
  if not isinstance(optimizer, tf.keras.optimizers.Optimizer):
    raise UserError(
      f"{optimizer.name} can't scale the loss of mixed_float16; use mixed_bfloat16, or "
      "one of adam, adamw, lamb and sgd."
    )
  return tf.keras.mixed_precision.LossScaleOptimizer(optimizer)


def has_scale(optimizer: Any) -> bool:
  """Whether an optimizer scales the loss."""
  return hasattr(optimizer, "get_scaled_loss")


def scaled(optimizer: Any, loss: tf.Tensor) -> tf.Tensor:
  """The loss times the optimizer's scale, if it has one."""
  return optimizer.get_scaled_loss(loss) if has_scale(optimizer) else loss


def unscaled(optimizer: Any, gradients: Sequence[tf.Tensor]) -> list[tf.Tensor]:
  """Gradients of the loss itself, from those of what `scaled` gives."""
  if not has_scale(optimizer):
    return list(gradients)
  return optimizer.get_unscaled_gradients(gradients)
