"""Optimizers that gin can name.

Clipping is the optimizer's (`global_clipnorm`), because gradients reach it summed over
the replicas: clipped before, each replica would clip by its own norm.
"""

from __future__ import annotations

from typing import Any, Optional

import gin
import tensorflow as tf

from trainer.loop.lamb import Lamb
from trainer.loop.schedules import LearningRate, as_schedule


def hyperparameters(optimizer: Any) -> dict[str, tf.Variable]:
  """Returns the variables of an optimizer whose values the configuration sets.

  They are saved with the optimizer, and a checkpoint of another configuration would
  replace them: constant learning rates of Keras' optimizers, and all that the older
  kind of optimizer has.

  Args:
    optimizer: a Keras optimizer, `PerPart` or `OlderOptimizer`, built.

  Returns:
    Variables by name, such as "backbone.learning_rate".
  """
  if optimizer is None:
    return {}
  if hasattr(optimizer, "hyperparameters"):
    return optimizer.hyperparameters()
  rate = getattr(optimizer, "_learning_rate", None)
  inner = getattr(optimizer, "inner_optimizer", None)  # Of a LossScaleOptimizer.
  if inner is not None:
    return hyperparameters(inner)
  return {"learning_rate": rate} if isinstance(rate, tf.Variable) else {}


@gin.register
def adam(
  *,
  learning_rate: LearningRate,
  beta_1: float = 0.9,
  beta_2: float = 0.999,
  epsilon: float = 1e-7,
  global_clipnorm: Optional[float] = None,
) -> tf.keras.optimizers.Optimizer:
  """Adam (Kingma and Ba 2015, https://arxiv.org/abs/1412.6980).

  Args:
    learning_rate: step size, > 0, or a schedule.
    beta_1: decay of the mean of gradients, a step.
    beta_2: decay of the mean of squared gradients, a step.
    epsilon: added to the root of the latter.
    global_clipnorm: greatest norm of all gradients together; None for no clipping.

  Returns:
    A Keras optimizer.

  Raises:
    UserError: the learning rate is not positive.
  """
  return tf.keras.optimizers.Adam(
    as_schedule("adam", learning_rate),
    beta_1=beta_1,
    beta_2=beta_2,
    epsilon=epsilon,
    global_clipnorm=global_clipnorm,
  )


@gin.register
def sgd(
  *,
  learning_rate: LearningRate,
  momentum: float = 0.0,
  is_nesterov: bool = False,
  global_clipnorm: Optional[float] = None,
) -> tf.keras.optimizers.Optimizer:
  """Stochastic gradient descent, with momentum if wanted.

  Args:
    learning_rate: step size, > 0, or a schedule.
    momentum: decay of the velocity, a step.
    is_nesterov: whether momentum is Nesterov's.
    global_clipnorm: greatest norm of all gradients together; None for no clipping.

  Returns:
    A Keras optimizer.

  Raises:
    UserError: the learning rate is not positive.
  """
  return tf.keras.optimizers.SGD(
    as_schedule("sgd", learning_rate),
    momentum=momentum,
    nesterov=is_nesterov,
    global_clipnorm=global_clipnorm,
  )


class _AdamW(tf.keras.optimizers.AdamW):
  """AdamW that decays neither biases nor scales."""

  def build(self, var_list):
    """Creates the moments of each variable."""
    if not getattr(self, "_built", False):
      self.exclude_from_weight_decay([v for v in var_list if v.shape.rank <= 1])
    super().build(var_list)


@gin.register
def adamw(
  *,
  learning_rate: LearningRate,
  weight_decay: float,
  beta_1: float = 0.9,
  beta_2: float = 0.999,
  epsilon: float = 1e-7,
  global_clipnorm: Optional[float] = None,
) -> tf.keras.optimizers.Optimizer:
  """Adam with decoupled weight decay, w ← w − η·λ·w.

  Variables of one axis or none (biases, scales, a learned temperature) are not decayed.

  Source: Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101.

  Args:
    learning_rate: step size, > 0, or a schedule.
    weight_decay: λ.
    beta_1: decay of the mean of gradients, a step.
    beta_2: decay of the mean of squared gradients, a step.
    epsilon: added to the root of the latter.
    global_clipnorm: greatest norm of all gradients together; None for no clipping.

  Returns:
    A Keras optimizer.

  Raises:
    UserError: the learning rate is not positive.
  """
  return _AdamW(
    as_schedule("adamw", learning_rate),
    weight_decay=weight_decay,
    beta_1=beta_1,
    beta_2=beta_2,
    epsilon=epsilon,
    global_clipnorm=global_clipnorm,
  )


@gin.register
def lamb(
  *,
  learning_rate: LearningRate,
  weight_decay_rate: float = 0.0,
  beta_1: float = 0.9,
  beta_2: float = 0.999,
  epsilon: float = 1e-6,
  global_clipnorm: Optional[float] = None,
) -> tf.keras.optimizers.Optimizer:
  """LAMB, for large batches; see `trainer.loop.lamb`.

  Args:
    learning_rate: step size, > 0, or a schedule.
    weight_decay_rate: λ; biases and scales are not decayed.
    beta_1: decay of the mean of gradients, a step.
    beta_2: decay of the mean of squared gradients, a step.
    epsilon: added to the root of the latter.
    global_clipnorm: greatest norm of all gradients together; None for no clipping.

  Returns:
    A Keras optimizer.

  Raises:
    UserError: the learning rate is not positive.
  """
  return Lamb(
    as_schedule("lamb", learning_rate),
    weight_decay_rate=weight_decay_rate,
    beta_1=beta_1,
    beta_2=beta_2,
    epsilon=epsilon,
    global_clipnorm=global_clipnorm,
  )
