"""LAMB, for batches of thousands: Adam's direction at a rate that each layer earns."""

from __future__ import annotations

import tensorflow as tf


class Lamb(tf.keras.optimizers.Optimizer):
  """w ← w − η·(‖w‖ / ‖u‖)·u, with u = m̂ / (√v̂ + ε) + λ·w, for each variable.

  The ratio is 1 where either norm is 0. Own, because that of TensorFlow Addons is an
  optimizer of the old kind, which can't leave gradients as they are under a strategy,
  and isn't there on the current stack.

  Source: You et al. 2020, https://arxiv.org/abs/1904.00962.

  Args:
    learning_rate: η, or a schedule.
    beta_1: decay of m, a step.
    beta_2: decay of v, a step.
    epsilon: ε.
    weight_decay_rate: λ; not for variables of one axis or none, biases and scales.
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
    self._learning_rate = self._build_learning_rate(learning_rate)
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
    index = self._index_dict[self._var_key(variable)]
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
    """What Keras needs to copy the optimizer."""
    return {
      **super().get_config(),
      "learning_rate": self._serialize_hyperparameter(self._learning_rate),
      "beta_1": self._beta_1,
      "beta_2": self._beta_2,
      "epsilon": self._epsilon,
      "weight_decay_rate": self._weight_decay_rate,
    }
