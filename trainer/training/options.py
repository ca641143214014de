"""Options of a training step and of the training loop."""

from __future__ import annotations

import dataclasses
from typing import Optional

import gin
import tensorflow as tf

from trainer.errors import UserError
from trainer.models.batch_norm import has_synchronized

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


_CHOICES = {
  "on_disk_full": ("continue", "stop"),
  "on_nonfinite": ("stop", "skip", "restore"),
}


@gin.register
@dataclasses.dataclass(frozen=True)
class LoopOptions:
  """How long a run goes, how often the host looks in, what it does about trouble.

  Attributes:
    num_steps: steps in all.
    steps_per_loop: steps a host call; metrics are logged once a call, and a run that is
      told to stop goes on to its end.
    checkpoint_every_steps: a multiple of `steps_per_loop`.
    num_checkpoints_kept: how many of the newest checkpoints stay.
    on_disk_full: "continue" without what could not be written, or "stop" if that is
      a checkpoint. Either way a run that ends without a file has exit status 2.
    on_nonfinite: "stop" before an update that is not finite; "skip" its batch; or
      "restore" to the newest checkpoint and on with the batch after.
    max_not_finite: how many batches may be passed over in all.

  Raises:
    UserError: a number is below 1, or a choice does not exist.
  """

  num_steps: int
  steps_per_loop: int
  checkpoint_every_steps: int
  num_checkpoints_kept: int = 3
  on_disk_full: str = "continue"
  on_nonfinite: str = "stop"
  max_not_finite: int = 3

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      choices = _CHOICES.get(field.name)
      if choices is None and value < 1:
        raise UserError(f"LoopOptions.{field.name}={value} must be at least 1.")
      if choices is not None and value not in choices:
        raise UserError(
          f"LoopOptions.{field.name}={value!r} is none of {', '.join(choices)}."
        )
    if self.checkpoint_every_steps % self.steps_per_loop:
      raise UserError(
        f"LoopOptions.checkpoint_every_steps={self.checkpoint_every_steps} must be a "
        f"multiple of steps_per_loop={self.steps_per_loop}."
      )
