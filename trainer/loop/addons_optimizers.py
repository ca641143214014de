"""Optimizers of TensorFlow Addons that serve large batches; on Python 3.9-3.11.

They are optimizers of Keras' older kind, which takes other arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional

import gin
import tensorflow as tf

from trainer.errors import UserError
from trainer.loop.schedules import LearningRate, as_schedule


class OlderOptimizer(tf.Module):
  """An optimizer of Keras' older kind, to be called as one of the newer.

  Args:
    optimizer: it clips, if it does, what it is given: gradients of all replicas.
    with_rate: the optimizer whose rate is logged; None for the first.
  """

  def __init__(self, optimizer: Any, *, with_rate: Any = None):
    super().__init__(name=optimizer._name)
    self._optimizer = optimizer
    # Hidden in a function, or checkpoints would have it twice.
    self._with_rate_fn = lambda: with_rate or optimizer

  def build(self, variables: Sequence[tf.Variable]) -> None:
    """Creates the optimizer's variables."""
    self.iterations  # noqa: B018  The older kind makes it when it is asked for.
    self._optimizer._create_all_weights(variables)

  def apply_gradients(
    self, gradients_and_variables, skip_gradients_aggregation: bool = False
  ) -> None:
    """Updates the weights.

    Args:
      gradients_and_variables: pairs.
      skip_gradients_aggregation: whether the gradients are those of all replicas.
    """
    self._optimizer.apply_gradients(
      gradients_and_variables,
      experimental_aggregate_gradients=not skip_gradients_aggregation,
    )

  @property
  def iterations(self) -> tf.Variable:
    """Number of steps done."""
    return self._optimizer.iterations

  @property
  def learning_rate(self) -> tf.Tensor:
    """That of the next step, [] float32."""
    return self._with_rate_fn()._decayed_lr(tf.float32)

  def hyperparameters(self) -> dict[str, tf.Variable]:
    """Returns variables by name; see `trainer.loop.optimizers.hyperparameters`."""
    optimizers = {id(each): each for each in (self._optimizer, self._with_rate_fn())}
    return {
      name: value
      for optimizer in optimizers.values()
      for name, value in optimizer._hyper.items()
      if isinstance(value, tf.Variable)
    }

  @property
  def variables(self) -> list[tf.Variable]:
    """The optimizer's variables."""
    return self._optimizer.variables()


@gin.register
def novograd(
  *,
  learning_rate: LearningRate,
  weight_decay: float = 0.0,
  beta_1: float = 0.95,
  beta_2: float = 0.98,
  global_clipnorm: Optional[float] = None,
) -> OlderOptimizer:
  """NovoGrad: gradients normalised layer by layer, with half of Adam's memory.

  Source: Ginsburg et al. 2019, https://arxiv.org/abs/1905.11286.

  Args:
    learning_rate: step size, > 0, or a schedule.
    weight_decay: of all variables, in the update.
    beta_1: decay of the mean of gradients, a step.
    beta_2: decay of the layers' squared norms, a step.
    global_clipnorm: greatest norm of all gradients together; None for no clipping.

  Raises:
    UserError: the learning rate is not positive, or Addons is not there.
  """
  rate = as_schedule("novograd", learning_rate)
  return OlderOptimizer(
    _addons("novograd").NovoGrad(
      rate,
      weight_decay=weight_decay,
      beta_1=beta_1,
      beta_2=beta_2,
      **_clipping(global_clipnorm),
    )
  )


@gin.register
def rectified_adam(
  *,
  learning_rate: LearningRate,
  weight_decay: float = 0.0,
  lookahead_steps: int = 0,
  global_clipnorm: Optional[float] = None,
) -> OlderOptimizer:
  """Adam that needs no warm-up; with Lookahead, steps that are averaged on the way.

  Source: Liu et al. 2020, https://arxiv.org/abs/1908.03265; Zhang et al. 2019,
  https://arxiv.org/abs/1907.08610.

  Args:
    learning_rate: step size, > 0, or a schedule.
    weight_decay: of all variables, decoupled.
    lookahead_steps: after how many steps the weights go half of the way that they
      took; 0 for never.
    global_clipnorm: greatest norm of all gradients together; None for no clipping.

  Raises:
    UserError: the learning rate is not positive, or Addons is not there.
  """
  rate = as_schedule("rectified_adam", learning_rate)
  addons = _addons("rectified_adam")
  optimizer = addons.RectifiedAdam(
    rate, weight_decay=weight_decay, **_clipping(global_clipnorm)
  )
  if not lookahead_steps:
    return OlderOptimizer(optimizer)
  return OlderOptimizer(
    addons.Lookahead(optimizer, sync_period=lookahead_steps), with_rate=optimizer
  )


def _clipping(global_clipnorm: Optional[float]) -> dict[str, float]:
  return {} if global_clipnorm is None else {"global_clipnorm": global_clipnorm}


def _addons(name: str) -> Any:
  try:
    import tensorflow_addons
  except ImportError as error:
    raise UserError(
      f"{name} needs TensorFlow Addons, which is there for Python 3.9 to 3.11 only; "
      "use lamb or adamw."
    ) from error
  return tensorflow_addons.optimizers
