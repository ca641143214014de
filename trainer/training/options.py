"""Options of a training step and of the training loop."""

from __future__ import annotations

import dataclasses
from typing import Optional

import gin
import tensorflow as tf

from trainer.errors import UserError
from trainer.models.layers import has_synchronized_batch_norm

COMPILED = ("nothing", "encoder", "step")
_CHOICES = {
  "on_disk_full": ("continue", "stop"),
  "on_nonfinite": ("stop", "skip", "restore"),
}


@gin.register
@dataclasses.dataclass(frozen=True)
class StepOptions:
  """Options for the computation of a step.

  Attributes:
    num_micro_batches: number of parts in which a replica's batch is embedded; more
      parts take less memory. More than one takes one more forward pass.
    averaging_decay: decay per step of an average of the weights, e.g. 0.999, which
      evaluation then uses. None for no average.
    compiled: what XLA compiles: "nothing"; "encoder"; "step", the whole step, for one
      replica only.

  Raises:
    UserError: `compiled` is unknown.
  """

  num_micro_batches: int = 1
  averaging_decay: Optional[float] = None
  compiled: str = "nothing"

  def __post_init__(self):
    if self.compiled not in COMPILED:
      raise UserError(f"StepOptions.compiled={self.compiled!r} is none of {COMPILED}.")

  def check_compiled(self, encoder: tf.keras.Model, num_replicas: int) -> None:
    """Raises if the compiled part contains communication between replicas.

    Args:
      encoder: its variables exist.
      num_replicas: of the strategy.

    Raises:
      UserError: replicas communicate in the compiled part.
    """
    if num_replicas == 1:
      return
    if self.compiled == "step":
      raise UserError(
        "StepOptions.compiled='step' can't compile communication between "
        f"{num_replicas} replicas; use 'encoder', or one replica."
      )
    if self.compiled == "encoder" and has_synchronized_batch_norm(encoder):
      raise UserError(
        "StepOptions.compiled='encoder' can't compile the communication of "
        f"{num_replicas} replicas in synchronised batch normalisation; use "
        "'nothing', or one replica."
      )


@gin.register
@dataclasses.dataclass(frozen=True)
class LoopOptions:
  """Length of a run, interval of host calls, and handling of failures.

  Attributes:
    num_steps: total number of steps.
    steps_per_loop: steps per host call. Metrics are logged once per call, and a stop
      request takes effect at its end.
    checkpoint_every_steps: a multiple of `steps_per_loop`.
    num_checkpoints_kept: number of newest checkpoints to keep.
    on_disk_full: "continue" without the file that could not be written, or "stop" if it
      is a checkpoint. In both cases a run that ends without a file has exit status 2.
    on_nonfinite: "stop" before an update that is not finite; "skip" its batch; or
      "restore" the newest checkpoint and continue with the batch after the bad one.
    max_nonfinite_steps: maximum number of batches skipped in all.

  Raises:
    UserError: a number is below 1, or a choice is unknown.
  """

  num_steps: int
  steps_per_loop: int
  checkpoint_every_steps: int
  num_checkpoints_kept: int = 3
  on_disk_full: str = "continue"
  on_nonfinite: str = "stop"
  max_nonfinite_steps: int = 3

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
