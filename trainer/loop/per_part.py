"""An optimizer of its own for the backbone, and one for the head."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import gin
import tensorflow as tf

from trainer.loop import optimizers


@gin.register
class PerPart(tf.Module):
  """Trains the backbone by one optimizer, and the head and the loss by another.

  Each clips its own gradients. The rate that is logged is the head's.

  Args:
    backbone: Keras optimizer, usually of a small learning rate.
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
    """Says which variables are the backbone's."""
    self._of_backbone = {id(variable) for variable in backbone_variables}

  def build(self, variables: Sequence[tf.Variable]) -> None:
    """Creates the optimizers' variables."""
    self.backbone.build([v for v in variables if id(v) in self._of_backbone])
    self.head.build([v for v in variables if id(v) not in self._of_backbone])

  def apply_gradients(self, gradients_and_variables, **options) -> None:
    """Updates each part; options are handed on to both."""
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
    """The head's."""
    return self.head.learning_rate

  def hyperparameters(self) -> dict[str, tf.Variable]:
    """Returns those of both; see `trainer.loop.optimizers.hyperparameters`."""
    return {
      f"{part}.{name}": variable
      for part, optimizer in (("backbone", self.backbone), ("head", self.head))
      for name, variable in optimizers.hyperparameters(optimizer).items()
    }

  @property
  def variables(self):
    """The variables of both."""
    return [*self.backbone.variables, *self.head.variables]


def set_step(optimizer: Any, step: int) -> None:
  """Sets the number of steps done in every counter that an optimizer has.

  Args:
    optimizer: built; `PerPart` has a counter for each part.
    step: number of steps done.
  """
  for each in getattr(optimizer, "parts", (optimizer,)):
    each.iterations.assign(step)
