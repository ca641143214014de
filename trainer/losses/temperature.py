"""The temperature of a softmax, given or learned."""

from __future__ import annotations

import math
from typing import Any, Union

import gin
import tensorflow as tf

from trainer.errors import UserError
from trainer.losses.keras_loss import KerasSerializable


@gin.register
class LearnedTemperature(KerasSerializable, tf.Module):
  """A temperature that training changes, kept above 0 as the exponential of a variable.

  Args:
    initial: where it starts, above 0.

  Raises:
    UserError: it does not start above 0.
  """

  def __init__(self, *, initial: float):
    check_temperature(initial)
    super().__init__()
    self._logarithm = tf.Variable(math.log(initial), name="log_temperature")

  def get_config(self) -> dict[str, Any]:
    """The temperature as it is now: what is made of it goes on from there."""
    return {"initial": float(self())}

  def __call__(self) -> tf.Tensor:
    """The temperature, [] float32."""
    return tf.exp(self._logarithm)


Temperature = Union[float, LearnedTemperature]


def check_temperature(temperature: float) -> None:
  """Refuses a temperature that is not above 0.

  Raises:
    UserError: it is not.
  """
  if not temperature > 0:
    raise UserError(
      f"temperature={temperature} is not above 0; give a temperature such as 0.1."
    )


def value_of(temperature: Temperature) -> tf.Tensor:
  """The temperature, [] float32."""
  if isinstance(temperature, LearnedTemperature):
    return temperature()
  return tf.constant(temperature, tf.float32)
