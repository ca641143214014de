"""How a step is computed, where what it computes is given."""

from __future__ import annotations

import dataclasses
from typing import Optional

import gin
import tensorflow as tf

from trainer.errors import UserError
from trainer.models.batch_norms import has_synchronized

COMPILED = ("nothing", "encoder", "step")


@gin.register
@dataclasses.dataclass(frozen=True)
class StepOptions:
  """How a step is computed.

  Attributes:
    num_micro_batches: in how many parts a replica's batch is embedded; more take less
      memory, and one forward pass more.
    averaging_decay: of an average of the weights, a step, e.g. 0.999; then evaluation
      uses it. None for no average.
    compiled: what XLA compiles: "nothing"; "encoder"; "step", the whole of it, which
      works on one replica only.

  Raises:
    UserError: what is to be compiled is unknown.
  """

  num_micro_batches: int = 1
  averaging_decay: Optional[float] = None
  compiled: str = "nothing"

  def __post_init__(self):
    if self.compiled not in COMPILED:
      raise UserError(f"StepOptions.compiled={self.compiled!r} is none of {COMPILED}.")

  def check_compiled(self, encoder: tf.keras.Model, num_replicas: int) -> None:
    """Refuses to compile what replicas say to each other.

    Args:
      encoder: its variables exist.
      num_replicas: of the strategy.

    Raises:
      UserError: they speak in what is to be compiled.
    """
    if num_replicas == 1:
      return
    if self.compiled == "step":
      raise UserError(
        f"StepOptions.compiled='step' can't compile what {num_replicas} replicas say "
        "to each other; use 'encoder', or one replica."
      )
    if self.compiled == "encoder" and has_synchronized(encoder):
      raise UserError(
        f"StepOptions.compiled='encoder' can't compile what {num_replicas} replicas "
        "say to each other in synchronised batch normalisation; use 'nothing', or one "
        "replica."
      )
