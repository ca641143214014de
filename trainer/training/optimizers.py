"""Optimizers that gin can configure, and averages of the weights.

Clipping is done by the optimizer (`global_clipnorm`), because it receives gradients
summed over the replicas. If clipped before, each replica would clip by its own norm.

`novograd` and `rectified_adam` use Keras' legacy optimizers, which take other
arguments; `LegacyOptimizerAdapter` adapts them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Optional

import gin
import tensorflow as tf

from trainer.errors import UserError
from trainer.runtime import tensorflow_private
from trainer.training.learning_rates import LearningRate, as_schedule


class Lamb(tf.keras.optimizers.Optimizer):
  """LAMB: w ← w − η·(‖w‖ / ‖u‖)·u, with u = m̂ / (√v̂ + ε) + λ·w, for each variable.

  The ratio is 1 if either norm is 0. The optimizer of TensorFlow Addons is not used: it
  is a legacy optimizer, which cannot leave gradients unchanged under a strategy, and it
  is not available on the current stack.

  Source: You et al. 2020, https://arxiv.org/abs/1904.00962.

  Args:
    learning_rate: η, or a schedule.
    beta_1: decay of m per step.
    beta_2: decay of v per step.
    epsilon: ε.
    weight_decay_rate: λ; not for variables with at most one axis (biases, scales).
    options: of a Keras optimizer, such as `global_clipnorm`.
  """

  def __init__(
    self,
    learning_rate,
    *,
    beta_1: float = 0.9,
    beta_2: float = 0.999,
    epsilon: float = 1e-6,
    weight_decay_rate: float = 0.0,
    **options,
  ):
    super().__init__(name="lamb", **options)
    tensorflow_private.set_learning_rate(self, learning_rate)
    self._beta_1 = beta_1
    self._beta_2 = beta_2
    self._epsilon = epsilon
    self._weight_decay_rate = weight_decay_rate

  def build(self, var_list):
    """Creates m and v of each variable."""
    super().build(var_list)
    if getattr(self, "_is_made", False):
      return
    self._is_made = True
    make = self.add_variable_from_reference
    self._means = [make(variable, "m") for variable in var_list]
    self._squares = [make(variable, "v") for variable in var_list]

  def update_step(self, gradient, variable):
    """Updates one variable."""
    index = tensorflow_private.variable_position(self, variable)
    mean, square = self._means[index], self._squares[index]
    step = tf.cast(self.iterations + 1, variable.dtype)
    mean.assign(self._beta_1 * mean + (1 - self._beta_1) * gradient)
    square.assign(self._beta_2 * square + (1 - self._beta_2) * gradient**2)
    unbiased_mean = mean / (1 - self._beta_1**step)
    unbiased_square = square / (1 - self._beta_2**step)
    update = unbiased_mean / (tf.sqrt(unbiased_square) + self._epsilon)
    if variable.shape.rank > 1:
      update += self._weight_decay_rate * variable
    norms = tf.norm(variable), tf.norm(update)
    is_usual = (norms[0] > 0) & (norms[1] > 0)
    ratio = tf.where(is_usual, tf.math.divide_no_nan(*norms), 1.0)
    rate = tf.cast(self.learning_rate, variable.dtype)
    variable.assign_sub(rate * ratio * update)

  def get_config(self):
    """Returns the arguments that Keras needs to copy the optimizer."""
    return {
      **super().get_config(),
      "learning_rate": tensorflow_private.learning_rate_config(self),
      "beta_1": self._beta_1,
      "beta_2": self._beta_2,
      "epsilon": self._epsilon,
      "weight_decay_rate": self._weight_decay_rate,
    }


@gin.register
class MultiOptimizer(tf.Module):
  """One optimizer for the backbone, and another for the head and the loss.

  Each clips its own gradients. The logged learning rate is the head's.

  Args:
    backbone: Keras optimizer, usually with a small learning rate.
    head: Keras optimizer.
  """

  def __init__(
    self,
    *,
    backbone: tf.keras.optimizers.Optimizer,
    head: tf.keras.optimizers.Optimizer,
  ):
    super().__init__(name="per_part")
    self.backbone = backbone
    self.head = head
    self._of_backbone: set[int] = set()

  def divide(self, backbone_variables: Iterable[tf.Variable]) -> None:
    """Sets which variables are the backbone's."""
    self._of_backbone = {id(variable) for variable in backbone_variables}

  def build(self, variables: Sequence[tf.Variable]) -> None:
    """Creates the optimizers' variables."""
    self.backbone.build([v for v in variables if id(v) in self._of_backbone])
    self.head.build([v for v in variables if id(v) not in self._of_backbone])

  def apply_gradients(self, gradients_and_variables, **options) -> None:
    """Updates each part; options are passed to both."""
    pairs = list(gradients_and_variables)
    for optimizer, is_backbone in ((self.backbone, True), (self.head, False)):
      mine = [
        pair for pair in pairs if (id(pair[1]) in self._of_backbone) == is_backbone
      ]
      if mine:
        optimizer.apply_gradients(mine, **options)

  @property
  def parts(self) -> tuple[tf.keras.optimizers.Optimizer, ...]:
    """Both optimizers."""
    return self.backbone, self.head

  @property
  def iterations(self):
    """Number of steps done."""
    return self.head.iterations

  @property
  def learning_rate(self):
    """Learning rate of the head."""
    return self.head.learning_rate

  def hyperparameters(self) -> dict[str, tf.Variable]:
    """Returns the hyperparameters of both; see the function `hyperparameters`."""
    return {
      f"{part}.{name}": variable
      for part, optimizer in (("backbone", self.backbone), ("head", self.head))
      for name, variable in hyperparameters(optimizer).items()
    }

  @property
  def variables(self):
    """The variables of both."""
    return [*self.backbone.variables, *self.head.variables]


def set_step(optimizer: Any, step: int) -> None:
  """Sets the number of steps done in every counter of an optimizer.

  Args:
    optimizer: built; `MultiOptimizer` has a counter for each part.
    step: number of steps done.
  """
  for each in getattr(optimizer, "parts", (optimizer,)):
    each.iterations.assign(step)


def hyperparameters(optimizer: Any) -> dict[str, tf.Variable]:
  """Returns the variables of an optimizer whose values the configuration sets.

  They are saved with the optimizer, so a checkpoint of another configuration would
  replace them. These are constant learning rates of Keras' optimizers, and all
  hyperparameters of legacy optimizers.

  Args:
    optimizer: a Keras optimizer, `MultiOptimizer` or `LegacyOptimizerAdapter`, built.

  Returns:
    Variables by name, such as "backbone.learning_rate".
  """
  if optimizer is None:
    return {}
  if hasattr(optimizer, "hyperparameters"):
    return optimizer.hyperparameters()
  inner = getattr(optimizer, "inner_optimizer", None)  # For a LossScaleOptimizer.
  if inner is not None:
    return hyperparameters(inner)
  rate = tensorflow_private.learning_rate_variable(optimizer)
  return {} if rate is None else {"learning_rate": rate}


@gin.register
def adam(
  *,
  learning_rate: LearningRate,
  beta_1: float = 0.9,
  beta_2: float = 0.999,
  epsilon: float = 1e-7,
  global_clipnorm: Optional[float] = None,
) -> tf.keras.optimizers.Optimizer:
  """Creates Adam (Kingma and Ba 2015, https://arxiv.org/abs/1412.6980).

  Args:
    learning_rate: step size, > 0, or a schedule.
    beta_1: decay of the mean of gradients per step.
    beta_2: decay of the mean of squared gradients per step.
    epsilon: added to the root of the latter.
    global_clipnorm: maximum norm of all gradients together; None for no clipping.

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
  """Creates stochastic gradient descent with optional momentum.

  Args:
    learning_rate: step size, > 0, or a schedule.
    momentum: decay of the velocity per step.
    is_nesterov: whether to use Nesterov momentum.
    global_clipnorm: maximum norm of all gradients together; None for no clipping.

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
  """AdamW without decay of biases and scales."""

  def build(self, var_list):
    """Creates the moments of each variable."""
    if not getattr(self, "_is_made", False):
      self._is_made = True
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
  """Creates Adam with decoupled weight decay, w ← w − η·λ·w.

  Variables with at most one axis (biases, scales, a learned temperature) are not
  decayed.

  Source: Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101.

  Args:
    learning_rate: step size, > 0, or a schedule.
    weight_decay: λ.
    beta_1: decay of the mean of gradients per step.
    beta_2: decay of the mean of squared gradients per step.
    epsilon: added to the root of the latter.
    global_clipnorm: maximum norm of all gradients together; None for no clipping.

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
  """Creates LAMB, for large batches; see `Lamb`.

  Args:
    learning_rate: step size, > 0, or a schedule.
    weight_decay_rate: λ; biases and scales are not decayed.
    beta_1: decay of the mean of gradients per step.
    beta_2: decay of the mean of squared gradients per step.
    epsilon: added to the root of the latter.
    global_clipnorm: maximum norm of all gradients together; None for no clipping.

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


class LegacyOptimizerAdapter(tf.Module):
  """Adapter from a legacy Keras optimizer to the interface of the current ones.

  Args:
    optimizer: if it clips, it clips the gradients given to it, those of all replicas.
    with_rate: the optimizer whose rate is logged; None for `optimizer`.
  """

  def __init__(self, optimizer: Any, *, with_rate: Any = None):
    super().__init__(name=optimizer.get_config()["name"])
    self._optimizer = optimizer
    # Stored in a function, because checkpoints would contain it twice otherwise.
    self._with_rate_fn = lambda: with_rate or optimizer

  def build(self, variables: Sequence[tf.Variable]) -> None:
    """Creates the optimizer's variables."""
    self.iterations  # noqa: B018  Legacy optimizers create it on first access.
    tensorflow_private.build_legacy_optimizer(self._optimizer, variables)

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
    """Learning rate of the next step, [] float32."""
    return tensorflow_private.legacy_learning_rate(self._with_rate_fn())

  def hyperparameters(self) -> dict[str, tf.Variable]:
    """Returns variables by name; see the function `hyperparameters`."""
    optimizers = {id(each): each for each in (self._optimizer, self._with_rate_fn())}
    return {
      name: value
      for optimizer in optimizers.values()
      for name, value in tensorflow_private.legacy_hyperparameters(optimizer).items()
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
) -> LegacyOptimizerAdapter:
  """Creates NovoGrad: gradients normalised per layer, with half of Adam's memory.

  Source: Ginsburg et al. 2019, https://arxiv.org/abs/1905.11286.

  Args:
    learning_rate: step size, > 0, or a schedule.
    weight_decay: decay of all variables, in the update.
    beta_1: decay of the mean of gradients per step.
    beta_2: decay of the layers' squared norms per step.
    global_clipnorm: maximum norm of all gradients together; None for no clipping.

  Raises:
    UserError: the learning rate is not positive, or Addons is not installed.
  """
  rate = as_schedule("novograd", learning_rate)
  return LegacyOptimizerAdapter(
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
) -> LegacyOptimizerAdapter:
  """Creates rectified Adam, which needs no warm-up, optionally with Lookahead.

  Source: Liu et al. 2020, https://arxiv.org/abs/1908.03265; Zhang et al. 2019,
  https://arxiv.org/abs/1907.08610.

  Args:
    learning_rate: step size, > 0, or a schedule.
    weight_decay: decoupled decay of all variables.
    lookahead_steps: interval in steps at which the weights move back half of the way
      since the last time; 0 for never.
    global_clipnorm: maximum norm of all gradients together; None for no clipping.

  Raises:
    UserError: the learning rate is not positive, or Addons is not installed.
  """
  rate = as_schedule("rectified_adam", learning_rate)
  addons = _addons("rectified_adam")
  optimizer = addons.RectifiedAdam(
    rate, weight_decay=weight_decay, **_clipping(global_clipnorm)
  )
  if not lookahead_steps:
    return LegacyOptimizerAdapter(optimizer)
  return LegacyOptimizerAdapter(
    addons.Lookahead(optimizer, sync_period=lookahead_steps), with_rate=optimizer
  )


def _clipping(global_clipnorm: Optional[float]) -> dict[str, float]:
  return {} if global_clipnorm is None else {"global_clipnorm": global_clipnorm}


def _addons(name: str) -> Any:
  try:
    import tensorflow_addons
  except ImportError as error:
    raise UserError(
      f"{name} needs TensorFlow Addons, which supports Python 3.9 to 3.11 only; "
      "use lamb or adamw."
    ) from error
  return tensorflow_addons.optimizers


class AveragedWeights(tf.Module):
  """A moving average of each weight: a ← d·a + (1 − d)·w after each step.

  At step t, d = min(decay, (1 + t) / (10 + t)), which reduces the influence of the
  initial weights.

  Args:
    weights: variables of the encoder, which exist.
    decay: d, in (0, 1).

  Raises:
    UserError: the decay is not in (0, 1).
  """

  def __init__(self, weights: Sequence[tf.Variable], *, decay: float):
    super().__init__()
    if not 0 < decay < 1:
      raise UserError(f"averaging_decay={decay} must be between 0 and 1, e.g. 0.999.")
    self._decay = decay
    # Stored in a function, because checkpoints would name the weights after this
    # otherwise.
    self._weights_fn = lambda: tuple(weights)
    # Each replica computes its own equal copy: no communication is needed.
    self.averages = [
      tf.Variable(
        tf.convert_to_tensor(weight),
        trainable=False,
        synchronization=tf.VariableSynchronization.ON_READ,
        aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
      )
      for weight in weights
    ]

  def update(self, step: tf.Tensor) -> None:
    """Updates the averages; must be called on each replica after each step.

    Args:
      step: [] integer, number of steps done.
    """
    step = tf.cast(step, tf.float32)
    decay = tf.minimum(self._decay, (1.0 + step) / (10.0 + step))
    for average, weight in zip(self.averages, self._weights_fn()):
      average.assign_add((1.0 - decay) * (tf.cast(weight, tf.float32) - average))

  @contextlib.contextmanager
  def in_use(self) -> Iterator[None]:
    """Replaces the weights by the averages inside the context.

    Yields:
      Nothing.
    """
    weights = self._weights_fn()
    before = [weight.numpy() for weight in weights]
    for weight, average in zip(weights, self.averages):
      weight.assign(average.numpy())
    try:
      yield
    finally:
      for weight, value in zip(weights, before):
        weight.assign(value)
