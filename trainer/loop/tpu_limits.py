"""What a step can't have on a TPU, told before one is asked for anything."""

from __future__ import annotations

import tensorflow as tf

from trainer.errors import UserError
from trainer.loop.step import TrainStep


def check(step: TrainStep) -> None:
  """Refuses what TensorFlow's TPUStrategy refuses in the middle of the first step.

  Args:
    step: to train on a TPU.

  Raises:
    UserError: its encoder computes in mixed_float16.
  """
  if isinstance(step.optimizer, tf.keras.mixed_precision.LossScaleOptimizer):
    raise UserError(
      "Encoder.precision='mixed_float16' scales the loss, which TPUs have no use for "
      "and TensorFlow refuses on them; use 'mixed_bfloat16'."
    )


def check_if_on_tpu(step: TrainStep) -> None:
  """The same where the strategy in whose scope it is called is that of a TPU.

  Args:
    step: to train under the strategy.

  Raises:
    UserError: as `check`.
  """
  if isinstance(tf.distribute.get_strategy(), tf.distribute.TPUStrategy):
    check(step)
